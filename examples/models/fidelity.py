"""First-frame fidelity of a generator (App. A.4): does a clip begin with the picture it was given?

    python -m examples.models.fidelity wan --images FOLDER --vgm examples/maze/tiny-wan
    python -m examples.models.fidelity served --images FOLDER --url http://localhost:30000

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
from typing import Generic, TypeVar

import numpy as np

import collabvr
from collabvr import Problem, RecordedModels, explained, log
from examples.bench.run import GENERATORS
from examples.bench.samples import Sample, samples
from examples.bench.summary import ssim
from examples.cli import command, needed
from examples.stats import Table

PAPER = {"Wan": 0.970, "Cosmos": 0.971, "Veo": 0.977, "Sora 2": 0.818}  # A.4, input and frame 0
WARNING = """\
Every step starts from the last frame of the one before: a generator that draws its first frame
anew, as the paper found of Sora 2 and left it out for, breaks the loop, whatever the VLM says."""
VGM = TypeVar("VGM")


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
        if self.clips < 1 or self.seconds <= 0 or self.seed < 0:
            raise Problem("--clips and --seconds have to be above 0, --seed not below it.")
        needed("skimage.metrics")
        pictures = list(itertools.islice(samples(self.images, self.task), self.clips))
        check = getattr(self.vgm, "check", None)
        if check is not None:
            check()
        found = [self.measure(x) for x in pictures]
        std = float(np.std(found, ddof=1)) if len(found) > 1 else None
        name = getattr(self.vgm, "vgm", type(self.vgm).__name__)
        rows: list[list] = [[name, len(found), float(np.mean(found)), std]]
        for other, mean in PAPER.items():
            rows.append([f"{other} (the paper's)", None, mean, None])
        title = "First-frame fidelity (A.4): SSIM"
        print(Table(title, ["", "clips", "mean", "std"], rows).text())
        print(WARNING)
        return 0

    def measure(self, x: Sample) -> float:
        """The SSIM of a picture and frame 0 of its clip."""
        folder = self.out / x.id
        folder.mkdir(parents=True, exist_ok=True)
        with explained(f"{x.id} cannot be read", OSError):
            collabvr.write_file(folder / "picture", x.picture())
        frame = collabvr.load_image(folder / "picture")
        models = RecordedModels(self.vgm, None, folder, self.seed)
        clip = models.generate(models.begin(frame, x.task), x.task, self.seconds)
        with explained(f"{x.id} has no SSIM", ValueError):  # of a tiny clip
            return ssim(frame, clip.frames[0])


def main(vgm: type | None = None, argv: list[str] | None = None) -> int:
    """0: the table was printed; 2: something is wrong; 130: interrupted."""
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)  # which clip is being waited for
    kinds: type | dict[str, type] = Fidelity[vgm]  # type: ignore[valid-type]
    if vgm is None:
        kinds = {}
        for name, (module, kind) in GENERATORS.items():
            kinds[name] = Fidelity[getattr(importlib.import_module(module), kind)]
    return command(__doc__, kinds, argv)


if __name__ == "__main__":
    sys.exit(main())
