"""First-frame fidelity of a generator (App. A.4): does a clip begin with the picture it was given?

    python examples/generators/fidelity.py --vgm examples/maze/tiny-wan --images FOLDER --clips 5
    python examples/generators/fidelity.py --vgm my_generator.py:NAME --vgm-arg a=1 --images FOLDER

Prints the SSIM of each picture and frame 0 of its clip, mean and deviation, beside the paper's.
The clips stay in OUT, so that the same command, or one with more clips, pays for none twice.
"""
from __future__ import annotations

import itertools
import logging
import sys
from dataclasses import field
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as settings

sys.path[:0] = [str(Path(__file__).resolve().parents[k]) for k in (1, 2)]
import commands
from commands import needed
from samples import samples
from summary import Table, ssim

import collabvr
from collabvr import Models, Problem, Wan

PAPER = {"Wan": 0.970, "Cosmos": 0.971, "Veo": 0.977, "Sora 2": 0.818}  # A.4, input vs frame 0
WARNING = """\
Every step starts from the last frame of the one before: a generator that draws its first frame
anew, as the paper found of Sora 2 and left it out for, breaks the loop, whatever the VLM says."""


@settings(config={"extra": "forbid", "validate_default": True})
class Fidelity:
    images: str  # folder of pictures, or another data set that benchmark.py reads
    vgm: Wan
    task: str = "Something in the picture moves a little."  # prompt, where the data set has none
    clips: Annotated[int, Field(ge=1)] = 5  # of as many pictures, the first ones
    seconds: Annotated[float, Field(gt=0, le=600)] = 2.0  # of a clip
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    out: Path = Path("runs/fidelity")  # the clips
    vgm_arg: list[str] = field(default_factory=list)  # NAME=VALUE for the class in FILE.py:NAME

    def run(self) -> int:
        """Makes the clips that are not there and prints the table. Raises Problem."""
        pictures = list(itertools.islice(samples(self.images, self.task), self.clips))
        if not pictures:
            raise Problem(f"{self.images} holds no pictures.")
        needed("skimage.metrics")
        vgm = collabvr.load_generator(
            self.vgm, dict(x.partition("=")[::2] for x in self.vgm_arg))
        vgm.check(self.seconds)
        found = []  # SSIM of each
        for x in pictures:
            folder = self.out / x.id
            folder.mkdir(parents=True, exist_ok=True)
            if isinstance(x.image, bytes):
                collabvr.write_file(folder / "input.png", x.image)
            frame = collabvr.load_image(folder / "input.png" if isinstance(x.image, bytes)
                                        else x.image)
            clip = Models(vgm, None, folder).generate(frame, x.task, self.seconds, seed=self.seed)
            with collabvr.explained(f"{x.id} has no SSIM", ValueError):  # of a tiny clip
                found.append(ssim(frame, clip.frames[0]))
        std = float(np.std(found, ddof=1)) if len(found) > 1 else None
        print(Table("First-frame fidelity (A.4): SSIM", ["", "clips", "mean", "std"], [
            [self.vgm.vgm, len(found), float(np.mean(found)), std],
            *([f"{name} (the paper's)", None, mean, None] for name, mean in PAPER.items())]).text())
        print(WARNING)
        return 0


def main(argv=None) -> int:
    """0: the table was printed; 2: something is wrong; 130: interrupted."""
    logging.basicConfig(format="%(message)s")
    collabvr.log.setLevel(logging.INFO)  # which clip is being waited for
    return commands.guarded(
        "fidelity.py", lambda: collabvr.parse(argv, Fidelity, "fidelity.py").run())


if __name__ == "__main__":
    sys.exit(main())
