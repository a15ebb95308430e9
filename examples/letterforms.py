"""Draw the letters A to Z and a to z of every font file in some folders: a data set of 52 classes for small models.

    python -m examples.letterforms /usr/share/fonts --out letters        # letters-train.parquet, letters-test.parquet

Fonts are split by family, so that no family is in both files. Left out are fonts that lack a letter, draw two of the
capitals alike (fonts of symbols), or are equal to an earlier one. Each letter is black on white, drawn in four times
the size and averaged; a font's capitals are equally high and its letters stand on one line. Needs pyarrow and
fontTools, which matplotlib installs.
"""

from __future__ import annotations

import argparse
import io
import json
import string
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LETTERS = string.ascii_uppercase + string.ascii_lowercase
SIDE, SCALE = 32, 4
CAPITAL, BASELINE, MARGIN = 21, 25, 1
"""Height of an H, height of the line on which letters stand, and smallest margin, in pixels."""


def find_fonts(folders: list[Path]) -> Iterator[tuple[str, Path]]:
    """(family, file) of the fonts that have all letters, in the order of their families and names."""
    from fontTools.ttLib import TTFont

    found = []
    for path in sorted(path for folder in folders for path in folder.rglob("*")):
        if path.suffix.lower() not in (".ttf", ".otf") or not path.is_file():
            continue
        try:
            with TTFont(path, lazy=True) as font:
                family = font["name"].getBestFamilyName() or path.stem
                if all(ord(letter) in (font.getBestCmap() or {}) for letter in LETTERS):
                    found.append((family, path))
        except Exception as error:  # damaged fonts raise nearly every type
            print(f"note: {path} is left out: {type(error).__name__}: {error}")
    return iter(sorted(found, key=lambda item: (item[0], item[1].name)))


def draw_letters(path: Path) -> np.ndarray | None:
    """The font's letters (52, 32, 32), uint8; None where a capital is empty or two of them are alike."""
    font = ImageFont.truetype(str(path), 200)
    _, top, _, bottom = font.getbbox("H", anchor="ls")
    if bottom - top < 20:
        return None
    size = 200 * CAPITAL * SCALE / (bottom - top)
    pictures = np.stack([draw_letter(path, size, letter) for letter in LETTERS])
    different = {picture.tobytes() for picture in pictures[:26]}
    return pictures if len(different) == 26 and (pictures.min(axis=(1, 2)) < 128).all() else None


def draw_letter(path: Path, size: float, letter: str) -> np.ndarray:
    """One letter (32, 32), in the middle of the width; smaller where it would not fit."""
    most, line = (SIDE - 2 * MARGIN) * SCALE, BASELINE * SCALE
    left, top, right, bottom = ImageFont.truetype(str(path), size).getbbox(letter, anchor="ls")
    above, below = line - MARGIN * SCALE, (SIDE - MARGIN) * SCALE - line
    shrink = min(1.0, most / max(right - left, 1), above / max(-top, 1), below / max(bottom, 1))
    font = ImageFont.truetype(str(path), size * shrink)
    left, top, right, bottom = font.getbbox(letter, anchor="ls")
    canvas = Image.new("L", (SIDE * SCALE, SIDE * SCALE), 255)
    ImageDraw.Draw(canvas).text(((SIDE * SCALE - right - left) / 2, line), letter, fill=0, font=font, anchor="ls")
    return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX))


def is_held_out(family: str, share: float) -> bool:
    """Whether a family is in the test set: by a checksum of its name, so that new fonts move no other."""
    return zlib.crc32(family.encode()) / 2**32 < share


def write_table(rows: list[tuple[np.ndarray, int]], path: Path) -> None:
    """A parquet file in the hub's layout: `image` and `label` with the names of the classes."""
    import pyarrow
    import pyarrow.parquet

    images = []
    for picture, _ in rows:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {"image": pyarrow.array(images, kind), "label": pyarrow.array([label for _, label in rows])}
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(LETTERS)}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pyarrow.parquet.write_table(pyarrow.table(columns).replace_schema_metadata(metadata), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path, help="beginning of the two files' names")
    parser.add_argument("--test-share", type=float, default=0.05, help="share of the families in the test file")
    options = parser.parse_args()
    rows: dict[str, list[tuple[np.ndarray, int]]] = {"train": [], "test": []}
    families: dict[str, set[str]] = {"train": set(), "test": set()}
    seen: set[bytes] = set()
    for family, path in find_fonts(options.folders):
        try:
            pictures = draw_letters(path)
        except OSError as error:
            print(f"note: {path} is left out: {error}")
            continue
        if pictures is None or pictures.tobytes() in seen:
            continue
        seen.add(pictures.tobytes())
        part = "test" if is_held_out(family, options.test_share) else "train"
        rows[part] += [(picture, label) for label, picture in enumerate(pictures)]
        families[part].add(family)
    for part, drawn in rows.items():
        path = Path(f"{options.out}-{part}.parquet")
        write_table(drawn, path)
        print(f"{path}: {len(drawn)} images of {len(drawn) // len(LETTERS)} fonts, {len(families[part])} families")
        path.with_suffix(".txt").write_text("\n".join(sorted(families[part])) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
