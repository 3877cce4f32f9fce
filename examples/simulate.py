"""What benchmark.py's K samples in flight and n workers gain: sleeping models, all else for real.

    python examples/benchmark.py simulate     some four minutes of sleep; the figures on stdout
"""
from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from benchmark import Run

from collabvr import Clip, Config, OpenAIVLM, Wan


class Nap:
    """A generator that sleeps."""

    def __init__(self, seconds="0.1"):
        self.seconds = float(seconds)

    def __call__(self, frame, prompt: str, seconds: float, seed: int) -> Clip:
        time.sleep(self.seconds)
        return Clip(np.stack([frame, frame]), 1 / seconds)


class NapVLM(OpenAIVLM):
    """A VLM that sleeps for `timeout` seconds and is content with everything."""
    check = staticmethod(bool)

    def __call__(self, instructions: str, parts: list, schema) -> dict:
        time.sleep(self.timeout)
        reply = {"observation": "", "remaining_goal": "", "task_complete": False, "reason": "",
                 "instruction": "Go.", "target_state": "there", "estimated_steps_remaining": 1,
                 "action_executed": True, "progress": "complete", "good_fraction": 1.0,
                 "suggestion": "", "confidence": "high", "verdict": "accept"}
        return {"text": json.dumps({k: reply[k] for k in schema.model_fields})}


@dataclass
class Simulate:
    """Sleeping models, everything else as it is: K samples in flight, then n workers."""
    clip: float = 0.4  # s that the generator sleeps for a clip; a VLM call takes a quarter of it
    job: float = 0.2  # s that a worker's sample takes
    samples: int = 500  # for the workers

    def run(self) -> int:
        with tempfile.TemporaryDirectory() as folder:
            root, n = Path(folder), self.samples
            Image.new("RGB", (32, 32)).save(root / "x.png")
            for name, count in (("few", 40), ("many", n)):
                lines = [{"id": i, "image": "x.png", "task": "Go."} for i in range(count)]
                (root / name).write_text("\n".join(map(json.dumps, lines)))

            def work(out: str, data: str, seconds: float, **options) -> int:
                quiet = io.StringIO()
                with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                    return Run(str(root / data), root / out, Config(),
                               NapVLM(timeout=self.clip / 4), Wan(f"{__file__}:Nap"),
                               vgm_arg=[f"seconds={seconds}"], **options).run()

            for K in (1, 2, 3, 4):
                began = time.monotonic()
                work(f"flight{K}", "few", self.clip, in_flight=K)
                wall = time.monotonic() - began
                busy = sum(x["wall_seconds"] for path in root.glob(f"flight{K}/runs/*/trace.json")
                           for x in json.loads(path.read_bytes())["calls"] if x["role"] == "vgm")
                print(f"{K} in flight: {wall:.1f} s, the generator at work {busy / wall:.1%}")
            start, alone = multiprocessing.get_context("fork").Process, 0.0
            for k in (1, 2, 4, 8, 16):
                began, out = time.monotonic(), f"workers{k}"
                workers = [start(target=work, args=(out, "many", self.job), kwargs={
                    "method": "single", "shard": f"{i}/{k}"}) for i in range(1, k + 1)]
                _ = [x.start() for x in workers], [x.join() for x in workers]
                wall, made = time.monotonic() - began, len([*root.glob(f"{out}/videos/*.mp4")])
                alone = alone or wall
                print(f"{k} workers: {made} of {n} samples in {wall:.1f} s, {alone / wall:.2f} "
                      f"times as many an hour as one: {alone / wall / k:.2f} n")
        return 0
