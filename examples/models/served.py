"""Wan2.2 behind a server: SGLang Diffusion and vLLM-Omni both offer POST /v1/videos.

    python -m examples.models.served --image x.png --task ".." --url http://localhost:30000

This is the way to several GPUs a clip, to 8-bit weights and LoRAs, and to small cards. README.md
has the commands that start the servers. Clips come as H.264 without loss, except that two by two
pixels share a colour. SERVED_API_KEY, if it is set, is sent to the server.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import Annotated, Any

from PIL import Image
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass as settings

import collabvr
from collabvr import Clip, Problem, Wan, explained, fit
from examples.models.h264 import decoded

POLL = 1.0  # seconds between two looks at a job
DEFAULTS = {  # where a server's own default is another, or loses more than it need
    "negative_prompt": "",  # SGLang: a text of its own
    "output_quality": "maximum",  # SGLang: CRF 0, not 25
    "extra_params": {"video_codec_options": {"crf": "0", "preset": "ultrafast"}},  # vLLM-Omni
}


@settings(config={"extra": "forbid"}, eq=False)
class Served:
    """A server's Wan2.2: at most 832x480 pixels, sides multiples of 16, clips of 4k + 1 frames."""

    url: str = "http://localhost:30000"  # SGLang's
    model: str = "Video-Reason/VBVR-Wan2.2"  # as the server's /v1/models names it
    fps: Annotated[int, Field(ge=1, le=240)] = 16  # frames per second (App. A.1)
    sampling_steps: Annotated[int, Field(ge=1)] = 20  # denoising steps (App. A.1)
    guidance_scale: Annotated[float, Field(ge=0)] = 5.0  # CFG, of both experts (App. A.1)
    # more fields of the form, as a JSON object: {"flow_shift": 5}
    fields: Annotated[str, AfterValidator(collabvr.json_object)] = "{}"
    clip_timeout: Annotated[float, Field(gt=0)] = 3600.0  # longest wait for a clip, in seconds

    @property
    def identity(self) -> dict:
        """The settings that change the clips."""
        return {**asdict(self), "url": None, "clip_timeout": None}

    @cached_property
    def client(self):
        import openai

        with explained("No client can be made: see ALL_PROXY and SSL_CERT_FILE", Exception):
            return openai.OpenAI(
                api_key=os.environ.get("SERVED_API_KEY") or "none",
                base_url=f"{self.url.rstrip('/').removesuffix('/v1')}/v1",
                timeout=openai.Timeout(60, connect=8),
            )

    def check(self) -> None:
        """Raises Problem if no server answers, or if it serves another model."""
        with explained(f"{self.url} does not name its models", Exception), self.answers():
            names = [model.id for model in self.client.models.list()]
        if self.model not in names:  # SGLang would take the job all the same
            raise Problem(f"{self.url} serves {', '.join(names) or 'nothing'}, not {self.model}: "
                          "give its name as --model, or start it with --served-model-name.")

    def __call__(self, frame, prompt: str, seconds: float, seed: int) -> Clip:
        """A clip of 4k + 1 frames, the conditioning frame included.

        Raises Problem if the server cannot be reached or is not done in time; RuntimeError if it
        refuses or the job fails; ValueError if the clip is not what was asked for.
        """
        size = fit(frame.shape[1], frame.shape[0], 16)
        picture = Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)
        form = self.form(prompt, seconds, seed, size)
        clip = decoded(self.make(form, picture))
        length, height, width, _ = clip.frames.shape
        got = f"{length} frames of {width}x{height} at {clip.fps:g} fps"
        asked = f"{form['num_frames']} frames of {form['size']} at {form['fps']} fps"
        if got != asked:
            raise ValueError(f"the server sent {got}, not {asked}")
        return clip

    def form(self, prompt: str, seconds: float, seed: int, size: tuple[int, int]) -> dict[str, str]:
        """The fields of the request. None is left to the server's defaults."""
        form = {
            "prompt": prompt,
            "model": self.model,
            "seed": seed,
            "fps": self.fps,
            "num_frames": Wan.num_frames(self, seconds),  # type: ignore[arg-type]  # needs fps only
            "size": f"{size[0]}x{size[1]}",  # SGLang takes the shape from the picture
            "num_inference_steps": self.sampling_steps,
            "guidance_scale": self.guidance_scale,
            "guidance_scale_2": self.guidance_scale,
            **DEFAULTS,
            **collabvr.parse(self.fields),
        }
        return {k: v if isinstance(v, str) else json.dumps(v) for k, v in form.items()}

    def make(self, form: dict[str, str], picture: Image.Image) -> bytes:
        """The MP4 of a job or, if the server keeps no jobs, of one request that waits for it."""
        import openai

        png = io.BytesIO()
        picture.save(png, "PNG")
        request: dict = {
            "files": [(name, (None, value)) for name, value in form.items()]
            + [("input_reference", ("frame.png", png.getvalue()))],
            # never repeated: the server may be at work already
            "options": {"headers": {"Content-Type": "multipart/form-data"}, "max_retries": 0},
        }
        with self.answers():
            try:
                job: Any = self.client.post("/videos", cast_to=object, **request)
            except openai.ConflictError:  # vLLM-Omni with several API processes
                request["options"]["timeout"] = self.clip_timeout
                kind = openai.HttpxBinaryResponseContent
                return self.client.post("/videos/sync", cast_to=kind, **request).content
            return self.wait(f"/videos/{job['id']}")

    def wait(self, path: str) -> bytes:
        """The MP4 of the job at that path, when it is done."""
        import openai

        end = time.monotonic() + self.clip_timeout
        while time.monotonic() < end:
            job: Any = self.client.get(path, cast_to=object)
            if job["status"] == "completed":
                kind = openai.HttpxBinaryResponseContent
                return self.client.get(f"{path}/content", cast_to=kind).content
            if job["status"] not in ("queued", "in_progress"):
                raise RuntimeError(f"{self.url} made no clip: {job.get('error') or job}")
            time.sleep(POLL)
        raise Problem(f"{self.url} was not done in {self.clip_timeout:g} s.")

    @contextmanager
    def answers(self):
        """What the server refuses becomes a RuntimeError, no answer at all a Problem."""
        import openai

        try:
            yield
        except openai.APIStatusError as error:
            said = collabvr.message_of(error.response.text)
            key = os.environ.get("SERVED_API_KEY")
            said = said.replace(key, "***") if key else said
            raise RuntimeError(f"{self.url} answered {error.status_code}: {said}") from error
        except openai.APIConnectionError as error:
            raise Problem(f"{self.url} cannot be reached ({error.__cause__ or error}).") from error


if __name__ == "__main__":
    sys.exit(collabvr.main(Served))
