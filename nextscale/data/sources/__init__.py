"""Where images and labels are stored: a folder, local or remote parquet files, or scikit-learn's digits."""

from __future__ import annotations

from pathlib import Path

from nextscale.common.errors import UserError
from nextscale.common.reading import is_hub_name
from nextscale.common.sizes import Size, expand_size
from nextscale.data.sources.digits import Digits
from nextscale.data.sources.folder import list_images, open_folder
from nextscale.data.sources.parquet import Parquet, list_hub_files
from nextscale.data.sources.source import Source


def open_source(data: str, size: Size) -> Source:
    """The images of `data`: "digits" (enlarged to cover `size`), a folder, a .parquet file, or owner/name on the hub.

    Raises UserError when it is none of these, when it holds no images, or when a parquet column is missing.
    """
    if data == "digits":
        return Digits(max(expand_size(size)))
    path = Path(data)
    if path.is_dir():
        tables = sorted([*path.glob("*.parquet"), *path.glob("*/*.parquet")])
        has_classes = any(list_images(p.iterdir()) for p in path.iterdir() if p.is_dir())
        return Parquet(data, [str(t) for t in tables], data) if tables and not has_classes else open_folder(path)
    if path.suffix == ".parquet" and path.is_file():
        return Parquet(data, [data], data)
    if is_hub_name(data) and not path.suffix:
        return Parquet(data, list_hub_files(data), f"datasets/{data}", on_hub=True)
    raise UserError(
        f"{data} is neither 'digits', a folder of images, of class sub-folders or of .parquet files, "
        "a .parquet file, nor owner/name on the Hugging Face hub"
    )
