"""Train tiny-wan, the maze world's video generator, from nothing.

    python -m examples.maze.train                               # hours on two CPU cores
    python -m examples.maze.compare --vgm runs/train/tiny-wan   # how good it is

The result is a folder that diffusers' WanImageToVideoPipeline loads: Wan's own VAE, transformer,
text encoder and scheduler classes, only very small. There are four stages:

1. pictures     the autoencoder learns colours and shapes on single frames, which cost little
2. clips        and then motion, on clips of up to 17 frames
3. latents      a data set is compressed once
4. transformer  transformer and text encoder learn rectified flow on it

The same command goes on where it was stopped. In the end it prints how far the autoencoder's
colours drift when clip follows clip (drift.py).

The generator learns a short horizon, as real ones have: single moves, and whole tasks of one or
two straight segments. The weights in tiny-wan/ were made by an earlier program of these stages.
This one has not been run whole yet.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from collabvr import Problem, write_file
from examples import cli
from examples.maze import drift, world
from examples.maze.lessons import example

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_FRAMES = 17  # 2 s at 8 fps
SIZES = range(4, 9)  # cells a side
TOKENS = 96  # of a prompt at most, four corrections included


@dataclass(frozen=True)
class Train:
    """Train tiny-wan from nothing. All that decides what comes out stands here."""

    work: Path = Path("runs/train")  # checkpoints and latents; the same command goes on from them
    seed: int = 0  # of clips, noise and first weights
    save_every: int = 100  # batches; so many are lost at most

    # the budget
    pictures: int = 12000  # batches of stage 1
    clips: int = 4000  # batches of stage 2
    latents: int = 1250  # batches of stage 3, of four clips
    flows: int = 5000  # batches of stage 4

    # the autoencoder: 4x in time, 8x in space
    encoder_width: int = 16  # channels
    decoder_width: int = 32  # channels
    channels: int = 16  # of a latent
    trips: int = 2  # through the autoencoder in a row, from a quarter of stage 1 on
    picture_frames: int = 8  # in a batch of stage 1, of 4 x 4 cells
    clip_frames: int = 34  # in a batch of stage 2
    autoencoder_rate: float = 2e-3  # the highest learning rate of stage 1; half of it in stage 2

    # the transformer, one token a cell
    layers: int = 6  # of the transformer
    heads: int = 3  # of 64 channels
    tokens: int = 4320  # in a batch of stage 4
    transformer_rate: float = 1.5e-3  # the highest learning rate of stage 4

    @property
    def out(self) -> Path:
        """The diffusers folder."""
        return self.work / "tiny-wan"

    def run(self) -> int:
        self.begin()
        vae = train_autoencoder(self)
        pipe = train_transformer(self, vae, make_latents(self, vae))
        save(pipe, self.out)
        print(f"{self.out} is made.")
        print(drift.table(pipe.vae.float()).text())
        return 0

    def begin(self) -> None:
        """Writes the settings down. Raises Problem if the folder was begun with others."""
        settings = dataclasses.asdict(self)
        del settings["work"], settings["save_every"]
        self.work.mkdir(parents=True, exist_ok=True)
        path = self.work / "settings.json"
        if path.exists() and json.loads(path.read_text()) != settings:
            raise Problem(f"{path} has other settings. Choose another --work.")
        write_file(path, json.dumps(settings, indent=1).encode())


# ------------------------------------------------------------------------------
# A stage of training


class Stage:
    """Optimizers, a cosine schedule, a moving average of the weights, and checkpoints."""

    def __init__(self, settings: Train, name: str, batches: int, modules: torch.nn.Module,
                 optimizers: list[torch.optim.Optimizer]):
        self.path = settings.work / f"{name}.pt"
        self.save_every = settings.save_every
        self.batches, self.optimizers = batches, optimizers
        self.modules = modules.requires_grad_(True)
        self.average: Any = copy.deepcopy(modules).requires_grad_(False)
        self.i = 0
        if self.path.exists():
            self.load()

    def steps(self) -> Iterator[int]:
        """The numbers of the batches that are still to be done."""
        self.bar = tqdm(range(self.i, self.batches), desc=self.path.stem, mininterval=10)
        for i in self.bar:
            yield i
            self.i = i + 1
            if self.i % self.save_every == 0 or self.i == self.batches:
                self.save()

    def step(self, loss: torch.Tensor) -> None:
        """One update of the weights and of their moving average."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        warm = min(1.0, (self.i + 1) / 100)
        cosine = 0.5 + 0.5 * math.cos(math.pi * self.i / self.batches)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * warm * (0.02 + 0.98 * cosine)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(0.998, (self.i + 1) / (self.i + 20))
        with torch.no_grad():
            for a, p in zip(self.average.parameters(), self.modules.parameters(), strict=True):
                a.lerp_(p, 1 - decay)
        if self.i % 50 == 0:
            self.bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)

    def save(self) -> None:
        write_tensors(self.path, {
            "modules": self.modules.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "i": self.i,
        })

    def load(self) -> None:
        state = torch.load(self.path, "cpu", weights_only=True)
        self.modules.load_state_dict(state["modules"])
        self.average.load_state_dict(state["average"])
        for optimizer, old in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(old)
        self.i = state["i"]


