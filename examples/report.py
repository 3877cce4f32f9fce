"""What happened in a run, as one HTML page that opens from the disk: no server, no network.

    python -m examples.report runs/maze-5           writes runs/maze-5/report.html
    python -m examples.report runs/maze-5 --film    and film.webp, a moving picture of the run
    python -m examples.report results               the page of each run below, and an index

Every page is made anew. A run that goes on is shown as far as it got.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import tyro
from tqdm import tqdm

import collabvr
from collabvr import Call, Clip, Problem, explained
from examples import cli, film, html, runs
from examples.html import Html, figure, listed, short, tag
from examples.runs import Run

FACTS = ("method", "category", "score")  # of a run, if its trace has them
# of a reply: what stands only in its text, which is shown on demand
DETAILS = ("observation", "remaining_goal", "estimated_steps_remaining", "action_executed",
           "progress", "good_fraction", "confidence", "verdict", "estimated_steps")


def write(folder: Path) -> Path:
    """Writes the page of a run, or of each run below the folder, and an index of them.

    Returns the file to open. Raises Problem, OSError.
    """
    folder = Path(folder)
    if (folder / "trace.json").exists():
        write_page(folder)
        return folder / "report.html"
    places = sorted(path.parent for path in folder.rglob("trace.json"))
    if not places:
        raise Problem(f"There is no run in {folder}: no trace.json.")
    found = {}
    for place in tqdm(places, unit="run", disable=None):
        name = place.relative_to(folder).as_posix()
        try:  # one that cannot be shown must not hide the others
            found[name] = write_page(place)
        except Problem as problem:
            found[name] = Run(place, "unreadable", [str(problem)], [], {})
    save(folder / "report.html", index(folder.resolve().name, found).encode(errors="replace"))
    return folder / "report.html"


def write_page(folder: Path) -> Run:
    """Writes the page of a run. Raises Problem."""
    with explained(f"{folder} cannot be shown", Exception):  # whatever it holds
        run = runs.load_run(folder)
        save(folder / "report.html", page(run).encode(errors="replace"))
    return run


def save(path: Path, content: bytes) -> None:
    """A new file. If somebody's folder holds a link of that name, the link goes."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


# ------------------------------------------------------------------------------
# The index


def index(title: str, found: dict[str, Run]) -> str:
    """A table of runs, which a script sorts. found: run folders, relative to the page's."""
    facts = [name for name in FACTS if any(name in run.facts for run in found.values())]
    heads = ["Run", "Status", *map(str.capitalize, facts), "VGM seconds", "VLM calls"]
    words = Counter(meaning(run).word for run in found.values())
    told = ", ".join(f"{n:,} {word}" for word, n in words.items())
    buttons = [tag("button", head, type="button") for head in heads]
    return html.document(title, [
        tag("h1", title),
        tag("p", f"Runs: {len(found):,} ({told}). The headings sort."),
        tag("table",
            tag("thead", tag("tr", [tag("th", button, aria_sort="none") for button in buttons])),
            tag("tbody", [row(name, run, heads) for name, run in found.items()])),
    ], html.SORT)


def row(name: str, run: Run, heads: list[str]) -> Html:
    status = meaning(run)
    page = None if run.status == "unreadable" else quote(f"{name}/report.html")
    values = {name.capitalize(): value for name, value in run.facts.items()}
    values["VGM seconds"] = run.cost()["vgm_seconds"]
    values["VLM calls"] = sum(call.role != "vgm" for call in run.calls)
    cells = [
        tag("td", tag("a", name, href=page),
            tag("p", run.facts.get("task", "")[:240], class_="small"), data_value=name),
        tag("td", tag("b", status.word, class_=status.tone),
            tag("p", " ".join(run.notes)[:240], class_="small"), data_value=status.word),
    ]
    for head in heads[2:]:
        value = values.get(head, "")
        cells.append(tag("td", short(value), data_value=value, data_head=head))
    return tag("tr", cells)


