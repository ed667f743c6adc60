"""Quantised ReLU that is trained with noise, and the spiking neuron that it becomes.

A network with ``QuantReLU`` for its activation has the answers of a spiking network at
2^bits - 1 time steps, but for the order in which spikes arrive. Noise in training
stands for that order: Noise Adaptor, Li et al. 2024, arXiv:2411.17431.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax import neurons
from spikejax.layers import Neuron
from spikejax.neurons import NeuronOptions, NeuronParams

Law = Callable[[jax.Array, tuple[int, ...]], jax.Array]  # (rng, shape) -> noise
Rounding = Callable[[jax.Array], jax.Array]

INITIAL_THRESHOLD = 1.5  # standard deviations of a normalised input; our choice


def uniform(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Noise from U(-1/2, 1/2): one level wide at amplitude 1."""
    return jax.random.uniform(rng, shape, minval=-0.5, maxval=0.5)


def gaussian(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Noise from N(0, 1)."""
    return jax.random.normal(rng, shape)


def half_up(x: jax.Array) -> jax.Array:
    """floor(x + 1/2): ties go up, as in a neuron that starts at half its threshold."""
    return jnp.floor(x + 0.5)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def quantise(
    x: jax.Array,
    scale: jax.Array,
    noise: jax.Array | float,
    levels: int,
    rounding: Rounding | None = jnp.round,
    scale_gradient: float = 1.0,
) -> jax.Array:
    """Quantised ReLU with a straight-through gradient.

    u = x / s + noise,  q = round(clip(u, 0, p)),  y = s q
    dy/dx = [0 < u < p]
    dy/ds = c d,  d = q - u where 0 < u < p,  p above,  0 below

    The gradient takes the noise for a part of the input.

    Args:
        x: any shape, float32.
        scale: s > 0, a scalar.
        noise: a number, or an array in the shape of x; gets no gradient.
        levels: p, the highest level.
        rounding: function to whole numbers; None leaves clip(u, 0, p) as it is.
        scale_gradient: c.

    Reference: LSQ, Esser et al. 2019, arXiv:1902.08153.
    """
    return _quantise(x / scale + noise, levels, rounding) * scale


def _quantise(u, levels, rounding):
    clipped = jnp.clip(u, 0, levels)
    return clipped if rounding is None else rounding(clipped)


def _forward(x, scale, noise, levels, rounding, scale_gradient):
    y = quantise(x, scale, noise, levels, rounding, scale_gradient)
    return y, (x / scale + noise, jnp.zeros_like(noise))


def _backward(levels, rounding, scale_gradient, kept, g):
    u, no_gradient = kept
    inside = (u > 0) & (u < levels)
    d = jnp.where(inside, _quantise(u, levels, rounding) - u, levels * (u >= levels))
    return g * inside, scale_gradient * (g * d).sum(), no_gradient


quantise.defvjp(_forward, _backward)


class QuantReLU(nnx.Module):
    """ReLU quantised to b bits, with a learned scale s, and noise while it trains.

    y = s round(clip(x / s + alpha eps, 0, p)),  p = 2^b - 1,  eps ~ law

    Gradients: see ``quantise``; that of s is scaled by 1 / sqrt(B p), where B is the
    first axis of the input, the images of a step over all devices. (The LSQ paper
    divides by the number of activations of one image instead.)

    The noise is our choice: with uniform noise of amplitude 1 the answer is unbiased,
    E[y] = s clip(x / s, 0, p). What is printed of the paper has no rounding: that is
    ``round_noise=False``. In evaluation mode (``model.eval()``) there is no noise, and
    the answer is rounded in either case. ``qcfs`` makes the other common kind.

    Args:
        bits: b, 1 to 8.
        levels: p, where it is not 2^b - 1.
        noise: amplitude alpha, >= 0. Spikes that should not be come only above 1.
        law: uniform, gaussian, or any (rng, shape) -> noise.
        round_noise: whether the noisy answer is rounded.
        rounding: jnp.round takes ties to even, half_up takes them up as the spiking
            neuron does.
        scale_gradient: whether the gradient of s is scaled.
        scale: s at the start; by default s p = 1.5. ``calibrate`` finds a better one.
        rngs: source of noise, its stream 'noise'. Give all layers the same nnx.Rngs:
            each draws a stream of its own from it.

    Reference: Li et al. 2024, arXiv:2411.17431; Esser et al. 2019, arXiv:1902.08153.
    """

    def __init__(
        self,
        bits: int = 2,
        *,
        levels: int | None = None,
        noise: float = 0.0,
        law: Law = uniform,
        round_noise: bool = True,
        rounding: Rounding = jnp.round,
        scale_gradient: bool = True,
        scale: float | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        if bits not in range(1, 9):
            raise ValueError(f"QuantReLU: expected 1 to 8 bits, got {bits}.")
        self.levels = 2**bits - 1 if levels is None else levels
        if self.levels < 1:
            raise ValueError(f"QuantReLU: expected at least 1 level, got {levels}.")
        if not 0 <= noise < math.inf:
            raise ValueError(f"QuantReLU: expected noise of 0 or more, got {noise}.")
        if noise and rngs is None:
            raise ValueError(
                f"QuantReLU: expected rngs with noise {noise}, got none. "
                "Give rngs=nnx.Rngs(noise=seed)."
            )
        start = INITIAL_THRESHOLD / self.levels if scale is None else scale
        if not 0 < start < math.inf:
            raise ValueError(f"QuantReLU: expected a positive scale, got {scale}.")
        self.scale = nnx.Param(jnp.asarray(start, jnp.float32))
        self.noise = noise
        self.law = law
        self.round_noise = round_noise
        self.rounding = rounding
        self.scale_gradient = scale_gradient
        self.deterministic = False  # what model.eval() and model.train() set
        self.rngs = rngs["noise"].fork() if noise and rngs is not None else None

    def __call__(self, xs: jax.Array) -> jax.Array:
        """Quantised activations, in the shape and type of xs [B, ...]."""
        noise, rounding = 0.0, self.rounding
        if self.rngs is not None and not self.deterministic:
            noise = self.noise * self.law(self.rngs(), xs.shape)
            rounding = rounding if self.round_noise else None
        factor = 1 / math.sqrt(xs.shape[0] * self.levels) if self.scale_gradient else 1
        ys: jax.Array = quantise(
            xs.astype(jnp.float32),
            self.scale[...],
            noise,
            self.levels,
            rounding,
            factor,
        )
        return ys.astype(xs.dtype)


def qcfs(levels: int = 8, **options) -> QuantReLU:
    """Quantisation, clip, floor, shift: a QuantReLU with ties up and plain gradients.

    y = lambda clip(floor(x L / lambda + 1/2) / L, 0, 1),  lambda = s L learned

    With ``noise=sigma, law=gaussian`` noise stands for the residual error of
    conversion, after arXiv:2404.17456, of which we know the abstract.

    Args:
        levels: L.
        options: of QuantReLU.

    Reference: Bu et al. 2023, arXiv:2303.04347, where lambda starts at 8.
    """
    options = {"rounding": half_up, "scale_gradient": False} | options
    return QuantReLU(levels=levels, **options)


class ScaledIF(Neuron):
    """Integrate-and-fire neurons whose rate is a quantised ReLU.

    V[0] = v_threshold / 2,  U = V[t-1] + x,  Z = H(U - v_threshold)
    V[t] = U - v_threshold Z,  output v_threshold Z

    The mean output over T steps of a constant input z in [0, v_threshold] is
    clip(floor(z T / v_threshold + 1/2), 0, T) v_threshold / T. N thresholds, at the
    multiples of v_threshold, make N such steps in one: the input counts N times, and
    each of the up to N spikes is v_threshold / N.

    The membrane is held in units of one spike, v_threshold / N, so its thresholds are 1
    to N.

    Args:
        v_threshold: > 0.
        num_thresholds: N.
    """

    def __init__(self, v_threshold: float = 1.0, num_thresholds: int = 1):
        neurons.check_thresholds("ScaledIF", [v_threshold], rising=False)
        super().__init__(
            neurons.parallel,
            NeuronParams(0.0, neurons.equal_thresholds(num_thresholds)),
            NeuronOptions(decay_input=False),
            v_start=0.5,  # half a threshold: the rate rounds where it would floor
            unit=nnx.Param(jnp.asarray(v_threshold / num_thresholds, jnp.float32)),
        )
