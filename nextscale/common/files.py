"""Write files atomically: under a temporary name, flushed to disk, then renamed over the old file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nextscale.common.errors import UserError


@contextmanager
def write_atomically(*paths: Path) -> Iterator[list[Path]]:
    """Temporary paths to write in place of `paths`. At the end all are renamed, in order; none when writing fails.

    Creates missing folders. Raises UserError naming the file when it cannot be written (a full disk, no permission).
    """
    drafts: list[Path] = []
    try:
        for path in paths:
            if not path.name or path.is_dir():
                raise UserError(f"cannot write '{path}': it is a folder, not a file name")
            path.parent.mkdir(parents=True, exist_ok=True)
            drafts.append(path.with_name(f".{path.stem[:100]}.{os.getpid()}.part{path.suffix}"))
        yield drafts
        for draft in drafts:
            draft.chmod(0o666 & ~_get_umask())  # safetensors writes for the owner alone
            _flush(draft)
        for draft, path in zip(drafts, paths, strict=True):
            os.replace(draft, path)
        _flush(paths[0].parent)
    except Exception as error:
        # Besides OSError: safetensors and torch.save report a full disk as errors of their own.
        reason = _explain_failure(error)
        if reason is None:
            raise
        names = ", ".join(str(p) for p in paths)
        raise UserError(f"cannot write {names}: {reason}; what was there before is unchanged") from error
    finally:
        for draft in drafts:
            with suppress(OSError):
                draft.unlink(missing_ok=True)


def _explain_failure(error: Exception) -> str | None:
    """Why writing failed; None for errors that are not about writing."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if type(error).__name__ == "SafetensorError":
        return str(error)
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in str(error) or "unexpected pos" in str(error)):
        return "the write was cut short; is the disk full?"
    return None


def _get_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with write_atomically(path) as (draft,):
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file atomically, indented."""
    write_text(path, json.dumps(data, indent=2) + "\n")
