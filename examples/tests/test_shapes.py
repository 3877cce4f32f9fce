"""collabvr.Wan with a tiny random checkpoint of each shape: Wan2.2 A14B, Wan2.2 TI2V-5B, Wan2.1."""

import re
import shlex
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import collabvr as c
from examples.tests import checkpoints

ROOT = Path(__file__).resolve().parents[2]
FRAME = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(shape): the folder of a checkpoint."""
    folders: dict = {}

    def folder(shape):
        if shape not in folders:
            torch.manual_seed(0)
            folders[shape] = checkpoints.SHAPES[shape](tmp_path_factory.mktemp(shape))
        return folders[shape]
    return folder


def frames_of(vgm, frame=FRAME, seconds=0.25):
    return vgm(frame, "Move the ball.", seconds, 0).frames


@pytest.mark.parametrize("shape", checkpoints.SHAPES)
def test_each_shape_makes_a_clip(saved, shape):
    vgm = c.Wan(vgm=saved(shape), sampling_steps=2)
    frames = frames_of(vgm, seconds=0.5)
    assert frames.shape == (9, 64, 96, 3)
    assert (frames[0] != frames[-1]).any()
    other = frames_of(vgm, 255 - FRAME, 0.5)
    assert (frames[0] != other[0]).any(), "it starts from the picture"


def test_sides_are_multiples_of_what_the_shape_needs(saved):
    frame = np.zeros((80, 100, 3), np.uint8)
    sides = {"a14b": (80, 96), "wan21": (80, 96), "ti2v_5b": (64, 96)}
    for shape, size in sides.items():
        vgm = c.Wan(vgm=saved(shape), sampling_steps=1)
        assert frames_of(vgm, frame).shape == (5, *size, 3)


@pytest.mark.parametrize("shape", ["a14b", "ti2v_5b"])
def test_a_negative_prompt_needs_guidance(saved, shape):
    """It changes the clip if and only if guidance is above 1."""
    vgm = c.Wan(vgm=saved(shape), sampling_steps=2)
    changed = []
    for guidance in (1.0, 5.0):
        vgm.guidance_scale = guidance
        vgm.negative_prompt = ""
        plain = frames_of(vgm)
        vgm.negative_prompt = "blurred"
        changed.append(bool((frames_of(vgm) != plain).any()))
    assert changed == [False, True]


@pytest.mark.parametrize("flow_shift, high_noise", [(None, 6), (3.0, 6), (5.0, 8)])
def test_flow_shift_moves_steps_to_the_other_expert(saved, flow_shift, high_noise):
    """Of 20 steps, each of which is two passes."""
    vgm = c.Wan(vgm=saved("a14b"), flow_shift=flow_shift)
    passes = {"transformer": 0, "transformer_2": 0}
    for name in passes:
        def count(*_, name=name):
            passes[name] += 1
        getattr(vgm.pipe, name).register_forward_hook(count)
    frames_of(vgm)
    assert passes == {"transformer": 2 * high_noise, "transformer_2": 2 * (20 - high_noise)}


@pytest.mark.slow
def test_max_pixels_makes_a_picture_smaller(saved):
    vgm = c.Wan(vgm=saved("ti2v_5b"), sampling_steps=1, guidance_scale=1, max_pixels=262144)
    square = np.zeros((1024, 1024, 3), np.uint8)
    assert frames_of(vgm, square).shape == (5, 512, 512, 3)


# ------------------------------------------------------------------------------
# The README's commands: settings are checked, weights are not

README = (ROOT / "README.md").read_text().replace("\\\n", " ")  # a line that goes on
COMMANDS = [
    command for command in re.findall(r"python (collabvr\.py [^`\n]+)", README)
    if "--help" not in command]
for cell in re.findall(r"\n\| \d+ GB \|[^|]*\|([^|]*)\|", README):  # checkpoints by card
    options = " ".join(re.findall("`([^`]*)`", cell))
    before = COMMANDS[-1] if "the same" in cell else "collabvr.py"
    COMMANDS.append(f"{before} {options}")


class Parsed(c.Wan):
    """Wan, which is only parsed: its check ends the run."""

    def check(self):
        found.append(self)
        raise c.Problem("parsed")


found: list[Parsed] = []


def shape_of(vgm: str) -> str:
    if "5B" in vgm:
        return "ti2v_5b"
    return "wan21" if "2.1" in vgm else "a14b"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_fits_its_shape(saved, command, tmp_path, monkeypatch):
    """The real command line parses it, and a random checkpoint of its shape takes the options."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEMINI_API_KEY", "a-key")
    c.iio.imwrite("x.png", FRAME)
    words = [word for word in shlex.split(command, comments=True)[1:] if word != ".."]
    words += ["--image", "x.png", "--task", "q"]  # the last one counts
    assert c.main(vgm=Parsed, argv=words) == 2
    options = asdict(found.pop())
    tiny = {"vgm": saved(shape_of(options["vgm"])), "sampling_steps": 2}
    assert len(frames_of(c.Wan(**options | tiny))) == 5
