"""What each option of fast_wan.py brings on this machine: seconds, memory, likeness.

    python examples/generators/fast_wan.py                          start it again and it goes on
    python examples/generators/fast_wan.py --row plain --row fp8    only these
    python examples/generators/fast_wan.py --vgm CHECKPOINT --image x.png --task "Move .."

Makes one clip of 97 frames at 832x480, 20 steps with guidance, with Wan2.2 A14B's architecture:
plain, as diffusers' defaults are, and with each option. An option that fails is a row all the same.
The weights are random unless --vgm names a checkpoint. Random ones tell the seconds and the memory,
but not how often a cache can skip, so not the seconds that it saves, and next to nothing about how
like the clips are.
"""
from __future__ import annotations

import gc
import json
import logging
import math
import sys
import time
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import imageio.v3 as iio
import numpy as np
import torch
from pydantic.dataclasses import dataclass as settings

sys.path[:0] = [str(Path(__file__).resolve().parents[k]) for k in (0, 1, 2)]
import commands
from commands import needed
from fast_wan import FastWan
from summary import Table, ssim

import collabvr
from collabvr import Clip, Problem, checked, explained, log

ROWS: dict[str, dict[str, Any]] = {  # FastWan's settings, and perhaps a budget of GPU memory, GB
    "plain": {"attention": "native"},
    "attention": {"attention": "auto"},
    "cuDNN attention": {"attention": "_native_cudnn"},
    "compile": {"compile": True},
    "cache 0.05": {"cache_low": 0.05},
    "compile, cache 0.05": {"compile": True, "cache_low": 0.05},
    "fp8": {"fp8": True},
    "4 steps, no guidance": {"sampling_steps": 4, "guidance_scale": 1.0},  # what LoRAs come to
    "24 GB: fp8, model offload": {"fp8": True, "offload": "model", "budget": 24},
    "24 GB: fp8, group offload": {"fp8": True, "offload": "group", "budget": 24},
}
A14B: dict[str, dict] = {  # where it differs from the classes' defaults; with UMT5-XXL
    "text": {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
             "num_heads": 64},
    "expert": {}, "vae": {}}
TINY: dict[str, dict] = {
    "text": {"vocab_size": 8, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1,
             "num_heads": 2},
    "expert": {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 32, "freq_dim": 32,
               "ffn_dim": 64, "num_layers": 4},
    "vae": {"base_dim": 8, "num_res_blocks": 1}}


def random_wan(size: dict):
    """Wan2.2 I2V as its checkpoint would be loaded, text encoder included, with random weights: on
    the GPU if there is room, else in main memory."""
    import diffusers
    import tokenizers
    import transformers
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "x": 1}, unk_token="x"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="x", model_max_length=512)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if gpu_memory() > 80e9 else "cpu"):
            text = transformers.UMT5EncoderModel(
                transformers.UMT5Config(**size["text"], dropout_rate=0.0))
            experts = [diffusers.WanTransformer3DModel(in_channels=36, **size["expert"])
                       for _ in range(2)]
            vae = diffusers.AutoencoderKLWan(**size["vae"]).float()
    finally:
        torch.set_default_dtype(torch.float32)
    for expert in experts:
        for name, weight in expert.named_parameters():
            if any(k in name for k in expert._keep_in_fp32_modules):
                weight.data = weight.data.float()
    pipe = diffusers.WanImageToVideoPipeline(
        tokenizer, text.eval(), vae.eval(), scheduler, transformer=experts[0].eval(),
        transformer_2=experts[1].eval(), boundary_ratio=0.9)
    pipe.set_progress_bar_config(desc="denoising", leave=False, disable=None)
    return pipe


