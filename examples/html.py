"""The parts of a page: elements that escape their text, pictures, players, one style.

A page opens from the disk, and holds all that it shows. Its policy allows no script but its own
and no address: no page can reach a network.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json

import numpy as np
from PIL import Image

import collabvr
from collabvr import Clip

SIDE = 512  # pixels: the longer side of an attempt's clip in a page, which may hold a dozen
VOID = ("img", "input", "meta")  # elements without an end


class Html(str):
    """What `tag` made. Any other string is text, which is escaped where it joins a page."""


def tag(name: str, /, *inner, **attributes) -> Html:
    """An element: tag("p", "a < b", class_="x"). Lists are unfolded, None is left out."""
    start = name
    for key, value in attributes.items():
        if value is not None:
            key = key.rstrip("_").replace("_", "-")
            start += f' {key}="{html.escape(str(value))}"'
    end = "" if name in VOID else f"</{name}>"
    return Html(f"<{start}>{joined(inner)}{end}")


def joined(part) -> str:
    """What stands in an element, as HTML."""
    if part is None:
        return ""
    if isinstance(part, Html):
        return part
    if isinstance(part, list | tuple):
        return "".join([joined(x) for x in part])
    return html.escape(str(part))


def listed(fields: dict, **attributes) -> Html:
    """Names and values. What is no text is shown as JSON without quotation marks."""
    rows = []
    for name, value in fields.items():
        if not isinstance(value, str):
            value = json.dumps(value, ensure_ascii=False).replace('"', "")
        rows.append(tag("div", tag("dt", name.replace("_", " ")), tag("dd", value)))
    return tag("dl", rows, **attributes)


def figure(element: Html, *caption) -> Html:
    return tag("figure", element, tag("figcaption", *caption))


def short(value) -> str:
    """A number with two decimals at most; anything else as it is."""
    if not isinstance(value, int | float):
        return str(value)
    return f"{round(value, 2):,}".removesuffix(".0")


# ------------------------------------------------------------------------------
# Pictures and clips


def data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def fitted(frame: np.ndarray) -> Image.Image:
    """At most SIDE pixels a side."""
    image = Image.fromarray(frame)
    image.thumbnail((SIDE, SIDE))
    return image


def picture(frame: np.ndarray, alt: str) -> Html:
    jpeg = io.BytesIO()
    fitted(frame).save(jpeg, "JPEG", quality=90, subsampling=0)
    return tag("img", src=data("image/jpeg", jpeg.getvalue()), alt=alt)


def video(mp4: bytes, label: str, fps: float) -> Html:
    """A video. Below it: play or pause, a slider that goes frame by frame, and full screen."""
    return Html(joined([
        tag("video", src=data("video/mp4", mp4), aria_label=label, playsinline="",
            preload="auto"),
        tag("div",
            tag("button", "Play", type="button"),
            tag("input", type="range", step=1 / fps, aria_label=f"Time of {label}"),
            tag("button", "Full screen", type="button"),
            class_="bar"),
    ]))


def player(clip: Clip, label: str) -> Html:
    """A clip as a video, its frames as `fitted` makes them."""
    small = np.stack([np.asarray(fitted(frame)) for frame in clip.frames])
    return video(collabvr.mp4(Clip(small, clip.fps)), label, clip.fps)


PLAYERS = """\
for (const bar of document.querySelectorAll(".bar")) {
  const video = bar.previousElementSibling, [play, slider, large] = bar.children
  const show = () => {
    play.textContent = video.paused ? "Play" : "Pause"
    slider.max = video.duration || 1
    slider.value = video.currentTime
    if (!video.paused) requestAnimationFrame(show)
  }
  play.onclick = video.onclick = () => video.paused ? video.play() : video.pause()
  slider.oninput = () => {
    video.pause()
    video.currentTime = slider.value
  }
  large.onclick = () => video.requestFullscreen()
  video.onfullscreenchange = () => { video.controls = document.fullscreenElement === video }
  video.onloadedmetadata = video.onplay = video.onpause = video.onseeked = video.onended = show
  show()
}
"""

# A heading sorts the rows of a table by its column; a second time, the other way round.
SORT = """\
const body = document.querySelector("tbody"), heads = [...document.querySelectorAll("th")]
const words = new Intl.Collator(undefined, { numeric: true })
heads.forEach((th, i) => th.firstChild.onclick = () => {
  const value = (row) => row.cells[i].dataset.value
  const order = (a, b) => value(a) - value(b) || words.compare(value(a), value(b))
  const rows = [...body.rows].sort(order), down = th.ariaSort === "ascending"
  for (const other of heads) other.ariaSort = "none"
  th.ariaSort = down ? "descending" : "ascending"
  body.append(...(down ? rows.reverse() : rows))
})
"""


# ------------------------------------------------------------------------------
# A whole page


STYLE = """\
:root { color-scheme: light dark; --line: 1px solid light-dark(#ccd2d8, #3c434b) }
body { max-width: 62rem; margin: auto; padding: 1rem; font: 15px/1.45 system-ui, sans-serif;
  overflow-wrap: anywhere }
h1, h2, h3, p, dl, dd, figure { margin: 0 0 .5rem }
h1 { font-size: 1.5rem }
h2 { font-size: 1.15rem; margin-top: 1.6rem }
h3 { font-size: 1rem }
h3::first-letter { text-transform: uppercase }
.task, .tiles dd { font-size: 1.15rem }
b { border: 1px solid; border-radius: 1em; padding: .05em .6em; white-space: nowrap }
b, .small, dt, figcaption, details { font-size: .85rem }
.dim, .small, dt, figcaption { color: light-dark(#555e68, #9ab) }
.good { color: light-dark(#1a7f4b, #56c98b) }
.fair { color: light-dark(#8a5a00, #e8b654) }
.bad { color: light-dark(#c3362b, #ff8a7d) }
ins { background: light-dark(#fea, #540) }
.tiles { display: flex; flex-wrap: wrap }
.tiles div { margin-right: 2rem }
.card { border: var(--line); border-radius: 8px; padding: .8rem; margin: .6rem 0 }
.pair { display: grid; gap: .6rem; max-width: 36rem;
  grid-template-columns: minmax(0, 1fr) minmax(0, 1fr) }
img, video, svg { display: block; max-width: 100% }
.pair img, .pair video, svg { width: 100%; height: auto }
svg { height: 8px; margin: 4px 0; fill: currentColor }
.bar { display: flex; flex-wrap: wrap; gap: .3rem; align-items: center; min-height: 2rem }
.bar button { min-width: 2.6rem }
.bar input { flex: 1 0 4rem; margin: 0 }
pre { white-space: pre-wrap; max-height: 20rem; overflow: auto }
summary, button { cursor: pointer }
button { font: inherit; color: inherit; border: 0; padding: 0; background: none; text-align: left;
  text-decoration: underline }
table { border-collapse: collapse; width: 100% }
tbody tr { border-top: var(--line) }
th, td { text-align: left; vertical-align: top; padding: .4rem }
th { overflow-wrap: normal }
nav button { padding: .3rem .6rem .3rem 0 }
[aria-sort=ascending] button::after { content: " \\2191" }
[aria-sort=descending] button::after { content: " \\2193" }
@media (min-width: 50rem) {
  td:first-child { width: 45% }
  .attempt { display: grid; grid-template-columns: 3fr 2fr; gap: 0 1rem }
  .attempt h3 { grid-column: 1 / 3 }
}
@media (max-width: 50rem) {
  .attempt .pair { grid-template-columns: minmax(0, 2fr) minmax(0, 1fr) }
  tr { display: flex; flex-wrap: wrap }
  td { padding: .2rem .4rem }
  td:nth-child(-n+2) { width: 100% }
  td:empty { display: none }
  td[data-head]::before { content: attr(data-head) " " }
}
"""


def document(title: str, body: list, script: str) -> str:
    """A whole page, on which that script runs and no other."""
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; media-src data:; "
        f"img-src data:; style-src {hashed(STYLE)}; script-src {hashed(script)}")
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("title", title),
        Html(f'<link rel="icon" href="data:,"><style>{STYLE}</style>'),
    ]
    content = tag("body", tag("main", body), Html(f"<script>{script}</script>"))
    return f'<!doctype html>\n<html lang="en">{tag("head", head)}\n{content}</html>\n'


def hashed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
