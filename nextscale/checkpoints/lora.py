"""Adapters (LoRA) in files, and merged into a model: W + weight alpha / rank B A.

An adapter is a folder with two files:

    config.json          format, version, LoraConfig, the new classes, the fingerprint of the model that it was trained
                         for ("base"), digests
    lora.safetensors     lora_A and lora_B of each layer, and the embeddings of the new classes; float32

A product that is added to the weights costs nothing when images are generated, and everything that works with a model
works with a merged one. Adding anew with other weights needs the model's own tensors, which stay on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nextscale
from nextscale.checkpoints import Checkpoint
from nextscale.checkpoints.native import read_modules, read_safetensors
from nextscale.checkpoints.parts import get_transformer_config
from nextscale.checkpoints.saving import unshare_storage
from nextscale.common.contents import ADAPTER, identify_folder
from nextscale.common.digest import add_digest, check_digest, compute_digest, read_digests, verify_weights
from nextscale.common.errors import UserError
from nextscale.common.files import write_atomically, write_json
from nextscale.common.fingerprint import compute_fingerprint
from nextscale.common.reading import read_json
from nextscale.config.classes import fold_name, list_names
from nextscale.config.lora import NEW_ROWS, LoraConfig, parse_source
from nextscale.config.model import ModelConfig
from nextscale.config.parse import from_dict, to_dict
from nextscale.config.profile import refuse_adapters

FORMAT, VERSION, WEIGHTS = "nextscale-lora", 1, "lora.safetensors"
_EMBEDDING = "condition.embedding.weight"
_SAMPLED_ROWS = 61


@dataclass(frozen=True)
class Adapter:
    """What a training with adapters leaves."""

    config: LoraConfig
    classes: tuple[str, ...]
    """Names of the new classes, which follow those of the model."""
    base: dict[str, Any]
    """The model that it belongs to: `fingerprint`, and `where` it was."""
    tensors: dict[str, Tensor]
    """LAYER.lora_A and LAYER.lora_B of each layer, and the embeddings of the new classes, as `transformer.lora` names
    its parameters."""
    source: str = ""
    """The folder that it was read from, for messages."""

    @property
    def layers(self) -> list[str]:
        """The names of the layers that it changes."""
        return [name.removesuffix(".lora_A") for name in self.tensors if name.endswith(".lora_A")]

    def compute_delta(self, layer: str) -> Tensor:
        """alpha / rank B A of a layer, float32: (out, in), or (experts, out, in)."""
        a, b = (self.tensors[f"{layer}.lora_{part}"].float() for part in "AB")
        return self.config.scale * (b @ a)


def compute_base_fingerprint(checkpoint: Checkpoint) -> str:
    """Fingerprint, 16 hex digits, of a transformer: the shapes of all tensors, and every 61st row of each.

    Values are rounded to bfloat16 first, so the model stored in 16 bits has the same one. A training step changes it.
    """
    tensors = checkpoint.transformer
    shapes = " ".join(f"{name}{tuple(tensor.shape)}" for name, tensor in sorted(tensors.items()))
    rows = {name: t.reshape(-1, t.shape[-1])[::_SAMPLED_ROWS].to(torch.bfloat16) for name, t in tensors.items()}
    return compute_fingerprint(rows, shapes)[:16]


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write an adapter's folder. Both files are complete on disk before one replaces an older one."""
    from safetensors.torch import save_file

    tensors = unshare_storage(adapter.tensors)
    head = {
        "format": FORMAT,
        "version": VERSION,
        "library": nextscale.__version__,
        "lora": to_dict(adapter.config),
        "classes": list(adapter.classes),
        "base": adapter.base,
        "digests": {WEIGHTS: compute_digest(tensors)},
    }
    with write_atomically(folder / WEIGHTS, folder / "config.json") as (draft, note):
        save_file(tensors, draft)
        write_json(note, add_digest(head))


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    path = folder / "config.json"
    head = read_json(path) if path.is_file() else None
    return isinstance(head, dict) and head.get("format") == FORMAT


