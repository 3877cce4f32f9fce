"""Wan2.2 behind a server: SGLang Diffusion and vLLM-Omni both offer POST /v1/videos.

    python -m examples.models.served --image x.png --task ".." --url http://localhost:30000

This is the way to several GPUs a clip, fp8, LoRA and small cards; examples/README.md has the
commands that start the servers. Clips come as H.264, without loss but for the colours of two by two
pixels, which become one. SERVED_API_KEY, if set, is sent to `url` only.

After a crash a job is picked up again, because its id is on the disk as soon as the server has
named it. A clip is generated twice only
- if the crash came between the server's taking the job and its answer,
- if one request waits for the clip (`sync`, or a server with several API processes),
- if the server no longer knows the job, or what it kept is no clip.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
from dataclasses import asdict
from email.utils import mktime_tz, parsedate_tz
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import av
import httpx2  # what openai's client is built on
import numpy as np
from av.video.reformatter import Interpolation
from PIL import Image
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass as settings
from tqdm import tqdm

import collabvr
from collabvr import Clip, Problem, digest, explained, first_line, fit, log

POLL = 1.0  # between two looks at a job, s
PAUSES = (1, 2, 4, 8, 16, 32)  # before a request that got no usable answer is repeated, s
BAR = "clip {percentage:3.0f}% |{bar}| {elapsed}{postfix}"
# a keep-alive connection may be closing just now: whether a POST over it arrived, nobody knows
HTTP = httpx2.Client(limits=httpx2.Limits(max_keepalive_connections=0))

FIELDS = {  # where a server's own default is another, or loses more than it need
    "negative_prompt": "",  # SGLang: a text of its own
    "output_quality": "maximum",  # SGLang: CRF 0, not 25
    "extra_params": {"video_codec_options": {"crf": "0", "preset": "ultrafast"}},  # vLLM-Omni
}


@settings(config={"extra": "forbid"}, eq=False)
class Served:
    """A server's Wan2.2: at most 832x480 pixels, sides multiples of 16, clips of 4k + 1 frames."""

    url: Annotated[str, AfterValidator(collabvr.base_url)] = "http://localhost:30000"  # SGLang's
    model: str = "Video-Reason/VBVR-Wan2.2"  # as the server's /v1/models names it
    fps: Annotated[int, Field(ge=1, le=240)] = 16  # frames per second (App. A.1)
    sampling_steps: Annotated[int, Field(ge=1)] = 20  # denoising steps (App. A.1)
    guidance_scale: Annotated[float, Field(ge=0)] = 5.0  # CFG, of both experts (App. A.1)
    # more fields of the form, as a JSON object: {"flow_shift": 5}
    fields: Annotated[str, AfterValidator(collabvr.json_object)] = "{}"
    sync: bool = False  # one request waits for the clip (vLLM-Omni's /v1/videos/sync)
    clip_timeout: Annotated[float, Field(gt=0)] = 3600.0  # longest wait for a clip, in seconds
    jobs: Path = Path("runs/jobs")  # folder of the ids of ordered jobs

    @property
    def identity(self) -> dict:
        """The settings that change the clips."""
        elsewhere = {"url": None, "sync": None, "clip_timeout": None, "jobs": None}
        return {**asdict(self), **elsewhere}

    def check(self) -> None:
        """Raises Problem if no server answers within ten seconds, or if it serves another model."""
        answer = self.send("GET", "models", wait=4.5, repeat=False)
        if answer.status_code == 404:  # it keeps no such list
            return
        if not answer.is_success:
            raise Problem(f"{self.url} does not name its models ({reason(answer)}).")
        with explained(f"{answer.url} gives no list of models", TypeError, LookupError):
            names = [str(model["id"]) for model in json_of(answer).get("data", [])]
        if names and self.model not in names:  # SGLang would take the job all the same
            raise Problem(f"{self.url} serves {', '.join(names)}, not {self.model}: give its name "
                          "as --model, or start it with --served-model-name.")

    def __call__(self, frame, prompt: str, seconds: float, seed: int) -> Clip:
        """A clip of 4k + 1 frames, the conditioning frame included.

        Raises Problem if the server does not answer, refuses the job or is not done in time;
        RuntimeError if the job failed; ValueError if its clip is not what was asked for.
        """
        if seconds * self.fps < 4:
            raise Problem(f"{seconds:g} s at {self.fps} fps is less than Wan's least, five frames.")
        size = fit(frame.shape[1], frame.shape[0], 16)
        picture = Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)
        form = self.form(prompt, seconds, seed, size)
        if self.sync:
            return self.at_once(form, picture)
        job = self.jobs / digest(self.url, form, np.array(picture))
        if job.exists():
            log.info("picks up job %s", job.read_text())
            try:
                return self.collect(job, form)
            except (RuntimeError, ValueError) as error:
                log.warning("the job is ordered anew: %s", first_line(error))
        with explained(f"{self.jobs} cannot be written to", OSError):
            self.jobs.mkdir(parents=True, exist_ok=True)
            answer = self.send("POST", "videos", **multipart(form, picture))
            if answer.status_code == 409:
                log.info("%s keeps no jobs (%s)", self.url, reason(answer))
                return self.at_once(form, picture)
            name = json_of(self.accepted(answer)).get("id")
            if not isinstance(name, str):
                raise Problem(f"{self.url} named no job; does it make videos?")
            collabvr.write_file(job, name.encode())
        return self.collect(job, form)

    def form(self, prompt: str, seconds: float, seed: int, size: tuple[int, int]) -> dict[str, str]:
        """The fields of the request. None is left to the server's defaults."""
        form = {
            "prompt": prompt,
            "model": self.model,
            "seed": seed,
            "fps": self.fps,
            "num_frames": 4 * max(1, int(seconds * self.fps / 4 + 1e-6)) + 1,
            "size": f"{size[0]}x{size[1]}",  # SGLang takes the shape from the picture
            "num_inference_steps": self.sampling_steps,
            "guidance_scale": self.guidance_scale,
            "guidance_scale_2": self.guidance_scale,
            **FIELDS,
            **collabvr.parse(self.fields),
        }
        return {k: v if isinstance(v, str) else json.dumps(v) for k, v in form.items()}

    def at_once(self, form: dict, picture) -> Clip:
        """The answer to one request that waits for the clip."""
        answer = self.send("POST", "videos/sync", self.clip_timeout, **multipart(form, picture))
        if answer.status_code == 500:
            raise RuntimeError(f"the server could not make the clip ({reason(answer)})")
        return decode(self.accepted(answer).content, form)

    def accepted(self, answer):
        if not answer.is_success:
            raise Problem(f"{self.url} refuses the job ({reason(answer)}).")
        return answer

    def collect(self, job: Path, form: dict) -> Clip:
        """The clip of a job, when it is done.

        The file stays: a clip is safe only when Models has written it, and until then the same
        command must find the job. A few bytes a clip are no burden.
        """
        try:
            return decode(self.wait(job), form)
        except (RuntimeError, ValueError):  # nothing will come of this job
            job.unlink()
            raise

    def wait(self, job: Path) -> bytes:
        """The job's MP4. A status that is not known is neither success nor a reason to wait.

        Raises Problem; RuntimeError if the job failed or is forgotten.
        """
        path = f"videos/{quote(job.read_text(), safe='')}"
        end = time.monotonic() + self.clip_timeout
        with tqdm(total=100, bar_format=BAR, leave=False, disable=None) as bar:
            while time.monotonic() < end:
                answer = self.send("GET", path)
                job_now = json_of(answer)
                status = job_now.get("status")
                if status == "completed":
                    answer = self.send("GET", f"{path}/content")
                    if answer.is_success:
                        return answer.content
                if status == "failed" or answer.status_code == 404:
                    raise RuntimeError(f"the server could not make the clip ({reason(answer)})")
                if status not in ("queued", "in_progress"):
                    raise Problem(
                        f"{answer.url} has no clip and no known status ({reason(answer)}).")
                progress = job_now.get("progress")
                bar.n = progress if isinstance(progress, int) else 0
                bar.set_postfix_str(status)
                time.sleep(POLL)
        raise Problem(f"{self.url} was not done in {self.clip_timeout:g} s. The same command waits "
                      f"for that job again, unless {job} is deleted.")

    def send(self, method: str, path: str, wait: float = 60, repeat: bool = True, **content):
        """The server's answer; each try may take `wait` seconds. Raises Problem.

        Repeated is only what cannot start a second job: a GET, and a POST that was answered with
        429 or 503 or whose connection never stood. No redirect is followed: the key stays with
        this host.
        """
        url = f"{self.url.rstrip('/').removesuffix('/v1')}/v1/{path}"
        timeout = httpx2.Timeout(min(wait, self.clip_timeout), connect=min(wait, 8))
        pauses = PAUSES if repeat else ()
        for pause in (*pauses, None):
            try:
                answer = HTTP.request(method, url, headers=headers(), timeout=timeout, **content)
            except httpx2.TransportError as error:
                unsent = isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
                fault, asked = first_line(error), 0.0
                if method == "POST" and not unsent:
                    raise Problem(f"{url} gave no answer ({fault}); the job may run all the same.")
            else:
                busy = answer.status_code in (429, 503)
                broken = answer.status_code >= 500 and method == "GET"
                if not (busy or broken) or json_of(answer).get("status") == "failed":
                    return answer  # vLLM-Omni says with a 500 that a job failed
                fault, asked = reason(answer), retry_after(answer)
            if pause is not None:
                pause = min(asked or pause, self.clip_timeout)
                log.warning("%s: %s; again in %.0f s", url, fault, pause)
                time.sleep(pause)
        raise Problem(f"{url} gives no usable answer ({fault}).")


