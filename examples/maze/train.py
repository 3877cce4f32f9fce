"""Train tiny-wan, the maze world's video generator, from nothing.

    python -m examples.maze.train                # hours on two CPU cores
    python -m examples.maze.train --minutes 5    # as far as one gets in that time: for a GPU
    python -m examples.maze.train --check        # train nothing, compare it with the shipped one
    python -m examples.maze.train --widen examples/maze/tiny-wan --out wider    # only stage 3

The result is a folder that diffusers' WanImageToVideoPipeline loads: Wan's own VAE, transformer,
text encoder and scheduler classes, only very small. There are five stages:

1. vae        the VAE learns to compress maze clips, on whole boards
2. vae-crops  and looks closely at what happens, on cuttings around the circle
3. decoder    its decoder, made twice as wide, learns to give any colour back; latents stay
4. latents    a data set is compressed once
5. denoiser   the transformer and the text encoder learn rectified flow on it

The same command goes on where it was stopped; two minutes are lost at most. In the end the result
is compared with the shipped one, on 500 clips from each (`--check-clips`): some 50 minutes more on
two cores. A CUDA GPU is used if there is one; its batches are larger (`--scale`), and other
processes draw the clips (`--workers`).

What it is trained on has a short horizon, as real generators have: single moves, and whole tasks of
one or two straight segments.
"""
from __future__ import annotations

import copy
import itertools
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from collabvr import Problem
from examples import cli, stats
from examples.maze import foreign, moves, rule, world

SHIPPED = Path(__file__).parent / "tiny-wan"
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NUM_FRAMES = 17  # 2 s at 8 fps
TOKENS = 96  # of a prompt at most, four corrections included
SIZES = range(4, 9)  # cells a side
SHARES = {  # of --minutes
    "vae": 0.2, "vae-crops": 0.1, "decoder": 0.2, "latents": 0.1, "denoiser": 0.4}


# ------------------------------------------------------------------------------
# What it is trained on


WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]


@dataclass(frozen=True)
class Example:
    """A clip to learn from. path: what the prompt asks for; it may start between two cells."""

    maze: world.Maze
    path: list
    prompt: str


def example(n: int, rng: np.random.Generator, horizon: int = 2,
            look: world.Look | None = None) -> Example:
    """One third are whole tasks of at most `horizon` straight segments, the others single moves.

    look: the colours and sizes (default: `training_look`).
    """
    look = look or training_look(rng)
    thing, goal = names(look, rng)
    if rng.random() < 1 / 3:
        return whole_task(n, rng, horizon, look, thing, goal)
    return single_move(n, rng, look, thing, goal)


def names(look: world.Look, rng) -> tuple[str, str]:
    """What a prompt calls the circle, and the colour of the goal: "the blue ball", "green"."""
    noun = rng.choice(["circle", "circle", "circle", "ball", "dot"])
    return f"the {moves.colour_word(look.circle)} {noun}", moves.colour_word(look.goal)


def training_look(rng: np.random.Generator) -> world.Look:
    """Half of them in colours of no list, so that shapes and not colours say what is what.

    Dark floors are more frequent than in the palettes: a circle on them is the hardest to learn.
    """
    dark = rng.random() < 0.3
    while True:
        look = world.make_look(rng, free=0.6)
        if not dark or sum(look.floor) <= 300:
            return look


def any_look(rng: np.random.Generator) -> world.Look:
    """Colours and sizes as other programs draw them: colours of no list, and many pure ones."""
    while True:
        colours = [tuple(any_colour(rng)) for _ in range(4)]
        if rng.random() < 0.4:
            colours[:2] = world.THEMES[rng.integers(len(world.THEMES))]
        if world.told_apart(colours):
            half = rng.choice([rng.uniform(0.27, 0.42), 0.5], p=[0.85, 0.15])
            return world.Look(*colours, radius=rng.uniform(0.27, 0.41), half=half)


def any_colour(rng: np.random.Generator) -> list[int]:
    """RGB, 0..255. A channel is 0 or 255 two times in five."""
    return [int(rng.choice([0, 255])) if rng.random() < 0.4 else int(rng.integers(256))
            for _ in range(3)]


def mixed_look(rng: np.random.Generator) -> world.Look:
    """Half `any_look`, half `training_look`: without it the palettes are forgotten."""
    return any_look(rng) if rng.random() < 0.5 else training_look(rng)


def whole_task(n, rng, horizon: int, look: world.Look, thing: str, goal: str) -> Example:
    while True:
        maze = world.make(n, int(rng.integers(1, horizon + 1)), rng, look)
        path = maze.path()
        if len(path) <= 9:
            return Example(maze, path, task_prompt(thing, goal, rng))


def single_move(n, rng, look: world.Look, thing: str, goal: str) -> Example:
    """A straight move. Some prompts are corrected, as `evolve` corrects them."""
    maze = world.make(n, None, rng, look)
    start, direction, free = place_to_move(maze, rng)
    move = np.array(world.MOVES[direction])
    k = int(rng.integers(1, free + 1))  # cells that it goes
    end = tuple(np.add(start, k * move))

    # The rest of a move, as regen asks for it: from a little before or after a cell's centre, and
    # the first order was longer.
    asked, offset = k, 0.0
    if rng.random() < 0.3 and k < 7:
        offset = rng.uniform(-0.5, 0.5)
        asked = min(k + int(rng.integers(0, 3)), 7)
    begin = start
    beside = start + move * int(np.sign(offset))  # the cell that the circle then reaches into
    if world.is_corridor(maze.corridors, beside):
        begin = tuple(np.add(start, offset * move))

    # Arriving on the goal is the hardest move.
    ends_on_goal = rng.random() < 0.3 or maze.goal == start
    if ends_on_goal:
        maze = world.Maze(maze.corridors, start, end, look)
    else:
        maze = world.Maze(maze.corridors, start, maze.goal, look)
    stop_at = goal if end == maze.goal else None
    prompt = move_prompt(thing, direction, k, asked, k == free, stop_at, rng)
    return Example(maze, [begin, end], prompt)


