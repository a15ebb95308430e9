"""What linear layers in 8 bits cost in likelihood: all of them, one kind alone, one block alone, and other roundings.

    python -m benchmarks.int8 models/var-cifar10 --data cifar10-test.parquet [--images 1000]

A line gives how many more nats per token the images' tokens take than in float32, and twice the standard error of that
difference over the images, which are the same for all cases.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nextscale.backends.cpu import int8 as cpu_int8
from nextscale.evaluation.images import StoredImages
from nextscale.pipeline import Pipeline
from nextscale.sampling.likelihood import compute_log_likelihood
from nextscale.transformer import int8
from nextscale.transformer.int8 import LAYERS, QuantisedRows, quantise_layers
from nextscale.transformer.var import VAR

KINDS = {
    "qkv": ("qkv",),
    "attention's output": ("proj",),
    "fc1": ("fc1",),
    "fc2": ("fc2",),
    "adaLN": ("linear", "shared_adaln", "head_adaln"),
    "head": ("head",),
}
"""Kind of layers -> their names in `LAYERS`."""
_BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="images with labels that the model was not trained on")
    parser.add_argument("--images", type=int, default=1000)
    options = parser.parse_args()
    images = StoredImages(options.data, count=options.images)
    labels = images.labels()
    assert labels is not None, "the images have classes"
    full = Pipeline.from_pretrained(options.model, dtype="float32", device="cpu")
    starts = range(0, len(images), _BATCH)
    tokens_NL = torch.cat([full.encode(images.fetch(i, min(i + _BATCH, len(images)))) for i in starts])
    expected = score(full, tokens_NL, labels)
    print(f"{'float32':<32}{expected.mean().item():.4f}", flush=True)
    for name, pipeline in list_cases(options.model):
        more = score(pipeline, tokens_NL, labels) - expected
        print(f"{name:<32}{more.mean().item():+.5f} +- {2 * more.std().item() / len(more) ** 0.5:.5f}", flush=True)


def score(pipeline: Pipeline, tokens_NL: Tensor, labels_N: Tensor) -> Tensor:
    """Nats per token of each image, (N,)."""
    nats = [
        -compute_log_likelihood(pipeline.tokenizer, pipeline.transformer, tokens, labels).sum(dim=1)
        for tokens, labels in zip(tokens_NL.split(_BATCH), labels_N.split(_BATCH), strict=True)
    ]
    return torch.cat(nats) / tokens_NL.shape[1]


def list_cases(model: str) -> Iterator[tuple[str, Pipeline]]:
    """Name and pipeline of each case."""

    def load(quantise: Callable[[VAR], object], backend: str = "auto") -> Pipeline:
        pipeline = Pipeline.from_pretrained(model, dtype="float32", device="cpu", backend="plain")
        quantise(pipeline.transformer)
        return pipeline.optimize(backend)  # type: ignore[arg-type]

    yield "bfloat16", Pipeline.from_pretrained(model, dtype="bfloat16", device="cpu")
    yield "int8", Pipeline.from_pretrained(model, dtype="int8", device="cpu")
    for name, names in KINDS.items():
        layers = {module: tuple(n for n in LAYERS[module] if n in names) for module in LAYERS}
        yield f"{name} alone", load(lambda var, layers=layers: quantise_layers(var, layers))
    blocks = len(Pipeline.from_pretrained(model, dtype="float32", device="cpu").transformer.blocks)
    for block in sorted({0, blocks // 2, blocks - 1}):
        yield f"block {block + 1} of {blocks} alone", load(lambda var, i=block: quantise_layers(var.blocks[i]))
    find_levels, quantise_rows = cpu_int8.find_levels, int8.quantise_rows
    cpu_int8.find_levels = lambda: int8.LEVELS // 2  # type: ignore[assignment]
    yield "127 steps in place of 255", load(quantise_layers)
    cpu_int8.find_levels = find_levels
    int8.quantise_rows = quantise_symmetrically
    yield "inputs symmetric about 0", load(quantise_layers, "plain")
    int8.quantise_rows = quantise_rows


def quantise_symmetrically(x_RI: Tensor, levels: int = 254) -> QuantisedRows:
    """Rows in integers from 0 to 254, of which 127 stands for 0."""
    scale_R = x_RI.abs().amax(dim=-1) / 127
    u_RI = (x_RI / scale_R.clamp_min(1e-30)[:, None]).round() + 127
    return QuantisedRows(u_RI.to(torch.uint8), scale_R, -127 * scale_R)


if __name__ == "__main__":
    with torch.no_grad():
        main()
