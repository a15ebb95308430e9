import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextscale.common.errors import UserError
from nextscale.pyramid import PYRAMID_256, PYRAMID_512, PYRAMID_1024, Pyramid
from nextscale.transformer.context import block_causal_mask

sides = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6).map(
    lambda s: [*s, (max(h for h, _ in s), max(w for _, w in s))]
)


def test_published_pyramids():
    assert [p.length for p in (PYRAMID_256, PYRAMID_512, PYRAMID_1024)] == [680, 2240, 9451]


@given(sides)
def test_positions_partition_the_sequence(sides):
    pyramid = Pyramid(tuple(sides))
    positions = [p for start, end in pyramid.spans for p in range(start, end)]
    assert positions == list(range(pyramid.length))
    for k, (start, end) in enumerate(pyramid.spans):
        assert end - start == sides[k][0] * sides[k][1]
        assert set(pyramid.scale_of_L[start:end]) == {k}


@given(sides)
def test_text_form_round_trips(sides):
    assert Pyramid.parse(str(Pyramid(tuple(sides)))) == Pyramid(tuple(sides))


@given(st.integers(1, 40), st.integers(1, 12))
def test_phi_index_is_the_nearest_tick(scales, num_phi):
    """Against the rule written with NumPy, as the official code has it: exact ties included."""
    n = num_phi
    ticks = np.linspace(1 / 3 / n, 1 - 1 / 3 / n, n) if n == 4 else np.linspace(1 / 2 / n, 1 - 1 / 2 / n, n)
    expected = [int(np.argmin(np.abs(ticks - k / max(scales - 1, 1)))) for k in range(scales)]
    assert list(Pyramid.parse("1 " * scales).phi_index(num_phi)) == expected


def test_phi_index_where_ties_are_exact():
    known = {10: [0, 0, 1, 1, 1, 2, 2, 3, 3, 3], 7: [0, 0, 1, 2, 2, 3, 3], 4: [0, 1, 2, 3], 3: [0, 2, 3], 1: [0]}
    for scales, expected in known.items():
        assert list(Pyramid.parse("1 " * scales).phi_index(4)) == expected


@given(sides)
def test_mask_against_a_loop(sides):
    pyramid = Pyramid(tuple(sides))
    mask = block_causal_mask(pyramid, torch.device("cpu"))
    of = pyramid.scale_of_L
    assert mask.tolist() == [[of[j] <= of[i] for j in range(pyramid.length)] for i in range(pyramid.length)]


def test_progress_runs_from_0_to_1_and_is_defined_for_one_scale():
    assert [Pyramid.parse("1,2,4").progress(k) for k in range(3)] == [0, 0.5, 1]
    assert Pyramid.parse("4").progress(0) == 1


@pytest.mark.parametrize("text", ["", "0,1", "1,-2", "1,x", "1x2x3", "1.5"])
def test_bad_sides_are_named(text):
    with pytest.raises(UserError, match="pyramid needs|is no side"):
        Pyramid.parse(text)


def test_a_map_larger_than_the_last_is_refused():
    with pytest.raises(UserError, match="scale 1 of the pyramid is 5x2, larger than the last one, 4x4"):
        Pyramid.parse("1,5x2,4")


def test_counts_to_square_sides():
    assert Pyramid.from_counts([1, 4, 9]) == Pyramid.parse("1,2,3")
    assert Pyramid.from_counts([1, 6]) is None
