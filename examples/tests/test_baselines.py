"""The methods of baselines.py, with scripted models: which clips, which seeds, which calls."""

import json
import subprocess
import sys

import pytest

from collabvr import Call, Config, Models, Problem
from examples import baselines
from examples.baselines import METHODS
from examples.tests.conftest import I0, Painter, Script, accept, go, plan, reject, route

# ------------------------------------------------------------------------------
# Still, Single, Pass@k, VideoTPO, pre-planning


def test_still_is_the_picture_and_asks_nobody():
    run = go(method="still")
    assert run.models.calls == [] and run.outcome() == ("unverified", [1])
    assert (run.result.video.frames == I0).all() and run.result.video.seconds == 2


def test_single_is_one_clip_with_seed_1():
    """And asks nobody, whatever the run's own seed is."""
    run = go(method="single", seed=7)
    assert run.models.vgm.calls == [{"frame": 250, "prompt": "solve it", "seconds": 2, "seed": 1}]
    assert run.roles() == "" and run.outcome() == ("unverified", [1])


def test_pass_at_4_shows_four_seeds_and_one_is_picked():
    run = go({"reason": "it arrives", "best": 3}, method="pass4", seed=7)
    assert run.given("seed") == [1, 2, 3, 4] and run.shown() == [3]
    assert run.cost["calls"] == {"vgm": 4, "picker": 1} and run.cost["vgm_seconds"] == 8
    assert run.cost["regenerations"] == 0, "independent samples are none"
    assert all(f"Candidate {k}:" in run.models.vlm.told[0] for k in (1, 2, 3, 4))
    assert run.outcome() == ("unverified", [1])


@pytest.mark.parametrize("fail", [1, 2, 3, 4])
def test_a_failed_candidate_gets_a_seed_of_its_own(fail):
    """Never one that another candidate has: k different clips are compared."""
    run = go({"reason": "", "best": 1}, method="pass4", fail=[fail])
    made = [seed for n, seed in enumerate(run.given("seed"), 1) if n != fail]
    assert len(set(made)) == 4
    assert (run.cost["clips"], run.cost["generator_errors"]) == (4, 1)


def test_a_pick_that_does_not_exist_is_asked_for_again():
    """And the schema has none."""
    run = go(*[{"reason": "best", "best": k} for k in (3, 0, 2)], method="pass2")
    assert run.cost["calls"]["picker"] == 3 and run.shown() == [2]
    best = run.models.vlm.schemas[0]["properties"]["best"]
    assert (best["minimum"], best["maximum"]) == (1, 2)


def test_videotpo_makes_two_rounds_and_a_last_clip():
    one = {"critiques": ["too far", "too slow"], "prompt": "solve it better"}
    two = {"critiques": ["fine"], "prompt": "solve it best"}
    run = go(one, two, method="videotpo")
    assert run.given("seed") == [1, 2, 1, 2, 1] and run.shown() == [5]
    assert run.given("prompt") == [*["solve it"] * 2, *["solve it better"] * 2, "solve it best"]
    assert run.cost["calls"] == {"vgm": 5, "critic": 2} and run.cost["regenerations"] == 0
    assert "Current prompt: solve it better" in run.models.vlm.told[1]
    assert run.outcome() == ("unverified", [1])


def test_a_blank_prompt_or_no_critique_is_no_critique():
    good = {"critiques": ["fine"], "prompt": "solve it"}
    run = go(good | {"prompt": " "}, good | {"critiques": []}, good, good, method="videotpo")
    assert run.cost["calls"]["critic"] == 4
    assert "prompt: must not be blank" in run.models.vlm.told[1]


def milestones(*instructions):
    steps = [{"instruction": text, "target_state": "there"} for text in instructions]
    return {"observation": "", "milestones": steps}


def test_preplanning_chains_a_clip_for_each_milestone():
    run = go(milestones("go", "on", "home"), method="preplan")
    assert run.given("prompt") == ["go", "on", "home"] and run.given("frame") == [250, 1, 2]
    assert run.given("seconds") == [2, 1, 1] and run.given("seed") == [0, 1, 2]
    assert run.roles() == "p" and run.cost["steps"] == 3 and run.shown() == [1, 2, 3]
    assert run.outcome() == ("unverified", [1, 2, 3])


