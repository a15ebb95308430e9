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

    Creates missing folders, and removes them again when writing fails. A link is followed to its file. Raises UserError
    naming the file when it cannot be written (a full disk, no permission, a device), or when two paths are the same.
    """
    drafts: list[Path] = []
    made: list[Path] = []
    targets = [find_target(path) for path in paths]
    try:
        for path, target in zip(paths, targets, strict=True):
            if not path.name or path.is_dir():
                raise UserError(f"cannot write '{path}': it is a folder, not a file name")
            if targets.count(target) > 1:
                raise UserError(f"cannot write two files as {path}")
            check_writable(path)
            made += [folder for folder in target.parents if not folder.exists()]
            target.parent.mkdir(parents=True, exist_ok=True)
            drafts.append(target.with_name(f".{target.stem[:100]}.{os.getpid()}.part{target.suffix}"))
        yield drafts
        for draft in drafts:
            draft.chmod(0o666 & ~_get_umask())  # safetensors writes for the owner alone
            _flush(draft)
        for draft, target in zip(drafts, targets, strict=True):
            os.replace(draft, target)
        _flush(targets[0].parent)
    except BaseException as error:
        # Besides OSError: safetensors and torch.save report a full disk as errors of their own.
        for draft in drafts:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
        for folder in sorted(set(made), key=lambda path: -len(path.parts)):
            with suppress(OSError):  # something else is in it by now
                folder.rmdir()
        reason = _explain_failure(error)
        if reason is None:
            raise
        names = ", ".join(str(p) for p in paths)
        raise UserError(f"cannot write {names}: {reason}; what was there before is unchanged") from error


def find_cache_folder() -> Path:
    """The folder for what can be made again, such as compiled kernels: in XDG_CACHE_HOME or ~/.cache.

    Raises RuntimeError when there is neither that variable nor a home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nextscale"


def find_target(path: Path) -> Path:
    """The file that a path stands for: links are followed, also to a file that does not exist yet."""
    return Path(os.path.realpath(path))


def check_writable(path: Path) -> None:
    """Raise UserError when no file or folder can be written there: a device, a pipe, a file in place of a folder."""
    target, given = find_target(path), os.path.abspath(path)
    is_special = target.exists() and not (target.is_file() or target.is_dir())
    if is_special or any(_is_system_path(name) for name in (given, str(target))):
        raise UserError(f"cannot write {path}: it is a device or a pipe, not a file; only files are replaced")
    above = next((folder for folder in target.parents if os.path.lexists(folder)), target)
    if not above.is_dir():
        raise UserError(f"cannot write {path}: {above} is a file, not a folder")
    if not os.access(target if target.is_dir() else above, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: there is no permission to write in {above}")


def _is_system_path(name: str) -> bool:
    """Whether a path belongs to the system, where a new file is no file of the user's."""
    return name.startswith(("/dev/", "/proc/", "/sys/")) and not name.startswith("/dev/shm/")


def _explain_failure(error: BaseException) -> str | None:
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
