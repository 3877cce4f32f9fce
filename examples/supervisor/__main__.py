"""How good is a VLM as planner and verifier, measured against people (the paper's Table 6)?

    python -m examples.supervisor export runs --out points        questions and answers of runs
    python -m examples.supervisor ask points --vlm-url http://localhost:8000/v1 --vlm Qwen3.5-9B
    python -m examples.supervisor score labels.jsonl points/replies/*.jsonl

export writes points/points.jsonl (every question to a planner or verifier, word for word, with its
pictures and clips in points/media) and what was answered, points/replies/run.jsonl; ask puts the
same questions to another VLM. Both make points/label.html, a page with buttons that saves
labels.jsonl. Its lines, which may come from anywhere, are of three kinds:

    {"id": "..", "steps": 2}                       D1: steps from here, 0 if nothing is left to do
    {"id": "..", "verdict": "accept"}              D2: or "reject"
    {"id": "..", "suggestion": "..", "rating": 3}  D3: of a VLM's suggestion: 1 harms, 3 helps

score prints Table 6. Its intervals are of 95 % and take the points for independent of each other,
which those of one run are not quite. Runs of a method of your own, and a VLM of your own: a file
with `sys.exit(main(method=Mine, vlm=MyVLM))`, main being that of examples.supervisor.__main__.
"""

from __future__ import annotations

import sys

from collabvr import CollabVR, OpenAIVLM
from examples import cli
from examples.baselines import METHODS
from examples.supervisor.questions import Ask, Export
from examples.supervisor.score import Score


def main(
    argv: list[str] | None = None,
    method: type[CollabVR] | None = None,
    vlm: type = OpenAIVLM,
) -> int:
    """0; 2 after bad input and 130 after an interruption, with a sentence on stderr."""
    Export.methods = METHODS if method is None else {**METHODS, method.__name__: method}
    Export.vlm_type = vlm
    kinds = {"export": Export, "ask": Ask[vlm], "score": Score}  # type: ignore[valid-type]
    return cli.command(__doc__, kinds, argv)


if __name__ == "__main__":
    sys.exit(main())
