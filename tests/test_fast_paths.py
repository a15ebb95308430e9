"""Every fast path computes what the plain one does, values and gradients."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.backends.cpu import get_cpu_capability

from nextscale.backends import optimize
from nextscale.backends.compiler import compile_block
from nextscale.backends.cpu import products
from nextscale.backends.cpu.attention import compute_attention
from nextscale.backends.segments import list_segments
from nextscale.backends.twins import CUDA, DECODER_CPU, INFERENCE_CPU, TRAINING_CPU
from nextscale.common.errors import UserError
from nextscale.pipeline import Pipeline
from nextscale.pyramid import PYRAMID_256, PYRAMID_512, Pyramid
from nextscale.transformer.context import block_causal_mask
from tests.conftest import randomised, tiny_config


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def onednn_trains(request, monkeypatch):
    monkeypatch.setattr(products, "trains_by_onednn", request.param and products.has_onednn)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 3), st.integers(1, 300), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_linear_against_float64(onednn_trains, batch, rows, width, out, biased):
    rng = torch.Generator().manual_seed(rows)
    x, w, b, g = (
        torch.randn(*shape, generator=rng, requires_grad=True)
        for shape in ((batch, rows, width), (out, width), (out,), (batch, rows, out))
    )
    given_bias = b if biased else None
    y = products.linear(x, w, given_bias)
    y.backward(g.detach())
    ours = [y, x.grad, w.grad] + ([b.grad] if biased else [])
    x64, w64, b64 = (t.detach().double().requires_grad_() for t in (x, w, b))
    y64 = F.linear(x64, w64, b64 if biased else None)
    y64.backward(g.detach().double())
    for mine, exact in zip(ours, [y64, x64.grad, w64.grad, b64.grad], strict=False):
        assert mine.shape == exact.shape
        error = (mine.double() - exact).abs().max() / exact.abs().max().clamp_min(1)
        assert error < 1e-5, error


def test_inference_does_not_depend_on_the_batch():
    """Without a gradient to come, the product is F.linear's own, bit for bit."""
    x, w = torch.randn(400, 32), torch.randn(16, 32, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(products.linear(x, w), F.linear(x, w))
    assert torch.allclose(products.linear(x, w), F.linear(x, w), atol=1e-5)


@pytest.mark.parametrize(
    "pyramid", [PYRAMID_256, PYRAMID_512, Pyramid.parse("2,3,20"), Pyramid.parse("1x2,3x4,13x14"), Pyramid.parse("14")]
)
def test_segments_are_the_block_causal_mask(pyramid):
    mask = block_causal_mask(pyramid, torch.device("cpu"))
    rebuilt = torch.zeros_like(mask)
    for start, end, piece in list_segments(pyramid, pyramid.length, torch.device("cpu")):
        rebuilt[start:end, :end] = True if piece is None else piece
    assert torch.equal(rebuilt, mask)


@pytest.mark.parametrize("scales", ["1,2,3,4", "1,2,5,9,13"])
def test_attention_in_pieces_equals_attention_under_the_mask(scales):
    plain = randomised(tiny_config(scales), backend="plain").transformer
    fast = optimize(copy.deepcopy(plain), training=True)
    length = plain.pyramid.length
    x = torch.randn(3, length - 1, 4, generator=torch.Generator().manual_seed(0))
    labels, results = torch.tensor([0, 1, 2]), []
    for model in (fast, plain):
        logits = model(labels, x).logits_BNV
        logits.square().mean().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max().clamp_min(1e-3)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_attention_written_out_equals_the_fused_kernel(masked, scale):
    rng, results = torch.Generator().manual_seed(0), []
    q, k, v, g = (torch.randn(2, 3, n, 8, generator=rng) for n in (5, 9, 9, 5))
    mask = torch.rand(5, 9, generator=rng) < 0.6 if masked else None
    if masked:
        mask[:, 0] = True

    def fused(q, k, v, mask, scale):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    for dtype, attention in ((torch.bfloat16, compute_attention), (torch.bfloat16, fused), (torch.float64, fused)):
        tensors = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        y = attention(*tensors, mask, scale)
        y.backward(g.to(dtype))
        results.append([y, *(t.grad for t in tensors)])
    for ours, usual_y, exact in zip(*results, strict=True):
        error, usual = ((t.double() - exact).abs().max() / exact.abs().max() for t in (ours, usual_y))
        assert error < max(2 * usual, 0.02), (error, usual)


def test_one_option_turns_all_of_them_off(tiny_folder):
    """With backend "plain" no module of a pipeline is a twin; with "auto" every plain module that has one is."""
    twins = {
        path.partition(":")[2] for table in (TRAINING_CPU, INFERENCE_CPU, DECODER_CPU, CUDA) for path in table.values()
    }
    for backend in ("plain", "auto"):
        pipeline = Pipeline.from_pretrained(tiny_folder, backend=backend)
        modules = [*pipeline.tokenizer.modules(), *pipeline.transformer.modules()]
        swapped = [type(m).__name__ in twins for m in modules]
        assert any(swapped) == (backend == "auto")
        if backend == "auto":
            assert not any(type(m) in (torch.nn.Linear, torch.nn.Conv2d) for m in modules)
    with pytest.raises(UserError, match="there is no backend 'fast'"):
        Pipeline.from_pretrained(tiny_folder, backend="fast")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_compute_the_same():
    """In training, where the fast paths step aside for what the compiler chooses.

    Its code is kept on disk, where code for AVX-512 must not be taken for AVX2 (ATEN_CPU_CAPABILITY=avx2).
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa  # takes a second to import

    pipeline = randomised(tiny_config("1,2,12", depth=1))
    model, tokens = pipeline.transformer, torch.randint(32, (2, 149), generator=torch.Generator().manual_seed(0))
    inputs, labels = pipeline.tokenizer.teacher_inputs(tokens), torch.tensor([1, 2])

    def gradients():
        model.zero_grad()
        logits = model(labels, inputs).logits_BNV
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters())]

    plain = gradients()
    for block in model.blocks:
        compile_block(block)
    assert pick_vec_isa().bit_width() == {"AVX512": 512, "AVX2": 256}.get(
        get_cpu_capability(), pick_vec_isa().bit_width()
    )
    for eager, compiled in zip(plain, gradients(), strict=True):
        assert (eager - compiled).abs().max() <= 1e-4 * eager.abs().max().clamp_min(1e-3)
