"""Check that several processes train as one does: two on a CPU, one for each visible GPU.

Each is `python -m nextscale.doctor.processes FOLDER DEVICE`, as torchrun starts it.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from nextscale.common.distributed import World, init_distributed
from nextscale.config.training import TrainConfig
from nextscale.data.examples import MemoryExamples
from nextscale.doctor.models import CLASSES, FAMILIES, create_model
from nextscale.doctor.result import Result
from nextscale.training.engine.distributed import gather_weights
from nextscale.training.engine.loop import train
from nextscale.training.transformer import TransformerTask

_SECONDS = 120
_STEPS = 2
_LARGEST_DIFFERENCE = 1e-5
"""Of weights after the steps: sums over processes are rounded in another order."""


def check_processes(device: torch.device) -> Iterator[Result]:
    """Train two steps with several processes and with one, and compare the weights."""
    count = torch.cuda.device_count() if device.type == "cuda" else 2
    if count < 2:
        yield Result("processes", "skip", "one GPU is visible: nothing to compare")
        return
    if not torch.distributed.is_available():
        yield Result("processes", "skip", "this build of torch has no torch.distributed: train in one process")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            expected = train_two_steps(folder / "one", World(0, 1, device), batch_size=8 * count)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command += ["-m", "nextscale.doctor.processes", str(folder), device.type]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, env=environment)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines()[-1:]
            found = f"{count} processes could not train: {' '.join(lines[:1])[:300]}"
            yield Result("processes", "fail", found, "see the documentation of torchrun; training in one process works")
            return
        states = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]
    alike = all(torch.equal(states[0][name], state[name]) for state in states for name in state)
    difference = max(float((states[0][name] - tensor).abs().max()) for name, tensor in expected.items())
    good = alike and difference <= _LARGEST_DIFFERENCE
    found = (
        f"{count} processes trained {_STEPS} steps; their weights are {'equal' if alike else 'NOT equal'} and differ "
        f"from those of one process by at most {difference:.1g}"
    )
    advice = "" if good else "do not train on several devices here: report this with the whole output"
    yield Result("processes", "pass" if good else "fail", found, advice, {"difference": difference, "equal": alike})


def train_two_steps(folder: Path, world: World, batch_size: int) -> dict[str, torch.Tensor]:
    """Train the small dense model; its weights, on the CPU. `folder`: for its state."""
    model = create_model(FAMILIES["dense"], "plain", torch.device("cpu"), torch.float32)
    rng = torch.Generator().manual_seed(0)
    examples = MemoryExamples(
        tokens=torch.randint(0, model.config.tokenizer.vocab_size, (64, model.config.pyramid.length), generator=rng),
        label=torch.randint(0, CLASSES, (64,), generator=rng),
    )
    config = TrainConfig(steps=_STEPS, batch_size=batch_size, warmup_steps=1, log_every=100)
    task = TransformerTask(model.transformer, model.tokenizer.to(world.device), examples, config)
    train(task, config, folder, world=world)
    return gather_weights(task.trained)


def _main(folder: Path, device: str) -> None:
    with init_distributed(device) as world:
        weights = train_two_steps(folder / "several", world, batch_size=8 * world.size)
        torch.save(weights, folder / f"{world.rank}.pt")


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2])
