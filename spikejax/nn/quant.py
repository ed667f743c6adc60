"""Quantised ReLU that is trained with noise, and the spiking neuron that it becomes.

A network with ``QuantReLU`` for its activation has the answers of a spiking network at
2^bits - 1 time steps, except for the order in which spikes arrive. Noise in training
stands for that order: Noise Adaptor, Li et al. 2024, arXiv:2411.17431.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

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
        scale: s > 0, a number, or an array in the shape of the last axes of x.
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
    return cast(jax.Array, y), (x / scale + noise, scale, levels)


def _backward(
    rounding: Rounding | None, scale_gradient: float, kept: tuple, g: jax.Array
) -> tuple[jax.Array | None, ...]:
    u, scale, levels = kept
    inside = (u > 0) & (u < levels)
    # Outside, the clipped value is 0 or p.
    d = _quantise(u, levels, rounding) - jnp.where(inside, u, 0)
    slopes = (g * d).reshape(-1, *jnp.shape(scale)).sum(0)
    return g * inside, scale_gradient * slopes, None, None


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
        levels: p, any number of levels in place of 2^b - 1.
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
        levels: int | None = None,
        noise: float = 0.0,
        round_noise: bool = True,
        rounding: Rounding = half_even,
        scale: float | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        known, own = bits in range(1, 9), levels is None or levels >= 1
        of_bits = 2**bits - 1 if known else 1
        self.levels = of_bits if levels is None else max(1, levels)
        start = INITIAL_THRESHOLD / self.levels if scale is None else scale
        for right, expected, got in (
            (known, "1 to 8 bits", repr(bits)),
            (own, "1 level or more", levels),
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
        # Of currents: quantises x itself, to the levels -p to p; see ``calibrate``.
        self.signed = False
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
        size = abs(xs) if self.signed else xs
        ys = quantised_relu(size, scale, noise, levels, rounding, factor)
        return jnp.sign(xs) * ys if self.signed else ys

    def __call__(self, xs: jax.Array) -> jax.Array:
        """Return quantised activations, in the shape and type of xs [B, ...]."""
        return self.quantise(xs, self.scale[...], self.key())


class SignedParams(NamedTuple):
    """Parameters of ``signed``.

    thresholds: N thresholds of spikes up and down, the smallest one last.
    amounts: what these 2N spikes take from the membrane: thresholds, -thresholds.
    lowest: lower bound of the sum of all spikes so far: 0 for a ReLU, else -inf.
    """

    thresholds: Sequence[Number]
    amounts: Sequence[Number]
    lowest: Number


def signed(
    params: SignedParams,
    state: tuple[jax.Array, jax.Array],
    x: jax.Array,
    options: NeuronOptions,
) -> tuple[tuple[jax.Array, jax.Array], neurons.Trains]:
    """Compute one step of a neuron that takes spikes back by negative ones.

    u = v + x,  up = cascade(u + theta_N / 2)
    down = cascade(min(theta_N / 2 - u, total - lowest))
    a = sum of up - sum of down,  v' = u - a,  total' = total + a

    So the total is that of one rounding of the whole input, as long as the N spikes of
    a step can follow it, in whatever order the input comes.

    Args:
        params: thresholds, amounts, and lowest.
        state: membrane, and the sum of all spikes so far; both start at 0.
        x: input current.
        options: see ``NeuronOptions``; reset is soft.

    Returns:
        the state, and 2N trains: N up and N down.

    Reference: one membrane for both signs is our choice. Signed spikes that take back
    earlier ones: Wang et al. 2022, doi:10.24963/ijcai.2022/347.
    """
    v, total = state
    u, half = v + x, params.thresholds[-1] / 2
    plain, zero = NeuronParams(0.0, params.thresholds), jnp.zeros_like(u)
    _, up = neurons.cascade(plain, zero, u + half, options)
    back = jnp.minimum(half - u, total - params.lowest)
    _, down = neurons.cascade(plain, zero, back, options)
    pairs = zip(params.amounts, (*up, *down), strict=True)
    amount = sum((a * z for a, z in pairs), zero)
    return (neurons.reset(u, 0.0, amount, options), total + amount), (*up, *down)


class ScaledIF(Neuron):
    """Layer of integrate-and-fire neurons whose rate is a quantised ReLU.

    V[0] = v_threshold / 2,  U = V[t-1] + x,  Z = H(U - v_threshold)
    V[t] = U - v_threshold Z,  output v_threshold Z

    The mean output over T steps of a constant input z in [0, v_threshold] is
    clip(floor(z T / v_threshold + 1/2), 0, T) v_threshold / T. N thresholds, at the
    multiples of v_threshold, make N such steps in one: the input counts N times, and
    each of the up to N spikes is v_threshold / N.

    With ``dyadic``, N halving thresholds make 2^N - 1 such steps in one, from N spikes
    of the sizes 2^(N-1) to 1 times v_threshold / (2^N - 1). With ``lowest``, negative
    spikes take back what came too early: see ``signed``.

    The membrane is held in units of the largest spike, v_threshold / N without
    ``dyadic``, so its thresholds are 1 to N. Rectangles between them are its surrogate:
    in one step its gradients are those of a ``QuantReLU`` with N levels.

    Args:
        v_threshold: > 0, the largest mean output; a number, or one per channel.
        num_thresholds: N.
        dyadic: whether thresholds halve.
        lowest: None for spikes that stay, 0 for a ReLU that takes spikes back, -inf for
            the staircase of x itself, -v_threshold to v_threshold.

    Raises:
        ValueError: an argument is out of its range.

    Reference: dyadic thresholds are those of H-MT, Hao et al. 2024.
    """

    def __init__(
        self,
        v_threshold: Number = 1.0,
        num_thresholds: int = 1,
        *,
        dyadic: bool = False,
        lowest: float | None = None,
    ):
        neurons.check_thresholds("ScaledIF", [v_threshold], rising=False)
        make = neurons.dyadic_thresholds if dyadic else neurons.repeated_thresholds
        sizes, self.dyadic = make(num_thresholds), dyadic
        cell, params = neurons.cascade, NeuronParams(0.0, sizes)
        start, v_start = None, sizes[-1] / 2  # the rate rounds where it would floor
        if lowest is not None:
            amounts = (*sizes, *(-size for size in sizes))
            cell, start, v_start = signed, neurons.rest_both, 0.0
            params = SignedParams(sizes, amounts, float(lowest))
        elif not dyadic:
            cell = neurons.parallel
            params = NeuronParams(0.0, neurons.equal_thresholds(num_thresholds))
        options = NeuronOptions(
            decay_input=False, detach_reset=True, surrogate=surrogate.rectangle()
        )
        unit = nnx.Param(jnp.asarray(v_threshold / sum(sizes), jnp.float32))
        super().__init__(cell, params, options, start=start, v_start=v_start, unit=unit)
        self.levels = 2**num_thresholds - 1 if dyadic else num_thresholds
        self.largest = float(sum(sizes))
        self.is_signed = lowest == -math.inf

    @property
    def v_threshold(self) -> jax.Array:
        """Largest mean output, a number or one per channel."""
        return self.unit[...] * self.largest

    def count(self, level: jax.Array) -> jax.Array:
        """Return the spikes of outputs, given as whole multiples of the smallest."""
        level = jnp.round(abs(level))
        if not self.dyadic:
            return level
        return jax.lax.population_count(level.astype(jnp.int32)).astype(jnp.float32)
