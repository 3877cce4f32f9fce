"""The methods of baselines.py, with scripted models: which clips, which seeds, which calls."""

import json

import numpy as np
import pytest
from pydantic import BaseModel

import collabvr
from collabvr import Clip, Config, Models, Problem, RecordedModels
from examples import baselines
from examples.baselines import METHODS

I0 = np.full((16, 24, 3), 9, np.uint8)


class Painter:
    """Clips of one colour each, 1, 2, 3 ..; it notes what it is asked, and some calls fail."""

    def __init__(self, fail=()):
        self.fail, self.calls = fail, []

    def __call__(self, frame, prompt, seconds, seed):
        self.calls.append((prompt, seconds, seed, int(frame[0, 0, 0])))
        if len(self.calls) in self.fail:
            raise RuntimeError("out of memory")
        frames = np.repeat(frame[None], 1 + int(8 * seconds), 0)
        frames[1:] = 10 * len(self.calls)
        return Clip(frames, 8)

    @property
    def seeds(self):
        return [seed for _, _, seed, _ in self.calls]


class Script:
    """A VLM that answers from a list and keeps what it was asked."""

    def __init__(self, *replies):
        self.replies, self.schemas, self.told = list(replies), [], []

    def __call__(self, instructions, parts, schema):
        self.schemas.append(schema.model_json_schema())
        self.told.append("\n".join(x for x in parts if isinstance(x, str)))
        if not self.replies:
            raise Problem("the script is over")
        return json.dumps(self.replies.pop(0))


def go(method, *replies, vgm=None, seed=0, **config):
    """(result, cost, generator, VLM) of a method whose script is used up."""
    vgm, script = vgm or Painter(), Script(*replies)
    models = Models(vgm, script, seed=seed)
    config = Config(**{"seconds_first": 2, "seconds_next": 1} | config)
    result = METHODS[method](models, config).run(I0, "solve it")
    assert not script.replies, "the run ended before the script did"
    return result, models.cost(), vgm, script


def planned(left=1, done=False):
    return {
        "observation": "", "remaining_goal": "", "task_complete": done,
        "instruction": "" if done else "go", "target_state": "" if done else "there",
        "estimated_steps_remaining": left,
    }


def judged(verdict, progress="none"):
    return {
        "reason": "seen", "action_executed": verdict == "accept", "progress": progress,
        "good_fraction": 0.5, "suggestion": "Go on.", "confidence": "low", "verdict": verdict,
    }


def routed(action):
    return {"reason": "so", "action": action, "suggestion": "Go far.", "estimated_steps": 0}


def colour(result):
    return int(result.video.frames[-1, 0, 0, 0])


# ------------------------------------------------------------------------------
# Single, Pass@k, VideoTPO, pre-planning


def test_single_is_one_clip_with_seed_1():
    """And asks nobody, whatever the run's own seed is."""
    result, cost, vgm, _ = go("single", seed=7)
    assert vgm.calls == [("solve it", 2, 1, 9)] and [*cost["calls"]] == ["vgm"]
    assert (cost["clips"], cost["vgm_seconds"]) == (1, 2)
    assert (result.status, result.unverified_steps) == ("unverified", [1])


def test_pass_at_4_shows_four_seeds_and_one_is_picked():
    result, cost, vgm, script = go("pass4", {"reason": "it arrives", "best": 3}, seed=7)
    assert vgm.seeds == [1, 2, 3, 4] and colour(result) == 30
    assert cost["calls"] == {"vgm": 4, "picker": 1} and cost["vgm_seconds"] == 8
    assert cost["regenerations"] == 0, "independent samples are none"
    assert all(f"Candidate {k}:" in script.told[0] for k in (1, 2, 3, 4))
    assert result.status == "unverified"


@pytest.mark.parametrize("fail", [1, 2, 3, 4])
def test_a_failed_candidate_gets_a_seed_of_its_own(fail):
    """Never one that another candidate has: k different clips are compared."""
    _, cost, vgm, _ = go("pass4", {"reason": "", "best": 1}, vgm=Painter([fail]))
    made = [seed for n, seed in enumerate(vgm.seeds, 1) if n != fail]
    assert len(set(made)) == 4 and (cost["clips"], cost["generator_errors"]) == (4, 1)


