"""The Heaviside step of a spiking neuron, with a surrogate derivative for training.

Forward every function here is H(x) = 1 for x >= 0, else 0. Backward the derivative of
H, which is zero almost everywhere, is replaced by a bump around zero. ``alpha`` sets
its inverse width: the larger, the narrower.

    spike = surrogate.atan(alpha=2.0)
    z = spike(u - v_threshold)
"""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.scipy.special import expit

Spike = Callable[[jax.Array], jax.Array]


def heaviside(derivative: Callable[[jax.Array], jax.Array]) -> Spike:
    """Heaviside step H(x) = [x >= 0] whose gradient is ``derivative(x)``.

    Args:
        derivative: elementwise function, keeps the shape.

    Returns:
        spike(x), in {0, 1}, of the shape and dtype of x. Keep it: a new one is a new
        function to ``jax.jit`` and compiles again.

    Reference: Neftci, Mostafa, Zenke 2019, arXiv:1901.09948.
    """

    @jax.custom_vjp
    def spike(x):
        return (x >= 0).astype(x.dtype)

    spike.defvjp(
        lambda x: (spike(x), x), lambda x, g: ((g * derivative(x)).astype(x.dtype),)
    )
    return spike


def _surrogate(derivative):
    """Turn derivative(x, alpha) into a constructor that checks and remembers alpha."""

    @cache
    def build(alpha: float) -> Spike:
        if not alpha > 0:
            raise ValueError(
                f"surrogate: expected alpha > 0, got {alpha}. "
                "It is the inverse width of the surrogate derivative."
            )
        return heaviside(lambda x: derivative(x, alpha))

    return lambda alpha: build(float(alpha))  # cache tells 2 from 2.0


_atan = _surrogate(lambda x, a: a / 2 / (1 + (jnp.pi / 2 * a * x) ** 2))
_sigmoid = _surrogate(lambda x, a: a * expit(a * x) * expit(-a * x))
_triangle = _surrogate(lambda x, a: a * jnp.maximum(0, 1 - a * jnp.abs(x)))
_rectangle = _surrogate(lambda x, a: a * (jnp.abs(x) < 0.5 / a))
_fast_sigmoid = _surrogate(lambda x, a: 1 / (1 + a * jnp.abs(x)) ** 2)
_piecewise_exponential = _surrogate(lambda x, a: a / 2 * jnp.exp(-a * jnp.abs(x)))
_erf = _surrogate(lambda x, a: a / jnp.sqrt(jnp.pi) * jnp.exp(-((a * x) ** 2)))


def atan(alpha: float = 2.0) -> Spike:
    """H'(x) = alpha/2 / (1 + (pi/2 alpha x)^2). Fang et al. 2021, arXiv:2007.05785."""
    return _atan(alpha)


def sigmoid(alpha: float = 4.0) -> Spike:
    """H'(x) = alpha s(alpha x) (1 - s(alpha x)), s the logistic function.

    Reference: Zenke and Vogels 2021, doi:10.1162/neco_a_01367.
    """
    return _sigmoid(alpha)


def triangle(alpha: float = 1.0) -> Spike:
    """H'(x) = alpha max(0, 1 - alpha |x|). Bellec et al. 2018, arXiv:1803.09574."""
    return _triangle(alpha)


def rectangle(alpha: float = 1.0) -> Spike:
    """H'(x) = alpha where |x| < 1 / (2 alpha). Wu et al. 2018, arXiv:1706.02609."""
    return _rectangle(alpha)


def fast_sigmoid(alpha: float = 10.0) -> Spike:
    """H'(x) = 1 / (1 + alpha |x|)^2, SuperSpike. Zenke, Ganguli 2018, arXiv:1705.11146.

    Unlike the others its integral is 2 / alpha, not 1: its height at zero is kept at 1.
    """
    return _fast_sigmoid(alpha)


def piecewise_exponential(alpha: float = 1.0) -> Spike:
    """H'(x) = alpha/2 exp(-alpha |x|). Shrestha and Orchard 2018, arXiv:1810.08646."""
    return _piecewise_exponential(alpha)


def erf(alpha: float = 2.0) -> Spike:
    """H'(x) = alpha / sqrt(pi) exp(-(alpha x)^2). Yin et al. 2020, arXiv:2005.11633."""
    return _erf(alpha)


ATAN = atan()  # the default of neurons


def check_spike(who: str, spike: Spike) -> None:
    """ValueError unless a function fires 0 below its threshold, and 1 from it on."""
    if not callable(spike) or not _is_step(spike):
        raise ValueError(
            f"{who}: expected a surrogate such as surrogate.ATAN or "
            f"surrogate.heaviside(derivative), which fires 0 or 1, got {spike!r}."
        )


@cache
def _is_step(spike):
    try:
        with jax.ensure_compile_time_eval():
            z = spike(jnp.array([-1.0, 0.0, 1.0]))
        # Traced: a layer made inside of jax.jit, by JAX 0.7.
        return isinstance(z, Tracer) or z.tolist() == [0, 1, 1]
    except Exception:  # no function of one array
        return False
