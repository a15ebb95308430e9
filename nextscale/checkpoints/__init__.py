"""Checkpoints in memory: a config and named tensors in their stored dtypes. Every format is read into this form."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.common.precision import choose_sampling_dtype
from nextscale.config.model import ModelConfig
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.transformer.var import VAR

Shape = tuple[int, ...]


@dataclass
class Checkpoint:
    """Config and weights of a model. Tensor names are those of the modules' state dicts."""

    config: ModelConfig
    tokenizer: dict[str, Tensor]
    transformer: dict[str, Tensor]
    """Empty when `config.transformer` is None."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Where the weights come from, and what an export to that format needs; empty for models trained here."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of the original format that our modules do not have, stored for an export."""

    @property
    def is_int8(self) -> bool:
        """Whether the transformer has linear layers in 8 bits."""
        return any(tensor.dtype == torch.int8 for tensor in self.transformer.values())

    def choose_dtype(self, dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
        """The type to compute in: `dtype`, where it is not auto (`nextscale.common.precision`)."""
        dtype = torch.int8 if dtype == "auto" and self.is_int8 else dtype
        return choose_sampling_dtype(dtype, device, getattr(self.config.transformer, "width", 0))


def build_modules(config: ModelConfig) -> tuple[Tokenizer, VAR | None]:
    """Tokenizer and transformer with uninitialised parameters, on torch's current default device."""
    tokenizer = Tokenizer(config.tokenizer, config.pyramid)
    if config.transformer is None:
        return tokenizer, None
    codes = config.tokenizer
    return tokenizer, VAR(config.transformer, config.pyramid, codes.vocab_size, codes.code_width)


def build_on_meta(config: ModelConfig) -> tuple[Tokenizer, VAR | None]:
    """The modules on the meta device: for shapes and counts, or to be filled with `load_state_dict(assign=True)`."""
    with torch.device("meta"):
        return build_modules(config)


def list_shapes(module: torch.nn.Module) -> dict[str, Shape]:
    """Name and shape of every tensor in the module's state dict."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def check_floating(source: object, tensors: Mapping[str, Tensor], integers: Collection[str] = ()) -> None:
    """Raise UserError naming a tensor of `source` that is not floating-point; of `integers`, one that is not int8."""
    for name, tensor in tensors.items():
        if not (tensor.dtype == torch.int8 if name in integers else tensor.is_floating_point()):
            must = "int8" if name in integers else "floating-point"
            raise UserError(f"{source}: tensor '{name}' is {tensor.dtype}; weights must be {must}")


def check_tensors(source: object, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Raise UserError naming the tensors of `source` that are missing, extra or of the wrong shape."""
    missing = [f"'{n}' {s}" for n, s in expected.items() if n not in found]
    extra = [f"'{n}' {s}" for n, s in found.items() if n not in expected]
    wrong = [f"'{n}' has shape {found[n]} instead of {s}" for n, s in expected.items() if found.get(n, s) != s]
    faults = []
    for title, names in (("missing", missing), ("unknown", extra), ("misshapen", wrong)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            faults.append(f"{title} tensor {', '.join(names[:3])}{more}")
    if faults:
        raise UserError(f"{source} does not fit its model: {'; '.join(faults)}")