def test_a_pick_that_does_not_exist_is_asked_for_again():
    """And the schema has none."""
    replies = [{"reason": "best", "best": k} for k in (3, 0, 2)]
    result, cost, _, script = go("pass2", *replies)
    assert cost["calls"]["picker"] == 3 and colour(result) == 20
    best = script.schemas[0]["properties"]["best"]
    assert (best["minimum"], best["maximum"]) == (1, 2)


def test_videotpo_makes_two_rounds_and_a_last_clip():
    one = {"critiques": ["too far", "too slow"], "prompt": "solve it better"}
    two = {"critiques": ["fine"], "prompt": "solve it best"}
    result, cost, vgm, script = go("videotpo", one, two)
    assert vgm.seeds == [1, 2, 1, 2, 1]
    assert [x[0] for x in vgm.calls] == ["solve it"] * 2 + ["solve it better"] * 2 + [
        "solve it best"]
    assert cost["calls"] == {"vgm": 5, "critic": 2} and cost["vgm_seconds"] == 10
    assert "Current prompt: solve it better" in script.told[1]
    assert cost["regenerations"] == 0 and result.status == "unverified"


def test_a_blank_prompt_or_no_critique_is_no_critique():
    good = {"critiques": ["fine"], "prompt": "solve it"}
    _, cost, _, script = go("videotpo", good | {"prompt": " "}, good | {"critiques": []}, good,
                            good)
    assert cost["calls"]["critic"] == 4 and "prompt: must not be blank" in script.told[1]


def test_preplanning_chains_a_clip_for_each_milestone():
    steps = [{"instruction": f"go {k}", "target_state": "there"} for k in (1, 2, 3)]
    result, cost, vgm, _ = go("preplan", {"observation": "", "milestones": steps})
    assert vgm.calls == [("go 1", 2, 0, 9), ("go 2", 1, 1, 10), ("go 3", 1, 2, 20)]
    assert cost["calls"] == {"planner": 1, "vgm": 3} and cost["steps"] == 3
    assert (result.status, result.unverified_steps) == ("unverified", [1, 2, 3])
    assert len(result.video.frames) == 1 + 16 + 8 + 8


def test_more_milestones_than_allowed_are_asked_for_again():
    """And so are none, and one without an instruction; the schema has the limits."""
    step = {"instruction": "go", "target_state": "there"}
    replies = [{"observation": "", "milestones": [step] * k} for k in (3, 0, 2)]
    _, cost, vgm, script = go("preplan", *replies, N_max=2)
    assert cost["clips"] == 2 and [x[1] for x in vgm.calls] == [2, 1]
    assert script.schemas[0]["properties"]["milestones"]["maxItems"] == 2
    blank = {"observation": "", "milestones": [step | {"instruction": " "}]}
    assert go("preplan", blank, replies[2], N_max=2)[1]["calls"]["planner"] == 2


# ------------------------------------------------------------------------------
# M1, M2


def test_m1_stops_when_the_planner_sees_the_task_done():
    result, cost, *_ = go("m1", planned(2), planned(1), planned(done=True))
    assert (result.status, result.unverified_steps) == ("complete", [1, 2])
    assert cost["calls"] == {"planner": 3, "vgm": 2}


def test_m1_ends_at_the_step_cap_whatever_was_hoped_for():
    result, cost, *_ = go("m1", planned(2), planned(1), N_max=2)
    assert (result.status, result.unverified_steps) == ("step_cap", [1, 2])
    assert cost["clips"] == 2


def test_m2_asks_no_planner_and_its_action_is_the_task():
    result, cost, vgm, _ = go("m2", judged("reject"), judged("accept", "complete"))
    assert [x[0] for x in vgm.calls] == ["solve it", "solve it Correction: Go on."]
    assert (result.status, result.unverified_steps) == ("complete", [])
    assert cost["calls"] == {"vgm": 2, "verifier": 2} and cost["steps"] == 1
    assert cost["regenerations"] == 1


def test_m2_is_complete_only_if_the_accepted_clip_is():
    result, cost, *_ = go("m2", judged("accept", "partial"))
    assert result.status == "step_cap" and cost["clips"] == 1


