"""What each option of examples/models/fast_wan.py brings on this machine.

    python -m examples.bench.speed seconds      # a denoising step: seconds and memory
    python -m examples.bench.speed likeness     # clips: how like those without options

seconds: Wan2.2 A14B with random weights, 97 frames at 832x480, guidance. One of the two experts is
    measured, for both have the same architecture. A clip is composed: 20 steps, the text of two
    prompts, the video autoencoder's two ways. How often a cache can skip, this does not tell.
likeness: whole clips of a real checkpoint, tiny-wan on five mazes if you name none.

An option that fails is told, and the others go on. --row measures only the rows that it names.
"""

from __future__ import annotations

import gc
import logging
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch.utils import benchmark

import collabvr
from collabvr import Clip, Problem, Wan, log
from examples.bench.summary import ssim
from examples.cli import command, needed
from examples.models.fast_wan import FastWan
from examples.stats import Table

FAST: dict[str, Any] = {"compile": True, "fp8_matmul": True}
ROWS: dict[str, dict[str, Any]] = {  # FastWan's settings, and perhaps a budget of GPU memory, GB
    "diffusers' defaults": {},
    "compile, 8-bit products": FAST,
    "compile": {"compile": True},
    "8-bit products": {"fp8_matmul": True},
    "cache": {"cache_low": 0.05},
    "compile, 8-bit products, cache": {**FAST, "cache_low": 0.05},
    "8-bit weights": {"fp8": True},
    "24 GB: 8-bit weights, group offload": {"fp8": True, "offload": "group", "budget": 24},
}
CHANGING = ["compile", "8-bit weights", "8-bit products", "compile, 8-bit products", "cache"]
# the sizes of a model and of its clips: A14B's where they differ from the classes' defaults
A14B: dict[str, Any] = {
    "text": {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
             "num_heads": 64},  # UMT5-XXL's encoder
    "expert": {}, "vae": {}, "words": 512, "frames": 97, "height": 480, "width": 832}
TINY: dict[str, Any] = {
    "text": {"vocab_size": 8, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1,
             "num_heads": 2},
    "expert": {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 32, "freq_dim": 32,
               "ffn_dim": 64, "num_layers": 4},
    "vae": {"base_dim": 8, "num_res_blocks": 1}, "words": 16, "frames": 5, "height": 32,
    "width": 32}
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
CARD = torch.cuda.get_device_name() if GPU else "CPU"


# ------------------------------------------------------------------------------
# Seconds and memory, with random weights


def random_weights(build, dtype: torch.dtype):
    """A model on the GPU, as build() makes it."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            return build().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def random_expert(size: dict):
    """An expert as its checkpoint is loaded: bf16, and what diffusers keeps in float32."""
    import diffusers

    expert = random_weights(
        lambda: diffusers.WanTransformer3DModel(in_channels=36, **size["expert"]), torch.bfloat16)
    for name, weight in expert.named_parameters():
        if any(part in name for part in expert._keep_in_fp32_modules):
            weight.data = weight.data.float()
    return expert


def seconds_of(work, times: int = 1) -> float:
    """Mean seconds of a call of work(), after two that warm up."""
    return benchmark.Timer("work()", globals={"work": work}).timeit(times).mean


def free_memory() -> None:
    gc.collect()
    torch.compiler.reset()
    if GPU:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


@torch.no_grad()
def measure_step(size: dict, steps: int, budget: int = 0, **options) -> dict[str, float]:
    """Seconds of a denoising step (two passes, for guidance), and the GPU's peak memory."""
    import diffusers

    if budget and not GPU:
        raise Problem("a budget of GPU memory needs a GPU")
    wan = FastWan(vgm="random", **{"offload": "none", **options})
    expert = random_expert(size)
    if wan.offload != "none":
        expert.to("cpu")
    if budget:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget * 1e9 / total))
    wan.place(diffusers.WanImageToVideoPipeline(None, None, None, None, transformer=expert))
    shape = 1, 36, (size["frames"] - 1) // 4 + 1, size["height"] // 8, size["width"] // 8
    text = noise(1, size["words"], expert.config.text_dim)
    t = torch.full((1,), 900.0, device=DEVICE)

    def step(latents: torch.Tensor) -> None:
        for part in ("cond", "uncond"):
            with expert.cache_context(part):
                expert(latents, t, text, return_dict=False)

    step(noise(*shape))  # compiles
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    found = {"step": seconds_of(lambda: step(noise(*shape)), steps)}  # new noise: no cache can skip
    if GPU:
        found["GB"] = torch.cuda.max_memory_reserved() / 1e9
    if wan.cache_low:
        same = noise(*shape)  # every time: all passes but the first are skipped
        found["skipped"] = seconds_of(lambda: step(same), 3)
    return found


