"""The file of a card as an output of a command. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nextscale.common.errors import UserError
from nextscale.common.outputs import FileOutput

MARKER = "<!-- nextscale card: this line and all above it are written anew; what you write below it is kept -->"
"""The last line of a card that nextscale wrote, before a person's text."""


@dataclass(frozen=True)
class CardFile(FileOutput):
    """A model card. One without the marker is a person's."""

    suffixes = (".md",)

    def compare_content(self, path: Path) -> tuple[bool, bool]:
        return MARKER in path.read_text(encoding="utf-8", errors="replace"), True

    def refuse(self, found: str, *, replaceable: bool = False) -> UserError:
        return UserError(f"{explain_foreign_card(self.path)} (--overwrite replaces your text)")


def explain_foreign_card(path: Path) -> str:
    """Why a README.md without the marker is not replaced, and what to do."""
    return (
        f"{path} was not written by nextscale and stays as it is; to have a card above your text, put this line first "
        f"in the file: {MARKER}"
    )
