"""The law of the canvas and the quantiser, against formulas written out in NumPy and against themselves."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nextscale.common.errors import UserError
from nextscale.config.tokenizer import TokenizerConfig
from nextscale.pyramid import Pyramid
from nextscale.tokenizer.quantizer import Quantizer, downsample, upsample
from nextscale.tokenizer.tokenizer import Tokenizer
from tests.conftest import randomised, tiny_config


def quantizer(scales="1,2,4", **settings) -> Quantizer:
    torch.manual_seed(0)
    config = TokenizerConfig(vocab_size=16, code_width=3, base_channels=8, norm_groups=4, **settings)
    module = Quantizer(config, Pyramid.parse(scales))
    torch.nn.init.normal_(module.codebook.weight)
    return module


def area(x_Chw: np.ndarray, side: tuple[int, int]) -> np.ndarray:
    """Area averages by their definition: cell i of n covers rows floor(i H / n) to ceil((i + 1) H / n)."""
    C, H, W = x_Chw.shape
    out = np.zeros((C, *side))
    for i in range(side[0]):
        for j in range(side[1]):
            rows = slice(i * H // side[0], -(-(i + 1) * H // side[0]))
            columns = slice(j * W // side[1], -(-(j + 1) * W // side[1]))
            out[:, i, j] = x_Chw[:, rows, columns].mean(axis=(1, 2))
    return out


def cubic_matrix(n: int, m: int) -> np.ndarray:
    """(m, n): bicubic interpolation of n samples at m places, a = -0.75, edges repeated."""
    a, matrix = -0.75, np.zeros((m, n))
    for i in range(m):
        x = (i + 0.5) * n / m - 0.5
        for tap in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            d = abs(x - tap)
            weight = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(tap, 0), n - 1)] += weight
    return matrix


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7), st.integers(1, 7))
def test_resampling_is_area_and_bicubic(h, w, h2, w2):
    x = np.random.default_rng(0).normal(size=(2, h, w))
    shrunk = downsample(torch.tensor(x)[None], (h2, w2))[0].numpy()
    np.testing.assert_allclose(shrunk, area(x, (h2, w2)), atol=1e-12)
    enlarged = upsample(torch.tensor(x)[None], (h2, w2))[0].numpy()
    np.testing.assert_allclose(enlarged, cubic_matrix(h, h2) @ x @ cubic_matrix(w, w2).T, atol=1e-12)


@pytest.mark.parametrize("cosine", [False, True])
def test_nearest_against_brute_force(cosine):
    module = quantizer(cosine_lookup=cosine)
    z, book = torch.randn(2, 20, 3), module.codebook.weight.detach()
    if cosine:
        expected = (F.normalize(z, dim=-1)[:, :, None] * F.normalize(book, dim=-1)).sum(-1).argmax(-1)
    else:
        expected = (z[:, :, None] - book).square().sum(-1).argmin(-1)
    assert torch.equal(module.find_nearest(z), expected)


@torch.no_grad()
def test_encoding_against_the_formula():
    """MEPA Eq. 1-3 written out: what is left is averaged, looked up, enlarged, refined and subtracted."""
    module = quantizer("1,2x3,4x5")
    features = torch.randn(1, 3, 4, 5)
    book, ratio = module.codebook.weight.numpy().astype(np.float64), 0.5
    rest, canvas, expected = features[0].numpy().astype(np.float64), np.zeros((3, 4, 5)), []
    for k, (h, w) in enumerate(module.pyramid.sides):
        cells = area(rest, (h, w)).reshape(3, -1).T
        tokens = ((cells[:, None] - book) ** 2).sum(-1).argmin(-1)
        up = cubic_matrix(h, 4) @ book[tokens].T.reshape(3, h, w) @ cubic_matrix(w, 5).T
        phi = module.phi[(0, 2, 3)[k]]
        padded = np.pad(up, ((0, 0), (1, 1), (1, 1)))
        kernel, conv = phi.weight.numpy(), np.zeros_like(up)
        for i in range(4):
            for j in range(5):
                conv[:, i, j] = np.einsum("oikl,ikl->o", kernel, padded[:, i : i + 3, j : j + 3]) + phi.bias.numpy()
        added = (1 - ratio) * up + ratio * conv
        canvas, rest = canvas + added, rest - added
        expected.append((tokens, canvas))
    for scale, (tokens, canvas) in zip(module.encode_scales(features), expected, strict=True):
        assert scale.tokens_BN[0].tolist() == tokens.tolist()
        np.testing.assert_allclose(scale.canvas_BChw[0].numpy(), canvas, atol=1e-5)


def test_training_pass_has_the_loss_and_the_straight_through_gradient():
    module = quantizer(commitment=0.3)
    features = torch.randn(2, 3, 4, 4, requires_grad=True)
    quantized = module(features)
    canvases = [scale.canvas_BChw for scale in module.encode_scales(features)]
    assert torch.allclose(quantized.features_BChw, canvases[-1], atol=1e-6)
    expected = sum((1 + 0.3) * (c - features).square().mean() for c in canvases) / len(canvases)
    assert torch.allclose(quantized.loss, expected)
    # straight through: the gradient at the canvas reaches the features unchanged
    upstream = torch.randn_like(features)
    (gradient,) = torch.autograd.grad(quantized.features_BChw, features, upstream, retain_graph=True)
    assert torch.equal(gradient, upstream)
    # commitment pulls features towards the canvas, the codebook loss pulls codes and phi towards the features
    (gradient,) = torch.autograd.grad(quantized.loss, features, retain_graph=True)
    pull = sum(0.3 * 2 * (features - c.detach()) / features.numel() for c in canvases) / len(canvases)
    assert torch.allclose(gradient, pull, atol=1e-7)
    quantized.loss.backward()
    assert module.codebook.weight.grad.abs().sum() > 0
    assert all(phi.weight.grad.abs().sum() > 0 for i, phi in enumerate(module.phi) if i in module.phi_of_scale)


@pytest.mark.parametrize("scales", ["1,2,4", "4", "1x1,2x1,3x2,4x2", "2x2,4x4", "1,1,2,3,4,4"])
@torch.no_grad()
def test_one_law_for_every_use(scales):
    """Encoding, teacher forcing, decoding and the sampler's own loop build the same canvases from the same tokens."""
    tokenizer = randomised(tiny_config(scales)).tokenizer
    h, w = (2 * s for s in tokenizer.pyramid.last)
    images = torch.rand(3, 3, h, w) * 2 - 1
    encoded = list(tokenizer.quantizer.encode_scales(tokenizer.extract_features(images)))
    tokens = tokenizer.encode(images)
    assert torch.equal(tokens, torch.cat([scale.tokens_BN for scale in encoded], dim=1))
    for canvas, scale in zip(tokenizer.build_canvases(tokens), encoded, strict=True):
        assert torch.equal(canvas, scale.canvas_BChw)
    canvas, inputs = tokenizer.new_canvas(3), []
    for k, (start, end) in enumerate(tokenizer.pyramid.spans):
        if k:
            inputs.append(tokenizer.next_input(canvas, k))
        canvas = tokenizer.add_scale(canvas, tokens[:, start:end], k)
    assert torch.equal(torch.cat([*inputs, torch.zeros(3, 0, 4)], dim=1), tokenizer.teacher_inputs(tokens))
    assert torch.equal(tokenizer.decode_canvas(canvas), tokenizer.decode(tokens))


