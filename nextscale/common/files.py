"""Writing files whole: under a temporary name, flushed to disk, then renamed. What existed stays until then."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nextscale.common.errors import UserError


@contextmanager
def write_atomically(*paths: Path) -> Iterator[list[Path]]:
    """Temporary paths to write in place of `paths`; all are renamed at the end, in order, or none when writing fails.

    Missing folders are made. Raises UserError naming the file when it cannot be written (a full disk, no permission).
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
            draft.chmod(0o666 & ~_umask())  # safetensors writes for the owner alone
            _flush(draft)
        for draft, path in zip(drafts, paths, strict=True):
            os.replace(draft, path)
        _flush(paths[0].parent)
    except Exception as error:
        # Besides OSError: safetensors and torch.save report a full disk as errors of their own.
        reason = _write_failure(error)
        if reason is None:
            raise
        names = ", ".join(str(p) for p in paths)
        raise UserError(f"cannot write {names}: {reason}; what was there before is unchanged") from error
    finally:
        for draft in drafts:
            with suppress(OSError):
                draft.unlink(missing_ok=True)


def _write_failure(error: Exception) -> str | None:
    """Why writing failed, or None when the error is something else."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if type(error).__name__ == "SafetensorError":
        return str(error)
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in str(error) or "unexpected pos" in str(error)):
        return "the write broke off; is the disk full?"
    return None


def _umask() -> int:
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
    """Write a text file whole."""
    with write_atomically(path) as (draft,):
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file whole, indented for people."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def record_settings(path: Path, settings: dict[str, Any]) -> None:
    """Note a run's settings in its folder, or raise UserError naming what differs from an earlier run there."""
    if not path.exists():
        write_json(path, settings)
        return
    before = read_json(path)
    if not isinstance(before, dict):
        raise UserError(f"{path} is not the record of a run; choose another --out")
    changed = [k for k in settings if before.get(k) != settings[k]]
    if changed:
        raise UserError(
            f"{path.parent} holds a run with other settings ({', '.join(changed)}); choose another --out, or delete it"
        )


def read_json(path: Path) -> Any:
    """Read a JSON file; UserError when it is absent or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no {path}") from None
    except (ValueError, OSError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def has_format(folder: Path, name: str) -> bool:
    """Whether the folder's config.json says that it holds a model in this format of ours."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("format") == name
    except (OSError, ValueError, AttributeError):
        return False


def is_hub_name(text: str) -> bool:
    """Whether a text reads like owner/name on the Hugging Face hub."""
    return re.match(r"^[\w.-]+/[\w.-]+$", text) is not None
