"""Costs of layers in the loss of a training: rates out of their bounds."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from spikejax import LIF, Penalised, losses
from spikejax.nn.penalty import penalty, unpenalised
from spikejax.train import TrainConfig
from spikejax.train.step import initial_state, make_train_step

BOUNDS = partial(losses.firing_rate, lower=0.25, upper=0.3)


def test_a_rate_out_of_bounds_by_hand():
    # rates of the first example 0 and 1/2, of the second 1 and 1/2
    spikes = jnp.array([[[0, 1], [0, 0]], [[1, 0], [1, 1]]], jnp.float32)
    found = losses.firing_rate(spikes, lower=0.25, upper=0.3)
    np.testing.assert_allclose(found, [0.25**2 / 2, 0.45**2], rtol=1e-6)
    np.testing.assert_array_equal(losses.firing_rate(spikes), [0, 0])
    image = spikes[..., None] * jnp.ones(3)  # places count as neurons
    found = losses.firing_rate(image, lower=0.25, upper=0.3)
    np.testing.assert_allclose(found, [0.25**2 / 2, 0.45**2], rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "lower", "upper"),
    [((2, 3), 0.0, 1.0), ((2, 3, 4), 0.5, 0.1), ((2, 3, 4), -0.1, 1.0)],
)
def test_bounds_have_a_range(shape, lower, upper):
    with pytest.raises(ValueError, match=r"firing_rate: expected spikes \[B, T, ...\]"):
        losses.firing_rate(jnp.zeros(shape), lower=lower, upper=upper)


class Net(nnx.Module):
    """A hidden layer whose thresholds its currents hardly reach."""

    def __init__(self, v_threshold=2.0):
        rngs = nnx.Rngs(0)
        self.hidden = nnx.Linear(6, 8, rngs=rngs)
        self.neurons = Penalised(LIF(v_threshold=v_threshold), BOUNDS, 3.0)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, xs):
        return self.head(self.neurons(self.hidden(xs)))


XS = jax.random.uniform(jax.random.key(0), (16, 4, 6))
LABELS = jnp.arange(16) % 2


def encoded(images, rng):
    return images


@pytest.mark.parametrize("groups", [1, 2])
def test_a_training_step_adds_the_costs_to_its_loss(groups):
    model, optimizer = Net(0.3), optax.sgd(0.1)
    spikes = LIF(v_threshold=0.3)(model.hidden(XS))
    cost = 3 * BOUNDS(spikes).mean()
    cross = losses.rate_cross_entropy(model(XS), LABELS).mean()
    np.testing.assert_allclose(penalty(model), cost, rtol=1e-6)
    assert cost > 0.01 and 0.1 < spikes.mean() < 0.9
    state = initial_state(model, optimizer, TrainConfig())
    step = make_train_step(
        nnx.graphdef(model),
        losses.rate_cross_entropy,
        encoded,
        optimizer,
        norm_groups=groups,
    )
    after, metrics = jax.jit(step)(state, {"image": XS, "label": LABELS})
    np.testing.assert_allclose(metrics["loss"], cross + cost, rtol=1e-5)

    def objective(kernel):  # without Penalised
        v = LIF(v_threshold=0.3)(XS @ kernel + model.hidden.bias[...])
        logits = losses.rate_cross_entropy(model.head(v), LABELS)
        return logits.mean() + 3 * BOUNDS(v).mean()

    kernel = model.hidden.kernel[...]
    expected = kernel - 0.1 * jax.grad(objective)(kernel)
    found = after["params"]["hidden"]["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_silent_neurons_learn_to_fire_at_the_lower_bound():
    model = Net()
    assert model.neurons(model.hidden(XS)).sum() == 0
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    def objective(params):
        trained = nnx.merge(graphdef, params, rest)
        trained(XS)
        return penalty(trained)

    def step(params, _):
        gradients = jax.grad(objective)(params)
        return jax.tree.map(lambda p, g: p - 10 * g, params, gradients), None

    params, _ = jax.lax.scan(step, params, length=300)
    trained = nnx.merge(graphdef, params, rest)
    rates = trained.neurons.layer(trained.hidden(XS)).mean((0, 1))
    assert rates.min() > 0.2 and rates.mean() < 0.3


def test_evaluation_keeps_no_cost():
    model = Net(0.3)
    model.eval()
    before = model.neurons.cost[...]
    compiled = jax.jit(lambda xs: model(xs))(XS)  # writes nothing into the model
    assert model.neurons.cost[...] is before and compiled.shape == (16, 4, 2)
    assert math.isclose(penalty(nnx.Linear(2, 2, rngs=nnx.Rngs(0))), 0.0)


def test_two_costs_of_one_layer():
    inner = Penalised(LIF(), losses.firing_rate)
    assert unpenalised(Penalised(inner, losses.firing_rate)) is inner.layer
