r"""Cosmos-Predict-2.5 as a generator, the paper's third (App. A.1), on a GPU of your own.

    pip install cosmos-guardrail torchvision
    python collabvr.py .. --seconds-first 5 --seconds-next 5 \
        --vgm examples/generators/cosmos.py:Cosmos

NVIDIA's license asks for the guardrail: it refuses prompts, which here is a failed generation, and
pixelates faces. Its own weights and the checkpoint may want an accepted license at the hub.
The paper ran the 14B post-trained model at 832x480, 16 fps and 5 s a step.
"""
from __future__ import annotations

import functools
import importlib
import math
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image
from pydantic import Field
from pydantic.dataclasses import dataclass as settings

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from collabvr import Clip, Problem, Wan, checked, explained, fit

AREA = 832 * 480  # pixels (App. A.1)


@settings(config=checked, eq=False)
class Cosmos(Wan):
    """Cosmos-Predict-2.5 as `vgm`. It has Wan's video autoencoder, so `check` and `place` are
    Wan's; the defaults not named in the paper are upstream's."""
    vgm: str = "nvidia/Cosmos-Predict2.5-14B"  # hub id or diffusers folder
    revision: str = "diffusers/base/post-trained"  # at the hub; this name is the 2B's, see its card
    sampling_steps: Annotated[int, Field(ge=1)] = 36  # denoising steps
    guidance_scale: Annotated[float, Field(ge=0)] = 7.0  # CFG

    @functools.cached_property
    def pipe(self):
        """The diffusers pipeline, loaded when first needed. Raises Problem."""
        for name in ("cosmos_guardrail", "torchvision"):
            how = "pip install cosmos-guardrail torchvision"
            with explained(f"{name} is needed: {how}", Exception):  # whatever its imports raise
                importlib.import_module(name)
        import diffusers
        import torch
        import transformers
        cuda = torch.cuda.is_available()
        size = sum(x.stat().st_size for x in Path(self.vgm).glob("*/*.safetensors")) / 1e9
        if not cuda and not 0 < size < 2:
            raise Problem(f"{self.vgm} needs a CUDA GPU, or is no folder.")
        if not sys.stderr.isatty():  # progress bars are for eyes, not for files
            diffusers.utils.logging.disable_progress_bar()
            transformers.utils.logging.disable_progress_bar()
        with explained(f"{self.vgm} cannot be loaded", Exception):  # whatever loaders raise
            pipe = diffusers.Cosmos2_5_PredictBasePipeline.from_pretrained(
                self.vgm, revision=self.revision, use_safetensors=True, dtype=torch.bfloat16)
            self.place(pipe)
        pipe.set_progress_bar_config(desc="denoising", leave=False, disable=None)  # None: for eyes
        return pipe

    def __call__(self, frame, prompt: str, seconds: float, seed: int) -> Clip:
        """A clip of 4k + 1 frames, 81 for 5 s, the conditioning frame included. Raises ValueError
        if it is not finite or the guardrail refuses, and whatever diffusers raises."""
        import torch
        size = at_480p(frame.shape[1], frame.shape[0])
        video = self.pipe(
            image=Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS), prompt=prompt,
            width=size[0], height=size[1], num_frames=4 * int(seconds * self.fps / 4 + 1e-6) + 1,
            num_inference_steps=self.sampling_steps, guidance_scale=self.guidance_scale,
            generator=torch.Generator().manual_seed(seed), output_type="np").frames[0]
        if not np.isfinite(video).all():
            raise ValueError("the clip holds values that are not finite")
        return Clip((video * 255).round().astype(np.uint8), self.fps)


def at_480p(width: int, height: int) -> tuple[int, int]:
    """A size of about this shape and 832x480 pixels of area, sides multiples of 16. A small picture
    is enlarged, for the model knows none; a size that comes from here stays as it is."""
    if width % 16 == height % 16 == 0 and AREA / 2 <= width * height <= AREA:
        return width, height
    scale = max(1.0, math.sqrt(AREA / (width * height)))
    return fit(round(width * scale), round(height * scale), 16)
