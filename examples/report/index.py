"""A folder of runs as one page that opens on a phone: 200 rows at a time, with thumbnails."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from examples import runs
from examples.report import markup
from examples.report.markup import Html, number, tag
from examples.report.page import meaning, vlm_calls
from examples.runs import Run

ROWS = 200  # shown at a time
HEIGHT = 72  # pixels of a thumbnail
WORDS = 240  # characters of a task or a note


@dataclass
class Row:
    name: str
    run: Run
    page: str | None = None  # relative links
    thumbnail: str | None = None


def listing(title: str, rows: list[Row]) -> str:
    """The page. A script sorts all rows, and shows those of one page; the others are hidden."""
    scored = any("score" in row.run.facts for row in rows)
    heads = ["Run", "Status", "VGM seconds", "VLM calls"] + ["Score"] * scored
    counts: dict[str, int] = {}
    for row in rows:
        word = meaning(row.run).word
        counts[word] = counts.get(word, 0) + 1
    told = ", ".join(f"{n:,} {word}" for word, n in counts.items())
    buttons = [tag("button", head, type="button") for head in heads]
    return markup.document(title, [
        tag("h1", title),
        tag("p", f"Runs: {len(rows):,} ({told}). The headings sort."),
        turner(len(rows)),
        tag("table",
            tag("thead", tag("tr", [tag("th", x, aria_sort="none") for x in buttons])),
            tag("tbody", [line(row, heads, i >= ROWS) for i, row in enumerate(rows)])),
        turner(len(rows)),
    ], SORT, images="data: 'self' file:")


def turner(n: int) -> Html | None:
    """Turns the pages, if there are several."""
    if n <= ROWS:
        return None
    return tag("nav", tag("button", "Previous", type="button"), tag("output"), " ",
               tag("button", "Next", type="button"))


def line(row: Row, heads: list[str], hidden: bool) -> Html:
    run, status = row.run, meaning(row.run)
    thumbnail = row.thumbnail and tag(
        "img", src=row.thumbnail, alt="Input and video", height=HEIGHT, loading="lazy")
    numbers = {"VGM seconds": run.cost()["vgm_seconds"], "VLM calls": vlm_calls(run),
               "Score": run.facts.get("score", "")}  # a run without one sorts as 0
    order = [*runs.STATUS, run.status].index(run.status)
    return tag(
        "tr",
        tag("td", tag("a", row.name, href=row.page), thumbnail,
            tag("p", short(run.facts.get("task", "")), class_="small"), data_value=row.name),
        tag("td", tag("b", status.word, class_=status.tone),
            tag("p", short(" ".join(run.notes)), class_="small"), data_value=order),
        [tag("td", "" if numbers[head] == "" else number(numbers[head]),
             data_value=numbers[head], data_head=head) for head in heads[2:]],
        hidden="" if hidden else None)


def short(text: str) -> str:
    return text if len(text) <= WORDS else text[: WORDS - 2] + " .."


def thumbnail(run: Run) -> bytes | None:
    """The input picture and four frames of the video, in a row, as a JPEG."""
    picture, video = run.picture(), run.frames()
    frames = [] if picture is None else [picture]
    if video is not None:
        frames += [video[i * (len(video) - 1) // 4] for i in range(1, 5)]
    if not frames:
        return None
    row = []
    for frame in frames:
        width = max(1, HEIGHT * frame.shape[1] // frame.shape[0])
        row.append(Image.fromarray(frame).resize((width, HEIGHT)))
    return markup.jpeg(Image.fromarray(np.concatenate(row, 1)))


# The address keeps column, direction and page, for the way back from a run.
SORT = """\
const body = document.querySelector("tbody"), rows = [...body.rows], size = ROWS
const heads = [...document.querySelectorAll("th")]
const pages = Math.ceil(rows.length / size)
let [column, down, page] = location.hash.slice(1).split(",").map(Number)
page = Math.min(page || 0, pages - 1)
const show = () => {
  heads.forEach((th, i) => {
    th.ariaSort = i !== column ? "none" : down ? "descending" : "ascending"
  })
  body.replaceChildren(...rows.slice(page * size, (page + 1) * size))
  for (const row of body.rows) row.hidden = false
  for (const nav of document.querySelectorAll("nav")) {
    const [previous, next] = nav.querySelectorAll("button")
    previous.disabled = page === 0
    next.disabled = page === pages - 1
    previous.onclick = () => turn(page - 1)
    next.onclick = () => turn(page + 1)
    nav.querySelector("output").textContent = `page ${page + 1} of ${pages}`
  }
}
const words = new Intl.Collator(undefined, { numeric: true })
const sort = () => {
  const values = new Map(rows.map((row) => [row, row.cells[column].dataset.value]))
  const order = (a, b) => a - b || words.compare(a, b)
  rows.sort((a, b) => (down ? -1 : 1) * order(values.get(a), values.get(b)))
}
const turn = (to) => {
  page = to
  history.replaceState(null, "", `#${[column, down, page]}`)
  show()
}
heads.forEach((th, i) => {
  th.firstChild.onclick = () => {
    down = column === i && !down ? 1 : 0
    column = i
    sort()
    turn(0)
  }
})
if (column in heads) sort()
show()
""".replace("ROWS", str(ROWS))