def headers() -> dict[str, str]:
    key = os.environ.get("SERVED_API_KEY", "")
    if not re.fullmatch("[!-~]*", key):  # nor could it be found in what is printed, and masked
        raise Problem("SERVED_API_KEY contains spaces or other characters that no key has.")
    return {"Authorization": f"Bearer {key}"} if key else {}


def multipart(form: dict, picture) -> dict:
    """A request's contents: the fields, and the picture without loss."""
    png = io.BytesIO()
    picture.save(png, "PNG")
    return {"data": form, "files": {"input_reference": ("frame.png", png.getvalue())}}


# rounded, or every step would be darker than the last
ROUNDED = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def decode(mp4: bytes, form: dict) -> Clip:
    """Raises ValueError if that is no video, or none of the form's length, size and rate."""
    try:
        with av.open(io.BytesIO(mp4), format="mp4") as file:
            fps = float(file.streams.video[0].average_rate)
            frames = [frame.reformat(format="rgb24", interpolation=ROUNDED).to_ndarray()
                      for frame in file.decode(video=0)]
        clip = Clip(np.stack(frames), fps)
    except Exception as error:  # whatever a decoder raises
        raise ValueError(f"the server sent {len(mp4)} bytes that are no video") from error
    length, height, width, _ = clip.frames.shape
    got = f"{length} frames of {width}x{height} at {fps:g} fps"
    asked = f"{form['num_frames']} frames of {form['size']} at {form['fps']} fps"
    if got != asked:
        raise ValueError(f"the server sent {got}, not {asked}")
    return clip


def json_of(answer) -> dict:
    """An answer's JSON object; empty if it is something else."""
    try:
        found = answer.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def reason(answer) -> str:
    """What an answer says is wrong, in FastAPI's way, an API's or a job's; else all of it."""
    found = json_of(answer)
    error = found.get("error") or found.get("detail") or answer.text.strip()
    if isinstance(error, dict):
        error = error.get("message") or error
    text = collabvr.clean(f"{answer.status_code}: {error or answer.reason_phrase}")
    return text.splitlines()[0][:400]


def retry_after(answer) -> float:
    """The seconds that this header asks for, in figures or as a date; 0 if it is missing."""
    value = answer.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    date = parsedate_tz(value)
    return max(0.0, mktime_tz(date) - time.time()) if date else 0.0


if __name__ == "__main__":
    sys.exit(collabvr.main(Served))
