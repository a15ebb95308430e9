"""Named models. Parameter counts equal the published ones (tests/test_presets.py)."""

from __future__ import annotations

from typing import Any

from nextscale.common.errors import UserError
from nextscale.config.model import ModelConfig
from nextscale.config.parse import suggest_name
from nextscale.config.transformer import MVAR_MIXERS, AlignmentConfig, ExpertsConfig, TransformerConfig
from nextscale.pyramid import PYRAMID_256, PYRAMID_512

_MEPA: dict[str, Any] = {"experts": ExpertsConfig(router="stmoe"), "alignment": AlignmentConfig(width=768)}
"""MEPA's experts, and its alignment head for a ViT-B, as its parameters are counted in Table 2."""


def _mvar(depth: int, **others: Any) -> TransformerConfig:
    """M-VAR's transformer. Published d16 and d20 have no q/k normalisation, larger ones have; d12 is unknown."""
    return TransformerConfig(depth=depth, qk_norm=depth >= 24, mixers=MVAR_MIXERS, **others)


PRESETS: dict[str, ModelConfig] = {
    **{f"var-d{d}": ModelConfig(PYRAMID_256, transformer=TransformerConfig(depth=d)) for d in (12, 16, 20, 24, 30)},
    "var-d36": ModelConfig(PYRAMID_512, transformer=TransformerConfig(depth=36, shared_adaln=True)),
    **{f"mepa-d{d}": ModelConfig(PYRAMID_256, transformer=TransformerConfig(depth=d, **_MEPA)) for d in (12, 16)},
    "mepa-d20": ModelConfig(PYRAMID_512, transformer=TransformerConfig(depth=20, **_MEPA)),
    **{f"mvar-d{d}": ModelConfig(PYRAMID_256, transformer=_mvar(d)) for d in (12, 16, 20, 24, 30, 32)},
    **{f"mvar-d{d}-512": ModelConfig(PYRAMID_512, transformer=_mvar(d)) for d in (12, 16, 20, 24, 30, 32)},
    "mvar-mepa-d16": ModelConfig(PYRAMID_256, transformer=_mvar(16, **_MEPA)),
}


def preset(name: str) -> ModelConfig:
    """The named config. Raises UserError with the nearest name when there is none."""
    if name not in PRESETS:
        raise UserError(f"there is no model named '{name}'{suggest_name(name, list(PRESETS))}")
    return PRESETS[name]
