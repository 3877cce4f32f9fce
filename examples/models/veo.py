"""Veo 3.1, through google-genai.

    gcloud auth application-default login
    python -m examples.models.veo --image x.png --task ".." --project MY-PROJECT \\
        --seconds-first 8 --seconds-next 4 --M 2

These lengths and M are the paper's (App. A.1); its three steps are the default. Its routing of
whole samples (App. A.5) is `Routed` in examples/baselines.py.

Models come and go: the paper's veo-3.1-fast-generate-preview is said to have left the Gemini API on
2026-10-22, with all of Veo, and google-genai 3 knows Veo on Vertex only. A gateway that speaks the
Gemini API's dialect needs the older one: pip install google-genai==2.34.0.

A clip is taken as it comes: 8 s at 24 fps are 192 frames, and as frame 0 is the input, 191/24 s are
new. It comes as H.264, so each step loses a little.
"""

from __future__ import annotations

import io
import os
import sys
import time
from functools import cached_property
from pathlib import Path
from typing import Annotated

import av
import numpy as np
from av.video.reformatter import Interpolation
from PIL import Image
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass as settings
from tqdm import tqdm

import collabvr
from collabvr import Clip, Problem, explained, log
from examples.cli import needed

WIDTH, HEIGHT = 1280, 720  # 16:9 at 720p, Veo's smallest
LENGTHS = (4, 6, 8)  # seconds that a clip of Veo may have
PATIENCE = (1, 2, 4, 8)  # polls to wait before a busy server is asked again
# rounded, or every step would be darker than the last
ROUNDED = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
Box = tuple[int, int, int, int]  # left, top, right, bottom


def no_or_base_url(url: str) -> str:
    return url and collabvr.base_url(url)


@settings(config={"extra": "forbid"}, eq=False)
class Veo:
    """Veo on Vertex, or with google-genai 2 by API key on what speaks the Gemini API.

    All clips of a picture have its shape in 720p: the picture is sent between black bars, and the
    bars are cut off the clip.
    """

    model: str = "veo-3.1-fast-generate-001"  # as Google names it
    project: str = ""  # of Google Cloud: asks Vertex; without one: the Gemini API's dialect
    location: str = "us-central1"  # of Vertex
    # of a gateway that speaks like Vertex or the Gemini API; its key is VEO_API_KEY
    url: Annotated[str, AfterValidator(no_or_base_url)] = ""
    dollars_per_second: Annotated[float, Field(ge=0)] = 0.15  # Veo 3.1 Fast in the paper (C.3)
    # seconds between two looks whether a clip is done
    poll_seconds: Annotated[float, Field(gt=0, le=600)] = 10.0
    clip_timeout: Annotated[float, Field(gt=0)] = 900.0  # longest wait for a clip, in seconds
    jobs: Path = Path("runs/veo")  # folder of what was ordered, so that nothing is paid for twice

    def __post_init__(self):
        self.dollars = 0.0  # for the clips that this process ordered

    @property
    def identity(self) -> dict:
        """The settings that change the clips."""
        return {"model": self.model, "vertex": bool(self.project)}

    def check(self) -> None:
        """Raises Problem if the package or the credentials are missing."""
        _ = self.client

    @cached_property
    def client(self):
        """The client of google-genai, made when it is first needed. Raises Problem."""
        genai = needed("google.genai")
        options = {
            "base_url": self.url or None,
            "timeout": int(1000 * min(60, self.clip_timeout)),
            "retry_options": {},  # its default: five tries
        }
        if self.project:
            return genai.Client(
                vertexai=True, project=self.project, location=self.location,
                credentials=self.credentials(), http_options=options)
        if int(genai.__version__.split(".")[0]) > 2:
            raise Problem("google-genai 3 knows Veo on Vertex only: give --project YOURS, or for "
                          "the Gemini API's dialect take the older one (pip install "
                          "google-genai==2.34.0).")
        return genai.Client(vertexai=False, api_key=self.key(), http_options=options)

    def credentials(self):
        """What Vertex, or a gateway in its place, is given. Raises Problem."""
        if self.url:
            return needed("google.oauth2.credentials").Credentials(self.key())
        with explained("Vertex needs Google's own credentials", Exception):
            scopes = ["https://www.googleapis.com/auth/cloud-platform"]
            return needed("google.auth").default(scopes=scopes)[0]

    def key(self) -> str:
        """Google's keys do not go to a gateway, nor a gateway's to Google. Raises Problem."""
        names = ["VEO_API_KEY"] if self.url else ["GEMINI_API_KEY", "GOOGLE_API_KEY"]
        for name in names:
            if os.environ.get(name):
                return os.environ[name]
        raise Problem(f"No API key for {self.url or 'Google'}: set {names[0]}; or --project YOURS "
                      "asks Vertex with Google's own credentials.")

    def __call__(self, frame, prompt: str, seconds: float, seed: int) -> Clip:
        """A clip in the frame's shape.

        Raises Problem if Google cannot be asked or takes too long, RuntimeError with its reason if
        it made nothing, and what a decoder raises.
        """
        if seconds not in LENGTHS:
            raise Problem(f"Veo makes clips of 4, 6 or 8 s, not {seconds:g}: the paper's are "
                          "--seconds-first 8 --seconds-next 4.")
        box = picture_box(frame.shape[1], frame.shape[0])
        where = self.model, self.project, self.location, self.url
        job = self.jobs / collabvr.digest(*where, frame, prompt, seconds, seed)[:16]
        ordered_earlier = job.exists()
        if not ordered_earlier:
            with explained(f"{self.jobs} cannot be written to", OSError):
                self.jobs.mkdir(parents=True, exist_ok=True)
            name = self.order(letterbox(frame, box), prompt, int(seconds), seed)
            collabvr.write_file(job, name.encode())
        try:
            clip = unboxed(self.delivery(job), box)
        except RuntimeError:  # nothing will come of this job
            job.unlink()
            raise
        if not ordered_earlier:
            self.dollars += seconds * self.dollars_per_second
        log.info("Veo: %g s at $%g a second%s; $%.2f since the start", seconds,
                 self.dollars_per_second, ", ordered earlier" if ordered_earlier else "",
                 self.dollars)
        return clip

    def order(self, picture: bytes, prompt: str, seconds: int, seed: int) -> str:
        """Starts an operation and returns its name. Raises Problem.

        Only a busy server is asked again: where no answer came, a clip may have been ordered.
        """
        genai = needed("google.genai")
        config: dict = {
            "aspect_ratio": "16:9",
            "resolution": "720p",
            "duration_seconds": seconds,
            "http_options": {"retry_options": {"attempts": 1}},
        }
        if self.project:  # google-genai has neither for the Gemini API
            config |= {"seed": seed % 2**31, "generate_audio": False}
        source = {"prompt": prompt, "image": {"image_bytes": picture, "mime_type": "image/png"}}
        with explained(f"{self.url or 'Google'} did not start a clip of {self.model}", Exception):
            for polls in (*PATIENCE, None):
                try:
                    operation = self.client.models.generate_videos(
                        model=self.model, source=source, config=config)
                except genai.errors.APIError as error:
                    if error.code not in (429, 503) or polls is None:
                        raise
                    log.info("Veo: busy (%d)", error.code)
                    time.sleep(polls * self.poll_seconds)
                else:
                    return operation.name
        raise AssertionError("the last try raises or returns")

    def delivery(self, job: Path) -> bytes:
        """The MP4 of the operation that `job` names. Raises Problem, RuntimeError."""
        genai = needed("google.genai")
        lost = f"The clip that {job} names did not come; the same command goes on"
        with explained(lost, Exception):
            try:
                operation = self.finished(genai.types.GenerateVideosOperation(name=job.read_text()))
            except genai.errors.ClientError as error:
                if error.code == 404:  # forgotten there: the next start orders anew
                    job.unlink()
                raise
        response = operation.response
        if not response or not response.generated_videos:
            reason = operation.error or (response and response.rai_media_filtered_reasons)
            raise RuntimeError(f"Veo made no clip: {reason or 'no reason given'}")
        video = response.generated_videos[0].video
        with explained(lost, Exception):
            return video.video_bytes or self.client.files.download(file=video)

    def finished(self, operation):
        """The operation when it is done. Raises TimeoutError, and what google-genai raises."""
        end = time.monotonic() + self.clip_timeout
        with tqdm(desc="Veo", bar_format="{desc}: {elapsed}", leave=False, disable=None) as bar:
            while True:
                operation = self.client.operations.get(operation)
                if operation.done:
                    return operation
                if time.monotonic() > end:
                    raise TimeoutError(f"not done after {self.clip_timeout:g} s")
                time.sleep(self.poll_seconds)
                bar.refresh()


