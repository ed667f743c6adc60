"""Attention between spikes: sums of products of whole numbers, without a softmax.

Tokens are [B, T, tokens, channels]. Operands that are counts of spikes give sums that
are whole numbers, exact in float32 up to 2**24, of which a neuron makes spikes again.
"""

from functools import partial

import jax
import jax.numpy as jnp

from spikejax.layers import Layer

_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


def self_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    neuron: Layer,
    *,
    heads: int,
    scale: float = 0.125,
) -> jax.Array:
    """Return spikes of the products of queries, keys and values (SSA).

    y = neuron(scale (q kᵀ) v) = neuron(scale q (kᵀ v)),  in each head

    Both orders give the same whole numbers; the one with fewer products is computed.

    Args:
        q, k: spikes [B, T, tokens, channels].
        v: spikes [B, T, tokens, features].
        neuron: layer of neurons, or an activation.
        heads: groups of channels, a divisor of channels and of features.
        scale: factor on the sums, > 0.

    Returns:
        spikes [B, T, tokens, features] in the type of q.

    Raises:
        ValueError: heads does not divide the channels.

    Reference: Zhou et al. 2022, arXiv:2209.15425 (Spikformer).
    """
    who, shape = "self_attention", v.shape
    q, k, v = (_split(who, spikes, heads) for spikes in (q, k, v))
    tokens, size, features = q.shape[2], q.shape[-1], v.shape[-1]
    # An operand of the second product may be as large as tokens * N^2, and accelerators
    # multiply float32 with 8 to 11 bits by default.
    exact = partial(_einsum, precision=jax.lax.Precision.HIGHEST)
    if 2 * size * features < tokens * (size + features):
        sums = _einsum("btnhd,btnhe->bthde", k, v)
        sums = exact("btnhd,bthde->btnhe", q, sums)
    else:
        sums = _einsum("btnhd,btmhd->bthnm", q, k)
        sums = exact("bthnm,btmhe->btnhe", sums, v)
    return neuron(scale * sums.reshape(shape)).astype(q.dtype)


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    neuron: Layer,
    *,
    heads: int,
    largest: float = 1.0,
) -> jax.Array:
    """Return spikes of ``self_attention`` with the scale of E-SpikeFormer.

    y = neuron(2 / sqrt(d) (q kᵀ) v / D³),  d channels per head

    Args:
        q, k, v, neuron, heads: as in ``self_attention``; v has more features than q.
        largest: D, the largest number of spikes in q, k and v. The paper divides the
            output of every neuron by it; whole numbers stay here, and are the same
            after a norm.

    Returns:
        spikes [B, T, tokens, features] in the type of q.

    Raises:
        ValueError: heads does not divide the channels.

    Reference: Yao et al. 2024, arXiv:2411.16061 (SDT-V3).
    """
    scale = 2 / (q.shape[-1] / heads) ** 0.5 / largest**3
    return self_attention(q, k, v, neuron, heads=heads, scale=scale)


def driven_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, neuron: Layer
) -> jax.Array:
    """Return the spikes of q in the channels where k and v fire together (SDSA).

    y = q ⊙ neuron(Σ_tokens k ⊙ v)

    Heads would change nothing, as each channel has a sum of its own.

    Args:
        q, k, v: spikes [B, T, tokens, channels].
        neuron: layer of neurons over the sums [B, T, channels].

    Returns:
        counts of spikes [B, T, tokens, channels]: products of whole numbers.

    Reference: Yao et al. 2023, arXiv:2307.01694 (Spike-driven Transformer).
    """
    # A contraction, so that energy counts it; XLA makes a sum of products of it.
    sums = _einsum("btnc,btnc->btc", k, v)
    return q * neuron(sums)[:, :, None].astype(q.dtype)


def token_attention(
    q: jax.Array, k: jax.Array, neuron: Layer, *, heads: int
) -> jax.Array:
    """Return the spikes of k in the tokens where q fires (Q-K token attention).

    y = neuron(Σ_channels q) ⊙ k,  in each head

    Args:
        q, k: spikes [B, T, tokens, channels].
        neuron: layer of neurons over the sums [B, T, tokens, heads].
        heads: groups of channels, a divisor of channels.

    Returns:
        counts of spikes [B, T, tokens, channels]: products of whole numbers.

    Raises:
        ValueError: heads does not divide the channels.

    Reference: Zhou et al. 2024, arXiv:2403.16552 (QKFormer).
    """
    q, split = (_split("token_attention", spikes, heads) for spikes in (q, k))
    fires = neuron(q.sum(-1, dtype=jnp.float32)).astype(k.dtype)
    return (split * fires[..., None]).reshape(k.shape)


def _split(who: str, xs: jax.Array, heads: int) -> jax.Array:
    """Return tokens as [B, T, tokens, heads, channels per head]."""
    if xs.ndim != 4 or heads < 1 or xs.shape[-1] % heads:
        raise ValueError(
            f"{who}: expected spikes [B, T, tokens, channels] with channels divisible "
            f"by heads, got shape {xs.shape} and {heads} heads. A map [B, T, H, W, C] "
            "is reshaped to [B, T, H * W, C]."
        )
    return xs.reshape(*xs.shape[:3], heads, -1)
