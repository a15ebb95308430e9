"""What is in a file or a folder, told from its content: to decide whether a command may write there."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

from nextscale.common.errors import UserError
from nextscale.common.reading import parse_json, read_json

EMPTY = "nothing"
CHECKPOINT = "a nextscale checkpoint"
CLASSIFIER = "a classifier"
ENCODER = "an encoder"
ADAPTER = "an adapter (LoRA)"
TRAIN_RUN = "a run of `nextscale train`"
TOKENIZER_RUN = "a run of `nextscale tokenizer train`"
CLASSIFIER_RUN = "a run of `nextscale classifier train`"
ENCODER_RUN = "a run of `nextscale encoder train`"
UNKNOWN_RUN = "a training run"
QUICKSTART_RUN = "a run of `nextscale quickstart`"
SPARSIFY_RUN = "a run of `nextscale sparsify`"
TOKEN_CACHE = "a token cache"
FEATURES = "features of `nextscale evaluate` or `nextscale statistics`"
TUNE = "results of `nextscale tune`"
EXPERIMENTS = "results of `nextscale experiment run`"
OTHER_MODEL = "a model of another library"

CARD = "README.md"
"""A model card."""

_FORMATS = {
    "nextscale": CHECKPOINT,
    "nextscale-classifier": CLASSIFIER,
    "nextscale-encoder": ENCODER,
    "nextscale-lora": ADAPTER,
}
_NOTES = frozenset((".yaml", ".yml", ".md", ".txt", ".log", ".out", ".err", ".sh"))
"""Suffixes of files that people keep beside results, and that no command writes over."""
_STAGES = ("tune", "split", "routers", "adapt", "samples")
_SCALES = ("tiny", "cifar", "paper")
_EXPERIMENT_PARTS = ("*/results.json", "*/run.json", "*/cache.json", "*/measured-*.json")
_IMAGE_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
_SOFTWARE = 305
"""EXIF's number of the name of the program that wrote a picture."""


def identify_folder(folder: Path) -> str:
    """One of the names above, or "other files (a, b, ...)". Notes and hidden files do not count as content."""
    names = {entry.name for entry in os.scandir(folder)}
    for file, kind in (("quickstart.json", QUICKSTART_RUN), ("cache.json", TOKEN_CACHE), ("tune.json", TUNE)):
        if file in names:
            return kind
    if "sparsify.json" in names or any((folder / "stages" / stage).is_dir() for stage in _STAGES):
        return SPARSIFY_RUN
    if "run.json" in names or any((folder / "training").glob("*.pt")):
        return _identify_run(folder)
    if any("networks" in _read_table(folder / name / "features.json") for name in (".", *_list_features(names))):
        return FEATURES
    if "config.json" in names:
        damaged = CHECKPOINT if "tokenizer.safetensors" in names else OTHER_MODEL
        return _FORMATS.get(str(_read_table(folder / "config.json").get("format")), damaged)
    if any(any((folder / scale).glob(pattern)) for scale in _SCALES for pattern in _EXPERIMENT_PARTS):
        return EXPERIMENTS
    others = sorted(n for n in names if not n.startswith(".") and Path(n).suffix.lower() not in _NOTES)
    shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
    return f"other files ({shown})" if others else EMPTY


def may_be_data(path: Path) -> bool:
    """Whether a path is a folder of images or a token cache, and no model or run."""
    if not path.is_dir():
        return False
    kind = identify_folder(path)
    return kind in (EMPTY, TOKEN_CACHE) or kind.startswith("other files")


def _list_features(names: set[str]) -> list[str]:
    """The names of the folders in which `nextscale evaluate` keeps features."""
    return [name for name in names if name == "samples" or name.startswith("reference-")]


def _identify_run(folder: Path) -> str:
    """Which command trains in a folder: told from the settings in its run.json, else from the names of its states."""
    settings = _read_table(folder / "run.json")
    keys = {
        "validation_images": TRAIN_RUN,
        "codebook": TOKENIZER_RUN,
        "classifier": CLASSIFIER_RUN,
        "moco": ENCODER_RUN,
    }
    tasks = {"transformer": TRAIN_RUN, "tokenizer": TOKENIZER_RUN, "classifier": CLASSIFIER_RUN, "encoder": ENCODER_RUN}
    for key, kind in keys.items():
        if key in settings:
            return kind
    found = {kind for task, kind in tasks.items() if any((folder / "training").glob(f"{task}-*.pt"))}
    return found.pop() if len(found) == 1 else UNKNOWN_RUN


def identify_file(path: Path) -> str:
    """What a file is, as a phrase for messages: "a parquet file", "a picture", ..."""
    if path.stat().st_size == 0:
        return "an empty file"
    with path.open("rb") as file:
        start = file.read(12)
    if start.startswith(b"PAR1"):
        return "a parquet file"
    if is_picture_start(start):
        program = read_picture_program(path)
        return f"a picture of `{program}`" if program else "a picture that nextscale did not write"
    if start.startswith(b"PK"):
        names = list_zip_members(path)
        if any(name.endswith(".npy") for name in names):
            return f"arrays ({', '.join(sorted(n.removesuffix('.npy') for n in names)[:5])})"
        return "a torch file" if any(name.endswith("data.pkl") for name in names) else "a zip archive"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return "a safetensors file"
    if start.startswith(b"\x80"):
        return "a pickle (a torch file of an old form)"
    return "a JSON file" if path.suffix == ".json" else "a file of another kind"


def is_picture_start(start: bytes) -> bool:
    """Whether a file that begins with these 12 bytes is a picture of a common format."""
    return start.startswith(_IMAGE_STARTS) or (start.startswith(b"RIFF") and start[8:12] == b"WEBP")


def read_picture_program(path: Path) -> str:
    """The command of nextscale that wrote a picture, such as "nextscale sample"; empty for other pictures."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            text = image.info.get("Software") or image.getexif().get(_SOFTWARE) or ""
    except Exception:  # a damaged picture raises nearly every type
        return ""
    return text if isinstance(text, str) and text.split(" ")[0] == "nextscale" else ""


def mark_picture(format_name: str, program: str) -> dict[str, Any]:
    """Arguments of PIL's `save` that store the name of the program in a picture; none where a format cannot."""
    if format_name == "PNG":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_text("Software", program)
        return {"pnginfo": info}
    if format_name in ("JPEG", "WEBP", "TIFF"):
        from PIL import Image

        exif = Image.Exif()
        exif[_SOFTWARE] = program
        return {"exif": exif}
    return {}


def list_zip_members(path: Path) -> list[str]:
    """The names of a zip archive's members; none when it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return []


def read_tensor_names(path: Path) -> set[str]:
    """The names of a safetensors file's tensors; none when it is damaged."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            head = parse_json(file.read(min(size, 2**24)), str(path), finite=False)
    except (OSError, ValueError):
        return set()
    return set(head) - {"__metadata__"} if isinstance(head, dict) else set()


def _read_table(path: Path) -> dict[str, Any]:
    """The table in a JSON file; empty when there is none."""
    try:
        data = read_json(path)
    except UserError:
        return {}
    return data if isinstance(data, dict) else {}


def can_write_picture(format_name: str) -> bool:
    """Whether this installation of PIL writes colour pictures in the format: some are built without a codec."""
    from io import BytesIO

    from PIL import Image

    try:
        Image.new("RGB", (1, 1)).save(BytesIO(), format_name)
    except (OSError, ValueError, KeyError, SystemError):
        return False
    return True
