"""Animated pictures: frames that are shown one after the other, as GIF or WebP."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from PIL.Image import Image, Quantize

from nextscale.common.contents import mark_picture
from nextscale.common.files import write_atomically

_FORMATS = {".gif": "GIF", ".webp": "WEBP"}
_MILLISECONDS = 400
_LAST_MILLISECONDS = 2000
"""How long the last frame is shown before the first one follows."""


def is_animated(path: str | Path) -> bool:
    """Whether the suffix names a format of animations."""
    return Path(path).suffix.lower() in _FORMATS


@dataclass(frozen=True)
class Animation:
    """RGB frames of one size. A notebook plays them."""

    frames: tuple[Image, ...]

    def save(self, path: str | Path) -> None:
        """Write a .gif, in 256 colours for each frame, or a .webp, without loss."""
        with write_atomically(Path(path)) as (draft,):
            self.write(draft)

    def write(self, path: Path, program: str = "nextscale") -> None:
        """Encode into `path`, with the name of the program that made it."""
        self._encode(path, _FORMATS[path.suffix.lower()], program)

    def _encode(self, file: Path | BinaryIO, format_name: str, program: str) -> None:
        frames = list(self.frames)
        if format_name == "GIF":
            frames = [frame.quantize(256, method=Quantize.MEDIANCUT) for frame in frames]
        durations = [_MILLISECONDS] * (len(frames) - 1) + [_LAST_MILLISECONDS]
        lossless = {"lossless": True} if format_name == "WEBP" else {}
        frames[0].save(
            file, format_name, save_all=True, append_images=frames[1:], duration=durations, loop=0,
            **lossless, **mark_picture(format_name, program),
        )  # fmt: skip

    def _repr_html_(self) -> str:
        buffer = BytesIO()
        self._encode(buffer, "WEBP", "nextscale")
        width, height = self.frames[0].size
        data = b64encode(buffer.getvalue()).decode()
        return f'<img src="data:image/webp;base64,{data}" width="{width}" height="{height}" alt="images by scale">'
