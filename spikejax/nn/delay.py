"""Learned delays between a layer and the next: one per feature, or one per synapse.

A delay of d time steps is a kernel over time around the place d. In training it spreads
over several steps, so that d has a gradient; in evaluation it is rounded, and moves a
spike as it is.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax.layers import Fixed, check_sequence
from spikejax.memory import Memory

OVER_TIME = "spikejax_over_time"  # name of the scope of a product over time steps


def place(
    delays: jax.Array, max_delay: int, width: jax.Array | float | None = None
) -> jax.Array:
    """Return kernels over time around the places d, whose taps sum to 1.

    width None:  k[n] = max(0, 1 - |n - d|)
    else:        k[n] = exp(-((n - d) / width)^2 / 2) / sum over n,   n = 0..max_delay

    Args:
        delays: d in time steps, 0 to max_delay, any shape.
        max_delay: of the kernel.
        width: standard deviation in time steps, > 0.

    Returns:
        [max_delay + 1, *delays.shape].

    Reference: Hammouamri, Khalfaoui-Hassani, Masquelier 2023, arXiv:2306.17670 (the
    Gaussian, with its width).
    """
    steps = jnp.arange(max_delay + 1.0).reshape(-1, *[1] * delays.ndim)
    distance = steps - delays
    if width is None:
        return jnp.maximum(0, 1 - jnp.abs(distance))
    return jax.nn.softmax(-((distance / width) ** 2) / 2, axis=0)


class _Delays(nnx.Module):
    """Places of delays, and the past input that they reach."""

    def __init__(
        self,
        shape: tuple[int, ...],
        max_delay: int,
        width: float | None,
        rngs: nnx.Rngs,
    ):
        if max_delay < 1 or min(shape) < 1 or not (width is None or width > 0):
            raise ValueError(
                f"{type(self).__name__}: expected max_delay and features of at least 1 "
                f"and a positive width, got {max_delay}, {shape} and {width}."
            )
        self.max_delay = max_delay
        start = jax.random.uniform(rngs.params(), shape, maxval=float(max_delay))
        self.delays = nnx.Param(start)
        # A variable: a training may narrow it, layer.width[...] = jnp.float32(sigma).
        self.width = None if width is None else Fixed(jnp.float32(width))
        self.deterministic = False  # set by model.eval() and model.train()
        self.memory = Memory()

    def places(self) -> jax.Array:
        """Return d within 0 to max_delay; whole in evaluation."""
        free = self.delays[...]
        bounded = jnp.clip(free, 0, self.max_delay)
        if self.deterministic:
            return jnp.round(bounded)
        # The gradient acts outside of the range too, so that no delay is stuck there.
        return free + jax.lax.stop_gradient(bounded - free)

    def taps(self) -> jax.Array:
        """Return the taps [max_delay + 1, ...] of the delays."""
        if self.deterministic or self.width is None:
            return place(self.places(), self.max_delay)
        return place(self.places(), self.max_delay, self.width[...])


class Delay(_Delays):
    """Layer that delays each feature by a number of time steps that it learns.

    y[t] = sum over n of k[n] x[t - n],   k = place(d)

    In evaluation d is rounded, so spikes stay spikes. It works between any layer and
    neuron, and in slices of a sequence, as neurons do (``stepper``).

    Args:
        max_delay: largest delay in time steps.
        features: their number, the last axis of the input; delays are uniform in 0 to
            max_delay initially.
        width: None for two taps, else the standard deviation of a Gaussian, which a
            training narrows: ``layer.width[...] = jnp.float32(sigma)``.
        rngs: source of the delays.

    Raises:
        ValueError: an argument is out of its range.

    Reference: Hammouamri et al. 2023, arXiv:2306.17670; one delay per feature is a
    choice of ours.
    """

    def __init__(
        self,
        max_delay: int,
        features: int,
        *,
        width: float | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__((features,), max_delay, width, rngs)

    def __call__(self, xs: jax.Array) -> jax.Array:
        """Return the delayed input, in the shape and type of xs [B, T, ..., features].

        Raises:
            ValueError: xs has no time axis, or other features.
        """
        features = self.delays.shape[0]
        check_sequence("Delay", xs)
        if xs.ndim < 3 or xs.shape[-1] != features:
            raise ValueError(
                f"Delay: expected input [B, T, ..., {features}], got shape {xs.shape}. "
                "For one time step, add the time axis: x[:, None]."
            )
        steps, size = xs.shape[1], self.max_delay
        seen = self.memory.extend(xs, size)
        if self.deterministic:  # spikes are moved, and not multiplied
            places = size - self.places().astype(int) + jnp.arange(steps)[:, None]
            places = places.reshape(1, steps, *[1] * (xs.ndim - 3), features)
            return jnp.take_along_axis(seen, places, 1, mode="clip")
        total: Any = 0
        for n, tap in enumerate(self.taps()):
            total += tap * seen[:, size - n : size - n + steps]
        return total.astype(xs.dtype)


class DelayedLinear(_Delays):
    """Dense layer whose synapses have delays that they learn, one each.

    y[t, o] = sum over i, n of w[i, o] k[n, i, o] x[t - n, i]

    A convolution over time. In evaluation delays are rounded.

    Args:
        in_features, features: sizes of the input and the output.
        max_delay, width, rngs: as in ``Delay``.

    Raises:
        ValueError: an argument is out of its range.

    Reference: Hammouamri et al. 2023, arXiv:2306.17670.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        max_delay: int,
        *,
        width: float | None = None,
        rngs: nnx.Rngs,
    ):
        shape = in_features, features
        super().__init__(shape, max_delay, width, rngs)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape))

    def __call__(self, xs: jax.Array) -> jax.Array:
        """Return currents [B, T, features] for xs [B, T, in_features].

        Raises:
            ValueError: xs is of another shape.
        """
        inputs = self.delays.shape[0]
        if xs.ndim != 3 or xs.shape[-1] != inputs:
            raise ValueError(
                f"DelayedLinear: expected input [B, T, {inputs}], got shape {xs.shape}."
            )
        check_sequence("DelayedLinear", xs)
        seen = self.memory.extend(xs, self.max_delay)
        # A convolution counts taps forwards in time.
        kernel = (self.taps() * self.kernel[...])[::-1].astype(xs.dtype)
        with jax.named_scope(OVER_TIME):
            return jax.lax.conv_general_dilated(
                seen, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
            )
