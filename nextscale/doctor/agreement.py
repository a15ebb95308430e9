"""Checks that results agree: fast modules with plain ones, a GPU with the CPU, 16 and 8 bits with float32, batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nextscale.common.precision import get_name
from nextscale.doctor.models import FAMILIES, create_model, predict_logits
from nextscale.doctor.result import Result
from nextscale.pipeline import Pipeline
from nextscale.pyramid import Pyramid
from nextscale.sampling.draw import PerImageRandom

_LABELS = [1, 4, 7, 2]
_LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.05, torch.int8: 0.1}
"""Of logits, root mean square over their standard deviation. Experts that a rounded score selects count as well."""
_LARGEST_SHARE = 0.01
"""Of tokens that may differ where logits differ by rounding alone."""
_DEFECT = "results are wrong here: report this with the whole output; --backend plain may avoid it"


def check_families(device: torch.device, dtypes: Sequence[torch.dtype]) -> Iterator[Result]:
    """For each family of models: this device with its fast modules beside plain modules on the CPU in float32.

    The tokens are given, so that one that differs does not change the scales after it.
    """
    for family, config in FAMILIES.items():
        plain = create_model(config, "plain", torch.device("cpu"), torch.float32)
        tokens_BL = plain.sample(_LABELS, cfg=1.5, top_k=0, top_p=0).tokens
        reference = predict_logits(plain, _LABELS, tokens_BL)
        yield check_logits(family, create_model(config, "auto", device, torch.float32), reference, tokens_BL)
        for dtype in dtypes:
            low = create_model(config, "auto", device, dtype)
            errors = measure_error(predict_logits(low, _LABELS, tokens_BL), reference)
            name = get_name(dtype)
            good = errors <= _LARGEST_ERROR[dtype]
            found = f"logits differ from float32 by {errors:.2g} of their standard deviation"
            yield Result(f"{family}, {name}", "pass" if good else "fail", found, "" if good else _DEFECT)


def check_logits(family: str, pipeline: Pipeline, reference: list[Tensor], tokens_BL: Tensor) -> Result:
    """Logits, likeliest tokens and tokens drawn with a seed beside the `reference` of plain modules on the CPU."""
    logits = predict_logits(pipeline, _LABELS, tokens_BL)
    error = measure_error(logits, reference)
    greedy = count_different([a.argmax(-1) for a in logits], [b.argmax(-1) for b in reference])
    drawn = count_different(*(draw_tokens(pipeline.config.pyramid, made) for made in (logits, reference)))
    total = tokens_BL.numel()
    good = error <= _LARGEST_ERROR[torch.float32] and max(greedy, drawn) <= _LARGEST_SHARE * total
    found = (
        f"beside plain modules on the CPU: logits differ by {error:.1g} of their standard deviation, "
        f"{greedy} of {total} likeliest and {drawn} of {total} drawn tokens"
    )
    values = {"error": error, "greedy": greedy, "drawn": drawn, "tokens": total}
    return Result(family, "pass" if good else "fail", found, "" if good else _DEFECT, values)


def draw_tokens(pyramid: Pyramid, logits: list[Tensor]) -> list[Tensor]:
    """Tokens (B, N) of each scale that a seed draws from logits (B, N, V)."""
    random = PerImageRandom(0, pyramid, len(logits[0]), logits[0].device)
    return [random.draw_tokens(logits_BNV, k) for k, logits_BNV in enumerate(logits)]


def check_batches(device: torch.device) -> Iterator[Result]:
    """Whether an image is the same alone and in a batch: to the last bit on a CPU, up to rounding on a GPU."""
    for family, config in FAMILIES.items():
        pipeline = create_model(config, "auto", device, torch.float32)
        together = pipeline.sample(_LABELS, seed=3)
        alone = [pipeline.sample([label], seed=3, first_image=i) for i, label in enumerate(_LABELS)]
        different = count_different(list(together.tokens), [image.tokens[0] for image in alone])
        same = all(torch.equal(together.tensor[i], image.tensor[0]) for i, image in enumerate(alone))
        exact, total = device.type == "cpu", together.tokens.numel()
        good = same if exact else different <= 0.2 * total
        found = "the same images alone and in a batch" if same else f"{different} of {total} tokens differ in a batch"
        yield Result(f"batch, {family}", "pass" if good else "fail", found, "" if good else _DEFECT)


def check_capture(device: torch.device) -> Iterator[Result]:
    """Captured steps (CUDA graphs on a GPU) beside steps that are not captured."""
    pipeline = create_model(FAMILIES["dense"], "auto", device, torch.float32)
    eager = pipeline.sample(_LABELS, seed=5)
    captured = pipeline.capture().sample(_LABELS, seed=5)
    different = int((eager.tokens != captured.tokens).sum())
    how = "CUDA graphs" if device.type == "cuda" else "fixed memory, without graphs on this device"
    found = f"{different} of {eager.tokens.numel()} tokens differ between captured ({how}) and eager steps"
    yield Result("capture", "fail" if different else "pass", found, _DEFECT if different else "")


def measure_error(logits: list[Tensor], reference: list[Tensor]) -> float:
    """Root mean square of the difference of all scales' logits, over the standard deviation of the reference."""
    values, expected = (torch.cat([scale.flatten().cpu().double() for scale in part]) for part in (logits, reference))
    return float((values - expected).square().mean().sqrt() / expected.std())


def count_different(tokens: list[Tensor], reference: list[Tensor]) -> int:
    """How many tokens differ."""
    return sum(int((a.cpu() != b).sum()) for a, b in zip(tokens, reference, strict=True))
