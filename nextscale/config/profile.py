"""Profiles: named settings of sampling in a model's folder, MODEL/profiles/NAME.json. Needs no torch.

`nextscale tune` writes them, `nextscale sample --profile NAME` and `Pipeline.from_pretrained(profile=NAME)` apply them.
A profile belongs to the weights that it was found for; with others it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nextscale.common.digest import add_digest
from nextscale.common.dtypes import SamplingDtype
from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.fingerprint import fingerprint_path
from nextscale.common.inputs import compare_inputs
from nextscale.common.reading import read_json
from nextscale.config.parse import check_fields, from_dict, parse_record, suggest_name, to_dict
from nextscale.config.sampling import SampleConfig

FOLDER = "profiles"
KEYS = ("dtype", "sampling", "weights", "measured")
"""By which a profile's file is recognised."""
_NAME = r"[A-Za-z0-9][\w.-]{0,79}"


@dataclass(frozen=True)
class Measured:
    """What was measured of a profile when it was found."""

    times_as_fast: float
    """Compared with the dense model in float32."""
    seconds_per_image: float
    batch: int
    metric: str
    """Such as classifier_fd."""
    loss: float
    """Share by which the metric is worse on held-out images; below 0 it is better."""
    loss_at_most: float
    """Upper 95 % bound."""
    images: int
    machine: dict[str, str | int]

    def __post_init__(self) -> None:
        rules = {
            "times_as_fast must be above 0": self.times_as_fast > 0,
            "seconds_per_image must be above 0": self.seconds_per_image > 0,
            "batch must be 1 or more": self.batch >= 1,
            "images must be 1 or more": self.images >= 1,
        }
        check_fields("measured", self, rules)


@dataclass(frozen=True)
class Profile:
    """The content of a profile."""

    dtype: SamplingDtype
    sampling: dict[str, Any]
    """Fields of SampleConfig that differ from their defaults, without the seed."""
    weights: dict[str, str | int]
    """`fingerprint_path` of the model's folder."""
    measured: Measured
    refiner_weights: dict[str, str | int] = field(default_factory=dict)
    """The same of the refiner, where the settings have one."""

    @property
    def settings(self) -> SampleConfig:
        """All settings of sampling."""
        return from_dict(SampleConfig, self.sampling, "sampling")

    def apply(self, dtype: Any) -> tuple[SampleConfig, Any]:
        """The settings, and the type to compute in: the profile's in place of auto, else `dtype`."""
        return self.settings, self.dtype if dtype == "auto" else dtype

    def describe(self) -> str:
        """What it costs and saves, in words."""
        found = self.measured
        return (
            f"{found.times_as_fast:.2f} times as fast as dense float32 at batch {found.batch}, {found.metric} "
            f"{found.loss:+.1%} (at most {found.loss_at_most:+.1%}) on {found.images:,} held-out images; "
            f"{found.machine.get('device')}, {found.machine.get('date')}"
        )


def make_profile(model: Path, dtype: SamplingDtype, settings: SampleConfig, measured: Measured) -> Profile:
    """A profile for the weights that are in a model's folder now."""
    defaults, sampling = to_dict(SampleConfig()), to_dict(settings)
    changed = {name: value for name, value in sampling.items() if value != defaults[name] and name != "seed"}
    refiner = Path(settings.refiner) if settings.refiner else None
    if refiner is not None and refiner.is_dir():
        changed["refiner"] = str(refiner.resolve())
    weights = {} if refiner is None else fingerprint_path(refiner)
    return Profile(dtype, changed, fingerprint_path(model), measured, weights)


def find_profile(model: Path, name: str) -> Path:
    """The file of a profile of this name; UserError when it is no name."""
    if not re.fullmatch(_NAME, name):
        raise UserError(f"'{name}' is no name for a profile: use letters, digits, '.', '_' and '-'")
    return model / FOLDER / f"{name}.json"


def write_profile(model: Path, name: str, profile: Profile) -> Path:
    """Write a profile into a model's folder; the path of the file."""
    path = find_profile(model, name)
    write_json(path, add_digest(to_dict(profile)))
    return path


def list_profiles(model: Path) -> list[str]:
    """The names of a model's profiles."""
    return sorted(path.stem for path in (model / FOLDER).glob("*.json"))


def read_profile(model: Path, name: str) -> Profile:
    """A profile of a model's folder. UserError when there is none, it is damaged, or it was found for other weights."""
    path = find_profile(model, name)
    if not path.is_file():
        known = list_profiles(model)
        hint = suggest_name(name, known) if known else "; it has none, `nextscale tune` makes one"
        raise UserError(f"{model} has no profile '{name}'{hint}")
    profile = parse_record(Profile, read_json(path), path, "find it anew with `nextscale tune`")
    try:
        settings = profile.settings
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    _check_weights(path, profile.weights, model)
    if profile.refiner_weights:
        _check_weights(path, profile.refiner_weights, Path(settings.refiner))
    return profile


def _check_weights(path: Path, found_for: Mapping[str, Any], folder: Path) -> None:
    """UserError unless a folder holds the weights that a profile was found for."""
    now = fingerprint_path(folder)
    changed, unknown = compare_inputs({"weights": {**found_for, "where": str(folder)}}, {"weights": now})
    if changed or unknown:
        raise UserError(
            f"{path} was found for other weights: {'; '.join((*changed, *unknown))}; find it anew with `nextscale tune`"
        )


def refuse_adapters(name: str) -> UserError:
    """The error for a profile of this name and adapters, which change the weights that it was found for."""
    return UserError(
        f"profile {name} was found for the model without adapters: leave the profile out, or merge them first "
        "(`nextscale merge-lora`) and tune the result"
    )


def explain_profile(model: Path, name: str) -> str:
    """A profile in words, or why it cannot be used."""
    try:
        return read_profile(model, name).describe()
    except UserError as error:
        return f"cannot be used: {error}"