def gpu_memory() -> int:
    """Bytes; 0 without a GPU."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


@settings(config=checked)
class Measurement:
    """Times one clip with each option, on this machine."""
    small: bool = False  # a tiny model and clip; always so without a GPU
    vgm: str = ""  # a checkpoint instead of random weights
    image: str = ""  # its picture; without one: noise
    task: str = "Move the ball to the square."  # and its prompt
    row: list[Literal[tuple(ROWS)]] = field(default_factory=list)  # only these
    out: Path = Path("runs/fast-wan")  # results, which resume

    def run(self) -> int:
        """Measures what is not in OUT yet or failed, and prints all of it. Raises Problem."""
        needed("skimage.metrics")
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        if card == "CPU" and not self.small:
            log.warning("No CUDA GPU: a tiny model on the CPU, which says nothing about a GPU.")
            self.small = True
        key = collabvr.digest(card, self.small, self.vgm, self.image, self.task)[:8]
        path = self.out / f"{key}.jsonl"
        self.out.mkdir(parents=True, exist_ok=True)
        path.touch()
        rows = {x["row"]: x for x in map(json.loads, path.read_text().splitlines())}
        for name in self.row or ROWS:
            if name not in rows or rows[name]["error"]:
                log.info("---- %s", name)
                rows[name] = self.measure(name, path.with_suffix(".mkv"), **ROWS[name])
                with open(path, "a") as file:
                    file.write(json.dumps(rows[name]) + "\n")
        what = "tiny" if self.small else "97 frames at 480p"
        print(Table(f"One clip ({what}, {self.vgm or 'random weights'}) on {card}", [
            "", "s/clip", "clips/hour", "peak GB", "skipped", "SSIM", "PSNR, dB"], [
            [k, x["seconds"], x["seconds"] and 3600 / x["seconds"], x["GB"], x["skipped"],
             x["SSIM"], x["PSNR"]] for k, x in rows.items()]).text())
        print(*(f"{k}: {x['error']}" for k, x in rows.items() if x["error"]), sep="\n")
        return 0 if any(x["seconds"] for x in rows.values()) else 1

    def measure(self, name: str, plain: Path, budget: float = 0, **options) -> dict:
        """A row: seconds, peak GB of the GPU, share of the passes that the cache skipped, likeness
        to the plain clip, which is kept in a file. What fails is a row with an error."""
        x: dict[str, Any] = dict.fromkeys(("seconds", "GB", "skipped", "SSIM", "PSNR", "error"))
        memory, wan = gpu_memory(), None
        try:
            if budget and not memory:
                raise Problem("a budget of GPU memory needs a GPU")
            wan = FastWan(**{"offload": "none", "vgm": self.vgm or "random"} | options)
            if not self.vgm:
                wan.pipe = random_wan(TINY if self.small else A14B)
                if wan.offload != "none":
                    wan.pipe.to("cpu")
            if budget:
                torch.cuda.empty_cache()
                torch.cuda.set_per_process_memory_fraction(min(1.0, budget * 1e9 / memory))
            _ = wan.pipe if self.vgm else wan.place(wan.pipe)
            shape = (64, 64, 3) if self.small else (480, 832, 3)
            frame = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
            frame = collabvr.load_image(self.image) if self.image else frame
            request = frame, self.task, 0.5 if self.small else 6.0, 0
            steps, wan.sampling_steps = wan.sampling_steps, 2
            wan(*request)  # compiles, and claims the memory
            wan.sampling_steps = min(steps, 6) if self.small else steps
            if memory:
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            clip = wan(*request)
            x["seconds"] = time.perf_counter() - began
            x["GB"] = torch.cuda.max_memory_reserved() / 1e9 if memory else None
            if passes := wan.passes["low-noise", 0]:
                x["skipped"] = 1 - wan.passes["low-noise", 1] / passes
            if name == "plain":
                collabvr.write_file(plain, collabvr.encode_video(clip, lossless=True))
            else:
                x["SSIM"], x["PSNR"] = likeness(plain, clip)
        except Exception as error:  # noqa: BLE001  the other rows go on
            x["error"] = collabvr.first_line(error)
            log.warning("%s: %s", name, x["error"])
        wan = None
        gc.collect()
        torch.compiler.reset()
        if memory:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0)
        return {"row": name} | x


def likeness(plain: Path, clip: Clip) -> tuple[float, float]:
    """Mean SSIM of every eighth frame, and PSNR in dB. Raises Problem without the plain clip."""
    with explained("No plain clip to compare with: measure that row first", OSError):
        frames = iio.imread(plain, plugin="pyav")
    error = np.mean((frames.astype(np.float32) - clip.frames) ** 2)
    return (float(np.mean([ssim(a, b) for a, b in zip(frames[::8], clip.frames[::8])])),
            10 * math.log10(255 ** 2 / error) if error else math.inf)


def main(argv=None) -> int:
    """0: something was measured; 1: nothing was; 2: something is wrong; 130: interrupted."""
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    return commands.guarded(
        "fast_wan.py", lambda: collabvr.parse(argv, Measurement, "fast_wan.py").run())


if __name__ == "__main__":
    sys.exit(main())
