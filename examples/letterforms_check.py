"""Check how often a model that reads captions draws what held-out captions of `examples.letterforms` say.

    python -m examples.letterforms_check runs/text --prompts letters-held-out.parquet --letters runs/read-letter \\
        --weight runs/read-weight --slant runs/read-slant --face runs/read-face --bag-of-words runs/bag --out runs/check

Colours are read by a rule: the ground is the colour of the list that is nearest to the median of the border, and the
letter's the one nearest to the median of the pixels that differ most from the ground. Letter and style are read by
classifiers; a style without one is not checked. Train them on pictures as they are, because many letters are others in
a mirror, and those of a style on its column:

    nextscale classifier train classifier-cifar10 --data letters-train.parquet --out runs/read-letter \\
        --images.no-flip --classifier.no-mirror
    nextscale classifier train classifier-cifar10 --data letters-train.parquet --out runs/read-weight \\
        --images.no-flip --classifier.no-mirror --images.label-column weight

report.json has the share of prompts of which each word is read right, letter and colours together, and all words:

    samples          images that the model draws from the prompts
    file             the pictures of the file itself: what can be read at most
    shuffled         the samples, read for another prompt each
    bag of words     with --bag-of-words: images that a second model draws from the words of each prompt in alphabetical
                     order. It was trained on them (`nextscale tokenize --captions --images.caption-column bag`) and
                     does not know which colour is whose.
    chance           a guess among the words of each part

prompts.png shows prompts with a sample, the second model's and the picture of the file.
"""

from __future__ import annotations

import argparse
import io
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from examples.checking import add_sample_options, choose_settings, run_check
from examples.letter_captions import COLOURS, STYLE
from examples.letterforms import LETTERS
from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.pictures import save_image, tile_images, to_uint8
from nextscale.encoders.classifier import Classifier, load_classifier
from nextscale.pipeline import Pipeline

WORDS: dict[str, tuple[str, ...]] = {
    "letter": tuple(LETTERS), "ink": tuple(COLOURS), "paper": tuple(COLOURS), **STYLE
}  # fmt: skip
"""The words of each part of a caption."""
INK_PIXELS = 24
"""Pixels that decide the letter's colour: about as many as a thin l has."""
SHOWN, STRIP = 24, (360, 112)
"""Prompts in the picture, and the size of each's strip of images; its caption has up to 60 characters."""

Words = dict[str, list[str | None]]
"""A word of each part for every picture; None where nothing is asked."""


