"""Tests of maze/train.py, lessons.py and drift.py."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from examples.maze import drift, lessons, moves, train, world
from examples.maze.run import TinyWan

SHIPPED = TinyWan.vgm
TOY = [
    "--pictures", "2", "--clips", "2", "--latents", "2", "--flows", "2", "--save-every", "1",
    "--encoder-width", "8", "--decoder-width", "8", "--picture-frames", "2",
    "--clip-frames", "4", "--layers", "1", "--heads", "1", "--tokens", "200"]


# ------------------------------------------------------------------------------
# The clips to learn from


def test_lessons_are_single_moves_and_short_tasks():
    """Every path stays in corridors. Words that correct are those of moves.py."""
    rng = np.random.default_rng(0)
    endings = (moves.INSIDE, moves.WHOLE, moves.NO_JUMP, ", not ", " and stop")
    tasks = 0
    for n in itertools.islice(itertools.cycle(train.SIZES), 100):
        lesson = lessons.example(n, rng)
        maze, path, (first, *corrections) = (
            lesson.maze, lesson.path, lesson.prompt.split(" Correction: "))
        assert first.startswith(("Move the ", "Solve the maze: "))
        for text in corrections:
            assert text.startswith(("Move ", "From here move "))
            assert any(ending in text for ending in endings)
        for row, column in path:
            assert world.is_corridor(maze.corridors, (round(row), round(column)))
        if path == maze.path():
            tasks += 1
            assert len(world.segments(path)) <= 2
        else:
            assert any(word in first for word in world.MOVES)
    assert 20 < tasks < 50


def test_colours_of_no_list_are_often_pure():
    rng = np.random.default_rng(0)
    looks = [lessons.any_look(rng) for _ in range(100)]
    listed = [*world.CIRCLES.values(), *world.GOALS.values()]
    for look in looks:
        assert world.told_apart([look.wall, look.floor, look.circle, look.goal])
        assert look.circle not in listed
    channels = np.array([look.circle for look in looks])
    assert 0.3 < np.isin(channels, [0, 255]).mean() < 0.6


# ------------------------------------------------------------------------------
# The loss of the autoencoder


def test_a_pale_circle_costs_more_than_a_rough_one():
    things = torch.zeros(1, 1, 1, 16, 16)
    things[..., 4:12, 4:12] = 1
    rough = 0.1 * things * torch.where(torch.arange(16) % 2 == 0, 1, -1)
    costs = [train.reconstruction(error.expand(1, 3, 1, 16, 16), 1 + 8 * things, things).item()
             for error in (rough.abs(), rough)]
    assert costs[0] > costs[1] + 0.1


@torch.no_grad()
def test_a_pale_floor_that_comes_out_white_costs():
    """White that comes out white, or cannot be brighter, costs nothing."""
    torch.manual_seed(0)
    vae = train.new_autoencoder(train.Train()).to(train.DEVICE)
    vae.decoder.conv_out.bias += 3  # everything is far too bright
    latents = torch.zeros(1, 16, 2, 2, 2, device=train.DEVICE)
    target = torch.full((1, 3, 5, 16, 16), 0.9, device=train.DEVICE)
    target[..., 8:] = 1
    assert (vae.decode(latents).sample == 1).all()
    error = train.decoded(vae, latents, target) - target
    assert error[..., :8].min() > 1
    assert error[..., 8:].abs().max() == 0


class Shift(torch.nn.Module):
    """An autoencoder that makes everything brighter by as many levels of 255."""

    config = SimpleNamespace(patch_size=1)

    def __init__(self, levels: float):
        super().__init__()
        self.decoder = torch.nn.Identity()
        self.levels = torch.nn.Parameter(torch.tensor(levels))

    def encode(self, x):
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: x))

    def decode(self, z):
        return SimpleNamespace(sample=self.decoder(z + self.levels / 127.5))


def test_errors_that_add_up_cost_most():
    x = torch.zeros(1, 3, 1, 16, 16)
    one, two = (train.chained(Shift(10.0), x, x[:, :1] + 1, x[:, :1], trips).item()
                for trips in (1, 2))
    assert two == pytest.approx(1.5 * one, rel=0.1)


# ------------------------------------------------------------------------------
# Drift


def test_drift_is_counted_in_levels():
    off = drift.drift(Shift(2.0), 3)
    np.testing.assert_allclose(off, np.repeat([[2], [6], [12]], 3, 1), atol=0.01)


@pytest.mark.slow
def test_drift_of_the_shipped_weights():
    vae = AutoencoderKLWan.from_pretrained(SHIPPED, subfolder="vae", torch_dtype=torch.float32)
    floor, wall, circle = drift.drift(vae, 3)[-1]
    assert 3 < floor < 40
    assert 3 < wall < 40
    assert 10 < circle < 80


# ------------------------------------------------------------------------------
# The program


def test_a_stage_goes_on_where_it_stopped(tmp_path):
    """The checkpoint after a kill and a second start is the one of a single start."""
    def go(work, stop: int) -> bytes:
        settings = train.Train(work=work, save_every=2)
        torch.manual_seed(0)
        module = torch.nn.Linear(2, 2)
        stage = train.Stage(settings, "toy", 7, module, [train.adam(module.parameters(), 1e-2)])
        for i in stage.steps():
            if i == stop:
                break
            stage.step(module(torch.tensor([1.0, i])).square().sum())
        return (work / "toy.pt").read_bytes()

    once, twice = tmp_path / "once", tmp_path / "twice"
    once.mkdir()
    twice.mkdir()
    whole = go(once, 7)
    assert go(twice, 5) != whole
    assert go(twice, 7) == whole == go(twice, 7)


def test_other_settings_on_the_same_folder_are_refused(tmp_path, capsys):
    train.Train(work=tmp_path).begin()
    before = (tmp_path / "settings.json").read_bytes()
    assert train.main(["--work", str(tmp_path), "--seed", "1"]) == 2
    err = capsys.readouterr().err
    assert "Choose another --work." in err
    assert err.count("\n") == 1
    assert (tmp_path / "settings.json").read_bytes() == before


def weights(folder) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*/*.safetensors"))]


@pytest.mark.slow
def test_a_whole_training_in_small(tmp_path, capsys, monkeypatch):
    """Two batches of each stage, stopped in each: the weights are those of one start.

    The pipeline loads them.
    """
    once, again = tmp_path / "once", tmp_path / "again"
    assert train.main([*TOY, "--work", str(once)]) == 0
    assert "Levels of 255" in capsys.readouterr().out

    def kill(stage, loss):
        if stage.path.stem == name and stage.i == 1:
            raise KeyboardInterrupt
        step(stage, loss)

    step = train.Stage.step
    for name in ("pictures", "clips", "transformer"):
        with monkeypatch.context() as patch:
            patch.setattr(train.Stage, "step", kill)
            assert train.main([*TOY, "--work", str(again)]) == 130
    assert train.main([*TOY, "--work", str(again)]) == 0
    assert len(weights(once / "tiny-wan")) == 3
    assert weights(once / "tiny-wan") == weights(again / "tiny-wan")

    wan = TinyWan(vgm=str(once / "tiny-wan"), sampling_steps=1)
    maze = world.make(4, 1, np.random.default_rng(0))
    clip = wan(world.draw(maze), world.task(maze), 2.0, 0)
    assert clip.frames.shape == (17, 64, 64, 3)