@pytest.mark.parametrize("action, replies, status, unverified", [
    ("regen", [judged("accept", "complete")], "complete", []),
    ("regen", [judged("reject")], "step_cap", [1]),
    ("fallback", [], "fallback", [1]),
])
def test_m2_goes_on_with_regen_or_fallback(action, replies, status, unverified):
    """A split is not offered: there is one step."""
    result, cost, _, script = go(
        "m2", judged("reject"), routed("split"), routed(action), *replies, M=1)
    assert (result.status, result.unverified_steps) == (status, unverified)
    assert cost["calls"]["router"] == 2 and cost["clips"] == 2
    assert script.schemas[1]["properties"]["action"]["enum"] == ["regen", "fallback"]


def test_m2_can_go_on_with_the_best_attempt():
    result, cost, *_ = go("m2", judged("reject"), M=1, on_exhausted="best")
    assert (result.status, result.unverified_steps) == ("step_cap", [1]) and cost["clips"] == 1


# ------------------------------------------------------------------------------
# Routed: one clip, and then?


KEEP, LOOP = ({"reason": "so it is", "action": x} for x in ("Keep", "loop "))


def test_a_routed_clip_that_is_kept_is_the_video():
    """It was asked about once, no verifier saw it, and its status says no more than that."""
    result, cost, vgm, script = go("routed", KEEP)
    assert vgm.calls == [("solve it", 2, 0, 9)] and colour(result) == 10
    assert cost["calls"] == {"vgm": 1, "router": 1} and cost["steps"] == 1
    assert (result.status, result.unverified_steps) == ("unverified", [1])
    assert "Task prompt: solve it" in script.told[0] and "Reason" not in script.told[0]


def test_a_routed_loop_is_algorithm_1_from_the_input():
    """The first clip counts in the cost, and is no re-generation of step 1."""
    replies = [planned(2), judged("reject"), judged("accept", "partial"), planned(),
               judged("accept", "complete")]
    result, cost, vgm, _ = go("routed", LOOP, *replies)
    assert vgm.calls == [("solve it", 2, 0, 9), ("go", 2, 1, 9),
                         ("go Correction: Go on.", 2, 2, 9), ("go", 1, 3, 30)]
    assert (result.status, result.unverified_steps) == ("complete", [])
    assert cost["vgm_seconds"] == 7 and cost["regenerations"] == 1


def test_what_the_sample_router_may_say_is_in_its_schema():
    with pytest.raises(Problem, match="router gave no usable reply"):
        go("routed", *[KEEP | {"action": "retry"}] * 3)
    assert action_of(baselines.SampleRouting) == ["keep", "loop"]


def action_of(schema):
    return schema.model_json_schema()["properties"]["action"]["enum"]


def test_a_routed_run_goes_on_without_paying_twice(tmp_path):
    def once(vgm, *replies):
        models = RecordedModels(vgm, Script(*replies), tmp_path)
        config = Config(seconds_first=2, seconds_next=1)
        return METHODS["routed"](models, config).run(I0, "solve it")

    with pytest.raises(Problem, match="the script is over"):
        once(vgm := Painter(), LOOP, planned())
    again = Painter()
    again.calls = vgm.calls[:]
    assert once(again, judged("accept", "complete")).status == "complete"
    assert len(again.calls) == len(vgm.calls) == 2


# ------------------------------------------------------------------------------
# All of them


def test_every_method_refuses_a_second_run():
    for method in METHODS.values():
        models = Models(Painter(), Script())
        models.calls.append(collabvr.Call(role="vgm", t=1))
        with pytest.raises(Problem, match="served a run"):
            method(models, Config()).run(I0, "solve it")


SCHEMAS = [baselines.pick_of(2), baselines.Critique, baselines.milestones_of(1),
           baselines.milestones_of(3), baselines.SampleRouting]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_no_schema_has_what_engines_stumble_over(schema: type[BaseModel]):
    """const is refused by Gemini's dialect; minLength, maxLength and pattern spoil texts."""
    text = json.dumps(schema.model_json_schema())
    for word in ("const", "minLength", "maxLength", "pattern"):
        assert f'"{word}"' not in text


def test_a_prompt_names_the_fields_of_its_reply():
    for prompt, schema in {
        baselines.PICKER: baselines.Pick, baselines.CRITIC: baselines.Critique,
        baselines.PREPLANNER: baselines.Milestones,
        baselines.SAMPLE_ROUTER: baselines.SampleRouting,
    }.items():
        last = prompt.rpartition("Reply with one JSON object")[2]
        assert all(name in last for name in schema.model_fields)
