"""The names of floating-point types, the same in options, config files and Python. Needs no torch."""

from __future__ import annotations

from typing import Literal, cast, get_args

from nextscale.common.errors import UserError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""A type to compute in; auto: the fastest that is right for the device and the model."""
SamplingDtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]
"""The same for sampling. int8: linear layers in 8 bits on a CPU (`nextscale.transformer.int8`); auto never takes it,
because it changes images."""
DTYPES: tuple[str, ...] = get_args(Dtype)
SHORT_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Short names that are understood wherever a name is read."""


def parse_dtype(name: object, what: str = "dtype") -> Dtype:
    """The name of a type from its own or its short name. UserError, which starts with `what`, for another."""
    found = SHORT_NAMES.get(name, name) if isinstance(name, str) else name
    if found not in DTYPES:
        raise UserError(f"{what} must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}; got {str(name)[:80]!r}")
    return cast(Dtype, found)
