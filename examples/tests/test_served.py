"""served.py against a small server that speaks both dialects of /v1/videos, as SGLang 0.5.23 and
vLLM-Omni 0.30.0 do (test_servers.py has their own). What draws behind it is a painter, or tiny-wan
for the maze."""

import email
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path

import av
import httpx2
import numpy as np
import pytest
from PIL import Image

import collabvr as c
from examples.maze import vlm as maze_vlm
from examples.maze import world
from examples.models import served

ROOT = Path(__file__).resolve().parents[2]
TINY_WAN = {
    "vgm": str(ROOT / "examples" / "maze" / "tiny-wan"), "fps": 8, "sampling_steps": 12,
    "guidance_scale": 1.0}
MODEL, KEY = "Video-Reason/VBVR-Wan2.2", "a-key-that-nobody-may-see"
I0 = np.asarray(Image.linear_gradient("L").resize((80, 48)).convert("RGB"))


# ------------------------------------------------------------------------------
# The server


class Server(http.server.ThreadingHTTPServer):
    """SGLang or vLLM-Omni on 127.0.0.1. make(frame, prompt, seconds, seed) -> Clip does the work,
    and its exception is a job's failure. `first` holds answers (method, status, headers, body) that
    are given before the true ones; a body of None cuts the connection."""

    def __init__(self, dialect, make):
        super().__init__(("127.0.0.1", 0), Handler)
        self.dialect, self.make, self.url = dialect, make, f"http://127.0.0.1:{self.server_port}"
        self.jobs, self.clips, self.posts, self.asked, self.first = {}, {}, [], [], []
        self.workers = 1  # API processes, which do not share their jobs
        self.shown = lambda job: job  # a job, when it is looked at
        self.sent = lambda mp4: mp4  # a clip, when it is fetched
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def work(self, job, form):
        job |= {"status": "in_progress", "progress": 50}
        frames, fps = int(form["num_frames"]), int(form["fps"])
        options = json.loads(form["extra_params"])["video_codec_options"]
        if self.dialect == "sglang":
            options = {"crf": "0" if form["output_quality"] == "maximum" else "25"}
        try:
            clip = self.make(form["picture"], form["prompt"], (frames - 1) / fps, int(form["seed"]))
            self.clips[job["id"]] = mp4(clip, options)
            job |= {"status": "completed", "progress": 100}
        except Exception as error:  # noqa: BLE001  as both do
            job |= {"status": "failed", "error": {"code": 500, "message": str(error)}}

    def handle_error(self, *args):
        """Quiet: clients that are killed hang up."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.is_first("GET"):
            return
        kind, _, name = self.path.removeprefix("/v1/").partition("/")
        name, _, content = name.partition("/")
        job, clip = self.server.jobs.get(name), self.server.clips.get(name)
        if kind == "models":
            self.send(200, {"object": "list", "data": [{"id": MODEL}]})
        elif kind != "videos" or not job or content and not clip:
            self.fail(404, "Video not found")
        elif content:
            self.send(200, self.server.sent(clip))
        else:
            failed = job["status"] == "failed" and self.server.dialect == "vllm"
            self.send(500 if failed else 200, self.server.shown(dict(job)))

    def do_POST(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.is_first("POST"):
            return
        s, form = self.server, {}
        whole = b"Content-Type: %s\r\n\r\n%s" % (self.headers["Content-Type"].encode(), data)
        for part in email.message_from_bytes(whole).get_payload():
            name = part.get_param("name", header="Content-Disposition")
            form[name] = part.get_payload(decode=True)
            if not part.get_filename():
                form[name] = form[name].decode()
        form["picture"] = np.array(Image.open(io.BytesIO(form["input_reference"])))
        if s.dialect == "vllm" and form["model"] != MODEL:
            return self.fail(400, f"Model mismatch: server is running {MODEL!r}")
        if s.dialect == "sglang" and self.path != "/v1/videos":
            return self.fail(405, "Method Not Allowed")
        if s.workers > 1 and self.path == "/v1/videos":
            return self.fail(409, "Asynchronous video jobs need a single API server")
        s.posts.append(form)
        job = {"id": f"video_{len(s.posts)}", "object": "video", "status": "queued", "progress": 0}
        if self.path == "/v1/videos":
            s.jobs[job["id"]] = job
            threading.Thread(target=s.work, args=(job, form), daemon=True).start()
            return self.send(200, job | {"status": "queued"})
        s.work(job, form)
        clip = s.clips.get(job["id"])
        self.send(200, clip) if clip else self.fail(500, job["error"]["message"])

    def is_first(self, method):
        """Whether one of the answers that come before the true ones was given."""
        s = self.server
        s.asked.append((method, self.path, time.monotonic(), self.headers.get("Authorization")))
        if found := s.first and s.first[0][0] == method:
            _, status, headers, body = s.first.pop(0)
            self.connection.close() if body is None else self.send(status, body, headers)
        return bool(found)

    def fail(self, status, message):
        vllm = self.server.dialect == "vllm"
        self.send(status, {"error": {"message": message}} if vllm else {"detail": message})

    def send(self, status, body, headers=()):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Quiet."""


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


