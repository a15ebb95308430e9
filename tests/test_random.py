"""Random numbers of sampling: published Philox vectors, a plain Python loop, distributions, and what they depend on."""

import hashlib
import json

import numpy as np
import pytest
import torch

from nextscale.common.errors import UserError
from nextscale.common.inputs import compare_inputs
from nextscale.common.rng import compute_philox, draw_words
from nextscale.config.sampling import SampleConfig
from nextscale.evaluation.images import ModelImages
from nextscale.pyramid import Pyramid
from nextscale.sampling.draw import PerImageRandom, invert_cdf
from nextscale.sampling.filters import filter_top_k_top_p
from nextscale.sampling.gumbel import compute_gumbel
from tests.conftest import randomised, tiny_config

CPU = torch.device("cpu")
PUBLISHED = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
"""Counter, key and output: the known answers of philox4x32-10 in Random123 (kat_vectors)."""


def read_words(text):
    return [int(word, 16) for word in text.split()]


def philox_by_loop(counter, key):
    """Philox4x32-10 in Python's integers."""
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        x, y = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (y >> 32) ^ b ^ k, y % 2**32, (x >> 32) ^ d ^ m, x % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return [a, b, c, d]


def word_by_loop(seed, purpose, image, row, index):
    """The word of an image's stream for a purpose, as the documentation of `draw_words` says."""
    digest = hashlib.sha256(repr((seed, purpose)).encode()).digest()
    key = int.from_bytes(digest[:8], "little") >> 1
    counter = index // 4, row, image % 2**32, image >> 32
    return philox_by_loop(counter, (key % 2**32, key >> 32))[index % 4]


def create_random(pyramid, batch, first=0, seed=7):
    return PerImageRandom(seed, Pyramid.parse(pyramid), batch, CPU, first)


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_published_vectors(counter, key, expected):
    words = compute_philox(tuple(torch.tensor([word]) for word in read_words(counter)), tuple(read_words(key)))
    assert [word.item() for word in words] == read_words(expected)
    assert philox_by_loop(read_words(counter), read_words(key)) == read_words(expected)


@pytest.mark.parametrize("image", [0, 5, 2**32 + 1, 2**62])
def test_words_against_a_loop(image):
    rng = np.random.default_rng(image % 1000)
    rows, count = range(3, 8), 11
    seed = int(rng.integers(2**63))
    words = draw_words(seed, torch.tensor([image, image + 1]), rows, count)
    assert words.shape == (2, 5, 11)
    for b, i, v in [(0, 0, 0), (1, 4, 10), (0, 2, 7), (1, 3, 4)]:
        counter = v // 4, rows[i], (image + b) % 2**32, (image + b) >> 32
        assert words[b, i, v] == philox_by_loop(counter, (seed % 2**32, seed >> 32))[v % 4]


