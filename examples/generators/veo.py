"""Veo 3.1 as `vgm`, through google-genai, and the paper's routing of whole samples (App. A.5).

    gcloud auth application-default login
    python collabvr.py --image x.png --task ".." --seconds-first 8 --seconds-next 4 --M 2 \\
        --vgm examples/generators/veo.py:Veo --vgm-arg project=MY-PROJECT
    Routed(Models(Veo(project=".."), vlm), Config(seconds_first=8, seconds_next=4, M=2)).run(I0, q)

These lengths and M are the paper's (App. A.1); its three steps are the default. Models come and go:
its veo-3.1-fast-generate-preview is said to have left the Gemini API on 2026-10-22, with all of
Veo, and google-genai 3 knows Veo on Vertex only. A clip is taken as it comes: 8 s at 24 fps are 192
frames, and as frame 0 is the input, 191/24 s are new; H.264, so each step loses a little.
"""
from __future__ import annotations

import functools
import io
import os
import sys
import time
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

import av
import numpy as np
from av.video.reformatter import Interpolation
from PIL import Image
from pydantic import Field
from pydantic.dataclasses import dataclass as settings
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]
from commands import needed

import collabvr
from collabvr import Attempt, Clip, CollabVR, History, Problem, Reply, Result, explained

WIDTH, HEIGHT = 1280, 720  # 16:9 at 720p, Veo's smallest
EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


