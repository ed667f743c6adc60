"""Layers that feed their own outputs back: spiking neurons, and the LSTM.

A layer here holds the weights from its outputs to its next step as ``recurrent``, a
linear layer that its own loop applies; ``spikejax.energy`` counts it by that name.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax.layers import Membrane, Neuron
from spikejax.unroll import unroll


class Recurrent(Neuron):
    """Neurons whose spikes come back as currents one time step later.

    v[t], z[t] = cell(v[t-1], x[t] + z[t-1] U),  z[0] = 0

    Args:
        neuron: the neurons, such as LIF() or MultiThreshold(); a layer made like it is
            this one.
        features: their number, the last axis of the input.
        rngs: source of the weights U, orthogonal at the start.

    Reference: Bellec et al. 2018, arXiv:1803.09574.
    """

    def __init__(self, neuron: Neuron, features: int, *, rngs: nnx.Rngs):
        super().__init__(
            neuron.cell,
            neuron.thresholds,
            tau=neuron.tau,
            v_reset=neuron.v_reset,
            decay_input=neuron.decay_input,
            detach_reset=neuron.detach_reset,
            surrogate=neuron.surrogate,
            learn_tau=neuron.leak_logit is not None,
            learn_thresholds=neuron.log_steps is not None,
        )
        self.recurrent = nnx.Linear(
            features,
            features,
            use_bias=False,
            kernel_init=nnx.initializers.orthogonal(),
            rngs=rngs,
        )

    def __call__(self, xs: jax.Array, *, trains: bool = False) -> jax.Array:
        """Spikes of the currents xs [B, T, features]; see ``Neuron``."""
        features = self.recurrent.in_features
        if xs.ndim != 3 or xs.shape[1] == 0 or xs.shape[-1] != features:
            raise ValueError(
                f"Recurrent: expected a sequence [B, T, {features}], got shape "
                f"{xs.shape}. Recurrent(neuron, features) takes their number."
            )
        weights = self.recurrent.kernel[...].astype(xs.dtype)

        def cell(params, state, x):
            v, z = state
            x = x + z @ weights
            after, z = self._step(params, v, x)
            given = self._step(params, v, x, trains=True)[1] if trains else z
            return (after, z), given

        (v, z), spikes = unroll(cell, self.params, self._start(xs), xs)
        if self.membrane is not None:
            self.membrane = Membrane(self._joined(v, z))
        return spikes

    # The membrane that is kept from call to call has the last spikes behind it.

    def _joined(self, v, z):
        return jnp.concatenate([v.reshape(-1, *z.shape), z[None].astype(v.dtype)])

    def _start(self, xs):
        z = jnp.zeros_like(xs[:, 0])
        rest = self.rest(z.shape)
        if self.membrane is None or self.membrane[...].ndim == 0:
            return rest, z
        held, shape = self.membrane[...], self._joined(rest, z).shape
        if held.shape != shape:
            raise ValueError(
                f"Recurrent: expected input for its membrane {held.shape[1:]}, got "
                f"{xs.shape}. Call keep_membranes(model) to start anew."
            )
        return held[:-1].reshape(rest.shape), held[-1].astype(xs.dtype)


class LSTM(nnx.Module):
    """Long short-term memory over a sequence, from zeros; it does not spike.

    i, f, g, o = x W + b + h U + d,  c' = sigmoid(f) c + sigmoid(i) tanh(g)
    h' = sigmoid(o) tanh(c')

    Weights and both biases start uniformly in +-1 / sqrt(features), as in PyTorch.

    Args:
        inputs: size of the last axis of the input.
        features: size of h.
        rngs: source of the weights.

    Reference: Hochreiter and Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735.
    """

    def __init__(self, inputs: int, features: int, *, rngs: nnx.Rngs):
        bound = features**-0.5

        def init(key, shape, dtype=jnp.float32, **_):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        linear = partial(nnx.Linear, kernel_init=init, bias_init=init, rngs=rngs)
        self.inputs = linear(inputs, 4 * features)
        self.recurrent = linear(features, 4 * features, use_bias=False)
        self.bias = nnx.Param(init(rngs.params(), (4 * features,)))

    def __call__(self, xs: jax.Array) -> jax.Array:
        """h [..., L, features] for a sequence xs [..., L, inputs]."""
        gates = self.inputs(xs)
        gates = gates.reshape(-1, *gates.shape[-2:])
        weights = self.recurrent.kernel[...].astype(gates.dtype)
        bias = self.bias[...].astype(gates.dtype)

        def cell(weights, state, x):
            c, h = state
            i, f, g, o = jnp.split(x + h @ weights + bias, 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (c, h), h

        zero = jnp.zeros((gates.shape[0], weights.shape[0]), gates.dtype)
        _, hs = unroll(cell, weights, (zero, zero), gates)
        return hs.reshape(*xs.shape[:-1], -1)


class Bidirectional(nnx.Module):
    """Two LSTMs, one of which reads the sequence from its end; 2 features come out."""

    def __init__(self, inputs: int, features: int, *, rngs: nnx.Rngs):
        self.forwards = LSTM(inputs, features, rngs=rngs)
        self.backwards = LSTM(inputs, features, rngs=rngs)

    def __call__(self, xs: jax.Array) -> jax.Array:
        """[..., L, 2 features] for a sequence xs [..., L, inputs]."""
        backwards = jnp.flip(self.backwards(jnp.flip(xs, -2)), -2)
        return jnp.concatenate([self.forwards(xs), backwards], -1)
