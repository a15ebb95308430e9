"""Runs one implementation in a separate process, with commands on standard input, for benchmarks/run.py.

    python -m benchmarks.worker {official | nextscale | plain} FOLDER DTYPE DEVICE [CLONE]

FOLDER holds the same weights twice: `native` (ours) and vae.pth, var.pth (the official names). Each line of input is a
JSON command; each line of output its JSON answer.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any, Literal

SAMPLING = {"cfg": 1.5, "top_k": 900, "top_p": 0.96}


class Official:
    """FoundationVision/VAR as its demo runs it: float32 on a CPU, under autocast elsewhere."""

    def __init__(self, folder: Path, dtype: str, device: str, clone: str):
        import torch

        from benchmarks.official import build_official

        shape = json.loads((folder / "shape.json").read_text())
        self.vae, self.var = build_official(Path(clone), shape)
        self.vae.load_state_dict(torch.load(folder / "vae.pth", map_location="cpu", weights_only=True))
        self.var.load_state_dict(torch.load(folder / "var.pth", map_location="cpu", weights_only=True))
        self.vae.eval().to(device), self.var.eval().to(device)
        self.var.rng = torch.Generator(device)
        self.device = device
        self.autocast = torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32")

    def sample(self, batch: int, seed: int) -> Any:
        import torch

        with torch.inference_mode(), self.autocast:
            labels = torch.arange(batch, device=self.device)
            return self.var.autoregressive_infer_cfg(batch, labels, g_seed=seed, **SAMPLING)

    def logits(self, labels: Any, inputs: Any) -> Any:
        import torch

        self.var.cond_drop_rate = 0.0
        with torch.inference_mode(), self.autocast:
            return self.var(labels, inputs).float()

    def tokens(self, batch: int, seed: int) -> Any:
        """The tokens of `sample`, recorded at the codebook lookup."""
        import torch

        drawn: list[torch.Tensor] = []
        hook = self.vae.quantize.embedding.register_forward_pre_hook(lambda _, given: drawn.append(given[0].clone()))
        self.sample(batch, seed)
        hook.remove()
        return torch.cat(drawn, dim=1)


class Nextscale:
    """nextscale, from the native checkpoint."""

    def __init__(self, folder: Path, dtype: str, device: str, backend: Literal["auto", "plain"] = "auto"):
        from nextscale.pipeline import Pipeline

        self.pipeline = Pipeline.from_pretrained(folder / "native", dtype=dtype, device=device, backend=backend)
        if device != "cpu":
            self.pipeline.capture()

    def sample(self, batch: int, seed: int) -> Any:
        return self.pipeline.sample(list(range(batch)), seed=seed, batch_size=batch, **SAMPLING)

    def logits(self, labels: Any, inputs: Any) -> Any:
        import torch

        with torch.inference_mode():
            return self.pipeline.transformer(labels, inputs).logits_BNV

    def tokens(self, batch: int, seed: int) -> Any:
        labels = list(range(batch))
        return self.pipeline.sample(labels, seed=seed, batch_size=batch, official_seeding=True, **SAMPLING).tokens


def run_command(worker: Official | Nextscale, command: dict[str, Any], device: str) -> dict[str, Any]:
    import torch

    if command["do"] == "sample":
        began = read_clock(device)
        worker.sample(command["batch"], command["seed"])
        return {"seconds": read_clock(device) - began}
    if command["do"] == "memory":
        worker.sample(command["batch"], 0)
        if device != "cpu":
            return {"bytes": torch.cuda.max_memory_allocated()}
        from nextscale.evaluation.peak_memory import read_peak_resident

        return {"bytes": read_peak_resident()}
    given = torch.load(command["given"], weights_only=True)
    logits = worker.logits(given["labels"].to(device), given["inputs"].to(device))
    torch.save({"logits": logits.cpu(), "tokens": worker.tokens(2, 0).cpu()}, command["to"])
    return {}


def read_clock(device: str) -> float:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    kind, folder, dtype, device, *clone = sys.argv[1:]
    worker: Official | Nextscale
    with contextlib.redirect_stdout(sys.stderr):  # only answers may go to the pipe
        if kind == "official":
            worker = Official(Path(folder), dtype, device, *clone)
        else:
            worker = Nextscale(Path(folder), dtype, device, "plain" if kind == "plain" else "auto")
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            out = run_command(worker, json.loads(line), device)
        print(json.dumps(out), flush=True)


if __name__ == "__main__":
    main()
