"""veo.py: the real google-genai client against a stub that speaks as Vertex does. No live Veo was
ever asked."""

import base64
import io
import json
import sys

import av
import numpy as np
import pytest
from PIL import Image

import collabvr as c
from examples.models import veo
from examples.tests.conftest import accept, plan
from examples.tests.stub import serving

pytest.importorskip("google.genai", reason="in examples/requirements.txt")


class Vertex:
    """Orders are kept in `orders`; what becomes of them, the other attributes tell."""

    def __init__(self):
        self.orders: list = []  # bodies
        self.refuse: list = []  # (status, message) for the next orders
        self.polls = 1  # looks before an operation is done
        self.outages = 0  # looks that get a 503
        self.outcome = None  # of operations, in place of a video
        self.film = small

    def __call__(self, method, path, body):
        if path == "/token":  # where Google's credentials get theirs
            return 200, {"access_token": "a-token", "expires_in": 3600}
        if path.endswith(":fetchPredictOperation"):
            return self.look(json.loads(body)["operationName"])
        assert path.endswith(":predictLongRunning")
        if self.refuse:
            return refusal(*self.refuse.pop(0))
        self.orders.append(json.loads(body))
        self.looks = 0
        model = path.removeprefix("/v1beta1/").removesuffix(":predictLongRunning")
        return 200, {"name": f"{model}/operations/{len(self.orders) - 1}"}

    def look(self, name):
        if self.outages:
            self.outages -= 1
            return refusal(503, "overloaded")
        self.looks += 1
        if self.looks <= self.polls:
            return 200, {"name": name}
        if self.outcome is not None:
            return 200, {"name": name, "done": True} | self.outcome
        (instance,) = self.orders[int(name.rpartition("/")[2])]["instances"]
        video = self.film(decoded(instance["image"]["bytesBase64Encoded"]))
        clip = {"bytesBase64Encoded": base64.b64encode(video).decode(), "mimeType": "video/mp4"}
        return 200, {"name": name, "done": True, "response": {"videos": [clip]}}


def refusal(status, message):
    return status, {"error": {"code": status, "message": message}}


def decoded(text):
    return np.array(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def whole(picture):
    return c.mp4(c.Clip(np.stack([picture] * 3), 24))


def small(picture):
    """Quick to encode: 2 / 0.5 are 4 s."""
    return c.mp4(c.Clip(np.stack([picture[::4, ::4]] * 3), 0.5))


@pytest.fixture(scope="module")
def service_account(tmp_path_factory):
    """Makes a file of Google's own credentials, whose tokens come from a server of ours."""
    from cryptography.hazmat.primitives import serialization as kinds
    from cryptography.hazmat.primitives.asymmetric import rsa

    private = rsa.generate_private_key(65537, 2048).private_bytes(
        kinds.Encoding.PEM, kinds.PrivateFormat.PKCS8, kinds.NoEncryption())
    file = tmp_path_factory.mktemp("google") / "service-account.json"

    def made(url):
        file.write_text(json.dumps({
            "type": "service_account", "project_id": "another", "private_key": private.decode(),
            "client_email": "me@another.iam.gserviceaccount.com", "token_uri": f"{url}/token"}))
        return str(file)
    return made


@pytest.fixture
def vertex():
    return Vertex()


@pytest.fixture
def server(vertex, service_account, monkeypatch):
    with serving(vertex) as server:
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", service_account(server.url))
        monkeypatch.setenv("GOOGLE_VERTEX_BASE_URL", server.url)
        yield server


@pytest.fixture
def vgm(server):
    return veo.Veo(project="my-project", poll_seconds=0.01)


@pytest.fixture
def quick(monkeypatch):
    """Waits for a busy server take no time."""
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)


