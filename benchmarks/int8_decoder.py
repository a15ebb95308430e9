"""What the decoder's convolutions in 8 bits save and cost, forced also where `--dtype int8` leaves them in floats.

    python -m benchmarks.int8_decoder time var-d16 [--batches 1 8] [--rounds 5] [--threads 1]
    python -m benchmarks.int8_decoder quality models/var-cifar10 --features models/classifier-cifar10 \
        --data cifar10-test.parquet [--images 1000] [--seeds 1 2 3 4 5]

time: processor time of decoding random canvases in each type, medians, and its ratio to that in floats with the range
of the rounds. The model is a folder, or a preset with random weights.

quality: tokens are sampled (guidance 2, top-p 0.95) and decoded in each type: the Frechet distance to the data, and the
PSNR to the images of float32, pixels lying between 0 and 1.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from nextscale.backends import keep_freed_memory, optimize
from nextscale.common.pictures import to_uint8
from nextscale.config.presets import preset
from nextscale.encoders.load import load_feature_network
from nextscale.evaluation.images import StoredImages
from nextscale.evaluation.metrics.frechet import Moments, frechet_distance
from nextscale.pipeline import Pipeline
from nextscale.tokenizer.int8 import quantise_decoder
from nextscale.tokenizer.tokenizer import Tokenizer

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "quality"])
    parser.add_argument("model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--features", default="")
    parser.add_argument("--data", default="")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    with torch.no_grad():
        (measure_time if options.what == "time" else measure_quality)(options)


def create_tokenizers(plain: Tokenizer) -> dict[str, Tokenizer]:
    """The tokenizer with its decoder in each type; those in 8 bits are named after the type of all else."""
    made = {}
    for name, dtype in TYPES.items():
        for prefix in ("", "int8 and "):
            tokenizer = copy.deepcopy(plain).set_compute_dtype(dtype).eval()
            if prefix:
                quantise_decoder(tokenizer.decoder)
            optimize(torch.nn.ModuleList([tokenizer]))
            made[prefix + name] = tokenizer
    return made


def measure_time(options: argparse.Namespace) -> None:
    if Path(options.model).exists():
        plain = Pipeline.from_pretrained(options.model, dtype="float32", device="cpu", backend="plain").tokenizer
    else:
        config = preset(options.model)
        plain = Tokenizer(config.tokenizer, config.pyramid)
    tokenizers = create_tokenizers(plain)
    for batch in options.batches:
        canvas = torch.randn(batch, *plain.new_canvas(1).shape[1:], generator=torch.Generator().manual_seed(0))
        seconds: dict[str, list[float]] = {name: [] for name in tokenizers}
        for turn in range(options.rounds + 1):
            for name, tokenizer in list(tokenizers.items())[:: 1 if turn % 2 else -1]:
                began = time.process_time()
                tokenizer.decode_canvas(canvas)
                seconds[name].append(time.process_time() - began)
        for name, all_of_it in seconds.items():
            base = seconds[name.removeprefix("int8 and ")]
            ratios = [a / b for a, b in zip(all_of_it[1:], base[1:], strict=True)]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of its time in floats"
            took = statistics.median(all_of_it[1:]) / batch * 1e3
            print(f"batch {batch}, {name:<20}{took:9.1f} ms an image{'; ' + spread if name[:4] == 'int8' else ''}")


def measure_quality(options: argparse.Namespace) -> None:
    pipeline = Pipeline.from_pretrained(options.model, dtype="int8", device="cpu")
    plain = Pipeline.from_pretrained(options.model, dtype="float32", device="cpu", backend="plain").tokenizer
    tokenizers, network = create_tokenizers(plain), load_feature_network(options.features)
    data = StoredImages(options.data)
    starts = range(0, len(data), _BATCH)
    target = Moments.compute(
        torch.cat([network(data.fetch(i, min(i + _BATCH, len(data)))).pool_BD for i in starts]), options.data
    )
    changes: dict[str, list[float]] = {name: [] for name in tokenizers}
    for seed in options.seeds:
        labels = [i % 10 for i in range(options.images)]
        sampled = pipeline.sample(labels, seed=seed, cfg=2.0, top_k=0, top_p=0.95, batch_size=_BATCH).tokens
        images = {name: decode(tokenizer, sampled) for name, tokenizer in tokenizers.items()}
        distances = {}
        for name, image_N3HW in images.items():
            pools = [network(to_uint8(part)).pool_BD for part in image_N3HW.split(_BATCH)]
            distances[name] = frechet_distance(Moments.compute(torch.cat(pools), name), target)
            changes[name].append(distances[name] / distances["float32"] - 1)
            error_N = (image_N3HW - images["float32"]).square().mean(dim=(1, 2, 3))
            psnr = -10 * math.log10(error_N.mean().item() or 1e-30)
            print(f"seed {seed}, {name:<20}{distances[name]:8.3f} {changes[name][-1]:+.2%}, {psnr:.1f} dB", flush=True)
    for name, values in changes.items():
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
        print(f"{name:<20}{statistics.mean(values):+.3%}, standard error {error:.3%}")


def decode(tokenizer: Tokenizer, tokens_NL: Tensor) -> Tensor:
    """Images in [0, 1]."""
    return torch.cat([(tokenizer.decode(part) + 1) / 2 for part in tokens_NL.split(_BATCH)])


if __name__ == "__main__":
    main()
