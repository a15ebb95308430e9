"""The lines of a card that use its model: a command and Python, which run as they stand beside a file photo.jpg."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

from nextscale.cards.model import CardModel
from nextscale.config.sampling import SampleConfig
from nextscale.config.usage import write_arguments, write_label, write_options
from nextscale.sampling.thresholds import read_budgets

_SHOWN_CLASSES = 3
_SHARE = 0.8
"""Of the dense model's FLOPs, for the example of a model with dynamic experts."""


def write_use(model: CardModel, name: str, settings: SampleConfig) -> tuple[list[str], list[str]]:
    """(commands, lines of Python). `name`: what the model is called there. `settings`: of samples."""
    writers = {"generator": _use_generator, "tokenizer": _use_tokenizer, "classifier": _use_classifier}
    commands, lines = writers.get(model.kind, _use_encoder)(model, name, settings)
    imports = [f"import {module}" for module in model.own_modules]
    return commands, imports + lines


def _quote(text: str) -> str:
    """A text in Python, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _command(model: CardModel, *words: str) -> str:
    imports = [word for module in model.own_modules for word in ("--import", module)]
    return shlex.join(["nextscale", *imports, *words])


def _use_generator(model: CardModel, name: str, settings: SampleConfig) -> tuple[list[str], list[str]]:
    lines = ["from nextscale import Pipeline", "", f"pipeline = Pipeline.from_pretrained({_quote(name)})"]
    if model.classes is None:  # only the condition's author knows its values
        return [_command(model, "info", name)], lines
    labels = ",".join(write_label(i, model.class_names) for i in range(min(model.classes, _SHOWN_CLASSES)))
    command = _command(model, "sample", name, "--labels", labels, *write_options(settings), "--out", "grid.png")
    commands = [command]
    shares = [row.share for row in read_budgets(model.origin) if row.share < 1]
    if shares and not settings.sets_thresholds:
        nearest = min(abs(share - _SHARE) for share in shares)
        share = next(share for share in shares if abs(share - _SHARE) == nearest)
        cheaper = replace(settings, budget=round(share, 2))
        options = ["--labels", labels, *write_options(cheaper), "--out", "cheaper.png"]
        commands.append(_command(model, "sample", name, *options))
    return commands, [*lines, f'pipeline.sample({_quote(labels)}, {write_arguments(settings)}).save("grid.png")']


def _use_tokenizer(model: CardModel, name: str, _: SampleConfig) -> tuple[list[str], list[str]]:
    assert model.config is not None, "a tokenizer has a ModelConfig"
    tokens = model.config.pyramid.length
    return [_command(model, "reconstruct", name, "photo.jpg", "--out", "restored.png")], [
        "from nextscale import Pipeline",
        "",
        f"pipeline = Pipeline.from_pretrained({_quote(name)})",
        'pipeline.reconstruct(["photo.jpg"]).save("restored.png")',
        f'tokens = pipeline.encode(["photo.jpg"])  # (1, {tokens})',
    ]


def _use_classifier(model: CardModel, name: str, _: SampleConfig) -> tuple[list[str], list[str]]:
    command = _command(model, "evaluate", "samples/", "--features", name, "--reference", "photos/", "--out", "fd.json")
    return [command], [
        "import numpy as np",
        "import torch",
        "from PIL import Image",
        "from nextscale.encoders.load import load_feature_network",
        "",
        f"classifier = load_feature_network({_quote(name)})",
        'pixels = torch.from_numpy(np.array(Image.open("photo.jpg").convert("RGB")))',
        "logits = classifier(pixels.permute(2, 0, 1)[None]).logits_BC  # uint8 (B, 3, H, W) to (B, classes)",
        "print(classifier.class_names[logits.argmax()])",
    ]


def _use_encoder(model: CardModel, name: str, _: SampleConfig) -> tuple[list[str], list[str]]:
    command = _command(model, "encoder", "evaluate", name, "--data", "photos/", "--test", "others/")
    (height, width), (rows, columns) = model.size, model.grid
    return [command], [
        "from nextscale.data.arrays import load_batch",
        "from nextscale.encoders.load import load_encoder",
        "",
        f"encoder = load_encoder({_quote(name)})",
        f'images, _ = load_batch(["photo.jpg"], ({height}, {width}))  # float32 in [-1, 1]',
        f"features = encoder(images, encoder.grid)  # (1, {rows}, {columns}, {model.width})",
    ]
