"""The decoder's convolutions in 8 bits: against sums of integers, batches, folders, neighbours and refusals."""

import numpy as np
import pytest
import torch
from torch import nn

from nextscale.backends import optimize
from nextscale.backends.cpu import int8_decoder
from nextscale.backends.cpu.kernels import build
from nextscale.backends.cpu.kernels.int8 import quantise_image
from nextscale.cli import main
from nextscale.common.errors import UserError
from nextscale.pipeline import Pipeline
from nextscale.tokenizer.int8 import Int8Conv2d, Int8Upsample, quantise_decoder, quantise_map
from tests.conftest import randomised, tiny_config
from tests.test_int8 import FAMILIES

TYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=["compiled", "torch"])
def way(request, monkeypatch):
    """With the compiled kernels, and without."""
    if request.param == "torch":
        monkeypatch.setattr(build, "load_kernels", lambda *name: None)
    return request.param


@pytest.fixture
def narrow_too(monkeypatch):
    """Models of any width are quantised, whatever this CPU is fast in."""
    monkeypatch.setattr(int8_decoder, "_CHANNELS", 1)
    monkeypatch.setattr(int8_decoder, "quantise_where_fast", quantise_decoder)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def create_tokenizer(scales="1,2,3,4", dtype=torch.float32, int8=True, backend="auto"):
    tokenizer = randomised(tiny_config(scales), backend="plain").tokenizer.set_compute_dtype(dtype)
    if int8:
        quantise_decoder(tokenizer.decoder)
    return optimize(nn.ModuleList([tokenizer.requires_grad_(False)]), backend)[0]


# ---- arithmetic


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("offset", [0.0, 9.0, -9.0])
def test_a_map_is_within_half_a_step_and_0_is_exact(dtype, offset, way):
    for shape in ((1, 5, 3, 7), (1, 16, 12, 9)):
        x = (draw(*shape) + offset).to(dtype)
        for rounded in (quantise_map(x), quantise_image(x)):
            assert rounded.u_1Ihw.dtype == torch.uint8
            assert 0 <= rounded.zero <= 255
            u, exact = rounded.u_1Ihw.double().numpy(), x.double().numpy()
            span = max(exact.max(), 0) - min(exact.min(), 0)
            np.testing.assert_allclose(rounded.scale, span / 255, rtol=1e-6)
            assert np.abs(rounded.scale * (u - rounded.zero) - exact).max() <= rounded.scale * 1.001
    zeros = quantise_image(torch.zeros(1, 16, 2, 2))
    assert (zeros.u_1Ihw == zeros.zero).all()


def convolve(x_hwI, kernel_OIhw):
    """A 3x3 convolution of a map (h, w, I) of integers, padded with zeros: (O, h, w)."""
    height, width, _ = x_hwI.shape
    padded = np.pad(x_hwI, ((1, 1), (1, 1), (0, 0)))
    parts = [
        np.einsum("hwi,oi->ohw", padded[a : a + height, b : b + width], kernel_OIhw[:, :, a, b])
        for a in range(3)
        for b in range(3)
    ]
    return np.sum(parts, axis=0)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", [Int8Conv2d, Int8Upsample])
def test_a_convolution_is_an_exact_sum_of_integers(kind, dtype, way):
    layer = Int8Upsample(16) if kind is Int8Upsample else Int8Conv2d(16, 24, 3, padding=1)
    layer.weight.data = draw(*layer.weight.shape) * 0.1
    layer.weight.data[3] = 0
    layer = layer.to(dtype).eval().requires_grad_(False)
    x = (draw(3, 16, 9, 6) * torch.tensor([1.0, 30.0, 0.01])[:, None, None, None] + 0.3).to(dtype)
    fast = optimize(nn.ModuleList([layer]))[0]
    assert type(fast) is not kind
    weight = layer.weight.float().numpy()
    scale_O = np.abs(weight).max(axis=(1, 2, 3)) / np.float32(127)
    q = np.round(weight / np.where(scale_O == 0, 1, scale_O)[:, None, None, None]).astype(np.int64)
    for ours, quantise in ((layer, quantise_map), (fast, quantise_image)):
        y = ours(x)
        assert y.dtype == ours.weight.dtype  # float32 on a CPU that is slow in bfloat16
        for i in range(3):
            rounded = quantise(x[i : i + 1])
            u_hwI = rounded.u_1Ihw[0].permute(1, 2, 0).numpy().astype(np.int64) - rounded.zero
            u_hwI = u_hwI.repeat(2, axis=0).repeat(2, axis=1) if kind is Int8Upsample else u_hwI
            expected = convolve(u_hwI, q) * (scale_O * rounded.scale)[:, None, None]
            expected += layer.bias.double().numpy()[:, None, None]
            error = 1e-5 if dtype == torch.float32 else 2**-8
            np.testing.assert_allclose(y[i].double().numpy(), expected, rtol=error, atol=error * np.abs(expected).max())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_spoils_its_own_image_alone(value, way):
    layer, x = optimize(nn.ModuleList([Int8Conv2d(16, 16, 3, padding=1)]))[0], draw(3, 16, 4, 4)
    x[1, 3, 2, 1] = value
    with torch.no_grad():
        y = layer(x)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_gradients_are_refused():
    with pytest.raises(UserError, match="no gradients"):
        Int8Conv2d(4, 4, 3, padding=1)(draw(1, 4, 3, 3).requires_grad_())


