"""The model of a folder, as far as its card tells: kind, sizes, classes, parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nextscale.checkpoints import build_on_meta
from nextscale.checkpoints.native import read_config, read_modules
from nextscale.checkpoints.verify import list_digests
from nextscale.common.errors import UserError
from nextscale.common.reading import has_format, read_json
from nextscale.common.registry import CONDITIONS, FEED_FORWARDS, MIXERS, ROUTERS
from nextscale.config.model import ModelConfig
from nextscale.encoders.classifier import is_classifier, load_classifier
from nextscale.encoders.self_supervised import is_small_encoder, load_small_encoder
from nextscale.info import count_active_parameters, count_parameters

Kind = Literal["generator", "tokenizer", "classifier", "encoder"]


@dataclass(frozen=True)
class CardModel:
    """The facts that config.json and the modules give."""

    kind: Kind
    folder: Path
    size: tuple[int, int]
    """(height, width) of the images in pixels."""
    parameters: int
    """Of the network; of a generator, its transformer."""
    digests: dict[str, str]
    """{file: digest} of the weights."""
    bytes: int
    """Of the weights."""
    class_names: tuple[str, ...] = ()
    classes: int | None = None
    """None where images have no classes."""
    config: ModelConfig | None = None
    """Of a generator or a tokenizer."""
    active_parameters: int = 0
    """Of a mixture: those that work on a token."""
    tokenizer_parameters: int = 0
    origin: dict[str, Any] = field(default_factory=dict)
    is_int8: bool = False
    grid: tuple[int, int] = (0, 0)
    """Of an encoder: cells (h, w) of an image."""
    width: int = 0
    """Of an encoder: channels of a cell."""
    steps: int = 0
    """Of an encoder: training steps; 0 = untrained."""
    own_modules: tuple[str, ...] = ()
    """Python modules outside the package that the model needs."""

    @property
    def is_official(self) -> bool:
        """Whether the weights were converted from official files."""
        return str(self.origin.get("format", "")).startswith("official")


def read_model(folder: Path, *, verify: bool = True) -> CardModel:
    """The model of a folder. `verify`: compare the weights with their digests.

    Raises UserError when the folder holds no model of nextscale, when a file is missing, and when one is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    if is_classifier(folder):
        return _read_classifier(folder)
    if is_small_encoder(folder):
        return _read_encoder(folder)
    if not has_format(folder, "nextscale") and (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no model of nextscale: its config.json is of something else, or damaged")
    if verify:
        read_modules(folder, verify=True, int8=True)
    config, origin = read_config(folder)
    tokenizer, transformer = build_on_meta(config)
    total = count_parameters(transformer or tokenizer)
    return CardModel(
        "generator" if transformer else "tokenizer", folder, config.image_size, total, **_describe_files(folder),
        class_names=config.class_names, classes=config.count_of_classes, config=config,
        active_parameters=count_active_parameters(config, total), tokenizer_parameters=count_parameters(tokenizer),
        origin=origin, is_int8=read_json(folder / "config.json").get("weights") == "int8",
        own_modules=_find_own_modules(config),
    )  # fmt: skip


def _read_classifier(folder: Path) -> CardModel:
    model = load_classifier(folder)
    size, names = model.config.image_size, model.class_names
    files = _describe_files(folder)
    return CardModel(
        "classifier", folder, (size, size), count_parameters(model), **files, class_names=names, classes=len(names)
    )


def _read_encoder(folder: Path) -> CardModel:
    model = load_small_encoder(folder)
    return CardModel(
        "encoder", folder, (model.size, model.size), count_parameters(model), **_describe_files(folder),
        grid=model.grid, width=model.width, steps=model.steps,
    )  # fmt: skip


def _describe_files(folder: Path) -> dict[str, Any]:
    digests = list_digests(folder)
    return {"digests": digests, "bytes": sum((folder / name).stat().st_size for name in digests)}


def _find_own_modules(config: ModelConfig) -> tuple[str, ...]:
    """Modules outside the package whose parts the transformer has."""
    model = config.transformer
    if model is None:
        return ()
    mixers = {name for block in range(model.depth) for name in model.block_mixers(block)}
    parts = [(MIXERS, name) for name in mixers] + [(FEED_FORWARDS, model.resolved_feed_forward)]
    parts += [(ROUTERS, model.experts.router), (CONDITIONS, model.condition.kind)]
    modules = {registry.get(name).__module__ for registry, name in parts if name in registry}
    return tuple(sorted(module for module in modules if module.partition(".")[0] != "nextscale"))