def write_tensors(path: Path, what) -> None:
    data = io.BytesIO()
    torch.save(what, data)
    write_file(path, data.getvalue())


def adam(parameters, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)


# ------------------------------------------------------------------------------
# Stages 1 and 2: the autoencoder


def train_autoencoder(settings: Train):
    torch.manual_seed(settings.seed)
    vae = new_autoencoder(settings).to(DEVICE)
    vae = autoencoder_stage(settings, "pictures", vae, [1])
    vae = autoencoder_stage(settings, "clips", vae, [1, 5, NUM_FRAMES])
    return vae.requires_grad_(False).eval()


def new_autoencoder(settings: Train):
    """Wan's video autoencoder; two of the 8x in space are patches."""
    z = settings.channels
    vae: Any = AutoencoderKLWan(
        base_dim=settings.encoder_width, decoder_base_dim=settings.decoder_width, z_dim=z,
        dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True], patch_size=2,
        in_channels=12, out_channels=12, latents_mean=[0.0] * z, latents_std=[1.0] * z)
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):  # faster on a CPU
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last_3d)
    return vae


def autoencoder_stage(settings: Train, name: str, vae, lengths: list[int]):
    """Its moving average after a stage of reconstruction. lengths: of the clips, in frames."""
    first = name == "pictures"
    batches = settings.pictures if first else settings.clips
    frames = settings.picture_frames if first else settings.clip_frames
    rate = settings.autoencoder_rate if first else settings.autoencoder_rate / 2
    stage = Stage(settings, name, batches, vae, [adam(vae.parameters(), rate)])
    for i in stage.steps():
        rng = np.random.default_rng([settings.seed, len(lengths), i])
        films, boards = cuttings(rng, int(rng.choice(lengths)), frames)
        x = video(films)
        things = ((x - video(boards)).abs().amax(1, keepdim=True) > 0.1).float()  # circle and goal
        weight = 1 + 8 * things + 12 * moving(x).float()
        weight[:, :, 0] *= 1 + x.shape[2] / 8  # the next clip starts from a frame 0
        early = first and i < batches // 4  # what is still grey learns nothing from a second trip
        stage.step(chained(vae, x, weight, things, 1 if early else settings.trips))
    return stage.average


