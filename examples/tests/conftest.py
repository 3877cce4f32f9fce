"""What the tests of the examples share: scripted models, their runs, a browser.

    run = go(plan(left=2), reject(), accept("partial"), plan(), accept(), method="collabvr")
    assert run.roles() == "pvvpv" and run.shown() == [2, 3] and run.result.status == "complete"

plan, accept, reject and route are replies, in the order in which they are asked for.
"""

import importlib.util
import itertools
import json
import os
import shutil
from dataclasses import asdict, dataclass

import numpy as np
import pytest

import collabvr
from collabvr import Clip, Config, Models, Problem, RecordedModels
from examples.baselines import METHODS

I0 = np.full((32, 48, 3), 250, np.uint8)


def plan(instruction="move it", left=1, done=False):
    return {
        "observation": "a maze", "remaining_goal": "the rest", "task_complete": done,
        "instruction": instruction, "target_state": "there", "estimated_steps_remaining": left,
    }


def accept(progress="complete"):
    return {
        "reason": "as planned", "action_executed": True, "progress": progress,
        "good_fraction": 1.0, "suggestion": "", "confidence": "high", "verdict": "accept",
    }


def reject(good=0.5, suggestion="go left", reason="it went right"):
    return {
        "reason": reason, "action_executed": False, "progress": "none", "good_fraction": good,
        "suggestion": suggestion, "confidence": "low", "verdict": "reject",
    }


def route(action, suggestion="slower"):
    return {"reason": "so it is", "action": action, "suggestion": suggestion, "estimated_steps": 0}


class Painter:
    """A generator. All frames of a clip but the first show the number of the call."""

    identity = "a painter"

    def __init__(self, fail=()):
        self.fail = fail  # numbers of the calls that fail
        self.calls = []

    def __call__(self, frame, prompt, seconds, seed):
        call = {"frame": int(frame[0, 0, 0]), "prompt": prompt, "seconds": seconds, "seed": seed}
        self.calls.append(call)
        if len(self.calls) in self.fail:
            raise RuntimeError("out of memory")
        frames = np.repeat(frame[None], 1 + int(4 * seconds), 0)
        frames[1:] = len(self.calls)
        return Clip(frames, 4)


class Script:
    """A VLM that replies what it is told to, and keeps what it was asked. At the end: Problem."""

    identity = "a script"

    def __init__(self, *replies):
        self.replies = list(replies)
        self.schemas = []
        self.told = []

    def __call__(self, instructions, parts, schema):
        self.schemas.append(schema.model_json_schema())
        self.told.append("\n".join(part for part in parts if isinstance(part, str)))
        if not self.replies:
            raise Problem("the script is over")
        reply = self.replies.pop(0)
        text = reply if isinstance(reply, str) else json.dumps(reply)
        return {"text": text, "tokens_in": 100, "tokens_out": 10, "model": "script-1"}


@dataclass
class Run:
    """A run that is over."""

    result: collabvr.Result
    models: Models

    @property
    def cost(self):
        return self.models.cost()

    def shown(self):
        """The generations that the video consists of, frame 0 apart."""
        frames = self.result.video.frames[1:, 0, 0, 0].tolist()
        return [number for number, _ in itertools.groupby(frames)]

    def roles(self):
        """The VLM's calls, by their first letters."""
        return "".join(call.role[0] for call in self.models.calls if call.role != "vgm")

    def given(self, name):
        """What the generator was given, call by call: frame, prompt, seconds or seed."""
        return [call[name] for call in self.models.vgm.calls]

    def outcome(self):
        return self.result.status, self.result.unverified_steps


def go(*replies, method="collabvr", folder=None, fail=(), seed=0, q="solve it", **config):
    """A run to the script's end: two seconds for step 1, one for later steps. `folder` keeps it."""
    vgm, vlm = Painter(fail), Script(*replies)
    config = Config(**{"seconds_first": 2, "seconds_next": 1, **config})
    if folder is None:
        models = Models(vgm, vlm, seed)
    else:
        models = RecordedModels(vgm, vlm, folder, seed)
        models.facts = {"method": method, "settings": asdict(config)}
    try:
        result = METHODS[method](models, config).run(I0, q)
        if folder is not None:
            models.save(result)
    finally:
        if folder is not None:
            models.lock.release()
    assert not vlm.replies, "the run ended before the script did"
    return Run(result, models)


@pytest.fixture(scope="session", autouse=True)
def quick_disk():
    """No call waits for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Headless Chromium. Skips, and says what is missing, where there is none."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not importlib.util.find_spec("selenium"):
        pytest.skip("selenium is missing: pip install -r examples/requirements.txt")
    if not chromium or not driver:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 "disable-dev-shm-usage", f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()
