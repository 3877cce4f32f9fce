r"""Wan on a GPU of your own, faster or in less memory than with diffusers' defaults.

    python collabvr.py .. --vgm examples/generators/fast_wan.py:FastWan \
        --vgm-arg fp8=true --vgm-arg cache_low=0.05
    python collabvr.py .. --vgm-arg vgm=Wan-AI/Wan2.2-TI2V-5B-Diffusers --vgm-arg fps=24
    python examples/generators/fast_wan.py        # what each option brings here: measure_wan.py

Every option is off until asked for and says at the start what it does. `compile` is exact up to
rounding, and so is `attention`, unless it names a backend that quantises; fp8, caches and LoRAs
change the clip.
"""
from __future__ import annotations

import collections
import functools
import importlib.util
import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

sys.path[:0] = [str(Path(__file__).resolve().parents[k]) for k in (1, 2)]
from commands import needed

from collabvr import Clip, Problem, Wan, checked, explained, log


@settings(config=checked, eq=False)
class FastWan(Wan):
    """Wan with options. The pipeline's `transformer` is the high-noise expert, which fixes the plan
    in the first steps, `transformer_2` the low-noise one; an only expert counts as low-noise."""
    fp8: bool = False  # the experts' weights are stored in 8 bits, half of bf16's memory
    # FirstBlockCache: a pass ends after its first block if that changed by less than this; 0: off
    cache_low: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of the low-noise expert; try 0.05
    cache_high: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of the high-noise expert
    compile: bool = False  # the blocks, while the first clip of each length is made
    # a backend's name in diffusers; auto: FlashAttention 3 where it is installed, else PyTorch's
    attention: str = "auto"
    lora_high: str = ""  # safetensors file: a 4-step LoRA of the high-noise expert
    lora_low: str = ""  # and of the low-noise one
    sampling_steps: Annotated[int, Field(ge=0)] = 0  # 0: Wan's 20, or 4 with LoRAs
    guidance_scale: Annotated[float, Field(ge=0)] = 0.0  # 0: Wan's 5, or 1 (none) with LoRAs

    def __post_init__(self):
        few = bool(self.lora_high or self.lora_low)
        self.sampling_steps = self.sampling_steps or (4 if few else Wan.sampling_steps)
        self.guidance_scale = self.guidance_scale or (1.0 if few else Wan.guidance_scale)
        # (expert, 0): how many of the clip's passes began; 1: how many went beyond the first block
        self.passes: collections.Counter = collections.Counter()

    @functools.cached_property
    def pipe(self):
        """Wan's pipeline with the options. Raises Problem."""
        if self.lora_high or self.lora_low:
            needed("peft")  # before the checkpoint is downloaded
        return super().pipe

    def place(self, pipe) -> None:
        """Sets the options in the order that they need: what changes weights first, compiled blocks
        before the cache's hooks on them, offloading last. Raises Problem."""
        import diffusers
        import torch
        experts = {"low-noise": pipe.transformer_2 or pipe.transformer}
        if pipe.transformer_2:
            experts["high-noise"] = pipe.transformer
        elif self.lora_high or self.cache_high:
            raise Problem(f"{self.vgm} has one expert: lora_low and cache_low are its settings.")
        if pipe.config.expand_timesteps and self.fps != 24:
            log.warning("%s was trained at 24 frames per second, not %d: set fps.", self.vgm,
                        self.fps)
        if self.lora_high or self.lora_low:
            self.fuse_loras(pipe, experts)
        self.attend(experts)
        if self.compile:
            cut = "; the casts of fp8 cut each block into several graphs" if self.fp8 else ""
            log.info("compile: the first clip of each length takes longer%s", cut)
        for name, expert in experts.items():
            threshold = self.cache_low if name == "low-noise" else self.cache_high
            for k, block in enumerate(expert.blocks):
                # not compile_repeated_blocks: it takes in the cache's hooks, which cut the graph up
                # and run into PyTorch's limit of recompilations
                if self.compile:
                    block.forward = torch.compile(block.forward)
                if threshold and k < 2:
                    block.forward = self.counted(block.forward, (name, k))
            if threshold:
                expert.enable_cache(diffusers.FirstBlockCacheConfig(threshold))
                log.info("%s expert: FirstBlockCache, threshold %g", name, threshold)
            if self.fp8:
                before = expert.get_memory_footprint()
                expert.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
                log.info("%s expert: stored as float8, %.2f instead of %.2f GB", name,
                         expert.get_memory_footprint() / 1e9, before / 1e9)
        super().place(pipe)

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
        """Chooses the attention backend. "auto" never takes one that quantises or is fetched."""
        import torch
        backend = self.attention
        if backend == "auto":
            hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
            there = importlib.util.find_spec("flash_attn_interface")
            backend = "_flash_3" if hopper and there else "native"
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

    def __call__(self, frame, prompt: str, seconds: float, seed: int) -> Clip:
        """As Wan's. Says how often the caches could skip."""
        self.passes.clear()
        self.pipe.maybe_free_model_hooks()  # empties the caches, which a failed clip has not
        clip = super().__call__(frame, prompt, seconds, seed)
        for name in sorted({name for name, _ in self.passes}):
            log.info("%s expert: %d of %d passes ended after the first block", name,
                     self.passes[name, 0] - self.passes[name, 1], self.passes[name, 0])
        return clip


if __name__ == "__main__":
    from measure_wan import main
    sys.exit(main())
