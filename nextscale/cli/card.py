"""The command that writes a model's card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from nextscale.cli.files import Overwrite, list_inputs

if TYPE_CHECKING:
    from nextscale.common.outputs import Input, Output


@dataclass
class Card:
    """Write the model card of a folder, README.md with the Hugging Face hub's metadata, from what lies in the folder.

    For a model, tokenizer, classifier or encoder of nextscale, and for the folder of a training run. The card tells
    what config.json, the run's records, the reports of `evaluate` about these weights, and samples.png say. Run it
    again when something changed: what you write below the card's last line is kept.
    """

    folder: Positional[Path]
    """Folder of a model."""
    name: str = ""
    """What the lines that use the model call it, such as owner/name on the hub. Empty = the folder as given."""
    licence: str = ""
    """Licence of the weights, such as apache-2.0 or cc-by-nc-4.0. Empty = as in the card that is there."""
    data: tuple[str, ...] = ()
    """Names on the hub of the data sets that it was trained on. Empty = as in the card that is there."""
    overwrite: Overwrite = False

    def list_files(self) -> tuple[list[Output], list[Input]]:
        from nextscale.cards.file import CardFile
        from nextscale.common.contents import CARD

        return [CardFile("the card", self.folder / CARD)], list_inputs(models={"FOLDER": self.folder})

    def run(self) -> None:
        from nextscale.cards.card import write_card
        from nextscale.common.contents import CARD

        notes = write_card(self.folder, name=self.name, licence=self.licence, data=self.data, overwrite=self.overwrite)
        for note in notes:
            print(f"note: {note}")
        print(f"wrote {self.folder / CARD}")
