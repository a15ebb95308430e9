"""Draw the letters A to Z and a to z of every font file in some folders: a data set of 52 classes for small models.

    python -m examples.letterforms /usr/share/fonts --out letters        # letters-train.parquet, letters-test.parquet

    python -m examples.letterforms /usr/share/fonts --out letters --captions --hold-out "red on blue" "bold, italic, R"

With --captions the letters are coloured, and a third column describes each: "a bold italic serif R, red on blue". Words
on the style are what the font's own tables say: its weight class, italic bit, fixed pitch, PANOSE or family name.
Letters whose caption has all parts of a combination of --hold-out go to letters-held-out.parquet: no caption of the
other files has these parts together. A part is a word, a letter, "red on" (ink), "on blue" (paper) or "red on blue".

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

LETTERS = string.ascii_uppercase + string.ascii_lowercase
SIDE, SCALE = 32, 4
COLOURS = {
    "black": (16, 16, 16), "white": (245, 245, 245), "red": (214, 32, 32), "green": (24, 150, 56),
    "blue": (28, 60, 214), "yellow": (248, 214, 24), "purple": (140, 36, 170), "cyan": (40, 200, 220),
}  # fmt: skip
CAPITAL, BASELINE, MARGIN = 21, 25, 1
"""Height of an H, height of the line on which letters stand, and smallest margin, in pixels."""


@dataclass(frozen=True)
class Row:
    """A picture with its class, and with captions its words."""

    picture: np.ndarray
    label: int
    words: tuple[str, ...] = ()
    """On the style: light or bold, italic, and serif, sans or monospaced, as far as they are known."""
    colours: tuple[str, str] | None = None
    """Ink and paper."""

    @property
    def caption(self) -> str:
        """The words in a sentence; empty without colours."""
        if self.colours is None:
            return ""
        words = self.words or ("letter",)
        article = "an" if words[0][0] in "aeiou" else "a"
        return f"{article} {' '.join(words)} {LETTERS[self.label]}, {' on '.join(self.colours)}"

    def has(self, combination: str) -> bool:
        """Whether the caption has all parts of a combination, which commas separate."""
        ink, paper = self.colours or ("", "")
        parts = {*self.words, LETTERS[self.label], f"{ink} on", f"on {paper}", f"{ink} on {paper}"}
        return {part.strip() for part in combination.split(",")} <= parts


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


def read_words(path: Path) -> tuple[str, ...]:
    """The words on the style of a font, from its own tables."""
    from fontTools.ttLib import TTFont

    with TTFont(path, lazy=True) as font:
        style, post, family = font["OS/2"], font["post"], font["name"].getBestFamilyName() or ""
        weight = "bold" if style.usWeightClass >= 600 else "light" if style.usWeightClass <= 300 else ""
        slant = "italic" if style.fsSelection & 1 or post.italicAngle else ""
        panose = style.panose if style.panose.bFamilyType == 2 else None  # of Latin text
        if post.isFixedPitch or (panose and panose.bProportion == 9) or "Mono" in family.split():
            kind = "monospaced"
        elif panose and panose.bSerifStyle >= 2:
            kind = "serif" if panose.bSerifStyle <= 10 else "sans"
        else:
            kind = next((word.lower() for word in ("Serif", "Sans") if word in family.split()), "")
    return tuple(filter(None, (weight, slant, kind)))


def choose_colours(seed: int, name: str, letter: str, number: int) -> tuple[str, str]:
    """Ink and paper, different ones, of a picture of a font's letter: new fonts change those of no other."""
    names = list(COLOURS)
    draw = zlib.crc32(f"{seed} {name} {letter} {number}".encode())
    ink, other = draw % len(names), draw // len(names) % (len(names) - 1)
    return names[ink], [name for i, name in enumerate(names) if i != ink][other]


def colour(picture: np.ndarray, colours: tuple[str, str]) -> np.ndarray:
    """A grey picture (H, W) in ink and paper, uint8 (H, W, 3)."""
    ink, paper = (np.array(COLOURS[name], np.float64) for name in colours)
    share = picture[..., None] / 255
    return np.rint(share * paper + (1 - share) * ink).astype(np.uint8)


def describe_letters(pictures: np.ndarray, path: Path, seed: int, per_letter: int) -> Iterator[Row]:
    """The letters of a font in colours, with captions."""
    words = read_words(path)
    for label, picture in enumerate(pictures):
        for number in range(per_letter):
            colours = choose_colours(seed, path.name, LETTERS[label], number)
            yield Row(colour(picture, colours), label, words, colours)


def is_held_out(family: str, share: float) -> bool:
    """Whether a family is in the test set: by a checksum of its name, so that new fonts move no other."""
    return zlib.crc32(family.encode()) / 2**32 < share


def write_table(rows: Sequence[Row], path: Path) -> None:
    """A parquet file in the hub's layout: `image`, `label` with the names of the classes and, if any, `caption`."""
    import pyarrow
    import pyarrow.parquet

    images = []
    for row in rows:
        buffer = io.BytesIO()
        Image.fromarray(row.picture).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {"image": pyarrow.array(images, kind), "label": pyarrow.array([row.label for row in rows])}
    if any(row.colours for row in rows):
        columns["caption"] = pyarrow.array([row.caption for row in rows])
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(LETTERS)}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pyarrow.parquet.write_table(pyarrow.table(columns).replace_schema_metadata(metadata), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path, help="beginning of the two files' names")
    parser.add_argument("--test-share", type=float, default=0.05, help="share of the families in the test file")
    parser.add_argument("--captions", action="store_true", help="colour the letters, and describe each in a caption")
    parser.add_argument("--hold-out", nargs="+", default=[], help="combinations for the file of held-out captions")
    parser.add_argument("--per-letter", type=int, default=1, help="pictures of a letter in different colours")
    parser.add_argument("--seed", type=int, default=0, help="of the colours")
    options = parser.parse_args()
    if not options.captions and (options.hold_out or options.per_letter != 1 or options.seed):
        parser.error("--hold-out, --per-letter and --seed are for --captions")
    names = ["train", "test", *(["held-out"] if options.hold_out else [])]
    rows: dict[str, list[Row]] = {name: [] for name in names}
    families: dict[str, set[str]] = {name: set() for name in names}
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
        usual = "test" if is_held_out(family, options.test_share) else "train"
        drawn = [Row(picture, label) for label, picture in enumerate(pictures)]
        if options.captions:
            try:
                drawn = list(describe_letters(pictures, path, options.seed, options.per_letter))
            except Exception as error:  # as in find_fonts: a table may be damaged
                print(f"note: {path} is left out: its style cannot be read: {type(error).__name__}: {error}")
                continue
        for row in drawn:
            part = "held-out" if any(map(row.has, options.hold_out)) else usual
            rows[part].append(row)
            families[part].add(family)
    for part, drawn in rows.items():
        path = Path(f"{options.out}-{part}.parquet")
        write_table(drawn, path)
        fonts = "" if options.captions else f"{len(drawn) // len(LETTERS)} fonts, "
        print(f"{path}: {len(drawn)} images of {fonts}{len(families[part])} families")
        path.with_suffix(".txt").write_text("\n".join(sorted(families[part])) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
