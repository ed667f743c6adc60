"""Recurrent spiking networks over sequences of vectors [B, T, features]."""

from collections.abc import Callable, Sequence

import jax
from flax import nnx

from spikejax._compat import List
from spikejax.layers import Neuron
from spikejax.nn.recurrent import LSTM, Recurrent

# (inputs, width, factory of neurons, rngs) -> a layer of so many neurons
Kind = Callable[[int, int, Callable[[], Neuron], nnx.Rngs], nnx.Sequential]


def feedback(
    inputs: int, width: int, neuron: Callable[[], Neuron], rngs: nnx.Rngs
) -> nnx.Sequential:
    """Return linear weights, and neurons whose spikes come back to them."""
    linear = nnx.Linear(inputs, width, rngs=rngs)
    return nnx.Sequential(linear, Recurrent(neuron(), width, rngs=rngs))


def gated(
    inputs: int, width: int, neuron: Callable[[], Neuron], rngs: nnx.Rngs
) -> nnx.Sequential:
    """Return an LSTM, and plain neurons whose currents are its outputs."""
    return nnx.Sequential(LSTM(inputs, width, rngs=rngs), neuron())


class RecurrentSNN(nnx.Module):
    """Layers that remember, and a linear readout of their spikes at every step.

    Args:
        inputs: features of the input.
        widths: neurons of each layer.
        num_classes: logits.
        neuron: factory of the neurons, such as LIF or MultiThreshold.
        kind: feedback or gated.
        rngs: source of the weights.

    Returns:
        logits [B, T, num_classes] for a sequence [B, T, inputs].

    Raises:
        ValueError: the input is no such sequence.
    """

    def __init__(
        self,
        inputs: int,
        widths: Sequence[int],
        num_classes: int,
        *,
        neuron: Callable[[], Neuron],
        kind: Kind = feedback,
        rngs: nnx.Rngs,
    ):
        self.inputs, sizes = inputs, [inputs, *widths]
        pairs = zip(sizes[:-1], widths, strict=True)
        self.layers = List(kind(a, b, neuron, rngs) for a, b in pairs)
        self.head = nnx.Linear(sizes[-1], num_classes, rngs=rngs)

    def __call__(self, xs: jax.Array) -> jax.Array:
        if xs.ndim != 3 or xs.shape[2] != self.inputs:
            raise ValueError(
                f"RecurrentSNN: expected a sequence [B, T, {self.inputs}], got shape "
                f"{xs.shape}. Without time, add the axis: xs[:, None]."
            )
        for layer in self.layers:
            xs = layer(xs)
        return self.head(xs)
