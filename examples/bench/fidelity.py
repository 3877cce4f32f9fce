"""First-frame fidelity of a generator (App. A.4): does a clip begin with the picture it was given?

    python -m examples.bench.fidelity wan --images FOLDER --vgm examples/maze/tiny-wan
    python -m examples.bench.fidelity served --images FOLDER --url http://localhost:30000

    sys.exit(fidelity.main(Mine))     # for a generator of your own, in its file

Prints the SSIM of each picture and frame 0 of its clip, mean and deviation, beside the paper's.
The clips stay in OUT: the same command, or one with more clips, makes none twice.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from collabvr import RecordedModels, explained, log
from examples.bench.run import GENERATORS
from examples.bench.samples import Sample, samples
from examples.bench.summary import deviation, ssim
from examples.cli import command, needed
from examples.stats import Table

PAPER = {"Wan": 0.970, "Cosmos": 0.971, "Veo": 0.977, "Sora 2": 0.818}  # A.4, input and frame 0
WARNING = """\
Every step starts from the last frame of the one before: a generator that draws its first frame
anew, as the paper found of Sora 2 and left it out for, breaks the loop, whatever the VLM says."""
VGM = TypeVar("VGM", bound=Any)


@dataclass
class Fidelity(Generic[VGM]):
    """Clips of the first pictures of a folder, with this generator."""

    images: str  # folder of pictures, or another data set that examples.bench.run reads
    vgm: VGM
    task: str = "Something in the picture moves a little."  # prompt of pictures without one
    clips: int = 5  # of as many pictures, the first ones
    seconds: float = 2.0  # of a clip
    seed: int = 0  # of every clip
    out: Path = Path("runs/fidelity")  # folder of the clips

    def run(self) -> int:
        """Makes the clips that are not there yet and prints the table. Raises Problem."""
        needed("skimage.metrics")
        pictures = list(itertools.islice(samples(self.images, self.task), self.clips))
        if hasattr(self.vgm, "check"):
            self.vgm.check()
        found = [self.measure(x) for x in pictures]
        name = getattr(self.vgm, "vgm", type(self.vgm).__name__)
        rows: list[list] = [[name, len(found), float(np.mean(found)), deviation(found)]]
        for other, mean in PAPER.items():
            rows.append([f"{other} (the paper's)", None, mean, None])
        title = "First-frame fidelity (A.4): SSIM"
        print(Table(title, ["", "clips", "mean", "std"], rows).text())
        print(WARNING)
        return 0

    def measure(self, x: Sample) -> float:
        """The SSIM of a picture and frame 0 of its clip."""
        frame = x.picture()
        models = RecordedModels(self.vgm, None, self.out / x.id, self.seed)
        clip = models.generate(models.begin(frame, x.task), x.task, self.seconds)
        with explained(f"{x.id} has no SSIM", ValueError):  # of a tiny clip
            return ssim(frame, clip.frames[0])


def main(vgm: type | None = None, argv: list[str] | None = None) -> int:
    """0: the table was printed; 2: something is wrong; 130: interrupted."""
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)  # which clip is being waited for
    kind: Any = Fidelity
    if vgm is not None:
        return command(__doc__, kind[vgm], argv)
    shipped = {name: getattr(importlib.import_module(module), vgm_name)
               for name, (module, vgm_name) in GENERATORS.items()}
    return command(__doc__, {name: kind[one] for name, one in shipped.items()}, argv)


if __name__ == "__main__":
    sys.exit(main())