def painter(frame, prompt, seconds, seed):
    """Frame 0 is the conditioning frame, the others are as grey as the seed."""
    frames = np.repeat(frame[None], round(seconds * 8) + 1, 0)
    frames[1:] = seed
    return c.Clip(frames, 8)


both = pytest.mark.parametrize("server", ["sglang", "vllm"], indirect=True)
slow = pytest.mark.skipif(not os.environ.get("COLLABVR_SLOW"), reason="set COLLABVR_SLOW=1")


@pytest.fixture
def server(request):
    with Server(getattr(request, "param", "sglang"), painter) as it:
        yield it
        it.shutdown()


@pytest.fixture
def vgm(server, tmp_path, monkeypatch):
    monkeypatch.setattr(served, "POLL", 0.01)
    monkeypatch.setattr(served, "PAUSES", [0.01] * 6)
    monkeypatch.delenv("SERVED_API_KEY", raising=False)
    return served.Served(url=server.url, fps=8, jobs=tmp_path / "jobs")


def went(server, method):
    return [path for how, path, *_ in server.asked if how == method]


# ------------------------------------------------------------------------------
# What goes and comes


@both
def test_both_servers_give_the_clip_that_was_asked_for(server, vgm):
    clip = vgm(I0, "Move it.", 2.0, 200)
    assert clip.frames.shape == (17, 48, 80, 3) and clip.frames.dtype == np.uint8
    assert (clip.fps, clip.seconds) == (8, 2.0)
    assert np.abs(clip.frames[0].astype(int) - I0).mean() < 1, "the codec's rounding of colours"
    assert np.abs(clip.frames[1:].astype(int) - 200).max() < 4


@both
def test_the_form_leaves_nothing_to_the_servers_defaults_and_the_picture_is_exact(server, vgm):
    vgm(I0, "Move it, höher.", 2.3, 7)  # 18.4 frames: 4k + 1 are 17
    form = server.posts[0]
    assert (form.pop("picture") == I0).all() and form.pop("input_reference")[:4] == b"\x89PNG"
    assert form == {
        "prompt": "Move it, höher.", "model": MODEL, "num_frames": "17", "fps": "8",
        "seed": "7", "size": "80x48", "num_inference_steps": "20", "guidance_scale": "5.0",
        "guidance_scale_2": "5.0", "negative_prompt": "", "output_quality": "maximum",
        "extra_params": '{"video_codec_options": {"crf": "0", "preset": "ultrafast"}}'}


def test_a_larger_picture_is_sent_in_the_size_that_is_asked_for(server, vgm):
    big = np.asarray(Image.fromarray(I0).resize((1300, 900)))
    assert vgm(big, "q", 1.0, 3).frames.shape == (9, 512, 752, 3)  # 832 x 480 of area, sides 16 n
    form = server.posts[0]
    assert form["size"] == "752x512" and form["picture"].shape == (512, 752, 3)


