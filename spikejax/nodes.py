"""Modules for the nodes of NIR that no layer stands for.

Images are channels-last here as everywhere; only ``Flatten`` knows that the vector it
gives is in the order of channels-first.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spikejax import neurons, surrogate
from spikejax.layers import Neuron
from spikejax.neurons import NeuronParams


def integrate(
    params: NeuronParams,
    v: jax.Array,
    x: jax.Array,
    *,
    v_reset: float | None = None,
    decay_input: bool = True,
    trains: bool = False,
    **_,
) -> tuple[jax.Array, jax.Array]:
    """One step of a leaky integrator, which never fires: its output is its membrane.

    v' = charge(leak, v, x).  Arguments are those of ``spikejax.neurons.lif``.
    """
    u = neurons.charge(params.leak, v, x, v_reset=v_reset, decay_input=decay_input)
    return u, u[..., None] if trains else u


def late_reset(
    params: NeuronParams,
    v: jax.Array,
    x: jax.Array,
    *,
    v_reset: float | None = None,
    decay_input: bool = True,
    detach_reset: bool = False,
    spike: surrogate.Spike = surrogate.ATAN,
    trains: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """One step of a neuron whose soft reset comes one step later, after the leak.

    u = charge(leak, v, x),  z = H(u - threshold),  v' = u - threshold z / (1 - leak)

    so that v' (1 - leak) is u (1 - leak) - threshold z, which is what snnTorch's Leaky
    does by default. Arguments are those of ``spikejax.neurons.lif``, without hard reset
    and with leak < 1.
    """
    (threshold,) = params.thresholds
    u = neurons.charge(params.leak, v, x, v_reset=None, decay_input=decay_input)
    z = spike(u - threshold)
    amount = threshold / (1 - params.leak) * z
    v = neurons.reset(u, z, amount, v_reset=None, detach_reset=detach_reset)
    return v, z[..., None] if trains else z


class LI(Neuron):
    """Leaky integrators, such as a readout: v' = v + (x - v) / tau, output v'.

    Args:
        tau: membrane time constant in time steps, >= 1; math.inf with decay_input=False
            adds up its input.
        decay_input: whether tau scales the input too.
    """

    def __init__(self, tau: float = 2.0, *, decay_input: bool = True):
        super().__init__(
            integrate,
            (1.0,),
            tau=tau,
            decay_input=decay_input,
        )


class Fixed(nnx.Variable):
    """A parameter of a node that is not trained."""


class NodeNeuron(Neuron):
    """Neurons with parameters of their own each: a cell on gain * x + offset.

    Args:
        cell: of ``spikejax.neurons``, or ``integrate``.
        leak, threshold, gain, offset: numbers, or arrays that broadcast with [B, ...].
        v_reset: 0 for hard reset, None for soft.
        decay_input: as in LIF.
        base: where 0 of the membrane lies; ``integrate`` adds it to its output.
        v_start: membrane before the first step.
    """

    def __init__(
        self,
        cell: neurons.Cell,
        *,
        leak: Any,
        threshold: Any = 1.0,
        gain: Any = 1.0,
        offset: Any = 0.0,
        v_reset: float | None = None,
        decay_input: bool = True,
        base: Any = 0.0,
        v_start: float = 0.0,
    ):
        super().__init__(
            cell,
            (float(np.min(threshold)),),
            tau=math.inf,
            v_reset=v_reset,
            decay_input=False,
        )
        self.decay_input = decay_input
        self.start = v_start
        given = {"leak": leak, "threshold": threshold, "gain": gain}
        given |= {"offset": offset, "base": base}
        self.numbers = tuple((k, v) for k, v in given.items() if np.ndim(v) == 0)
        for name, value in given.items():
            if np.ndim(value):
                setattr(self, name, Fixed(jnp.asarray(value, jnp.float32)))

    def _get(self, name):
        given = dict(self.numbers)
        return given[name] if name in given else getattr(self, name)[...]

    @property
    def params(self) -> NeuronParams:
        """Leak and threshold."""
        return NeuronParams(self._get("leak"), (self._get("threshold"),))

    @property
    def v_start(self) -> float:
        """Membrane before the first step of a sequence."""
        return self.start

    def _step(self, params, v, x, *, trains=False):
        gain, offset = self._get("gain"), self._get("offset")
        x = (x * gain + offset).astype(x.dtype)
        v, z = super()._step(params, v, x, trains=trains)
        if self.cell is integrate:
            z = (z + self._get("base")).astype(z.dtype)
        return v, z


class Threshold(nnx.Module):
    """1 where x reaches the threshold, else 0, with a surrogate derivative."""

    def __init__(self, threshold: Any):
        self.threshold = Fixed(jnp.asarray(threshold, jnp.float32))

    def __call__(self, xs: jax.Array) -> jax.Array:
        return surrogate.ATAN(xs - self.threshold[...]).astype(xs.dtype)


class Scale(nnx.Module):
    """Multiplies by numbers that broadcast with [B, T, ...]."""

    def __init__(self, scale: Any):
        self.scale = nnx.Param(jnp.asarray(scale, jnp.float32))

    def __call__(self, xs: jax.Array) -> jax.Array:
        return (xs * self.scale[...]).astype(xs.dtype)


class Flatten(nnx.Module):
    """[B, T, H, W, C] to [B, T, C H W], in this order."""

    def __call__(self, xs: jax.Array) -> jax.Array:
        return jnp.moveaxis(xs, -1, 2).reshape(*xs.shape[:2], -1)


class Pool(nnx.Module):
    """Sum or mean over windows of [B, T, H, W, C]; padding counts as zeros.

    Args:
        size, stride, padding: two numbers each.
        mean: mean over the window, else the sum.
    """

    def __init__(
        self,
        size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int] = (0, 0),
        *,
        mean: bool,
    ):
        self.size, self.stride, self.mean = tuple(size), tuple(stride), mean
        self.padding = tuple(padding)

    def __call__(self, xs: jax.Array) -> jax.Array:
        pads = [(0, 0), (0, 0), *((p, p) for p in self.padding), (0, 0)]
        window, stride = (1, 1, *self.size, 1), (1, 1, *self.stride, 1)
        zero = np.zeros((), xs.dtype)
        ys = jax.lax.reduce_window(xs, zero, jax.lax.add, window, stride, pads)
        return ys / math.prod(self.size) if self.mean else ys
