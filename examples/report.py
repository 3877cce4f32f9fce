"""What happened in a run, as one HTML page that opens from the disk: no server, no network.

    python examples/report.py runs/maze-5            writes runs/maze-5/report.html
    python examples/report.py results                an index of the runs below, and a page for each
    python examples/report.py results --out x.html   the index there, the pages in the folder x/

A finished run is shown from its trace.json, any other from calls.jsonl: also while it goes on.
"""
from __future__ import annotations

import argparse
import base64
import hashlib
import html
import io
import itertools
import json
import math
import os
import sys
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import collabvr
from collabvr import Clip, Problem, explained

SIDE = 512  # pixels: the longer side of an attempt's clip in the page, which may hold a dozen
STATUS = {  # a word, its colour, what it means; the index sorts in this order
    "complete": ("complete", "good", "The models call the task done."),
    "step_cap": ("step limit", "fair", "The last allowed step is over, the task not found done."),
    "unverified": ("not verified", "fair", "The method that made the video verifies nothing."),
    "fallback": ("fallback", "fair", "The router chose one clip for all; nothing verified it."),
    "best_attempt": ("nothing accepted", "bad", "The video is the best rejected attempt."),
    "unfinished": ("unfinished", "dim", "No result yet; the same command goes on from here."),
    "failed": ("failed", "bad", "The last call failed; the same command tries it again."),
    "unreadable": ("unreadable", "bad", "")}
ROUTES = {"regen": "the good part is kept, the rest generated again",
          "split": "the planner goes on in smaller steps", "fallback": "one clip for everything"}
FIRST = {  # what of a reply to show at once; of other roles everything
    "planner": ["task_complete", "instruction", "target_state", "milestones"],
    "verifier": ["reason", "suggestion"], "router": ["action", "reason", "suggestion"]}


# ============================================================================= Reading a run folder
@dataclass
class Run:
    folder: Path
    status: str  # a key of STATUS, or a word of a method of the user's
    notes: list[str]  # sentences that belong to the status
    calls: list[dict]  # the finished run's; of an unfinished one all there are
    facts: dict  # what start.json and trace.json say: task, settings, score, ..

    def cost(self) -> dict:
        cost = collabvr.Models.cost(self)  # which needs the calls only
        return cost | {"VLM_calls": sum(x["role"] != "vgm" for x in self.calls),
                       "seconds_waited": sum(cost["wall_seconds"].values())}

    def video(self) -> Path | None:
        path = self.folder / "video.mp4"  # without a trace.json it would be an earlier run's
        return path if "status" in self.facts and path.exists() else None


def load(folder: Path) -> Run:
    """Raises Problem if a file is not what collabvr.py writes."""
    with explained(f"{folder} holds no run of collabvr.py", Exception):  # whatever it holds
        start, trace = (json.loads(x.read_bytes()) if x.exists() else {}
                        for x in (folder / "start.json", folder / "trace.json"))
        journal = folder / "calls.jsonl"
        if trace:
            calls, status, notes = trace["calls"], str(trace["status"]), []
            if steps := ", ".join(map(str, trace["unverified_steps"])):
                notes = [f"In the video without an accept: step {steps}."]
            if start.get("settings") != trace.get("settings"):
                notes += ["A later start with other settings is unfinished."]
        else:
            text = journal.read_bytes() if journal.exists() else b""
            *whole, _ = text.split(b"\n")  # _: torn by a power cut
            calls, status, notes = [json.loads(x) for x in whole], "unfinished", []
            if fault := calls and (calls[-1].get("error") or calls[-1].get("fault")):
                status, notes = "failed", [f"{calls[-1]['role']}: {fault}"]
        if not all(type(x["t"]) is int and type(x["role"]) is str for x in calls) or not isinstance(
                trace.get("score", 0), int | float):
            raise ValueError("a call without step or role, or a score that is no number")
        return Run(folder, status, notes, calls, start | trace)


# ============================================================================ HTML, pictures, clips
class Html(str):
    """What `tag` made. Any other string is text, which is escaped where it joins a page."""


