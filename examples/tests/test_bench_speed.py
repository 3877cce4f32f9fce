"""What fast_wan's options bring: on a CPU, of a tiny model."""

import sys

import diffusers
import imageio.v3 as iio
import numpy as np
import pytest
import torch

from examples.bench import speed


def rows(text, width):
    """A table's rows: {name: cells}."""
    return {line[:width].strip(): line[width:].split() for line in text.splitlines()}


@pytest.mark.slow
def test_each_option_is_a_row_and_a_failure_is_told(capsys):
    budget = "24 GB: 8-bit weights, group offload"
    argv = ["seconds", "--steps", "2", "--row", "diffusers' defaults", "cache", budget]
    assert speed.main(argv) == 0
    said = capsys.readouterr()
    table = rows(said.out, len("diffusers' defaults"))
    for name in ("diffusers' defaults", "cache"):
        step, clip, hourly, peak, _ = table[name]
        assert peak == "-", "memory is the GPU's"
        assert float(hourly.replace(",", "")) == pytest.approx(3600 / float(clip), rel=0.05)
        assert float(clip) > 20 * float(step) - 0.02
    assert 0 < float(table["cache"][4]) < float(table["cache"][0])
    assert table["diffusers' defaults"][4] == "-"
    assert f"{budget}: Problem: a budget of GPU memory needs a GPU" in said.err


@pytest.mark.slow
def test_clips_are_compared_with_those_of_no_option(tmp_path, capsys):
    pytest.importorskip("skimage")
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    iio.imwrite(tmp_path / "x.png", picture)
    argv = ["likeness", "--image", str(tmp_path / "x.png"), "--seconds", "0.5",
            "--sampling-steps", "4", "--row", "8-bit weights", "cache"]
    assert speed.main(argv) == 0
    table = rows(capsys.readouterr().out, len("8-bit weights"))
    clips, skipped, ssim, least = table["8-bit weights"]
    assert clips == "1" and skipped == "-"
    assert 0.8 < float(ssim) <= 1 and ssim == least
    assert 0 <= float(table["cache"][1]) < 1


def test_what_is_missing_gets_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    assert speed.main(["likeness"]) == 2
    assert "skimage.metrics is needed: pip install" in capsys.readouterr().err


def test_an_expert_has_a14bs_weights():
    with torch.device("meta"):
        expert = diffusers.WanTransformer3DModel(in_channels=36, **speed.A14B["expert"])
    assert round(sum(x.numel() for x in expert.parameters()) / 1e9, 1) == 14.3
