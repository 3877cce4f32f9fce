"""served.py against a stub that speaks both dialects of /v1/videos, as SGLang 0.5.23 and vLLM-Omni
0.30.0 do (servers/ has their own). A painter draws behind it."""

import email
import io
import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import collabvr as c
from examples.models import h264, served
from examples.tests.stub import serving

ROOT = Path(__file__).resolve().parents[2]
MODEL, KEY = "Video-Reason/VBVR-Wan2.2", "a-key-that-nobody-may-see"
I0 = np.asarray(Image.linear_gradient("L").resize((80, 48)).convert("RGB"))


def painter(frame, form):
    """Frame 0 is the conditioning frame, the others are as grey as the seed."""
    frames = np.repeat(frame[None], int(form["num_frames"]), 0)
    frames[1:] = int(form["seed"])
    return c.Clip(frames, int(form["fps"]))


def mp4(clip, options):
    """As the servers encode: H.264, colours of 2x2 pixels together, no side enlarged."""
    out = io.BytesIO()
    with av.open(out, "w", "mp4") as file:
        stream = file.add_stream("libx264", int(clip.fps), options)
        stream.height, stream.width, stream.pix_fmt = *clip.frames.shape[1:3], "yuv420p"
        for frame in clip.frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        file.mux(stream.encode())
    return out.getvalue()


class Videos:
    """The routes of SGLang ("sglang") or vLLM-Omni ("vllm", "vllm: several API processes")."""

    def __init__(self, dialect):
        self.dialect = dialect
        self.paint = painter
        self.forms: list = []  # of the requests, with the picture
        self.jobs: dict = {}  # path: job
        self.clips: dict = {}  # path: MP4
        self.polls = 2  # looks before a job is done
        self.first: list = []  # answers that are given before the true ones

    def __call__(self, method, path, body):
        if self.first:
            return self.first.pop(0)
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": MODEL}]}
        if path in self.clips:
            return 200, self.clips[path]
        if path in self.jobs:
            return self.look(self.jobs[path])
        assert method == "POST"
        if self.dialect == "vllm: several API processes" and path == "/v1/videos":
            return 409, {"error": {"message": "Asynchronous jobs need a single API server"}}
        return self.order(path, body)

    def order(self, path, body):
        form = read_form(body)
        self.forms.append(form)
        job = {"id": f"video_{len(self.forms)}", "status": "queued", "looks": 0}
        self.jobs[f"{path}/{job['id']}"] = job
        options = json.loads(form["extra_params"])["video_codec_options"]
        if self.dialect == "sglang":
            options = {"crf": "0" if form["output_quality"] == "maximum" else "25"}
        try:
            made = mp4(self.paint(form["picture"], form), options)
        except Exception as error:  # noqa: BLE001  as both do
            job["error"] = {"code": 500, "message": str(error)}
        else:
            if path.endswith("/sync"):
                return 200, made
            self.clips[f"{path}/{job['id']}/content"] = made
        return 200, job

    def look(self, job):
        job["looks"] += 1
        if job["looks"] <= self.polls:
            return 200, job | {"status": "in_progress"}
        if "error" in job:
            return 200 if self.dialect == "sglang" else 500, job | {"status": "failed"}
        return 200, job | {"status": "completed"}


def read_form(body):
    """A multipart body's fields, the picture among them."""
    boundary = body[2 : body.index(b"\r\n")]
    whole = b'Content-Type: multipart/form-data; boundary="%s"\r\n\r\n%s' % (boundary, body)
    form = {}
    for part in email.message_from_bytes(whole).get_payload():
        name = part.get_param("name", header="Content-Disposition")
        data = part.get_payload(decode=True)
        form[name] = data if part.get_filename() else data.decode()
    form["picture"] = np.array(Image.open(io.BytesIO(form.pop("input_reference"))))
    return form


both = pytest.mark.parametrize("videos", ["sglang", "vllm"], indirect=True)


@pytest.fixture
def videos(request):
    return Videos(getattr(request, "param", "sglang"))


@pytest.fixture
def server(videos):
    with serving(videos) as server:
        yield server


