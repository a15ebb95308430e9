"""Draw the letters A to Z and a to z of every font file in some folders: a data set of 52 classes for small models.

    python -m examples.letterforms /usr/share/fonts --out letters        # letters-train.parquet, letters-test.parquet

    python -m examples.letterforms /usr/share/fonts --out letters --captions --known-face --hold-out-share 0.05

With --captions the letters are coloured, and each has a caption: "a bold italic serif capital R, red on blue". Words on
the style are what the font's own tables say; `examples/letter_captions.py` says how. The further columns are what the
picture shows (ink, paper, weight, slant, face), the caption, and its words in alphabetical order (bag).

Letters in held-out combinations go to letters-held-out.parquet, where captions have all words that are known. The other
files have no picture with such a combination.
--hold-out-share holds out, for every letter, this share of the pairs of ink and paper, and of the styles.
--hold-out "bold, italic, R" "red on blue" holds out what you name, in parts that commas separate: a word of style, a
letter, "red on" (ink), "on blue" (paper) or "red on blue".

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from examples.letter_captions import COLOURS, STYLE, Description, describe, read_style

LETTERS = string.ascii_uppercase + string.ascii_lowercase
SIDE, SCALE = 32, 4
CAPITAL, BASELINE, MARGIN = 21, 25, 1
"""Height of an H, height of the line on which letters stand, and smallest margin, in pixels."""


@dataclass(frozen=True)
class Row:
    """A picture with its class and, with captions, a description."""

    picture: np.ndarray
    label: int
    description: Description | None = None


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


def colour(picture: np.ndarray, *colours: str) -> np.ndarray:
    """A grey picture (H, W) in ink and paper, uint8 (H, W, 3)."""
    ink, paper = (np.array(COLOURS[name], np.float64) for name in colours)
    share = picture[..., None] / 255
    return np.rint(share * paper + (1 - share) * ink).astype(np.uint8)


def describe_letters(pictures: np.ndarray, name: str, style: dict[str, str], options: argparse.Namespace) -> list[Row]:
    """The letters of a font in colours, with captions."""
    rows = []
    for label, picture in enumerate(pictures):
        for number in range(options.per_letter):
            words = LETTERS[label], style, f"{options.seed} {name} {LETTERS[label]} {number}"  # no other font's choice
            shown = describe(*words)
            if is_combination_held_out(shown, options):
                shown = describe(*words, say_all=True)
            rows.append(Row(colour(picture, shown.ink, shown.paper), label, shown))
    return rows


def draw_font(path: Path, seen: set[bytes], options: argparse.Namespace) -> list[Row]:
    """The letters of a font; none, with a note where its file is at fault, if it is left out."""
    try:
        style = read_style(path) if options.captions else {}
    except Exception as error:  # as in find_fonts: a table may be damaged
        print(f"note: {path} is left out: its style cannot be read: {type(error).__name__}: {error}")
        return []
    if options.known_face and not style["face"]:
        return []
    try:
        pictures = draw_letters(path)
    except OSError as error:
        print(f"note: {path} is left out: {error}")
        return []
    if pictures is None or pictures.tobytes() in seen:
        return []
    seen.add(pictures.tobytes())
    if options.captions:
        return describe_letters(pictures, path.name, style, options)
    return [Row(picture, label) for label, picture in enumerate(pictures)]


def is_combination_held_out(shown: Description, options: argparse.Namespace) -> bool:
    """Whether what a picture shows is a held-out combination."""
    return shown.is_held_out(options.hold_out_share) or any(map(shown.has, options.hold_out))


def choose_part(row: Row, family: str, options: argparse.Namespace) -> str:
    """The file that a row goes to."""
    if row.description and is_combination_held_out(row.description, options):
        return "held-out"
    return "test" if is_held_out(family, options.test_share) else "train"


def list_unseen_words(rows: dict[str, list[Row]]) -> list[str]:
    """The words of held-out captions that no caption of the training file has."""
    words = {part: {w for row in rows[part] for w in row.description.bag.split()} for part in ("train", "held-out")}
    return sorted(words["held-out"] - words["train"])


def is_held_out(family: str, share: float) -> bool:
    """Whether a family is in the test set: by a checksum of its name, so that new fonts move no other."""
    return zlib.crc32(family.encode()) / 2**32 < share


def write_table(rows: Sequence[Row], path: Path) -> None:
    """A parquet file in the hub's layout: `image`, `label` with the names of the classes, and the descriptions."""
    import pyarrow
    import pyarrow.parquet

    images = []
    for row in rows:
        buffer = io.BytesIO()
        Image.fromarray(row.picture).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {"image": pyarrow.array(images, kind), "label": pyarrow.array([row.label for row in rows])}
    shown = [row.description for row in rows if row.description]
    for name in ("ink", "paper", *STYLE, "caption", "bag") if shown else ():
        columns[name] = pyarrow.array([getattr(description, name) or None for description in shown], pyarrow.string())
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(LETTERS)}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pyarrow.parquet.write_table(pyarrow.table(columns).replace_schema_metadata(metadata), path)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path, help="beginning of the files' names")
    parser.add_argument("--test-share", type=float, default=0.05, help="share of the families in the test file")
    parser.add_argument("--captions", action="store_true", help="colour the letters, and describe each in a caption")
    parser.add_argument("--known-face", action="store_true", help="leave out fonts that do not say what face they are")
    parser.add_argument(
        "--hold-out-share", type=float, default=0.0, help="share of each letter's combinations to hold out"
    )
    parser.add_argument("--hold-out", nargs="+", default=[], help="combinations to hold out")
    parser.add_argument("--per-letter", type=int, default=1, help="pictures of a letter in different colours")
    parser.add_argument("--seed", type=int, default=0, help="of the colours and captions")
    options = parser.parse_args()
    ours = ("known_face", "hold_out_share", "hold_out", "per_letter", "seed")
    if not options.captions and any(getattr(options, name) != parser.get_default(name) for name in ours):
        parser.error(f"{', '.join('--' + name.replace('_', '-') for name in ours)} are for --captions")
    return options


def main() -> None:
    options = parse_options()
    is_holding = bool(options.hold_out or options.hold_out_share)
    rows: dict[str, list[Row]] = {name: [] for name in ("train", "test", *(["held-out"] if is_holding else []))}
    families: dict[str, set[str]] = {name: set() for name in rows}
    seen: set[bytes] = set()
    for family, path in find_fonts(options.folders):
        for row in draw_font(path, seen, options):
            part = choose_part(row, family, options)
            rows[part].append(row)
            families[part].add(family)
    for part, drawn in rows.items():
        path = Path(f"{options.out}-{part}.parquet")
        write_table(drawn, path)
        fonts = "" if options.captions else f"{len(drawn) // len(LETTERS)} fonts, "
        print(f"{path}: {len(drawn)} images of {fonts}{len(families[part])} families")
        path.with_suffix(".txt").write_text("\n".join(sorted(families[part])) + "\n", encoding="utf-8")
    unseen = list_unseen_words(rows) if is_holding else []
    if unseen:
        print(f"note: words of held-out captions that no caption of the training file has: {', '.join(unseen)}")


if __name__ == "__main__":
    main()
