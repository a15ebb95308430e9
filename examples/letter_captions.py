"""Captions of coloured letters, in words that a classifier or a rule can check in the picture.

Weight: light, regular or bold, from the font's weight class (OS/2): up to 300, between, and from 600 or its bold bit.
Slant: upright or italic, from the italic bit of OS/2 or the italic angle of the table post.
Face: serif, sans, monospace or handwriting, from the first of these that says it: fixed pitch (the table post, or
PANOSE proportion 9), words of the family's name, PANOSE, and the family class of OS/2. Otherwise it is unknown.
Letter: the letter itself, with or without "capital" or "small". Colours: those of letter and ground, from `COLOURS`.

A caption has the letter, both colours and one to three words of style, in one of five orders: "a bold italic serif
capital R, red on blue".
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product
from pathlib import Path
from typing import Any

COLOURS = {
    "black": (16, 16, 16), "white": (245, 245, 245), "red": (214, 32, 32),
    "green": (24, 150, 56), "blue": (28, 60, 214), "yellow": (248, 214, 24),
}  # fmt: skip
STYLE = {
    "weight": ("light", "regular", "bold"),
    "slant": ("upright", "italic"),
    "face": ("serif", "sans", "monospace", "handwriting"),
}
"""The words of each part of the style."""
TEMPLATES = (
    "{article} {style} {letter}, {ink} on {paper}",
    "{ink} on {paper}: {article} {style} {letter}",
    "{letter} in {ink} on {paper}, {style}",
    "on {paper} a {ink} {letter}, {style}",
    "a {ink} {style} {letter} on {paper}",
)
FACE_NAMES = (
    ("monospace", {"mono", "monospace", "monospaced", "typewriter"}),
    ("handwriting", {"script", "handwriting", "scrawl", "cursive"}),
    ("sans", {"sans"}),
    ("serif", {"serif", "roman", "slab"}),
)
"""Words of families' names that say what face it is; the first that a name has counts: a "Sans Mono" is monospaced."""


@dataclass(frozen=True)
class Description:
    """What a picture of a letter shows, and a caption that says it or a part of it."""

    letter: str
    ink: str
    paper: str
    weight: str
    slant: str
    face: str
    """Empty where the font does not say it."""
    caption: str

    @property
    def bag(self) -> str:
        """The caption's words in alphabetical order: the same for "red on blue" and "blue on red"."""
        return " ".join(sorted(re.findall(r"\w+", self.caption)))

    def has(self, combination: str) -> bool:
        """Whether the picture has all parts of a combination, which commas separate."""
        parts = {self.weight, self.slant, self.face, self.letter}
        parts |= {f"{self.ink} on", f"on {self.paper}", f"{self.ink} on {self.paper}"}
        return {part.strip() for part in combination.split(",")} <= parts

    def is_held_out(self, share: float) -> bool:
        """Whether the letter is held out with these colours, or with this style."""
        held_out = choose_held_out(self.letter, share)
        return (self.ink, self.paper) in held_out or (self.weight, self.slant, self.face) in held_out


@cache
def choose_held_out(letter: str, share: float) -> frozenset[tuple[str, ...]]:
    """The pairs of colours and the styles that are held out with a letter: this share of each, rounded up. They are
    those of the smallest checksums, so that no font changes them."""
    styles = product(STYLE["weight"], STYLE["slant"], (*STYLE["face"], ""))
    held_out: set[tuple[str, ...]] = set()
    for combinations in ([*permutations(COLOURS, 2)], [*styles]):
        keys = {words: hashlib.sha256(" ".join((letter, *words)).encode()).digest() for words in combinations}
        held_out |= {*sorted(combinations, key=keys.__getitem__)[: math.ceil(share * len(combinations))]}
    return frozenset(held_out)


def read_style(path: Path) -> dict[str, str]:
    """The style of a font by its own tables, part: word; an empty word where they do not say it."""
    from fontTools.ttLib import TTFont

    with TTFont(path, lazy=True) as font:
        style = font["OS/2"]
        weight, bits = style.usWeightClass, style.fsSelection
        return {
            "weight": "bold" if weight >= 600 or bits & 32 else "light" if weight <= 300 else "regular",
            "slant": "italic" if bits & 1 or font["post"].italicAngle else "upright",
            "face": read_face(font),
        }


def read_face(font: Any) -> str:
    """The face of an open font, or empty."""
    style, name = font["OS/2"], font["name"].getBestFamilyName() or ""
    panose, is_latin = style.panose, style.panose.bFamilyType == 2
    if font["post"].isFixedPitch or (is_latin and panose.bProportion == 9):
        return "monospace"
    words = {word.lower() for word in re.findall("[A-Z]?[a-z]+", name)}  # FreeSans is Free and Sans
    named = next((face for face, names in FACE_NAMES if words & names), "")
    if named or panose.bFamilyType == 3:
        return named or "handwriting"
    if is_latin and panose.bSerifStyle >= 2:  # 0 and 1 are "any" and "no fit"
        return "serif" if panose.bSerifStyle <= 10 else "sans"
    group = style.sFamilyClass >> 8
    return "serif" if group in (1, 2, 3, 4, 5, 7) else {8: "sans", 10: "handwriting"}.get(group, "")


def describe(letter: str, style: dict[str, str], key: str, say_all: bool = False) -> Description:
    """A letter of a font of this style, in colours and with a caption that the key draws. `say_all`: in the same
    colours, with all known words of the style."""
    draw = random.Random(key)
    ink, paper = draw.sample(list(COLOURS), 2)
    size = draw.choice(("", "capital " if letter.isupper() else "small "))
    template = draw.choice(TEMPLATES)
    known = [word for word in style.values() if word]
    said = sorted(draw.sample(range(len(known)), draw.randint(1, len(known))))
    words = known if say_all else [known[i] for i in said]
    article = "an" if words[0][0] in "aeiou" else "a"
    caption = template.format(article=article, style=" ".join(words), letter=size + letter, ink=ink, paper=paper)
    return Description(letter, ink, paper, **style, caption=caption)