def read_prompts(path: Path, limit: int, seed: int) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Rows of a file of `examples.letterforms --captions`, at most `limit` drawn by the seed, and their pictures, uint8
    (B, H, W, 3). UserError for another file."""
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    missing = {"image", "label", "ink", "paper", *STYLE, "caption", "bag"} - {*table.column_names}
    if missing or not len(table):
        reason = f"no columns {', '.join(sorted(missing))}" if missing else "no rows"
        raise UserError(f"{path} has {reason}: give a file of `python -m examples.letterforms --captions`")
    chosen = random.Random(seed).sample(range(len(table)), min(limit, len(table)))
    rows = table.take(chosen).to_pylist()
    return rows, np.stack([np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows])


def list_asked(rows: Sequence[dict[str, Any]]) -> Words:
    """The words that each caption has."""
    asked: Words = {"letter": [LETTERS[row["label"]] for row in rows]}
    for part in ("ink", "paper", *STYLE):
        asked[part] = [row[part] if row[part] in row["bag"].split() else None for row in rows]
    return asked


def read_colours(pictures_BHW3: np.ndarray) -> tuple[list[str], list[str]]:
    """The names of the letter's and the ground's colour in each picture (B, H, W, 3), uint8."""
    names, colours_C3 = list(COLOURS), np.array(list(COLOURS.values()), np.float64)
    found: tuple[list[str], list[str]] = [], []
    for picture_HW3 in pictures_BHW3.astype(np.float64):
        sides = picture_HW3[0], picture_HW3[-1], picture_HW3[1:-1, 0], picture_HW3[1:-1, -1]
        paper_3 = np.median(np.concatenate(sides), axis=0)
        pixels_N3 = picture_HW3.reshape(-1, 3)
        farthest_N = np.argsort(-np.linalg.norm(pixels_N3 - paper_3, axis=1), kind="stable")[:INK_PIXELS]
        for part, colour_3 in zip(found, (np.median(pixels_N3[farthest_N], axis=0), paper_3), strict=True):
            part.append(names[int(np.linalg.norm(colours_C3 - colour_3, axis=1).argmin())])
    return found


def open_reader(folder: Path, part: str) -> Classifier:
    """The classifier of a part. UserError for other classes than its words, and for one that reads mirror images."""
    model = load_classifier(folder)
    if {*model.class_names} - {*WORDS[part]}:
        known, wanted = ", ".join(model.class_names[:6]), ", ".join(WORDS[part][:6])
        raise UserError(f"{folder} reads other classes ({known}, ...) than the words of {part} ({wanted}, ...)")
    if model.config.mirror:
        raise UserError(f"{folder} reads mirror images too: train it with --classifier.no-mirror")
    return model


@torch.no_grad()
def read_pictures(pictures_BHW3: np.ndarray, readers: dict[str, Classifier]) -> Words:
    """What is read in pictures (B, H, W, 3), uint8."""
    ink, paper = read_colours(pictures_BHW3)
    found: Words = {"ink": [*ink], "paper": [*paper]}
    for part, model in readers.items():
        batches = torch.from_numpy(pictures_BHW3).permute(0, 3, 1, 2).split(200)
        best = torch.cat([model(batch).logits_BC.argmax(dim=1) for batch in batches])
        found[part] = [model.class_names[i] for i in best]
    return found


def measure(found: Words, asked: Words) -> dict[str, float]:
    """The share of pictures in which each part, letter and colours, and all that is asked and read are right."""
    right: dict[str, list[float | None]] = {}
    for part in (part for part in WORDS if part in found):
        pairs = zip(asked[part], found[part], strict=True)
        right[part] = [None if word is None else float(word == seen) for word, seen in pairs]
    return summarise(right)


def summarise(right: dict[str, list[float | None]]) -> dict[str, float]:
    """Means of each part over the pictures where it is asked, and of the products of several parts over all."""
    shares = {}
    for part, column in right.items():
        values = [value for value in column if value is not None]
        if values:
            shares[part] = sum(values) / len(values)
    for name, parts in (("letter and colours", ("letter", "ink", "paper")), ("all", tuple(right))):
        rows = zip(*(right[part] for part in parts), strict=True)
        products = [math.prod(value for value in row if value is not None) for row in rows]
        shares[name] = sum(products) / len(products)
    return shares


def guess(asked: Words, parts: Sequence[str]) -> dict[str, float]:
    """What guessing gives: each part by itself, and of two colours that differ."""
    count = {part: len(words) for part, words in WORDS.items()} | {"paper": len(COLOURS) - 1}
    chances = {part: [None if word is None else 1 / count[part] for word in asked[part]] for part in parts}
    return summarise(chances) | {"paper": 1 / len(COLOURS)}


def draw(model: str, prompts: list[str], options: argparse.Namespace) -> np.ndarray:
    """Samples of a model, uint8 (B, H, W, 3); sample i has the same random numbers whatever the prompt."""
    pipeline = Pipeline.from_pretrained(model, device=options.device)
    settings = choose_settings(pipeline, options)
    images = pipeline.sample(prompts=prompts, config=settings, batch_size=options.batch_size)
    return to_uint8(images.tensor).permute(0, 2, 3, 1).numpy()


def show(drawn: list[np.ndarray], captions: list[str]) -> Image.Image:
    """Prompts, each below its pictures side by side."""
    strips = []
    for pictures in zip(*(pictures_BHW3[:SHOWN] for pictures_BHW3 in drawn), strict=True):
        strip, side = Image.new("RGB", STRIP, "white"), STRIP[1]
        for i, picture in enumerate(pictures):
            large = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            strip.paste(large, (i * (side + 4), 0))
        strips.append(strip)
    return tile_images(strips, captions[:SHOWN], columns=3)


def check(options: argparse.Namespace) -> dict[str, Any]:
    """The report; report.json and prompts.png are written into the folder `options.out`."""
    rows, pictures = read_prompts(options.prompts, options.limit, options.seed)
    folders = {"letter": options.letters} | {part: getattr(options, part) for part in STYLE}
    readers = {part: open_reader(folder, part) for part, folder in folders.items() if folder}
    prompts, asked = [row["caption"] for row in rows], list_asked(rows)
    drawn = {"samples": draw(options.model, prompts, options)}
    if options.bag_of_words:
        drawn["bag of words"] = draw(options.bag_of_words, [row["bag"] for row in rows], options)
    drawn["file"] = pictures
    found = {name: read_pictures(images, readers) for name, images in drawn.items()}
    shares = {name: measure(words, asked) for name, words in found.items()}
    others = {part: [*words[1:], words[0]] for part, words in asked.items()}  # the order of the rows is a random one
    shares["shuffled"] = measure(found["samples"], others)
    shares["chance"] = guess(asked, [part for part in WORDS if part in found["file"]])
    report = {"model": options.model, "prompts": len(rows), "seed": options.seed, "shares": shares}
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "report.json", report)
    save_image(show(list(drawn.values()), prompts), options.out / "prompts.png")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder of the model that reads captions")
    parser.add_argument("--prompts", required=True, type=Path, help="held-out file of examples.letterforms")
    parser.add_argument("--letters", required=True, type=Path, help="classifier of the 52 letters")
    for part in STYLE:
        parser.add_argument(f"--{part}", type=Path, help=f"classifier of {part}: {', '.join(STYLE[part])}")
    parser.add_argument("--bag-of-words", default="", help="model trained on the column bag")
    parser.add_argument("--out", required=True, type=Path, help="folder for report.json and prompts.png")
    parser.add_argument("--limit", type=int, default=1000, help="prompts to use at most, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0, help="of the samples and of the choice of prompts")
    add_sample_options(parser)
    report = run_check(parser, check)
    names = list(report["shares"]["samples"])
    print(f"{report['prompts']} prompts; share read right of", *names, sep="  ")
    for condition, shares in report["shares"].items():
        print(f"{condition:>12}", *(f"{shares[name]:{len(name)}.3f}" for name in names), sep="  ")


if __name__ == "__main__":
    main()
