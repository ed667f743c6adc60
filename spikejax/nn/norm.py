"""Batch normalisation for spiking networks."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx


def td_batch_norm(
    features: int,
    *,
    alpha: float = 1.0,
    v_threshold: float = 1.0,
    epsilon: float = 1e-5,
    dtype: jnp.dtype | None = None,
    layer: Callable[..., nnx.BatchNorm] = nnx.BatchNorm,
    rngs: nnx.Rngs,
) -> nnx.BatchNorm:
    """Make a threshold-dependent batch norm (tdBN) over batch, time and space.

    y = scale (x - mean) / sqrt(var + epsilon) + bias
    scale starts at alpha * v_threshold

    The currents of every layer then start with the threshold as standard deviation.

    Args:
        features: channels, the last axis.
        alpha: 1, or 1/sqrt(2) before a residual sum of two branches.
        v_threshold: threshold of the neurons that follow, > 0.
        epsilon: added to the variance, > 0.
        dtype: of the result; statistics are float32, and so is the result by default.
        layer: nnx.BatchNorm, or a class with its arguments.
        rngs: source of the parameters.

    Returns:
        the layer, with moving averages of momentum 0.9.

    Reference: Zheng et al. 2021, arXiv:2011.05280.
    """
    return layer(
        features,
        # Flax's default of 0.99 lags behind in runs of a few epochs; 0.9 is PyTorch's.
        momentum=0.9,
        epsilon=epsilon,
        # The paper multiplies by a constant outside of the learned scale. A start value
        # computes the same function, and the norm stays one that folds and exports.
        scale_init=nnx.initializers.constant(alpha * v_threshold),
        dtype=dtype,
        rngs=rngs,
    )