def describe_adapter(folder: Path) -> dict[str, Any]:
    """For `nextscale info`: the facts of an adapter's folder, as plain JSON values."""
    adapter = read_adapter(folder)
    return {
        "name": str(folder),
        "adapter": f"rank {adapter.config.rank}, scale {adapter.config.scale:g}, {len(adapter.layers)} layers",
        "parameters": sum(tensor.numel() for tensor in adapter.tensors.values()),
        "layers": adapter.layers,
        "classes": list(adapter.classes),
        "base": adapter.base,
    }


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's folder. UserError when it is none, and naming the file that is damaged."""
    if not is_adapter(folder):
        found = f"holds {identify_folder(folder)}" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} is no adapter: it {found}; `nextscale train CONFIG --lora.rank 8` writes {ADAPTER}")
    path = folder / "config.json"
    head = read_json(path)
    if head.get("version") != VERSION:
        raise UserError(
            f"{path} has format version {head.get('version')!r}, this nextscale reads {VERSION}; it was written by "
            f"nextscale {head.get('library')}: update with pip install -U nextscale"
        )
    config = from_dict(LoraConfig, head.get("lora"), f"{path}: lora")
    classes, base = head.get("classes"), head.get("base")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{path}: classes must be a list of names, got {classes!r}")
    if not isinstance(base, dict) or not isinstance(base.get("fingerprint"), str):
        raise UserError(f"{path}: base must be a table with a fingerprint, got {base!r}")
    digests = read_digests(path, head)
    check_digest(path, head)
    tensors = read_safetensors(folder / WEIGHTS)
    verify_weights(folder / WEIGHTS, tensors, digests.get(WEIGHTS), everything=True)
    return Adapter(config, tuple(classes), base, tensors, str(folder))


@dataclass(frozen=True)
class Adapters:
    """A model's adapters with their weights, by the folder that each was read from."""

    base: Callable[[], Checkpoint]
    """Gives the model itself."""
    loaded: Mapping[str, tuple[Adapter, float]] = field(default_factory=dict)

    @staticmethod
    def of_model(folder: Path | None, take: Callable[[], Checkpoint], profile: str = "") -> Adapters:
        """None yet, of the model in a folder, else of the one that `take` gives now. UserError for a model with a
        profile, which belongs to its weights."""
        if profile:
            raise refuse_adapters(profile)
        if folder is not None:
            return Adapters(lambda: read_modules(folder, int8=True)[0])
        checkpoint = take()
        return Adapters(lambda: checkpoint)

    def add(self, sources: Iterable[str], weight: float = 1.0) -> Adapters:
        """With the adapters of these folders, FOLDER or FOLDER:WEIGHT; one that is there gets its new weight.

        `weight`: of those that name none.
        """
        loaded = dict(self.loaded)
        for source in sources:
            folder, number = (source, weight) if Path(source).is_dir() else parse_source(source, weight)
            loaded[folder] = (loaded[folder][0] if folder in loaded else read_adapter(Path(folder)), number)
        return replace(self, loaded=loaded)

    def remove(self, folders: Iterable[str]) -> Adapters:
        """Without the adapters of these folders, or without any. UserError for one that is not loaded."""
        gone = list(folders) or list(self.loaded)
        if unknown := [folder for folder in gone if folder not in self.loaded]:
            raise UserError(f"no adapter {unknown[0]} is loaded; loaded are: {', '.join(self.loaded) or 'none'}")
        return replace(self, loaded={name: entry for name, entry in self.loaded.items() if name not in gone})

    def merge(self) -> Checkpoint:
        """The model with all adapters added to its weights, see `merge`."""
        return merge(self.base(), list(self.loaded.values()))


