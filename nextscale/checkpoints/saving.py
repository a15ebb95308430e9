"""Writing native checkpoints, see `nextscale.checkpoints.native`."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

import nextscale
from nextscale.checkpoints import Checkpoint
from nextscale.checkpoints.native import FORMAT, ORIGINAL, TOKENIZER, TRANSFORMER, VERSION
from nextscale.common.contents import CLASSIFIER, ENCODER, OTHER_MODEL, identify_folder
from nextscale.common.digest import add_digest, compute_digest
from nextscale.common.errors import UserError
from nextscale.common.files import write_atomically, write_json
from nextscale.config.parse import to_dict


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint folder. All files are complete on disk before the first one replaces an older one."""
    files = {TOKENIZER: checkpoint.tokenizer, TRANSFORMER: checkpoint.transformer, ORIGINAL: checkpoint.extras}
    files = {name: unshare_storage(tensors) for name, tensors in files.items() if tensors}
    head = {
        "format": FORMAT,
        "version": VERSION,
        "library": nextscale.__version__,
        "model": to_dict(checkpoint.config),
        **({"weights": "int8"} if checkpoint.is_int8 else {}),
        "origin": checkpoint.origin,
        "digests": {name: compute_digest(tensors) for name, tensors in files.items()},
    }
    if folder.exists() and not folder.is_dir():
        raise UserError(f"cannot save to {folder}: it is a file, not a folder")
    if (folder / "config.json").exists() and identify_folder(folder) in (OTHER_MODEL, CLASSIFIER, ENCODER):
        raise UserError(f"cannot save to {folder}: it holds {identify_folder(folder)}; choose another folder")
    with write_atomically(*(folder / name for name in files), folder / "config.json") as drafts:
        for draft, tensors in zip(drafts[:-1], files.values(), strict=True):
            save_file(tensors, draft)
        write_json(drafts[-1], add_digest(head))
    for name in {TOKENIZER, TRANSFORMER, ORIGINAL} - set(files):
        (folder / name).unlink(missing_ok=True)


def unshare_storage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, none of which shares storage with another: what safetensors can write."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous().cpu()
        storage = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return out