def place_to_move(maze: world.Maze, rng) -> tuple[tuple, str, int]:
    """A corridor cell, a direction, and how many cells are free there."""
    cells = [tuple(map(int, c)) for c in np.argwhere(maze.corridors)]
    while True:
        start = cells[rng.integers(len(cells))]
        direction = str(rng.choice(list(world.MOVES)))
        free = free_run(maze.corridors, start, direction)
        if free > rng.integers(4):  # long moves are rarer in a maze, not less wanted
            return start, direction, free


def free_run(corridors, cell, direction: str) -> int:
    """How many corridor cells lie ahead of a cell before a wall."""
    k, move = 0, np.array(world.MOVES[direction])
    while world.is_corridor(corridors, tuple(cell + (k + 1) * move)):
        k += 1
    return k


def task_prompt(thing: str, goal: str, rng) -> str:
    """A whole task in varied words, some with a correction after them."""
    text = str(rng.choice(moves.whole_tasks(thing, goal)))
    if rng.random() < 0.2:
        kept = rng.choice([moves.INSIDE, moves.WHOLE])
        text += f" Correction: {moves.move(thing, f'to the {goal} square')}{kept}."
    return text


def move_prompt(thing: str, direction: str, k: int, asked: int, at_wall: bool,
                goal: str | None, rng) -> str:
    """A single move in varied words. Where corrections follow, the last one counts.

    k: cells that it goes; asked: cells that the first order asks for; goal: the colour of the goal
    if the move ends there.
    """
    tail = rng.choice([
        "", "", " Nothing else moves.", " It stays inside the corridor.",
        " The walls do not change."])
    if asked == k and rng.random() < 0.12 and (at_wall or goal):
        end = "wall" if at_wall else f"{goal} square"
        return f"Move {thing} {direction} until the {end}.{tail}"

    verb = rng.choice(["Move", "Move", "Slide"])
    text = f"{verb} {thing} {distance(direction, asked, rng)}.{tail}"
    for _ in range(rng.choice([0, 1, 2, 3], p=[0.55, 0.25, 0.12, 0.08])):
        other_counts = [m for m in range(8) if m != asked]
        other_directions = [d for d in world.MOVES if d != direction]
        wrong = rng.choice([*map(str, other_counts), *other_directions])
        kept = rng.choice([moves.INSIDE, moves.WHOLE])
        fix = rng.choice([moves.but_not(wrong), moves.but_not(wrong), kept, moves.NO_JUMP])
        text += f" Correction: {moves.move(thing, distance(direction, asked, rng))}{fix}."
    if asked != k:
        text += f" Correction: {moves.rest(thing, distance(direction, k, rng))}"
    return text


def distance(direction: str, count: int, rng) -> str:
    """'left 2 cells', 'two cells left' or 'two cells to the left'."""
    number = str(count) if rng.random() < 0.7 else WORDS[count]
    cells = moves.cells(number)
    side = direction
    if direction in ("left", "right") and rng.random() >= 0.5:
        side = f"to the {direction}"
    if rng.random() < 0.6:
        return f"{direction} {cells}"
    return f"{cells} {side}"


# ------------------------------------------------------------------------------
# Clips in batches, drawn by other processes in advance


class Batches(Dataset):
    """Batch i is make(i, seed, scale), for any i."""

    def __init__(self, make: Callable, seed: int, scale: int):
        self.make, self.seed, self.scale = make, seed, scale

    def __getitem__(self, i: int):
        return self.make(i, self.seed, self.scale)


def in_advance(batches: Batches, first: int, workers: int) -> Iterator:
    """Batch `first` and those after it, without an end. workers: 0 makes them when needed."""
    return iter(DataLoader(batches, batch_size=None, sampler=range(first, 2**40),
                           num_workers=workers, worker_init_fn=end_with_the_parent,
                           pin_memory=CUDA))


def end_with_the_parent(_: int) -> None:
    """Ctrl-C is the parent's business, and its handler of SIGTERM is not for a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def drawn(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Their films, uint8 (B, 17, H, W, 3), and their boards, uint8 (B, H, W, 3)."""
    films = np.stack([world.film(x.maze, x.path, NUM_FRAMES) for x in examples])
    boards = np.stack([world.board(x.maze) for x in examples])
    return torch.from_numpy(films), torch.from_numpy(boards)


def video(films: torch.Tensor) -> torch.Tensor:
    """From uint8 (B, T, H, W, 3) to what the VAE takes: float32 (B, 3, T, H, W) in -1..1."""
    films = films.to(DEVICE, non_blocking=True)
    return films.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def moving(x: torch.Tensor) -> torch.Tensor:
    """Which pixels of videos (B, 3, T, H, W) change, bool (B, 1, T, H, W)."""
    return (x - x.mean(2, keepdim=True)).abs().amax(1, keepdim=True) > 0.05


