"""Networks over sequences of vectors [B, T, features]: dense, recurrent, delayed."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from spikejax._compat import List
from spikejax.layers import Neuron
from spikejax.nn.recurrent import GRU, Recurrent

Linear = Callable[..., nnx.Module]  # with the arguments of nnx.Linear
# (inputs, width, factory of neurons, rngs) -> a layer of so many neurons
Kind = Callable[[int, int, Callable[[], Any], nnx.Rngs], nnx.Sequential]


def dense(
    inputs: int,
    width: int,
    neuron: Callable[[], Any],
    rngs: nnx.Rngs,
    *,
    linear: Linear = nnx.Linear,
) -> nnx.Sequential:
    """Return linear weights, or such with delays, and neurons."""
    return nnx.Sequential(linear(inputs, width, rngs=rngs), neuron())


def feedback(
    inputs: int,
    width: int,
    neuron: Callable[[], Neuron],
    rngs: nnx.Rngs,
    *,
    linear: Linear = nnx.Linear,
) -> nnx.Sequential:
    """Return linear weights, and neurons whose spikes come back to them."""
    weights = linear(inputs, width, rngs=rngs)
    return nnx.Sequential(weights, Recurrent(neuron(), width, rngs=rngs))


def gru(
    inputs: int, width: int, neuron: Callable[[], Any], rngs: nnx.Rngs
) -> nnx.Sequential:
    """Return a GRU, which has no neurons."""
    return nnx.Sequential(GRU(inputs, width, rngs=rngs))


class RecurrentSNN(nnx.Module):
    """Layers that remember, and a linear readout of their spikes at every step.

    Args:
        in_features: size of the last axis of the input.
        widths: neurons of each layer; without any, it is a linear classifier.
        num_classes: logits.
        neuron: factory of the neurons, such as LIF or MultiThreshold.
        kind: dense, feedback or gru.
        readout: leaky integrators of the logits, such as LI(); None for none.
        rngs: source of the weights.

    Returns:
        logits [B, T, num_classes] for a sequence [B, T, in_features].

    Raises:
        ValueError: the input is no such sequence.
    """

    def __init__(
        self,
        in_features: int,
        widths: Sequence[int],
        num_classes: int,
        *,
        neuron: Callable[[], Any],
        kind: Kind = feedback,
        readout: Neuron | None = None,
        rngs: nnx.Rngs,
    ):
        self.in_features, sizes = in_features, [in_features, *widths]
        pairs = zip(sizes[:-1], widths, strict=True)
        self.layers = List(kind(a, b, neuron, rngs) for a, b in pairs)
        self.head = nnx.Linear(sizes[-1], num_classes, rngs=rngs)
        self.readout = readout

    def __call__(self, xs: jax.Array) -> jax.Array:
        if xs.ndim != 3 or xs.shape[2] != self.in_features:
            raise ValueError(
                f"RecurrentSNN: expected a sequence [B, T, {self.in_features}], got "
                f"shape {xs.shape}. Without time, add the axis: xs[:, None]."
            )
        for layer in self.layers:
            xs = layer(xs)
        logits = self.head(xs)
        return logits if self.readout is None else self.readout(logits)
