"""Gemini through Google's own API, which sees whole clips; and how to bring a VLM of your own.

    export GEMINI_API_KEY=..
    python -m examples.models.gemini --image x.png --task ".."

The paper gave Gemini the clips as videos (App. A.1). Google documents that for this API, and not
for the OpenAI-compatible endpoint that collabvr.py asks by default.

A VLM of your own is a callable, vlm(instructions, parts, schema), as below:

- `parts` are texts, pictures and Clips, in the order in which the VLM must see them.
- `schema` is the pydantic model of the reply. `schema.model_json_schema()` is its JSON schema.
- It returns the reply's text, or a dict of text, tokens_in, tokens_out, model and fault.
- A Problem that it raises ends the run. After any other exception it is asked again.
- It is a dataclass here, so its fields are options of collabvr.main(vlm=Gemini).
- `check` and `identity` are optional: what must be there before a run, and what changes a reply.

Tests ask a stub of the API. The real one was not asked.
"""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import asdict
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

import collabvr
from collabvr import Clip, Problem, explained, log
from examples.cli import needed

PATIENCE = 600  # seconds that one question may wait for a quota


@settings(config={"extra": "forbid"})
class Gemini:
    """Gemini on the Gemini API. The key is GEMINI_API_KEY or GOOGLE_API_KEY."""

    vlm: str = "gemini-3.8-flash"  # name of the model
    thinking: Literal["low", "medium", "high"] | None = None  # None: the model's default
    # None: not sent, as Google advises since Gemini 3; the paper's 2.5 Pro had 0.2
    temperature: Annotated[float, Field(ge=0)] | None = None
    timeout: Annotated[float, Field(gt=0)] = 600.0  # longest wait for an answer, in seconds

    def __call__(self, instructions: str, parts: list, schema) -> dict:
        """The reply, as collabvr.Models wants it. Raises Problem if Google gives no answer."""
        config = {
            "system_instruction": instructions,
            "response_mime_type": "application/json",
            "response_json_schema": schema.model_json_schema(),
            "temperature": self.temperature,
            "thinking_config": {"thinking_level": self.thinking} if self.thinking else None,
        }
        encoded = [encode(part) for part in parts]
        with explained("Google cannot be asked", Exception):
            answer = self.ask(encoded, config)
        return read(answer)

    def ask(self, parts: list[dict], config: dict):
        """Google's answer. After a 429 this waits for as long as Google says."""
        errors = needed("google.genai").errors
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return self.client.models.generate_content(
                    model=self.vlm, contents={"role": "user", "parts": parts}, config=config)
            except errors.APIError as error:
                delay = re.search(r"'retryDelay': '(\d+\.?\d*)s'", str(error.details))
                seconds = float(delay[1]) if delay else PATIENCE
                if error.code != 429 or time.monotonic() + seconds > end:
                    said = f"{error.code}: {error.message}".replace(self.key, "***")
                    raise Problem(f"Google gave no answer of {self.vlm} ({said}).") from error
                log.info("Google wants fewer requests: again in %g s", seconds)
                time.sleep(seconds)

    @property
    def key(self) -> str:
        return os.environ.get("GEMINI_API_KEY") or os.environ.get("GOOGLE_API_KEY", "")

    @cached_property
    def client(self):
        genai = needed("google.genai")
        if not self.key:
            raise Problem("No API key: set GEMINI_API_KEY.")
        with explained("No client can be made: see ALL_PROXY and SSL_CERT_FILE", Exception):
            return genai.Client(
                vertexai=False,
                api_key=self.key,
                http_options={
                    "timeout": int(1000 * self.timeout),  # ms
                    # five tries of a server that is overloaded; 429 is waited for above
                    "retry_options": {"http_status_codes": [408, 500, 502, 503, 504]},
                },
            )

    def check(self) -> None:
        """Raises Problem if the package or the key is missing."""
        _ = self.client

    @property
    def identity(self) -> dict:
        """The settings that change the replies."""
        return {**asdict(self), "timeout": None}


def encode(part) -> dict:
    """A text, a picture or a clip, as a part of a message."""
    if isinstance(part, str):
        return {"text": part}
    if isinstance(part, Clip):  # Gemini looks at one frame of it a second
        return {"inline_data": {"mime_type": "video/mp4", "data": collabvr.mp4(part)}}
    return {"inline_data": {"mime_type": "image/jpeg", "data": collabvr.jpeg(part)}}


def read(answer) -> dict:
    """Text, tokens and model of an answer, and its fault if it was blocked or cut off."""
    found = {"text": answer.text, "model": answer.model_version}
    usage = answer.usage_metadata
    if usage:
        found["tokens_in"] = usage.prompt_token_count
        thoughts = usage.thoughts_token_count or 0  # they are billed, too
        found["tokens_out"] = (usage.candidates_token_count or 0) + thoughts
    if not answer.candidates:
        blocked = answer.prompt_feedback and answer.prompt_feedback.block_reason
        found["fault"] = f"Google blocked the question: {blocked or 'no reason given'}"
    elif answer.candidates[0].finish_reason != "STOP":  # SAFETY, MAX_TOKENS, ..
        found["fault"] = f"blocked or cut off: {answer.candidates[0].finish_reason}"
    return found


if __name__ == "__main__":
    sys.exit(collabvr.main(vlm=Gemini))
