"""Settings of sampling. Needs no torch."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from nextscale.common.errors import UserError
from nextscale.config.parse import check_fields, check_types, from_dict, to_plain
from nextscale.config.transformer import Selection

if TYPE_CHECKING:
    from nextscale.config.idle import Idle

Number = TypeVar("Number", int, float)
Capture = Literal["auto", "on", "off"]
"""Whether a transformer's steps run as captured CUDA graphs, see `nextscale.sampling.capturing`."""


@dataclass(frozen=True)
class SampleConfig:
    """How logits become an image. The defaults are VAR's published evaluation setting.

    cfg, temperature, top_k and top_p take one number, or a list with one number for each scale, coarse to fine.
    """

    cfg: float | tuple[float, ...] = 1.5
    """Classifier-free guidance: strength at the last scale; it grows linearly from 0 at the first. 0 = off. A list
    gives the strength of each scale as it is."""
    top_k: int | tuple[int, ...] = 900
    """Keep the k most likely tokens; 0 = off."""
    top_p: float | tuple[float, ...] = 0.96
    """Keep the most likely tokens that together have this probability; 0 = off."""
    temperature: float | tuple[float, ...] = 1.0
    """Divides the guided logits before they are filtered."""
    seed: int = 0
    """Seed of the random numbers of the images. The same seed gives the same images; change it for others."""
    smooth: bool = False
    """Decode a Gumbel-softmax mixture of codes instead of one code per token. Smoother images; do not use it for
    metrics."""
    official_seeding: bool = False
    """One random generator for the whole call, as in the official code. It reproduces the official tokens, but an image
    depends on its batch."""
    refiner: str = ""
    """Smaller model that generates the last scales (collaborative decoding, CoDe): a checkpoint."""
    draft_scales: int = 0
    """With a refiner: how many scales the main model generates first (CoDe's N; 8 of 10 in its paper)."""
    prune: tuple[float, ...] = ()
    """Token pruning (FastVAR): share of tokens to leave out at each of the last scales, coarse to fine: 0.4 0.5."""
    prune_first_block: int = 3
    """With prune: blocks before this one compute all tokens."""
    tau: tuple[float, ...] = ()
    """Dynamic experts (`nextscale sparsify`): a threshold for each of the last scales, coarse to fine, or one for all
    sparse scales. An expert runs when its predicted norm is at least (1 - tau) times the largest: 1 = all, 0 = one.
    Empty = the model's own."""
    budget: float = 0.0
    """Dynamic experts: use the thresholds that were calibrated for this share of the dense model's FLOPs; 0 = off."""
    selection: Selection = "threshold"
    """Dynamic experts, for comparisons: oracle = tau on the true norms; top-k, random = the share tau of the experts;
    cumulative = the largest until they have the share tau of the sum of the norms; pruned, pruned-activation = the
    share tau of the hidden units, the same for every token: by their contribution or their mean activation."""
    cfg_parts: dict[str, float] = field(default_factory=dict, hash=False)
    """Combined condition: strength for each part in place of cfg, such as control 1.5 text 3. Each part is guided given
    those before it; parts that are not named are not guided."""
    cfg_scales: int = 0
    """Guide this many scales, counted from the coarsest; the later, larger ones are sampled without guidance, in half
    the work. 0 = guide all."""

    stop_at: int = 0
    """Generate this many scales, and shrink the decoded image to the size of the last of them: with 5 of the scales
    1 2 3 4 6 8 to 3/4 of the model's size. 0 = all scales."""

    def __post_init__(self) -> None:
        check_types("sampling", self)
        rules = {
            "cfg must be 0 to 1000": all(0 <= cfg <= 1000 for cfg in _list_values(self.cfg)),
            "top_k must be 0 (off) or more": all(k >= 0 for k in _list_values(self.top_k)),
            "top_p must lie in 0 (off) to 1": all(0 <= p <= 1 for p in _list_values(self.top_p)),
            "temperature must be 0.001 to 1000 (for the likeliest token use top_k=1)": all(
                1e-3 <= t <= 1e3 for t in _list_values(self.temperature)
            ),
            "seed must lie in 0 to 2^63 - 1": 0 <= self.seed < 2**63,
            "cfg_scales must be 0 (all) or more": self.cfg_scales >= 0,
            "stop_at must be 0 (all) or more": self.stop_at >= 0,
            "cfg_scales and a list of cfg cannot be combined: end the list with zeros": not (
                self.cfg_scales and isinstance(self.cfg, tuple)
            ),
            "cfg_parts must be 0 to 1000": all(0 <= cfg <= 1000 for cfg in self.cfg_parts.values()),
            "draft_scales must be 0 or more": self.draft_scales >= 0,
            "prune must list shares of 0 to below 1": all(0 <= ratio < 1 for ratio in self.prune),
            "prune_first_block must be 0 or more": self.prune_first_block >= 0,
            "draft_scales and prune cannot be combined": not (self.draft_scales and self.prune),
            "tau must list numbers of 0 to 1": all(0 <= tau <= 1 for tau in self.tau),
            "budget must lie in 0 (off) to 1": 0 <= self.budget <= 1,
            "budget and tau cannot be combined": not (self.budget and self.tau),
        }
        check_fields("sampling", self, rules)

    def list_idle(self) -> Idle:
        """Settings without effect, see `nextscale.config.idle`."""
        idle: dict[str, tuple[str, ...]] = {}
        if not any(self.prune):
            idle["no token is pruned ({at}prune is empty or 0)"] = ("prune", "prune_first_block")
        if self.cfg_parts:
            idle["{at}cfg_parts has the strengths"] = ("cfg",)
        if not self.guided:
            idle["there is no guidance ({at}cfg is 0)"] = ("cfg_scales",)
        if all(k == 1 for k in _list_values(self.top_k)):
            idle["{at}top_k 1 always takes the likeliest token"] = ("top_p", "temperature", "smooth")
        return idle

    @property
    def guided(self) -> bool:
        """Whether a scale is guided: the model then also runs without the condition, which doubles its work."""
        return any(cfg > 0 for cfg in (self.cfg_parts.values() if self.cfg_parts else _list_values(self.cfg)))

    @property
    def sets_thresholds(self) -> bool:
        """Whether thresholds of dynamic experts replace the model's own."""
        return bool(self.tau or self.budget) or self.selection != "threshold"


