"""Named models. Parameter counts equal the published ones (tests/test_presets.py)."""

from __future__ import annotations

from nextscale.config import AlignmentConfig, ExpertsConfig, ModelConfig, TransformerConfig
from nextscale.config_dict import nearest
from nextscale.errors import UserError
from nextscale.pyramid import PYRAMID_256, PYRAMID_512


def _mepa(depth: int) -> TransformerConfig:
    """MEPA's transformer with the alignment head of a ViT-B, as its parameters are counted in Table 2."""
    return TransformerConfig(depth=depth, experts=ExpertsConfig(router="stmoe"), alignment=AlignmentConfig(width=768))


PRESETS: dict[str, ModelConfig] = {
    **{f"var-d{d}": ModelConfig(PYRAMID_256, transformer=TransformerConfig(depth=d)) for d in (12, 16, 20, 24, 30)},
    "var-d36": ModelConfig(PYRAMID_512, transformer=TransformerConfig(depth=36, shared_adaln=True)),
    **{f"mepa-d{d}": ModelConfig(PYRAMID_256, transformer=_mepa(d)) for d in (12, 16)},
    "mepa-d20": ModelConfig(PYRAMID_512, transformer=_mepa(20)),
}


def preset(name: str) -> ModelConfig:
    """The named config. Raises UserError with the nearest name when there is none."""
    if name not in PRESETS:
        raise UserError(f"there is no model named '{name}'{nearest(name, list(PRESETS))}")
    return PRESETS[name]