@pytest.fixture
def vgm(server, monkeypatch):
    monkeypatch.setattr(served, "POLL", 0.01)
    monkeypatch.delenv("SERVED_API_KEY", raising=False)
    return served.Served(url=server.url, fps=8)


# ------------------------------------------------------------------------------
# What goes and comes


@both
def test_the_clip_is_what_was_asked_for(vgm):
    clip = vgm(I0, "Move it.", 2.0, 200)
    assert clip.frames.shape == (17, 48, 80, 3) and clip.frames.dtype == np.uint8
    assert (clip.fps, clip.seconds) == (8, 2.0)
    assert np.abs(clip.frames[0].astype(int) - I0).mean() < 1, "the codec's rounding of colours"
    assert np.abs(clip.frames[1:].astype(int) - 200).max() < 4


@both
def test_nothing_is_left_to_the_servers_defaults(videos, vgm):
    """And the picture arrives to the pixel."""
    vgm(I0, "Move it, höher.", 2.3, 7)  # 18.4 frames: 4k + 1 are 17
    form = videos.forms[0]
    assert (form.pop("picture") == I0).all()
    assert form == {
        "prompt": "Move it, höher.", "model": MODEL, "num_frames": "17", "fps": "8",
        "seed": "7", "size": "80x48", "num_inference_steps": "20", "guidance_scale": "5.0",
        "guidance_scale_2": "5.0", "negative_prompt": "", "output_quality": "maximum",
        "extra_params": '{"video_codec_options": {"crf": "0", "preset": "ultrafast"}}'}


def test_a_large_picture_becomes_a_smaller_one(videos, vgm):
    big = np.asarray(Image.fromarray(I0).resize((1300, 900)))
    assert vgm(big, "q", 0.5, 3).frames.shape == (5, 512, 752, 3)  # 832x480 of area, sides 16 n
    assert videos.forms[0]["picture"].shape == (512, 752, 3)


def test_more_fields_are_sent_as_text_or_json(videos, vgm):
    vgm.fields = json.dumps({"flow_shift": 5, "lora": {"name": "x"}, "negative_prompt": "blurred"})
    vgm(I0, "q", 1.0, 3)
    assert videos.forms[0].items() >= {
        "flow_shift": "5", "lora": '{"name": "x"}', "negative_prompt": "blurred"}.items()


@pytest.mark.parametrize("videos", ["vllm: several API processes"], indirect=True)
def test_a_server_without_jobs_is_asked_in_one_request(videos, server, vgm):
    assert vgm(I0, "q", 1.0, 90).frames.shape == (9, 48, 80, 3)
    assert [path for _, path, *_ in server.asked] == ["/v1/videos", "/v1/videos/sync"]
    assert len(videos.forms) == 1


def test_what_changes_a_clip_is_the_identity():
    one, two = served.Served(), served.Served(url="http://x:1/v1", clip_timeout=1)
    assert one.identity == two.identity
    for other in ({"model": "x"}, {"fps": 8}, {"sampling_steps": 4}, {"guidance_scale": 1},
                  {"fields": '{"flow_shift": 3}'}):
        assert served.Served(**other).identity != one.identity


def test_colours_do_not_get_darker_from_step_to_step():
    clip = c.Clip(np.full((5, 256, 256, 3), (201, 120, 60), np.uint8), 16)
    for _ in range(5):
        clip = h264.decoded(c.mp4(clip))
    assert np.abs(clip.frames.mean((0, 1, 2)) - (201, 120, 60)).max() < 1.5


# ------------------------------------------------------------------------------
# Failures


@both
def test_a_failed_job_is_a_failed_generation(videos, vgm):
    videos.paint = lambda frame, form: painter(frame, form) if form["seed"] == "1" else 1 / 0
    models = c.Models(vgm, None)
    assert models.generate(I0, "q", 1.0).frames[1:].max() < 4
    assert "division by zero" in models.calls[0].fault and models.calls[1].fault is None


def test_a_look_that_goes_wrong_is_repeated(videos, server, vgm, monkeypatch):
    order, polls = videos.order, [(503, {}), (500, b"<html>")]
    monkeypatch.setattr(
        videos, "order", lambda *args: (order(*args), videos.first.extend(polls))[0])
    assert len(vgm(I0, "q", 1.0, 3).frames) == 9
    assert not videos.first and len(videos.forms) == 1


