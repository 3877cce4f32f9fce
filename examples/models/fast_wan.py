"""Wan on a GPU of your own, faster or in less memory than with diffusers' defaults.

    python -m examples.models.fast_wan --image x.png --task ".." --compile --fp8-matmul
    python -m examples.models.fast_wan .. --vgm Wan-AI/Wan2.2-TI2V-5B-Diffusers --fps 24
    python -m examples.models.measure_wan seconds     # what each option brings on this machine

Every option is off until you ask for it, and says at the start what it does. Exact up to rounding
are `compile` and `attention`, unless it names a backend that quantises. 8 bits, caches and LoRAs
change the clip.
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import sys
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

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
    # attention backend, a name of diffusers; auto: FlashAttention 3 if installed, else PyTorch's
    attention: str = "auto"
    # FirstBlockCache: a pass ends after its first block if that changed by less than this; 0: never
    cache_low: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of the low-noise expert; try 0.05
    cache_high: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of the high-noise expert
    lora_high: str = ""  # safetensors file: a 4-step LoRA of the high-noise expert
    lora_low: str = ""  # safetensors file: a 4-step LoRA of the low-noise expert
    sampling_steps: Annotated[int, Field(ge=0)] = 0  # denoising steps; 0: 20, or 4 with LoRAs
    guidance_scale: Annotated[float, Field(ge=0)] = 0.0  # CFG; 0: 5, or 1 (none) with LoRAs

    def __post_init__(self):
        few = self.has_loras()
        if not self.sampling_steps:
            self.sampling_steps = 4 if few else Wan.sampling_steps
        if not self.guidance_scale:
            self.guidance_scale = 1.0 if few else Wan.guidance_scale
        # (expert, 0): how many passes of the last clip began; (expert, 1): how many went on
        self.passes: collections.Counter = collections.Counter()

    def has_loras(self) -> bool:
        return bool(self.lora_high or self.lora_low)

    def check(self) -> None:
        """Raises Problem if this cannot work: before the checkpoint is downloaded."""
        super().check()
        if self.has_loras():
            needed("peft")
        if self.fp8_matmul:
            check_fp8_matmul()

    def place(self, pipe) -> None:
        """Sets the options in the order that they need: first what changes weights, then compiled
        blocks, then the cache's hooks on them, offloading last. Raises Problem."""
        experts = {"low-noise": pipe.transformer_2 or pipe.transformer}
        if pipe.transformer_2:
            experts["high-noise"] = pipe.transformer
        elif self.lora_high or self.cache_high:
            raise Problem(f"{self.vgm} has one expert: lora_low and cache_low are its settings.")
        if pipe.config.expand_timesteps and self.fps != 24:
            log.warning(
                "%s was trained at 24 frames per second, not %d: set fps.", self.vgm, self.fps)
        if self.has_loras():
            self.fuse_loras(pipe, experts)
        self.attend(experts)
        if self.compile:
            log.info("compile: the first clip of each length takes longer")
        for name, expert in experts.items():
            if self.fp8 or self.fp8_matmul:
                from examples.models.float8 import store_in_8_bits
                before = expert.get_memory_footprint()
                store_in_8_bits(expert.blocks, self.fp8_matmul)
                log.info("%s expert: %.2f instead of %.2f GB in 8 bits", name,
                         expert.get_memory_footprint() / 1e9, before / 1e9)
            if self.compile:
                # not compile_repeated_blocks: it takes in the cache's hooks, which cut the graph up
                # and run into PyTorch's limit of recompilations
                for block in expert.blocks:
                    block.forward = compiled(block.forward)
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
        log.info("%s expert: FirstBlockCache, threshold %g", name, threshold)

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
            log.info("%s expert: LoRA %s, %d steps, guidance %g", name, path, self.sampling_steps,
                     self.guidance_scale)
        # 4 steps are then at 999, 937, 833 and 625, where Wan2.2-Lightning was trained
        if "flow_shift" not in pipe.scheduler.config:
            raise Problem(f"{self.vgm}'s {type(pipe.scheduler).__name__} has no flow_shift to set.")
        pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, flow_shift=5.0)

    def attend(self, experts: dict) -> None:
        """Chooses the attention backend. "auto" never takes one that quantises or is downloaded.
        Raises Problem."""
        import torch
        backend = self.attention
        if backend == "auto":
            hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
            installed = importlib.util.find_spec("flash_attn_interface")
            backend = "_flash_3" if hopper and installed else "native"
        with explained(f"attention={backend} cannot be used", Exception):
            for expert in experts.values():
                expert.set_attention_backend(backend)
        log.info("attention: %s", backend)

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
            if self.skipped(name) is not None:
                log.info("%s expert: %.0f %% of %d passes ended after the first block", name,
                         100 * self.skipped(name), self.passes[name, 0])
        return clip


def compiled(forward):
    import torch
    return torch.compile(forward)


def check_fp8_matmul() -> None:
    """Raises Problem on a GPU that cannot multiply in 8 bits."""
    import torch
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        name = torch.cuda.get_device_name()
        raise Problem(f"{name} cannot multiply in 8 bits: use --fp8 in place of --fp8-matmul.")


if __name__ == "__main__":
    sys.exit(collabvr.main(FastWan))