def picture(width, height):
    """A colourful chequerboard, no two fields alike, bright up to its edges."""
    y, x = np.mgrid[:height, :width]
    fields = 90 * ((5 * x // width + 5 * y // height) % 2)
    shades = [70 + 90 * x / width, 160 - 80 * y / height, 90 + 60 * x * y / width / height]
    return np.stack(shades, -1).astype(np.uint8) + fields[..., None].astype(np.uint8)


def resized(frame, width, height):
    return np.array(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS))


STRIP = picture(16, 400)  # quick to encode
SHAPES = [(200, 300), (90, 90), (1600, 900), (3000, 200), (97, 61)]


def test_an_order_is_a_prompt_a_length_and_a_picture(vertex, server, vgm):
    vgm(picture(90, 90), "move it", 8.0, 2**31 + 7)
    _, path, headers, _ = server.asked[1]  # after the token
    assert headers["Authorization"] == "Bearer a-token"
    assert path == ("/v1beta1/projects/my-project/locations/us-central1/publishers/google/models/"
                    "veo-3.1-fast-generate-001:predictLongRunning")
    (order,) = vertex.orders
    assert order["parameters"] == {
        "aspectRatio": "16:9", "resolution": "720p", "durationSeconds": 8, "seed": 7,
        "generateAudio": False}
    (instance,) = order["instances"]
    assert instance["prompt"] == "move it"
    sent = decoded(instance["image"]["bytesBase64Encoded"])
    assert sent.shape == (720, 1280, 3)
    assert not sent[:, :280].any() and not sent[:, 1000:].any() and sent[:, 280:1000].min() > 30


@pytest.mark.parametrize("width, height", SHAPES)
def test_a_clip_has_the_pictures_shape(width, height, vertex, vgm):
    """Its first frame is the picture, up to the edges, and not shifted."""
    vertex.film, given = whole, picture(width, height)
    clip = vgm(given, "a", 4, 0)
    _, h, w, _ = clip.frames.shape
    assert w % 2 == h % 2 == 0 and (w == 1280 or h == 720) and w <= 1280 and h <= 720
    assert abs(w / h - width / height) <= 1.01 * max(1, w / h) / min(w, h)
    wanted = resized(given, w, h).astype(int)
    assert np.abs(clip.frames[0] - wanted).mean() < 4, "the codec's losses"
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        assert np.abs(clip.frames[0][edge] - wanted[edge]).mean() < 6, "no black"
    moved = {
        (dy, dx): np.abs(np.roll(clip.frames[0], (dy, dx), (0, 1)) - wanted).mean()
        for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    assert min(moved, key=moved.get) == (0, 0)
    assert clip.fps == 24 and clip.seconds == 2 / 24


def test_steps_keep_size_place_and_colours(vertex, vgm):
    vertex.film = whole
    frame, clips = picture(200, 300), []
    for t in range(3):
        clips.append(vgm(frame, "a", 4, t))
        frame = clips[-1].frames[-1]
    assert len({clip.frames.shape for clip in clips}) == 1
    first, last = (clips[i].frames[0].astype(int) for i in (0, -1))
    assert np.abs(first - last).mean() < 4
    assert np.abs(first.mean((0, 1)) - last.mean((0, 1))).max() < 1.5


def test_what_was_cut_out_fits_its_place_exactly():
    for width, height in np.random.default_rng(0).integers(16, 5000, (2000, 2)).tolist():
        left, top, w, h = box = veo.picture_box(width, height)
        assert veo.picture_box(w, h) == box
        assert not any(x % 2 for x in box) and left >= 0 <= top
        assert left + w <= 1280 and top + h <= 720


def test_a_frame_of_a_clips_size_is_sent_to_the_pixel():
    frame = np.random.default_rng(0).integers(0, 256, (720, 720, 3), np.uint8)
    sent = np.array(Image.open(io.BytesIO(veo.letterbox(frame, veo.picture_box(720, 720)))))
    assert (sent[:, 280:1000] == frame).all()


def test_a_larger_video_becomes_the_same_size(vertex, vgm):
    vertex.film = lambda frame: whole(resized(frame, 1920, 1080))
    given = picture(100, 160)
    clip = vgm(given, "a", 4, 0)
    assert clip.frames.shape == (3, 720, 450, 3)
    assert np.abs(clip.frames[0].astype(int) - resized(given, 450, 720)).mean() < 4


def test_colours_survive_hd_videos_own_kind_of_yuv(vertex, vgm):
    def hd(image):
        out = io.BytesIO()
        with av.open(out, "w", "mp4") as file:
            stream = file.add_stream("libx264", 24, {"crf": "10"})
            stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
            stream.codec_context.colorspace = 1  # BT.709
            for _ in range(2):
                frame = av.VideoFrame.from_ndarray(image).reformat(
                    format="yuv420p", dst_colorspace="ITU709")
                frame.colorspace = 1
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
        return out.getvalue()

    vertex.film = hd
    seen = vgm(np.full((90, 160, 3), (220, 40, 30), np.uint8), "a", 4, 0).frames[0]
    assert np.abs(seen.reshape(-1, 3).mean(0) - (220, 40, 30)).max() < 2


# ------------------------------------------------------------------------------
# What goes wrong


@pytest.mark.parametrize("seconds", [3, 4.5, 10])
def test_another_length_is_one_sentence(seconds, vertex, vgm):
    with pytest.raises(c.Problem, match=rf"4, 6 or 8 s, not {seconds:g}.*--seconds-next 4"):
        vgm(picture(64, 64), "a", seconds, 0)
    assert not vertex.orders


FILTERED = {"raiMediaFilteredCount": 1, "raiMediaFilteredReasons": ["the input violates rule 7."]}


@pytest.mark.parametrize("outcome, said", [
    ({"response": FILTERED}, "the input violates rule 7"), ({"response": {}}, "no reason"),
    ({"error": {"code": 13, "message": "an internal error"}}, "an internal error")])
def test_no_video_is_a_failed_generation_with_a_reason(outcome, said, vertex, vgm):
    vertex.outcome = outcome
    with pytest.raises(RuntimeError, match=f"^Veo made no clip: .*{said}"):
        vgm(STRIP, "a", 4, 0)


@pytest.mark.parametrize("status", [400, 429, 500, 503])
def test_a_refused_order_is_not_repeated(status, vertex, vgm, quick):
    """Without an answer a clip may have been ordered, and would be paid for twice."""
    vertex.refuse = [(status, "not like this")] * 2
    with pytest.raises(Exception, match=f"{status}.*not like this"):
        vgm(STRIP, "a", 4, 0)
    assert len(vertex.refuse) == 1


def test_a_poll_that_fails_is_repeated(vertex, vgm, quick):
    vertex.outages = 1
    assert len(vgm(STRIP, "a", 4, 0).frames) == 3
    assert len(vertex.orders) == 1


def test_a_clip_that_takes_too_long_is_one_sentence(vertex, vgm):
    vertex.polls, vgm.clip_timeout = 10**9, 0.2
    with pytest.raises(c.Problem, match="not done after 0.2 s"):
        vgm(STRIP, "a", 4, 0)


def test_what_is_missing_is_one_sentence(server, monkeypatch):
    with pytest.raises(c.Problem, match="--project YOURS"):
        veo.Veo().check()
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "nowhere.json")
    with pytest.raises(c.Problem, match="Vertex needs Google's own credentials .*nowhere.json"):
        veo.Veo(project="p").check()
    monkeypatch.setitem(sys.modules, "google.genai", None)
    with pytest.raises(c.Problem, match="google.genai is needed: pip install -r examples/"):
        veo.Veo(project="p").check()


def test_the_command_line_pays_once(vertex, server, tmp_path, capsys, monkeypatch):
    """And refuses a length before it orders anything."""
    replies = {"FirstPlan": plan(), "Verification": accept()}
    monkeypatch.setattr(
        c.OpenAIVLM, "__call__",
        lambda self, instructions, parts, schema: json.dumps(replies[schema.__name__]))
    Image.fromarray(STRIP).save(tmp_path / "strip.png")
    argv = ["--image", str(tmp_path / "strip.png"), "--task", "move it", "--project", "p",
            "--poll-seconds", "0.01", "--vlm-url", "http://localhost:1/v1",
            "--out", str(tmp_path / "run"), "--seconds-next", "4", "--M", "2", "--seconds-first"]
    assert c.main(veo.Veo, argv=[*argv, "5", "--out", str(tmp_path / "other")]) == 1
    assert "4, 6 or 8 s, not 5" in capsys.readouterr().err and not vertex.orders
    for _ in range(2):
        assert c.main(veo.Veo, argv=[*argv, "4"]) == 0
    assert len(vertex.orders) == 1
