"""Tests of fidelity.py: with generators that keep, or ignore, the picture they were given."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from collabvr import Clip
from examples.bench import fidelity


@dataclass
class Keeps:
    notes: Path  # where it notes its calls

    def first(self, frame):
        return frame

    def __call__(self, frame, prompt, seconds, seed):
        with open(self.notes, "a") as file:
            file.write(f"{prompt} {seed}\n")
        frames = [self.first(frame)] + [frame] * round(4 * seconds)
        return Clip(np.stack(frames), 4)


class Redraws(Keeps):
    def first(self, frame):
        return 255 - frame[::-1]


@pytest.fixture
def world(tmp_path):
    """Three pictures of two sizes, and where the generators note their calls."""
    (tmp_path / "pictures").mkdir()
    for k, size in enumerate([(48, 64), (48, 64), (64, 48)]):
        picture = np.random.default_rng(k).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{k}.png")
    (tmp_path / "notes").touch()
    return tmp_path


def measure(world, vgm=Keeps, *options):
    return fidelity.main(vgm, [
        "--notes", f"{world}/notes", "--images", f"{world}/pictures", "--task", "Move.",
        "--out", f"{world}/{vgm.__name__}", *options])


def row(capsys):
    """The table's first row: clips, mean, deviation."""
    return capsys.readouterr().out.splitlines()[2].split()[1:]


def test_a_generator_that_keeps_its_frame_scores_1(world, capsys):
    """And one that ignores it does not."""
    pytest.importorskip("skimage")
    assert measure(world) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[2].split() == ["Keeps", "3", "1.000", "0.000"]
    assert "Sora 2 (the paper's)" in said and "0.818" in said and "breaks the loop" in said
    assert measure(world, Redraws) == 0
    count, mean, std = row(capsys)
    assert count == "3" and float(mean) < 0.3 and float(std) < 0.2


def test_more_clips_pay_for_the_new_ones_only(world, capsys):
    pytest.importorskip("skimage")
    assert measure(world, Keeps, "--clips", "1", "--seed", "7") == 0
    assert row(capsys) == ["1", "1.000", "-"]
    assert measure(world, Keeps, "--seed", "7") == 0 and row(capsys)[0] == "3"
    assert (world / "notes").read_text() == "Move. 7\n" * 3


def test_what_is_missing_gets_one_sentence(world, capsys, monkeypatch):
    pytest.importorskip("skimage")
    (world / "none").mkdir()
    assert measure(world, Keeps, "--images", f"{world}/none") == 2
    assert "none" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    assert measure(world) == 2
    assert "skimage.metrics is needed: pip install" in capsys.readouterr().err
    assert not (world / "notes").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name, option", [("wan", "--vgm"), ("served", "--url")])
def test_a_generator_is_a_subcommand_with_its_options(name, option, capsys):
    assert fidelity.main(None, [name, "--help"]) == 0
    said = capsys.readouterr().out
    assert "--images" in said and option in said


@pytest.mark.slow
def test_a_generator_that_cannot_work_is_one_sentence(world, capsys):
    pytest.importorskip("skimage")
    argv = ["served", "--images", f"{world}/pictures", "--url", "http://127.0.0.1:1"]
    assert fidelity.main(None, argv) == 2
    error = capsys.readouterr().err
    assert "http://127.0.0.1:1" in error and "\n" not in error[:-1]
