"""Wan2.2 behind a server as `vgm`: SGLang Diffusion and vLLM-Omni have the same POST /v1/videos.

    python collabvr.py --image x.png --task ".." --vgm examples/generators/served.py:Served \\
        --vgm-arg url=http://localhost:30000 --vgm-arg model=Video-Reason/VBVR-Wan2.2

This is the way to several GPUs a clip, fp8, LoRA and small cards; examples/README.md has the serve
commands. Clips come as H.264, which is lossy: frame 0 is nearly the conditioning frame, and a step
starts from what the encoder left of the last one. SERVED_API_KEY, if set, is sent to `url` only.
A job's id is on the disk as soon as the server has named it: after a crash the job is picked up
again, not paid for twice.
"""
from __future__ import annotations

import contextlib
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
from pydantic import AfterValidator, Field, TypeAdapter
from pydantic.dataclasses import dataclass as settings
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import collabvr
from collabvr import Clip, Problem, checked, digest, explained, first_line, fit, log

POLL = 1.0  # between two looks at a job, s
PAUSES = (1, 2, 4, 8, 16, 32)  # before a request that got no usable answer is repeated, s
ROUNDED = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
# it keeps no connection: a POST over one that is just being closed may or may not arrive
HTTP = httpx2.Client(limits=httpx2.Limits(max_keepalive_connections=0))


