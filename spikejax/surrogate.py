"""The Heaviside step of a spiking neuron, with a surrogate derivative for training.

Forward every surrogate is H(x) = 1 for x >= 0, else 0. Backward the derivative of H,
which is zero almost everywhere, is replaced by a bump around zero. ``alpha`` sets its
inverse width: the larger, the narrower.

    spike = surrogate.atan(alpha=2.0)
    z = spike(u - v_threshold)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.special import expit


@dataclass(frozen=True)
class Surrogate:
    """Heaviside step H(x) = [x >= 0] with a surrogate derivative.

    Two surrogates of the same derivative and width are equal, so a function that takes
    one as a static argument compiles once for both. A new lambda is another derivative,
    and compiles again. They pickle where the derivative is a function of a module.

    Args:
        derivative: elementwise, (x, alpha) -> H'(x), or x -> H'(x) where alpha is None.
        alpha: inverse width, > 0 and finite.

    Raises:
        ValueError: derivative is no function, or alpha is out of its range.

    Reference: Neftci, Mostafa, Zenke 2019, arXiv:1901.09948.
    """

    derivative: Callable[..., jax.Array]
    alpha: float | None = None

    def __post_init__(self):
        alpha = 1.0 if self.alpha is None else self.alpha
        if not callable(self.derivative) or not 0 < alpha < math.inf:
            raise ValueError(
                "surrogate: expected a function for the derivative and a finite alpha "
                f"> 0, got {getattr(self.derivative, '__name__', self.derivative)} and "
                f"{alpha}. Alpha is the inverse width of the derivative."
            )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [x >= 0] in the shape and dtype of x."""
        return _heaviside(self, x)

    def slope(self, x: jax.Array) -> jax.Array:
        """Return H'(x), the surrogate derivative itself."""
        width = () if self.alpha is None else (self.alpha,)
        return self.derivative(x, *width)


# One rule for every surrogate, defined once: a custom_vjp made per surrogate is a new
# function for jax.jit and for pickle. Its backward pass is plain JAX, so gradients of
# gradients work (reverse over reverse); forward mode is for networks without spikes.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _heaviside(surrogate: Surrogate, x: jax.Array) -> jax.Array:
    return (x >= 0).astype(x.dtype)


def _forward(surrogate: Surrogate, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _heaviside(surrogate, x), x


def _backward(surrogate: Surrogate, x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    return ((g * surrogate.slope(x)).astype(x.dtype),)


_heaviside.defvjp(_forward, _backward)


# H'(x) at inverse width a: functions of the module, so that they pickle by name.


def _atan(x: jax.Array, a: float) -> jax.Array:
    return a / 2 / (1 + (jnp.pi / 2 * a * x) ** 2)


def _sigmoid(x: jax.Array, a: float) -> jax.Array:
    # s(ax) s(-ax), not s (1 - s), which is 0 as soon as s rounds to 1.
    return a * expit(a * x) * expit(-a * x)


def _triangle(x: jax.Array, a: float) -> jax.Array:
    return a * jnp.maximum(0, 1 - a * jnp.abs(x))


def _rectangle(x: jax.Array, a: float) -> jax.Array:
    return a * (jnp.abs(x) < 0.5 / a)


def _fast_sigmoid(x: jax.Array, a: float) -> jax.Array:
    return 1 / (1 + a * jnp.abs(x)) ** 2


def _piecewise_exponential(x: jax.Array, a: float) -> jax.Array:
    return a / 2 * jnp.exp(-a * jnp.abs(x))


def _erf(x: jax.Array, a: float) -> jax.Array:
    return a / jnp.sqrt(jnp.pi) * jnp.exp(-((a * x) ** 2))


def atan(alpha: float = 2.0) -> Surrogate:
    """Return H with H'(x) = alpha/2 / (1 + (pi/2 alpha x)^2).

    Examples:
        >>> spike = atan()
        >>> spike(jnp.array([-0.5, 0.0])).tolist()
        [0.0, 1.0]
        >>> jax.grad(spike)(jnp.zeros(())).item()
        1.0

    Reference: Fang et al. 2021, arXiv:2007.05785.
    """
    return Surrogate(_atan, float(alpha))  # float: 2 and 2.0 are one surrogate


def sigmoid(alpha: float = 4.0) -> Surrogate:
    """Return H with H'(x) = alpha s(alpha x) (1 - s(alpha x)), s the logistic function.

    Reference: Zenke and Vogels 2021, doi:10.1162/neco_a_01367.
    """
    return Surrogate(_sigmoid, float(alpha))


def triangle(alpha: float = 1.0) -> Surrogate:
    """Return H with H'(x) = alpha max(0, 1 - alpha |x|).

    Reference: Bellec et al. 2018, arXiv:1803.09574.
    """
    return Surrogate(_triangle, float(alpha))


def rectangle(alpha: float = 1.0) -> Surrogate:
    """Return H with H'(x) = alpha [|x| < 1 / (2 alpha)].

    Reference: Wu et al. 2018, arXiv:1706.02609.
    """
    return Surrogate(_rectangle, float(alpha))


def fast_sigmoid(alpha: float = 10.0) -> Surrogate:
    """Return H with H'(x) = 1 / (1 + alpha |x|)^2.

    Its integral is 2 / alpha where that of the others is 1: its height at zero stays 1.

    Reference: Zenke and Ganguli 2018, arXiv:1705.11146.
    """
    return Surrogate(_fast_sigmoid, float(alpha))


def piecewise_exponential(alpha: float = 1.0) -> Surrogate:
    """Return H with H'(x) = alpha/2 exp(-alpha |x|).

    Reference: Shrestha and Orchard 2018, arXiv:1810.08646.
    """
    return Surrogate(_piecewise_exponential, float(alpha))


def erf(alpha: float = 2.0) -> Surrogate:
    """Return H with H'(x) = alpha / sqrt(pi) exp(-(alpha x)^2).

    Reference: Yin et al. 2020, arXiv:2005.11633.
    """
    return Surrogate(_erf, float(alpha))


ATAN = atan()  # the default of all neurons, as in SpikingJelly
