"""Runs code on tensors of device cuda that hold no values, and notes what would make the host wait.

A wait is whatever needs a value of the device (a number, indices of what is true), or a copy between host and device
other than one from pinned memory that is asked not to block. Code that asks for a value gets a plausible one and goes
on. An operation over two devices raises, as on a GPU.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

_PACKAGE = str(Path(__file__).parents[2] / "nextscale")
_aten = torch.ops.aten
_BIASED = {_aten.addmm.default, _aten.baddbmm.default}
_PRODUCTS = _BIASED | {
    _aten.mm.default, _aten.bmm.default, _aten.convolution.default, _aten._grouped_mm.default,
    _aten._scaled_dot_product_flash_attention.default, _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default, _aten._scaled_dot_product_attention_math.default,
}  # fmt: skip
_WAITING = {
    _aten._local_scalar_dense.default, _aten.equal.default, _aten.bincount.default, _aten.nonzero.default,
    _aten._to_copy.default, _aten.copy_.default, _aten.exponential_.default, _aten._pin_memory.default,
}  # fmt: skip
"""What may make the host wait, or is done here because torch cannot without values."""
_SUMS = {_aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
"""The backward pass of an index by tensors, which a GPU sorts and then sums with one thread for each different row."""


class Watch(TorchDispatchMode):
    """Notes waits and the types of products, each by the place in the package that asked for it: "file:function"; and
    the shapes of gradients that a GPU sums slowly."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.products: defaultdict[str, set[str]] = defaultdict(set)
        self.slow_sums: list[list[int]] = []
        self.pinned: set[int] = set()
        self.kept: list[Tensor] = []  # so that no other tensor gets the id of a pinned one

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and each operation would pay for it

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            factor = args[1 if func in _BIASED else 0]
            if factor.is_cuda:
                self.products[find_caller()].add(str(factor.dtype).removeprefix("torch."))
            return func(*args, **kwargs)
        if func in _SUMS and args[0].is_cuda and len(args) > 3 and args[3]:
            self.slow_sums.append(list(args[2].shape))
        if func not in _WAITING:
            return func(*args, **kwargs)
        on_device = args[0].is_cuda
        if func is _aten._pin_memory.default:
            copy = args[0].clone()
            self.pinned.add(id(copy))
            self.kept.append(copy)
            return copy
        if func is _aten._local_scalar_dense.default:
            return self._read(func, args[0])
        if func is _aten.equal.default:
            self._note(on_device)
            return True
        if func is _aten.bincount.default:
            self._note(on_device)
            return args[0].new_zeros(kwargs.get("minlength") or args[2])
        if func is _aten.nonzero.default:
            self._note(on_device)
            return args[0].new_zeros((1, args[0].ndim), dtype=torch.int64)
        if func is _aten._to_copy.default:
            args[0].constant = None  # torch would copy the value of a host's constant to the device
        if func is _aten.exponential_.default:
            return args[0]  # torch's own way takes no generator
        out = func(*args, **kwargs)
        if func is _aten._to_copy.default and args[0].device.type != out.device.type:
            self._note(on_device or out.is_cuda, args[0], kwargs.get("non_blocking", False))
        if func is _aten.copy_.default and args[0].device.type != args[1].device.type:
            self._note(on_device or args[1].is_cuda, args[1], bool(args[2:3] and args[2]))
        return out

    def _read(self, func: Any, scalar: Tensor) -> Any:
        if scalar.is_cuda:
            self._note(True)
        else:
            try:
                return func(scalar)  # a constant of the host
            except Exception:  # torch raises a type of its own for values that are not there
                pass
        return True if scalar.dtype == torch.bool else 0.5 if scalar.is_floating_point() else 1

    def _note(self, waits: bool, source: Tensor | None = None, non_blocking: bool = False) -> None:
        if source is not None and non_blocking and id(source) in self.pinned:
            return
        if waits:
            self.waits[find_caller()] += 1


def find_caller() -> str:
    """The innermost function of the package on the stack, "file:function"; "torch" where there is none, as in backward.

    Comprehensions and lambdas belong to the function around them.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(_PACKAGE):
            name = code.co_qualname.partition(".<locals>")[0]
            return f"{Path(code.co_filename).relative_to(_PACKAGE).as_posix()}:{name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "torch"


@contextmanager
def rehearse() -> Iterator[Watch]:
    """A context in which tensors hold no values and device cuda is there."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        # only now: FakeTensorMode itself asks whether there is a device. A Mock would note each of many thousand calls
        answers = {"is_available": True, "is_bf16_supported": True, "mem_get_info": (2**36, 2**36), "empty_cache": None,
                   "_exchange_device": 0, "_maybe_exchange_device": 0}  # fmt: skip
        for name, answer in answers.items():
            stack.enter_context(mock.patch(f"torch.cuda.{name}", lambda *given, answer=answer, **options: answer))
        # moving a module exchanges such tensors in place, which torch refuses while its own caches refer to them
        stack.enter_context(mock.patch("torch.utils.weakref", SimpleNamespace(getweakrefs=lambda tensor: [])))
        # what holds no values cannot be written
        stack.enter_context(mock.patch("torch.save", lambda content, path: Path(path).write_bytes(b"")))
        yield stack.enter_context(Watch())
