"""Save a pipeline's checkpoint with its card, and carry over what the folder that it came from says of it."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from nextscale.cards.card import find_pictures, find_training, read_any_card, write_card
from nextscale.cards.model import read_model
from nextscale.cards.reports import find_figures
from nextscale.cards.training import Training
from nextscale.checkpoints import Checkpoint
from nextscale.checkpoints.hub import create_repository, upload_folder
from nextscale.checkpoints.saving import write_checkpoint
from nextscale.checkpoints.verify import list_digests
from nextscale.common.errors import UserError
from nextscale.common.files import write_atomically


def save_with_card(
    folder: Path, checkpoint: Checkpoint, source: Path | None = None, upload_as: str = "", *,
    private: bool | None = None, token: str | None = None,
) -> str:  # fmt: skip
    """Write a checkpoint folder and its card, and upload both to the hub where a name is given; the commit's URL.

    A README.md that nextscale did not write stays, with a note. `source`: the folder that the weights were loaded from.
    The facts of its training are carried over; reports and samples only where the weights are the same. Without a
    source, records of a training in `folder` are not used: they are of other weights.
    """
    name = create_repository(upload_as, private=private, token=token) if upload_as else ""
    before, facts = _read_source(source)
    write_checkpoint(folder, checkpoint)
    same = before == list_digests(folder)
    training = replace(facts, changed=facts.changed or not same) if facts != Training() else facts
    try:
        if source is not None and same and source.resolve() != folder.resolve():
            _carry_files(source, folder)
        notes = write_card(folder, name=name, training=training, verify=False)
    except UserError as error:
        notes = [str(error)]
    for note in notes:
        print(f"note: {note}")
    return upload_folder(folder, name, token=token) if name else ""


def upload_with_card(
    checkpoint: Checkpoint, source: Path | None, repo_id: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """As `save_with_card`, in a folder that is deleted afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        return save_with_card(Path(folder), checkpoint, source, repo_id, private=private, token=token)


def _read_source(source: Path | None) -> tuple[dict[str, str], Training]:
    """Digests and training of the folder that a pipeline was loaded from; nothing where it is gone or damaged."""
    if source is None:
        return {}, Training()
    try:
        model = read_model(source, verify=False)
    except UserError:
        return {}, Training()
    return model.digests, find_training(source, model, read_any_card(source))[0]


def _carry_files(source: Path, folder: Path) -> None:
    """Copy the reports and the picture that are about these weights, where the folder has none of the name."""
    model = read_model(source, verify=False)
    reports = {figures.file for figures in find_figures(source, model)[0]}
    for name in sorted(reports | set(find_pictures(source, model, read_any_card(source)).shown)):
        if not (folder / name).exists():
            with write_atomically(folder / name) as (draft,):
                shutil.copyfile(source / name, draft)
