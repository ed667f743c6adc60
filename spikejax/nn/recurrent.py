"""Layers that feed their own outputs back: spiking neurons, LSTM and GRU."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax.layers import Neuron, check_sequence
from spikejax.memory import Memory
from spikejax.neurons import Step
from spikejax.unroll import unroll_compiled


class Feedback(NamedTuple):
    """Time step of neurons that see their own last spikes, hashable as ``Step``."""

    step: Step

    def __call__(
        self, params: tuple[Any, jax.Array], state: tuple[Any, jax.Array], x: jax.Array
    ) -> tuple[tuple[Any, jax.Array], jax.Array]:
        """Return the state and last spikes after the currents x, and the output."""
        neuron, weights = params
        state, z = state
        current = x + z @ weights
        # Spikes come back weighed; XLA computes the step once for both answers.
        after, z = self.step._replace(trains=False)(neuron, state, current)
        out = self.step(neuron, state, current)[1] if self.step.trains else z
        return (after, z), out


class Recurrent(nnx.Module):
    """Layer of neurons whose spikes come back as currents one time step later.

    state[t], z[t] = cell(state[t-1], x[t] + z[t-1] U),  z[0] = 0

    Args:
        neuron: layer of neurons, such as LIF() or MultiThreshold().
        features: their number, the last axis of the input.
        rngs: source of the weights U, initially 0.3 of an orthogonal matrix (ours).

    Raises:
        ValueError: neuron is a class or function, or there are no features.

    Reference: Bellec et al. 2018, arXiv:1803.09574.
    """

    def __init__(self, neuron: Neuron, features: int, *, rngs: nnx.Rngs):
        if not isinstance(neuron, Neuron) or features < 1:
            raise ValueError(
                "Recurrent: expected a layer of neurons such as LIF() and at least one "
                f"feature, got a {type(neuron).__name__} and {features}."
            )
        self.neuron = neuron
        self.memory = Memory()
        # On spoken digits 94 % (LIF) and 93 % (four thresholds) of the validation
        # recordings; a whole orthogonal matrix had 90 and 81 %, a tenth 90 and 90 %.
        orthogonal = nnx.initializers.orthogonal(0.3)
        self.recurrent = nnx.Linear(
            features, features, use_bias=False, kernel_init=orthogonal, rngs=rngs
        )

    def __call__(self, xs: jax.Array, *, trains: bool = False) -> jax.Array:
        """Return the spikes of the currents xs [B, T, features]; see ``Neuron``.

        Raises:
            ValueError: xs has no time axis, or holds no floating point numbers.
        """
        check_sequence("Recurrent", xs)
        step, params = self.neuron.bind(trains=trains)
        weights = self.recurrent.kernel[...].astype(xs.dtype)
        first = xs[:, 0]
        start = self.neuron.start(first.shape), jnp.zeros_like(first)
        state, spikes = unroll_compiled(
            Feedback(step), (params, weights), self.memory.load(start), xs
        )
        self.memory.save(state)
        return spikes


Weights = tuple[jax.Array, jax.Array]  # kernel and bias


def _lstm(
    weights: Weights, state: tuple[jax.Array, jax.Array], x: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Compute one step of an LSTM from the gates x of its input."""
    kernel, bias = weights
    c, h = state
    i, f, g, o = jnp.split(x + h @ kernel + bias, 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (c, h), h


def _gru(weights: Weights, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute one step of a GRU from the gates x of its input."""
    kernel, bias = weights
    r, z, n = jnp.split(x, 3, -1)
    hr, hz, hn = jnp.split(h @ kernel + bias, 3, -1)
    z = jax.nn.sigmoid(z + hz)
    h = (1 - z) * jnp.tanh(n + jax.nn.sigmoid(r + hr) * hn) + z * h
    return h, h


def _linears(
    in_features: int, features: int, gates: int, rngs: nnx.Rngs
) -> list[nnx.Linear]:
    """Return the weights of x and of h for so many gates, started as in PyTorch."""
    bound = features**-0.5

    def init(key: jax.Array, shape: tuple[int, ...], *_: Any, **__: Any) -> jax.Array:
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    return [
        nnx.Linear(size, gates * features, kernel_init=init, bias_init=init, rngs=rngs)
        for size in (in_features, features)
    ]


def _weights(linear: nnx.Linear, dtype: jnp.dtype) -> Weights:
    bias: Any = linear.bias
    return linear.kernel[...].astype(dtype), bias[...].astype(dtype)


def _run(
    layer: "GRU | LSTM", cell: Callable, xs: jax.Array, memory: Memory
) -> jax.Array:
    """Return h at all steps of xs [B, T, in_features], from the state in a memory."""
    gates = layer.inputs(xs)  # one matrix product for all steps
    weights = _weights(layer.recurrent, gates.dtype)
    shape = *gates[:, 0].shape[:-1], weights[0].shape[0]
    h = jnp.zeros(shape, gates.dtype)
    start = memory.load((h, h) if cell is _lstm else h)
    state, hs = unroll_compiled(cell, weights, start, gates)
    memory.save(state)
    return hs


class GRU(nnx.Module):
    """Gated recurrent unit over a sequence; it does not spike.

    r, z = sigmoid(x W + b + h U + c),  n = tanh(x W + b + r (h U + c))
    h' = (1 - z) n + z h

    Each of r, z and n has columns of W, U, b and c of its own. It takes slices of a
    sequence, as neurons do (``stepper``). Weights start as those of ``LSTM``.

    Args:
        in_features, features: sizes of the last axes of the input and of h.
        rngs: source of the weights.

    Raises:
        ValueError: the input of a call has no time axis, or no floating point numbers.

    Reference: Cho et al. 2014, arXiv:1406.1078, with r after the product as in cuDNN.
    """

    def __init__(self, in_features: int, features: int, *, rngs: nnx.Rngs):
        self.inputs, self.recurrent = _linears(in_features, features, 3, rngs)
        self.memory = Memory()

    def __call__(self, xs: jax.Array) -> jax.Array:
        """Return h [B, T, features] for a sequence xs [B, T, in_features]."""
        check_sequence("GRU", xs)
        return _run(self, _gru, xs, self.memory)


class LSTM(nnx.Module):
    """Long short-term memory over a sequence; it does not spike.

    i, f, g, o = x W + b + h U + d,  c' = sigmoid(f) c + sigmoid(i) tanh(g)
    h' = sigmoid(o) tanh(c')

    It takes slices of a sequence, as neurons do (``stepper``). Weights and both biases
    start uniformly in +-1 / sqrt(features), as in PyTorch. Flax's own cells have one
    bias, and other initial weights.

    Args:
        in_features, features: sizes of the last axes of the input and of h.
        rngs: source of the weights.

    Raises:
        ValueError: the input of a call has no time axis, or no floating point numbers.

    Reference: Hochreiter and Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735.
    """

    def __init__(self, in_features: int, features: int, *, rngs: nnx.Rngs):
        self.inputs, self.recurrent = _linears(in_features, features, 4, rngs)
        self.memory = Memory()

    def __call__(self, xs: jax.Array) -> jax.Array:
        """Return h [B, T, features] for a sequence xs [B, T, in_features]."""
        check_sequence("LSTM", xs)
        return _run(self, _lstm, xs, self.memory)


class Bidirectional(nnx.Module):
    """Pair of LSTMs, one of which reads the sequence from its end; [.., 2 features].

    Each call starts from zeros, as a sequence in slices has no end to start from.
    """

    def __init__(self, in_features: int, features: int, *, rngs: nnx.Rngs):
        self.forwards = LSTM(in_features, features, rngs=rngs)
        self.backwards = LSTM(in_features, features, rngs=rngs)

    def __call__(self, xs: jax.Array) -> jax.Array:
        """Return [..., L, 2 features] for a sequence xs [..., L, in_features]."""
        flat = xs.reshape(-1, *xs.shape[-2:])
        forwards = _run(self.forwards, _lstm, flat, Memory())
        backwards = _run(self.backwards, _lstm, jnp.flip(flat, 1), Memory())
        both = jnp.concatenate([forwards, jnp.flip(backwards, 1)], -1)
        return both.reshape(*xs.shape[:-1], -1)