def test_more_fields_are_sent_as_text_or_json(server, vgm):
    vgm.fields = json.dumps(
        {"flow_shift": 5, "lora": {"name": "x"}, "negative_prompt": "blurred", "a": True})
    vgm(I0, "q", 1.0, 3)
    assert server.posts[0].items() >= {"flow_shift": "5", "lora": '{"name": "x"}', "a": "true",
                                       "negative_prompt": "blurred"}.items()


@both
def test_sync_is_one_post_where_it_is_offered_and_a_sentence_where_it_is_not(server, vgm):
    vgm.sync = True
    if server.dialect == "sglang":
        with pytest.raises(c.Problem, match="refuses the job.*405: Method Not Allowed"):
            vgm(I0, "q", 1.0, 3)
        return
    assert vgm(I0, "q", 1.0, 90).frames.shape == (9, 48, 80, 3)
    assert went(server, "POST") == ["/v1/videos/sync"] and not went(server, "GET")
    server.make = lambda *_: 1 / 0
    with pytest.raises(RuntimeError, match="500: division by zero"):
        vgm(I0, "q", 1.0, 3)


def test_a_server_with_several_api_processes_keeps_no_jobs_and_is_asked_in_one_request(
        server, vgm, caplog):
    server.dialect, server.workers = "vllm", 2
    with caplog.at_level("INFO", "collabvr"):
        assert vgm(I0, "q", 1.0, 90).frames.shape == (9, 48, 80, 3)
    assert went(server, "POST") == ["/v1/videos", "/v1/videos/sync"] and len(server.posts) == 1
    assert "keeps no jobs (409: Asynchronous video jobs" in caplog.text
    assert not list(vgm.jobs.iterdir())


def test_what_changes_a_clip_is_the_identity_and_where_it_comes_from_is_not():
    one, two = served.Served(), served.Served(
        url="http://x:1/v1", clip_timeout=1, sync=True, jobs="y")
    assert one.identity == two.identity
    for other in ({"model": "x"}, {"fps": 8}, {"sampling_steps": 4}, {"guidance_scale": 1},
                  {"fields": '{"flow_shift": 3}'}):
        assert served.Served(**other).identity != one.identity


# ------------------------------------------------------------------------------
# Failures


@both
def test_a_failed_job_raises_with_the_servers_words_whichever_way_it_is_told(server, vgm):
    server.make = lambda *_: 1 / 0
    with pytest.raises(RuntimeError, match="could not make the clip .*division by zero"):
        vgm(I0, "q", 1.0, 3)
    assert len(went(server, "GET")) < 20 and not list(vgm.jobs.iterdir())


def test_a_failed_job_is_a_failed_generation_and_another_seed_is_tried(server, vgm):
    server.make = lambda *args: painter(*args) if len(server.posts) == 2 else 1 / 0
    models = c.Models(vgm, None)
    assert models.generate(I0, "q", 1.0).frames[1:].max() < 4
    assert [(x.error or "")[:12] for x in models.calls] == ["RuntimeError", ""]
    assert [x["seed"] for x in server.posts] == ["0", "1"]


@pytest.mark.parametrize("answer", [(500, {}), (502, b"<html>"), (503, {"status": "busy"}),
                                    (429, {}), (0, None)])
def test_a_look_that_goes_wrong_is_repeated(server, vgm, answer):
    server.first = [("GET", answer[0], {}, answer[1])] * 3
    assert len(vgm(I0, "q", 1.0, 3).frames) == 9
    assert not server.first and len(server.posts) == 1


def test_a_server_that_stays_away_stops_the_run_and_its_job_is_kept(server, vgm):
    server.first = [("GET", 0, {}, None)] * 7
    with pytest.raises(c.Problem, match=f"{server.url}/v1/videos/video_1 gives no usable answer"):
        vgm(I0, "q", 1.0, 3)
    assert len(vgm(I0, "q", 1.0, 3).frames) == 9 and len(server.posts) == 1


