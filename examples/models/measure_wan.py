"""What each option of fast_wan.py brings on this machine.

    python -m examples.models.measure_wan seconds      # a denoising step: seconds and memory
    python -m examples.models.measure_wan likeness     # clips: how like those without options

seconds: Wan2.2 A14B's architecture with random weights, 97 frames at 832x480, guidance. One of the
    two experts is measured, which have the same architecture. What a clip takes is composed: 20
    steps, the text of two prompts, the video autoencoder's two ways. Random weights tell neither
    how often a cache can skip nor how like the clips are.
likeness: whole clips of a real checkpoint, tiny-wan on five mazes if you name none.

A row is on the disk as soon as it is measured. An option that fails is a row all the same. The same
command goes on where it ended, and tries again what failed.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import collabvr
from collabvr import Clip, Problem, log
from examples.bench.summary import ssim
from examples.cli import command, needed
from examples.models.fast_wan import FastWan
from examples.runs import read_lines
from examples.stats import Table

FAST = {"compile": True, "fp8_matmul": True}
ROWS: dict[str, dict[str, Any]] = {  # FastWan's settings, and perhaps a budget of GPU memory, GB
    "diffusers' defaults": {"attention": "native"},
    "compile, 8-bit products": FAST,
    "compile": {"compile": True},
    "8-bit products": {"fp8_matmul": True},
    "cuDNN attention": {"attention": "_native_cudnn"},
    "flash attention": {"attention": "_native_flash"},
    "cache": {"cache_low": 0.05},
    "compile, 8-bit products, cache": {**FAST, "cache_low": 0.05},
    "8-bit weights": {"fp8": True},
    "24 GB: 8-bit weights, group offload": {"fp8": True, "offload": "group", "budget": 24},
    "24 GB: group offload": {"offload": "group", "budget": 24},
}
CHANGING: dict[str, dict[str, Any]] = {  # FastWan's settings that change the clip
    "compile": {"compile": True},
    "8-bit weights": {"fp8": True},
    "8-bit products": {"fp8_matmul": True},
    "compile, 8-bit products": FAST,
    "cache 0.05": {"cache_low": 0.05},
    "cache 0.1": {"cache_low": 0.1},
    "cache 0.2": {"cache_low": 0.2},
    "8-bit products, cache 0.05": {"fp8_matmul": True, "cache_low": 0.05},
    "8-bit products, cache 0.1": {"fp8_matmul": True, "cache_low": 0.1},
    "8-bit products, cache 0.2": {"fp8_matmul": True, "cache_low": 0.2},
}
STEPS = FastWan().sampling_steps  # of a clip
TEXT = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
        "num_heads": 64}  # UMT5-XXL's encoder
# the sizes of a model and of its clips: A14B's are where it differs from the classes' defaults
A14B: dict[str, Any] = {
    "text": TEXT, "expert": {}, "vae": {}, "words": 512, "frames": 97, "height": 480, "width": 832}
TINY: dict[str, Any] = {
    "text": {"vocab_size": 8, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1,
             "num_heads": 2},
    "expert": {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 32, "freq_dim": 32,
               "ffn_dim": 64, "num_layers": 4},
    "vae": {"base_dim": 8, "num_res_blocks": 1}, "words": 16, "frames": 5, "height": 32,
    "width": 32}


# ------------------------------------------------------------------------------
# A model with random weights


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def random_expert(size: dict):
    """An expert as its checkpoint is loaded: bf16, and what diffusers keeps in float32."""
    import diffusers
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device()):
            expert = diffusers.WanTransformer3DModel(in_channels=36, **size["expert"])
    finally:
        torch.set_default_dtype(torch.float32)
    for name, weight in expert.named_parameters():
        if any(part in name for part in expert._keep_in_fp32_modules):
            weight.data = weight.data.float()
    return expert.eval().requires_grad_(False)


def random_text_encoder(size: dict):
    import transformers
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device()):
            text = transformers.UMT5EncoderModel(
                transformers.UMT5Config(**size["text"], dropout_rate=0.0))
    finally:
        torch.set_default_dtype(torch.float32)
    return text.eval().requires_grad_(False)


def random_vae(size: dict):
    import diffusers
    with torch.device(device()):
        return diffusers.AutoencoderKLWan(**size["vae"]).eval().requires_grad_(False)


def random_wan(size: dict, experts: int = 2):
    """Wan2.2 I2V with random weights, as a whole pipeline."""
    torch.manual_seed(0)
    one = random_expert(size)
    other = random_expert(size) if experts == 2 else None
    return pipeline(one, other, random_text_encoder(size), random_vae(size), size["words"])


def pipeline(transformer, transformer_2=None, text_encoder=None, vae=None, words: int = 512):
    import diffusers
    import tokenizers
    import transformers
    model = tokenizers.models.WordLevel({"<pad>": 0, "x": 1}, unk_token="x")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), pad_token="<pad>", unk_token="x",
        model_max_length=words)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return diffusers.WanImageToVideoPipeline(
        tokenizer, text_encoder, vae, scheduler, transformer=transformer,
        transformer_2=transformer_2, boundary_ratio=0.9 if transformer_2 else None)


# ------------------------------------------------------------------------------
# Seconds and memory


def clock() -> float:
    """Seconds, when the GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_GB() -> float | None:
    return torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_available() else None


