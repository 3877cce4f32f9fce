"""gemini.py: the real google-genai client against a stub of the Gemini API."""

import base64
import json

import numpy as np
import pytest

import collabvr as c
from examples.models import gemini
from examples.tests.conftest import accept, plan
from examples.tests.stub import Shade, serving

pytest.importorskip("google.genai", reason="in examples/requirements.txt")
KEY = "k-very-secret-0123456789"
I0 = np.full((48, 64, 3), 90, np.uint8)


def said(reply, reason="STOP"):
    """An answer of the API, with 20 tokens of reply and 300 of thought."""
    text = reply if isinstance(reply, str) else json.dumps(reply)
    candidate = {"content": {"role": "model", "parts": [{"text": text}]}, "finishReason": reason}
    usage = {"promptTokenCount": 1000, "candidatesTokenCount": 20, "thoughtsTokenCount": 300}
    return 200, {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "gemini-3.9"}


def error(status, message, *details):
    return status, {"error": {"code": status, "message": message, "details": details}}


def busy(delay):
    kind = "type.googleapis.com/google.rpc.RetryInfo"
    return error(429, "Quota exceeded.", {"@type": kind, "retryDelay": delay})


@pytest.fixture
def google(monkeypatch):
    """The stub. It gives the answers in `answers`, one after the other."""
    answers: list = []
    with serving(lambda *_: answers.pop(0)) as server:
        server.answers = answers
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.url)
        monkeypatch.setenv("GEMINI_API_KEY", KEY)
        yield server


@pytest.fixture
def waited(monkeypatch):
    """The seconds of each wait, none of which takes time."""
    waits: list = []
    monkeypatch.setattr(gemini.time, "sleep", waits.append)
    return waits


def bodies(google):
    return [json.loads(body) for *_, body in google.asked]


def media(part):
    data = part["inlineData"]
    return data["mime_type"], base64.urlsafe_b64decode(data["data"])


def ask(*parts, **settings):
    models = c.Models(Shade(), gemini.Gemini(**settings))
    return models.ask("planner", c.PLANNER, ["Look.", *parts], c.Plan), models


def test_a_clip_is_an_mp4_and_a_picture_a_jpeg(google):
    clip = Shade()(I0, "", 2, 0)
    google.answers.append(said(plan()))
    ask(I0, "A clip:", clip)
    (body,) = bodies(google)
    (content,) = body["contents"]
    text, picture, told, video = content["parts"]
    assert (text, told) == ({"text": "Look."}, {"text": "A clip:"})
    assert media(picture) == ("image/jpeg", c.jpeg(I0))
    assert media(video) == ("video/mp4", c.mp4(clip))


def test_the_schema_is_sent_and_no_temperature(google):
    google.answers += [said(plan())] * 2
    ask()
    ask(vlm="gemini-4", temperature=0.2, thinking="low")
    (_, path, headers, _), (_, other, *_) = google.asked
    assert path.endswith("/models/gemini-3.8-flash:generateContent") and "gemini-4:" in other
    assert headers["x-goog-api-key"] == KEY
    one, two = bodies(google)
    assert one["systemInstruction"]["parts"][0]["text"] == c.PLANNER
    assert one["generationConfig"] == {
        "responseMimeType": "application/json", "responseJsonSchema": c.Plan.model_json_schema()}
    assert two["generationConfig"]["temperature"] == 0.2
    assert two["generationConfig"]["thinkingConfig"] == {"thinking_level": "LOW"}


def test_thoughts_are_counted(google):
    google.answers.append(said(plan()))
    _, models = ask()
    (call,) = models.calls
    assert (call.tokens_in, call.tokens_out, call.model) == (1000, 320, "gemini-3.9")


@pytest.mark.parametrize("answer, fault", [
    (said("", "SAFETY"), "SAFETY"),
    (said('{"observation": "a squ', "MAX_TOKENS"), "MAX_TOKENS"),
    ((200, {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}}), "PROHIBITED_CONTENT"),
    ((200, {"candidates": [{"finishReason": "RECITATION"}]}), "RECITATION")])
def test_a_block_and_a_cut_off_are_faults(google, answer, fault):
    google.answers += [answer, said(plan())]
    reply, models = ask()
    assert reply.instruction == "move it" and len(models.calls) == 2
    assert fault in models.calls[0].fault


def test_a_429_is_waited_for_as_it_says(google, waited):
    google.answers += [busy("40s"), busy("1.5s"), said(plan())]
    _, models = ask()
    assert waited == [40, 1.5] and len(models.calls) == 1
    assert bodies(google)[0] == bodies(google)[2]


@pytest.mark.parametrize("answer", [busy("3600s"), error(429, "Quota exceeded for the month.")])
def test_a_429_that_stays_stops_the_run(google, waited, answer):
    google.answers.append(answer)
    with pytest.raises(c.Problem, match="no answer of gemini-3.8-flash .429: Quota exceeded"):
        ask()
    assert not waited and len(google.asked) == 1


def test_an_error_is_a_sentence_without_the_key(google):
    google.answers.append(error(400, f"API key {KEY} is not valid."))
    with pytest.raises(c.Problem, match=r"400: API key \*\*\* is not valid"):
        ask()


def test_an_overloaded_server_is_asked_again(google, monkeypatch):
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    google.answers += [error(503, "overloaded"), said(plan())]
    _, models = ask()
    assert len(google.asked) == 2 and len(models.calls) == 1


def test_the_command_line_makes_a_video(google, tmp_path, capsys, monkeypatch):
    """And a missing key stops it before anything is generated."""
    c.iio.imwrite(tmp_path / "x.png", I0)
    argv = ["--image", str(tmp_path / "x.png"), "--task", "Move it.", "--thinking", "high",
            "--out", str(tmp_path / "run"), "--seconds-first", "2"]
    with monkeypatch.context() as patch:
        patch.delenv("GEMINI_API_KEY")
        patch.delenv("GOOGLE_API_KEY", raising=False)
        assert c.main(Shade, gemini.Gemini, argv) == 2
        assert "set GEMINI_API_KEY" in capsys.readouterr().err
    google.answers += [said(plan()), said(accept())]
    assert c.main(Shade, gemini.Gemini, argv) == 0, capsys.readouterr().err
    assert c.main(Shade, gemini.Gemini, argv) == 0, "a finished run asks nobody"
    kept = "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*.json"))
    assert '"gemini-3.9"' in kept and KEY not in kept