# ------------------------------------------------------------------------------
# A stage of training


class Stage:
    """Optimizers, a cosine schedule, a moving average, and a checkpoint every two minutes.

    optimizers: (peak learning rate, optimizer) each
    iterations: how many there are, or, with `seconds`, as many as fit into that time
    over: the checkpoint is final
    """

    def __init__(self, path: Path, modules: torch.nn.Module, optimizers: list,
                 iterations: int, seconds: float | None, over: bool):
        self.path, self.modules, self.optimizers = path, modules, optimizers
        self.iterations, self.seconds, self.over = iterations, seconds, over
        self.average = copy.deepcopy(modules).requires_grad_(False)
        self.i = 0
        self.spent = 0.0  # seconds, in earlier starts
        self.began = self.saved = time.monotonic()
        if path.exists():
            self.load()
        self.quarters = int(4 * self.progress())

    def progress(self) -> float:
        """From 0 to 1."""
        if self.over:
            return 1.0
        if self.seconds is None:
            return self.i / self.iterations
        return min(1.0, (self.spent + time.monotonic() - self.began) / self.seconds)

    def steps(self) -> Iterator[int]:
        """The numbers of the iterations that are still to be done."""
        total = None if self.seconds else self.iterations
        with tqdm(total=total, initial=self.i, desc=self.path.stem, mininterval=10) as self.bar:
            while self.progress() < 1:
                yield self.i
                self.i += 1
                self.bar.update()
                if time.monotonic() - self.saved > 120:
                    self.save()
        self.save()

    def step(self, loss: torch.Tensor) -> None:
        """One update of the weights and of their moving average."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        warm = min(1.0, (self.i + 1) / 100)
        cosine = 0.5 + 0.5 * math.cos(math.pi * self.progress())
        for peak, optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * warm * (0.02 + 0.98 * cosine)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(0.998, (self.i + 1) / (self.i + 20))
        with torch.no_grad():
            for a, p in zip(self.average.parameters(), self.modules.parameters(), strict=True):
                a.lerp_(p, 1 - decay)
        if self.i % 50 == 0:  # reading the loss waits for the GPU
            self.bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)

    def quarter_is_over(self) -> bool:
        """Whether another quarter of the stage has gone by since the last time."""
        before, self.quarters = self.quarters, int(4 * self.progress())
        return self.quarters > before

    def save(self) -> None:
        now = time.monotonic()
        self.spent += now - self.began
        self.began = self.saved = now
        write(self.path, {
            "modules": self.modules.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for _, optimizer in self.optimizers],
            "i": self.i,
            "spent": self.spent,
        })

    def load(self) -> None:
        state = torch.load(self.path, "cpu", weights_only=True)
        try:
            self.modules.load_state_dict(state["modules"])
            self.average.load_state_dict(state["average"])
            for (_, optimizer), old in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(old)
        except (RuntimeError, ValueError) as error:
            raise Problem(f"{self.path} is of another model. Name another --work.") from error
        self.i, self.spent = state["i"], state["spent"]


def write(path: Path, what) -> None:
    """A file of tensors, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    torch.save(what, temporary)
    temporary.replace(path)


def adam(parameters, peak: float) -> tuple[float, torch.optim.Optimizer]:
    return peak, torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)