def parse_sampling(config: SampleConfig | None, overrides: Mapping[str, Any], scales: int) -> SampleConfig:
    """The settings of a Python caller: `config` or the defaults, changed by `overrides`.

    A setting may be a scalar or an array of numpy or torch, and a function from the scale to a number. UserError names
    a setting that does not exist or is of another type.
    """
    if config is not None and not isinstance(config, SampleConfig):
        raise UserError(f"config must be a SampleConfig; got {type(config).__name__}: give settings as keywords")
    values = {}
    for name, value in overrides.items():
        given = [value(k) for k in range(scales)] if callable(value) else value
        values[name] = [to_plain(v) for v in given] if isinstance(given, list | tuple) else to_plain(given)
    return from_dict(SampleConfig, values, "sampling", config or SampleConfig())


def parse_count(name: str, value: Any, least: int = 0) -> int:
    """A whole number of any library, `least` or more; UserError for others."""
    try:
        number = operator.index(to_plain(value))
    except TypeError:
        number = None
    if number is None or isinstance(to_plain(value), bool) or number < least:
        raise UserError(f"{name} must be a whole number, {least} or more; got {value!r}")
    return number


def count_scales(settings: SampleConfig, scales: int) -> int:
    """How many scales are generated by a model that has `scales`. UserError where it has fewer than are asked for."""
    if settings.stop_at > scales:
        raise UserError(f"stop_at is {settings.stop_at}, but the model has {scales} scales: give 1 to {scales}")
    return settings.stop_at or scales


def list_per_scale(name: str, value: Number | tuple[Number, ...], scales: int) -> tuple[Number, ...]:
    """The setting `name` as one number per scale. UserError for a list of another length than `scales`."""
    if not isinstance(value, tuple):
        return (value,) * scales
    if len(value) != scales:
        raise UserError(f"{name} lists {len(value)} numbers, but the model has {scales} scales: give one, or {scales}")
    return value


def _list_values(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)