def timed(work, times: int) -> list[float]:
    """Seconds of each call of work(), after a first one that warms up and is not counted."""
    work()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(times):
        began = clock()
        work()
        seconds.append(clock() - began)
    return seconds


def free_memory() -> None:
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@torch.no_grad()
def measure_steps(name: str, size: dict, steps: int) -> dict:
    """A row: seconds of a denoising step (two passes, for guidance), and the GPU's peak memory."""
    options = {"offload": "none", "vgm": "random", **ROWS[name]}
    budget = options.pop("budget", None)
    if budget and not torch.cuda.is_available():
        raise Problem("a budget of GPU memory needs a GPU")
    wan = FastWan(**options)
    expert = random_expert(size)
    x: dict[str, Any] = {"weights_GB": expert.get_memory_footprint() / 1e9}
    if wan.offload != "none":
        expert.to("cpu")
    if budget:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget * 1e9 / total))
    wan.place(pipeline(expert))
    x["weights_GB"] = expert.get_memory_footprint() / 1e9
    shape = 1, 36, (size["frames"] - 1) // 4 + 1, size["height"] // 8, size["width"] // 8
    text = torch.randn(
        1, size["words"], expert.config.text_dim, device=device(), dtype=torch.bfloat16)
    t = torch.full((1,), 900.0, device=device())

    def noise() -> torch.Tensor:
        return torch.randn(shape, device=device(), dtype=torch.bfloat16)

    def step(latents: torch.Tensor) -> None:
        for part in ("cond", "uncond"):
            with expert.cache_context(part):
                expert(latents, t, text, return_dict=False)

    seconds = timed(lambda: step(noise()), steps)  # new noise: no cache can skip
    x |= {"steps": len(seconds), "step": float(np.mean(seconds)),
          "spread": float(np.ptp(seconds)), "GB": peak_GB()}
    if wan.cache_low:
        same = noise()  # every time: all passes but the first are skipped
        x["skipped_step"] = float(np.mean(timed(lambda: step(same), 3)))
    return x


@torch.no_grad()
def measure_text(size: dict) -> dict:
    """Seconds of two prompts, and the encoder's memory."""
    text = random_text_encoder(size)
    ids = torch.ones(1, size["words"], dtype=torch.long, device=device())
    seconds = timed(lambda: text(ids, torch.ones_like(ids)), 1)[0]
    return {"text": 2 * seconds, "text_GB": text.get_memory_footprint() / 1e9}


@torch.no_grad()
def measure_rest(size: dict) -> dict:
    """What a clip needs beside its steps: seconds of two prompts, of encoding and of decoding."""
    x = measure_text(size)
    free_memory()
    vae = random_vae(size)
    picture = torch.randn(1, 3, size["frames"], size["height"], size["width"], device=device())
    x["encode"] = timed(lambda: vae.encode(picture), 1)[0]
    latents = vae.encode(picture).latent_dist.mode()
    x["decode"] = timed(lambda: vae.decode(latents), 1)[0]
    x["GB"] = peak_GB()
    return x


@dataclass
class Seconds:
    """A denoising step with each option: seconds and memory."""

    row: list[Literal[tuple(ROWS)]] = field(default_factory=list)  # only these
    steps: int = 3  # measured of each row, after one that warms up
    minutes: float = math.inf  # no row is begun after that long
    small: bool = False  # a tiny model; always so without a GPU
    out: Path = Path("runs/measure-wan")  # results, which resume

    def run(self) -> int:
        """Measures what is not in OUT yet or failed, and prints all of it."""
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        if card == "CPU" and not self.small:
            log.warning("No CUDA GPU: a tiny model on the CPU, which says nothing about a GPU.")
            self.small = True
        size = TINY if self.small else A14B
        path = self.out / f"seconds-{collabvr.digest(card, self.small)[:8]}.jsonl"
        results = Results(path, self.minutes)
        rest = results.measure("rest", measure_rest, size)
        for name in self.row or ROWS:
            results.measure(name, measure_steps, name, size, self.steps)
        rows = {name: results.rows[name] for name in ROWS if name in results.rows}
        title = f"{card}, PyTorch {torch.__version__}: {'a tiny model' if self.small else 'A14B'}"
        print(steps_table(title, rows, rest).text())
        if "decode" in rest:
            print("Besides its steps, a clip takes {text:.3f} s for two prompts, {encode:.3f} s to "
                  "encode and {decode:.3f} s to decode.".format(**rest))
        results.print_errors()
        return 0 if any("step" in x for x in rows.values()) else 1


def steps_table(title: str, rows: dict[str, dict], rest: dict) -> Table:
    """The rows with what a clip comes to, composed, and its share of the defaults' seconds."""
    table = Table(title, ["", "s/step", "steps", "peak GB", "s/clip", "clips/hour",
                          "times defaults", "s/skipped step"], [])
    others = None if "error" in rest else rest["text"] + rest["encode"] + rest["decode"]
    base = None
    for name, x in rows.items():
        clip = hourly = None
        if "step" in x and others is not None:
            clip = STEPS * x["step"] + others
            hourly = 3600 / clip
        if name == next(iter(ROWS)):
            base = hourly
        times = hourly / base if base and hourly else None
        table.rows.append([name, x.get("step"), x.get("steps"), x.get("GB"), clip, hourly, times,
                           x.get("skipped_step")])
    return table