def test_a_post_is_repeated_while_nobody_listens(vgm, caplog):
    vgm.url = "http://127.0.0.1:1"
    with pytest.raises(c.Problem, match="http://127.0.0.1:1/v1/videos gives no usable answer"):
        vgm(I0, "q", 1.0, 3)
    assert caplog.text.count("again in") == 6


@slow
@pytest.mark.parametrize("status, header", [(429, "1"), (503, "date")])
def test_a_busy_server_gets_the_job_when_it_said_it_would(server, vgm, status, header):
    value = formatdate(time.time() + 2, usegmt=True) if header == "date" else header
    server.first = [("POST", status, {"Retry-After": value}, {"detail": "full"})]
    assert len(vgm(I0, "q", 1.0, 3).frames) == 9
    first, second = (t for how, _, t, _ in server.asked if how == "POST")
    assert 0.9 < second - first < 3 and len(server.posts) == 1


@pytest.mark.parametrize("value, seconds", [("", 0), ("7", 7), ("-7", 0), ("soon", 0), ("1.5", 0),
                                            ("Wed, 21 Oct 2015 07:28:00 GMT", 0)])
def test_retry_after_is_seconds_or_a_date_and_nothing_else(value, seconds):
    answer = httpx2.Response(429, headers={"Retry-After": value})
    assert served.retry_after(answer) == seconds


@pytest.mark.parametrize("answer", [(500, {}), (504, b""), (0, None)])
def test_a_post_that_may_have_begun_a_job_is_never_repeated(server, vgm, answer):
    server.first = [("POST", answer[0], {}, answer[1])]
    with pytest.raises(c.Problem, match=f"{server.url}.*(refuses the job|may run all the same)"):
        vgm(I0, "q", 1.0, 3)
    assert len(went(server, "POST")) == 1


def test_a_refused_job_stops_with_the_servers_words(server, vgm):
    server.first = [("POST", 422, {}, {"detail": [{"loc": ["body", "fps"], "msg": "too much"}]})]
    with pytest.raises(c.Problem, match=r"refuses the job \(422: .*too much"):
        vgm(I0, "q", 1.0, 3)


def test_an_endless_job_ends_with_the_timeout_and_is_waited_for_again(server, vgm):
    done = threading.Event()
    server.make = lambda *args: done.wait() and painter(*args)
    vgm.clip_timeout = 0.3
    with pytest.raises(c.Problem, match="was not done in 0.3 s.*is deleted"):
        vgm(I0, "q", 1.0, 3)
    done.set()
    assert len(vgm(I0, "q", 1.0, 3).frames) == 9 and len(server.posts) == 1


@pytest.mark.parametrize("status", ["paused", "succeeded", None, 7])
def test_an_unknown_status_is_no_success_and_no_endless_wait(server, vgm, status):
    server.shown, vgm.clip_timeout = lambda job: job | {"status": status}, 5
    with pytest.raises(c.Problem, match=f"{server.url}/v1/videos/video_1 has .* no known status"):
        vgm(I0, "q", 1.0, 3)
    server.shown = lambda job: job
    assert len(vgm(I0, "q", 1.0, 3).frames) == 9 and len(server.posts) == 1


@pytest.mark.parametrize("part", [0.5, 0])
def test_half_an_mp4_is_a_failed_generation_and_its_job_is_forgotten(server, vgm, part):
    server.sent = lambda clip: clip[: int(part * len(clip))]
    with pytest.raises(ValueError, match="bytes that are no video"):
        vgm(I0, "q", 1.0, 3)
    server.sent = lambda clip: clip
    assert len(vgm(I0, "q", 1.0, 3).frames) == 9 and len(server.posts) == 2


def test_a_download_that_breaks_off_is_repeated(server, vgm):
    vgm(I0, "q", 1.0, 3)
    looks = [("GET", 200, {}, {"status": "completed"})]
    server.first = [*looks, ("GET", 200, {"Content-Length": "999999"}, b"\0" * 99)]
    assert len(vgm(I0, "q", 1.0, 3).frames) == 9
    assert went(server, "GET")[-2:] == ["/v1/videos/video_1/content"] * 2