def test_tokens_and_noise_against_a_loop():
    random = create_random("1,2,3", batch=2, first=2**32 - 1)
    logits = torch.randn(2, 4, 6)
    tokens, noise = random.draw_tokens(logits, 1), random.draw_gumbel(logits, 1)
    cumulative = np.cumsum(logits.double().softmax(-1).numpy(), axis=-1)
    for b in range(2):
        for n in range(4):
            u = word_by_loop(7, "token", 2**32 - 1 + b, 0, 1 + n) / 2**32
            assert tokens[b, n] == np.searchsorted(cumulative[b, n], u, side="right")
            for v in range(6):
                x = (word_by_loop(7, "gumbel", 2**32 - 1 + b, 1 + n, v) // 2**9 + 0.5) / 2**23
                assert noise[b, n, v].item() == pytest.approx(-np.log(-np.log(x)), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("codes", [5, 300])
def test_numbers_depend_on_the_image_and_position_alone(codes):
    """Not on the batch, the order of the scales, or how many numbers are computed at once."""
    pyramid = Pyramid.parse("1,2,4,9,18")
    logits = [torch.randn(1, count, codes).expand(8, -1, -1) for count in pyramid.counts]

    def draw(random, batch, scales=range(5)):
        return {k: (random.draw_tokens(logits[k][:batch], k), random.draw_gumbel(logits[k][:batch], k)) for k in scales}

    whole = draw(create_random(str(pyramid), 8), 8)
    for first, batch, scales in [(0, 1, range(5)), (3, 3, [4, 0, 3, 1, 2, 4]), (7, 1, [2, 4])]:
        for k, parts in draw(create_random(str(pyramid), batch, first), batch, scales).items():
            for part, all_of_it in zip(parts, whole[k], strict=True):
                assert torch.equal(part, all_of_it[first : first + batch]), (first, k)
    numbers = torch.cat([noise.flatten() for _, noise in whole.values()])
    assert numbers.numel() == 8 * pyramid.length * codes
    assert len(numbers.unique()) > 0.9 * numbers.numel(), "two places have the same numbers"
    assert not torch.equal(whole[4][0], draw(create_random(str(pyramid), 8, seed=8), 8, [4])[4][0])


def test_images_are_the_same_in_any_batch_and_from_any_number():
    pipeline = randomised(tiny_config("1,2,3,4")).optimize()
    labels = [3, 1, 4, 1, 0, 2, 2, 1]
    for smooth in (False, True):
        whole = pipeline.sample(labels, top_k=8, seed=5, smooth=smooth, batch_size=8, first_image=2**40)
        for size in (1, 3):
            parts = pipeline.sample(labels, top_k=8, seed=5, smooth=smooth, batch_size=size, first_image=2**40)
            assert torch.equal(parts.tensor, whole.tensor)
        later = pipeline.sample(labels[5:], top_k=8, seed=5, smooth=smooth, first_image=2**40 + 5)
        assert torch.equal(later.tensor, whole.tensor[5:])
    with pytest.raises(UserError, match=r"first_image must lie below 2\^63 - 1; got 9223372036854775807"):
        pipeline.sample([1], first_image=2**63 - 1)


def test_tokens_follow_the_filtered_distribution():
    """Chi-square, for each of three images."""
    from scipy import stats  # takes a second to import

    rows = 200
    logits = filter_top_k_top_p(2 * torch.randn(20, generator=torch.Generator().manual_seed(3)), k=12, p=0.95)
    tokens = create_random(f"1,{rows}", batch=3).draw_tokens(logits.expand(3, rows**2, 20), k=1)
    kept = logits.isfinite()
    assert 2 < kept.sum() < 12
    for row in tokens:
        counts = torch.bincount(row, minlength=20)
        assert counts[~kept].sum() == 0
        assert stats.chisquare(counts[kept], logits[kept].double().softmax(0) * rows**2).pvalue > 1e-3


@pytest.mark.parametrize("scale", [0, 1])
def test_words_and_noise_follow_their_distributions(scale):
    """Kolmogorov-Smirnov; and neighbours, images and scales are not correlated."""
    from scipy import stats

    words = draw_words(5, torch.arange(4), range(100 * scale, 100 * scale + 50), 1000)
    assert stats.kstest(words.flatten().double() / 2**32, "uniform").pvalue > 1e-3
    noise = compute_gumbel(words)
    assert stats.kstest(noise.flatten().double(), "gumbel_r").pvalue > 1e-3
    flat = words.double() / 2**32
    for a, b in [(flat[..., 1:], flat[..., :-1]), (flat[:, 1:], flat[:, :-1]), (flat[1:], flat[:-1])]:
        assert abs(np.corrcoef(a.flatten(), b.flatten())[0, 1]) < 4 / a.numel() ** 0.5


def test_noise_is_finite_for_every_word():
    words = torch.tensor([0, 1, 511, 512, 2**31, 2**32 - 512, 2**32 - 1])
    noise = compute_gumbel(words)
    assert noise.isfinite().all()
    assert noise.dtype == torch.float32
    assert (noise.diff() >= 0).all()


def test_a_token_of_probability_zero_is_never_drawn():
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randint(0, 3, (9,), generator=generator).float()
        weights[seed % 9] = 1.0
        words = torch.tensor([[0, 1, 2**31, 2**32 - 2, 2**32 - 1]])
        tokens = invert_cdf(weights.log().expand(1, 5, 9), words)
        cumulative = weights.double().cumsum(0) / weights.sum()
        assert (weights[tokens] > 0).all()
        assert (cumulative[tokens] >= words / 2**32 - 1e-8).all()
        assert torch.equal(tokens[0, [0, -1]], weights.nonzero().flatten()[[0, -1]])


def test_samples_of_earlier_random_numbers_are_not_mixed_with_new_ones(tmp_path):
    """A record without an entry for random numbers is of the time before Philox."""
    images = ModelImages(randomised(tiny_config("1,2")), "model", 4, SampleConfig(), 2)
    record = json.loads(json.dumps({"images": images.identity()}))
    assert compare_inputs(record, {"images": images.identity()}) == ((), ())
    del record["images"]["random numbers"]
    ((change,), unknown) = compare_inputs(record, {"images": images.identity()})
    assert change.startswith("images.random numbers was a Mersenne Twister for each image and scale, now Philox4x32-10")
    assert not unknown
