"""Rules that find the threshold of a layer from the activations of a ReLU network."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Rule = Callable[[jax.Array, int], jax.Array]  # (ReLU activations, levels) -> threshold
HALVINGS = 14  # of ten octaves below the maximum, to 0.05 %


def maximum(x: jax.Array, levels: int) -> jax.Array:
    """Return the largest activation.

    Args:
        x: ReLU activations, any shape.
        levels: p of the quantised activation; not used here.

    Reference: Diehl et al. 2015, doi:10.1109/IJCNN.2015.7280696.
    """
    return x.max()


def percentile(q: float = 99.9) -> Rule:
    """Return a rule: the q-th percentile of the activations.

    Args:
        q: in percent, above 1 up to 100.

    Raises:
        ValueError: q is out of its range, such as a fraction.

    Reference: Rueckauer et al. 2017, doi:10.3389/fnins.2017.00682.
    """
    if not 1 < q <= 100:
        raise ValueError(f"percentile: expected 1 < q <= 100, in percent, got {q}.")
    return lambda x, levels: jnp.percentile(x, q)


def least_error(x: jax.Array, levels: int) -> jax.Array:
    """Return the threshold, in hundredths of the maximum, of least squared error.

    Args: as in ``maximum``.

    Our choice, in the spirit of Li et al. 2021, arXiv:2106.06984.
    """
    candidates = x.max() * jnp.arange(1, 101) / 100

    def error(v_threshold: jax.Array) -> jax.Array:
        step = v_threshold / levels
        return ((step * jnp.clip(jnp.round(x / step), 0, levels) - x) ** 2).mean()

    return candidates[jax.lax.map(error, candidates).argmin()]


def least_squares(x: jax.Array, levels: int) -> jax.Array:
    """Return a threshold of least squared error, where its best scale is itself.

    q = clip(round(p x / theta), 0, p),  theta = p sum(x q) / sum(q^2)

    Found by bisection of the logarithm: the right side is above theta where clipping
    is too strong, and below where levels are too coarse. The iteration theta <- right
    side has the same fixed points, and with 15 levels is a third away after 30 steps.

    Args: as in ``maximum``.

    Reference: H-MT (AAAI 2026) has the right side in closed form, for a normal input.
    """
    largest = x.max()

    def halve(_: int, between: jax.Array) -> jax.Array:
        low, high = between
        theta = largest * 2 ** ((low + high) / 2)
        q = jnp.clip(jnp.round(levels * x / jnp.maximum(theta, 1e-30)), 0, levels)
        above = levels * (x * q).sum() > theta * (q * q).sum()
        middle = (low + high) / 2
        return jnp.where(above, jnp.array([middle, high]), jnp.array([low, middle]))

    between = jax.lax.fori_loop(0, HALVINGS, halve, jnp.array([-10.0, 0.0]))
    return largest * 2 ** between.mean()
