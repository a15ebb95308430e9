"""Sampling on a GPU beside the CPU: tokens, types, captured steps, waits, memory, time."""

import time
import warnings
from contextlib import contextmanager

import pytest
import torch

from nextscale.backends.cuda.experts import TiledExperts
from nextscale.backends.cuda.graphs import FixedSteps
from nextscale.common.devices import synchronize
from nextscale.config.classifier import ClassifierConfig
from nextscale.doctor.agreement import check_batches, check_capture, check_families, count_different
from nextscale.doctor.models import FAMILIES, create_model, randomise
from nextscale.encoders.classifier import Classifier
from nextscale.sampling.capturing import skips_experts
from nextscale.transformer.feed_forward.experts import Dispatch, Experts
from tests.rehearsal.watch import find_caller
from tests.test_rehearsal import WAITS
from tests.test_tiles import CASES, assert_near, dispatch, draw

LABELS = [1, 4, 7, 2]


def build(family, device, scales="1,2,3,4", backend="auto"):
    return create_model(FAMILIES[family], backend, device, torch.float32, scales)


def assert_passes(results):
    results = list(results)
    assert results
    assert not [result.format() for result in results if result.status == "fail"]


def test_every_family_agrees_with_plain_modules_on_the_cpu(device):
    """Likeliest and drawn tokens, and the error of float32, bfloat16 and float16."""
    low = [torch.bfloat16] if device.type == "cpu" else [torch.bfloat16, torch.float16]
    assert_passes(check_families(device, low))


@pytest.mark.parametrize("settings", [{"top_k": 1, "cfg": 0.0}, {"top_k": 0, "cfg": 1.5, "seed": 3}])
@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_those_of_the_cpu(family, settings, device):
    """Greedy and seeded: nearly all tokens, since one that rounding changes changes those of later scales."""
    found, expected = (build(family, place).sample(LABELS, **settings) for place in (device, torch.device("cpu")))
    assert count_different([found.tokens], [expected.tokens]) <= 0.05 * expected.tokens.numel()
    if torch.equal(found.tokens.cpu(), expected.tokens):
        assert (found.tensor - expected.tensor).abs().max() < 1e-3


def test_an_image_alone_and_in_a_batch(device):
    assert_passes(check_batches(device))


def test_captured_steps_are_plain_ones(device):
    assert_passes(check_capture(device))


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_steps_beside_each_other_and_after_changes(family, device):
    """Two interleaved samplers of one pipeline; then after `load_state_dict` and `.to()` and back."""
    if family == "dynamic experts" and not skips_experts(device):
        pytest.skip("dynamic experts are captured on a GPU with Triton only")
    backend = "plain" if device.type == "cpu" else "auto"  # a CPU's fast modules pack weights for good
    plain, captured = (build(family, device, backend=backend) for _ in range(2))
    plain.capture("off")
    captured.capture()

    def compare():
        pairs = zip(
            captured.sample_scales(LABELS, seed=1), captured.sample_scales(LABELS[::-1], seed=2),
            plain.sample_scales(LABELS, seed=1), plain.sample_scales(LABELS[::-1], seed=2), strict=True,
        )  # fmt: skip
        for a, b, expected_a, expected_b in pairs:
            assert torch.equal(a.tokens_BN, expected_a.tokens_BN)
            assert torch.equal(b.tokens_BN, expected_b.tokens_BN)

    compare()
    other = build(family, torch.device("cpu"), backend="plain")
    randomise(other, seed=7)
    for pipeline in (plain, captured):
        pipeline.transformer.load_state_dict(other.transformer.state_dict())
    compare()
    captured.to(torch.device("cpu"), torch.float32)
    captured.to(device, torch.float32)
    compare()