def cuttings(rng, length: int, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Clips, uint8 (B, length, H, W, 3), and their boards, uint8 (B, 1, H, W, 3).

    Most show 4 x 4 cells around the circle. Some show all, for the attention in the middle.
    """
    n = int(rng.integers(SIZES.start, SIZES.stop))
    side = 4 if rng.random() < 0.85 else n
    count = max(1, frames * 16 // (length * side**2))
    films, boards = zip(*[cutting(rng, n, side, length) for _ in range(count)], strict=True)
    return np.stack(films), np.stack(boards)


def cutting(rng, n: int, side: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    x = example(n, rng, horizon=3)
    first = int(rng.integers(NUM_FRAMES - length + 1))
    places = world.walk(x.path, NUM_FRAMES)[first : first + length]
    film = np.stack([world.draw(x.maze, place) for place in places])
    middle = places[length // 2]
    corner = [int(np.clip(round(p) - rng.integers(side), 0, n - side)) for p in middle]
    rows, columns = (slice(world.CELL * k, world.CELL * (k + side)) for k in corner)
    return film[:, rows, columns], world.board(x.maze)[None, rows, columns]


def video(films: np.ndarray) -> torch.Tensor:
    """From uint8 (B, T, H, W, 3) to what the autoencoder takes: (B, 3, T, H, W) in -1..1."""
    return torch.from_numpy(films).to(DEVICE).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def moving(x: torch.Tensor) -> torch.Tensor:
    """Which pixels of videos (B, 3, T, H, W) change, bool (B, 1, T, H, W)."""
    return (x - x.mean(2, keepdim=True)).abs().amax(1, keepdim=True) > 0.05


def chained(vae, x: torch.Tensor, weight: torch.Tensor, things: torch.Tensor,
            trips: int) -> torch.Tensor:
    """The loss of a clip that goes through the autoencoder several times, as the loop sends it.

    Every trip is held against the clip itself, so errors that add up cost most. Latents have no
    noise: in the beginning it would hide them, and nothing would be learned for long.
    """
    loss = torch.zeros((), device=x.device)
    y = x
    for _ in range(trips):
        latents = vae.encode(y.clamp(-1, 1)).latent_dist.mode()
        y = decoded(vae, latents, x)
        loss = loss + reconstruction(y - x, weight, things) + 1e-4 * latents.square().mean()
    return loss / trips


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


def reconstruction(error: torch.Tensor, weight: torch.Tensor, things: torch.Tensor) -> torch.Tensor:
    """Pixels, and the mean colours of 8 x 8 blocks: a pale circle is worse than a rough one.

    Circle and goal count once more by the mean colour of their part of a block.
    """
    pixels = (weight * (error.abs() + 2 * error.square())).sum() / weight.sum()
    tint = F.avg_pool3d(error, (1, 8, 8)).abs().mean()
    area = F.avg_pool3d(things, (1, 8, 8)).sum().clamp(min=1)
    thing_tint = F.avg_pool3d(error * things, (1, 8, 8)).abs().sum() / area
    return (pixels + thing_tint) / 3 + tint


# ------------------------------------------------------------------------------
# Stage 3: latents

PART = 50  # batches in a file


@torch.no_grad()
def make_latents(settings: Train, vae) -> list[dict]:
    """The data set, in batches (see `compressed`)."""
    data: list[dict] = []
    for first in range(0, settings.latents, PART):
        path = settings.work / f"latents-{first:05d}.pt"
        if not path.exists():
            numbers = range(first, min(first + PART, settings.latents))
            bar = tqdm(numbers, desc=path.stem, mininterval=10)
            write_tensors(path, [compressed(settings, vae, i) for i in bar])
        data += torch.load(path, weights_only=True)
    return data


def compressed(settings: Train, vae, i: int) -> dict:
    """Batch i, four clips of one size:

    x          their latents, half (4, C, 5, h, w)
    condition  latents of their conditioning frames, the same shape
    moving     where something moves, bool (4, 1, 5, h, w)
    prompts    four texts
    """
    rng = np.random.default_rng([settings.seed, 4, i])
    n = int(rng.integers(SIZES.start, SIZES.stop))
    examples = [example(n, rng) for _ in range(4)]
    x = video(np.stack([world.film(e.maze, e.path, NUM_FRAMES) for e in examples]))
    first = x[:, :, :1].clone()
    first[:2] = worn(vae, first[:2], rng)
    condition = torch.cat([first, torch.zeros_like(x[:, :, 1:])], 2)
    latents, conditions = (vae.encode(v).latent_dist.mode().half().cpu() for v in (x, condition))
    scale = x.shape[-1] // latents.shape[-1]
    return {"x": latents, "condition": conditions, "moving": latent_moving(x, scale).cpu(),
            "prompts": [e.prompt for e in examples]}


def worn(vae, frames: torch.Tensor, rng) -> torch.Tensor:
    """Frames as they are after one to three clips. The clip to learn stays clean, so that errors
    do not add up."""
    for _ in range(rng.integers(1, 4)):
        frames = vae.decode(vae.encode(frames).latent_dist.mode()).sample
    noise = torch.from_numpy(rng.standard_normal(frames.shape, np.float32)).to(DEVICE)
    return (frames + 0.03 * noise).clamp(-1, 1)


def latent_moving(x: torch.Tensor, scale: int) -> torch.Tensor:
    """`moving` on the grid of the latents and one step around it: a latent's neighbours have a
    share in what the decoder draws. A latent is 4 frames (the first: 1) of scale x scale pixels."""
    pixels = moving(x).float()
    pixels = torch.cat([pixels[:, :, :1].repeat(1, 1, 4, 1, 1), pixels[:, :, 1:]], 2)
    here = F.max_pool3d(pixels, (4, scale, scale))
    return F.max_pool3d(here, (1, 3, 3), 1, (0, 1, 1)) > 0


def normalise(vae, data: list[dict]) -> None:
    """The latents become (x - mean) / std by channel.

    Both go into the VAE's configuration, where the pipeline reads them. 250 batches are enough.
    """
    channels = [batch["x"].float().transpose(0, 1).flatten(1) for batch in data[:250]]
    sample = torch.cat(channels, 1)  # (C, k)
    mean, std = sample.mean(1), sample.std(1)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    mean, std = (v.view(1, -1, 1, 1, 1) for v in (mean, std))
    for batch in data:
        for key in ("x", "condition"):
            batch[key] = ((batch[key].float() - mean) / std).half()


# ------------------------------------------------------------------------------
# Stage 4: transformer and text encoder


def train_transformer(settings: Train, vae, data: list[dict]):
    """The pipeline. The transformer learns rectified flow with shift 3 in bf16.

    The text encoder learns with it. Muon trains the matrices of the blocks.
    """
    from diffusers import WanImageToVideoPipeline  # here: it warns when it is imported

    torch.manual_seed(settings.seed)
    normalise(vae, data)
    tokenizer = new_tokenizer([prompt for batch in data for prompt in batch["prompts"]])
    rows = by_size(data, tokenizer)
    modules = new_modules(settings, len(tokenizer)).to(DEVICE)
    matrices = [p for p in modules["transformer"].blocks.parameters() if p.ndim == 2]
    ids = {id(p) for p in matrices}
    others = [p for p in modules.parameters() if id(p) not in ids]
    rate = settings.transformer_rate
    optimizers = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        adam(others, rate / 1.5)]
    stage = Stage(settings, "transformer", settings.flows, modules, optimizers)
    for i in stage.steps():
        rng = np.random.default_rng([settings.seed, 5, i])
        width = int(rng.choice(list(rows)))
        clips = max(1, settings.tokens // (5 * (width // 2) ** 2))
        pick = torch.from_numpy(rng.integers(len(rows[width]["x"]), size=clips))
        batch = {key: value[pick].to(DEVICE) for key, value in rows[width].items()}
        stage.step(flow_loss(modules, batch, torch.Generator(DEVICE).manual_seed(i)))
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanImageToVideoPipeline(
        tokenizer, stage.average["text_encoder"].eval(), vae, scheduler,
        transformer=stage.average["transformer"].eval())


def flow_loss(modules, batch: dict[str, torch.Tensor], rng: torch.Generator) -> torch.Tensor:
    """What moves counts more than what stands."""
    x, condition = batch["x"].float(), batch["condition"].float()
    u = torch.rand(len(x), 1, 1, 1, 1, generator=rng, device=DEVICE)
    sigma = 3 * u / (1 + 2 * u)
    noise = torch.randn(x.shape, generator=rng, device=DEVICE)
    known = torch.zeros_like(x[:, :4])
    known[:, :, 0] = 1  # the conditioning frame
    inputs = torch.cat([(1 - sigma) * x + sigma * noise, known, condition], 1)
    with torch.autocast(DEVICE, torch.bfloat16):
        attention = batch["attention"]
        text = modules["text_encoder"](batch["tokens"], attention).last_hidden_state
        text = text * attention[..., None]  # as the pipeline pads
        flow = modules["transformer"](inputs, 1000 * sigma.flatten(), text, return_dict=False)[0]
    weight = 1 + 4 * batch["moving"].float()
    error = (flow.float() - (noise - x)).square()
    return (weight * error).mean() / weight.mean()


def new_tokenizer(prompts: list[str]) -> PreTrainedTokenizerFast:
    """One token a word."""
    splitter = pre_tokenizers.Whitespace()
    words = {word for p in prompts for word, _ in splitter.pre_tokenize_str(p.lower())}
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *sorted(words)])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", model_max_length=TOKENS)


def by_size(data: list[dict], tokenizer) -> dict[int, dict[str, torch.Tensor]]:
    """The data set by the width of its latents."""
    rows = {}
    for width in sorted({batch["x"].shape[-1] for batch in data}):
        mine = [batch for batch in data if batch["x"].shape[-1] == width]
        prompts = [prompt for batch in mine for prompt in batch["prompts"]]
        texts = tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS,
                          return_tensors="pt")
        tensors = {key: torch.cat([batch[key] for batch in mine])
                   for key in ("x", "condition", "moving")}
        rows[width] = tensors | {"tokens": texts.input_ids, "attention": texts.attention_mask}
    return rows


def new_modules(settings: Train, vocabulary: int):
    """Wan's transformer with A14B's inputs (noise, mask, condition); a text encoder of two layers.
    """
    z = settings.channels
    text = UMT5Config(
        vocab_size=vocabulary, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        dropout_rate=0.0, pad_token_id=0, decoder_start_token_id=0)
    transformer: Any = WanTransformer3DModel(
        num_attention_heads=settings.heads, attention_head_dim=64, in_channels=2 * z + 4,
        out_channels=z, text_dim=64, freq_dim=64, ffn_dim=256 * settings.heads,
        num_layers=settings.layers, rope_max_seq_len=64)
    return torch.nn.ModuleDict(
        {"text_encoder": UMT5EncoderModel(text), "transformer": transformer})


def save(pipe, out: Path) -> None:
    """The diffusers folder, in bf16. (The VAE, too: its colours change by 0.1 levels of 255.)"""
    for part in (pipe.vae, pipe.transformer, pipe.text_encoder):
        part.to(torch.bfloat16)
    pipe.save_pretrained(out, safe_serialization=True)


# ------------------------------------------------------------------------------
# Command line


def main(argv: list[str] | None = None) -> int:
    return cli.command(__doc__, Train, argv)


if __name__ == "__main__":
    sys.exit(main())
