"""Migrate settings that earlier versions wrote: in checkpoints, records of runs and config files. Needs no torch."""

from __future__ import annotations

from typing import Any

_RENAMED = {"dynamic": {"own": "late_ffn", "identity": "router_fingerprint"}}
"""Old and new names of fields, by the table that holds them."""
_RESPELLED = {"precision": {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}}
"""Old and new spellings of values, by the name of the field, in any table."""
_ADDED: dict[str, dict[str, Any]] = {
    "num_classes": {"source": "", "max_tokens": 64, "layers": 2, "embedding_width": 0, "channels": 1, "patch": 4},
    "patch": {"picture_size": [], "control": "", "parts": {}, "encoder": "", "encoder_fingerprint": ""},
    "norm_eps": {  # TransformerConfig
        "feed_forward": "auto",
        "options": {},
        "positions": {"kind": "table", "base": 100.0, "extent": 16.0, "size_embedding": False},
    },
    "gating_residual": {  # ExpertsConfig
        "capacity_factor": 0.0,
        "capacity_ratio": 0.75,
        "exclude_zero": False,
        "share_scale_embedding": False,
    },
    "smooth": {"cfg_parts": {}, "cfg_scales": 0, "stop_at": 0},  # SampleConfig
    "micro_batch": {"backend": "auto", "patience": 0, "model_every": 0},  # TrainConfig
    "revive_below": {"scale_dropout": 0.0},  # CodebookConfig
    "idle_balance": {"balance_over": "image", "aggregate": True, "shuffle": False},  # LossConfig
    "max_unreadable": {"label_column": "", "image_column": "", "allow_empty_classes": False},  # DataConfig
    "init": {  # RunConfig
        "sizes": {"scales": [], "drop": 0.0, "lengths": []},
        "lora": {
            "rank": 0,
            "alpha": 0.0,
            "layers": ["mixers", "ffn"],
            "classes_only": False,
            "classes": "",
            "keep": 512,
        },
    },
    "measure_images": {  # QuickstartConfig; a run on the digits is the same without max_epochs
        "max_epochs": 30.0,
        "captions": False,
        "start": "",
        "few_images": 300,
        "images": {"label_column": "", "image_column": "", "allow_empty_classes": False},
    },
    "allow_empty_classes": {"caption_column": ""},  # ReadConfig and DataConfig
}
"""Fields added to a table since version 0.1.0, in order, with defaults. A table is known by a field it had before."""


def rename_settings(data: Any) -> Any:
    """`data` with the current names of fields and values, at every depth. The argument is not changed."""
    if isinstance(data, list):
        return [rename_settings(entry) for entry in data]
    if not isinstance(data, dict):
        return data
    out = {name: _respell(_RESPELLED.get(name, {}), rename_settings(value)) for name, value in data.items()}
    for table, names in _RENAMED.items():
        if isinstance(out.get(table), dict):
            out[table] = {names.get(name, name): value for name, value in out[table].items()}
    return out


def migrate_record(data: Any) -> Any:
    """A complete record of settings with the current names, and with defaults for fields that it does not have yet.

    Settings of a run are compared with this, so a run that an earlier version started can be resumed.
    """
    return _add_defaults(rename_settings(data))


def restore_record(data: Any) -> Any:
    """The inverse of `migrate_record`: old names, and no newer fields that have their default.

    For digests that must equal those of an earlier version.
    """
    if isinstance(data, list):
        return [restore_record(entry) for entry in data]
    if not isinstance(data, dict):
        return data
    old = {name: {new: before for before, new in values.items()} for name, values in _RESPELLED.items()}
    out = {name: _respell(old.get(name, {}), restore_record(value)) for name, value in data.items()}
    for field, added in reversed(_ADDED.items()):
        if field in out:
            out = {name: value for name, value in out.items() if name not in added or value != added[name]}
    for table, names in _RENAMED.items():
        if isinstance(out.get(table), dict):
            old_names = {new: old for old, new in names.items()}
            out[table] = {old_names.get(name, name): value for name, value in out[table].items()}
    return out


def _respell(spellings: dict[str, str], value: Any) -> Any:
    return spellings.get(value, value) if isinstance(value, str) else value


def _add_defaults(data: Any) -> Any:
    if isinstance(data, list):
        return [_add_defaults(entry) for entry in data]
    if not isinstance(data, dict):
        return data
    out = {name: _add_defaults(value) for name, value in data.items()}
    for field, added in _ADDED.items():
        if field in out:
            out = {**_add_defaults(added), **out}
    return out