@settings(config=checked, eq=False)
class Served:
    """A server's Wan2.2: at most 832x480 pixels, sides multiples of 16, clips of 4k + 1 frames."""
    url: Annotated[str, Field(pattern=collabvr.URL)] = "http://localhost:30000"  # SGLang's port
    model: str = "Video-Reason/VBVR-Wan2.2"  # as the server's /v1/models names it
    fps: Annotated[int, Field(ge=1, le=240)] = 16  # frames per second (App. A.1)
    sampling_steps: Annotated[int, Field(ge=1)] = 20  # denoising steps (App. A.1)
    guidance_scale: Annotated[float, Field(ge=0)] = 5.0  # CFG, of both experts (App. A.1)
    # more form fields, a JSON object, such as {"flow_shift": 5}
    fields: Annotated[str, AfterValidator(TypeAdapter(dict).validate_json)] = "{}"
    sync: bool = False  # one POST to /v1/videos/sync (vLLM-Omni): a crash loses what it waits for
    timeout: Annotated[float, Field(gt=0)] = 3600.0  # longest wait for one clip, s
    jobs: Path = Path("runs/jobs")  # where the ids of submitted jobs are kept

    identity = property(lambda self: {k: v for k, v in asdict(self).items()
                                      if k not in ("url", "sync", "timeout", "jobs")})

    def check(self, seconds: float) -> None:
        """Raises Problem if no server answers within ten seconds, if it serves another model, or
        for clips of that length."""
        if seconds * self.fps < 4:
            raise Problem(f"{seconds:g} s at {self.fps} fps is less than Wan's least, five frames.")
        answer = self.send("GET", "models", wait=4.5, repeat=False)
        if not answer.is_success and answer.status_code != 404:  # 404: it keeps no such list
            raise Problem(f"{self.url} does not name its models ({told(answer)}).")
        with explained(f"{answer.url} gives no list of models", TypeError, LookupError):
            names = [x["id"] for x in body(answer).get("data", [])]
        if names and self.model not in names:  # SGLang would take the job all the same
            raise Problem(f"{self.url} serves {', '.join(map(str, names))}, not {self.model}: give "
                          "its name as model, or start it with --served-model-name.")

    def __call__(self, frame, prompt: str, seconds: float, seed: int) -> Clip:
        """A clip of 4k + 1 frames, the conditioning frame included. Raises Problem if the server
        does not answer, refuses the job or is not done in time; RuntimeError if the job failed;
        ValueError if its clip is not what was asked for."""
        size = fit(frame.shape[1], frame.shape[0], 16)
        picture = Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)
        picture.save(png := io.BytesIO(), "PNG")
        form = {"prompt": prompt, "model": self.model, "seed": seed, "fps": self.fps,
                "num_frames": 4 * int(seconds * self.fps / 4 + 1e-6) + 1,
                "size": "{}x{}".format(*size),  # SGLang takes the shape from the picture
                "num_inference_steps": self.sampling_steps, "guidance_scale": self.guidance_scale,
                # where SGLang has defaults of its own: an expert's guidance, a text, CRF 25
                "guidance_scale_2": self.guidance_scale, "negative_prompt": "",
                "output_quality": "maximum", **self.fields}
        form = {k: v if isinstance(v, str) else json.dumps(v) for k, v in form.items()}
        sent = {"data": form, "files": {"input_reference": ("frame.png", png.getvalue())}}
        if self.sync:
            return self.decode(self.submit("videos/sync", self.timeout, sent).content, form)
        job = self.jobs / digest(self.url, form, np.array(picture))
        if old := job.exists():
            log.info("picks up job %s", job.read_text())
        else:
            with explained(f"{self.jobs} cannot be written to", OSError):
                self.jobs.mkdir(parents=True, exist_ok=True)
                name = body(self.submit("videos", 60, sent)).get("id")
                if not isinstance(name, str):
                    raise Problem(f"{self.url} named no job; does it make videos?")
                collabvr.write_file(job, name.encode())
        try:
            # The file stays: a clip is safe only when Models has it, and until then the same
            # command must find the job. A few bytes a clip are no burden.
            return self.decode(self.fetch(job), form)
        except Problem:
            raise
        except Exception:  # nothing will come of this job
            job.unlink()
            if not old:
                raise
        return self(frame, prompt, seconds, seed)

    def submit(self, path: str, wait: float, sent: dict):
        """The answer to the POST. Raises Problem; RuntimeError if a synchronous job failed."""
        answer = self.send("POST", path, wait, **sent)
        if self.sync and answer.status_code == 500:
            raise RuntimeError(f"the server could not make the clip ({told(answer)})")
        if not answer.is_success:
            raise Problem(f"{self.url} refuses the job ({told(answer)}).")
        return answer

    def fetch(self, job: Path) -> bytes:
        """The job's MP4, when it is done. A status that is not known is neither success nor a
        reason to wait. Raises Problem; RuntimeError if the job failed or is forgotten."""
        path, end = f"videos/{quote(job.read_text(), safe='')}", time.monotonic() + self.timeout
        look = "clip {percentage:3.0f}% |{bar}| {elapsed}{postfix}"
        with tqdm(total=100, bar_format=look, leave=False, disable=None) as bar:
            while time.monotonic() < end:
                answer = self.send("GET", path)
                status = body(answer).get("status")
                if status == "completed":
                    answer = self.send("GET", f"{path}/content")
                    if answer.is_success:
                        return answer.content
                if status == "failed" or answer.status_code == 404:
                    raise RuntimeError(f"the server could not make the clip ({told(answer)})")
                if status not in ("queued", "in_progress"):
                    raise Problem(f"{answer.url} has no clip and no known status ({told(answer)}).")
                bar.n = int(body(answer).get("progress") or 0)
                bar.set_postfix_str(status)
                time.sleep(POLL)
        raise Problem(f"{self.url} was not done in {self.timeout:g} s. The same command waits for "
                      f"that job again, unless {job} is deleted.")

    def decode(self, mp4: bytes, form: dict) -> Clip:
        """Raises ValueError if that is no video, or none of the form's length, size and fps."""
        try:
            with av.open(io.BytesIO(mp4)) as file:  # rounded, or every step would be darker
                fps = float(file.streams.video[0].average_rate)
                frames = np.stack([x.reformat(format="rgb24", interpolation=ROUNDED).to_ndarray()
                                   for x in file.decode(video=0)])
        except Exception as error:  # whatever a decoder raises
            raise ValueError(f"the server sent {len(mp4)} bytes that are no video") from error
        got = f"{len(frames)} frames of {frames.shape[2]}x{frames.shape[1]} at {fps:g} fps"
        asked = f"{form['num_frames']} frames of {form['size']} at {form['fps']} fps"
        if got != asked:
            raise ValueError(f"the server sent {got}, not {asked}")
        return Clip(frames, self.fps)

    def send(self, method: str, path: str, wait: float = 60, repeat: bool = True, **content):
        """The server's answer, each try's in `wait` seconds. Repeated is only what cannot start a
        second job: a GET, and a POST that was answered with 429 or 503 or whose connection never
        stood. No redirect is followed: the key stays with this host. Raises Problem."""
        url = f"{self.url.rstrip('/').removesuffix('/v1')}/v1/{path}"
        key = os.environ.get("SERVED_API_KEY", "")
        if not re.fullmatch("[!-~]*", key):  # nor could it be found in what is said, and masked
            raise Problem("SERVED_API_KEY holds spaces or other signs that are in no key.")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx2.Timeout(min(wait, self.timeout), connect=min(wait, 8))
        for pause in (*(PAUSES if repeat else ()), None):
            try:
                answer = HTTP.request(method, url, headers=headers, timeout=timeout, **content)
                code = answer.status_code
                again = code in (429, 503) or (code >= 500 and method == "GET")
                if not again or body(answer).get("status") == "failed":  # a job's, of vLLM-Omni
                    return answer
                fault, asked = told(answer), retry_after(answer)
            except httpx2.TransportError as error:
                fault, asked = first_line(error), 0
                unsent = isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
                if method == "POST" and not unsent:
                    raise Problem(f"{url} gave no answer ({fault}); the job may run all the same.")
            if pause:
                pause = min(asked or pause, self.timeout)
                log.warning("%s: %s; again in %.0f s", url, fault, pause)
                time.sleep(pause)
        raise Problem(f"{url} gives no usable answer ({fault}).")


def body(answer) -> dict:
    """An answer's JSON object; empty if it is something else."""
    with contextlib.suppress(ValueError):
        return found if isinstance(found := answer.json(), dict) else {}
    return {}


def told(answer) -> str:
    """What an answer says is wrong, in FastAPI's way, an API's or a job's; else all of it."""
    x = body(answer)
    error = x.get("error") or x.get("detail") or answer.text.strip() or answer.reason_phrase
    if isinstance(error, dict):
        error = error.get("message") or error
    return first_line(f"{answer.status_code}: {error}")


def retry_after(answer) -> float:
    """The seconds that this header asks for, in figures or as a date; 0 if it is missing."""
    value = answer.headers.get("Retry-After", "")
    date = parsedate_tz(value)
    return max(0, mktime_tz(date) - time.time()) if date else float(value.isdecimal() and value)
