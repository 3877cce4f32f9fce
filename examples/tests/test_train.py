"""Tests of maze/train.py: the wider decoder, its figures, and a whole training in small."""

import itertools
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from examples import cli
from examples.maze import train, world

slow = pytest.mark.skipif(not os.environ.get("COLLABVR_SLOW"), reason="set COLLABVR_SLOW=1")


def parameters(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@torch.no_grad()
def test_a_widened_decoder_draws_what_the_narrow_one_drew():
    torch.manual_seed(0)
    narrow = train.new_vae().to(train.DEVICE)
    latents = torch.randn(1, 16, 3, 4, 4, device=train.DEVICE)
    drawn = narrow.decode(latents).sample
    wide = train.widened(narrow, seed=0)
    wider = train.widened(wide, seed=1)
    assert drawn.std() > 0.01
    for vae, width in (wide, 32), (wider, 64):
        assert vae.config.decoder_base_dim == width
        assert torch.equal(parameters(vae.encoder), parameters(narrow.encoder))
        torch.testing.assert_close(vae.decode(latents).sample, drawn, atol=1e-4, rtol=1e-4)
    weight = wide.decoder.conv_out.weight  # the two copies of a channel are read differently
    assert (weight[:, 0::2] - weight[:, 1::2]).abs().mean() > 0.1 * weight.abs().mean()


def test_colours_of_no_list_can_be_told_apart_and_many_are_pure():
    rng = np.random.default_rng(0)
    looks = [train.any_look(rng) for _ in range(100)]
    listed = [*world.CIRCLES.values(), *world.GOALS.values()]
    for look in looks:
        colours = [look.wall, look.floor, look.circle, look.goal]
        assert min(world.distance(a, b) for a in colours for b in colours if a != b) > 75
        assert 0.27 <= look.radius <= 0.41 and 0.27 <= look.half <= 0.5
        assert look.circle not in listed
    channels = np.array([look.circle for look in looks])
    assert 0.3 < np.isin(channels, [0, 255]).mean() < 0.6


def test_pieces_of_a_clip_are_whole():
    clip = torch.arange(17.0).view(1, 1, 17, 1, 1)
    for length, first, starts in (1, 6, [6, 7, 8, 9]), (5, 2, [2, 7, 12]), (17, 0, [0]):
        cut = train.pieces(clip, length, first, len(starts)).flatten(1)
        assert cut.tolist() == [list(range(k, k + length)) for k in starts]


def test_unseen_clips_are_of_their_kind():
    for kind in train.KINDS:
        for x in itertools.islice(train.unseen(kind, 0), 30):
            assert ("Correction" in x.prompt) == (kind == "evolved moves"), x.prompt
            if "segment" in kind:
                assert len(world.segments(x.path)) == int(kind[0])
                assert x.path[-1] == x.maze.goal
            else:
                begin, end = x.path
                assert begin[0] == end[0] or begin[1] == end[1]
                assert any(word in x.prompt for word in world.MOVES), x.prompt


def test_a_pale_circle_costs_more_than_a_rough_one():
    things = torch.zeros(1, 1, 1, 16, 16)
    things[..., 4:12, 4:12] = 1
    rough = 0.1 * things * torch.where(torch.arange(16) % 2 == 0, 1, -1)
    pale, weight = rough.abs(), 1 + 8 * things
    costs = [train.reconstruction(error.expand(1, 3, 1, 16, 16), weight, things).item()
             for error in (pale, rough)]
    assert costs[0] == pytest.approx(costs[1] + 0.1, rel=0.01)


@torch.no_grad()
def test_a_pale_floor_that_comes_out_white_costs_something_and_white_that_does_nothing():
    torch.manual_seed(0)
    vae = train.new_vae().to(train.DEVICE)
    vae.decoder.conv_out.bias += 3  # everything is far too bright
    latents = torch.zeros(1, 16, 2, 2, 2, device=train.DEVICE)
    target = torch.full((1, 3, 5, 16, 16), 0.9, device=train.DEVICE)
    target[..., 8:] = 1
    assert (vae.decode(latents).sample == 1).all()
    error = train.decoded(vae, latents, target) - target
    assert error[..., :8].min() > 1 and error[..., 8:].abs().max() == 0
    target[..., 8:] = -1
    assert (train.decoded(vae, latents, target)[..., 8:] == 1).all()


def test_a_stage_is_trained_no_further_once_a_later_one_has_begun(tmp_path):
    settings = train.Train(work=tmp_path)

    def steps(name):
        module = torch.nn.Linear(1, 1)
        stage = settings.stage(name, module, [train.adam(module.parameters(), 1e-3)], 5)
        taken = 0
        for _ in stage.steps():
            stage.step(module(torch.ones(1)).sum())
            taken += 1
        return taken

    assert steps("widened") == 5, "which stands alone"
    assert steps("vae") == 5 and steps("vae") == 0
    settings.minutes = 0.02
    assert steps("vae-crops") > 0
    settings.minutes = 60
    assert steps("vae") == 0


def test_colour_errors_are_levels_of_circle_and_goal():
    """A VAE that makes everything grey is off by as much as the colours differ from grey."""
    def encode(x):
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: x))

    vae = SimpleNamespace(encode=encode)
    for pictures in train.foreign_pictures(3, 8), train.own_pictures(3, 8):
        vae.decode = lambda z: SimpleNamespace(sample=0 * z)
        for off, (maze, _) in zip(train.colour_errors(vae, pictures), pictures, strict=True):
            look = maze.look
            expected = np.abs(np.array([look.circle, look.goal]) - 127.5).mean()
            assert off == pytest.approx(expected, abs=4), look
        vae.decode = lambda z: SimpleNamespace(sample=z)
        assert train.colour_errors(vae, pictures) == [0] * 8