@settings(config=collabvr.checked, eq=False)
class Veo:
    """Veo on Vertex, or by API key on what speaks the Gemini API. All clips of a picture have its
    shape in 720p: it is sent between black bars, and the bars are cut off what comes."""
    model: str = "veo-3.1-fast-generate-001"
    project: str = ""  # of Google Cloud: asks Vertex; "": the Gemini API
    location: str = "us-central1"  # of Vertex
    # of a gateway that speaks like Vertex or the Gemini API; it gets VEO_API_KEY and no other key
    url: Annotated[str, Field(pattern=f"^$|{collabvr.URL}")] = ""
    dollars_per_second: Annotated[float, Field(ge=0)] = 0.15  # Veo 3.1 Fast in the paper (C.3)
    poll_seconds: Annotated[float, Field(gt=0)] = 10.0  # between two looks whether a clip is done
    timeout: Annotated[float, Field(gt=0)] = 900.0  # longest wait for a clip, s
    jobs: Path = Path("runs/veo")  # keeps what was ordered, so that a crash does not pay twice
    dollars: float = field(default=0.0, init=False)  # for the clips that this process ordered

    identity = property(lambda self: {"model": self.model, "vertex": bool(self.project)})

    def check(self, seconds: float) -> None:
        """Raises Problem for clips of that length, or if package or credentials are missing."""
        if seconds not in (4, 6, 8):
            raise Problem(f"Veo makes clips of 4, 6 or 8 s, not {seconds:g}: the paper's are "
                          "--seconds-first 8 --seconds-next 4.")
        _ = self.client

    @functools.cached_property
    def client(self):
        """The client of google-genai, made when first needed. Raises Problem."""
        genai = needed("google.genai")
        options = {"base_url": self.url or None, "timeout": int(1000 * min(60, self.timeout)),
                   "retry_options": {}}  # its default: five tries
        if not self.project and int(genai.__version__.split(".")[0]) > 2:
            raise Problem("google-genai 3 knows Veo on Vertex only: --vgm-arg project=YOURS, or "
                          "google-genai 2.34.0 for what else speaks the Gemini API.")
        names = ["VEO_API_KEY"] if self.url else ["GEMINI_API_KEY", "GOOGLE_API_KEY"]
        key = next(filter(None, map(os.environ.get, names)), None)
        if self.project and not self.url:
            with explained("Vertex needs Google's own credentials", Exception):
                credentials, _ = needed("google.auth").default(
                    scopes=["https://www.googleapis.com/auth/cloud-platform"])
        elif not key:
            raise Problem(f"No API key for {self.url or 'Google'}: set {names[0]}; or "
                          "--vgm-arg project=YOURS asks Vertex with Google's own credentials.")
        elif self.project:
            credentials = needed("google.oauth2.credentials").Credentials(key)
        else:
            return genai.Client(vertexai=False, api_key=key, http_options=options)
        return genai.Client(vertexai=True, project=self.project, location=self.location,
                            credentials=credentials, http_options=options)

    def __call__(self, frame, prompt: str, seconds: float, seed: int) -> Clip:
        """See "The two models". Raises Problem if Google cannot be asked or takes too long, and
        RuntimeError with its reason if it made nothing."""
        self.check(seconds)
        box = picture_box(frame.shape[1], frame.shape[0])
        job = self.jobs / collabvr.digest(self.model, self.project, self.location, self.url,
                                          frame, prompt, seconds, seed)[:16]
        if ordered := not job.exists():
            name = self.order(letterbox(frame, box), prompt, int(seconds), seed)
            job.parent.mkdir(parents=True, exist_ok=True)
            collabvr.write_file(job, name.encode())
        try:
            clip = unboxed(self.delivery(job), box)
        except RuntimeError:
            job.unlink()
            raise
        self.dollars += seconds * self.dollars_per_second * ordered
        collabvr.log.info("Veo: %g s at $%g a second%s; $%.2f since the start", seconds,
                          self.dollars_per_second, "" if ordered else ", ordered earlier",
                          self.dollars)
        return clip

    def order(self, image: bytes, prompt: str, seconds: int, seed: int) -> str:
        """Starts an operation; its name. Only a busy server is asked again: where no answer came,
        a clip may have been ordered all the same."""
        genai = needed("google.genai")
        config = {"aspect_ratio": "16:9", "resolution": "720p", "duration_seconds": seconds,
                  "http_options": {"retry_options": {"attempts": 1}}}
        if self.project:  # google-genai has neither for the Gemini API
            config |= {"seed": seed % 2**31, "generate_audio": False}
        picture = {"image_bytes": image, "mime_type": "image/png"}
        with explained(f"{self.url or 'Google'} did not start a clip of {self.model}", Exception):
            for patience in (1, 2, 4, 8, 0):
                try:
                    return self.client.models.generate_videos(
                        model=self.model, source={"prompt": prompt, "image": picture},
                        config=config).name
                except genai.errors.APIError as error:
                    if error.code not in (429, 503) or not patience:
                        raise
                    collabvr.log.info("Veo: busy (%d)", error.code)
                    time.sleep(patience * self.poll_seconds)

    def delivery(self, job: Path) -> bytes:
        """The MP4 of the operation that `job` names, as soon as it is there."""
        genai, end = needed("google.genai"), time.monotonic() + self.timeout
        operation = genai.types.GenerateVideosOperation(name=job.read_text())
        lost = f"The clip that {job} names did not come; the same command goes on"
        with explained(lost, Exception), tqdm(desc="Veo", bar_format="{desc}: {elapsed}",
                                              leave=False, disable=None) as bar:
            try:
                while not (operation := self.client.operations.get(operation)).done:
                    if time.monotonic() > end:
                        raise TimeoutError(f"not done after {self.timeout:g} s")
                    time.sleep(self.poll_seconds)
                    bar.refresh()
            except genai.errors.ClientError as error:
                if error.code == 404:  # forgotten there: the next start orders anew
                    job.unlink()
                raise
        response = operation.response
        if not response or not response.generated_videos:
            said = operation.error or (response and response.rai_media_filtered_reasons)
            raise RuntimeError(f"Veo made no clip: {said or 'no reason given'}")
        video = response.generated_videos[0].video
        with explained(lost, Exception):
            return video.video_bytes or self.client.files.download(file=video)