@pytest.mark.parametrize("other, said", [
    (lambda clip: c.Clip(clip.frames[:5], 8), "5 frames of 80x48 at 8 fps, not 9 frames"),
    (lambda clip: c.Clip(clip.frames[:, :, :64], 8), "9 frames of 64x48"),
    (lambda clip: c.Clip(clip.frames, 24), "9 frames of 80x48 at 24 fps, not")])
def test_a_clip_of_another_length_size_or_rate_is_a_failed_generation(server, vgm, other, said):
    server.make = lambda *args: other(painter(*args))
    with pytest.raises(ValueError, match=f"the server sent {said}"):
        vgm(I0, "q", 1.0, 3)


# ------------------------------------------------------------------------------
# Jobs are kept


def test_the_same_request_is_one_job_and_any_other_request_is_another(server, vgm):
    for args in [(I0, "q", 1.0, 3), (I0, "q", 1.0, 4), (I0, "r", 1.0, 3), (I0, "q", 1.5, 3),
                 (255 - I0, "q", 1.0, 3)]:
        for _ in range(2):
            vgm(*args)
    vgm.guidance_scale = 1.0
    vgm(I0, "q", 1.0, 3)
    assert len(server.posts) == 6


def test_a_job_that_the_server_forgot_is_made_anew(server, vgm):
    vgm(I0, "q", 1.0, 3)
    server.jobs.clear()
    assert len(vgm(I0, "q", 1.0, 3).frames) == 9 and len(server.posts) == 2


@both
def test_an_old_job_that_failed_or_lost_its_clip_is_made_anew(server, vgm):
    vgm(I0, "q", 1.0, 3)
    server.jobs["video_1"] |= {"status": "failed", "error": {"message": "out of memory"}}
    vgm(I0, "q", 1.0, 3)
    server.clips.clear()
    assert len(vgm(I0, "q", 1.0, 3).frames) == 9 and len(server.posts) == 3


def test_no_job_is_submitted_whose_id_cannot_be_kept(server, vgm, tmp_path):
    (tmp_path / "jobs").write_text("a file")
    with pytest.raises(c.Problem, match="jobs cannot be written to"):
        vgm(I0, "q", 1.0, 3)
    assert not server.posts


@pytest.mark.parametrize("answer", [{}, {"id": None}, [], b"hello"])
def test_an_answer_that_names_no_job_stops(server, vgm, answer):
    server.first = [("POST", 200, {}, answer)]
    with pytest.raises(c.Problem, match=f"{server.url} named no job"):
        vgm(I0, "q", 1.0, 3)


def child(code, server, tmp_path):
    """A process that generates one clip through Models, journal and all."""
    return subprocess.Popen([sys.executable, "-c", f"""
import os
import collabvr, numpy as np
from examples.models import served
served.POLL = 0.01
write = collabvr.write_file
{code}
vgm = served.Served(url={server.url!r}, fps=8, jobs={str(tmp_path / "jobs")!r})
models = collabvr.RecordedModels(vgm, None, {str(tmp_path / "run")!r})
models.generate(np.full((48, 80, 3), 9, np.uint8), "q", 1.0)
"""], cwd=ROOT)


@slow
def test_kill_9_while_the_server_works_and_the_next_start_picks_the_job_up(server, tmp_path):
    done = threading.Event()
    server.make = lambda *args: done.wait() and painter(*args)
    with child("", server, tmp_path) as process:
        while len(went(server, "GET")) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    done.set()
    assert child("", server, tmp_path).wait() == 0
    assert len(server.posts) == 1 and len(list((tmp_path / "run" / "clips").iterdir())) == 1


@slow
def test_kill_9_between_download_and_journal_costs_a_download_and_no_second_job(server, tmp_path):
    killed = ("collabvr.write_file = lambda path, data: os.kill(os.getpid(), 9) if path.suffix == "
              "'.mkv' else write(path, data)")
    assert child(killed, server, tmp_path).wait() == -signal.SIGKILL
    assert not list((tmp_path / "run" / "clips").iterdir())
    assert child("", server, tmp_path).wait() == 0
    assert went(server, "GET").count("/v1/videos/video_1/content") == 2
    assert len(server.posts) == 1 and len(list((tmp_path / "run" / "clips").iterdir())) == 1


