"""collabvr.py through LiteLLM's proxy, the real one, to a stub of Gemini's native API.

See README.md. The proxy is 1.106.4. 1.107.0 is said to be compromised: leave it out.
"""

import base64
import json

import numpy as np
import pytest

import collabvr as c
from examples.tests.conftest import accept, plan, reject
from examples.tests.servers import environments
from examples.tests.stub import Shade, serving
from examples.tests.test_gemini import error, said

LITELLM = "install litellm[proxy]==1.106.4"
MASTER_KEY, GEMINI_KEY, MODEL = "sk-master-of-the-proxy", "the-key-of-gemini", "gemini-2.5-pro"
I0 = np.full((48, 64, 3), 90, np.uint8)


@pytest.fixture(scope="module")
def upstream():
    """Gemini, which gives the answers in `answers`, one after the other."""
    answers: list = []
    with serving(lambda *_: answers.pop(0)) as server:
        server.answers = answers
        yield server


@pytest.fixture(scope="module")
def url(upstream, tmp_path_factory):
    """The proxy's base URL."""
    folder = environments.environment("litellm", LITELLM)
    upstream_settings = {
        "model": f"gemini/{MODEL}", "api_base": f"{upstream.url}/v1beta", "api_key": GEMINI_KEY}
    config = {
        "model_list": [{"model_name": MODEL, "litellm_params": upstream_settings}],
        "router_settings": {"num_retries": 0, "disable_cooldowns": True},
        "general_settings": {"master_key": MASTER_KEY},
    }
    here, port = tmp_path_factory.mktemp("litellm"), environments.free_port()
    (here / "config.yaml").write_text(json.dumps(config))  # which is YAML, too
    command = [folder / "bin" / "litellm", "--config", here / "config.yaml", "--port", port,
               "--host", "127.0.0.1"]
    proxy = f"http://127.0.0.1:{port}"
    with environments.started(
            command, f"{proxy}/health/liveliness", here / "log", 180,
            LITELLM_LOCAL_MODEL_COST_MAP="True"):
        yield f"{proxy}/v1"


@pytest.fixture
def gemini(upstream, monkeypatch):
    """The stub, with nothing said or asked yet."""
    monkeypatch.setenv("OPENAI_API_KEY", MASTER_KEY)
    upstream.answers.clear()
    upstream.asked.clear()
    return upstream


def bodies(gemini):
    return [json.loads(body) for *_, body in gemini.asked]


def media_of(body: dict) -> list:
    """(type, bytes) of every picture and video in a request, in their order."""
    found = []
    for part in body["contents"][0]["parts"]:
        data = part.get("inlineData") or part.get("inline_data")
        if data:
            kind = data.get("mimeType") or data.get("mime_type")
            found.append((kind, base64.b64decode(data["data"])))
    return found


def ask(url, part="a text", **settings):
    """The plan that comes of one question, and the models that asked it."""
    models = c.Models(Shade(), c.OpenAIVLM(vlm=MODEL, vlm_url=url, **settings))
    return models.ask("planner", c.PLANNER, [part], c.Plan), models


def test_a_whole_run_passes(url, gemini, tmp_path, capsys):
    """With every picture, every token and every schema. The proxy's key stays with the proxy."""
    gemini.answers += map(said, [plan(left=2), reject(), accept("partial"), plan(), accept()])
    c.iio.imwrite(tmp_path / "x.png", I0)
    argv = ["--image", str(tmp_path / "x.png"), "--task", "Move it.", "--vlm-url", url,
            "--vlm", MODEL, "--out", str(tmp_path / "run"), "--seconds-first", "2",
            "--seconds-next", "2"]
    assert c.main(Shade, argv=argv) == 0, capsys.readouterr().err
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())
    assert (trace["status"], trace["unverified_steps"]) == ("complete", [])
    assert trace["cost"]["calls"] == {"planner": 2, "verifier": 3, "vgm": 3}
    assert trace["cost"]["tokens_in"] == {"planner": 2000, "verifier": 3000, "vgm": 0}
    assert trace["cost"]["tokens_out"] == {"planner": 640, "verifier": 960, "vgm": 0}  # + thoughts

    pictures = [media_of(body) for body in bodies(gemini)]
    # the input; the input and 3 frames of 2 s; later the last frame of step 1, too
    assert [len(found) for found in pictures] == [1, 4, 4, 2, 5]
    assert {kind for found in pictures for kind, _ in found} == {"image/jpeg"}
    assert all(found[0][1] == c.jpeg(I0) for found in pictures)
    schemas = [c.FirstPlan, c.Verification, c.Verification, c.Plan, c.Verification]
    for body, schema in zip(bodies(gemini), schemas):
        settings = body["generationConfig"]
        told = settings.get("responseJsonSchema") or settings["response_json_schema"]
        assert told == schema.model_json_schema()
        assert settings["temperature"] == 0.2
    for _, path, headers, _ in gemini.asked:
        assert path.startswith(f"/v1beta/models/{MODEL}:generateContent")
        assert MASTER_KEY not in f"{path}{headers}"


@pytest.mark.parametrize("answer, fault", [
    (said("", "SAFETY"), "finish_reason content_filter"),
    (said('{"observation": "a squ', "MAX_TOKENS"), "finish_reason length")])
def test_a_block_and_a_cut_off_are_faults_and_counted(url, gemini, answer, fault):
    gemini.answers += [answer, said(plan())]
    reply, models = ask(url)
    assert reply.instruction == "move it"
    assert [call.fault for call in models.calls] == [fault, None]
    assert models.cost()["tokens_in"] == {"planner": 2000}


def test_after_a_429_the_same_request_is_sent_again(url, gemini, monkeypatch):
    monkeypatch.setattr(c.time, "sleep", lambda seconds: None)
    gemini.answers += [error(429, "Quota exceeded for one minute."), said(plan())]
    _, models = ask(url)
    assert len(gemini.asked) == 2 and len(models.calls) == 1
    assert bodies(gemini)[0] == bodies(gemini)[1]


def test_another_key_than_the_proxys_is_refused(url, gemini, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another")
    with pytest.raises(c.Problem, match="no usable answer .40[01]: "):  # 400 without a database
        ask(url)
    assert not gemini.asked


def test_a_video_arrives_as_image_url_only(url, gemini):
    """video_url is dropped without a word. If this fails, LiteLLM has learnt it: say so."""
    clip = Shade()(I0, "", 2, 0)
    gemini.answers += [said(plan())] * 2
    ask(url, clip, video_input="image_url")
    ask(url, clip, video_input="video_url")
    assert [media_of(body) for body in bodies(gemini)] == [[("video/mp4", c.mp4(clip))], []]