def picture_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Where a picture of that shape lies in 16:9: left, top, right, bottom. What has been there
    fits exactly, so the clips of a run have one size. All are even: video halves colours."""
    scale = min(WIDTH / width, HEIGHT / height)
    w, h = (max(2, 2 * round(x * scale / 2)) for x in (width, height))
    left, top = (WIDTH - w) // 4 * 2, (HEIGHT - h) // 4 * 2
    return left, top, left + w, top + h


def letterbox(frame: np.ndarray, box: tuple[int, int, int, int]) -> bytes:
    """A PNG of 1280x720 pixels, with the frame in its box and black around it."""
    left, top, right, bottom = box
    canvas, out = Image.new("RGB", (WIDTH, HEIGHT)), io.BytesIO()
    size = (right - left, bottom - top)
    canvas.paste(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS), (left, top))
    canvas.save(out, "PNG")
    return out.getvalue()


def unboxed(mp4: bytes, box: tuple[int, int, int, int]) -> Clip:
    """What lies in the box, whatever the video's size. RuntimeError if the video is not 16:9. Cut
    out before it becomes RGB, or the bars run into it; and rounded, or every step is darker."""
    left, top, right, bottom = box
    w, h = right - left, bottom - top
    with av.open(io.BytesIO(mp4)) as file:
        stream = file.streams.video[0]
        k = stream.width / WIDTH
        if abs(k * HEIGHT / stream.height - 1) > 0.01:
            raise RuntimeError(f"Veo sent {stream.width}x{stream.height} pixels, which is not 16:9")
        cut, frames = av.filter.Graph(), []
        cut.link_nodes(cut.add_buffer(template=stream),
                       cut.add("crop", ":".join(str(round(k * x)) for x in (w, h, left, top))),
                       cut.add("buffersink")).configure()
        for frame in file.decode(stream):
            cut.push(frame)
            frames.append(cut.pull().reformat(w, h, "rgb24", interpolation=EXACT).to_ndarray())
        return Clip(np.stack(frames), float(stream.average_rate))


class Routed(CollabVR):
    """A method: one clip for the whole task first; only if that is not found to solve it, a router
    chooses, once, before any planning (App. A.5, "sample-level"). Its clips are attempts at step 1:
    they start from I0 and last as long; in the cost they count like other re-generations of it."""

    SAMPLE_ROUTER = """\
An image-to-video generator made one clip for a whole task, and the clip was not found to solve it.
You decide, once, how to go on. You get the task prompt, the input image, the clip, and what a check
said of it: reason, suggestion, progress and good fraction (how much was right before the error).

- keep: the clip does what was asked for all the same, or falls short in details only, and what a
  new one would gain is not worth what it may spoil.
- retry: an execution slip in one coherent change that a single clip can hold, with a moderate or
  high good fraction. The whole clip is generated once more, with your suggestion.
- steps: the task needs several actions or states in between, or the good fraction is very low. It
  is planned and generated step by step, from the input image on.

suggestion is one sentence for the generator: what to show instead.
Reply with one JSON object with the fields reason, action, suggestion.
"""

    class SampleRouting(Reply):
        reason: str
        action: Literal["keep", "retry", "steps"]
        suggestion: str

    def run(self, I0, q: str) -> Result:
        """"Algorithm 1" is gone through only if the router says so. Raises Problem."""
        tried = [self.single_shot(I0, q, q)]
        if not solves(x := tried[0]):
            r = self.models.ask("router", self.SAMPLE_ROUTER, [
                f"Task prompt: {q}", "Input image:", I0, "Clip:", x.c_t, f"Reason: {x.d.reason}",
                f"Suggestion: {x.d.suggestion}", f"Progress: {x.d.progress}",
                f"Good fraction: {x.d.good_fraction:.2f}"], self.SampleRouting)
            if r.action == "steps":
                return super().run(I0, q)
            if r.action == "retry":
                tried.append(self.single_shot(I0, q, self.evolve(q, r)))
        best = max(reversed(tried), key=lambda x: (
            solves(x), x.d.verdict == "accept", x.d.good_fraction))
        return History([best]).result("complete" if solves(best) else "step_cap"
                                      if best.d.verdict == "accept" else "best_attempt")

    def single_shot(self, I0, q: str, a_t: str) -> Attempt:
        """A clip for the whole task, verified with the task as the planned action."""
        p = self.Plan(observation="", remaining_goal=q, task_complete=False, instruction=q,
                      target_state="as the task prompt says", estimated_steps_remaining=1)
        c_t = self.g(I0, a_t, 1)
        return Attempt(1, a_t, c_t, self.verify(I0, q, History(), c_t, a_t, p, 1)[1])


def solves(x: Attempt) -> bool:
    """An accept alone may be half the way: unfinished is no reason for a reject."""
    return x.d.verdict == "accept" and x.d.progress == "complete"
