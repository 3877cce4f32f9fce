"""Wan on a GPU of your own, faster or in less memory than with diffusers' defaults.

    python -m examples.models.fast_wan --image x.png --task ".." --compile --fp8-matmul
    python -m examples.models.fast_wan .. --lora-high HIGH.safetensors --lora-low LOW.safetensors \\
        --sampling-steps 4 --guidance-scale 1 --flow-shift 5

Every option is off until you ask for it. Exact up to rounding are `compile` and `attention`, unless
it names a backend that quantises. 8 bits, caches and LoRAs change the clip.
"""

from __future__ import annotations

import collections
import functools
import sys
from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as settings
from torch.nn import functional as F

import collabvr
from collabvr import Clip, Problem, Wan, explained, log
from examples.cli import needed


@settings(config={"extra": "forbid"}, eq=False)
class FastWan(Wan):
    """Wan with options. The pipeline's `transformer` is the high-noise expert, which fixes the plan
    in the first steps. `transformer_2` is the low-noise one. An only expert counts as low-noise."""

    fp8: bool = False  # store the blocks' weights in 8 bits: half of bf16's memory
    fp8_matmul: bool = False  # and multiply in 8 bits: Ada, Hopper or newer; pays with compile only
    compile: bool = False  # compile the blocks, while the first clip of each length is made
    attention: str = "native"  # attention backend, a name of diffusers: _flash_3
    # FirstBlockCache: a pass ends after its first block if that changed by less than this; 0: never
    cache_low: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of the low-noise expert; try 0.05
    cache_high: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of the high-noise expert
    lora_high: str = ""  # safetensors file: a LoRA of the high-noise expert
    lora_low: str = ""  # safetensors file: a LoRA of the low-noise expert

    def __post_init__(self):
        # (expert, 0): how many passes of the last clip began; (expert, 1): how many went on
        self.passes: collections.Counter = collections.Counter()

    def check(self) -> None:
        """Raises Problem if this cannot work: before the checkpoint is downloaded."""
        super().check()
        if self.lora_high or self.lora_low:
            needed("peft")
        on_gpu = torch.cuda.is_available()
        if self.fp8_matmul and on_gpu and torch.cuda.get_device_capability() < (8, 9):
            card = torch.cuda.get_device_name()
            raise Problem(f"{card} cannot multiply in 8 bits: use --fp8 in place of it.")

    def place(self, pipe) -> None:
        """Sets the options in the order that they need: first what changes weights, then compiled
        blocks, then the cache's hooks on them, offloading last. Raises Problem."""
        experts = {"low-noise": pipe.transformer_2 or pipe.transformer}
        if pipe.transformer_2:
            experts["high-noise"] = pipe.transformer
        elif self.lora_high or self.cache_high:
            raise Problem(f"{self.vgm} has one expert: lora_low and cache_low are its settings.")
        if self.lora_high or self.lora_low:
            self.fuse_loras(pipe, experts)
        for name, expert in experts.items():
            with explained(f"attention={self.attention} cannot be used", Exception):
                expert.set_attention_backend(self.attention)
            if self.fp8 or self.fp8_matmul:
                before = expert.get_memory_footprint()
                store_in_8_bits(expert.blocks, self.fp8_matmul)
                log.info("%s expert: %.2f instead of %.2f GB in 8 bits", name,
                         expert.get_memory_footprint() / 1e9, before / 1e9)
            if self.compile:
                # not compile_repeated_blocks: it takes in the cache's hooks, which cut the graph up
                # and run into PyTorch's limit of recompilations
                for block in expert.blocks:
                    block.forward = torch.compile(block.forward)
            self.cache(name, expert)
        super().place(pipe)

    def cache(self, name: str, expert) -> None:
        """Sets the FirstBlockCache of one expert, and counts how often it skips."""
        import diffusers

        threshold = self.cache_low if name == "low-noise" else self.cache_high
        if not threshold:
            return
        for k in (0, 1):
            expert.blocks[k].forward = self.counted(expert.blocks[k].forward, (name, k))
        expert.enable_cache(diffusers.FirstBlockCacheConfig(threshold))

    def fuse_loras(self, pipe, experts: dict) -> None:
        """Adds the LoRAs to the experts' weights, where they cost no time. Raises Problem."""
        from safetensors.torch import load_file

        for name, expert in experts.items():
            path = self.lora_low if name == "low-noise" else self.lora_high
            part = "transformer" if expert is pipe.transformer else "transformer_2"
            if not path:
                raise Problem(f"{self.vgm} has two experts: set both lora_high and lora_low.")
            with explained(f"{path} is no LoRA of the {name} expert", Exception):
                pipe.load_lora_weights(
                    load_file(path), load_into_transformer_2=part == "transformer_2")
                if part not in pipe.get_list_adapters():
                    raise ValueError("no weight of it fits")
                pipe.fuse_lora(components=[part])
                pipe.unload_lora_weights()

    def counted(self, forward, key):
        """A block's forward that also counts in `passes`."""
        @functools.wraps(forward)
        def count(*args, **kwargs):
            self.passes[key] += 1
            return forward(*args, **kwargs)
        return count

    def skipped(self, name: str) -> float | None:
        """The share of an expert's passes of the last clip that ended after the first block."""
        began = self.passes[name, 0]
        return 1 - self.passes[name, 1] / began if began else None

    def __call__(self, frame, prompt: str, seconds: float, seed: int) -> Clip:
        """As Wan's. Says how often the caches skipped."""
        self.passes.clear()
        self.pipe.maybe_free_model_hooks()  # empties the caches, which a failed clip has not
        clip = super().__call__(frame, prompt, seconds, seed)
        for name in ("high-noise", "low-noise"):
            share = self.skipped(name)
            if share is not None:
                log.info("%s expert: %.0f %% of %d passes ended after the first block", name,
                         100 * share, self.passes[name, 0])
        return clip


# ------------------------------------------------------------------------------
# Linear layers with 8-bit weights

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # 448


class Float8Linear(torch.nn.Linear):  # the base class is what diffusers' group offload looks for
    """A linear layer whose weights take half of bf16's memory.

    Every row of them is scaled to float8's range: without that, as in diffusers' layerwise casting,
    Wan's small weights lose precision. With `multiply` every row of the input is scaled and cast
    too, and the GPU multiplies in 8 bits.
    """

    scale: torch.Tensor  # of each row: (out, 1), float32

    def __init__(self, layer: torch.nn.Linear, multiply: bool):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.multiply = multiply
        weight, scale = to_float8(layer.weight.detach())
        self.weight = torch.nn.Parameter(weight, requires_grad=False)  # (out, in)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(.., in) to (.., out), in the input's dtype."""
        if not self.multiply:
            return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)
        rows, scale = to_float8(x.flatten(0, -2))
        product = torch._scaled_mm(
            rows, self.weight.t(), scale_a=scale, scale_b=self.scale.t(), bias=self.bias,
            out_dtype=x.dtype, use_fast_accum=True)
        return product.unflatten(0, x.shape[:-1])


def to_float8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, m) as float8, and the float32 scale of each row (n, 1)."""
    scale = rows.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (rows / scale).to(FLOAT8), scale


def store_in_8_bits(blocks: torch.nn.Module, multiply: bool) -> None:
    """Puts a Float8Linear in the place of every linear layer."""
    for parent in list(blocks.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is torch.nn.Linear:
                setattr(parent, name, Float8Linear(layer, multiply))


if __name__ == "__main__":
    sys.exit(collabvr.main(FastWan))
