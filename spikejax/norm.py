"""Batch normalisation for spiking networks."""

import jax.numpy as jnp
from flax import nnx


def td_batch_norm(
    features: int,
    *,
    alpha: float = 1.0,
    v_threshold: float = 1.0,
    dtype: jnp.dtype | None = None,
    rngs: nnx.Rngs,
) -> nnx.BatchNorm:
    """Threshold-dependent batch normalisation (tdBN) over batch, time and space.

    y = scale (x - mean) / sqrt(var + 1e-5) + bias,  scale starts at alpha * v_threshold

    Inputs then have the standard deviation of the threshold, whatever the layer.

    Args:
        features: channels, the last axis.
        alpha: 1, or 1/sqrt(2) before a residual sum of two branches.
        v_threshold: threshold of the neurons that follow, > 0.
        dtype: of the result; statistics are float32, and so is the result by default.

    Reference: Zheng et al. 2021, arXiv:2011.05280, where the factor stands outside of
    the learned scale: the same function, and the same at the start of training.
    """
    return nnx.BatchNorm(
        features,
        momentum=0.9,
        scale_init=nnx.initializers.constant(alpha * v_threshold),
        dtype=dtype,
        rngs=rngs,
    )
