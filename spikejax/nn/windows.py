"""Four windows of a map [..., H, W, C], cut out and stitched back.

The windows stand in its corners, in the order top left, top right, bottom left, bottom
right: tiles of half the side, or overlapping ones of three quarters.

Reference: Training a General SNN with Improved Efficiency and Minimum Latency, 2024,
arXiv:2401.10843.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Window = Callable[[int], int]  # side of the map -> side of a window


def tile(side: int) -> int:
    """Half the side: the windows do not overlap."""
    if side % 2:
        raise ValueError(
            f"tile: expected a map with even sides, got {side}. Take images whose "
            "sides stay even in every stage, such as 32 or 64."
        )
    return side // 2


def overlap(side: int) -> int:
    """Three quarters of the side: windows share a band of half the side."""
    if side % 4:
        raise ValueError(
            f"overlap: expected a map whose sides are multiples of 4, got {side}. Take "
            "tile for smaller maps."
        )
    return 3 * side // 4


def whole(side: int) -> int:
    """The side: one window, the map itself."""
    return side


def split(xs: jax.Array, window: Window) -> jax.Array:
    """The windows [..., G, h, w, C] of maps [..., H, W, C]; G is 4, or 1 for the whole.

    Args:
        xs: maps.
        window: tile, overlap, whole, or any (side of a map) -> side of a window, from
            half the side to all of it.
    """
    height, width, corners = _layout(xs.shape[-3:-1], window)
    parts = [xs[..., y : y + height, x : x + width, :] for y, x in corners]
    return jnp.stack(parts, -4)


def stitch(parts: jax.Array, sides: tuple[int, int], window: Window) -> jax.Array:
    """Maps [..., H, W, C] from windows: where several overlap, their mean.

    Args:
        parts: windows [..., G, h, w, C] as ``split`` gives them.
        sides: H and W.
        window: as in ``split``.
    """
    height, width, corners = _layout(sides, window)
    covered = np.zeros((*sides, 1), np.float32)
    total = 0.0
    for g, (y, x) in enumerate(corners):
        covered[y : y + height, x : x + width] += 1
        edges = ((y, sides[0] - height - y), (x, sides[1] - width - x), (0, 0))
        free = ((0, 0),) * (parts.ndim - 4)
        total = total + jnp.pad(parts[..., g, :, :, :], free + edges)
    return total * jnp.asarray(1 / covered, parts.dtype)  # 1, 1/2 and 1/4 are exact


def _layout(sides, window):
    """Height and width of a window, and the top left pixel of each."""
    size = []
    for side in sides:
        length = window(side)
        if not (side + 1) // 2 <= length <= side:
            raise ValueError(
                f"windows: expected windows from half the map to all of it, got "
                f"{length} for a map of side {side}. Take tile, overlap or whole."
            )
        size.append(length)
    below, right = sides[0] - size[0], sides[1] - size[1]
    corners = [(y, x) for y in (0, below) for x in (0, right)]
    return *size, list(dict.fromkeys(corners))