@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_an_image_is_encoded_and_decoded_the_same_alone_and_in_a_batch(threads, threads_set):
    threads_set(threads)
    tokenizer = randomised(tiny_config("1,2,3,8")).tokenizer
    images = torch.rand(17, 3, 16, 16) * 2 - 1
    tokens, features = tokenizer.encode(images), tokenizer.extract_features(images)
    painted = tokenizer.decode(tokens)
    for i in range(5):
        assert torch.equal(tokenizer.extract_features(images[i : i + 1])[0], features[i])
        assert torch.equal(tokenizer.encode(images[i : i + 1])[0], tokens[i])
        assert torch.equal(tokenizer.decode(tokens[i : i + 1])[0], painted[i])


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 3), st.integers(0, 3), st.lists(st.integers(1, 2), min_size=1, max_size=3))
def test_every_shape_of_the_cnn_runs(res_blocks, num_phi, multipliers):
    config = TokenizerConfig(
        vocab_size=8,
        code_width=2,
        base_channels=4,
        channel_multipliers=tuple(multipliers),
        res_blocks=res_blocks,
        norm_groups=2,
        num_phi=num_phi,
        attention=bool(res_blocks % 2),
        middle_attention=num_phi != 1,
    )
    tokenizer = Tokenizer(config, Pyramid.parse("1,2x3"))
    size = 2 * config.downsampling, 3 * config.downsampling
    painted, quantized = tokenizer(torch.zeros(1, 3, *size))
    assert painted.shape == (1, 3, *size)
    assert quantized.tokens_BL.shape == (1, 7)


def test_wrong_shapes_and_tokens_are_named(tiny):
    with pytest.raises(UserError, match=r"takes images of shape \(B, 3, 8, 8\); got \(1, 3, 8, 9\)"):
        tiny.tokenizer.encode(torch.zeros(1, 3, 8, 9))
    with pytest.raises(UserError, match=r"takes tokens \(B, 30\); got \(1, 29\)"):
        tiny.tokenizer.decode(torch.zeros(1, 29, dtype=torch.int64))
    with pytest.raises(UserError, match=r"tokens must lie in 0 to 31; got 0\.\.32"):
        tiny.tokenizer.decode(torch.arange(30)[None].clone().index_fill(1, torch.tensor([29]), 32))