@pytest.mark.parametrize("status", [422, 500, 503])
def test_a_post_is_never_repeated(videos, server, vgm, status):
    """A job may have begun."""
    videos.first = [(status, {"detail": [{"loc": ["body", "fps"], "msg": "too much"}]})]
    with pytest.raises(RuntimeError, match=f"{server.url} answered {status}: .*too much"):
        vgm(I0, "q", 1.0, 3)
    assert len(server.asked) == 1


def test_an_endless_job_ends_with_the_timeout(videos, vgm):
    videos.polls, vgm.clip_timeout = 10**9, 0.2
    with pytest.raises(c.Problem, match="was not done in 0.2 s"):
        vgm(I0, "q", 1.0, 3)


def test_an_unknown_status_is_no_success(videos, vgm):
    videos.look = lambda job: (200, job | {"status": "paused"})
    with pytest.raises(RuntimeError, match="made no clip: .*paused"):
        vgm(I0, "q", 1.0, 3)


def test_half_an_mp4_is_a_failed_generation(videos, vgm):
    videos.clips["/v1/videos/video_1/content"] = b"\0" * 999
    videos.order = lambda *_: (200, videos.jobs.setdefault("/v1/videos/video_1", {"id": "video_1"}))
    videos.look = lambda job: (200, job | {"status": "completed"})
    with pytest.raises(OSError, match="can not handle"):
        vgm(I0, "q", 1.0, 3)


@pytest.mark.parametrize("other, said", [
    (lambda clip: c.Clip(clip.frames[:5], 8), "5 frames of 80x48 at 8 fps, not 9 frames"),
    (lambda clip: c.Clip(clip.frames[:, :, :64], 8), "9 frames of 64x48"),
    (lambda clip: c.Clip(clip.frames, 24), "9 frames of 80x48 at 24 fps, not")])
def test_another_clip_is_a_failed_generation(videos, vgm, other, said):
    videos.paint = lambda *args: other(painter(*args))
    with pytest.raises(ValueError, match=f"the server sent {said}"):
        vgm(I0, "q", 1.0, 3)


def test_the_key_goes_to_the_server_and_into_no_error(videos, server, vgm, monkeypatch):
    monkeypatch.setenv("SERVED_API_KEY", KEY)
    videos.first = [(401, {"error": {"message": f"no such key: {KEY}"}})]
    with pytest.raises(RuntimeError, match=r"401: no such key: \*\*\*"):
        vgm(I0, "q", 1.0, 3)
    assert server.asked[0][2]["Authorization"] == f"Bearer {KEY}"


# ------------------------------------------------------------------------------
# The command line


@pytest.fixture
def command(server, tmp_path, monkeypatch, capsys):
    """python -m examples.models.served: (exit status, what was said on stderr)."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(I0).save("x.png")

    def command(*options):
        argv = ["--image", "x.png", "--task", "q", "--url", f"{server.url}/v1/",
                "--vlm-url", "http://localhost:1/v1", *options]  # which wants no key
        status = c.main(served.Served, argv=argv)
        return status, capsys.readouterr().err
    return command


@pytest.mark.parametrize("options, said", [
    (["--url", "http://127.0.0.1:1"], "http://127.0.0.1:1 cannot be reached"),
    (["--model", "other"], f"serves {MODEL}, not other: give its name")])
def test_a_wrong_server_is_one_sentence(videos, command, options, said):
    status, error = command(*options)
    assert status == 2 and said in error and error.count("\n") == 1
    assert not videos.forms


def test_fields_must_be_a_json_object():
    with pytest.raises(ValueError, match="not a JSON object"):
        served.Served(fields="[1]")


@pytest.mark.parametrize("name", ["served", "veo", "gemini"])
def test_help_needs_no_client(name):
    """A client cannot be made with this ALL_PROXY."""
    done = subprocess.run(
        [sys.executable, "-m", f"examples.models.{name}", "--help"], cwd=ROOT, check=True,
        capture_output=True, text=True, env={"ALL_PROXY": "socks5://", "COLUMNS": "120"})
    assert f"usage: python -m examples.models.{name}" in done.stdout
    assert "--seconds-first" in done.stdout
