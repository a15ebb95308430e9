"""Checkpoints on the Hugging Face hub."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from nextscale.common.contents import CARD
from nextscale.common.errors import UserError
from nextscale.common.reading import is_hub_name, read_text


def find_checkpoint(source: str | Path, *, revision: str | None, token: str | None) -> Path:
    """The folder of a checkpoint; downloaded from the hub when `source` is no folder and has the form `owner/name`."""
    if Path(source).is_dir() or not is_hub_name(str(source)):
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "README.md", "spiece.model", "merges.txt"]
        return Path(snapshot_download(str(source), revision=revision, token=token, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"there is no folder {source}, and the hub gave no model of that name: {reason}") from error


def create_repository(repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Create a repository unless it exists; its full name, `owner/name`."""
    from huggingface_hub import HfApi

    return str(HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id)


def upload_folder(folder: Path, name: str, *, token: str | None = None) -> str:
    """Upload the model of a folder to the repository `owner/name`; return the URL of the commit."""
    from huggingface_hub import HfApi

    patterns = [glob.escape(file) for file in list_published(folder)]
    return str(HfApi(token=token).upload_folder(repo_id=name, folder_path=folder, allow_patterns=patterns))


def list_published(folder: Path) -> list[str]:
    """The files of a model's folder that belong on the hub: config.json, the weights, profiles, and README.md with the
    files that it links to (samples, reports). Records and states of the training stay where they are."""
    files = [folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("profiles/*.json")]
    if (folder / CARD).is_file():
        text = read_text(folder / CARD, 2**24)
        root = folder.resolve()
        linked = [folder / target for target in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in target]
        files += [folder / CARD, *(file for file in linked if file.is_file() and root in file.resolve().parents)]
    return sorted({file.relative_to(folder).as_posix() for file in files if file.is_file()})
