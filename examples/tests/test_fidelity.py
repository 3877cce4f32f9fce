"""Tests of fidelity.py: with generators that keep, blur or ignore the picture they were given."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
import fidelity

GENERATORS = """
import collabvr, numpy as np
from pathlib import Path

class Keeps:
    change = staticmethod(lambda frame: frame)

    def __init__(self, calls):
        self.calls = Path(calls)

    def __call__(self, frame, prompt, seconds, seed):
        with open(self.calls, "a") as file:
            file.write(prompt + "\\n")
        return collabvr.Clip(np.stack([self.change(frame), *[frame] * 4]), 4)

class Redraws(Keeps):
    change = staticmethod(lambda frame: 255 - frame[::-1])
"""


@pytest.fixture
def world(tmp_path):
    """Three pictures of two sizes, a file with generators, and where they note their calls."""
    (tmp_path / "pictures").mkdir()
    for k, size in enumerate([(48, 64), (48, 64), (64, 48)]):
        picture = np.random.default_rng(k).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{k}.png")
    (tmp_path / "mine.py").write_text(GENERATORS)
    (tmp_path / "calls").touch()
    return tmp_path


def measure(world, name="Keeps", *options):
    return fidelity.main([
        "--vgm", f"{world}/mine.py:{name}", "--vgm-arg", f"calls={world}/calls", "--images",
        f"{world}/pictures", "--task", "Move.", "--out", f"{world}/{name}", *options])


def row(capsys):
    """The table's first row: clips, mean, deviation."""
    return capsys.readouterr().out.splitlines()[2].split()[1:]


def test_a_generator_that_keeps_its_first_frame_scores_1_and_one_that_ignores_it_does_not(
        world, capsys):
    pytest.importorskip("skimage")
    assert measure(world) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[2].split()[1:] == ["3", "1.000", "0.000"]
    assert "Sora 2 (the paper's)" in said and "0.818" in said and "breaks the loop" in said
    assert measure(world, "Redraws") == 0
    count, mean, std = row(capsys)
    assert count == "3" and float(mean) < 0.3 and float(std) < 0.2


def test_more_clips_of_the_same_folder_pay_for_the_new_ones_only(world, capsys):
    pytest.importorskip("skimage")
    assert measure(world, "Keeps", "--clips", "1") == 0
    assert row(capsys) == ["1", "1.000", "-"]
    assert measure(world) == 0 and row(capsys)[0] == "3"
    assert (world / "calls").read_text() == "Move.\n" * 3


def test_what_is_missing_gets_one_sentence(world, capsys, monkeypatch):
    (world / "none").mkdir()
    assert measure(world, "Keeps", "--images", f"{world}/none") == 2
    assert "holds no pictures" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    assert measure(world) == 2
    assert "skimage.metrics is needed: pip install" in capsys.readouterr().err
    assert not (world / "calls").read_text()
