"""Costs that layers add to the loss, such as one of firing rates out of range."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax.layers import Layer


class Penalty(nnx.Variable):
    """Cost of the last call of a layer in training, a number."""


class Penalised(nnx.Module):
    """Layer whose output has a cost in training: ys = layer(xs), weight penalty(ys).

        neuron = lambda: Penalised(LIF(), partial(losses.firing_rate, lower=0.01))

    ``fit`` adds the costs of all layers to its loss; in a loop of your own, add
    ``penalty(model)`` after the call of the model, where the gradient is taken.

    Args:
        layer: of neurons, or any other.
        penalty: ys -> costs [B], whose mean counts.
        weight: factor of the cost.
    """

    def __init__(
        self,
        layer: Layer,
        penalty: Callable[[jax.Array], jax.Array],
        weight: float = 1.0,
    ):
        self.layer, self.penalty, self.weight = layer, penalty, weight
        self.cost = Penalty(jnp.zeros(()))
        self.deterministic = False  # which eval() of a model sets

    def __call__(self, xs: jax.Array) -> jax.Array:
        """Return the output of the layer; in training, keep its cost."""
        ys = self.layer(xs)
        if not self.deterministic:
            self.cost[...] = self.weight * self.penalty(ys).mean()
        return ys


def unpenalised(layer: Layer) -> Layer:
    """Return the layer inside of ``Penalised``, or the layer itself."""
    return unpenalised(layer.layer) if isinstance(layer, Penalised) else layer


def penalty(model: nnx.Module) -> jax.Array:
    """Return the sum of the costs of all layers in the last call of a model."""
    costs = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, Penalty)))
    return sum(costs, jnp.zeros(()))
