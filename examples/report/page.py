"""A run as a page: its video, its cost, and every call of a model in its order."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass

import collabvr
from collabvr import Call, Clip
from examples import runs
from examples.maze import rule
from examples.maze.vlm import MODEL
from examples.report import markup
from examples.report.markup import Html, figure, listed, number, tag
from examples.runs import Run

ROUTES = {
    "regen": "the good part is kept, the rest generated again",
    "split": "the planner goes on in smaller steps",
    "fallback": "one clip for everything",
}
FIRST = {  # what of a reply is shown at once; of other roles everything
    "planner": ["task_complete", "instruction", "target_state", "milestones"],
    "verifier": ["reason", "suggestion"],
    "router": ["action", "reason", "suggestion"],
}
FILES = ["start.json", "trace.json", "calls.jsonl", "input.png", "video.mp4"]


def page(run: Run, index: str | None = None, mark: str = "") -> str:
    """The page. index: a relative link to the list of runs that it is on. Raises Problem."""
    name = run.folder.resolve().name
    status = meaning(run)
    steps = itertools.groupby(run.calls, key=lambda call: call.t)
    return markup.document(f"{status.word}: {name}", [
        tag("nav", tag("a", "All runs", href=index)) if index else None,
        tag("h1", name),
        tag("p", run.facts.get("task", ""), class_="task"),
        tag("p", tag("b", status.word, class_=status.tone), " ",
            " ".join([status.meaning, *run.notes, *elsewhere(run)])),
        by_rule(run),
        tag("div", pictures(run), class_="pair"),
        tiles(run),
        tag("details", tag("summary", "Cost of each role"), roles(run)),
        tag("details", tag("summary", "Settings"), listed(run.facts.get("settings", {}))),
        [step(run, t, list(calls)) for t, calls in steps],
    ], markup.PLAYERS, mark)


def meaning(run: Run) -> runs.Status:
    """Of a status that is a word of somebody's own method, nothing is known."""
    return runs.STATUS.get(run.status) or runs.Status(run.status, "dim", "")


def elsewhere(run: Run) -> list[str]:
    """Sentences about files that are links out of the folder."""
    names = [x for x in FILES if os.path.lexists(run.folder / x) and not run.file(x)]
    return [f"{name} leads out of the folder and is not shown." for name in names]


def by_rule(run: Run) -> Html | None:
    """Of a run on a maze, whose reader answers by rule: is it solved, and if not, why not?"""
    settings = run.facts.get("settings")
    if not isinstance(settings, dict) or settings.get("vlm") != MODEL:
        return None
    picture, frames = run.picture(), run.frames()
    if picture is None or frames is None:
        return None
    try:
        return tag("p", f"By rule: {rule.verdict(frames, rule.maze_of(picture))}.")
    except ValueError:  # no maze, or another one
        return None


def pictures(run: Run) -> list[Html]:
    """The input picture, and the video as it is."""
    found = []
    picture, video = run.picture(), run.video()
    if picture is not None:
        found.append(figure(markup.picture(picture, "Input"), "Input"))
    if video:
        fps = [call.size[2] for call in run.calls if call.size]
        player = markup.player(video.read_bytes(), "Final video", fps[0] if fps else 25)
        found.append(figure(player, "Final video"))
    return found


def tiles(run: Run) -> Html | None:
    """The figures of a run: the whole cost, and a score if it has one."""
    cost = run.cost()
    shown = {name: x for name, x in cost.items() if not isinstance(x, dict)}
    shown["VLM_calls"] = vlm_calls(run)
    shown["seconds_waited"] = sum(cost["wall_seconds"].values())
    if "score" in run.facts:
        shown["score"] = run.facts["score"]
    return listed({name: number(x) for name, x in shown.items()}, class_="tiles")


def vlm_calls(run: Run) -> int:
    return sum(call.role != "vgm" for call in run.calls)


def roles(run: Run) -> Html | None:
    cost, shown = run.cost(), {}
    for role, n in cost["calls"].items():
        amounts = [f"{n} calls", f"{number(cost['wall_seconds'][role])} s"]
        for name in ("tokens_in", "tokens_out"):
            if cost[name][role]:
                amounts.append(f"{cost[name][role]:,} tokens {name[7:]}")
        shown[role] = ", ".join(amounts)
    return listed(shown)


# ------------------------------------------------------------------------------
# The calls of a step


@dataclass
class Tried:
    """A prompt of a step, and what came of it."""

    prompt: str
    clip: Clip | None = None
    good: float | None = None  # the good fraction


def step(run: Run, t: int, calls: list[Call]) -> Html:
    """The calls of a step. A clip and what the verifier said of it share a card."""
    groups: list[list[Call]] = []
    for call in calls:
        if call.role == "verifier" and groups and groups[-1][0].clip:
            groups[-1].append(call)
        else:
            groups.append([call])

    cards, route = [], None
    tried = [Tried(run.facts.get("task", ""))]  # of a fallback the task is the prompt
    for call, *checks in groups:
        if call.clip:
            cards.append(attempt(run, call, checks, tried, route))
        elif call.error:
            failed = f"The generator failed after {spent(call)}, seed {call.seed}: {call.error}"
            cards.append(tag("p", failed, class_="card"))
        else:
            route = (call.reply or {}).get("action")
            cards.append(tag("div", tag("h3", call.role), answer(call), class_="card"))
    return tag("section", tag("h2", f"Step {t}"), cards)


