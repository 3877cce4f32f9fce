"""An OpenAI-compatible endpoint for the maze world: `python examples/maze/vlm.py --port 8000`.

It is no vision-language model and says so: a rule-based reader of pixels that answers the planner,
the verifier and the failure router of collabvr.py in JSON. It sees only what a VLM would see, the
texts and the pictures of the request: no maze, no seed, no file. POST /v1/chat/completions, GET /v1/models.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import re
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import world
from PIL import Image

MODEL = "maze-reader"
NOTE = "a rule-based reader of pixels, no vision-language model"


# ------------------------------------------------------------------------------ what is in a request


@dataclass
class Request:
    """A chat request, taken apart: lines of text, and pictures under the text that precedes them."""

    instructions: str
    lines: list[str]
    pictures: list[tuple[str, np.ndarray]]

    def value(self, label: str, default: str = "") -> str:
        """What follows `label: ` in the last line that starts so."""
        found = [line[len(label) + 2 :] for line in self.lines if line.startswith(f"{label}: ")]
        return found[-1] if found else default

    def clip(self) -> list[np.ndarray]:
        """The frames of the clip that the request is about, which stand at its end."""
        return [p for label, p in self.pictures if label.startswith(("Frame at", "Clip to check", "Failed clip"))]


def parse(body: dict) -> Request:
    """Raises ValueError if the request is none."""
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        raise ValueError("messages must be a list")
    request = Request("", [], [])
    for message in body["messages"]:
        content = message.get("content") or ""
        if message.get("role") == "system":
            request.instructions += content
            continue
        for piece in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if piece["type"] == "text":
                request.lines.append(piece["text"])
            elif piece["type"] in ("image_url", "video_url"):
                label = request.lines[-1] if request.lines else ""
                request.pictures += [(label, p) for p in pictures(piece[piece["type"]]["url"])]
            else:
                raise ValueError(f"content of type {piece['type']!r} is not understood")
    return request


def pictures(url: str) -> list[np.ndarray]:
    """The picture, or the frames of the video, in a data URL."""
    head, _, data = url.partition(";base64,")
    if not head.startswith("data:"):
        raise ValueError("only data: URLs are understood")
    raw = base64.b64decode(data, validate=True)
    if head == "data:video/mp4":
        import imageio.v3 as iio

        return list(iio.imread(raw, plugin="pyav", extension=".mp4"))
    return [np.array(Image.open(io.BytesIO(raw)).convert("RGB"))]


# -------------------------------------------------------------------------------------- the three roles


class Scene:
    """What the input picture shows, and words for it."""

    def __init__(self, request: Request):
        self.first = world.read(dict(request.pictures)["Input image:"])
        self.thing = f"the {world.colour_word(self.first.circle_colour)} circle"
        self.goal = f"the {world.colour_word(self.first.goal_colour)} square"

    def cell(self, place) -> tuple[int, int]:
        """The corridor cell nearest to a place."""
        cells = np.argwhere(self.first.open)
        return tuple(map(int, cells[np.abs(cells - np.array(place)).sum(1).argmin()]))

    def path(self, a, b) -> list:
        return world.shortest_path(self.first.open, self.cell(a), self.cell(b))

    def move(self, direction: str, k: int) -> str:
        return f"Move {self.thing} {direction} {k} {'cell' if k == 1 else 'cells'}"


def planner(request: Request) -> dict:
    """One straight segment a step; on the last allowed step whatever is left."""
    scene = Scene(request)
    last_frames = [p for label, p in request.pictures if label.startswith("Last frame")]
    now = world.read(last_frames[-1], like=scene.first).circle if last_frames else scene.first.circle
    if now is None:
        now = scene.first.circle
    step, cap = map(int, re.findall(r"\d+", request.value("Step"))[:2])
    left = world.segments(scene.path(now, scene.first.goal))
    row, column = np.add(scene.cell(now), 1)
    seen = f"{scene.thing[4:].capitalize()} in row {row}, column {column}; {scene.goal[4:]} in row "
    seen += f"{scene.first.goal[0] + 1}, column {scene.first.goal[1] + 1}."
    if not left:
        return dict(observation=seen, remaining_goal="Nothing.", task_complete=True, instruction="", target_state="",
                    estimated_steps_remaining=0)
    remaining = "Then ".join(f"{d} {k}, " for d, k in left).rstrip(", ") + f" to {scene.goal}."
    direction, k = left[0]
    failed = request.lines and any("rejected" in line for line in request.lines[-6:] if line.startswith(f"Step {step - 1}:"))
    if failed and k > 1 and len(left) < cap - step + 1:
        k, left = math.ceil(k / 2), [left[0], *left]  # the step failed as it was: a shorter one
    if step == cap and len(left) > 1:
        instruction, target = f"Move {scene.thing} to {scene.goal}.", scene.first.goal
    else:
        instruction = f"{scene.move(direction, k)}."
        target = tuple(np.add(scene.cell(now), np.multiply(world.MOVES[direction], k)))
    state = f"{scene.thing.capitalize()} is in row {target[0] + 1}, column {target[1] + 1} (counted from 1 at the top left)."
    return dict(observation=seen, remaining_goal=remaining, task_complete=False, instruction=instruction, target_state=state,
                estimated_steps_remaining=1 if step == cap else len(left))


def verifier(request: Request) -> dict:
    """Follows the circle: one circle, in the corridors, along the way to the target state, not past it."""
    scene = Scene(request)
    places = [world.read(frame, like=scene.first) for frame in request.clip()]
    found = re.search(r"row (\d+), column (\d+)", request.value("Target state"))
    target = (int(found[1]) - 1, int(found[2]) - 1) if found else scene.first.goal
    begin = places[0].circle or scene.first.circle
    path = scene.path(begin, target)
    plan = world.segments(path)
    order = f"{scene.move(*plan[0])}" if len(plan) == 1 else f"Move {scene.thing} to {scene.goal}"

    def verdict(reason, good, suggestion="", progress="none"):
        return dict(reason=reason, action_executed=not suggestion, progress=progress, good_fraction=round(good, 3),
                    suggestion=suggestion, verdict="reject" if suggestion else "accept", confidence=0.9)

    if not plan:
        return verdict("The circle is where it should be.", 1.0, progress="complete")
    along = np.zeros(len(places))  # cells along the path
    for i, place in enumerate(places):
        good = max(0, i - 1) / (len(places) - 1)
        if place.circles != 1 or place.circle is None:
            if i + 1 < len(places) and places[i + 1].circles == 1:
                along[i] = along[i - 1]  # a flicker of one frame
                continue
            seen = "no circle" if place.circle is None else f"{place.circles} circles"
            return verdict(f"There are {seen} from frame {i} on.", good, f"{order} and keep it one whole circle.")
        if not world.is_open(scene.first.open, np.round(place.circle).astype(int)):
            return verdict(f"The circle leaves the corridor in frame {i}.", good, f"{order} and keep it inside the corridor.")
        distance = np.abs(np.array(path) - np.array(place.circle)).sum(1)
        along[i] = distance.argmin()
        if distance.min() > 0.75:
            direction, k = world.segments(scene.path(begin, place.circle))[0]
            if direction != plan[0][0]:
                return verdict(f"The circle goes {direction} in frame {i}.", good, f"{scene.move(*plan[0])}, not {direction}.")
            far = round(float(np.abs(np.subtract(places[-1].circle or place.circle, begin)).sum()))
            return verdict(f"The circle goes past its target in frame {i}.", good, f"{order}, not {far}.")
        if i and np.abs(np.subtract(place.circle, places[i - 1].circle or place.circle)).max() > 1.6:
            return verdict(f"The circle jumps in frame {i}.", good, f"{order} without a jump.")
    end = scene.cell(places[-1].circle)
    if end == tuple(target):
        return verdict("The circle is where the plan wants it.", 1.0, progress="complete")
    if along[-1] < 1:
        return verdict("The circle does not get to the next cell.", 0.0, f"{order}, not 0.")
    return verdict(f"The circle goes the right way, {int(along[-1])} of {len(path) - 1} cells.", 1.0, progress="partial")


def router(request: Request) -> dict:
    """regen while a good part is worth keeping, else split, else the fallback for what one clip can hold."""
    scene, allowed = Scene(request), request.value("Allowed actions").split(", ")
    frames, good = request.clip(), float(request.value("Good fraction", "0"))
    asked = re.search(r"(up|down|left|right) (\d+) cells?", request.value("Suggestion"))
    if good < 0.2 and "split" in allowed:
        return dict(reason="Hardly anything of the clip is right.", action="split", estimated_steps=2,
                    suggestion="Move the circle in shorter pieces.")
    begin = world.read(frames[0], like=scene.first).circle or scene.first.circle
    kept = world.read(frames[math.floor(good * (len(frames) - 1))], like=scene.first).circle or begin
    if good < 0.2 and len(world.segments(scene.path(scene.first.circle, scene.first.goal))) <= 2:
        return dict(reason="The whole way is short.", action="fallback", estimated_steps=0, suggestion="One clip for all of it.")
    suggestion = request.value("Suggestion")
    if asked:
        done = round(float(np.abs(np.subtract(scene.cell(kept), scene.cell(begin))).sum()))
        k = max(1, int(asked[2]) - done)
        suggestion = f"From here m{scene.move(asked[1], k)[1:]} and stop."
    return dict(reason=f"The first {good:.0%} of the clip are right.", action="regen", estimated_steps=0, suggestion=suggestion)


def answer(request: Request) -> dict:
    """The reply of the role that the instructions describe."""
    for mark, role in ("estimated_steps_remaining", planner), ("verdict", verifier), ("regen", router):
        if mark in request.instructions:
            return role(request)
    raise ValueError("the instructions describe none of the roles: planner, verifier, failure router")


# ------------------------------------------------------------------------------------------------ HTTP


class Handler(BaseHTTPRequestHandler):
    """The two paths of the OpenAI API that collabvr.py uses, with the API's error bodies."""

    def do_GET(self):
        if self.path.rstrip("/") != "/v1/models":
            return self.send(404, error(f"no such path: {self.path}"))
        self.send(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": NOTE}]})

    def do_POST(self):
        if self.path.rstrip("/") != "/v1/chat/completions":
            return self.send(404, error(f"no such path: {self.path}"))
        try:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            request = parse(body)
            if body.get("model") != MODEL:
                return self.send(404, error(f"the model {body.get('model')!r} does not exist; there is {MODEL!r}", "model_not_found"))
            text = json.dumps(answer(request))
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as fault:
            return self.send(400, error(f"{type(fault).__name__}: {fault}"))
        words = sum(map(len, request.lines)) + len(request.instructions)
        used = {"prompt_tokens": words // 4 + 258 * len(request.pictures), "completion_tokens": len(text) // 4}
        self.send(200, {
            "id": "chatcmpl-maze", "object": "chat.completion", "created": int(time.time()), "model": MODEL,
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
            "usage": used | {"total_tokens": sum(used.values())}})

    def send(self, status: int, body: dict):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def error(message: str, code: str | None = None) -> dict:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}


def serve(port: int = 0) -> ThreadingHTTPServer:
    """A server on 127.0.0.1; port 0 takes a free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    with serve(parser.parse_args().port) as server:
        print(f"{MODEL} ({NOTE}) at http://127.0.0.1:{server.server_port}/v1", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
