"""Modules for the nodes of NIR that no layer stands for.

Images are channels-last here as everywhere; only ``Flatten`` knows that the vector it
gives is in the order of channels-first.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spikejax import neurons, surrogate
from spikejax.layers import Neuron
from spikejax.neurons import Cell, NeuronOptions, NeuronParams, Number, Trains


class NodeParams(NamedTuple):
    """Parameters of a NIR node: NeuronParams, and the current gain x + offset.

    base: membrane that counts as 0 for the leak.
    """

    leak: Number
    thresholds: Any
    gain: Number = 1.0
    offset: Number = 0.0
    base: Number = 0.0


def node_cell(
    cell: Cell,
    params: NodeParams,
    v: jax.Array,
    x: jax.Array,
    options: NeuronOptions,
) -> tuple[jax.Array, Trains]:
    """Compute one step of a cell on gain x + offset, its membrane above base."""
    plain = NeuronParams(params.leak, params.thresholds)
    current = x * params.gain + params.offset
    v, trains = cell(plain, v - params.base, current, options)
    return v + params.base, trains


def node_lif(*args: Any) -> tuple[jax.Array, Trains]:
    """Compute one step of a leaky integrate-and-fire node."""
    return node_cell(neurons.lif, *args)


def node_late_reset(*args: Any) -> tuple[jax.Array, Trains]:
    """Compute one step of a node whose reset comes one step later."""
    return node_cell(neurons.late_reset, *args)


def node_integrate(*args: Any) -> tuple[jax.Array, Trains]:
    """Compute one step of a node that never fires."""
    return node_cell(neurons.integrate, *args)


NODES = {
    neurons.lif: node_lif,
    neurons.late_reset: node_late_reset,
    neurons.integrate: node_integrate,
}


def node_neuron(
    cell: Cell,
    *,
    leak: Any,
    threshold: Any = 1.0,
    gain: Any = 1.0,
    offset: Any = 0.0,
    v_reset: float | None = None,
    decay_input: bool = True,
    base: Any = 0.0,
    v_start: float = 0.0,
) -> Neuron:
    """Return neurons with parameters of their own: a cell on gain * x + offset."""
    params = NodeParams(leak, (threshold,), gain, offset, base)
    options = NeuronOptions(v_reset, decay_input)
    return Neuron(NODES[cell], params, options, v_start=v_start + np.float32(base))


class Fixed(nnx.Variable):
    """A parameter of a node that is not trained."""


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