class Results:
    """Rows in a file of JSON lines, by name. What was measured is not measured again."""

    def __init__(self, path: Path, minutes: float = math.inf):
        self.path = path
        self.end = time.perf_counter() + 60 * minutes
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self.rows: dict[str, dict] = {}
        for _, x in read_lines(path):
            self.rows[x.pop("row")] = x

    def measure(self, name: str, what, *args) -> dict:
        """The row of that name: what(*args), or an error in its place."""
        found = self.rows.get(name)
        if found and "error" not in found:
            return found
        if time.perf_counter() > self.end:
            return {"error": "the time was over"}
        log.info("---- %s", name)
        began = time.perf_counter()
        try:
            x = what(*args)
        except Exception as error:  # noqa: BLE001  the other rows go on
            x = {"error": collabvr.first_line(error)}
            log.warning("%s: %s", name, x["error"])
        free_memory()
        x["wall_seconds"] = round(time.perf_counter() - began, 1)
        self.rows[name] = x
        with open(self.path, "a") as file:
            file.write(json.dumps({"row": name, **x}) + "\n")
        return x

    def print_errors(self) -> None:
        for name, x in self.rows.items():
            if "error" in x:
                print(f"{name}: {x['error']}")


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
    row: list[Literal[tuple(CHANGING)]] = field(default_factory=list)  # only these
    offload: Literal["none", "model", "group"] = "none"
    out: Path = Path("runs/measure-wan")  # results, which resume

    def run(self) -> int:
        """Makes the clips and prints the table. Raises Problem."""
        needed("skimage.metrics")
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        key = collabvr.digest(card, self.vgm, self.image, self.task, self.seconds, self.fps,
                              self.sampling_steps, self.guidance_scale, self.offload)
        results = Results(self.out / f"likeness-{key[:8]}.jsonl")
        self.plain: list[Clip] = []
        for name in self.row or CHANGING:
            results.measure(name, self.compare, CHANGING[name])
        rows = [[name, x.get("clips"), x.get("seconds"), x.get("skipped"), x.get("SSIM"),
                 x.get("least"), x.get("PSNR")] for name, x in results.rows.items()]
        print(Table(f"{self.vgm} on {card}, against the clips without options", [
            "", "clips", "s/clip", "skipped", "SSIM", "least SSIM", "PSNR, dB"], rows).text())
        results.print_errors()
        return 0 if any("SSIM" in x for x in results.rows.values()) else 1

    def compare(self, options: dict) -> dict:
        """A row: likeness of the clips to the plain ones, which are made when first needed."""
        if not self.plain:
            self.plain, _, _ = self.clips(attention="native")
        clips, seconds, skipped = self.clips(**options)
        pairs = list(zip(self.plain, clips, strict=True))
        likeness = [np.mean([ssim(x, y) for x, y in zip(a.frames, b.frames)]) for a, b in pairs]
        return {"clips": len(clips), "seconds": seconds, "skipped": skipped,
                "SSIM": float(np.mean(likeness)), "least": float(np.min(likeness)),
                "PSNR": float(np.mean([psnr(a.frames, b.frames) for a, b in pairs]))}

    def clips(self, **options) -> tuple[list[Clip], float, float | None]:
        """The clips, seconds of each but the first, the share of passes that were skipped."""
        wan = FastWan(
            vgm=self.vgm, fps=self.fps, sampling_steps=self.sampling_steps,
            guidance_scale=self.guidance_scale, offload=self.offload, **options)
        clips, seconds, skipped = [], [], []
        for seed, (picture, task) in enumerate(self.pictures()):
            began = clock()
            clips.append(wan(picture, task, self.seconds, seed))
            seconds.append(clock() - began)
            skipped.append(wan.skipped("low-noise"))
        share = None if None in skipped else float(np.mean(skipped))
        return clips, float(np.mean(seconds[1:] or seconds)), share

    def pictures(self) -> list[tuple[np.ndarray, str]]:
        """(picture, task) of each clip."""
        if self.image:
            return [(collabvr.load_image(self.image), self.task)]
        from examples.maze import world
        mazes = [world.make(6, 3, np.random.default_rng([2026, seed])) for seed in range(1, 6)]
        return [(world.draw(maze), world.task(maze)) for maze in mazes]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """In dB; of equal ones 100."""
    error = np.mean((a.astype(np.float32) - b) ** 2)
    return min(100.0, 10 * math.log10(255**2 / error)) if error else 100.0


def main(argv=None) -> int:
    """0: something was measured; 1: nothing was; 2: something is wrong; 130: interrupted."""
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    kinds = {"seconds": Seconds, "likeness": Likeness}
    return command(__doc__, kinds, argv)


if __name__ == "__main__":
    sys.exit(main())