def test_captured_steps_on_a_second_device(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU is visible")
    second = torch.device("cuda", 1)
    captured, plain = build("dense", second).capture(), build("dense", second).capture("off")
    assert torch.equal(captured.sample(LABELS).tokens, plain.sample(LABELS).tokens)
    assert captured.transformer.pos_embed.device == second


@contextmanager
def sync_mode(device, mode):
    """torch's mode for operations that wait for the device: "warn" or "error"."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_waits_only_where_there_is_a_reason(family, device, monkeypatch):
    """The places that the rehearsal without a GPU allows, too."""
    pipeline, places = build(family, device), []
    pipeline.sample(LABELS)  # what is built once
    monkeypatch.setattr(warnings, "showwarning", lambda *arguments: places.append(find_caller()))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with sync_mode(device, "warn"):
            pipeline.sample(LABELS)
    assert set(places) <= WAITS.keys()


@torch.no_grad()
@pytest.mark.parametrize("family", ["dense", "mixture", "M-VAR"])
def test_steps_wait_for_nothing(family, device):
    """What a graph captures: an operation that waits raises."""
    pipeline = build(family, device)
    values = pipeline.transformer.condition.parse(LABELS)
    steps = FixedSteps(pipeline.transformer, values)
    steps.set_condition(values)
    width, counts = pipeline.config.tokenizer.code_width, pipeline.config.pyramid.counts
    inputs = [torch.zeros(len(LABELS), count, width, device=device) for count in counts]
    with sync_mode(device, "error"):
        logits = [steps.predict(inputs[k] if k else None, k).clone() for k in range(len(counts))]
    assert all(scale.isfinite().all() for scale in logits)


@pytest.mark.parametrize("case", CASES)
def test_experts_in_tiles_against_the_plain_path(case, device):
    """By Triton's kernels where there are, with gradients."""
    rows, groups, share = CASES[case]
    layer = Experts(groups, 32, 64)
    for i, parameter in enumerate(layer.parameters()):
        parameter.data = (draw(*parameter.shape, seed=i) / parameter.shape[-1] ** 0.5).to(device)
    selected, _ = dispatch(rows, groups, share)
    selected = selected.to(device)
    pairs, outputs = Dispatch.create(selected, rows * groups), []
    for tiled in (True, False):
        x, gates = (draw(rows, size, seed=8 + size).to(device).requires_grad_() for size in (32, groups))
        gate = torch.where(selected, gates, 0)[pairs.row_R, pairs.expert_R]
        layer.zero_grad()
        arguments = x, gate, pairs.row_R, pairs.ends_M, *layer.weights
        y = TiledExperts.apply(*arguments) if tiled else layer.run(x, gate, pairs)
        if y.requires_grad:
            (y * draw(rows, 32, seed=10).to(device)).sum().backward()
        outputs.append([y, *(torch.zeros(()) if t.grad is None else t.grad for t in (x, gates, *layer.weights))])
    for found, expected in zip(*outputs, strict=True):
        assert_near(found.cpu(), expected.cpu().expand_as(found), 1e-3 if device.type == "cuda" else 2e-5)


def test_features_that_images_are_measured_with(device):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Classifier(ClassifierConfig(image_size=16, widths=(16, 32), groups=8), ("a", "b")).eval()
    images = torch.randint(0, 256, (9, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        expected = network(images).to_dict()
        found = network.to(device)(images.to(device)).to_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].cpu(), tensor, rtol=1e-2, atol=1e-2 * float(tensor.abs().max()))


def test_memory_is_bounded_by_the_batch(cuda):
    """64 images of 128 px in batches of 8 take much less than at once."""
    pipeline, peaks = build("dense", cuda, scales="1,2,4,8,16"), {}
    for batch in (8, 64):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(cuda)
        pipeline.sample([1] * 64, batch_size=batch)
        peaks[batch] = torch.cuda.max_memory_allocated(cuda)
    assert peaks[8] < 0.5 * peaks[64]


@pytest.mark.parametrize("batch", [1, 64])
def test_latency_captured_and_not(batch, device, capsys):
    """Printed, not judged; the images are equal."""
    pipeline, seconds, tokens = build("dense", device, scales="1,2,3,4,6,8"), {}, {}
    for mode in ("off", "on"):
        pipeline.capture(mode)
        for _ in range(3):
            synchronize(device)
            start = time.perf_counter()
            tokens[mode] = pipeline.sample([1] * batch, batch_size=batch).tokens
            synchronize(device)
            seconds[mode] = time.perf_counter() - start  # the last round: kernels are built, graphs captured
    with capsys.disabled():
        print(f"\nbatch {batch}: {1000 * seconds['off']:.1f} ms eager, {1000 * seconds['on']:.1f} ms captured")
    assert torch.equal(tokens["on"], tokens["off"])
