"""snnTorch: time in a loop around the network, as its tutorials have it, or folded.

Its soft reset acts one step later, on the membrane after its decay (``reset_delay``,
the default). Folded, convolutions see all time steps in their batch, and each layer of
neurons has a loop of its own.
"""

import importlib.metadata

import snntorch
import torch
from snntorch import surrogate, utils
from torch import nn

from benchmarks.sides import pytorch
from benchmarks.workloads import Prepared, Sizes

VERSIONS = {"snntorch": importlib.metadata.version("snntorch")}


def prepare(sizes: Sizes, mode: str) -> Prepared:
    """Modes: step by step, folded."""
    folded = mode == "folded"

    def neuron():
        leaky = snntorch.Leaky(
            beta=0.5, spike_grad=surrogate.atan(2.0), init_hidden=not folded
        )
        return Unrolled(leaky, sizes.time_steps) if folded else leaky

    if sizes.network == "linear":
        (n,) = sizes.channels
        network = nn.Sequential(nn.Linear(n, n), neuron())
    else:
        network = pytorch.convolutions(sizes, nn, neuron)

    def outputs(xs):
        if folded:
            return network(xs.flatten(0, 1)).unflatten(0, xs.shape[:2])
        utils.reset(network)
        return torch.stack([network(x) for x in xs])

    if sizes.network == "linear":
        return pytorch.summed(sizes, network, outputs, VERSIONS)
    return pytorch.classifier(sizes, network, lambda xs: outputs(xs).mean(0), VERSIONS)


class Unrolled(nn.Module):
    """Neurons over the time steps that are folded into the batch."""

    def __init__(self, leaky, time_steps):
        super().__init__()
        self.leaky, self.time_steps = leaky, time_steps

    def forward(self, xs):
        xs = xs.unflatten(0, (self.time_steps, -1))
        membrane, spikes = torch.zeros_like(xs[0]), []
        for x in xs:
            spike, membrane = self.leaky(x, membrane)
            spikes.append(spike)
        return torch.stack(spikes).flatten(0, 1)