@torch.no_grad()
def measure_rest(size: dict) -> dict[str, float]:
    """What a clip needs beside its steps: seconds of two prompts, of encoding and of decoding."""
    import diffusers
    import transformers

    shape = transformers.UMT5Config(**size["text"], dropout_rate=0.0)
    text = random_weights(lambda: transformers.UMT5EncoderModel(shape), torch.bfloat16)
    ids = torch.ones(1, size["words"], dtype=torch.long, device=DEVICE)
    found = {"text": 2 * seconds_of(lambda: text(ids, torch.ones_like(ids)))}
    vae = random_weights(lambda: diffusers.AutoencoderKLWan(**size["vae"]), torch.float32)
    picture = torch.randn(1, 3, size["frames"], size["height"], size["width"], device=DEVICE)
    latents = vae.encode(picture).latent_dist.mode()
    found["encode"] = seconds_of(lambda: vae.encode(picture))
    found["decode"] = seconds_of(lambda: vae.decode(latents))
    return found


@dataclass
class Seconds:
    """A denoising step with each option: seconds and memory."""

    row: list[Literal[tuple(ROWS)]] = field(  # type: ignore[valid-type]
        default_factory=lambda: list(ROWS))
    steps: int = 3  # measured of each row

    def run(self) -> int:
        if not GPU:
            log.warning("No CUDA GPU: a tiny model on the CPU, which says nothing about a GPU.")
        size = A14B if GPU else TINY
        rest = measure_rest(size)
        log.info("Besides its steps, a clip takes {text:.3f} s for two prompts, {encode:.3f} s to "
                 "encode and {decode:.3f} s to decode.".format(**rest))
        table = Table(f"{CARD}, PyTorch {torch.__version__}: {'A14B' if GPU else 'a tiny model'}",
                      ["", "s/step", "s/clip", "clips/hour", "peak GB", "s/skipped step"], [])
        for name, x in measured(self.row, lambda **row: measure_step(size, self.steps, **row)):
            clip = Wan.sampling_steps * x["step"] + sum(rest.values())
            table.rows.append([name, x["step"], clip, 3600 / clip, x.get("GB"), x.get("skipped")])
        print(table.text())
        return 0 if table.rows else 1


def measured(names: list[str], measure):
    """(name, measure(**options)) of each row. One that fails is told and left out."""
    for name in names:
        free_memory()
        try:
            found = measure(**ROWS[name])
        except Exception as error:  # noqa: BLE001  an option that this machine cannot have
            print(f"{name}: {collabvr.fault_of(error)}", file=sys.stderr)
            continue
        log.info("%s: %s", name, found)
        yield name, found
    free_memory()


# ------------------------------------------------------------------------------
# Likeness


@dataclass
class Likeness:
    """Whole clips with each option that changes them: how like are they those without?"""

    vgm: str = "examples/maze/tiny-wan"  # a real checkpoint
    image: str = ""  # its picture; without one: five mazes
    task: str = "Move the ball to the square."  # the prompt for that picture
    seconds: float = 2.0  # of a clip
    fps: int = 8
    sampling_steps: int = 12
    guidance_scale: float = 1.0
    row: list[Literal[tuple(CHANGING)]] = field(  # type: ignore[valid-type]
        default_factory=lambda: list(CHANGING))

    def run(self) -> int:
        """Makes the clips and prints the table. Raises Problem."""
        needed("skimage.metrics")
        plain, _ = self.clips()
        table = Table(f"{self.vgm} on {CARD}, against the clips without options",
                      ["", "clips", "skipped", "SSIM", "least SSIM"], [])

        def compare(**options) -> list:
            clips, skipped = self.clips(**options)
            alike = [float(np.mean([ssim(x, y) for x, y in zip(a.frames, b.frames, strict=True)]))
                     for a, b in zip(plain, clips, strict=True)]
            return [len(clips), skipped, float(np.mean(alike)), min(alike)]

        table.rows = [[name, *found] for name, found in measured(self.row, compare)]
        print(table.text())
        return 0 if table.rows else 1

    def clips(self, **options) -> tuple[list[Clip], float | None]:
        """The clips, and the share of passes that were skipped."""
        wan = FastWan(
            vgm=self.vgm, fps=self.fps, sampling_steps=self.sampling_steps,
            guidance_scale=self.guidance_scale, offload="none", **options)
        clips: list[Clip] = []
        skipped: list[Any] = []
        for seed, (picture, task) in enumerate(self.pictures()):
            clips.append(wan(picture, task, self.seconds, seed))
            skipped.append(wan.skipped("low-noise"))
        return clips, None if None in skipped else float(np.mean(skipped))

    def pictures(self) -> list[tuple[np.ndarray, str]]:
        """(picture, task) of each clip."""
        if self.image:
            return [(collabvr.load_image(self.image), self.task)]
        from examples.maze import world

        mazes = [world.make(6, 3, np.random.default_rng([2026, seed])) for seed in range(1, 6)]
        return [(world.draw(maze), world.task(maze)) for maze in mazes]


def main(argv: list[str] | None = None) -> int:
    """0: something was measured; 1: nothing was; 2: something is wrong; 130: interrupted."""
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    return command(__doc__, {"seconds": Seconds, "likeness": Likeness}, argv)


if __name__ == "__main__":
    sys.exit(main())
