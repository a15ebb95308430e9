"""nextscale: next-scale image generation.

    import nextscale
    pipeline = nextscale.Pipeline.from_pretrained("my-model")
    pipeline.sample([3, 7], seed=0).save("grid.png")

Shape suffixes used throughout: B batch, L tokens of all scales, N tokens of one scale, K scales, C code width (or the
channels at hand), D model width, H heads (or image height, beside W), S layers of a block, V codes, R flattened rows,
h w sides of a token map or feature map, d head width.

Nothing heavy is imported before it is used, so that the command line answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Pipeline": "nextscale.pipeline",
    "SampleConfig": "nextscale.config.sampling",
    "ModelConfig": "nextscale.config.model",
    "TokenizerConfig": "nextscale.config.tokenizer",
    "TransformerConfig": "nextscale.config.transformer",
    "Pyramid": "nextscale.pyramid",
    "UserError": "nextscale.common.errors",
    "preset": "nextscale.config.presets",
}
__all__ = [
    "ModelConfig",
    "Pipeline",
    "Pyramid",
    "SampleConfig",
    "TokenizerConfig",
    "TransformerConfig",
    "UserError",
    "preset",
]

if TYPE_CHECKING:
    from nextscale.common.errors import UserError
    from nextscale.config.model import ModelConfig
    from nextscale.config.presets import preset
    from nextscale.config.sampling import SampleConfig
    from nextscale.config.tokenizer import TokenizerConfig
    from nextscale.config.transformer import TransformerConfig
    from nextscale.pipeline import Pipeline
    from nextscale.pyramid import Pyramid


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"nextscale has no {name}")
    return getattr(import_module(_PUBLIC[name]), name)