# ------------------------------------------------------------------------------
# Between black bars


def picture_box(width: int, height: int) -> Box:
    """Where a picture of that shape lies in 16:9.

    A picture that was cut out of its box fits it exactly, so the clips of a run have one size. All
    numbers are even, because video halves colours.
    """
    scale = min(WIDTH / width, HEIGHT / height)
    w, h = (max(2, 2 * round(x * scale / 2)) for x in (width, height))
    left, top = (WIDTH - w) // 4 * 2, (HEIGHT - h) // 4 * 2
    return left, top, left + w, top + h


def letterbox(frame: np.ndarray, box: Box) -> bytes:
    """A PNG of 1280x720 pixels, with the frame in its box and black around it."""
    left, top, right, bottom = box
    size = right - left, bottom - top
    canvas, out = Image.new("RGB", (WIDTH, HEIGHT)), io.BytesIO()
    canvas.paste(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS), (left, top))
    canvas.save(out, "PNG")
    return out.getvalue()


def unboxed(mp4: bytes, box: Box) -> Clip:
    """What lies in the box, whatever the video's size. Raises RuntimeError if it is not 16:9.

    It is cut out before it becomes RGB, or the bars would run into it.
    """
    left, top, right, bottom = box
    w, h = right - left, bottom - top
    with av.open(io.BytesIO(mp4), format="mp4") as file:
        stream = file.streams.video[0]
        k = stream.width / WIDTH
        if abs(k * HEIGHT / stream.height - 1) > 0.01:
            raise RuntimeError(f"Veo sent {stream.width}x{stream.height} pixels, which is not 16:9")
        area = ":".join(str(round(k * x)) for x in (w, h, left, top))
        graph = av.filter.Graph()
        graph.link_nodes(
            graph.add_buffer(template=stream), graph.add("crop", area), graph.add("buffersink"))
        graph.configure()
        frames = []
        for frame in file.decode(stream):
            graph.push(frame)
            cut = graph.pull().reformat(w, h, "rgb24", interpolation=ROUNDED)
            frames.append(cut.to_ndarray())
        return Clip(np.stack(frames), float(stream.average_rate))


if __name__ == "__main__":
    sys.exit(collabvr.main(Veo))
