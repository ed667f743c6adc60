"""Parallel spiking neurons: no reset, so all time steps are one matrix product."""

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax import surrogate
from spikejax.layers import Fixed, check_sequence
from spikejax.memory import Memory
from spikejax.neurons import spiking_output
from spikejax.surrogate import Surrogate

START = -1.0  # of the biases: minus a threshold of 1


def fire(u: jax.Array, spike: Surrogate, kind: jnp.dtype) -> jax.Array:
    """Return the spikes of membranes u in a type, marked as such for ``energy``."""
    z = spike(u).astype(kind)
    return spiking_output(z, z)


class PSN(nnx.Module):
    """Layer of parallel spiking neurons, whose membranes mix all time steps.

    u = W x + b over time,  z = H(u);   W [T, T], b [T]

    With order k a step sees the k steps up to it alone: W times the band of that
    width. The band is put on step by step in training, as mask goes from 0 to 1:
    W (mask band + 1 - mask).

    Args:
        time_steps: T of every input.
        order: None, or k of the masked PSN.
        surrogate: Heaviside step with a surrogate derivative.
        rngs: source of W, uniform within 1 / sqrt(T).

    Raises:
        ValueError: an argument is out of its range.

    Reference: Fang et al. 2023, arXiv:2304.12760.
    """

    def __init__(
        self,
        time_steps: int,
        *,
        order: int | None = None,
        surrogate: Surrogate = surrogate.ATAN,
        rngs: nnx.Rngs,
    ):
        if time_steps < 1 or not (order is None or order >= 1):
            raise ValueError(
                f"PSN: expected at least one time step and an order of 1 or more, got "
                f"{time_steps} and {order}."
            )
        shape, bound = (time_steps, time_steps), time_steps**-0.5
        self.weights = nnx.Param(
            jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
        )
        self.bias = nnx.Param(jnp.full(time_steps, START))
        self.order = order
        # A variable: a training may raise it, layer.mask[...] = jnp.float32(0.5).
        self.mask = None if order is None else Fixed(jnp.float32(1))
        self.surrogate = surrogate

    def __call__(self, xs: jax.Array) -> jax.Array:
        """Return spikes in the shape and type of the currents xs [B, T, ...].

        Raises:
            ValueError: xs has another number of time steps.
        """
        check_sequence("PSN", xs)
        weights, steps = self.weights[...], self.weights.shape[0]
        if xs.shape[1] != steps:
            raise ValueError(
                f"PSN: expected {steps} time steps, those of its weights, got "
                f"{xs.shape[1]}. SlidingPSN takes any number."
            )
        if self.mask is not None:
            band = jnp.tri(steps) * (1 - jnp.tri(steps, k=-(self.order or steps)))
            weights = weights * (self.mask[...] * band + 1 - self.mask[...])
        u = jnp.tensordot(weights, xs.astype(jnp.float32), [[1], [1]])
        bias = self.bias[...].reshape(steps, *[1] * (u.ndim - 1))
        return fire(jnp.moveaxis(u + bias, 0, 1), self.surrogate, xs.dtype)


class SlidingPSN(nnx.Module):
    """Layer of parallel spiking neurons with the same weights at every time step.

    u[t] = sum over i < k of w_i x[t - i] + b,  z = H(u);   w_i = 2^-i initially

    It takes sequences of any length, and slices of them (``stepper``).

    Args:
        order: k.
        surrogate: Heaviside step with a surrogate derivative.

    Raises:
        ValueError: order is less than 1.

    Reference: Fang et al. 2023, arXiv:2304.12760.
    """

    def __init__(self, order: int = 4, *, surrogate: Surrogate = surrogate.ATAN):
        if order < 1:
            raise ValueError(
                f"SlidingPSN: expected an order of 1 or more, got {order}."
            )
        self.weights = nnx.Param(2.0 ** -jnp.arange(order))
        self.bias = nnx.Param(jnp.float32(START))
        self.surrogate = surrogate
        self.memory = Memory()

    def __call__(self, xs: jax.Array) -> jax.Array:
        """Return spikes in the shape and type of the currents xs [B, T, ...].

        Raises:
            ValueError: xs has no time axis, or holds no floating point numbers.
        """
        check_sequence("SlidingPSN", xs)
        past, steps = self.weights.shape[0] - 1, xs.shape[1]
        seen = self.memory.extend(xs.astype(jnp.float32), past)
        u = self.bias[...]
        for i, weight in enumerate(self.weights[...]):
            u = u + weight * seen[:, past - i : past - i + steps]
        return fire(u, self.surrogate, xs.dtype)
