"""`nextscale info --verify`: compare all files of a folder with the digests that were written with them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from nextscale.checkpoints.native import ORIGINAL, read_safetensors
from nextscale.checkpoints.official_files import check_zip
from nextscale.checkpoints.shards import check_place, read_owner, verify_shard
from nextscale.common.digest import add_digest, check_digest, compute_digest, read_digests, verify_weights
from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.reading import read_json

Report = Callable[[str], None]
"""Called with one line of text about each file."""


def verify(path: Path, report: Report = print) -> None:
    """Verify a model, classifier, encoder, token cache or run: the folder with all below it, or a file.

    Reports each file that has a digest or holds tensors. Raises UserError naming all damaged files.
    """
    if not path.exists():
        raise UserError(f"there is no {path}")
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    faults: list[str] = []
    verified = 0
    for file in files:
        try:
            verdict = _verify_file(file)
        except UserError as error:
            verdict = f"DAMAGED: {error}"
            faults.append(str(error))
        if verdict:
            report(f"{file}: {verdict}")
            verified += verdict == _MATCHES
    if faults:
        raise UserError(f"{len(faults)} damaged files in {path}: {'; '.join(faults)}")
    report(f"{path}: {verified} files match their digests" if verified else f"{path}: no file has a digest")


_SET_TABLES = ("cache.json", "features.json", "samples.json")
"""JSON files that describe a set of shards."""
_MATCHES, _NO_DIGEST = "matches its digest", "has no digest (an earlier version or another program wrote it)"


def _verify_file(file: Path) -> str:
    """The verdict on one file; empty for files of no interest. UserError when it is damaged."""
    if file.suffix == ".json":
        return _verify_json(file)
    if file.suffix == ".safetensors":
        return _verify_safetensors(file)
    if file.suffix in (".npz", ".pth") or (file.suffix == ".pt" and not file.with_suffix(".json").exists()):
        with file.open("rb") as content:
            if content.read(2) != b"PK":
                return _NO_DIGEST
        check_zip(file)
        return _MATCHES
    if file.suffix == ".pt":
        return _verify_state(file)
    return ""


def _verify_json(file: Path) -> str:
    table = read_json(file)
    if not isinstance(table, dict) or "digest" not in table:
        return ""
    check_digest(file, table)
    for name in read_digests(file, table):
        if not (file.parent / name).is_file():
            raise UserError(f"there is no {file.parent / name}")
    return _MATCHES


def _verify_safetensors(file: Path) -> str:
    """By the digest in config.json, or by those in the file's own metadata."""
    config = file.parent / "config.json"
    table = read_json(config) if config.is_file() else {}
    digest = read_digests(config, table).get(file.name) if isinstance(table, dict) else None
    if digest is None and verify_shard(file):
        tables = [file.parent / name for name in _SET_TABLES if (file.parent / name).is_file()]
        check_place(file, read_owner(tables[0]) if tables else "", "move it back, or delete it and write it again")
        return _MATCHES
    verify_weights(file, read_safetensors(file), digest, everything=True)
    return _MATCHES if digest else _NO_DIGEST


def _verify_state(file: Path) -> str:
    """A training state, by the SHA-256 beside it."""
    note: Any = read_json(file.with_suffix(".json"))
    with file.open("rb") as content:
        if not isinstance(note, dict) or hashlib.file_digest(content, "sha256").hexdigest() != note.get("sha256"):
            raise UserError(f"{file} does not match its checksum in {file.with_suffix('.json').name}")
    return _MATCHES


def list_digests(folder: Path, names: Collection[str] = ()) -> dict[str, str]:
    """{file: digest} of a model's weights, for reports to name what they measured; of files with one of `names` alone.

    From config.json, or computed where an earlier version wrote the folder. UserError when a file cannot be read.
    """
    table = read_json(folder / "config.json")
    digests = read_digests(folder / "config.json", table) if isinstance(table, dict) else {}
    files = [file for file in sorted(folder.glob("*.safetensors")) if file.name != ORIGINAL]
    files = [file for file in files if not names or file.name in names]
    return {file.name: digests.get(file.name) or compute_digest(read_safetensors(file)) for file in files}


def accept_changes(folder: Path) -> list[str]:
    """Write the digests of a folder's weights and of its config.json anew; return the names of the files.

    For files that were replaced on purpose. Raises UserError when the folder has no config.json or no weights.
    """
    path = folder / "config.json"
    table = read_json(path)
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if not isinstance(table, dict) or not names:
        raise UserError(f"{folder} holds no model: it needs config.json and safetensors files")
    digests = {name: compute_digest(read_safetensors(folder / name)) for name in names}
    rest = {key: value for key, value in table.items() if key != "digest"}
    write_json(path, add_digest({**rest, "digests": digests}))
    return names
