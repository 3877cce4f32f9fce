"""Decision points as files: questions with their pictures and clips, labels, and the page on which
people make them. supervisor.py says what a folder of points holds.
"""
from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import imageio.v3 as iio
from pydantic import BaseModel, Field, model_validator

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import report
from report import tag

import collabvr
from collabvr import Clip, Problem, explained


# ================================================================================= Lines and media
def lines(path: Path) -> list[dict]:
    """Raises Problem for what is no JSONL with ids."""
    found = []
    with explained(f"{path} cannot be read", OSError, ValueError):
        text = path.read_text()
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            with explained(f"{path}, line {number}", ValueError):
                found.append(json.loads(line))
                if not (isinstance(found[-1], dict) and isinstance(found[-1].get("id"), str)):
                    raise Problem(f"{path}, line {number}: no object with an id.")
    return found


def read_replies(path: Path) -> dict[str, dict | None]:
    """What export or ask wrote, by id; None: no usable reply. Raises Problem."""
    found = lines(path)
    if wrong := [x["id"] for x in found if x.keys() not in ({"id", "reply"}, {"id", "fault"})]:
        raise Problem(f"{path} holds no replies: {wrong[0]} has neither reply nor fault.")
    return {x["id"]: x.get("reply") for x in found}


def write_lines(path: Path, found: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    collabvr.write_file(path, "".join(json.dumps(x) + "\n" for x in found).encode())


def store(folder: Path, part) -> Any:
    """A text as it is; a picture or clip, exact, as a file in folder/media, once."""
    if isinstance(part, str):
        return part
    kind, end = ("clip", "mkv") if isinstance(part, Clip) else ("picture", "png")
    path = folder / "media" / f"{collabvr.digest(part)[:16]}.{end}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        collabvr.write_file(path, collabvr.encode_video(part, lossless=True) if kind == "clip"
                            else iio.imwrite("<bytes>", part, extension=".png"))
    return {kind: path.name} | ({"fps": part.fps} if kind == "clip" else {})


def restore(folder: Path, part) -> Any:
    if isinstance(part, str):
        return part
    if "clip" in part:
        return Clip(iio.imread(folder / "media" / part["clip"], plugin="pyav"), part["fps"])
    return iio.imread(folder / "media" / part["picture"])


# ===================================================================================== The labels
class Label(BaseModel, strict=True, extra="forbid"):
    id: str
    steps: int | None = Field(None, ge=0)
    verdict: Literal["accept", "reject"] | None = None
    suggestion: str | None = None
    rating: int | None = Field(None, ge=1, le=3)

    @model_validator(mode="after")
    def _is_of_one_kind(self):
        kinds = [{"steps"}, {"verdict"}, {"suggestion", "rating"}]
        if self.model_dump(exclude_none=True).keys() - {"id"} not in kinds:
            raise ValueError("beside id a label has steps, or verdict, or suggestion and rating")
        return self


def read_labels(path: Path) -> list[Label]:
    """Raises Problem for what is no label, or labels a point twice."""
    found: dict[tuple, Label] = {}
    for number, line in enumerate(lines(path), 1):
        with explained(f"{path}, label {number}", ValueError):
            label = Label.model_validate(line)
            if (label.id, label.suggestion) in found:
                raise ValueError(f"{label.id} has this label already")
            found[label.id, label.suggestion] = label
    if not found:
        raise Problem(f"{path} holds no labels.")
    return list(found.values())


SCRIPT = """\
const sets = [...document.querySelectorAll("fieldset")], save = document.querySelector("nav button")
const key = `labels of ${location.pathname}`, kept = JSON.parse(localStorage.getItem(key) || "{}")
const count = () => {
  document.querySelector("output").textContent =
    `${sets.filter((set) => set.name in kept).length} of ${sets.length} labelled`
}
for (const set of sets) for (const radio of set.elements) {
  radio.checked = kept[set.name] === radio.value
  radio.onchange = () => {
    kept[set.name] = radio.value
    localStorage.setItem(key, JSON.stringify(kept))
    count()
  }
}
save.onclick = () => {
  const link = document.createElement("a"), lines = sets.filter((set) => set.name in kept).map(
    (set) => JSON.stringify({ ...JSON.parse(set.name), ...JSON.parse(kept[set.name]) }) + "\\n")
  link.href = URL.createObjectURL(new Blob(lines))
  link.download = "labels.jsonl"
  link.click()
}
count()
"""


def write_page(folder: Path, points: list[dict]) -> Path:
    """The page on which people label. Suggestions stay hidden until a verdict can be formed."""
    suggested: dict[str, set[str]] = {}
    for path in (folder / "replies").glob("*.jsonl"):
        for name, d in read_replies(path).items():
            if d and d.get("verdict") == "reject" and d["suggestion"].strip():
                suggested.setdefault(name, set()).add(d["suggestion"])

    def choice(question: str, field: str, values, **named) -> report.Html:
        name = json.dumps(named)
        return tag("fieldset", tag("legend", question), [tag("label", tag(
            "input", type="radio", name=f"{field} {name}", value=json.dumps({field: v})), v, " ")
            for v in values], name=name)

    def shown(parts: list) -> list[report.Html]:
        """Pictures and clips, each over the text that announces it, and all other texts below."""
        texts, figures = [], []
        for part in (restore(folder, x) for x in parts):
            if isinstance(part, str):
                texts.append(part)
                continue
            element = (report.film(part, "Clip") if isinstance(part, Clip)
                       else report.picture(report.fitted(part), "Picture"))
            figures.append(report.figure(element, texts.pop() if texts else ""))
        return [tag("div", figures, class_="pair"), *(tag("p", x) for x in texts)]

    cards = []
    for x in points:
        asked = [choice("How many steps from here (0: nothing is left to do)?", "steps", range(10),
                        id=x["id"])]
        if x["role"] == "verifier":
            asked = [choice("Does the clip show the planned action?", "verdict",
                            ["accept", "reject"], id=x["id"])]
            if rated := sorted(suggested.get(x["id"], [])):
                asked.append(tag("details", tag("summary", "Then rate what a VLM suggests"), [
                    choice(f"{y} (1: harms, 2: right but vague, 3: would repair it)", "rating",
                           [1, 2, 3], id=x["id"], suggestion=y) for y in rated]))
        cards.append(tag("article", tag("h3", x["id"]), shown(x["parts"]), asked, class_="card"))
    collabvr.write_file(folder / "label.html", report.document("Decision points", [
        tag("nav", tag("button", "Save labels.jsonl", type="button"), " ", tag("output")),
        tag("h1", "Decision points"), tag("p", "What you choose is kept in this browser."), *cards],
        SCRIPT).encode())
    return folder / "label.html"
