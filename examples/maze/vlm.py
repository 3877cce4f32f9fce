"""An OpenAI-compatible endpoint for the maze world: `python -m examples.maze.vlm --port 8000`.

It is no vision-language model and says so: a rule-based reader of pixels that answers the roles of
collabvr.py and of baselines.py in JSON. It sees only what a VLM would see, the texts and the
pictures of a request. POST /v1/chat/completions, GET /v1/models, standard errors.
It can be told to be wrong at given rates, to see what a supervisor's mistakes cost (`Errors`).
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import re
import sys
import time
import zlib
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

import collabvr
from examples import cli
from examples.maze import world

MODEL = "maze-reader"
NOTE = "a rule-based reader of pixels, not a vision-language model"


# --------------------------------------------------------------------------- what a request holds


@dataclass
class Request:
    """A chat request, taken apart: lines of text, and pictures with the line above them."""

    instructions: str = ""
    lines: list[str] = field(default_factory=list)
    pictures: list[tuple[str, np.ndarray]] = field(default_factory=list)

    def value(self, label: str) -> str:
        """What follows `label: ` in the last line that starts so; '' if none does."""
        found = [x[len(label) + 2 :] for x in self.lines if x.startswith(f"{label}: ")]
        return found[-1] if found else ""

    def under(self, *labels: str) -> list[np.ndarray]:
        """The pictures whose line above starts with one of the labels."""
        return [p for above, p in self.pictures if above.startswith(labels)]

    def clip(self) -> list[np.ndarray]:
        """The frames of the clip that the request is about."""
        return self.under("Frame at", "Clip to check", "Failed clip")


def parse(body: dict) -> Request:
    """Takes a request apart. Raises ValueError, KeyError or TypeError if it is none."""
    request = Request()
    for message in body["messages"]:
        content = message["content"]
        if message["role"] == "system":
            request.instructions += content
            continue
        for piece in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if piece["type"] == "text":
                request.lines.append(piece["text"])
            elif piece["type"] in ("image_url", "video_url"):
                above = request.lines[-1] if request.lines else ""
                seen = pictures(piece[piece["type"]]["url"])
                request.pictures += [(above, picture) for picture in seen]
            else:
                raise ValueError(f"content of type {piece['type']!r} is not understood")
    return request


def pictures(url: str) -> list[np.ndarray]:
    """The picture, or all frames of the video, in a data URL."""
    head, _, data = url.partition(";base64,")
    if not head.startswith("data:"):
        raise ValueError("only data: URLs are understood")
    raw = base64.b64decode(data, validate=True)
    if head == "data:video/mp4":
        import imageio.v3 as iio

        return list(iio.imread(raw, plugin="pyav", extension=".mp4"))
    return [np.array(Image.open(io.BytesIO(raw)).convert("RGB"))]


# ------------------------------------------------------------------------ the roles of collabvr.py


class Scene:
    """What the input picture shows, and words for it."""

    def __init__(self, request: Request):
        self.first = world.read(request.under("Input image")[0])
        self.circle = f"the {world.colour_word(self.first.circle_colour)} circle"
        self.goal = f"the {world.colour_word(self.first.goal_colour)} square"
        self.start = self.first.circle

    def find(self, frame) -> world.Reading:
        return world.read(frame, like=self.first)

    def cell(self, place) -> tuple[int, int]:
        """The corridor cell nearest to a place."""
        cells = np.argwhere(self.first.open)
        return tuple(map(int, cells[np.abs(cells - np.array(place)).sum(1).argmin()]))

    def path(self, a, b) -> list:
        return world.shortest_path(self.first.open, self.cell(a), self.cell(b))

    def move(self, direction: str, k: int) -> str:
        return f"Move {self.circle} {direction} {k} {'cell' if k == 1 else 'cells'}"


def name(cell) -> str:
    return f"row {cell[0] + 1}, column {cell[1] + 1}"


def planner(request: Request) -> dict:
    """One straight segment a step, a shorter one after a rejection if steps are left for it; on
    the last allowed step all that remains."""
    scene = Scene(request)
    last = request.under("Last frame of step")
    now = scene.cell((scene.find(last[-1]).circle if last else None) or scene.start)
    step, cap = map(int, re.findall(r"\d+", request.value("Step"))[:2])
    goal = scene.first.goal
    left = world.segments(scene.path(now, goal))
    reply = {
        "observation": f"{scene.circle} is in {name(now)}, {scene.goal} in {name(goal)}.",
        "remaining_goal": ", then ".join(f"{k} {direction}" for direction, k in left) or "nothing",
        "task_complete": not left, "instruction": "", "target_state": "",
        "estimated_steps_remaining": len(left)}
    if not left:  # but as long as there is no clip, a plan must have an action
        return reply if last else reply | {
            "task_complete": False, "instruction": f"Keep {scene.circle} where it is.",
            "target_state": f"{scene.circle} is in {name(goal)}", "estimated_steps_remaining": 1}
    direction, k = left[0]
    before = [x for x in request.lines if x.startswith(f"Step {step - 1}:")]
    if k > 1 and "Outcome: rejected" in "".join(before) and len(left) < cap - step + 1:
        k, reply["estimated_steps_remaining"] = math.ceil(k / 2), len(left) + 1
    reply["instruction"] = f"{scene.move(direction, k)}."
    target = np.add(now, np.multiply(world.MOVES[direction], k))
    if step == cap and len(left) > 1:
        reply["instruction"], target = f"Move {scene.circle} to {scene.goal}.", goal
        reply["estimated_steps_remaining"] = 1
    reply["target_state"] = f"{scene.circle} is in {name(target)}, counted from 1 at the top left."
    return reply


def verifier(request: Request) -> dict:
    """Follows the circle: one of it, in the corridors, on the way to the target and not past it."""
    scene = Scene(request)
    places = [scene.find(frame) for frame in request.clip()]
    found = re.search(r"row (\d+), column (\d+)", request.value("Target state"))
    target = (int(found[1]) - 1, int(found[2]) - 1) if found else scene.first.goal
    begin = places[0].circle or scene.start
    path = scene.path(begin, target)
    plan = world.segments(path)
    order = scene.move(*plan[0]) if len(plan) == 1 else f"Move {scene.circle} to {scene.goal}"

    def verdict(reason: str, right: int, suggestion: str = "", progress: str = "none") -> dict:
        return {"reason": reason, "action_executed": not suggestion, "progress": progress,
                "good_fraction": round(right / (len(places) - 1), 3), "suggestion": suggestion,
                "verdict": "reject" if suggestion else "accept", "confidence": "high"}

    before = begin
    for i, place in enumerate(places):
        right = max(0, i - 2)  # the last frame that is surely free of the error
        if place.circles != 1:
            if i + 1 < len(places) and places[i + 1].circles == 1:
                continue  # one frame that flickers
            return verdict(f"From frame {i} on there are {place.circles} circles.", right,
                           f"{order} and keep it one whole circle.")
        here = place.circle
        if np.abs(np.subtract(here, before)).max() > 1.6:
            return verdict(f"The circle jumps in frame {i}.", right, f"{order} without a jump.")
        if np.abs(np.subtract(here, scene.cell(here))).max() > 0.7:
            return verdict(f"The circle leaves the corridor in frame {i}.", right,
                           f"{order} and keep it inside the corridor.")
        if np.abs(np.subtract(path, here)).sum(1).min() > 0.75:
            way = world.segments(scene.path(begin, here))
            if plan and way and way[0][0] != plan[0][0]:
                return verdict(f"The circle goes {way[0][0]} in frame {i}.", right,
                               f"{scene.move(*plan[0])}, not {way[0][0]}.")
            far = len(scene.path(begin, places[-1].circle or here)) - 1
            return verdict(f"The circle goes past {name(target)} in frame {i}.", right,
                           f"{order}, not {far}.")
        before = here
    end = scene.cell(before)
    last = len(places) - 1
    if end == tuple(target):
        return verdict(f"The circle ends in {name(end)}, as planned.", last, progress="complete")
    if end == scene.cell(begin):
        return verdict("The circle does not reach the next cell.", 0, f"{order}, not 0.")
    far = len(scene.path(begin, end)) - 1
    return verdict(f"The circle goes the right way, {far} of {len(path) - 1} cells.", last,
                   progress="partial")


def router(request: Request) -> dict:
    """regen if some of the clip is right; else split, or fallback if the whole way is short."""
    scene, frames = Scene(request), request.clip()
    allowed, right = request.value("Allowed actions"), float(request.value("Good fraction"))
    if right < 0.2 and "split" in allowed:
        return {"reason": "Hardly anything of the clip is right.", "action": "split",
                "suggestion": "Move the circle in shorter pieces.", "estimated_steps": 2}
    if right < 0.2 and len(world.segments(scene.path(scene.start, scene.first.goal))) <= 2:
        return {"reason": "The whole way is short.", "action": "fallback",
                "suggestion": "All of it in one clip.", "estimated_steps": 0}
    begin = scene.find(frames[0]).circle or scene.start
    kept = scene.find(frames[math.floor(right * (len(frames) - 1))]).circle or begin
    suggestion = request.value("Suggestion")
    asked = re.search(r"(up|down|left|right) (\d+) cells?", suggestion)
    if asked:
        k = int(asked[2]) - (len(scene.path(begin, kept)) - 1)
        suggestion = f"From here m{scene.move(asked[1], max(1, k))[1:]} and stop."
    return {"reason": f"The first {right:.0%} of the clip is right.", "action": "regen",
            "suggestion": suggestion, "estimated_steps": 0}


# ------------------------------------------------------------------------ the roles of baselines.py


def candidates(request: Request) -> list[list[np.ndarray]]:
    """The frames of each of the clips that are labelled `Candidate 1:` and so on."""
    clips, before = [], None
    for above, picture in request.pictures:
        if above.startswith("Frame at 0.00") or above.startswith("Candidate") and above != before:
            clips.append([])
        if clips:
            clips[-1].append(picture)
        before = above
    return clips


def judged(request: Request, scene: Scene) -> list[tuple[float, str]]:
    """Of each candidate how good it is as a solution of the whole task, and the correction."""
    out = []
    for clip in candidates(request):
        d = verifier(Request(request.instructions, [], [
            ("Input image:", request.under("Input image")[0]), *(("Frame at", f) for f in clip)]))
        end = scene.find(clip[-1]).circle
        way = scene.path(scene.start, scene.first.goal)
        left = len(scene.path(end, scene.first.goal)) - 1 if end else len(way)
        short = f"Move {scene.circle} all the way to {scene.goal}." if left else ""
        out.append((2 * (d["verdict"] == "accept") - left / len(way), d["suggestion"] or short))
    return out


def picker(request: Request) -> dict:
    """The candidate without faults that ends nearest to the goal."""
    found = [good for good, _ in judged(request, Scene(request))]
    best = int(np.argmax(found)) + 1
    return {"reason": f"Candidate {best} comes closest to the goal.", "best": best}


def critic(request: Request) -> dict:
    """The task with the correction of the better candidate."""
    scene = Scene(request)
    found = judged(request, scene)
    _, fix = max(found)
    return {"critiques": [wrong or "It does what the task wants." for _, wrong in found],
            "prompt": f"{request.value('Task prompt')}{' Correction: ' + fix if fix else ''}"}


def preplanner(request: Request) -> dict:
    """One straight segment a milestone; the last one takes all that is left."""
    scene = Scene(request)
    N = int(re.findall(r"\d+", request.value("Clips"))[0])
    here, milestones = scene.cell(scene.start), []
    way = world.segments(scene.path(here, scene.first.goal))
    for direction, k in way[:N]:
        here = tuple(np.add(here, np.multiply(world.MOVES[direction], k)))
        milestones.append({"instruction": f"{scene.move(direction, k)}.",
                           "target_state": f"{scene.circle} is in {name(here)}"})
    if len(way) > N or not way:
        milestones[N - 1 :] = [{"instruction": f"Move {scene.circle} to {scene.goal}.",
                                "target_state": f"{scene.circle} is in {name(scene.first.goal)}"}]
    return {"observation": f"{scene.circle} is in {name(scene.cell(scene.start))}.",
            "milestones": milestones}


# ---------------------------------------------------------------------- which role, and how wrong


@dataclass
class Errors:
    """How often the reader is right, each from 0 to 1: the numbers of the paper's Table 6."""

    accept_recall: float = 1.0  # of what is to be accepted, how much it accepts
    reject_recall: float = 1.0  # of what is to be rejected, how much it rejects
    depth_match: float = 1.0  # how often its number of remaining steps is right, else off by one
    seed: int = 0

    def applied(self, reply: dict, request: Request) -> dict:
        """The reply, made wrong by chance; the same request always gets the same reply."""
        said = repr((self.seed, request.lines, [zlib.crc32(p) for _, p in request.pictures]))
        rng = np.random.default_rng(zlib.crc32(said.encode()))
        luck = rng.random()
        if reply.get("verdict") == "accept" and luck > self.accept_recall:
            order = request.value("Planned action").partition(" Correction: ")[0].removesuffix(".")
            return reply | {"verdict": "reject", "action_executed": False, "progress": "none",
                            "good_fraction": round(rng.random(), 2),
                            "reason": "The circle does not do what was planned.",
                            "suggestion": f"{order} and keep it inside the corridor."}
        if reply.get("verdict") == "reject" and luck > self.reject_recall:
            return reply | {"verdict": "accept", "action_executed": True, "progress": "complete",
                            "good_fraction": 1.0, "suggestion": "",
                            "reason": "The circle does what was planned."}
        if reply.get("estimated_steps_remaining") and luck > self.depth_match:
            steps = reply["estimated_steps_remaining"]  # of 1 only 2 is off by one
            steps += int(rng.choice([-1, 1])) if steps > 1 else 1
            return reply | {"estimated_steps_remaining": steps}
        return reply


