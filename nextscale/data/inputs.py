"""What a data set is, as an input of work that is made of it; see `nextscale.common.inputs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nextscale.common.fingerprint import fingerprint_bytes, fingerprint_files
from nextscale.data.sources import Source

_LISTED_CLASSES = 100


def describe_data(source: Source) -> dict[str, Any]:
    """Fingerprint of a source's files, the column that was asked for, class names, digests of labels and of captions;
    reads no image.

    More than a hundred class names are represented by their number and a digest.
    """
    names: Any = list(source.class_names)
    if len(names) > _LISTED_CLASSES:
        names = f"{len(names)} names with the digest {fingerprint_bytes(repr(names).encode())}"
    labels = fingerprint_bytes(np.asarray(source.labels, np.int64).tobytes())
    column = getattr(getattr(source, "config", None), "image_column", "")
    chosen = {"image_column": column} if column else {}
    captions = {} if source.captions is None else {"captions": source.captions.fingerprint()}
    return {
        "where": source.where, **source.fingerprint(), **chosen, "class_names": names, "labels": labels, **captions
    }  # fmt: skip


def describe_cache(folder: Path) -> dict[str, Any]:
    """Fingerprint of a token cache: the content of cache.json, and the files of its shards."""
    content = fingerprint_bytes((folder / "cache.json").read_bytes())
    return {
        "where": str(folder), "content": content, **fingerprint_files(folder.glob("[!.]*.safetensors"), folder)
    }  # fmt: skip