# ---- decoders


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scales", ["1,2,3,4", "1x1,2x3,4x6"])
def test_an_image_is_the_same_alone_and_in_any_batch(scales, dtype, way, threads_set):
    tokenizer = create_tokenizer(scales, dtype)
    canvas = draw(5, *tokenizer.new_canvas(1).shape[1:])
    for threads in (1, 2, 3):
        threads_set(threads)
        whole = tokenizer.decode_canvas(canvas)
        for start, stop in ((0, 1), (1, 3), (4, 5)):
            assert torch.equal(tokenizer.decode_canvas(canvas[start:stop]), whole[start:stop])
        tokenizer.decode_batch = 2
        assert torch.equal(tokenizer.decode_canvas(canvas), whole)
        tokenizer.decode_batch = 0


def test_a_decoder_is_near_that_in_floats_and_its_weights_and_tokens_are_the_same():
    full, plain, fast = create_tokenizer(int8=False), create_tokenizer(backend="plain"), create_tokenizer()
    canvas = draw(4, *full.new_canvas(1).shape[1:])
    exact, reference, image = (tokenizer.decode_canvas(canvas) for tokenizer in (full, plain, fast))
    loss = (reference - exact).square().mean().sqrt()
    assert 0 < loss < 0.05 * exact.std()
    assert (image - reference).square().mean().sqrt() < 0.3 * loss
    assert torch.equal(fast.encode(image), full.encode(image))
    assert fast.state_dict().keys() == full.state_dict().keys()
    for name, tensor in full.state_dict().items():
        assert torch.equal(fast.state_dict()[name], tensor), name


def test_new_weights_are_laid_out_again():
    first, second = create_tokenizer(), create_tokenizer()
    canvas = draw(1, *first.new_canvas(1).shape[1:])
    before = first.decode_canvas(canvas)
    changed = {name: tensor * 1.1 for name, tensor in second.state_dict().items()}
    for tokenizer in (first, second):
        tokenizer.load_state_dict(changed)
    assert torch.equal(first.decode_canvas(canvas), second.decode_canvas(canvas))
    assert not torch.equal(first.decode_canvas(canvas), before)


# ---- models


def count_convolutions(pipeline):
    return sum(isinstance(module, Int8Conv2d) for module in pipeline.tokenizer.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_8_bits_decodes_so_and_draws_the_same_tokens(family, monkeypatch):
    config = tiny_config(**FAMILIES[family])
    floats = randomised(config).to("cpu", torch.int8)
    assert count_convolutions(floats) == 0, "a narrow decoder stays in floats"
    monkeypatch.setattr(int8_decoder, "_CHANNELS", 1)
    monkeypatch.setattr(int8_decoder, "is_convolution_fast", lambda: False)
    assert count_convolutions(randomised(config).to("cpu", torch.int8)) == 0, "as on a CPU without VNNI"
    monkeypatch.setattr(int8_decoder, "is_convolution_fast", lambda: True)
    pipeline = randomised(config).to("cpu", torch.int8)
    assert count_convolutions(pipeline.to("cpu", torch.int8)) == 13
    monkeypatch.undo()
    images, exact = (p.sample([1, 4, 2], seed=1) for p in (pipeline, floats))
    assert torch.equal(images.tokens, exact.tokens)
    assert 0 < (images.tensor - exact.tensor).square().mean().sqrt() < 0.05
    assert torch.equal(pipeline.sample([4], seed=1, first_image=1).tensor, images.tensor[1:2])


def test_folders_edits_and_refiners(tiny_folder, tmp_path, narrow_too):
    folder = tmp_path / "quantised"
    main(["quantise", str(tiny_folder), "--out", str(folder)])
    assert (folder / "tokenizer.safetensors").read_bytes() == (tiny_folder / "tokenizer.safetensors").read_bytes()
    pipeline, full = Pipeline.from_pretrained(folder), Pipeline.from_pretrained(tiny_folder)
    assert count_convolutions(pipeline) == 13
    images = pipeline.sample([0, 1], refiner=str(tiny_folder), draft_scales=2)
    assert count_convolutions(pipeline) == 13
    alone = pipeline.sample([1], refiner=str(tiny_folder), draft_scales=2, first_image=1)
    assert torch.equal(alone.tensor, images.tensor[1:])
    picture = images.tensor[0].permute(1, 2, 0).numpy()
    assert torch.equal(pipeline.encode(picture), full.encode(picture))
    mask = np.ones((8, 8), dtype=np.float32)
    mask[:, 4:] = 0
    edited = [pipeline.edit(picture, mask, 1, seed=seed) for seed in (0, 0)]
    assert torch.equal(edited[0].tensor, edited[1].tensor)
    pipeline.save_pretrained(tmp_path / "again")
    for name in ("tokenizer.safetensors", "transformer.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name
