"""The layouts of inference on a CPU: the same function as the plain one, and the same promises."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nextscale.backends import optimize
from nextscale.backends.cpu import attention as cpu_attention
from nextscale.backends.cpu import convolution, products
from nextscale.backends.cpu.attention import compute_attention
from nextscale.backends.cpu.convolution import WinogradConv2d
from nextscale.backends.cpu.linear import PackedLinear
from nextscale.backends.cpu.products import linear
from nextscale.common.errors import UserError
from nextscale.pipeline import Pipeline
from tests.conftest import randomised, tiny_config

needs_onednn = pytest.mark.skipif(
    not products.has_onednn, reason="no oneDNN products on this CPU: there the plain path runs"
)
DTYPES = [d for d in (torch.float32, torch.bfloat16) if d in products.list_onednn_dtypes()]


@needs_onednn
@torch.no_grad()
@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 70),
    st.integers(1, 70),
    st.booleans(),
    st.booleans(),
    st.sampled_from(DTYPES or [0]),
)
def test_packed_product_against_float64_and_against_each_row_alone(rows, width, out, biased, gelu, dtype):
    rng = torch.Generator().manual_seed(rows)
    layer = PackedLinear(width, out, bias=biased).to(dtype)
    x = torch.randn(1, rows, width, generator=rng).to(dtype)
    plain = linear(x, layer.weight, layer.bias, gelu)
    layer.pack()
    assert layer.weight.is_mkldnn
    y = layer.multiply(x, layer.bias, gelu)
    assert torch.equal(y, plain), "packing changed a result"
    exact = F.linear(x.double(), layer.weight.to_dense().double(), layer.bias.double() if biased else None)
    exact = F.gelu(exact, approximate="tanh") if gelu else exact
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert (y.double() - exact).abs().max() <= bound * exact.abs().max().clamp_min(1)
    for row in (0, rows // 2, rows - 1):
        assert torch.equal(layer.multiply(x[:, row : row + 1], layer.bias, gelu), y[:, row : row + 1])


@needs_onednn
def test_weights_are_packed_at_the_first_product_that_gains_by_it():
    model = optimize(torch.nn.Sequential(torch.nn.Linear(8, 8)))
    model(torch.randn(4, 8))
    assert not model[0].weight.is_mkldnn
    model(torch.randn(64, 8))
    assert model[0].weight.is_mkldnn


@needs_onednn
def test_packed_weights_are_saved_moved_and_converted_bit_for_bit():
    layer = PackedLinear(24, 40)
    before = layer.weight.detach().clone()
    layer.pack()
    assert torch.equal(layer.state_dict()["weight"], before)
    layer.to(torch.float64)
    assert torch.equal(layer.weight, before.double())
    assert not layer.weight.is_mkldnn


@needs_onednn
def test_packed_weights_refuse_to_be_trained(tiny_folder):
    pipeline = Pipeline.from_pretrained(tiny_folder)
    with pytest.raises(UserError, match='backend="plain"'):
        pipeline.transformer.train()
    layer = PackedLinear(24, 40)
    layer.pack()
    with pytest.raises(UserError, match='backend="plain"'):
        layer(torch.randn(3, 24, requires_grad=True))
    Pipeline.from_pretrained(tiny_folder, backend="plain").transformer.train()


def save_folder(pipeline, path):
    pipeline.save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_packed_models_keep_the_promise_about_batches(dtype, threads, threads_set, tmp_path):
    threads_set(threads)
    folder = save_folder(randomised(tiny_config("1,2,4,8")), tmp_path / "model")
    pipeline = Pipeline.from_pretrained(folder, dtype=dtype)
    labels = [3, 1, 4, 1, 0, 2, 2] + [1] * 11
    fresh = pipeline.sample([4], top_k=8, seed=5, first_image=2)
    together = pipeline.sample(labels, top_k=8, seed=5, batch_size=18)
    assert torch.equal(fresh.tensor[0], together.tensor[2]), "before packing and after it"
    for size in (1, 2, 3):
        parts = pipeline.sample(labels, top_k=8, seed=5, batch_size=size)
        assert torch.equal(parts.tokens, together.tokens)
        assert torch.equal(parts.tensor, together.tensor)


def test_packed_model_samples_and_saves_as_the_plain_one(tmp_path):
    folder = save_folder(randomised(tiny_config("1,2,4,8")), tmp_path / "model")
    packed = Pipeline.from_pretrained(folder)
    a = packed.sample([0, 1, 2], seed=3)
    packed.save_pretrained(tmp_path / "again")
    for name in ("transformer.safetensors", "tokenizer.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    b = Pipeline.from_pretrained(folder, backend="plain").sample([0, 1, 2], seed=3)
    assert torch.equal(a.tokens, b.tokens)
    assert (a.tensor - b.tensor).abs().max() <= 1e-4


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_winograd_against_float64_and_its_images_alone(count):
    torch.manual_seed(0)
    conv = WinogradConv2d(24, 40, 3, padding=1)
    x = torch.randn(count, 24, 70, 66)
    assert conv.uses_winograd(x) == convolution.has_nnpack()
    y = conv(x)
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    assert (y - exact).abs().max() <= 5e-5 * exact.abs().max()
    for i in range(count):
        assert torch.equal(conv(x[i : i + 1])[0], y[i])


def test_winograd_is_for_decoders_in_inference_alone(tiny):
    tokenizer = tiny.optimize().tokenizer
    decoder, encoder = (
        [m for m in part.modules() if isinstance(m, torch.nn.Conv2d)] for part in (tokenizer.decoder, tokenizer.encoder)
    )
    assert all(isinstance(m, convolution._Winograd) for m in decoder)
    assert not any(isinstance(m, convolution._Winograd) for m in encoder)
    assert all(isinstance(m, convolution.BatchIndependentConvolution) for m in encoder)
    conv = next(m for m in decoder if m.kernel_size == (3, 3))
    assert not conv.uses_winograd(torch.randn(1, conv.in_channels, 80, 80)), "gradients are enabled here"


def test_without_onednn_and_nnpack_the_plain_path_runs(tmp_path, monkeypatch):
    folder = save_folder(randomised(tiny_config("1,2,4,8")), tmp_path / "model")
    usual = Pipeline.from_pretrained(folder).sample([0, 1], seed=3)
    monkeypatch.setattr(products, "has_onednn", False)
    monkeypatch.setattr(convolution, "has_nnpack", lambda: False)
    products.list_onednn_dtypes.cache_clear()
    try:
        pipeline = Pipeline.from_pretrained(folder)
        plain = pipeline.sample([0, 1], seed=3)
        assert not any(m.weight.is_mkldnn for m in pipeline.transformer.modules() if isinstance(m, torch.nn.Linear))
    finally:
        products.list_onednn_dtypes.cache_clear()
    assert torch.equal(plain.tokens, usual.tokens)
    assert (plain.tensor - usual.tensor).abs().max() <= 1e-4


@pytest.mark.parametrize("masked", [True, False])
def test_attention_in_portions_equals_attention_at_once(masked, monkeypatch):
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 4, n, 8, generator=rng).bfloat16() for n in (100, 130, 130))
    mask = torch.rand(100, 130, generator=rng) < 0.5 if masked else None
    with torch.no_grad():
        whole = compute_attention(q, k, v, mask, 0.5)
        monkeypatch.setattr(cpu_attention, "_SCORES", 2 * 4 * 130 * 40)
        chunks = compute_attention(q, k, v, mask, 0.5)
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, scale=0.5)
        alone = compute_attention(q[1:2], k[1:2], v[1:2], mask, 0.5)
    assert chunks.shape == whole.shape
    for ours in (whole, chunks):
        assert (ours.double() - exact).abs().max() <= 0.02 * exact.abs().max()
    assert torch.equal(alone[0], chunks[1])


@needs_onednn
def test_products_of_training_by_onednn_whatever_this_cpu_gains(monkeypatch):
    """What some CPUs take, forward and backward, and a weight's gradient written to its place."""
    monkeypatch.setattr(products, "trains_by_onednn", True)
    rng = torch.Generator().manual_seed(0)
    x, weight, bias, dy = (torch.randn(s, generator=rng) for s in ((200, 64), (96, 64), (96,), (200, 96)))
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    y, plain = products.linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double())
    assert (y - plain).abs().max() < 1e-5 * plain.abs().max()
    exact = torch.autograd.grad(plain, (x, weight, bias), dy.double())
    found = [*torch.autograd.grad(y, (x, weight, bias), dy), torch.zeros(96, 64)]
    products.compute_weight_gradient(dy, x.detach(), weight.detach(), out=found[-1])
    for gradient, wanted in zip(found, [*exact, exact[1]], strict=True):
        assert (gradient - wanted).abs().max() < 1e-5 * wanted.abs().max()
