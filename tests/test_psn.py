"""Parallel spiking neurons: published answers, and what a band may see."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax import energy, keep_membranes
from spikejax.nn.psn import PSN, SlidingPSN

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "rules.json"


@pytest.fixture(scope="module")
def golden():
    """Return the answers of public code to one input."""
    if not GOLDEN.exists():
        pytest.skip("no golden answers of public code")
    return json.loads(GOLDEN.read_text())


def published(found, order=None):
    layer = PSN(6, order=order, rngs=nnx.Rngs(0))
    layer.weights[...] = jnp.array(found["w"], jnp.float32)
    layer.bias[...] = jnp.full(6, found["b"], jnp.float32)
    return layer


@pytest.mark.parametrize(("name", "order"), [("psn", None), ("masked psn k 3", 3)])
def test_it_fires_as_the_published_one(golden, name, order):
    x = jnp.array(golden["psn"]["x"], jnp.float32)
    spikes = published(golden["psn"], order)(x[None])[0]
    np.testing.assert_array_equal(spikes, golden[name]["s"])
    assert 0 < spikes.mean() < 1


def test_the_sliding_one_fires_as_the_published_one(golden):
    x = jnp.array(golden["psn"]["x"], jnp.float32)
    spikes = SlidingPSN(3)(x[None])[0]
    np.testing.assert_array_equal(spikes, golden["sliding psn k 3"]["s"])


def test_a_sum_over_time_by_hand():
    layer = PSN(2, rngs=nnx.Rngs(0))
    layer.weights[...] = jnp.array([[1.0, 0.5], [-1.0, 2.0]])
    # u = 1 + 0.5 - 1 and -1 + 2 - 1; then 1.2 + 0.1 - 1 and -1.2 + 0.4 - 1
    xs = jnp.array([[[1.0], [1.0]], [[1.2], [0.2]]])
    assert layer(xs)[..., 0].tolist() == [[1, 1], [1, 0]]
    gradient = jax.grad(lambda xs: layer(xs)[:, 1].sum())(xs)
    assert (gradient[:, 0] / gradient[:, 1]).ravel().tolist() == [-0.5, -0.5]


@pytest.mark.parametrize("order", [1, 2, 4])
def test_a_band_sees_the_last_steps_alone(order):
    layer = PSN(6, order=order, rngs=nnx.Rngs(1))
    xs = jax.random.normal(jax.random.key(0), (2, 6, 3))

    def seen():
        gradient = jax.jacobian(lambda xs: layer(xs)[0, :, 0])(xs)[:, 0, :, 0] != 0
        return np.asarray(gradient)

    t, s = np.mgrid[:6, :6]
    np.testing.assert_array_equal(seen(), (s <= t) & (s > t - order))
    layer.mask[...] = jnp.float32(0.5)  # half on: all are seen
    assert seen().all()


def test_the_sliding_one_streams():
    class Net(nnx.Module):
        def __init__(self):
            self.neuron = SlidingPSN(3)
            self.dense = nnx.Linear(4, 2, use_bias=False, rngs=nnx.Rngs(0))

        def __call__(self, xs):
            return self.dense(self.neuron(xs))

    model, xs = Net(), jax.random.normal(jax.random.key(1), (2, 7, 4)) * 2
    whole = model(xs)
    # Spikes that weights meet are accumulates.
    spent = energy.measure(model, xs)
    assert spent.mac_nj == 0 < spent.energy_nj
    held = keep_membranes(model, xs[:, :2])
    parts = [held(xs[:, a:b]) for a, b in ((0, 2), (2, 3), (3, 7))]
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-6)


def test_arguments_have_ranges():
    with pytest.raises(ValueError, match="PSN: expected at least one time step and an"):
        PSN(0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="an order of 1 or more, got 4 and 0"):
        PSN(4, order=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="PSN: expected 4 time steps, those of its"):
        PSN(4, rngs=nnx.Rngs(0))(jnp.ones((1, 3, 2)))
    with pytest.raises(ValueError, match="SlidingPSN: expected an order of 1 or more"):
        SlidingPSN(0)


def test_initial_weights_are_uniform_within_the_root_of_the_steps():
    weights = np.asarray(PSN(64, rngs=nnx.Rngs(0)).weights[...])
    assert 0.98 / 8 < np.abs(weights).max() <= 1 / 8
    np.testing.assert_allclose(np.abs(weights).mean(), 1 / 16, rtol=0.05)
