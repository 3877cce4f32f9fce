"""Tests of veo.py: the real google-genai client against a server of this machine that speaks as
Vertex does, and as the Gemini API did, which only google-genai 2 speaks: a slow test runs all of
this under it. No live Veo was ever asked."""

import base64
import contextlib
import importlib.metadata
import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import collabvr as c
from examples.baselines import METHODS
from examples.models import veo

ROOT = Path(__file__).resolve().parents[2]

try:
    BOTH = int(importlib.metadata.version("google-genai").split(".")[0]) < 3
except importlib.metadata.PackageNotFoundError:  # what needs it is skipped: see `google`
    BOTH = False
needs_both = pytest.mark.skipif(
    not BOTH, reason="google-genai 3 has given up Veo on the Gemini API: see the slow test")
DIALECTS = ["vertex", pytest.param("gemini", marks=needs_both)]
KEY = "k-very-secret-0123456789"


# ------------------------------------------------------------------------------
# A server like Veo


class Google(ThreadingHTTPServer):
    """Orders are kept in `orders`; what becomes of them is told by the other attributes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.orders, self.polled, self.tokens = [], [], 0
        self.refuse = []  # (status, message) for the next orders
        self.stall = threading.Event()  # lets an order wait for an answer
        self.stall.set()
        self.polls = 1  # how often an operation is said to be under way
        self.outages = 0  # polls that get a 503
        self.outcome = None  # of operations, in place of a video
        self.film = small

    def handle_error(self, request, address):  # who went away while it waited
        pass


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/token":  # where Google's credentials get theirs
            self.server.tokens += 1
            return self.reply(200, {"access_token": "a-token", "expires_in": 3600})
        body = json.loads(body)
        if self.path.endswith(":fetchPredictOperation"):
            return self.poll(body["operationName"])
        assert self.path.endswith(":predictLongRunning")
        model = self.path.removesuffix(":predictLongRunning").partition("/")[2].partition("/")[2]
        self.server.orders.append({"path": self.path, "headers": self.headers, "body": body})
        self.server.stall.wait(5)
        if self.server.refuse:
            return self.reply(*self.server.refuse.pop(0))
        return self.reply(200, {"name": f"{model}/operations/{len(self.server.orders) - 1}"})

    def do_GET(self):
        if ":download" not in self.path:
            return self.poll(self.path.partition("/v1beta/")[2])
        assert self.headers["x-goog-api-key"] == KEY and self.path.endswith("?alt=media")
        return self.reply(200, self.video(re.search(r"files/v(\d+):", self.path)[1]))

    def poll(self, name):
        server = self.server
        server.polled.append(name)
        if server.outages:
            server.outages -= 1
            return self.reply(503, "overloaded")
        number = name.rpartition("/operations/")[2]
        if not int(number) < len(server.orders):
            return self.reply(404, "no such operation")
        if server.polled.count(name) <= server.polls:
            return self.reply(200, {"name": name})
        done = {"name": name, "done": True}
        if server.outcome is not None:
            return self.reply(200, done | self.outcome_here(server.outcome))
        if "/v1beta1/" in self.path:
            clip = {"bytesBase64Encoded": base64.b64encode(self.video(number)).decode(),
                    "mimeType": "video/mp4"}
            return self.reply(200, done | {"response": {"videos": [clip]}})
        uri = f"https://generativelanguage.googleapis.com/v1beta/files/v{number}:download?alt=media"
        return self.reply(200, done | {"response": {"generateVideoResponse": {
            "generatedSamples": [{"video": {"uri": uri}}]}}})

    def outcome_here(self, outcome):
        if "response" in outcome and "/v1beta1/" not in self.path:
            return {"response": {"generateVideoResponse": outcome["response"]}}
        return outcome

    def video(self, number):
        image = self.server.orders[int(number)]["body"]["instances"][0]["image"]
        return self.server.film(decoded(image["bytesBase64Encoded"]))

    def reply(self, status, body):
        if isinstance(body, str):
            body = {"error": {"code": status, "message": body.format(**self.headers)}}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def decoded(text):
    return np.array(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def encoded(frames, fps=24):
    return c.mp4(c.Clip(np.stack(frames), fps))


def whole(picture):
    return encoded([picture] * 3)


def small(picture, fps=24):
    """Quick to encode."""
    return encoded([picture[::4, ::4]] * 3, fps)


@pytest.fixture
def google():
    pytest.importorskip("google.genai", reason="Veo's client, in examples/requirements.txt")
    with Google() as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.stall.set()
        server.shutdown()


@pytest.fixture
def make(google, tmp_path, monkeypatch):
    """Makes a Veo that asks the server, in the dialect named."""
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VEO_API_KEY", KEY)

    def made(dialect="vertex", **given):
        project = {"vertex": "my-project", "gemini": ""}[dialect]
        return veo.Veo(**{"url": google.url, "project": project, "poll_seconds": 0.01,
                          "jobs": tmp_path / "jobs"} | given)
    return made


def picture(width, height):
    """A colourful chequerboard, no two fields alike, bright up to its edges."""
    y, x = np.mgrid[:height, :width]
    fields = 90 * ((5 * x // width + 5 * y // height) % 2)
    return np.stack([70 + 90 * x / width, 160 - 80 * y / height, 90 + 60 * x * y / width / height],
                    -1).astype(np.uint8) + fields[..., None].astype(np.uint8)


STRIP = picture(16, 400)  # quick to encode


# ------------------------------------------------------------------------------
# The request


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_order_holds_the_prompt_the_length_and_the_picture_between_bars(dialect, google, make):
    vgm = make(dialect)
    vgm(picture(90, 90), "move it", 8.0, 7)
    assert vgm.identity == {"model": "veo-3.1-fast-generate-001", "vertex": dialect == "vertex"}
    (order,) = google.orders
    (instance,), parameters = order["body"]["instances"], order["body"]["parameters"]
    assert instance["prompt"] == "move it" and instance["image"]["mimeType"] == "image/png"
    sent = decoded(instance["image"]["bytesBase64Encoded"])
    assert sent.shape == (720, 1280, 3)
    assert not sent[:, :280].any() and not sent[:, 1000:].any() and sent[:, 280:1000].min() > 30
    asked = {"aspectRatio": "16:9", "resolution": "720p", "durationSeconds": 8}
    if dialect == "vertex":
        asked |= {"seed": 7, "generateAudio": False}
        assert order["path"] == ("/v1beta1/projects/my-project/locations/us-central1/publishers/"
                                 "google/models/veo-3.1-fast-generate-001:predictLongRunning")
        assert order["headers"]["Authorization"] == f"Bearer {KEY}"
    else:
        assert order["path"] == "/v1beta/models/veo-3.1-fast-generate-001:predictLongRunning"
        assert order["headers"]["x-goog-api-key"] == KEY
    assert parameters == asked


def test_the_model_is_a_setting_and_a_seed_beyond_what_vertex_takes_is_folded(google, make):
    make(model="veo-4")(picture(64, 36), "a", 4, 2**31 + 5)
    assert "/models/veo-4:" in google.orders[0]["path"]
    assert google.orders[0]["body"]["parameters"]["seed"] == 5


@pytest.mark.parametrize("seconds", [3, 5, 4.5, 10])
def test_a_length_that_veo_cannot_make_is_one_sentence_before_anything_is_asked(
        seconds, google, make):
    with pytest.raises(c.Problem, match=rf"4, 6 or 8 s, not {seconds:g}.*--seconds-next 4"):
        make()(picture(64, 64), "a", seconds, 0)
    assert not google.orders


# ------------------------------------------------------------------------------
# Letterboxing and its removal

SHAPES = [(200, 300), (90, 90), (1600, 900), (3000, 200), (97, 61)]


@pytest.mark.parametrize("width, height", SHAPES)
def test_a_clip_has_the_pictures_shape_and_its_first_frame_is_the_picture(
        width, height, google, make):
    google.film, given = whole, picture(width, height)
    clip = make()(given, "a", 4, 0)
    _, h, w, _ = clip.frames.shape
    assert w % 2 == h % 2 == 0 and (w == 1280 or h == 720) and w <= 1280 and h <= 720
    assert abs(w / h - width / height) <= 1.01 * max(1, w / h) / min(w, h), "of the same shape"
    wanted = np.array(Image.fromarray(given).resize((w, h), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(clip.frames[0] - wanted).mean() < 4, "the codec's losses"
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        assert np.abs(clip.frames[0][edge] - wanted[edge]).mean() < 6, "no black"
    moved = {(dy, dx): np.abs(np.roll(clip.frames[0], (dy, dx), (0, 1)) - wanted).mean()
             for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    assert min(moved, key=moved.get) == (0, 0)
    assert clip.fps == 24 and clip.seconds == 2 / 24


@pytest.mark.parametrize("width, height", SHAPES[:2])
def test_the_size_is_the_same_at_every_step_and_the_picture_does_not_wander(
        width, height, google, make):
    google.film = whole
    vgm, frame, clips = make(), picture(width, height), []
    for t in range(3):
        clips.append(vgm(frame, "a", 4, t))
        frame = clips[-1].frames[-1]
    assert len({clip.frames.shape for clip in clips}) == 1
    first, last = (clips[i].frames[0].astype(int) for i in (0, -1))
    assert np.abs(first - last).mean() < 4


def test_colours_do_not_drift_over_three_steps(google, make):
    google.film = whole
    vgm, frame = make(), np.full((400, 16, 3), (201, 158, 93), np.uint8)
    for t in range(3):
        frame = vgm(frame, "a", 4, t).frames[-1]
    assert np.abs(frame.reshape(-1, 3).mean(0) - (201, 158, 93)).max() < 1.5


def test_what_was_cut_out_of_a_clip_fits_its_place_exactly():
    for width, height in np.random.default_rng(0).integers(16, 5000, (2000, 2)).tolist():
        left, top, right, bottom = box = veo.picture_box(width, height)
        assert veo.picture_box(right - left, bottom - top) == box
        assert not any(x % 2 for x in box) and left >= 0 <= top and right <= 1280 and bottom <= 720


def test_a_frame_of_a_clips_size_is_sent_as_it_is_to_the_pixel():
    frame = np.random.default_rng(0).integers(0, 256, (720, 720, 3), np.uint8)
    sent = np.array(Image.open(io.BytesIO(veo.letterbox(frame, veo.picture_box(720, 720)))))
    assert (sent[:, 280:1000] == frame).all()
    assert veo.picture_box(1280, 720) == (0, 0, 1280, 720)


def test_a_video_larger_than_asked_for_is_brought_to_the_same_size(google, make):
    google.film = lambda x: encoded([np.array(Image.fromarray(x).resize((1920, 1080)))] * 2)
    clip = make()(given := picture(100, 160), "a", 4, 0)
    assert clip.frames.shape == (2, 720, 450, 3)
    wanted = np.array(Image.fromarray(given).resize((450, 720), Image.Resampling.LANCZOS))
    assert np.abs(clip.frames[0].astype(int) - wanted).mean() < 4


def test_a_video_that_is_not_16_9_is_a_failed_generation(google, make):
    google.film = lambda x: encoded([x[:, :720]] * 2)
    with pytest.raises(RuntimeError, match="720x720 pixels, which is not 16:9"):
        make()(picture(64, 64), "a", 4, 0)


def test_colours_survive_hd_videos_own_kind_of_yuv(google, make):
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

    google.film, red = hd, np.full((90, 160, 3), (220, 40, 30), np.uint8)
    seen = make()(red, "a", 4, 0).frames[0].reshape(-1, 3).mean(0)
    assert np.abs(seen - (220, 40, 30)).max() < 2


def test_four_seconds_as_veo_sends_them_are_96_frames_of_which_95_are_new(google, make):
    google.film = lambda x: encoded([x[::4, ::4]] * 96)  # small, for a quick test
    clip = make()(np.full((720, 20, 3), 99, np.uint8), "a", 4, 0)
    assert len(clip.frames) == 96 and clip.seconds == 95 / 24


# ------------------------------------------------------------------------------
# What goes wrong

FILTERED = {"raiMediaFilteredCount": 1, "raiMediaFilteredReasons": ["the input violates rule 7."]}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("outcome, said", [
    ({"response": FILTERED}, "the input violates rule 7"), ({"response": {}}, "no reason"),
    ({}, "no reason"),
    ({"error": {"code": 13, "message": "an internal error"}}, "an internal error")])
def test_an_operation_without_a_video_is_a_failed_generation_with_googles_reason(
        dialect, outcome, said, google, make, tmp_path):
    google.outcome = outcome
    with pytest.raises(RuntimeError, match=f"^Veo made no clip: .*{said}"):
        make(dialect)(STRIP, "a", 4, 0)
    assert not any((tmp_path / "jobs").iterdir()), "it would fail for ever"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_busy_server_is_asked_again_and_a_busy_one_that_stays_so_is_a_sentence(
        dialect, google, make):
    google.refuse = [(429, "quota"), (503, "overloaded")]
    assert len(make(dialect)(STRIP, "a", 4, 0).frames) == 3 and len(google.orders) == 3
    google.refuse = [(429, "quota")] * 9
    with pytest.raises(c.Problem, match="did not start a clip of veo-3.1.*429.*quota"):
        make(dialect)(STRIP, "a", 4, 1)
    assert len(google.orders) == 3 + 5


@pytest.mark.parametrize("status", [400, 403, 404, 500])
def test_any_other_refusal_is_one_sentence_at_once(status, google, make):
    google.refuse = [(status, "not like this")] * 9
    with pytest.raises(c.Problem, match=rf"did not start a clip of .*{status} .*not like this"):
        make()(STRIP, "a", 4, 0)
    assert len(google.orders) == 1


def test_an_order_that_got_no_answer_is_not_given_again(google, make):
    google.stall.clear()
    with pytest.raises(c.Problem, match="did not start a clip.*timed out"):
        make(clip_timeout=0.3)(STRIP, "a", 4, 0)
    assert len(google.orders) == 1


def test_a_server_that_is_not_there_is_one_sentence(make):
    with pytest.raises(c.Problem, match="http://127.0.0.1:9 did not start a clip"):
        make(url="http://127.0.0.1:9")(STRIP, "a", 4, 0)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_clip_that_takes_too_long_is_one_sentence_and_the_next_start_waits_for_the_same_one(
        dialect, google, make):
    google.polls = 10**9
    with pytest.raises(c.Problem, match=r"jobs/\w+ names did not come.*not done after 0.2 s"):
        make(dialect, clip_timeout=0.2)(STRIP, "a", 4, 0)
    google.polls, vgm = 0, make(dialect)
    assert len(vgm(STRIP, "a", 4, 0).frames) == 3
    assert len(google.orders) == 1 and vgm.dollars == 0, "paid for once"
    vgm(STRIP, "a", 4, 1)
    assert len(google.orders) == 2 and vgm.dollars == pytest.approx(0.6)


def test_an_outage_while_a_clip_is_made_is_waited_out(google, make):
    google.outages = 1
    assert len(make()(STRIP, "a", 4, 0).frames) == 3 and len(google.orders) == 1


def test_an_operation_that_google_has_forgotten_is_a_sentence_and_then_ordered_again(
        google, make, tmp_path):
    google.outcome = {"response": {"videos": [{"bytesBase64Encoded": "AAAA"}]}}
    with contextlib.suppress(av.FFmpegError):  # it leaves its job file
        make()(STRIP, "a", 4, 0)
    google.orders.clear()
    google.outcome = None
    with pytest.raises(c.Problem, match="did not come; the same command.*404"):
        make()(STRIP, "a", 4, 0)
    assert len(make()(STRIP, "a", 4, 0).frames) == 3 and len(google.orders) == 1


def test_only_the_same_request_to_the_same_place_takes_over_what_was_ordered(google, make):
    make()(STRIP, "a", 4, 0)
    make()(STRIP, "a", 4, 0)
    assert len(google.orders) == 1
    others = [{"model": "veo-4"}, {"project": "another"}, {"location": "europe-west4"},
              {"url": f"{google.url}/"}]
    for other in others:
        make(**other)(STRIP, "a", 4, 0)
    for request in [(STRIP[1:], "a", 4, 0), (STRIP, "b", 4, 0), (STRIP, "a", 6, 0),
                    (STRIP, "a", 4, 1)]:
        make()(*request)
    assert len(google.orders) == 9


def test_ctrl_c_while_a_clip_is_made_loses_nothing(google, make, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(veo.time, "sleep", interrupt)
        make()(STRIP, "a", 4, 0)
    assert len(make()(STRIP, "a", 4, 0).frames) == 3 and len(google.orders) == 1


def test_the_dollars_of_what_was_ordered_are_told_with_every_clip(google, make, caplog):
    vgm = make(dollars_per_second="0.4")
    with caplog.at_level(logging.INFO, "collabvr"):
        vgm(STRIP, "a", 8, 0)
        vgm(STRIP, "a", 4, 1)
    assert "Veo: 8 s at $0.4 a second; $3.20 since the start" in caplog.text
    assert "Veo: 4 s at $0.4 a second; $4.80 since the start" in caplog.text


# ------------------------------------------------------------------------------
# Keys, and the start


@pytest.mark.parametrize("dialect", DIALECTS)
def test_googles_keys_do_not_go_to_a_gateway(dialect, google, make, monkeypatch):
    monkeypatch.delenv("VEO_API_KEY")
    monkeypatch.setenv("GEMINI_API_KEY", "googles-own")
    monkeypatch.setenv("GOOGLE_API_KEY", "googles-own")
    with pytest.raises(c.Problem, match=f"No API key for {google.url}: set VEO_API_KEY"):
        make(dialect)(STRIP, "a", 4, 0)
    monkeypatch.setenv("VEO_API_KEY", KEY)
    make(dialect)(STRIP, "a", 4, 0)
    assert KEY in (headers := str(google.orders[0]["headers"])) and "googles-own" not in headers


@needs_both
@pytest.mark.parametrize("name", ["GEMINI_API_KEY", "GOOGLE_API_KEY"])
def test_a_gateways_key_does_not_go_to_google(name, google, make, monkeypatch):
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", google.url)
    with pytest.raises(c.Problem, match="No API key for Google: set GEMINI_API_KEY"):
        make("gemini", url="").check()
    monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("VEO_API_KEY", "the gateway's")
    make("gemini", url="")(STRIP, "a", 4, 0)
    assert google.orders[0]["headers"]["x-goog-api-key"] == KEY


def test_vertex_itself_gets_a_token_of_googles_own_credentials(google, make, tmp_path, monkeypatch):
    from cryptography.hazmat.primitives import serialization as kinds
    from cryptography.hazmat.primitives.asymmetric import rsa
    private = rsa.generate_private_key(65537, 2048).private_bytes(
        kinds.Encoding.PEM, kinds.PrivateFormat.PKCS8, kinds.NoEncryption())
    file = tmp_path / "service-account.json"
    file.write_text(json.dumps({
        "type": "service_account", "project_id": "another", "private_key": private.decode(),
        "client_email": "me@another.iam.gserviceaccount.com", "token_uri": f"{google.url}/token"}))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    monkeypatch.setenv("GOOGLE_VERTEX_BASE_URL", google.url)
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    make(url="")(STRIP, "a", 4, 0)
    (order,) = google.orders
    assert order["headers"]["Authorization"] == "Bearer a-token" and google.tokens == 1
    assert order["path"].startswith("/v1beta1/projects/my-project/locations/us-central1/")
    assert KEY not in str(order["headers"])


@pytest.mark.parametrize("url", ["", "http://127.0.0.1:9"])
def test_without_a_project_google_genai_3_says_what_to_install(url, make, monkeypatch):
    if BOTH:
        monkeypatch.setattr("google.genai.__version__", "3.3.0")
    with pytest.raises(c.Problem, match="--project YOURS, or .*pip install google-genai==2.34.0"):
        make("gemini", url=url).check()


def test_missing_credentials_are_one_sentence(make, monkeypatch):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "nowhere.json")
    with pytest.raises(c.Problem, match="Vertex needs Google's own credentials .*nowhere.json"):
        make(url="").check()


def test_a_missing_google_genai_is_one_sentence(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.genai", None)
    with pytest.raises(c.Problem, match="google.genai is needed: pip install -r examples/"):
        make().check()


@pytest.mark.parametrize("name, value", [
    ("url", "not a url"), ("url", "http://me:word@host/"), ("clip_timeout", "0"), ("modell", "veo"),
    ("poll_seconds", "nan"), ("dollars_per_second", "-1")])
def test_a_setting_that_makes_no_sense_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        veo.Veo(**{name: value})


# ------------------------------------------------------------------------------
# The command line


def planned(left=1):
    return {"observation": "a maze", "remaining_goal": "the rest", "task_complete": False,
            "instruction": "move it", "target_state": "there", "estimated_steps_remaining": left}


def accepted(progress="complete"):
    return {"reason": "it went right", "action_executed": True, "progress": progress,
            "good_fraction": 1.0, "suggestion": "", "confidence": "high", "verdict": "accept"}


def scripted(*replies):
    """A VLM that answers from a list."""
    left = list(replies)
    return lambda instructions, parts, schema: json.dumps(left.pop(0))


PAPER = ["--seconds-first", "8", "--seconds-next", "4", "--M", "2"]


@pytest.fixture
def command(google, make, tmp_path, monkeypatch):
    """python -m examples.models.veo, with a picture and a VLM that finds it all well."""
    make()  # for its key
    google.film = lambda x: small(x, 0.5)  # 4 s
    monkeypatch.setattr(c.OpenAIVLM, "__call__", lambda _, instructions, parts, schema: json.dumps(
        planned() if "Plan" in schema.__name__ else accepted()))
    monkeypatch.chdir(tmp_path)
    Image.fromarray(STRIP).save("strip.png")
    options = ["--image", "strip.png", "--task", "move it", "--url", google.url,
               "--poll-seconds", "0.01", "--vlm-url", "http://localhost:1/v1"]  # wants no key

    def command(*more, project="p", out="out"):
        return c.main(veo.Veo, [*options, "--project", project, "--out", out, *more])
    return command


def test_the_command_line_refuses_a_length_before_anything_is_ordered(command, google, capsys):
    assert command("--seconds-first", "5") == 1
    assert "4, 6 or 8 s, not 5" in capsys.readouterr().err and not google.orders


def test_the_command_line_refuses_a_missing_key_before_the_vlm_is_asked(
        command, monkeypatch, capsys):
    monkeypatch.delenv("VEO_API_KEY")
    assert command(*PAPER) == 2
    assert "set VEO_API_KEY" in capsys.readouterr().err


@pytest.mark.skipif(BOTH, reason="it speaks both dialects")
def test_the_command_line_says_which_google_genai_speaks_the_gemini_apis_dialect(
        command, google, capsys):
    assert command(*PAPER, project="") == 2
    said = capsys.readouterr().err.strip()
    assert "pip install google-genai==2.34.0" in said and len(said.splitlines()) == 1
    assert not google.orders


def test_the_command_line_makes_a_video_and_a_second_start_pays_for_nothing(
        command, google, capsys):
    assert command(*PAPER) == 0
    assert re.search(r"status +complete", capsys.readouterr().out)
    assert command(*PAPER) == 0
    (order,) = google.orders
    assert order["body"]["parameters"]["durationSeconds"] == 8


@needs_both
def test_a_key_that_comes_back_in_an_error_is_neither_shown_nor_kept(
        command, google, capsys, tmp_path):
    google.refuse = [(403, "the key {x-goog-api-key} may not use Veo")] * 9
    assert command(*PAPER, project="") == 1
    said = capsys.readouterr().err
    assert "the key *** may not use Veo" in said and google.orders[0]["headers"]["x-goog-api-key"]
    google.outcome = {"error": {"code": 7, "message": f"the key {KEY} is spent"}}
    google.refuse.clear()
    assert command(*PAPER, project="", out="other") == 1
    said += "".join(capsys.readouterr())
    assert "the key *** is spent" in said and KEY not in said
    kept = [x for x in tmp_path.rglob("*") if x.is_file()]
    assert kept and not any(KEY.encode() in x.read_bytes() for x in kept)


def test_a_whole_routed_run(google, make):
    """One clip for the task, then step by step from the input (App. A.5)."""
    google.film = lambda x: encoded([x, x, x // 2], 0.5)  # 4 s, and it gets darker
    vgm = make()
    loop = {"reason": "two actions", "action": "loop"}
    vlm = scripted(loop, planned(2), accepted("partial"), planned(), accepted())
    config = c.Config(seconds_first=8, seconds_next=4, M=2)
    I0 = np.full((32, 48, 3), 250, np.uint8)
    result = METHODS["routed"](c.Models(vgm, vlm), config).run(I0, "solve it")
    asked = [order["body"] for order in google.orders]
    assert [x["parameters"]["durationSeconds"] for x in asked] == [8, 8, 4]
    assert vgm.dollars == pytest.approx(20 * 0.15)
    assert [x["instances"][0]["prompt"] for x in asked] == ["solve it", "move it", "move it"]
    sent = [decoded(x["instances"][0]["image"]["bytesBase64Encoded"]) for x in asked]
    assert (sent[0] == sent[1]).all() and not (sent[2] == sent[1]).all()
    assert result.status == "complete" and result.video.frames.shape == (5, 720, 1080, 3)


# ------------------------------------------------------------------------------
# The other google-genai


@pytest.mark.skipif(not os.environ.get("COLLABVR_SLOW"), reason="set COLLABVR_SLOW=1")
@pytest.mark.skipif(BOTH, reason="this is it")
def test_all_of_this_passes_with_google_genai_2_in_both_dialects(tmp_path):
    """In a folder of its own, so that the pin stays. Its httpx no other package here needs."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target",
           str(tmp_path), "google-genai==2.34.0", "httpx==0.28.1", "httpcore==1.0.9"]
    if subprocess.run(pip, check=False, capture_output=True).returncode:
        pytest.skip("google-genai 2.34.0 cannot be installed here")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "COLLABVR_SLOW": ""}, cwd=ROOT,
        check=False, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr
    assert "given up" not in done.stdout, "the Gemini API's dialect was skipped"
