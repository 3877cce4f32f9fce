"""Veo 3.1 on Vertex, through google-genai.

    gcloud auth application-default login
    python -m examples.models.veo --image x.png --task ".." --project MY-PROJECT \\
        --seconds-first 8 --seconds-next 4 --M 2

These lengths and M are the paper's (App. A.1). Its three steps are the default. Its routing of
whole samples (App. A.5) is `Routed` in examples/baselines.py.

A clip is taken as it comes: 8 s at 24 fps are 192 frames, and as frame 0 is the input, 191/24 s are
new. It comes as H.264, so each step loses a little. What is interrupted is not fetched later: the
clip that Google was making then is ordered, and paid for, again.
"""

from __future__ import annotations

import io
import sys
import time
from functools import cached_property
from typing import Annotated

import numpy as np
from PIL import Image
from pydantic import Field
from pydantic.dataclasses import dataclass as settings

import collabvr
from collabvr import Clip, Problem, explained
from examples.cli import needed
from examples.models.h264 import decoded

WIDTH, HEIGHT = 1280, 720  # 16:9 at 720p, Veo's smallest
LENGTHS = (4, 6, 8)  # seconds that a clip of Veo may have
Box = tuple[int, int, int, int]  # left, top, width, height


@settings(config={"extra": "forbid"}, eq=False)
class Veo:
    """Veo on Vertex, with Google's own credentials.

    All clips of a picture have its shape in 720p: the picture is sent between black bars, and the
    bars are cut off the clip. For a gateway set GOOGLE_VERTEX_BASE_URL.
    """

    model: str = "veo-3.1-fast-generate-001"  # as Vertex names it
    project: str = ""  # of Google Cloud
    location: str = "us-central1"  # of Vertex
    # seconds between two looks whether a clip is done
    poll_seconds: Annotated[float, Field(gt=0, le=600)] = 10.0
    clip_timeout: Annotated[float, Field(gt=0)] = 900.0  # longest wait for a clip, in seconds

    @property
    def identity(self) -> dict:
        """The settings that change the clips."""
        return {"model": self.model}

    def check(self) -> None:
        """Raises Problem if the package, the project or the credentials are missing."""
        _ = self.client

    @cached_property
    def client(self):
        genai = needed("google.genai")
        if not self.project:
            raise Problem("Veo needs a project of Google Cloud: --project YOURS.")
        with explained("Vertex needs Google's own credentials", Exception):
            scopes = ["https://www.googleapis.com/auth/cloud-platform"]
            return genai.Client(
                vertexai=True,
                project=self.project,
                location=self.location,
                credentials=needed("google.auth").default(scopes=scopes)[0],
                http_options={"timeout": 60_000, "retry_options": {}},  # ms; five tries
            )

    def __call__(self, frame, prompt: str, seconds: float, seed: int) -> Clip:
        """A clip in the frame's shape.

        Raises Problem for a length that Veo cannot make or if it takes too long, RuntimeError with
        Google's reason if it made nothing, and what google-genai raises.
        """
        if seconds not in LENGTHS:
            raise Problem(f"Veo makes clips of 4, 6 or 8 s, not {seconds:g}: the paper's are "
                          "--seconds-first 8 --seconds-next 4.")
        box = picture_box(frame.shape[1], frame.shape[0])
        operation = self.client.models.generate_videos(
            model=self.model,
            source={
                "prompt": prompt,
                "image": {"image_bytes": letterbox(frame, box), "mime_type": "image/png"},
            },
            config={
                "aspect_ratio": "16:9",
                "resolution": "720p",
                "duration_seconds": int(seconds),
                "seed": seed % 2**31,
                "generate_audio": False,
                # without an answer the clip may have been ordered: the client orders it once
                "http_options": {"retry_options": {"attempts": 1}},
            },
        )
        return unboxed(self.delivery(operation), box)

    def delivery(self, operation) -> bytes:
        """The operation's MP4, when it is done."""
        end = time.monotonic() + self.clip_timeout
        while not operation.done:
            if time.monotonic() > end:
                raise Problem(f"Veo was not done after {self.clip_timeout:g} s.")
            time.sleep(self.poll_seconds)
            operation = self.client.operations.get(operation)
        response = operation.response
        if not response or not response.generated_videos:
            reason = operation.error or (response and response.rai_media_filtered_reasons)
            raise RuntimeError(f"Veo made no clip: {reason or 'no reason given'}")
        return response.generated_videos[0].video.video_bytes


# ------------------------------------------------------------------------------
# Between black bars


def picture_box(width: int, height: int) -> Box:
    """Where a picture of that shape lies in 16:9.

    A picture that was cut out of its box fits it exactly, so the clips of a run have one size. All
    numbers are even, because video halves colours.
    """
    scale = min(WIDTH / width, HEIGHT / height)
    w, h = (max(2, 2 * round(side * scale / 2)) for side in (width, height))
    return (WIDTH - w) // 4 * 2, (HEIGHT - h) // 4 * 2, w, h


def letterbox(frame: np.ndarray, box: Box) -> bytes:
    """A PNG of 1280x720 pixels, with the frame in its box and black around it."""
    left, top, *size = box
    canvas, out = Image.new("RGB", (WIDTH, HEIGHT)), io.BytesIO()
    canvas.paste(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS), (left, top))
    canvas.save(out, "PNG")
    return out.getvalue()


def unboxed(mp4: bytes, box: Box) -> Clip:
    """What lies in the box, whatever the video's size.

    It is cut out before it becomes RGB, or the bars would run into it.
    """
    left, top, w, h = box
    across, down = f"iw/{WIDTH}", f"ih/{HEIGHT}"
    area = f"{w}*{across}:{h}*{down}:{left}*{across}:{top}*{down}"
    return decoded(mp4, area, f"{w}:{h}")


if __name__ == "__main__":
    sys.exit(collabvr.main(Veo))
