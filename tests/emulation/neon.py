"""A pytest plugin, `-p tests.emulation.neon`: the CPU kernels run in NEON's vectors, on an emulated ARM processor.

They are built by the cross compiler of Debian's gcc-aarch64-linux-gnu and run by `qemu-aarch64-static` (of
qemu-user-static). Each call is a process: its buffers go to the emulated program and come back. Everything above the
kernels, such as weights in panels, is the project's own code with vectors of four values.
"""

from __future__ import annotations

import os
import struct
import subprocess
import tempfile
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from nextscale.backends.cpu.kernels import build, compilation

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"
_FOLDER = Path(__file__).parent
_PROGRAMS = tempfile.TemporaryDirectory()
_get_address = torch.Tensor.data_ptr


class Address(int):
    """The address of a tensor's first value, which knows the tensor."""

    tensor: torch.Tensor


def remember_tensor(tensor: torch.Tensor) -> Address:
    """In place of Tensor.data_ptr."""
    address = Address(_get_address(tensor))
    address.tensor = tensor
    return address


class EmulatedKernels:
    """The functions of a kernel's source file."""

    def __init__(self, name: str, size: int):
        functions, program = build.ARGUMENTS[name], Path(_PROGRAMS.name) / f"{name}-{size}"
        flags = [*compilation.FLAGS, *compilation.define_shape(name, size, 4), "-static", "-fopenmp"]
        if "NEXTSCALE_SOAK" not in os.environ:
            flags.append("-O1")  # builds in half the time
        source = Path(build.__file__).with_name(f"{name}.c")
        cases = [write_case(number, *function) for number, function in enumerate(functions.items())]
        flags += [f'-DSOURCE="{source}"', f"-DCALLS={' '.join(cases)}"]
        subprocess.run([COMPILER, *flags, str(_FOLDER / "run_kernel.c"), "-lm", "-o", str(program)], check=True)
        for number, (function, types) in enumerate(functions.items()):
            setattr(self, function, partial(call, program, number, types))


def write_case(number: int, function: str, types: list[Any]) -> str:
    """The call in the program's switch."""
    letters = {build._POINTER: "P", build._NUMBER: "L", build._FLAG: "I", build._REAL: "F"}
    return f"case {number}: {function}({', '.join(f'{letters[kind]}({i})' for i, kind in enumerate(types))}); break;"


def read_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of a tensor's storage from its first value on, as a view."""
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return whole[tensor.storage_offset() * tensor.element_size() :]


def call(program: Path, number: int, types: list[Any], *arguments: Any) -> None:
    """Run a function on the arguments, and put what it leaves in the buffers into the tensors."""
    message, buffers = [struct.pack("qq", number, len(arguments))], []
    for kind, value in zip(types, arguments, strict=True):
        if value is None:
            message.append(struct.pack("qq", ord("v"), 0))
        elif kind is build._POINTER:
            buffers.append(read_bytes(value.tensor))
            message += [struct.pack("qq", ord("p"), len(buffers[-1])), buffers[-1].numpy().tobytes()]
        elif kind is build._REAL:
            message.append(struct.pack("qd", ord("f"), value))
        else:
            message.append(struct.pack("qq", ord("v"), value))
    env = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run([EMULATOR, str(program)], input=b"".join(message), capture_output=True, env=env, check=True)
    assert len(done.stdout) == sum(map(len, buffers)), "all buffers come back"
    start = 0
    for buffer in buffers:
        new = (
            torch.frombuffer(bytearray(done.stdout[start : start + len(buffer)]), dtype=torch.uint8)
            if len(buffer)
            else buffer
        )
        if not torch.equal(new, buffer):  # a buffer that was only read may be a part of one that was written
            buffer.copy_(new)
        start += len(buffer)


build.LANES, build.MAX_VECTORS = 4, 4
build.load_kernels = lru_cache(EmulatedKernels)  # type: ignore[assignment]
torch.Tensor.data_ptr = remember_tensor  # type: ignore[method-assign,assignment]
