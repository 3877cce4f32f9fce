"""Cosmos-Predict-2.5, the paper's third generator (App. A.1), on a GPU of your own.

    pip install cosmos-guardrail torchvision
    python -m examples.models.cosmos --image x.png --task ".." \\
        --seconds-first 5 --seconds-next 5

NVIDIA's license asks for the guardrail: it refuses prompts, which is a failed generation here, and
pixelates faces. Its own weights and the checkpoint may want an accepted license at the hub.
The paper ran the 14B post-trained model at 832x480, 16 fps and 5 s a step.
"""

from __future__ import annotations

import math
import sys
from typing import Annotated

import numpy as np
from PIL import Image
from pydantic import Field
from pydantic.dataclasses import dataclass as settings

import collabvr
from collabvr import Clip, Problem, Wan, explained, fit


@settings(config={"extra": "forbid"}, eq=False)
class Cosmos(Wan):
    """Cosmos-Predict-2.5, whose defaults are upstream's where the paper names none.

    It has Wan's video autoencoder and placement, so only loading and calling differ from Wan.
    """

    vgm: str = "nvidia/Cosmos-Predict2.5-14B"  # hub id or diffusers folder
    revision: str = "diffusers/base/post-trained"  # at the hub; the 2B's name, see the 14B's card
    sampling_steps: Annotated[int, Field(ge=1)] = 36  # denoising steps
    guidance_scale: Annotated[float, Field(ge=0)] = 7.0  # CFG
    negative_prompt: str = ""  # what CFG leads away from; empty: upstream's long list of flaws

    def check(self) -> None:
        """Raises Problem if this cannot work: before the checkpoint is downloaded."""
        for name in ("cosmos_guardrail", "torchvision"):
            how = "pip install cosmos-guardrail torchvision"
            with explained(f"{name} is needed: {how}", Exception):  # whatever its imports raise
                __import__(name)
        if self.flow_shift is not None:
            raise Problem("Cosmos has no --flow-shift.")
        super().check()

    def load(self):
        """The diffusers pipeline from disk."""
        import diffusers
        import torch

        pipe = diffusers.Cosmos2_5_PredictBasePipeline.from_pretrained(
            self.vgm, revision=self.revision, use_safetensors=True, dtype=torch.bfloat16)
        if self.tile_vae:
            pipe.vae.enable_tiling()
        return pipe

    def __call__(self, frame, prompt: str, seconds: float, seed: int) -> Clip:
        """A clip of 4k + 1 frames, 5 at least: 81 for 5 s.

        Raises ValueError if it is not finite or the guardrail refuses, and what diffusers raises.
        """
        import torch

        width, height = at_area(frame.shape[1], frame.shape[0], self.max_pixels)
        video = self.pipe(
            image=Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS),
            prompt=prompt,
            negative_prompt=self.negative_prompt or None,
            width=width,
            height=height,
            num_frames=self.num_frames(seconds),
            num_inference_steps=self.sampling_steps,
            guidance_scale=self.guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).frames[0]
        if not np.isfinite(video).all():
            raise ValueError("the clip contains values that are not finite")
        return Clip((video * 255).round().astype(np.uint8), self.fps)


def at_area(width: int, height: int, area: int) -> tuple[int, int]:
    """A size of about this shape and `area` pixels, sides multiples of 16.

    A small picture is enlarged, because the model knows none. A size from here stays as it is.
    """
    if width % 16 == height % 16 == 0 and area / 2 <= width * height <= area:
        return width, height
    scale = max(1.0, math.sqrt(area / (width * height)))
    return fit(round(width * scale), round(height * scale), 16, area)


if __name__ == "__main__":
    sys.exit(collabvr.main(Cosmos))
