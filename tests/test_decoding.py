"""Decoding a batch in parts: the same images, in less memory, and the estimate of that memory."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nextscale.config.tokenizer import TokenizerConfig
from nextscale.pyramid import Pyramid
from nextscale.tokenizer.decoding import choose_at_once, estimate_decoder_bytes
from nextscale.tokenizer.tokenizer import Tokenizer
from tests.conftest import randomised, tiny_config

SHAPES = [
    {"base_channels": 32, "channel_multipliers": (1, 1, 2)},
    {"base_channels": 16, "channel_multipliers": (1, 2, 4), "res_blocks": 1},
    {"base_channels": 32, "channel_multipliers": (1,), "attention": False, "middle_attention": False},
    {"base_channels": 16, "channel_multipliers": (1, 1, 2, 2, 4)},
]


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors, made by operations on the CPU, that live at the same time."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()).data_ptr() not in self.seen:
                self.seen.add(storage.data_ptr())
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage.data_ptr(), storage.nbytes())
        return out

    def _free(self, address, size):
        self.live -= size
        self.seen.discard(address)


def measure_peak(tokenizer, canvas):
    with LiveBytes() as live:
        tokenizer.decode_canvas(canvas)
    return live.peak


def create_tokenizer(shape):
    config = replace(TokenizerConfig(vocab_size=32, code_width=4, norm_groups=8), **shape)
    return Tokenizer(config, Pyramid.parse("1,8")).eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_estimate_covers_the_maps_that_live_at_once(shape):
    tokenizer = create_tokenizer(shape)
    peak = measure_peak(tokenizer, tokenizer.new_canvas(1))
    estimate = estimate_decoder_bytes(tokenizer.config, (8, 8), torch.float32)
    assert 0.5 * estimate <= peak <= 1.05 * estimate


def test_parts_take_less_memory():
    tokenizer = create_tokenizer(SHAPES[0])
    canvas = tokenizer.new_canvas(8)
    whole = measure_peak(tokenizer, canvas)
    tokenizer.decode_batch = 2
    assert measure_peak(tokenizer, canvas) < 0.4 * whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_do_not_depend_on_the_parts(dtype):
    pipeline = randomised(tiny_config("1,2,4")).to("cpu", dtype).optimize()
    tokens = torch.randint(0, 32, (7, 21), generator=torch.Generator().manual_seed(0))
    whole = pipeline.tokenizer.decode(tokens)
    for size in (1, 2, 3, 7, 100):
        pipeline.tokenizer.decode_batch = size
        assert torch.equal(pipeline.tokenizer.decode(tokens), whole), size


def test_half_of_the_free_memory_is_used_and_one_image_is_always_decoded():
    assert [choose_at_once(free, 10) for free in (0, 19, 40, 2000)] == [1, 1, 2, 100]