def tag(name: str, /, *inner, **attributes) -> Html:
    """An element: tag("p", "a < b", class_="x"). Lists are unfolded, None is left out."""
    given = "".join(f' {k.rstrip("_").replace("_", "-")}="{html.escape(str(v))}"'
                    for k, v in attributes.items() if v is not None)
    flat = itertools.chain(*(x if isinstance(x, list) else [x] for x in inner))
    text = "".join(x if isinstance(x, Html) else html.escape(str(x)) for x in flat if x is not None)
    end = "" if name in ("img", "input") else f"</{name}>"
    return Html(f"<{name}{given}>{text}{end}")


def listed(fields: dict, **attributes) -> Html | None:
    """Names and values; what is no text as JSON, without its quotation marks."""
    return tag("dl", [tag("div", tag("dt", k.replace("_", " ")), tag("dd", v if isinstance(
        v, str | list) else json.dumps(v, ensure_ascii=False).replace('"', "")))
        for k, v in fields.items()], **attributes) if fields else None


def number(x: float) -> str:
    return f"{round(x, 2):,}".removesuffix(".0")


def data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def fitted(frame: np.ndarray) -> Image.Image:
    """At most SIDE pixels a side; a tiny picture is enlarged by a whole factor, so not blurred."""
    factor = -(-256 // min(256, max(frame.shape)))
    image = Image.fromarray(frame.repeat(factor, 0).repeat(factor, 1))
    image.thumbnail((SIDE, SIDE))
    return image


def picture(image: Image.Image, alt: str) -> Html:
    image.save(out := io.BytesIO(), "JPEG", quality=82)
    return tag("img", src=data("image/jpeg", out.getvalue()), alt=alt)


def player(content: bytes, label: str) -> Html:
    return tag("video", src=data("video/mp4", content), aria_label=label, controls="",
               playsinline="", preload="auto")


def film(clip: Clip, label: str) -> Html:
    """A clip as a player, its pictures as `fitted` makes them."""
    small = Clip(np.stack([np.asarray(fitted(x)) for x in clip.frames]), clip.fps)
    return player(collabvr.encode_video(small), label)


def figure(element: Html, *caption) -> Html:
    return tag("figure", element, tag("figcaption", *caption))


# ===================================================================================== A run's page
def page(folder: str | Path, index: str | None = None) -> str:
    """A run folder as a page. index: a relative link to the list that it is on. Raises Problem."""
    run = load(Path(folder))
    word, colour, meaning = STATUS.get(run.status, (run.status, "dim", ""))
    cost, name, top = run.cost(), run.folder.resolve().name, []
    if (path := run.folder / "input.png").exists():
        top = [figure(picture(fitted(collabvr.load_image(path)), "Input"), "Input")]
    if path := run.video():
        top += [figure(player(path.read_bytes(), "Final video"), "Final video")]
    tiles = cost | {"score": run.facts.get("score")}
    roles = {role: f"{n} calls, " + spent({k: cost[k].get(role) for k in (
        "tokens_in", "tokens_out", "wall_seconds")}) for role, n in cost["calls"].items()}
    steps = itertools.groupby(run.calls, key=lambda x: x["t"])
    return document(f"{word}: {name}", [
        tag("nav", tag("a", "All runs", href=index)) if index else None,
        tag("h1", name), tag("p", run.facts.get("task", ""), class_="task"),
        tag("p", tag("b", word, class_=colour), " ", " ".join([meaning, *run.notes])),
        tag("div", top, class_="pair"),
        listed({k: number(v) for k, v in tiles.items() if isinstance(v, int | float)},
               class_="tiles"),
        tag("details", tag("summary", "Cost of each role"), listed(roles)),
        tag("details", tag("summary", "Settings"), listed(run.facts.get("settings", {}))),
        *(step(run, t, list(calls)) for t, calls in steps)])


def step(run: Run, t: int, calls: list[dict]) -> Html:
    """The calls of a step in their order; a clip and what the verifier said of it in one card."""
    cards, route, tried = [], None, [(run.facts.get("task", ""), None, None)]
    for i, call in enumerate(calls):
        if "clip" in call:
            checks = list(itertools.takewhile(lambda x: x["role"] == "verifier", calls[i + 1 :]))
            cards.append(attempt(run.folder, call, checks, tried, route))
        elif "error" in call:
            failed = f"The generator failed after {spent(call)}, seed {call['seed']}: "
            cards.append(tag("p", failed, call["error"], class_="card"))
        elif call["role"] != "verifier":  # that stands with its clip
            route = call.get("reply", {}).get("action")
            cards.append(tag("div", tag("h3", call["role"]), said(call), class_="card"))
    return tag("section", tag("h2", f"Step {t}"), cards)


def attempt(folder: Path, call: dict, checks: list, tried: list, route: str | None) -> Html:
    """A clip and what the verifier said of it. `tried` holds (prompt, clip, good fraction) of the
    task and then of the step's attempts; this one joins them."""
    clip, prompt, n, notes = collabvr.read_clip(folder, call), call["prompt"], len(tried), []
    d = next((x["reply"] for x in checks if "reply" in x), {})
    verdict, good = d.get("verdict"), d.get("good_fraction")
    word = f"{verdict}ed" if verdict else "not verified"
    colour = {"accept": "good", "reject": "bad"}.get(verdict, "dim")
    prompts = lineage(prompt, [x for x, _, _ in tried])
    base = [(i, c, x) for i, (a, c, x) in enumerate(tried) if c and x and a in prompts[-2:-1]]
    if route == "regen" and clip and base:  # the verifier saw it behind the good part [D3]
        i, before, kept = base[-1]
        k = math.floor(kept * (len(before.frames) - 1))
        clip = collabvr.concat([Clip(before.frames[: k + 1], clip.fps), clip])
        notes = [tag("p", f"Its first {number(k / clip.fps)} s are those of attempt {i}.")]
    evolved = [tag("ins", new[len(old) :]) for old, new in itertools.pairwise(prompts)]
    tried.append((prompt, clip, good))
    shown = tag("p", "The clip is missing.")
    if clip:
        video = film(clip, f"Attempt {n}, {word}")
        last = picture(fitted(clip.frames[-1]), "Last frame")
        right = [f"{number(clip.seconds)} s"] if good is None else [  # thin where it is not right
            tag("svg", tag("rect", width=f"{good:%}", height=8, class_="good"),
                tag("rect", x=f"{good:%}", y=3, width="100%", height=2, class_="bad")),
            f"right for {good * clip.seconds:.2g} of {number(clip.seconds)} s ({good:.0%})"]
        shown = tag("div", figure(video, right), figure(last, "Last frame"), class_="pair")
    made = f"vgm: {number(call['seconds'])} s of video in {spent(call)}, seed {call['seed']}"
    return tag("article", tag("h3", f"Attempt {n} ", tag("b", word, class_=colour)), shown, tag(
        "div", listed({"prompt": [prompts[0], *evolved]}), notes, [said(x) for x in checks],
        tag("p", made, class_="small")), class_="card attempt")


def lineage(prompt: str, earlier) -> list[str]:
    """The prompts that `evolve` made this one of, the planner's first, and itself."""
    found = [x for x in earlier if prompt.startswith(f"{x} Correction: ")]
    return [*lineage(max(found, key=len), earlier), prompt] if found else [prompt]


def said(call: dict) -> Html:
    """A VLM's answer: what matters first; the rest, and the reply as it came, on demand."""
    reply, role = call.get("reply", {}), call["role"]
    first = {k: reply[k] for k in FIRST.get(role, reply) if reply.get(k)}
    if route := ROUTES.get(first.get("action")):
        first["action"] += f": {route}"
    if not reply:
        first = {"unusable reply": call.get("fault", "")}
    rest = {k: v for k, v in reply.items() if k not in first and v != ""}
    return tag("div", listed(first), tag(
        "details", tag("summary", f"{role}: {spent(call)}", class_="small"), listed(rest),
        tag("pre", str(call.get("text", ""))[:20_000])))


def spent(call: dict) -> str:
    """Time and tokens of a call, and who answered."""
    tokens = [f"{call[k]:,} tokens {k[7:]}" for k in ("tokens_in", "tokens_out") if call.get(k)]
    return ", ".join([f"{number(call['wall_seconds'])} s", *tokens,
                      *(str(call[k]) for k in ("model", "host") if k in call)])


# ======================================================================================== The index
def listing(title: str, rows: list[tuple[str, str | None, Run, Html | None]]) -> str:
    """The index: name, relative link, run and thumbnails of each."""
    scored = any("score" in run.facts for _, _, run, _ in rows)
    heads = ["Run", "Status", "VGM seconds", "VLM calls", *["Score"] * scored]
    body, words = [], {}
    for name, link, run, strip in rows:
        word, colour, _ = STATUS.get(run.status, (run.status, "dim", ""))
        words[word] = words.get(word, 0) + 1
        facts = run.cost() | {"score": ""} | run.facts  # a run without one sorts as 0
        numbers = [facts[k] for k in ("vgm_seconds", "VLM_calls", *["score"] * scored)]
        body.append(tag(
            "tr", tag("td", tag("a", name, href=link), strip,
                      tag("p", run.facts.get("task", ""), class_="small"), data_value=name),
            tag("td", tag("b", word, class_=colour), tag("p", " ".join(run.notes), class_="small"),
                data_value=[*STATUS, run.status].index(run.status)),
            [tag("td", x if x == "" else number(x), data_value=x, data_head=head)
             for head, x in zip(heads[2:], numbers, strict=True)]))
    told = ", ".join(f"{n} {word}" for word, n in words.items())
    return document(title, [
        tag("h1", title), tag("p", f"Runs: {len(rows)} ({told}). The headings sort."),
        tag("table", tag("thead", tag("tr", [
            tag("th", tag("button", x, type="button"), aria_sort="none") for x in heads])),
            tag("tbody", body))], SORT)


def thumbnails(run: Run, height: int = 72) -> Html | None:
    """The input picture and four frames of the video, in a row."""
    path, video = run.folder / "input.png", run.video()
    frames = [collabvr.load_image(path)] if path.exists() else []
    if video:
        clip = iio.imread(video, plugin="pyav")
        frames += [clip[i * (len(clip) - 1) // 4] for i in range(1, 5)]
    row = [Image.fromarray(x).resize((max(1, height * x.shape[1] // x.shape[0]), height))
           for x in frames]
    return picture(Image.fromarray(np.concatenate(row, 1)), "Input and video") if row else None


# ============================================================================================ Files
STYLE = """\
:root { color-scheme: light dark; --line: 1px solid light-dark(#ccd2d8, #3c434b) }
body { max-width: 62rem; margin: auto; padding: 1rem; font: 15px/1.45 system-ui, sans-serif;
  overflow-wrap: anywhere }
h1, h2, h3, p, dl, dd, figure { margin: 0 0 .5rem } h1 { font-size: 1.5rem } h3 { font-size: 1rem }
h2, .task, .tiles dd { font-size: 1.15rem } h3:first-letter { text-transform: uppercase }
h2 { margin-top: 1.6rem } .small:empty { display: none } summary, button { cursor: pointer }
b { border: 1px solid; border-radius: 1em; padding: .05em .6em; white-space: nowrap }
b, .small, dt, figcaption, details { font-size: .85rem } .tiles { display: flex; flex-wrap: wrap }
.tiles div { margin-right: 2rem } .dim, .small, dt, figcaption { color: light-dark(#555e68, #9ab) }
.good { color: light-dark(#1a7f4b, #56c98b) } .bad { color: light-dark(#c3362b, #ff8a7d) }
.fair { color: light-dark(#8a5a00, #e8b654) } ins { background: light-dark(#fea, #540) }
.card { border: var(--line); border-radius: 8px; padding: .8rem; margin: .6rem 0 }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; max-width: 36rem }
img, video, svg { display: block; max-width: 100% } .pair img, video, svg { width: 100% }
svg { height: 8px; margin: 4px 0; fill: currentColor }
pre { white-space: pre-wrap; max-height: 20rem; overflow: auto } th { overflow-wrap: normal }
table { border-collapse: collapse; width: 100% } tbody tr { border-top: var(--line) }
th, td { text-align: left; vertical-align: top; padding: .4rem }
button { font: inherit; border: 0; padding: 0; background: none; text-align: left;
  text-decoration: underline }
[aria-sort=ascending] button::after { content: " \\2191" }
[aria-sort=descending] button::after { content: " \\2193" }
@media (min-width: 50rem) { td:first-child { width: 55% } .attempt h3 { grid-column: 1 / 3 }
  .attempt { display: grid; grid-template-columns: 3fr 2fr; gap: 0 1rem } }
@media (max-width: 50rem) { tr { display: flex; flex-wrap: wrap } td { padding: .2rem .4rem }
  td:nth-child(-n+2) { width: 100% }
  td[data-head]:not(:empty)::before { content: attr(data-head) " " } }
"""
SORT = """\
const body = document.querySelector("tbody")
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const head = button.parentNode, up = head.ariaSort !== "ascending"
  for (const th of head.parentNode.cells) th.ariaSort = "none"
  head.ariaSort = up ? "ascending" : "descending"
  const value = (row) => row.cells[head.cellIndex].dataset.value
  const order = (a, b) => a - b || a.localeCompare(b, undefined, { numeric: true })
  body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * order(value(a), value(b))))
}
"""


def document(title: str, body: list, script: str = "") -> str:
    """A whole page, whose policy allows what stands in it and nothing else: no network at all."""
    style, code = (base64.b64encode(hashlib.sha256(x.encode()).digest()).decode()
                   for x in (STYLE, script))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; base-uri 'none'; form-action
 'none'; img-src data:; media-src data:; style-src 'sha256-{style}'; script-src 'sha256-{code}'">
{tag("title", title)}<style>{STYLE}</style></head>
<body>{tag("main", body)}<script>{script}</script></body></html>
"""


def write(folder: str | Path, out: str | Path | None = None) -> Path:
    """Writes the page of a run, or of a folder with runs below it an index and the page of each,
    unless that is newer than the run. Returns the file to open. Raises Problem, OSError."""
    folder, rows = Path(folder), []
    out = Path(out or folder / "report.html")
    if not folder.is_dir():
        raise Problem(f"{folder} is no folder: give that of a run, or one with runs below it.")
    if out.suffix != ".html" or not out.parent.is_dir():
        raise Problem(f"--out is {out}: it takes a file in a folder that exists, ending in .html.")
    found = {x.parent for name in ("calls.jsonl", "start.json") for x in folder.rglob(name)}
    if not found:
        raise Problem(f"There is no run in {folder}: no calls.jsonl and no start.json.")
    if folder in found:
        collabvr.write_file(out, page(folder).encode(errors="replace"))
        return out
    for run in sorted(found):
        target = out.with_suffix("") / f"{(name := run.relative_to(folder).as_posix())}.html"
        link, back = (urllib.parse.quote(Path(os.path.relpath(*x)).as_posix())
                      for x in ((target, out.parent), (out, target.parent)))
        changed = max(x.stat().st_mtime for x in (Path(__file__), *run.iterdir()))
        try:  # one that cannot be shown must not hide the others
            with explained(f"{run} cannot be shown", Exception):
                if not target.exists() or target.stat().st_mtime < changed:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    collabvr.write_file(target, page(run, back).encode(errors="replace"))
                rows.append((name, link, read := load(run), thumbnails(read)))
        except Problem as problem:
            rows.append((name, None, Run(run, "unreadable", [str(problem)], [], {}), None))
    collabvr.write_file(out, listing(folder.resolve().name, rows).encode(errors="replace"))
    return out


def main(argv=None) -> None:
    """Prints where the page is; SystemExit with status 2 after one sentence on stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a run folder, or a folder with run folders below it")
    parser.add_argument("--out", help="the HTML file (report.html in the folder)")
    args = parser.parse_args(argv)
    try:
        print(write(args.folder, args.out))
    except (Problem, OSError) as error:
        parser.exit(2, f"report.py: {error}\n")


if __name__ == "__main__":
    main()
