"""The page on which people label decision points."""

from __future__ import annotations

import json
from pathlib import Path

import collabvr
from collabvr import Clip
from examples import html, runs
from examples.html import Html, tag
from examples.supervisor import points as files

# What is chosen is kept by the browser; a button saves it as labels.jsonl.
LABELS = """\
const sets = [...document.querySelectorAll("fieldset")], save = document.querySelector("nav button")
const key = `labels of ${location.pathname}`, kept = JSON.parse(localStorage.getItem(key) || "{}")
const chosen = () => sets.filter((set) => set.name in kept)
const count = () => {
  document.querySelector("output").textContent = `${chosen().length} of ${sets.length} labelled`
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
  const link = document.createElement("a")
  const lines = chosen().map((set) =>
    JSON.stringify({ ...JSON.parse(set.name), ...JSON.parse(kept[set.name]) }) + "\\n")
  link.href = URL.createObjectURL(new Blob(lines))
  link.download = "labels.jsonl"
  link.click()
}
count()
"""


def write_page(folder: Path, points: list[dict]) -> Path:
    """Writes folder/label.html. Raises Problem."""
    suggestions = suggested(folder)
    cards = []
    for point in points:
        parts = [files.restore(folder, part) for part in point["parts"]]
        questions = asked(point, sorted(suggestions.get(point["id"], [])))
        cards.append(tag("article", tag("h3", point["id"]), shown(parts), questions, class_="card"))
    page = html.document("Decision points", [
        tag("nav", tag("button", "Save labels.jsonl", type="button"), " ", tag("output")),
        tag("h1", "Decision points"),
        tag("p", "What you choose is kept in this browser."),
        cards,
    ], html.PLAYERS + LABELS)
    collabvr.write_file(folder / "label.html", page.encode(errors="replace"))
    return folder / "label.html"


def suggested(folder: Path) -> dict[str, set[str]]:
    """What any VLM suggested beside a reject, by the point's id."""
    found: dict[str, set[str]] = {}
    for path in (folder / "replies").glob("*.jsonl"):
        if runs.inside(path, folder):
            for name, reply in files.read_replies(path).items():
                if reply and reply.get("verdict") == "reject" and reply["suggestion"].strip():
                    found.setdefault(name, set()).add(reply["suggestion"])
    return found


def asked(point: dict, suggestions: list[str]) -> list[Html]:
    """The questions about a point. Suggestions stay folded until a verdict can be formed."""
    id = point["id"]
    if point["role"] != "verifier":
        question = "How many steps from here (0: nothing is left to do)?"
        return [choice(question, "steps", list(range(10)), id=id)]
    question = "Does the clip show the planned action?"
    questions = [choice(question, "verdict", ["accept", "reject"], id=id)]
    ratings = []
    for text in suggestions:
        question = f"{text} (1: harms, 2: right but vague, 3: would repair it)"
        ratings.append(choice(question, "rating", [1, 2, 3], id=id, suggestion=text))
    if ratings:
        summary = tag("summary", "Then rate what a VLM suggests")
        questions.append(tag("details", summary, ratings))
    return questions


def choice(question: str, field: str, values: list, **label) -> Html:
    """A question with a button for each value. label: what else the line says."""
    name = json.dumps(label)
    buttons = []
    for value in values:
        radio = tag("input", type="radio", name=f"{field} {name}", value=json.dumps({field: value}))
        buttons.append(tag("label", radio, value, " "))
    return tag("fieldset", tag("legend", question), buttons, name=name)


def shown(parts: list) -> list[Html]:
    """Pictures and clips, each over the text that announces it, and all other texts below."""
    texts: list[str] = []
    figures = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        show = html.player if isinstance(part, Clip) else html.picture
        caption = texts.pop() if texts else ""
        figures.append(html.figure(show(part, caption), caption))
    return [tag("div", figures, class_="pair"), *[tag("p", text) for text in texts]]
