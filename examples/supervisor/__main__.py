"""How good is a VLM as planner and verifier, measured against people (the paper's Table 6)?

    python -m examples.supervisor export runs --out points        questions and answers of runs
    python -m examples.supervisor ask points --vlm-url http://localhost:8000/v1 --vlm Qwen3.5-9B
    python -m examples.supervisor score labels.jsonl points/replies/*.jsonl

Between ask and score people label the points: points/label.html. See README.md beside this file.
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
