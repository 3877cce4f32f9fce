"""A generator and a VLM for the benchmark's tests: python -m examples.tests.painter.

They need no time, and note what they are asked.
"""

import json
import re
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from collabvr import Clip
from examples.bench.run import main

busy = threading.Lock()


def note(folder: Path, text: str) -> None:
    with open(folder / "notes", "a") as file:
        file.write(text + "\n")


@dataclass
class Painter:
    """Paints the upper rows of a clip. It fails for pictures whose number stands in `fail`, and for
    all of them if that is 'all'."""

    notes: Path = Path()  # folder of its notes
    wait: float = 0.0  # s that a clip takes
    fail: str = "fail"  # a file in that folder
    colours: int = 256

    @property
    def identity(self) -> dict:
        return {"colours": self.colours}

    def check(self) -> None:
        note(self.notes, "checked")

    def __call__(self, frame, prompt: str, seconds: float, seed: int) -> Clip:
        assert busy.acquire(blocking=False), "called by two at once"
        try:
            number = str(frame[-1, 0, 0] // 5)  # of the picture: see write_jsonl in the tests
            note(self.notes, f"call {number} seed {seed}")
            time.sleep(self.wait)
            fail = self.notes / self.fail
            if fail.exists() and {number, "all"} & set(fail.read_text().split()):
                raise RuntimeError("out of memory")
            frames = np.repeat(frame[None], 1 + int(4 * seconds), 0)
            frames[1:, :8] = (37 * seed + len(prompt)) % self.colours
            return Clip(frames, 4)
        finally:
            busy.release()


REPLY = {
    "observation": "", "remaining_goal": "", "task_complete": False, "reason": "",
    "instruction": "Go.", "target_state": "there", "estimated_steps_remaining": 1,
    "action_executed": True, "progress": "complete", "good_fraction": 1.0, "suggestion": "",
    "confidence": "high", "verdict": "accept", "action": "keep", "best": 1,
}


@dataclass
class Judge:
    """A VLM that wants two steps, and of pictures with an odd number a second attempt."""

    strict: bool = True  # False: one step, and every clip is right

    @property
    def identity(self) -> dict:
        return {"strict": self.strict}

    def __call__(self, instructions: str, parts: list, schema) -> dict:
        told = "\n".join(x for x in parts if isinstance(x, str))
        answer = {k: REPLY[k] for k in schema.model_fields}
        odd = int(re.findall(r"Task prompt: Do (\d+)", told)[0]) % 2
        if self.strict and "estimated_steps_remaining" in answer:
            answer["estimated_steps_remaining"] = 1 + ("Step: 1" in told)
        if self.strict and "verdict" in answer and odd and "Correction" not in told:
            answer |= {"verdict": "reject", "suggestion": "Go left."}
        return {"text": json.dumps(answer), "tokens_in": 100, "tokens_out": 10}


if __name__ == "__main__":
    from examples.tests.painter import Judge, Painter  # so that Ray's workers find them

    sys.exit(main(vgm=Painter, vlm=Judge))
