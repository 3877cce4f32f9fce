"""The clips that servers send, decoded."""

from __future__ import annotations

import imageio.v3 as iio

from collabvr import Clip


def decoded(mp4: bytes, crop: str = "iw:ih", size: str = "iw:ih") -> Clip:
    """The clip in an MP4, cropped and scaled as FFmpeg's filters write it.

    Raises OSError if it is no video.
    """
    filters = [
        ("crop", crop),
        # rounded, or every step would be darker than the last
        ("scale", f"{size}:flags=bicubic+accurate_rnd+full_chroma_int"),
        ("format", "rgb24"),
    ]
    how: dict = {"plugin": "pyav", "extension": ".mp4"}
    frames = iio.imread(mp4, filter_sequence=filters, **how)
    return Clip(frames, iio.immeta(mp4, **how)["fps"])
