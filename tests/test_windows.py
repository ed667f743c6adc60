"""Windows: where they lie, and what stitching gives back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spikejax.nn.windows import overlap, split, stitch, tile, whole

MAP = jax.random.normal(jax.random.key(0), (2, 1, 8, 12, 3))


def test_tiles_are_the_quarters_in_reading_order():
    parts = split(MAP, tile)
    assert parts.shape == (2, 1, 4, 4, 6, 3)
    corners = [MAP[:, :, y : y + 4, x : x + 6] for y in (0, 4) for x in (0, 6)]
    for g, corner in enumerate(corners):
        np.testing.assert_array_equal(parts[:, :, g], corner)


def test_overlapping_windows_share_half_the_side():
    parts = split(MAP, overlap)
    assert parts.shape == (2, 1, 4, 6, 9, 3)
    np.testing.assert_array_equal(parts[:, :, 3], MAP[:, :, 2:, 3:])
    np.testing.assert_array_equal(parts[:, :, 0, :, 3:], parts[:, :, 1, :, :6])


def test_the_whole_map_is_one_window():
    assert split(MAP, whole).shape == (2, 1, 1, 8, 12, 3)
    tall = split(MAP, lambda side: 8)  # all of one side, a part of the other
    assert tall.shape == (2, 1, 2, 8, 8, 3)


@pytest.mark.parametrize("window", [tile, overlap, whole])
def test_stitching_what_was_split_gives_it_back(window):
    np.testing.assert_array_equal(stitch(split(MAP, window), (8, 12), window), MAP)


def test_a_constant_map_stays_constant():
    for window in (tile, overlap, whole):
        parts = split(jnp.full((1, 1, 16, 16, 1), 0.7), window)
        np.testing.assert_array_equal(stitch(parts, (16, 16), window), np.float32(0.7))


def test_where_windows_overlap_stitching_is_their_mean():
    parts = jnp.arange(1.0, 5).reshape(1, 1, 4, 1, 1, 1) * jnp.ones((1, 1, 4, 3, 3, 1))
    rows = stitch(parts, (4, 4), overlap)[0, 0, :, :, 0]
    assert rows.tolist() == [
        [1.0, 1.5, 1.5, 2.0],
        [2.0, 2.5, 2.5, 3.0],
        [2.0, 2.5, 2.5, 3.0],
        [3.0, 3.5, 3.5, 4.0],
    ]


@pytest.mark.parametrize(
    ("window", "side", "match"),
    [
        (tile, 7, "tile: expected a map with even sides, got 7"),
        (overlap, 6, "overlap: expected a map whose sides are multiples of 4, got 6"),
        (lambda _: 9, 8, "expected windows from half the map to all of it, got 9 for"),
        (lambda _: 3, 8, "expected windows from half the map to all of it, got 3 for"),
    ],
)
def test_windows_that_do_not_fit_are_refused(window, side, match):
    with pytest.raises(ValueError, match=match):
        split(jnp.zeros((1, 1, side, side, 1)), window)
