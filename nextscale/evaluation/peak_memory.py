"""Peak memory of sampling. On a CPU it is measured in a new process:

python -m nextscale.evaluation.peak_memory MODEL DTYPE BATCH SETTINGS [MODULE ...]   prints its peak resident bytes

The modules register the user's own parts of the model.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import torch

from nextscale.common.errors import UserError
from nextscale.common.reading import parse_json
from nextscale.common.registry import list_own_modules
from nextscale.config.parse import from_dict, to_dict
from nextscale.config.sampling import SampleConfig
from nextscale.pipeline import Pipeline


def measure_peak_memory(model: str, dtype: str, batch: int, settings: SampleConfig, pipeline: Pipeline) -> int:
    """Peak bytes of the GPU that the pipeline is on, else of a process that loads the model and samples once.

    0 where the operating system does not report it.
    """
    if pipeline.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(pipeline.device)
        pipeline.sample([None] * batch, settings, batch_size=batch)
        return torch.cuda.max_memory_allocated(pipeline.device)
    arguments = [model, dtype, str(batch), json.dumps(to_dict(settings)), *list_own_modules()]
    command = [sys.executable, "-m", "nextscale.evaluation.peak_memory", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
        raise UserError(f"measuring the memory of {model} failed, perhaps because memory ran out: {reason}")
    return int(run.stdout)


def main() -> None:
    """Load the model, sample once, print the peak memory."""
    model, dtype, batch, settings, *modules = sys.argv[1:]
    for module in modules:
        importlib.import_module(module)
    pipeline = Pipeline.from_pretrained(model, dtype=dtype, device="cpu")
    pipeline.sample(
        [None] * int(batch), from_dict(SampleConfig, parse_json(settings, "settings")), batch_size=int(batch)
    )
    print(read_peak_resident())


def read_peak_resident() -> int:
    """Peak resident bytes of this process so far; 0 where the operating system does not report it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


if __name__ == "__main__":
    main()