def merge(checkpoint: Checkpoint, adapters: Sequence[tuple[Adapter, float]]) -> Checkpoint:
    """The model with the weights W + sum over the adapters of weight alpha / rank B A, and with the new classes.

    The sum is computed in float32 and rounded once to the stored type. The embedding of a new class does not depend on
    the adapter's weight. Raises UserError for a model in 8 bits, an adapter of another model, and two classes of one
    name.
    """
    config = checkpoint.config
    if not adapters:
        return checkpoint
    _check(checkpoint, [adapter for adapter, _ in adapters])
    tensors = dict(checkpoint.transformer)
    for layer in dict.fromkeys(layer for adapter, _ in adapters for layer in adapter.layers):
        delta = sum(w * adapter.compute_delta(layer) for adapter, w in adapters if layer in adapter.layers)
        before = tensors[f"{layer}.weight"]
        tensors[f"{layer}.weight"] = (before.float() + delta).to(before.dtype)
    added = [adapter for adapter, _ in adapters if adapter.classes]
    if added:
        rows = tensors[_EMBEDDING]
        new = [adapter.tensors[NEW_ROWS].to(rows.dtype) for adapter in added]
        tensors[_EMBEDDING] = torch.cat([rows[:-1], *new, rows[-1:]])
        config = add_classes(config, tuple(name for adapter in added for name in adapter.classes))
    origin = {**checkpoint.origin, "adapters": [_describe(adapter, weight) for adapter, weight in adapters]}
    return replace(checkpoint, config=config, transformer=tensors, origin=origin)


def _describe(adapter: Adapter, weight: float) -> dict[str, Any]:
    return {"where": adapter.source, "weight": weight, "weights": compute_digest(adapter.tensors)}


def add_classes(config: ModelConfig, names: tuple[str, ...]) -> ModelConfig:
    """The config with these classes after those of the model. UserError when a name is there already."""
    model = get_transformer_config(config, "add classes to")
    count = model.condition.num_classes
    before = config.class_names or tuple(map(str, range(count)))
    folded = [fold_name(name) for name in (*before, *names)]
    if repeated := [name for i, name in enumerate(names, count) if folded.index(fold_name(name)) < i]:
        raise UserError(f"the model or another adapter has a class named {list_names(repeated)} already")
    condition = replace(model.condition, num_classes=count + len(names))
    return replace(config, transformer=replace(model, condition=condition), class_names=before + names)


def _check(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> None:
    """UserError unless all adapters belong to the model and fit into it."""
    get_transformer_config(checkpoint.config, "add adapters to")
    if checkpoint.is_int8:
        raise UserError(
            "adapters cannot be added to linear layers in 8 bits: load the model that `nextscale quantise` made it "
            "from, with --dtype int8 if you like"
        )
    fingerprint = compute_base_fingerprint(checkpoint)
    for adapter in adapters:
        where = adapter.source or "the adapter"
        if adapter.base["fingerprint"] != fingerprint:
            raise UserError(
                f"{where} was trained for another model ({adapter.base.get('where') or 'unknown'}, fingerprint "
                f"{adapter.base['fingerprint']}; this one has {fingerprint}): load it into that model, or train it anew"
            )
        if faults := list(_find_faults(checkpoint, adapter)):
            raise UserError(f"{where} is damaged or was edited: {faults[0]}")


def _find_faults(checkpoint: Checkpoint, adapter: Adapter) -> Iterator[str]:
    """What does not fit, in words."""
    for name, tensor in adapter.tensors.items():
        layer, _, part = name.rpartition(".")
        before = checkpoint.transformer.get(f"{layer}.weight")
        if name == NEW_ROWS and adapter.classes:
            if tensor.shape != (len(adapter.classes), checkpoint.transformer[_EMBEDDING].shape[1]):
                yield f"'{name}' has shape {tuple(tensor.shape)} for {len(adapter.classes)} classes"
        elif part not in ("lora_A", "lora_B") or before is None:
            yield f"the model has no layer for '{name}'"
        else:
            *experts, rows, columns = before.shape
            rank = adapter.config.rank
            expected = (*experts, rank, columns) if part == "lora_A" else (*experts, rows, rank)
            if tensor.shape != expected or f"{layer}.lora_{'B' if part == 'lora_A' else 'A'}" not in adapter.tensors:
                yield f"'{name}' has shape {tuple(tensor.shape)} instead of {expected}, or stands alone"
    if bool(adapter.classes) != (NEW_ROWS in adapter.tensors):
        yield f"it has {len(adapter.classes)} new classes and {'no ' if adapter.classes else ''}embeddings of them"
