"""Checkpoints on the Hugging Face hub."""

from __future__ import annotations

import tempfile
from pathlib import Path

from nextscale.checkpoints import Checkpoint
from nextscale.checkpoints.saving import write_checkpoint
from nextscale.common.errors import UserError
from nextscale.common.reading import is_hub_name


def find_checkpoint(source: str | Path, *, revision: str | None, token: str | None) -> Path:
    """The folder of a checkpoint; downloaded from the hub when `source` is no folder and has the form `owner/name`."""
    if Path(source).is_dir() or not is_hub_name(str(source)):
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors"]
        return Path(snapshot_download(str(source), revision=revision, token=token, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"there is no folder {source}, and the hub gave no model of that name: {reason}") from error


def upload_folder(folder: Path, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Upload a checkpoint folder as `owner/name`; return the URL of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    patterns = ["*.json", "*.safetensors", "README.md"]
    return str(api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=patterns))


def upload_checkpoint(
    checkpoint: Checkpoint, repo_id: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """Upload a checkpoint that is in no folder yet; return the URL of the commit."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), checkpoint)
        return upload_folder(Path(folder), repo_id, private=private, token=token)