# ------------------------------------------------------------------------------
# A run's page


def page(run: Run) -> str:
    status, name, cost = meaning(run), run.folder.resolve().name, run.cost()
    by_role = {key: value for key, value in cost.items() if isinstance(value, dict)}
    told = {key: run.facts[key] for key in FACTS if key in run.facts}
    told |= {key: value for key, value in cost.items() if key not in by_role}
    return html.document(f"{status.word}: {name}", [
        tag("h1", name),
        tag("p", run.facts.get("task", ""), class_="task"),
        tag("p", tag("b", status.word, class_=status.tone), " ",
            " ".join([status.meaning, *run.notes])),
        tag("p", f"By rule: {run.facts['by_rule']}.") if "by_rule" in run.facts else None,
        tag("div", pictures(run), class_="pair"),
        listed({key: short(value) for key, value in told.items()}, class_="tiles"),
        tag("details", tag("summary", "Cost of each role"), listed(by_role)),
        tag("details", tag("summary", "Settings"), listed(run.facts.get("settings", {}))),
        [tag("section", tag("h2", f"Step {t}"), [card(run, item) for item in items])
         for t, items in steps(run)],
    ], html.PLAYERS)


def meaning(run: Run) -> runs.Status:
    """Of a status that is a word of somebody's own method, nothing is known."""
    return runs.STATUS.get(run.status) or runs.Status(run.status, "dim", "")


def pictures(run: Run) -> list[Html]:
    """The input picture, and the video as it is."""
    found = []
    picture, path = run.picture(), run.video()
    if picture is not None:
        found.append(figure(html.picture(picture, "Input"), "Input"))
    if path:
        fps = [call.size[2] for call in run.calls if call.size]
        video = html.video(path.read_bytes(), "Final video", fps[0] if fps else 25)
        found.append(figure(video, "Final video"))
    return found


# ------------------------------------------------------------------------------
# The calls of a step


@dataclass
class Tried:
    """A clip of a step, and what the verifier said of it."""

    n: int  # its number in the step
    call: Call
    repaired: Tried | None = None  # of a regen: the attempt whose good part comes first [D15]
    checks: list[Call] = field(default_factory=list)  # of the verifier, unusable ones too

    @property
    def d(self) -> dict:
        """The verifier's reply; {} if there is none."""
        return next((check.reply for check in self.checks if check.reply), {})

    @property
    def word(self) -> str:
        said = [check.reply["verdict"] for check in self.checks if check.reply]
        if not said:
            return "not verified"
        return "accepted" if said.count("accept") > len(said) / 2 else "rejected"

    @property
    def tone(self) -> str:
        return {"accepted": "good", "rejected": "bad"}.get(self.word, "dim")

    @property
    def heading(self) -> str:
        return f"Attempt {self.n}, {self.word}"

    def clip(self, run: Run) -> Clip | None:
        """The clip as the verifier saw it; None if it is missing."""
        clip, best = run.clip(self.call), self.repaired
        before = run.clip(best.call) if best else None
        if not (clip and best and before):
            return clip
        k = math.floor(best.d["good_fraction"] * (len(before.frames) - 1) + 1e-6)
        return collabvr.concat([Clip(before.frames[: k + 1], clip.fps), clip])


def steps(run: Run) -> list[tuple[int, list[Call | Tried]]]:
    """(t, its calls in their order). A clip and the verifier's calls of it are one Tried."""
    found = []
    for t, calls in itertools.groupby(run.calls, key=lambda call: call.t):
        items: list[Call | Tried] = []
        clips: list[Tried] = []
        repaired = None
        for call in calls:
            if call.clip:
                clips.append(Tried(len(clips) + 1, call, repaired))
                items.append(clips[-1])
            elif call.role == "verifier" and items and isinstance(items[-1], Tried):
                clips[-1].checks.append(call)
            else:
                items.append(call)
            if clips and (call.reply or {}).get("action") == "regen":
                repaired = max(reversed(clips), key=lambda x: x.d["good_fraction"])
        found.append((t, items))
    return found