def muon(matrices, peak: float) -> tuple[float, torch.optim.Optimizer]:
    return peak, torch.optim.Muon(
        matrices, lr=peak, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")


# ------------------------------------------------------------------------------
# Stages 1 to 3: the VAE


WHOLE_BOARDS = [(4, 6), (5, 4), (6, 3), (7, 2), (8, 2)]  # cells a side, clips: about equal pixels
CROP = 4  # cells a side


def new_vae() -> AutoencoderKLWan:
    """Wan's video autoencoder, 0.67 M parameters: 4x in time and 8x in space as in Wan2.2 A14B,
    two of the 8 by patches."""
    return AutoencoderKLWan(
        base_dim=16, z_dim=16, dim_mult=[1, 2, 2], num_res_blocks=1,
        temperal_downsample=[True, True], patch_size=2, in_channels=12, out_channels=12)


def board_batch(i: int, seed: int, scale: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch i of stage 1: whole boards of one size."""
    return whole_boards(np.random.default_rng([seed, 1, i]), scale, training_look)


def crop_batch(i: int, seed: int, scale: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch i of stage 2: cuttings, and sometimes whole boards, for the attention in the middle."""
    return cuttings(np.random.default_rng([seed, 6, i]), scale, training_look)


def colour_batch(i: int, seed: int, scale: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch i of stage 3: the same, half of it in any colours and sizes."""
    return cuttings(np.random.default_rng([seed, 8, i]), scale, mixed_look)


def cuttings(rng, scale: int, draw_look: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    if rng.random() < 0.12:
        return whole_boards(rng, scale, draw_look)
    films, boards = zip(*[crop(rng, draw_look) for _ in range(6 * scale)], strict=True)
    return torch.cat(films), torch.cat(boards)


def whole_boards(rng, scale: int, draw_look: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    n, count = WHOLE_BOARDS[rng.integers(len(WHOLE_BOARDS))]
    return drawn([example(n, rng, 3, draw_look(rng)) for _ in range(count * scale)])


def crop(rng, draw_look: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """One clip, cut to 4 x 4 cells around a place of the walk, often its end, often on the goal."""
    n = int(rng.integers(SIZES.start, SIZES.stop))
    while True:
        x = example(n, rng, 3, draw_look(rng))
        if tuple(x.maze.goal) == tuple(x.path[-1]) or rng.random() < 0.6:
            break
    place = x.path[-1]
    if rng.random() < 0.5:
        place = x.path[rng.integers(len(x.path))]
    films, boards = drawn([x])
    corner = [int(np.clip(round(p) - rng.integers(CROP), 0, n - CROP)) for p in place]
    rows, columns = (slice(k * world.CELL, (k + CROP) * world.CELL) for k in corner)
    return films[:, :, rows, columns], boards[:, rows, columns]


def circle_and_goal(x: torch.Tensor, boards: torch.Tensor) -> torch.Tensor:
    """Which pixels of videos (B, 3, T, H, W) differ from their boards, float (B, 1, T, H, W)."""
    return ((x - video(boards[:, None])).abs().amax(1, keepdim=True) > 0.1).float()


def pieces(x: torch.Tensor, length: int, first: int, count: int) -> torch.Tensor:
    """From frame `first` on, videos (B, C, 17, H, W) cut into `count` pieces of that length."""
    return torch.cat(x[:, :, first : first + count * length].split(length, 2))


def round_trip(vae, x: torch.Tensor) -> torch.Tensor:
    """Videos (B, 3, T, H, W), encoded and decoded."""
    return vae.decode(vae.encode(x).latent_dist.mode()).sample


def reconstruction(error: torch.Tensor, weight: torch.Tensor, things: torch.Tensor) -> torch.Tensor:
    """The loss of a reconstruction. `things` (circle and goal) also count by the mean colour of
    their part in each block of 8 x 8, because a pale circle is worse than a rough one."""
    pixels = (weight * (error.abs() + 2 * error.square())).sum() / weight.sum()
    tint = F.avg_pool3d(error * things, (1, 8, 8)).abs().sum()
    area = F.avg_pool3d(things, (1, 8, 8)).sum().clamp(min=1)
    return (pixels + tint / area) / 3


def train_vae(settings: Train) -> AutoencoderKLWan:
    """Two stages for the whole of it, each with its own cosine, then one for a wider decoder.

    The first sees short pieces, then whole clips: a causal VAE that never saw 17 frames drifts
    after those that it saw.
    """
    def length_of_boards(progress: float, _) -> int:
        if progress < 0.45:
            return 5
        return 9 if progress < 0.65 else NUM_FRAMES

    def length_of_crops(_, rng) -> int:
        return 5 if rng.random() < 0.3 else NUM_FRAMES

    torch.manual_seed(settings.seed)
    vae = new_vae().to(DEVICE)
    vae = vae_stage(settings, "vae", vae, vae, 2e-3, board_batch, length_of_boards)
    vae = vae_stage(settings, "vae-crops", vae, vae, 1e-3, crop_batch, length_of_crops)
    return train_decoder(settings, vae)


def train_decoder(settings: Train, vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """The VAE with a decoder of twice the channels, which has learned to give back the colours that
    the narrow one lost. The encoder stays, and with it all latents and what the denoiser knows."""
    def length_of(_, rng) -> int:
        return int(rng.choice([1, 5, NUM_FRAMES], p=[0.3, 0.2, 0.5]))

    vae = widened(vae, settings.seed)
    name = "widened" if settings.widen else "decoder"
    return vae_stage(settings, name, vae, vae.decoder, 6e-4, colour_batch, length_of).eval()


def widened(vae: AutoencoderKLWan, seed: int) -> AutoencoderKLWan:
    """The same function with twice the channels in the decoder (Net2Net, Chen et al. 2016).

    Each channel is there twice, and whoever reads it takes a share of it from either copy. The
    shares are random, so that the copies learn different things.
    """
    width = vae.config.decoder_base_dim or vae.config.base_dim
    options = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    wide = AutoencoderKLWan(**(options | {"decoder_base_dim": 2 * width})).to(DEVICE)
    for part in ("encoder", "quant_conv", "post_quant_conv"):
        getattr(wide, part).load_state_dict(getattr(vae, part).state_dict())
    rng = torch.Generator().manual_seed(seed)
    state = wide.decoder.state_dict()
    for name, old in vae.decoder.state_dict().items():
        shape = state[name].shape
        if shape[0] == 2 * len(old):  # output channels
            old = old.repeat_interleave(2, 0)
        if len(shape) > 1 and shape[1] == 2 * old.shape[1]:  # input channels
            share = 0.5 + 0.5 * torch.randn(old.shape[:2], generator=rng).to(DEVICE)
            share = share.view(*old.shape[:2], *[1] * (len(shape) - 2))
            old = torch.stack([share * old, (1 - share) * old], 2).flatten(1, 2)
        if "to_qkv" in name:  # attention divides q k by the root of the channels
            old[: len(old) // 3] /= math.sqrt(2)
        state[name] = old
    wide.decoder.load_state_dict(state)
    return wide


def vae_stage(settings: Train, name: str, vae, learner: torch.nn.Module, peak: float,
              batch: Callable, length_of: Callable) -> AutoencoderKLWan:
    """The moving average of a VAE after a stage of reconstruction, in which `learner`, the whole of
    it or a part, learns."""
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):  # a quarter faster on a CPU
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last_3d)
    vae.requires_grad_(False)
    learner.requires_grad_(True)
    before = frozen(vae)
    stage = settings.stage(name, vae, [adam(learner.parameters(), peak)], settings.vae_iterations)
    if not all(map(torch.equal, before, frozen(vae))):
        raise Problem(f"{stage.path} is of another encoder. Name another --work.")

    def report() -> None:
        off = np.mean(colour_errors(stage.average, foreign_pictures(settings.seed, 12)))
        ratio = np.mean(psnr(stage.average, settings.seed, 5))
        tqdm.write(f"{name} {stage.i}: PSNR {ratio:.1f} dB, colours {off:.1f} levels off",
                   file=sys.stderr)

    batches = Batches(batch, settings.seed, settings.scale)
    clips = in_advance(batches, stage.i, settings.workers)
    for i in stage.steps():
        if stage.quarter_is_over():
            report()
        films, boards = next(clips)
        rng = np.random.default_rng([settings.seed, 7, i])
        length = length_of(stage.progress(), rng)
        count = min(4, NUM_FRAMES // length)
        first = int(rng.integers(NUM_FRAMES - count * length + 1))
        x = video(films)
        things = circle_and_goal(x, boards)
        weight = 1 + 8 * things + 12 * moving(x).float()  # circle and goal, and most what moves
        x, things, weight = (pieces(v, length, first, count) for v in (x, things, weight))
        weight[:, :, 0] *= 1 + length / 8  # the next clip will start from a frame 0

        posterior = vae.encode(x).latent_dist
        noise = torch.Generator(DEVICE).manual_seed(i)
        error = decoded(vae, posterior.sample(noise), x) - x
        loss = reconstruction(error, weight, things)
        spread = posterior.mean.square() + posterior.var - 1 - posterior.logvar
        stage.step(loss + 1e-4 * spread.mean())
    report()
    return stage.average


def frozen(module: torch.nn.Module) -> list[torch.Tensor]:
    """Copies of the parameters that do not learn."""
    return [p.clone() for p in module.parameters() if not p.requires_grad]


def decoded(vae, latents: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """What the decoder draws. It is cut off at -1 and 1 only where the target lies there too.

    The VAE cuts off everywhere, and would never learn that a pale floor came out white.
    """
    parts: list[torch.Tensor] = []
    hook = vae.decoder.register_forward_hook(lambda module, inputs, part: parts.append(part))
    vae.decode(latents)
    hook.remove()
    whole = unpatchify(torch.cat(parts, 2), vae.config.patch_size)
    return torch.where(target.abs() < 1, whole, whole.clamp(-1, 1))


# ------------------------------------------------------------------------------
# Stage 4: latents


PART = 25  # batches in a file


def latent_batch(i: int, seed: int, scale: int) -> tuple[torch.Tensor, list[str]]:
    """Batch i: films of one size, uint8 (B, 17, H, W, 3), and their prompts."""
    rng = np.random.default_rng([seed, 3, i])
    n = int(rng.integers(SIZES.start, SIZES.stop))
    examples = [example(n, rng) for _ in range(4 * scale)]
    return drawn(examples)[0], [x.prompt for x in examples]


@torch.no_grad()
def make_latents(settings: Train, vae) -> list[dict]:
    """The data set in batches, each of one size:

    x          latents of the clips, half (B, 16, 5, 2 n, 2 n)
    condition  latents of their conditioning frames, the same shape
    moving     where something moves, bool (B, 1, 5, 2 n, 2 n)
    prompts    B texts
    """
    seconds = settings.seconds("latents")
    data_set: list[dict] = []
    clips, spent = 0, 0.0
    drawn_clips = None
    for number in itertools.count():
        out_of_time = seconds is not None and spent >= seconds and data_set
        if clips >= settings.clips * settings.scale or out_of_time:
            return data_set
        path = settings.work / f"latents-{number:03d}.pt"
        if not path.exists():
            began = time.monotonic()
            if drawn_clips is None:
                batches = Batches(latent_batch, settings.seed, settings.scale)
                drawn_clips = in_advance(batches, number * PART, settings.workers)
            compressed = [compress(vae, *next(drawn_clips), seed=number * PART + k)
                          for k in range(PART)]
            write(path, {"batches": compressed, "seconds": time.monotonic() - began})
            print(f"latents: {clips + sum(len(x['prompts']) for x in compressed)} clips",
                  file=sys.stderr)
        part = torch.load(path, weights_only=True)
        data_set += part["batches"]
        clips += sum(len(x["prompts"]) for x in part["batches"])
        spent += part["seconds"]


def compress(vae, films: torch.Tensor, prompts: list[str], seed: int) -> dict:
    """Half of the conditioning frames have been through the VAE and some noise, as the last frame
    of a generated clip has, while the target is clean: so errors do not add up."""
    x = video(films)
    first = x[:, :, :1].clone()
    half = len(x) // 2
    worn = round_trip(vae, first[:half])
    noise = torch.randn(worn.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    first[:half] = (worn + 0.03 * noise).clamp(-1, 1)
    condition = torch.cat([first, torch.zeros_like(x[:, :, 1:])], 2)
    return {
        "x": vae.encode(x).latent_dist.mode().half().cpu(),
        "condition": vae.encode(condition).latent_dist.mode().half().cpu(),
        "moving": latent_moving(x).cpu(),
        "prompts": list(prompts),
    }


def latent_moving(x: torch.Tensor) -> torch.Tensor:
    """`moving` on the grid of the latents, and one step around it, because a latent's neighbours
    have a share in what the decoder draws there. A latent is 4 frames (the first: 1) of 8 x 8."""
    pixels = moving(x).float()
    pixels = torch.cat([pixels[:, :, :1].repeat(1, 1, 4, 1, 1), pixels[:, :, 1:]], 2)
    here = F.max_pool3d(pixels, (4, 8, 8))
    return F.max_pool3d(here, (1, 3, 3), 1, (0, 1, 1)) > 0


def normalise(vae, batches: list[dict]) -> None:
    """The latents' mean and deviation per channel, into the VAE's configuration, where the
    pipeline reads them. 250 batches are enough for that, and fit into memory as floats."""
    channels = [x["x"].float().transpose(0, 1).flatten(1) for x in batches[:250]]
    sample = torch.cat(channels, 1)  # (16, k)
    vae.register_to_config(
        latents_mean=sample.mean(1).tolist(), latents_std=sample.std(1).tolist())


# ------------------------------------------------------------------------------
# Stage 5: text encoder and transformer


def new_tokenizer(prompts: list[str]) -> PreTrainedTokenizerFast:
    """One token a word."""
    splitter = pre_tokenizers.Whitespace()
    words = {word for p in prompts for word, _ in splitter.pre_tokenize_str(p.lower())}
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *sorted(words)])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", model_max_length=TOKENS)


def new_denoiser(vocabulary: int) -> torch.nn.ModuleDict:
    """Wan's transformer with A14B's inputs (noise 16, mask 4, condition 16), and a text encoder of
    two layers."""
    text = UMT5Config(
        vocab_size=vocabulary, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        dropout_rate=0.0, pad_token_id=0, decoder_start_token_id=0)
    transformer = WanTransformer3DModel(
        num_attention_heads=3, attention_head_dim=64, in_channels=36, out_channels=16,
        text_dim=64, freq_dim=64, ffn_dim=768, num_layers=6, rope_max_seq_len=64)
    return torch.nn.ModuleDict(
        {"text_encoder": UMT5EncoderModel(text), "transformer": transformer})


def by_size(batches: list[dict], tokenizer, vae) -> dict[int, dict[str, torch.Tensor]]:
    """The data set by cells a side, on the device, its latents normalised."""
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1)
                 for v in (vae.config.latents_mean, vae.config.latents_std))
    found = {}
    for n in SIZES:
        mine = [x for x in batches if x["x"].shape[-1] == 2 * n]
        if not mine:
            continue
        prompts = [p for x in mine for p in x["prompts"]]
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS,
                           return_tensors="pt")
        data = {key: torch.cat([x[key] for x in mine]) for key in ("x", "condition", "moving")}
        for key in ("x", "condition"):
            data[key] = ((data[key].float() - mean) / std).half()
        data |= {"tokens": tokens.input_ids, "attention": tokens.attention_mask}
        found[n] = {key: value.to(DEVICE) for key, value in data.items()}
    return found


def train_denoiser(settings: Train, vae, batches: list[dict]) -> WanImageToVideoPipeline:
    """Rectified flow with shift 3 in bf16; what moves counts more than what stands. Muon trains
    the matrices of the blocks, AdamW the rest."""
    torch.manual_seed(settings.seed)
    normalise(vae, batches)
    tokenizer = new_tokenizer([p for x in batches for p in x["prompts"]])
    data = by_size(batches, tokenizer, vae)
    modules = new_denoiser(len(tokenizer)).to(DEVICE)
    matrices = [p for p in modules["transformer"].blocks.parameters() if p.ndim == 2]
    ids = {id(p) for p in matrices}
    others = [p for p in modules.parameters() if id(p) not in ids]
    optimizers = [muon(matrices, 1.5e-3), adam(others, 1e-3)]
    stage = settings.stage("denoiser", modules, optimizers, settings.iterations)
    transformer = modules["transformer"]
    if settings.minutes is None:  # compiling takes a good part of a few minutes
        transformer = torch.compile(transformer, dynamic=True)

    known = torch.zeros(1, 4, 5, 1, 1, device=DEVICE)
    known[:, :, 0] = 1  # the conditioning frame
    for i in stage.steps():
        rng = np.random.default_rng([settings.seed, 4, i])
        noise_rng = torch.Generator(DEVICE).manual_seed(i)
        n = int(rng.choice(list(data)))
        rows = data[n]
        count = 864 * settings.scale // n**2  # about equal tokens
        pick = torch.randint(len(rows["x"]), (count,), generator=noise_rng, device=DEVICE)
        x, condition = rows["x"][pick].float(), rows["condition"][pick].float()
        attention = rows["attention"][pick]

        u = torch.rand(count, 1, 1, 1, 1, generator=noise_rng, device=DEVICE)
        sigma = 3 * u / (1 + 2 * u)
        noise = torch.randn(x.shape, generator=noise_rng, device=DEVICE)
        mask = known.expand(count, -1, -1, *x.shape[3:])
        inputs = torch.cat([(1 - sigma) * x + sigma * noise, mask, condition], 1)
        with torch.autocast(DEVICE, torch.bfloat16):
            text = modules["text_encoder"](rows["tokens"][pick], attention).last_hidden_state
            text = text * attention[..., None]  # as the pipeline pads
            flow = transformer(inputs, 1000 * sigma.flatten(), text, return_dict=False)[0]
        weight = 1 + 4 * rows["moving"][pick].float()
        error = (flow.float() - (noise - x)).square()
        stage.step((weight * error).mean() / weight.mean())
    return pipeline(vae, stage.average, tokenizer)


def pipeline(vae, modules, tokenizer) -> WanImageToVideoPipeline:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanImageToVideoPipeline(
        tokenizer, modules["text_encoder"].eval(), vae.eval(), scheduler,
        transformer=modules["transformer"].eval())


def save(pipe, out: Path) -> None:
    """The diffusers folder, weights in bf16 (the VAE too: it is read as fp32)."""
    for part in (pipe.vae, pipe.transformer, pipe.text_encoder):
        part.to(torch.bfloat16)
    pipe.save_pretrained(out, safe_serialization=True)


# ------------------------------------------------------------------------------
# How good it is


KINDS = ["moves", "evolved moves", "1 segment", "2 segments", "3 segments"]


def unseen(kind: str, seed: int) -> Iterator[Example]:
    """Clips of that kind that training never saw, without an end. Whole tasks are in the listed
    palettes, moves in training's looks. The prompt of an evolved move has corrections."""
    rng = np.random.default_rng([seed, 5, KINDS.index(kind)])
    while True:
        n = int(rng.integers(SIZES.start, SIZES.stop))
        if "segment" in kind:
            maze = world.make(n, int(kind[0]), rng)
            path = maze.path()
            yield Example(maze, path, world.task(maze))
            continue
        look = training_look(rng)
        x = single_move(n, rng, look, *names(look, rng))
        if ("Correction" in x.prompt) == (kind == "evolved moves"):
            yield x


def load(folder: Path) -> WanImageToVideoPipeline:
    pipe = WanImageToVideoPipeline.from_pretrained(
        folder, dtype={"default": torch.bfloat16, "vae": torch.float32}).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def is_right(pipe, x: Example, seed: int, sampling_steps: int) -> bool:
    """Whether the circle ends within half a cell of where the prompt wants it, stayed one circle,
    left no corridor and did not jump."""
    side = len(x.maze.corridors) * world.CELL
    embeds, _ = pipe.encode_prompt(
        x.prompt, do_classifier_free_guidance=False, max_sequence_length=TOKENS)
    frames = pipe(
        Image.fromarray(world.draw(x.maze, x.path[0])), prompt_embeds=embeds, height=side,
        width=side, num_frames=NUM_FRAMES, guidance_scale=1.0,
        num_inference_steps=sampling_steps,
        generator=torch.Generator().manual_seed(seed)).frames[0]
    score = rule.score((frames * 255).round().astype(np.uint8), x.maze)
    near = score.end is not None and np.abs(np.subtract(score.end, x.path[-1])).max() < 0.5
    return bool(near and score.fine)


Picture = tuple[world.Maze, np.ndarray]


def foreign_pictures(seed: int, count: int) -> list[Picture]:
    return [foreign.foreign(i, seed) for i in range(count)]


def own_pictures(seed: int, count: int) -> list[Picture]:
    mazes = [foreign.held_out(2, i, seed) for i in range(count)]
    return [(maze, world.draw(maze)) for maze in mazes]


@torch.no_grad()
def colour_errors(vae, pictures: list[Picture]) -> list[float]:
    """How far the colours of circle and goal are off when a picture has been encoded and decoded:
    of 255 levels, the mean over RGB and over the middles of both; one a picture."""
    errors = []
    for maze, picture in pictures:
        x = video(torch.from_numpy(picture)[None, None])
        y = round_trip(vae, x)
        error = 127.5 * (y - x)[0, :, 0].reshape(3, len(maze.corridors), world.CELL, -1, world.CELL)
        middles = error[:, :, 5:-5, :, 5:-5].mean((2, 4))  # (3, n, n): the middle 6 x 6 of a cell
        circle, goal = (middles[:, row, column] for row, column in (maze.start, maze.goal))
        errors.append((circle.abs().mean() + goal.abs().mean()).item() / 2)
    return errors


@torch.no_grad()
def psnr(vae, seed: int, count: int) -> list[float]:
    """PSNR (dB) of unseen clips after encoding and decoding, of all sizes in turn."""
    ratios = []
    for k in range(count):
        clip = example(SIZES[k % len(SIZES)], np.random.default_rng([seed, 2, k]))
        films, _ = drawn([clip])
        x = video(films)
        error = (round_trip(vae, x) - x) / 2
        ratios.append(-10 * math.log10(error.square().mean().item()))
    return ratios


def evaluate(pipe, name: Path, settings: Train) -> dict[str, list[bool]]:
    """Of each kind, which of the unseen clips come out right. The same for every folder."""
    found = {}
    for kind in tqdm(KINDS, desc=f"check {name}", mininterval=10):
        clips = itertools.islice(unseen(kind, settings.seed), settings.check_clips)
        found[kind] = [is_right(pipe, x, seed, settings.sampling_steps)
                       for seed, x in enumerate(clips)]
    return found


def comparisons(folder: Path, settings: Train) -> list[stats.Table]:
    """This checkpoint beside the shipped one: unseen clips that come out right, and the VAE."""
    pipes = load(folder), load(SHIPPED)
    mine, shipped = (evaluate(pipe, name, settings)
                     for pipe, name in zip(pipes, (folder, SHIPPED), strict=True))
    rows = []
    for kind in KINDS:
        mean, low, high = stats.paired(shipped[kind], mine[kind])
        points = f"{100 * mean:+.0f} ({100 * low:+.0f} to {100 * high:+.0f})"
        rows.append([kind, stats.percent(mine[kind]), stats.percent(shipped[kind]), points])
    sample = f"seed {settings.seed}, n = {settings.check_clips}"
    clips = stats.Table(
        f"Unseen clips that come out right ({sample} each, 95 %)",
        ["kind", str(folder), "shipped", "difference, points"], rows)

    def row(name: str, measure: Callable) -> list[str]:
        return [name, *(stats.estimate(np.mean, measure(pipe.vae), digits=1) for pipe in pipes)]

    seed, count = settings.seed, settings.check_clips
    rows = [
        row("foreign mazes: colours off, of 255 levels",
            lambda vae: colour_errors(vae, foreign_pictures(seed, count))),
        row("own mazes: colours off, of 255 levels",
            lambda vae: colour_errors(vae, own_pictures(seed, count))),
        row("clips: PSNR, dB", lambda vae: psnr(vae, seed, count)),
    ]
    through = stats.Table(
        f"After encoding and decoding ({sample} each, 95 %; colours: of circle and goal)",
        ["", str(folder), "shipped"], rows)
    return [clips, through]


# ------------------------------------------------------------------------------
# Command line


@dataclass
class Train:
    """Train tiny-wan from nothing, widen the decoder of a checkpoint, or check one."""

    work: Path = Path("runs/train")  # checkpoints and latents; the same command goes on from them
    out: Path | None = None  # the diffusers folder that is made or checked (default: WORK/tiny-wan)
    widen: Path | None = None  # a diffusers folder: train only stage 3, on its encoder
    check: bool = False  # train nothing, only compare the folder with the shipped one
    check_clips: int = 100  # unseen clips of each kind for the comparison; 0: no comparison
    minutes: float | None = None  # for all stages and all starts; it replaces the iterations
    vae_iterations: int = 2700  # of stages 1, 2 and 3, each
    clips: int = 5000  # in the data set of latents, times scale
    iterations: int = 5000  # of stage 5
    scale: int = 8 if CUDA else 1  # batches are so many times as large
    # processes that draw clips
    workers: int = max(0, min(14, (os.cpu_count() or 2) - 2)) if CUDA else 0
    seed: int = 0  # of the clips and of the first weights
    sampling_steps: int = 12  # denoising steps of the comparison

    def __post_init__(self):
        if self.out is None:
            self.out = self.work / "tiny-wan"

    def seconds(self, stage: str) -> float | None:
        """How long a stage may take, all starts together; None: as long as it wants."""
        if self.minutes is None:
            return None
        share = 1.0 if self.widen else SHARES[stage]
        return 60 * self.minutes * share

    def stage(self, name: str, modules, optimizers: list, iterations: int) -> Stage:
        """It goes on from its checkpoint, but not any more once a later stage has begun on it."""
        path = self.work / f"{name}.pt"
        names = list(SHARES)
        later = names[names.index(name) + 1 :] if name in SHARES else []  # "widened" stands alone
        begun = [stage for stage in later if list(self.work.glob(f"{stage}*.pt"))]
        over = path.exists() and bool(begun)
        return Stage(path, modules, optimizers, iterations, self.seconds(name), over)

    def run(self) -> int:
        self.refuse_nonsense()
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
        if not self.check:
            self.try_compiler()
            self.work.mkdir(parents=True, exist_ok=True)
            save(self.trained(), self.out)
            print(f"{self.out} is made.")
        if self.check_clips:
            for table in comparisons(self.out, self):
                print(table.text())
        return 0

    def trained(self) -> WanImageToVideoPipeline:
        if self.widen:
            pipe = load(self.widen)
            pipe.vae = train_decoder(self, pipe.vae)
            return pipe
        vae = train_vae(self).requires_grad_(False)
        return train_denoiser(self, vae, make_latents(self, vae))

    def try_compiler(self) -> None:
        """A missing compiler is noticed now, and not by stage 5, after hours."""
        if self.minutes is not None or self.widen:
            return  # nothing will be compiled
        try:
            torch.compile(torch.neg)(torch.zeros(2, device=DEVICE))
        except Exception as error:
            raise Problem("torch.compile needs a C++ compiler (with a GPU: Triton). Install one, "
                          "or give --minutes: then nothing is compiled.") from error

    def refuse_nonsense(self) -> None:
        for name in ("vae_iterations", "clips", "iterations", "scale", "sampling_steps"):
            if getattr(self, name) < 1:
                raise Problem(f"--{name.replace('_', '-')} must be at least 1.")
        if self.minutes is not None and self.minutes <= 0:
            raise Problem("--minutes must be more than 0.")
        for name in ("check_clips", "workers", "seed"):
            if getattr(self, name) < 0:
                raise Problem(f"--{name.replace('_', '-')} must not be negative.")
        if self.check and self.widen:
            raise Problem("--check trains nothing, so it does not go with --widen.")
        if self.check and not self.check_clips:
            raise Problem("--check needs clips: --check-clips must be at least 1.")
        if self.widen and self.out.resolve() == self.widen.resolve():
            raise Problem(f"--widen would overwrite {self.widen}: name another --out.")
        folder = self.out if self.check else self.widen
        if folder and not (folder / "model_index.json").is_file():
            raise Problem(f"{folder} is no diffusers folder: train it first, or name another.")


def main(argv=None) -> int:
    return cli.command(__doc__, Train, argv)


if __name__ == "__main__":
    sys.exit(main())