@pytest.mark.parametrize("argv, said", [
    (["--widen", "{}"], "is no diffusers folder"),
    (["--widen", "{}", "--check"], "does not go with --widen"),
    (["--widen", "{}", "--out", "{}"], "--widen would overwrite"),
    (["--check", "--out", "{}"], "is no diffusers folder"),
    (["--check", "--check-clips", "0"], "--check needs clips"),
    (["--minutes", "0"], "--minutes must be more than 0"),
    (["--vae-iterations", "0"], "--vae-iterations must be at least 1"),
])
def test_what_cannot_be_trained_gets_one_sentence_and_status_2(argv, said, tmp_path, capsys):
    argv = [word.format(tmp_path / "nothing") for word in argv]
    work = tmp_path / "work"
    assert train.main([*argv, "--work", str(work)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err
    assert err.startswith(f"{cli.program()}: ") and not work.exists()


@slow
def test_a_training_goes_on_where_it_stopped_and_its_decoder_can_be_widened(
        tmp_path, capsys, monkeypatch):
    """All five stages, each for a moment; then the third alone, in two starts."""
    monkeypatch.setattr(train, "PART", 2)  # batches in a file of latents
    first, second = tmp_path / "first", tmp_path / "second"
    argv = ["--work", str(first), "--minutes", "0.1", "--check-clips", "1"]
    assert train.main(argv) == 0
    said = capsys.readouterr().out
    assert "Unseen clips that come out right" in said and "PSNR" in said
    stages = sorted(path.name for path in first.glob("*.pt"))
    assert stages == ["decoder.pt", "denoiser.pt", "latents-000.pt", "vae-crops.pt", "vae.pt"]
    times = [path.stat().st_mtime for path in sorted(first.glob("latents-*.pt"))]
    assert train.main(argv) == 0, "all that it had is read again"
    assert [path.stat().st_mtime for path in sorted(first.glob("latents-*.pt"))] == times
    made = first / "tiny-wan"
    assert json.loads((made / "vae" / "config.json").read_text())["decoder_base_dim"] == 32

    widen = ["--widen", str(made), "--check-clips", "0"]
    for iterations in 1, 2:
        assert train.main([*widen, "--work", str(second), "--vae-iterations", str(iterations)]) == 0
        assert torch.load(second / "widened.pt", weights_only=True)["i"] == iterations
    wide = train.load(second / "tiny-wan")
    assert wide.vae.config.decoder_base_dim == 64
    assert torch.equal(parameters(wide.vae.encoder), parameters(train.load(made).vae.encoder))
    assert torch.equal(parameters(wide.transformer), parameters(train.load(made).transformer))

    capsys.readouterr()
    again = ["--widen", str(second / "tiny-wan"), "--work", str(second), "--check-clips", "0"]
    assert train.main([*again, "--out", str(tmp_path / "third")]) == 2, "not on another's decoder"
    assert "Name another --work" in capsys.readouterr().err


@slow
def test_another_encoder_s_decoder_is_not_continued(tmp_path, capsys):
    torch.manual_seed(1)
    argv = ["--work", str(tmp_path), "--widen", str(train.SHIPPED), "--check-clips", "0"]
    settings = train.Train(work=tmp_path, widen=train.SHIPPED, vae_iterations=1)
    other = train.widened(train.load(train.SHIPPED).vae, 0)
    for p in other.encoder.parameters():
        p.data += 0.01
    train.vae_stage(settings, "widened", other, other.decoder, 1e-3, train.colour_batch,
                    lambda *_: 1)
    assert train.main(argv) == 2
    assert "is of another encoder. Name another --work." in capsys.readouterr().err