def card(run: Run, item: Call | Tried) -> Html:
    """An attempt; or an answer of another role, or a failure of the generator."""
    if isinstance(item, Tried):
        return attempt(run, item)
    if item.role == "vgm":
        failed = f"The generator failed after {spent(item)}, seed {item.seed}: {item.fault}"
        return tag("p", failed, class_="card")
    return tag("div", tag("h3", item.role), answer(item), class_="card")


def attempt(run: Run, x: Tried) -> Html:
    clip, call = x.clip(run), x.call
    if clip:
        last = html.picture(clip.frames[-1], "Last frame")
        shown = tag("div", figure(html.player(clip, x.heading), right(clip, x.d)),
                    figure(last, "Last frame"), class_="pair")
    else:
        shown = tag("p", f"The clip {call.clip} is missing, damaged or outside of the folder.")
    made = f"vgm: {short(call.seconds)} s of video in {spent(call)}, seed {call.seed}"
    if x.repaired:
        made += f"; before it comes the good part of attempt {x.repaired.n}"
    return tag(
        "article", tag("h3", f"Attempt {x.n} ", tag("b", x.word, class_=x.tone)), shown,
        tag("div", listed({"prompt": evolved(call.prompt or "")}), [answer(y) for y in x.checks],
            tag("p", made, class_="small")),
        class_="card attempt")


def evolved(prompt: str) -> Html:
    """A prompt in which each correction that evolve added is marked. [D5]"""
    planned, *corrections = prompt.split(" Correction: ")
    return tag("span", planned, [tag("ins", f" Correction: {x}") for x in corrections])


def right(clip: Clip, d: dict) -> list:
    """How much of a clip is right, as a bar that is thin where it is not, and in words."""
    if "good_fraction" not in d:
        return [f"{short(clip.seconds)} s"]
    good = d["good_fraction"]
    return [
        tag("svg", tag("rect", width=f"{good:%}", height=8, class_="good"),
            tag("rect", x=f"{good:%}", y=3, width="100%", height=2, class_="bad")),
        f"right for {good * clip.seconds:.2g} of {short(clip.seconds)} s ({good:.0%})",
    ]


def answer(call: Call) -> Html:
    """What matters in a VLM's answer; on demand, the whole text as it came."""
    reply = call.reply or {"unusable reply": call.fault}
    first = {name: x for name, x in reply.items() if x and name not in DETAILS}
    return tag("div", listed(first), tag(
        "details", tag("summary", f"{call.role}: {spent(call)}", class_="small"),
        tag("pre", (call.text or "")[:20_000])))


def spent(call: Call) -> str:
    """Time and tokens of a call, and who answered."""
    amounts = [f"{short(call.wall_seconds)} s"]
    if call.tokens_in:
        amounts += [f"{call.tokens_in:,} tokens in", f"{call.tokens_out:,} tokens out"]
    return ", ".join([*amounts, *filter(None, [call.model])])


# ------------------------------------------------------------------------------
# The command line


@dataclass
class Report:
    folder: tyro.conf.Positional[Path]  # a run folder, or a folder with run folders below it
    film: bool = False  # of a run: also film.webp, for a README

    def run(self) -> int:
        print(write(self.folder))
        if self.film:
            run = runs.load_run(self.folder)
            tried = [x for _, items in steps(run) for x in items if isinstance(x, Tried)]
            save(self.folder / "film.webp", film.film(run, tried))
            print(self.folder / "film.webp")
        return 0


def main(argv: list[str] | None = None) -> int:
    """0, or 2 after bad input and 130 after an interruption, with a sentence on stderr."""
    return cli.command(__doc__, Report, argv)


if __name__ == "__main__":
    sys.exit(main())