def test_more_milestones_than_allowed_are_refused():
    """And so are none, and one without an instruction. The schema has the limits."""
    replies = [milestones(*["go"] * 3), milestones(), milestones("go", "on")]
    run = go(*replies, method="preplan", N_max=2)
    assert run.roles() == "ppp" and run.cost["clips"] == 2
    assert run.models.vlm.schemas[0]["properties"]["milestones"]["maxItems"] == 2
    assert go(milestones(" "), milestones("go"), method="preplan").roles() == "pp"


# ------------------------------------------------------------------------------
# M1, M2


def test_m1_stops_when_the_planner_sees_the_task_done():
    run = go(plan(left=2), plan(left=1), plan(done=True), method="m1")
    assert run.roles() == "ppp" and run.shown() == [1, 2]
    assert run.outcome() == ("complete", [1, 2])


def test_m1_ends_at_the_step_cap():
    run = go(plan(left=2), plan(left=1), method="m1", N_max=2)
    assert run.outcome() == ("step_cap", [1, 2]) and run.cost["clips"] == 2


def test_m2_asks_no_planner_and_its_action_is_the_task():
    run = go(reject(), accept(), method="m2")
    assert run.given("prompt") == ["solve it", "solve it Correction: go left"]
    assert run.roles() == "vv" and run.outcome() == ("complete", [])
    assert (run.cost["steps"], run.cost["regenerations"]) == (1, 1)


def test_m2_is_complete_only_if_the_accepted_clip_is():
    run = go(accept("partial"), method="m2")
    assert run.outcome() == ("step_cap", []) and run.cost["clips"] == 1


@pytest.mark.parametrize("action, replies, outcome", [
    ("regen", [accept()], ("complete", [])),
    ("regen", [reject()], ("step_cap", [1])),
    ("fallback", [], ("fallback", [1])),
])
def test_m2_goes_on_with_regen_or_fallback(action, replies, outcome):
    """A split is not offered: there is one step."""
    run = go(reject(), route("split"), route(action), *replies, method="m2", M=1)
    assert run.outcome() == outcome
    assert run.cost["calls"]["router"] == 2 and run.cost["clips"] == 2
    assert run.models.vlm.schemas[1]["properties"]["action"]["enum"] == ["regen", "fallback"]


def test_m2_can_go_on_with_the_best_attempt():
    run = go(reject(), method="m2", M=1, on_exhausted="best")
    assert run.outcome() == ("step_cap", [1]) and run.cost["clips"] == 1


# ------------------------------------------------------------------------------
# Routed: one clip, and then?


KEEP, LOOP = ({"reason": "so it is", "action": action} for action in ("Keep", "loop "))


def test_a_routed_clip_that_is_kept_is_the_video():
    """No verifier saw it, and its status says no more than that."""
    run = go(KEEP, method="routed")
    assert run.given("prompt") == ["solve it"] and run.shown() == [1]
    assert run.roles() == "r" and run.outcome() == ("unverified", [1])
    assert "Task prompt: solve it" in run.models.vlm.told[0]


def test_a_routed_loop_is_algorithm_1_from_the_input():
    """The first clip counts in the cost, and is no re-generation of step 1."""
    run = go(LOOP, plan(left=2), reject(), accept("partial"), plan(), accept(), method="routed")
    assert run.given("prompt") == [
        "solve it", "move it", "move it Correction: go left", "move it"]
    assert run.given("frame") == [250, 250, 250, 3] and run.given("seconds") == [2, 2, 2, 1]
    assert run.shown() == [3, 4] and run.outcome() == ("complete", [])
    assert run.cost["vgm_seconds"] == 7 and run.cost["regenerations"] == 1
    assert "Steps so far:\nnone" in run.models.vlm.told[1], "the loop knows nothing of the clip"


def test_the_sample_router_keeps_or_loops():
    with pytest.raises(Problem, match="router gave no usable reply"):
        go(*[KEEP | {"action": "retry"}] * 3, method="routed")