# ------------------------------------------------------------------------------
# Key and check


def test_a_key_goes_to_the_server_only_and_into_no_file_and_no_error(
        server, vgm, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setenv("SERVED_API_KEY", KEY)
    with Server("vllm", painter) as other:
        server.first = [("GET", 307, {"Location": f"{other.url}/v1/videos/video_1"}, b""),
                        ("POST", 401, {}, {"error": {"message": f"no such key: Bearer {KEY}"}})]
        models, said = c.RecordedModels(vgm, None, tmp_path / "run"), []
        for _ in range(2):
            with pytest.raises(c.Problem) as error:
                models.generate(I0, "q", 1.0)
            said.append(str(error.value))
            for file in vgm.jobs.iterdir():
                file.unlink()
        assert models.generate(I0, "q", 1.0).fps == 8
        assert not other.asked and "no such key" in said[1] and "307" in said[0]
        other.shutdown()
    assert {key for *_, key in server.asked} == {f"Bearer {KEY}"}
    said += [*capsys.readouterr(), caplog.text]
    said += [x.read_bytes().decode(errors="replace") for x in tmp_path.rglob("*") if x.is_file()]
    assert KEY not in "".join(said)


@pytest.mark.parametrize("key", [f"{KEY}\n", f"{KEY}\nx", f" {KEY}", f"{KEY}ü"])
def test_a_key_with_signs_that_are_in_no_key_is_neither_sent_nor_quoted(
        server, vgm, monkeypatch, key):
    monkeypatch.setenv("SERVED_API_KEY", key)
    with pytest.raises(c.Problem, match="SERVED_API_KEY contains") as error:
        vgm.check()
    assert KEY not in str(error.value) and not server.asked


def test_without_a_key_none_is_sent_and_the_url_may_end_in_v1(server, vgm):
    vgm.url += "/v1/"
    vgm.check()
    assert vgm(I0, "q", 1.0, 3).fps == 8 and {key for *_, key in server.asked} == {None}


def test_the_check_lets_a_server_pass_that_lists_no_models_or_this_one(server, vgm):
    vgm.check()
    for answer in [(404, {}), (200, {"data": []}), (200, b"hello")]:
        server.first = [("GET", answer[0], {}, answer[1])]
        vgm.check()


def test_colours_do_not_get_darker_from_step_to_step():
    clip = c.Clip(np.full((5, 256, 256, 3), (201, 120, 60), np.uint8), 16)
    form = {"num_frames": 5, "size": "256x256", "fps": 16}
    for _ in range(5):
        clip = served.decode(c.mp4(clip), form)
    assert np.abs(clip.frames.mean((0, 1, 2)) - (201, 120, 60)).max() < 1.5


@slow
def test_a_server_that_does_not_answer_is_noticed_within_ten_seconds():
    with http.server.HTTPServer(("127.0.0.1", 0), None) as deaf:  # accepts, and says nothing
        began, url = time.monotonic(), f"http://127.0.0.1:{deaf.server_port}"
        with pytest.raises(c.Problem, match=f"{url}/v1/models gives no usable answer"):
            served.Served(url=url).check()
    assert time.monotonic() - began < 10


def test_a_clip_too_short_for_wan_is_one_sentence_before_anything_is_asked(server, vgm):
    vgm.fps = 1
    with pytest.raises(c.Problem, match="3 s at 1 fps is less than Wan's least, five frames"):
        vgm(I0, "q", 3, 0)
    assert not server.asked


@pytest.fixture
def command(server, tmp_path, monkeypatch, capsys):
    """python -m examples.models.served: (exit status, what was said on stderr)."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(I0).save("x.png")

    def command(*options):
        try:
            status = c.main(served.Served, [
                "--image", "x.png", "--task", "q", "--url", server.url, *options])
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().err
    return command


@pytest.mark.parametrize("options, said", [
    (["--url", "ftp://x"], "a base URL starts with http"),
    (["--url", "http://me:word@x"], "has no user, password"),
    (["--fps", "0"], "greater than or equal to 1"), (["--fields", "[1]"], "not a JSON object"),
    (["--clip-timeout", "-1"], "greater than 0"), (["--speed", "9"], "--speed")])
def test_settings_that_make_no_sense_are_refused_with_their_names(
        server, command, options, said):
    status, error = command(*options)
    assert status == 2 and said in " ".join(error.replace("│", " ").split())
    field = options[0].removeprefix("--").replace("-", "_")
    assert field in error and "Traceback" not in error and not server.asked


@pytest.mark.parametrize("options, said", [
    (["--url", "http://127.0.0.1:1"], "http://127.0.0.1:1/v1/models gives no usable answer"),
    (["--model", "other"], f"serves {MODEL}, not other: give its name")])
def test_a_wrong_server_is_one_sentence_and_status_2(server, command, tmp_path, options, said):
    status, error = command(*options)
    assert status == 2 and said in error and error.count("\n") == 1
    assert not server.posts and not (tmp_path / "runs").exists()


@slow
def test_the_module_is_a_command_with_help_for_its_options():
    done = subprocess.run([sys.executable, "-m", "examples.models.served", "--help"],
                          cwd=ROOT, capture_output=True, text=True, check=True)
    for text in ("--sampling-steps", "denoising steps (App. A.1)", "--vlm-url"):
        assert text in done.stdout


# ------------------------------------------------------------------------------
# The maze


@slow
def test_a_served_clip_is_the_local_one_but_for_the_colours_of_neighbours(server, vgm):
    server.make, maze = c.Wan(**TINY_WAN), world.make(6, 3, np.random.default_rng([2026, 4]))
    I0, prompt = world.draw(maze), "Move the blue circle right 2 cells."
    clip, local = vgm(I0, prompt, 2.0, 0), server.make(I0, prompt, 2.0, 0)
    other = server.make(I0, prompt, 2.0, 1)
    assert clip.frames.shape == local.frames.shape == (17, 96, 96, 3) and clip.fps == local.fps
    got, same, different = (x.frames @ (0.299, 0.587, 0.114) for x in (clip, local, other))
    assert np.abs(got - same).mean() < 0.5 < np.abs(got - different).mean()  # brightness
    circle = world.read(clip.frames[-1], world.read(I0)).circle
    assert np.abs(np.subtract(circle, maze.start) - (0, 2)).max() < 0.2


def solve_maze(url: str, seed: int) -> dict:
    """collabvr.py with the maze's VLM and tiny-wan behind a server: what trace.json says."""
    maze = world.make(6, 3, np.random.default_rng([2026, seed]))
    Image.fromarray(world.draw(maze)).save("maze.png")
    options = {
        "--image": "maze.png", "--task": world.task(maze), "--out": "out", "--url": url,
        "--fps": 8, "--sampling-steps": 12, "--guidance-scale": 1, "--seconds-first": 2,
        "--seconds-next": 2, "--vlm": maze_vlm.MODEL, "--verify-fps": 8}
    with maze_vlm.serve() as vlm:
        threading.Thread(target=vlm.serve_forever, daemon=True).start()
        options["--vlm-url"] = f"http://127.0.0.1:{vlm.server_port}/v1"
        status = c.main(served.Served, [str(x) for pair in options.items() for x in pair])
        vlm.shutdown()
    assert status == 0
    with av.open("out/video.mp4") as file:
        frames = np.stack([x.to_ndarray(format="rgb24") for x in file.decode(video=0)])
    return json.loads(Path("out/trace.json").read_text()) | {
        "solved": world.score(frames, maze).solved}


@slow
@both
def test_the_maze_is_solved_by_tiny_wan_behind_a_server(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server.make = c.Wan(**TINY_WAN)
    trace = solve_maze(server.url, 3)
    assert trace["status"] == "complete" and trace["solved"]
    assert len(server.posts) == trace["cost"]["clips"] == len(os.listdir("runs/jobs"))
    assert {x["size"] for x in server.posts} == {"96x96"}