def attempt(run: Run, call: Call, checks: list[Call], tried: list[Tried], route) -> Html:
    """A clip and what the verifier said of it. It joins `tried`."""
    clip, n, notes = run.clip(call), len(tried), []
    replies = [check.reply for check in checks if check.reply]
    d = replies[0] if replies else {}
    prompts = lineage(call.prompt, [x.prompt for x in tried])
    base = repaired(prompts, tried)
    if route == "regen" and clip and base:  # the verifier saw it behind the good part [D3]
        before = tried[base]
        last_good = math.floor(before.good * (len(before.clip.frames) - 1))
        clip = collabvr.concat([Clip(before.clip.frames[: last_good + 1], clip.fps), clip])
        seconds = number(last_good / clip.fps)
        notes.append(tag("p", f"Its first {seconds} s are those of attempt {base}."))
    tried.append(Tried(call.prompt, clip, d.get("good_fraction")))

    verdict = d.get("verdict")
    word = f"{verdict}ed" if verdict else "not verified"
    tone = {"accept": "good", "reject": "bad"}.get(verdict, "dim")
    if clip:
        film = markup.film(clip, f"Attempt {n}, {word}")
        last = markup.picture(clip.frames[-1], "Last frame")
        shown = tag("div", figure(film, right(clip, d.get("good_fraction"))),
                    figure(last, "Last frame"), class_="pair")
    else:
        shown = tag("p", f"The clip {call.clip} is missing, damaged or outside of the folder.")
    made = f"vgm: {number(call.seconds)} s of video in {spent(call)}, seed {call.seed}"
    return tag(
        "article", tag("h3", f"Attempt {n} ", tag("b", word, class_=tone)), shown,
        tag("div", listed({"prompt": evolved(prompts)}), notes,
            [answer(check) for check in checks], tag("p", made, class_="small")),
        class_="card attempt")


def lineage(prompt: str, earlier: list[str]) -> list[str]:
    """The prompts of which `evolve` made this one, the planner's first, and itself."""
    parents = [x for x in earlier if prompt.startswith(f"{x} Correction: ")]
    if not parents:
        return [prompt]
    return [*lineage(max(parents, key=len), earlier), prompt]


def repaired(prompts: list[str], tried: list[Tried]) -> int | None:
    """The number of the attempt that a regen repaired: the newest one of the prompt before."""
    for i in range(len(tried) - 1, 0, -1):
        x = tried[i]
        if x.clip and x.good and x.prompt in prompts[-2:-1]:
            return i
    return None


def evolved(prompts: list[str]) -> Html:
    """The planner's words and the corrections. One that was made several times is shown once."""
    times: dict[str, int] = {}
    for before, after in itertools.pairwise(prompts):
        correction = after[len(before):]
        times[correction] = times.get(correction, 0) + 1
    shown = []
    for correction, n in times.items():
        shown.append(tag("ins", correction))
        if n > 1:
            shown.append(tag("span", f" ({n} times)", class_="small"))
    return tag("span", prompts[0], shown)


def right(clip: Clip, good: float | None) -> list:
    """How much of a clip is right, as a bar that is thin where it is not, and in words."""
    if good is None:
        return [f"{number(clip.seconds)} s"]
    return [
        tag("svg", tag("rect", width=f"{good:%}", height=8, class_="good"),
            tag("rect", x=f"{good:%}", y=3, width="100%", height=2, class_="bad")),
        f"right for {good * clip.seconds:.2g} of {number(clip.seconds)} s ({good:.0%})",
    ]


def answer(call: Call) -> Html:
    """A VLM's answer: what matters first; the rest, and the text as it came, on demand."""
    if call.reply:
        names = FIRST.get(call.role, call.reply)
        first = {name: call.reply[name] for name in names if call.reply.get(name)}
        if first.get("action") in ROUTES:
            first["action"] += f": {ROUTES[first['action']]}"
    else:
        first = {"unusable reply": call.fault or ""}
    rest = {k: v for k, v in (call.reply or {}).items() if k not in first and v != ""}
    return tag("div", listed(first), tag(
        "details", tag("summary", f"{call.role}: {spent(call)}", class_="small"),
        listed(rest), tag("pre", (call.text or "")[:20_000])))


def spent(call: Call) -> str:
    """Time and tokens of a call, and who answered."""
    amounts = [f"{number(call.wall_seconds)} s"]
    if call.tokens_in:
        amounts.append(f"{call.tokens_in:,} tokens in")
    if call.tokens_out:
        amounts.append(f"{call.tokens_out:,} tokens out")
    return ", ".join([*amounts, *filter(None, (call.model, call.host))])
