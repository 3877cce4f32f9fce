"""The clips that servers send, decoded."""

from __future__ import annotations

import imageio.v3 as iio

from collabvr import Clip

# rounded, or every step would be darker than the last
RGB = [("scale", "flags=bicubic+accurate_rnd+full_chroma_int"), ("format", "rgb24")]


def decoded(mp4: bytes, *filters: tuple[str, str]) -> Clip:
    """The clip in an MP4, after these filters of FFmpeg. Raises OSError if it is no video."""
    how: dict = {"plugin": "pyav", "extension": ".mp4"}
    frames = iio.imread(mp4, filter_sequence=[*filters, *RGB], **how)
    return Clip(frames, iio.immeta(mp4, **how)["fps"])
