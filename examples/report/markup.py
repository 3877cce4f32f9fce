"""The parts of a page: elements that escape their text, pictures, players, one style.

A page opens from the disk. Its policy allows what stands in it and pictures beside it, and no
script but its own: no page can reach a network.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math

import numpy as np
from PIL import Image

import collabvr
from collabvr import Clip

SIDE = 512  # pixels: the longer side of an attempt's clip in a page, which may hold a dozen
SMALL = 256  # pixels: what is smaller is enlarged
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


def listed(fields: dict, **attributes) -> Html | None:
    """Names and values. What is no text is shown as JSON without quotation marks."""
    if not fields:
        return None
    rows = []
    for name, value in fields.items():
        if not isinstance(value, str):
            value = json.dumps(value, ensure_ascii=False).replace('"', "")
        rows.append(tag("div", tag("dt", name.replace("_", " ")), tag("dd", value)))
    return tag("dl", rows, **attributes)


def figure(element: Html, *caption) -> Html:
    return tag("figure", element, tag("figcaption", *caption))


def number(x: float) -> str:
    return f"{round(x, 2):,}".removesuffix(".0")


# ------------------------------------------------------------------------------
# Pictures and clips


def data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=82)
    return out.getvalue()


def fitted(frame: np.ndarray) -> Image.Image:
    """At most SIDE pixels a side. A small picture is enlarged by a whole factor: not blurred."""
    factor = math.ceil(SMALL / max(frame.shape[:2]))
    image = Image.fromarray(frame.repeat(factor, 0).repeat(factor, 1))
    image.thumbnail((SIDE, SIDE))
    return image


def picture(frame: np.ndarray, alt: str) -> Html:
    return tag("img", src=data("image/jpeg", jpeg(fitted(frame))), alt=alt)


def player(video: bytes, label: str, fps: float) -> Html:
    """An MP4 with its own controls, which PLAYERS replaces by some that do not cover it."""
    return tag("video", src=data("video/mp4", video), aria_label=label, data_fps=fps,
               controls="", playsinline="", preload="auto")


def film(clip: Clip, label: str) -> Html:
    """A clip as a player, its frames as `fitted` makes them."""
    small = np.stack([np.asarray(fitted(frame)) for frame in clip.frames])
    return player(collabvr.mp4(Clip(small, clip.fps)), label, clip.fps)


# Below each video: play or pause, a slider that goes frame by frame, and full screen.
PLAYERS = """\
for (const video of document.querySelectorAll("video")) {
  const play = document.createElement("button"), large = document.createElement("button")
  const slider = document.createElement("input"), bar = document.createElement("div")
  play.type = large.type = "button"
  play.className = "play"
  large.className = "large"
  slider.type = "range"
  slider.step = 1 / video.dataset.fps
  slider.ariaLabel = `Time of ${video.ariaLabel}`
  large.ariaLabel = `Full screen of ${video.ariaLabel}`
  const show = () => {
    play.ariaPressed = !video.paused
    play.ariaLabel = `${video.paused ? "Play" : "Pause"} ${video.ariaLabel}`
    slider.max = video.duration || 1
    slider.value = video.currentTime
    if (!video.paused) requestAnimationFrame(show)
  }
  const toggle = () => video.paused ? video.play() : video.pause()
  play.onclick = video.onclick = toggle
  slider.oninput = () => {
    video.pause()
    video.currentTime = slider.value
  }
  large.onclick = () => video.requestFullscreen()
  video.onfullscreenchange = () => { video.controls = document.fullscreenElement === video }
  video.onloadedmetadata = video.onplay = video.onpause = video.onseeked = video.onended = show
  video.controls = false
  bar.className = "bar"
  bar.append(play, slider, large)
  video.after(bar)
  show()
}
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
h3:first-letter { text-transform: uppercase }
.task, .tiles dd { font-size: 1.15rem }
b { border: 1px solid; border-radius: 1em; padding: .05em .6em; white-space: nowrap }
b, .small, dt, figcaption, details { font-size: .85rem }
.small:empty { display: none }
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
.bar { display: flex; gap: .3rem; align-items: center; height: 2rem }
.bar button { width: 2rem; height: 2rem; display: grid; place-items: center }
.bar button::before { content: ""; width: .9rem; height: .9rem }
.play::before { background: currentColor; clip-path: polygon(0 0, 100% 50%, 0 100%) }
.play[aria-pressed=true]::before { clip-path: none;
  background: linear-gradient(90deg, currentColor 35%, transparent 35% 65%, currentColor 65%) }
.large::before { border: 2px solid; box-sizing: border-box }
.bar input { flex: 1; min-width: 0; margin: 0 }
pre { white-space: pre-wrap; max-height: 20rem; overflow: auto }
summary, button { cursor: pointer }
button { font: inherit; color: inherit; border: 0; padding: 0; background: none; text-align: left;
  text-decoration: underline }
button:disabled { opacity: .4; cursor: default }
table { border-collapse: collapse; width: 100% }
tbody tr { border-top: var(--line) }
th, td { text-align: left; vertical-align: top; padding: .4rem }
th { overflow-wrap: normal }
nav { margin-bottom: .5rem }
nav button { padding: .3rem .6rem .3rem 0 }
td img { height: 48px; max-width: 100%; object-fit: contain; object-position: left }
[aria-sort=ascending] button::after { content: " \\2191" }
[aria-sort=descending] button::after { content: " \\2193" }
@media (min-width: 50rem) {
  td:first-child { width: 55% }
  .attempt { display: grid; grid-template-columns: 3fr 2fr; gap: 0 1rem }
  .attempt h3 { grid-column: 1 / 3 }
}
@media (max-width: 50rem) {
  .attempt .pair { grid-template-columns: minmax(0, 2fr) minmax(0, 1fr) }
  tr { display: flex; flex-wrap: wrap }
  tr[hidden] { display: none }
  td { padding: .2rem .4rem }
  td:nth-child(-n+2) { width: 100% }
  td[data-head]:not(:empty)::before { content: attr(data-head) " " }
}
"""


def document(title: str, body: list, script: str, mark: str = "", images: str = "data:") -> str:
    """A whole page. mark: a hash of what it was made from. images: where they may lie."""
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; media-src data:; "
        f"img-src {images}; style-src {hashed(STYLE)}; script-src {hashed(script)}")
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="mark", content=mark),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("title", title),
        Html(f'<link rel="icon" href="data:,"><style>{STYLE}</style>'),
    ]
    content = tag("body", tag("main", body), Html(f"<script>{script}</script>"))
    return f'<!doctype html>\n<html lang="en">{tag("head", head)}\n{content}</html>\n'


def hashed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
