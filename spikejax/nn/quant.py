"""Quantised ReLU that is trained with noise, and the spiking neuron that it becomes.

A network with ``QuantReLU`` for its activation has the answers of a spiking network at
2^bits - 1 time steps, except for the order in which spikes arrive. Noise in training
stands for that order: Noise Adaptor, Li et al. 2024, arXiv:2411.17431.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax import neurons, surrogate
from spikejax.layers import Neuron
from spikejax.neurons import NeuronOptions, NeuronParams, Number

Rounding = Callable[[jax.Array], jax.Array]

INITIAL_THRESHOLD = 1.5  # standard deviations of a normalised input; our choice


# Not jnp.round itself, which cannot be pickled.
def half_even(x: jax.Array) -> jax.Array:
    """Return x rounded, ties to even."""
    return jnp.round(x)


def half_up(x: jax.Array) -> jax.Array:
    """Return floor(x + 1/2): ties go up, as in a neuron started at half a threshold."""
    return jnp.floor(x + 0.5)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def quantise(
    x: jax.Array,
    scale: Number,
    noise: Number,
    levels: Number,
    rounding: Rounding | None = half_even,
    scale_gradient: float = 1.0,
) -> jax.Array:
    """Return a quantised ReLU of x, with a straight-through gradient.

    u = x / s + noise,  q = round(clip(u, 0, p)),  y = s q
    dy/dx = [0 < u < p]
    dy/ds = c d,  d = q - u where 0 < u < p,  p above,  0 below

    The gradient treats the noise as a part of the input.

    Args:
        x: any shape, float32.
        scale: s > 0, a scalar.
        noise: a number, or an array in the shape of x; gets no gradient.
        levels: p, the highest level, a float; gets no gradient.
        rounding: function to whole numbers; None does not round.
        scale_gradient: c.

    Returns:
        y in the shape of x.

    Reference: LSQ, Esser et al. 2019, arXiv:1902.08153.
    """
    return _quantise(x / scale + noise, levels, rounding) * scale


def _quantise(u: jax.Array, levels: Number, rounding: Rounding | None) -> jax.Array:
    clipped = jnp.clip(u, 0, levels)
    return clipped if rounding is None else rounding(clipped)


def _forward(
    x: jax.Array, scale: Number, noise: Number, levels: Number, *options: Any
) -> tuple[jax.Array, tuple]:
    y = quantise(x, scale, noise, levels, *options)
    return cast(jax.Array, y), (x / scale + noise, levels)


def _backward(
    rounding: Rounding | None, scale_gradient: float, kept: tuple, g: jax.Array
) -> tuple[jax.Array | None, ...]:
    u, levels = kept
    inside = (u > 0) & (u < levels)
    # Outside, the clipped value is 0 or p.
    d = _quantise(u, levels, rounding) - jnp.where(inside, u, 0)
    return g * inside, scale_gradient * (g * d).sum(), None, None


quantise.defvjp(_forward, _backward)


# The tracer finds quantised ReLUs in a jaxpr by this name, and the levels among its
# operands: a jit of a function is one equation.
@partial(jax.jit, static_argnums=(4, 5))
def quantised_relu(x: jax.Array, *others: Any) -> jax.Array:
    """Return ``quantise`` of x in any floating point type, computed in float32."""
    return cast(jax.Array, quantise(x.astype(jnp.float32), *others)).astype(x.dtype)


class QuantReLU(nnx.Module):
    """ReLU quantised to b bits, with a learned scale s, and noise while it trains.

    y = s round(clip(x / s + alpha eps, 0, p)),  p = 2^b - 1,  eps ~ U(-1/2, 1/2)

    Gradients: see ``quantise``; that of s is scaled by 1 / sqrt(B p), where B is the
    first axis of the input, the images of a step over all devices. (The LSQ paper
    divides by the number of activations of one image instead.)

    The rounding of the noisy answer is our choice: with amplitude 1 it is unbiased,
    E[y] = s clip(x / s, 0, p). The formula that is printed of the paper has no
    rounding: that is ``round_noise=False``. In evaluation mode there is no noise, and
    the answer is rounded in either case.

    Args:
        bits: b, 1 to 8.
        noise: amplitude alpha, >= 0. Above 1, inputs below zero spike too.
        round_noise: whether the noisy answer is rounded.
        rounding: half_even, or half_up, which rounds ties as the spiking neuron does.
        scale: s at the start; by default s p = 1.5. ``calibrate`` finds a better one.
        rngs: source of noise, its stream 'noise'. Give all layers the same nnx.Rngs:
            each draws a stream of its own from it.

    Raises:
        ValueError: an argument is out of its range, or noise has no rngs.

    Reference: Li et al. 2024, arXiv:2411.17431; Esser et al. 2019, arXiv:1902.08153.
    """

    def __init__(
        self,
        bits: int = 2,
        *,
        noise: float = 0.0,
        round_noise: bool = True,
        rounding: Rounding = half_even,
        scale: float | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        known = bits in range(1, 9)
        self.levels = 2**bits - 1 if known else 1
        start = INITIAL_THRESHOLD / self.levels if scale is None else scale
        for right, expected, got in (
            (known, "1 to 8 bits", repr(bits)),
            (callable(rounding), "a rounding such as half_even", rounding),
            (0 <= noise < math.inf, "noise of 0 or more", noise),
            (not noise or rngs, f"rngs=nnx.Rngs(noise=seed) with noise {noise}", rngs),
            (0 < start < math.inf, "a positive scale", scale),
        ):
            if not right:
                raise ValueError(f"QuantReLU: expected {expected}, got {got}.")
        self.scale = nnx.Param(jnp.asarray(start, jnp.float32))
        self.noise = noise
        self.round_noise = round_noise
        self.rounding: Rounding | None = rounding
        self.deterministic = False  # set by model.eval() and model.train()
        # A fork: layers that share rngs draw different noise, in any order of calls.
        self.rngs = rngs["noise"].fork() if noise and rngs is not None else None

    def key(self) -> jax.Array | None:
        """Return a new random key for the noise of one call, or None without noise."""
        return None if self.rngs is None or self.deterministic else self.rngs()

    def quantise(
        self, xs: jax.Array, scale: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """Return the activations of xs [B, ...] for a scale s, and a key of ``key``."""
        noise, rounding = 0.0, self.rounding
        if key is not None:
            # In float32 whatever the type of xs: bfloat16 has 256 random numbers.
            noise = self.noise * (jax.random.uniform(key, xs.shape) - 0.5)
            rounding = rounding if self.round_noise else None
        levels = float(self.levels)
        factor = 1 / math.sqrt(xs.shape[0] * levels)
        return quantised_relu(xs, scale, noise, levels, rounding, factor)

    def __call__(self, xs: jax.Array) -> jax.Array:
        """Return quantised activations, in the shape and type of xs [B, ...]."""
        return self.quantise(xs, self.scale[...], self.key())


class ScaledIF(Neuron):
    """Layer of integrate-and-fire neurons whose rate is a quantised ReLU.

    V[0] = v_threshold / 2,  U = V[t-1] + x,  Z = H(U - v_threshold)
    V[t] = U - v_threshold Z,  output v_threshold Z

    The mean output over T steps of a constant input z in [0, v_threshold] is
    clip(floor(z T / v_threshold + 1/2), 0, T) v_threshold / T. N thresholds, at the
    multiples of v_threshold, make N such steps in one: the input counts N times, and
    each of the up to N spikes is v_threshold / N.

    The membrane is held in units of one spike, v_threshold / N, so its thresholds are 1
    to N. Rectangles between them are its surrogate: in one step its gradients are those
    of a ``QuantReLU`` with N levels.

    Args:
        v_threshold: > 0.
        num_thresholds: N.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, v_threshold: Number = 1.0, num_thresholds: int = 1):
        neurons.check_thresholds("ScaledIF", [v_threshold], rising=False)
        super().__init__(
            neurons.parallel,
            NeuronParams(0.0, neurons.equal_thresholds(num_thresholds)),
            NeuronOptions(
                decay_input=False, detach_reset=True, surrogate=surrogate.rectangle()
            ),
            v_start=0.5,  # half a threshold: the rate rounds where it would floor
            unit=nnx.Param(jnp.asarray(v_threshold / num_thresholds, jnp.float32)),
        )
