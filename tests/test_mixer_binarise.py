"""Maps to spikes: by chance or at a half, and with which gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spikejax.nn.windowed import bernoulli, straight_through, threshold, unchanged
from spikejax.train import sharding

KEY = jax.random.key(0)


@pytest.mark.parametrize("binarise", [bernoulli, straight_through])
def test_bernoulli_fires_with_the_value_as_probability(binarise):
    x = jnp.broadcast_to(jnp.array([-1.0, 0.0, 0.3, 0.9, 1.0, 7.0]), (20_000, 6))
    z = binarise(x, KEY)
    assert set(np.unique(z)) == {0, 1}
    assert z[:, :2].max() == 0 and z[:, 4:].min() == 1
    np.testing.assert_allclose(z.mean(0)[2:4], [0.3, 0.9], atol=0.02)
    np.testing.assert_array_equal(z, bernoulli(x, KEY))
    assert not jnp.array_equal(z, binarise(x, jax.random.key(1)))


@pytest.mark.parametrize(
    ("binarise", "expected"),
    [
        (bernoulli, [0, 0, 0, 0]),
        (straight_through, [0, 2, 3, 0]),
        (threshold, [0, 2, 3, 0]),
        (unchanged, [1, 2, 3, 4]),
    ],
)
def test_gradient_of_the_binarisation(binarise, expected):
    x = jnp.array([-0.5, 0.1, 0.9, 1.5])
    g = jax.grad(lambda x: (binarise(x, KEY) * jnp.arange(1.0, 5)).sum())(x)
    assert g.tolist() == expected


def test_threshold_is_half():
    assert threshold(jnp.array([0.49, 0.5, 3.0]), KEY).tolist() == [0, 1, 1]


def test_the_same_draws_on_several_devices():
    mesh = sharding.data_mesh()
    x = jax.random.uniform(jax.random.key(1), (8, 1, 4, 4, 3))
    placed = sharding.place_batch({"x": np.asarray(x)}, mesh)["x"]
    z = jax.jit(bernoulli)(placed, KEY)
    assert not z.sharding.is_fully_replicated or mesh.size == 1
    np.testing.assert_array_equal(z, bernoulli(x, KEY))