def test_a_routed_run_goes_on_without_paying_twice(tmp_path):
    with pytest.raises(Problem, match="the script is over"):
        go(LOOP, plan(), method="routed", folder=tmp_path)
    run = go(accept(), method="routed", folder=tmp_path)
    assert run.outcome() == ("complete", []) and run.models.vgm.calls == []


# ------------------------------------------------------------------------------
# Backtrack


def test_the_good_part_of_a_rejected_clip_is_kept():
    """The next plan goes on from its last frame."""
    run = go(plan(), reject(good=0.5), plan("go on"), accept(), method="backtrack", M=1)
    assert run.roles() == "pvpv" and run.given("prompt") == ["move it", "go on"]
    assert run.given("frame") == [250, 1] and run.given("seconds") == [2, 2]
    assert run.shown() == [1, 2] and len(run.result.video.frames) == 1 + 4 + 8
    assert run.outcome() == ("complete", [1]) and run.cost["regenerations"] == 1
    assert "rejected, the first 1 s are kept: it went right" in run.models.vlm.told[2]


def test_it_is_the_best_attempt_that_is_gone_back_to():
    run = go(plan(), reject(good=0.5), reject(good=0.2), plan(), accept(),
             method="backtrack", M=2)
    assert run.roles() == "pvvpv" and run.shown() == [1, 3]


def test_of_a_clip_without_a_good_part_nothing_is_kept():
    run = go(plan(), reject(good=0), plan(), accept(), method="backtrack", M=1)
    assert run.given("frame") == [250, 250] and run.shown() == [2]
    assert run.outcome() == ("complete", [])


def test_after_two_failures_the_step_before_is_dropped():
    """And what was kept after it."""
    run = go(plan(left=3), accept("partial"), plan(left=2), accept("partial"),
             *[plan(), reject()] * 3, plan(), accept(), method="backtrack", M=1)
    assert run.given("frame") == [250, 1, 2, 3, 4, 1]
    assert run.shown() == [1, 6] and run.outcome() == ("complete", [])


def test_a_plan_may_end_the_run_after_going_back():
    run = go(plan(), reject(), plan(), reject(), plan(done=True), method="backtrack", M=1)
    assert run.shown() == [1, 2] and run.outcome() == ("complete", [1])


def test_backtracking_has_the_routers_budget():
    """At most N_max * M + N_max clips. If all fail, the best attempt is the video."""
    script = [
        plan(), reject(0), reject(0), plan(), reject(0), plan(), reject(0),  # spends the spare ones
        plan(), reject(0), reject(0),
    ]
    run = go(*script, method="backtrack", N_max=2, M=2)
    assert run.cost["clips"] == 2 * 2 + 2 and run.cost["steps"] == 2
    assert run.outcome() == ("best_attempt", [2])


def test_backtracking_goes_on_after_the_step():
    """An accept at the last spare clip leads to the next step as ever."""
    run = go(plan(), reject(), plan(left=2), accept("partial"), plan(), accept(),
             method="backtrack", M=1, N_max=2)
    assert run.shown() == [1, 2, 3] and run.given("seconds") == [2, 2, 1]
    assert run.outcome() == ("complete", [1])


# ------------------------------------------------------------------------------
# All of them


@pytest.mark.parametrize("method", METHODS)
def test_every_method_refuses_a_second_run(method):
    models = Models(Painter(), Script())
    models.calls.append(Call(role="vgm", t=1))
    with pytest.raises(Problem, match="served a run"):
        METHODS[method](models, Config()).run(I0, "solve it")


SCHEMAS = [
    baselines.pick_of(2), baselines.Critique, baselines.milestones_of(1),
    baselines.milestones_of(3), baselines.SampleRouting,
]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_no_schema_has_what_engines_stumble_over(schema):
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


def test_baselines_says_that_it_is_no_program():
    done = subprocess.run([sys.executable, baselines.__file__], capture_output=True, text=True,
                          env={"PYTHONPATH": "."}, check=False)
    assert done.returncode == 1 and "examples.bench.run" in done.stderr