ROLES = {"milestones": preplanner, "critiques": critic, "number of the candidate": picker,
         "estimated_steps_remaining": planner, "verdict": verifier, "fallback": router}


def answer(request: Request, errors: Errors) -> dict:
    """The reply of the role that the instructions describe. Raises ValueError if they do not."""
    for mark, role in ROLES.items():
        if mark in request.instructions:
            return errors.applied(role(request), request)
    raise ValueError("the instructions describe no role of collabvr.py or baselines.py")


# ------------------------------------------------------------------------------------------ HTTP


class Handler(BaseHTTPRequestHandler):
    """The two paths of the OpenAI API that collabvr.py uses, with that API's error bodies."""

    def do_GET(self):
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": NOTE}
        if self.path.rstrip("/") == "/v1/models":
            self.send(200, {"object": "list", "data": [model]})
        else:
            self.fail(404, f"no such path: {self.path}")

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.rstrip("/") != "/v1/chat/completions":
            return self.fail(404, f"no such path: {self.path}")
        try:
            body = json.loads(raw)
            if body["model"] != MODEL:
                return self.fail(404, f"no model {body['model']!r}: use {MODEL!r}", "not_found")
            request = parse(body)
            text = json.dumps(answer(request, self.server.errors))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError) as fault:
            return self.fail(400, f"{type(fault).__name__}: {fault}")
        read = (sum(map(len, request.lines)) + len(request.instructions)) // 4
        used = {"prompt_tokens": read + 258 * len(request.pictures),  # as Gemini counts pictures
                "completion_tokens": len(text) // 4}
        message = {"role": "assistant", "content": text}
        self.send(200, {
            "id": "chatcmpl-maze", "object": "chat.completion", "created": int(time.time()),
            "model": MODEL, "usage": used | {"total_tokens": sum(used.values())},
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}]})

    def fail(self, status: int, message: str, code: str | None = None):
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
        self.send(status, {"error": error})

    def send(self, status: int, body: dict):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Quiet: collabvr.py logs each call."""


def serve(port: int = 0, errors: Errors | None = None) -> ThreadingHTTPServer:
    """A server on 127.0.0.1 that waits for serve_forever(); port 0 takes a free one."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.errors = errors or Errors()
    return server


@dataclass
class Serve:
    errors: Errors
    port: int = 8000  # on 127.0.0.1

    def run(self) -> int:
        """Serves until Ctrl-C. Raises Problem if the port cannot be used."""
        with collabvr.explained(f"port {self.port} cannot be used; choose another --port",
                                OSError, OverflowError):
            server = serve(self.port, self.errors)
        with server, contextlib.suppress(KeyboardInterrupt):
            print(f"{MODEL} ({NOTE}) at http://127.0.0.1:{server.server_port}/v1", flush=True)
            server.serve_forever()
        print("stopped")
        return 0


def main(argv: list[str] | None = None) -> int:
    return cli.command(__doc__, Serve, argv)


if __name__ == "__main__":
    sys.exit(main())
