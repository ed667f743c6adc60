"""Recurrent spiking networks over sequences of vectors [B, T, features]."""

from collections.abc import Callable, Sequence

import jax
from flax import nnx

from spikejax._compat import List
from spikejax.layers import Neuron
from spikejax.nn.recurrent import LSTM, Recurrent


def feedback(
    inputs: int, width: int, neuron: Callable[[], Neuron], rngs: nnx.Rngs
) -> tuple[Callable, Neuron]:
    """Linear weights, then neurons whose spikes come back to them."""
    linear = nnx.Linear(inputs, width, rngs=rngs)
    return linear, Recurrent(neuron(), width, rngs=rngs)


def gated(
    inputs: int, width: int, neuron: Callable[[], Neuron], rngs: nnx.Rngs
) -> tuple[Callable, Neuron]:
    """An LSTM, whose outputs are the currents of plain neurons."""
    return LSTM(inputs, width, rngs=rngs), neuron()


class RecurrentSNN(nnx.Module):
    """Layers that remember, and a linear readout of their spikes at every step.

    Args:
        inputs: features of the input.
        widths: neurons of each layer.
        num_classes: logits.
        neuron: factory of the neurons, such as LIF or MultiThreshold.
        kind: feedback or gated, or any (inputs, width, neuron, rngs) -> (currents of
            a sequence, neurons).
        rngs: source of the weights.

    Returns:
        logits [B, T, num_classes] for a sequence [B, T, inputs].
    """

    def __init__(
        self,
        inputs: int,
        widths: Sequence[int],
        num_classes: int,
        *,
        neuron: Callable[[], Neuron],
        kind: Callable = feedback,
        rngs: nnx.Rngs,
    ):
        sizes = [inputs, *widths]
        made = [
            kind(a, b, neuron, rngs) for a, b in zip(sizes[:-1], sizes[1:], strict=True)
        ]
        self.layers = List(layer for layer, _ in made)
        self.neurons = List(neurons for _, neurons in made)
        self.head = nnx.Linear(sizes[-1], num_classes, rngs=rngs)

    def __call__(self, xs: jax.Array) -> jax.Array:
        for layer, neurons in zip(self.layers, self.neurons, strict=True):
            xs = neurons(layer(xs))
        return self.head(xs)
