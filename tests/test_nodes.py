"""Modules for the nodes of NIR: integrators, late reset, pooling, flattening."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax import neurons
from spikejax.layers import LI, LIF, Neuron
from spikejax.neurons import NeuronOptions, NeuronParams, late_reset
from spikejax.nn.memory import keep_membranes
from spikejax.nodes import Flatten, Pool, Scale, Threshold, node_neuron

XS = jnp.asarray([[1.0, 3.0, -2.0, 0.5]])[..., None]  # [1, 4, 1]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (LI(2.0), [0.5, 1.75, -0.125, 0.1875]),
        (LI(2.0, decay_input=False), [1.0, 3.5, -0.25, 0.375]),
        (LI(math.inf, decay_input=False), [1.0, 4.0, 2.0, 2.5]),
    ],
)
def test_a_leaky_integrator_by_hand(layer, expected):
    np.testing.assert_allclose(layer(XS)[0, :, 0], expected)
    assert not jax.tree.leaves(nnx.state(layer, nnx.Param))


def test_a_late_reset_takes_the_whole_threshold_after_the_leak():
    # mem = beta mem + x - z_before threshold, as snnTorch writes it
    beta, threshold = 0.75, 0.5
    xs = np.linspace(-0.2, 0.9, 24, dtype=np.float32)
    mem, z, expected = 0.0, 0.0, []
    for x in xs:
        mem = beta * mem + x - z * threshold
        z = float(mem > threshold)
        expected.append(z)
    params = NeuronParams(1 - beta, (threshold,))
    layer = Neuron(late_reset, params, NeuronOptions(decay_input=False))
    assert 3 < sum(expected) < 20
    np.testing.assert_array_equal(
        layer(jnp.asarray(xs)[None, :, None]).ravel(), expected
    )
    trains = layer(jnp.asarray(xs)[None, :, None], trains=True)
    np.testing.assert_array_equal(trains[0, :, 0, 0], expected)


def test_neurons_with_parameters_of_their_own_are_as_many_layers():
    taus, thresholds = (2.0, 4.0), (0.3, 0.6)
    xs = jax.random.uniform(jax.random.key(0), (2, 9, 2))
    both = node_neuron(
        neurons.lif,
        leak=1 / np.array(taus),
        threshold=np.array(thresholds),
        gain=np.array([1.0, 2.0]),
        offset=0.125,
    )
    ones = [
        LIF(tau, v)(xs[..., k : k + 1] * (k + 1) + 0.125)
        for k, (tau, v) in enumerate(zip(taus, thresholds, strict=True))
    ]
    expected = jnp.concatenate(ones, -1)
    assert 0.1 < expected.mean() < 0.9
    np.testing.assert_array_equal(both(xs), expected)


def test_step_by_step_is_all_at_once():
    layer = node_neuron(neurons.lif, leak=0.5, threshold=0.5, gain=2.0, v_start=0.25)
    whole = layer(XS)
    keep_membranes(layer, XS)
    steps = [layer(XS[:, t : t + 1]) for t in range(4)]
    np.testing.assert_array_equal(jnp.concatenate(steps, 1), whole)


def test_threshold_fires_where_it_is_reached_and_has_a_gradient():
    fires = Threshold(0.5)
    np.testing.assert_array_equal(fires(jnp.asarray([0.4, 0.5, 0.6])), [0, 1, 1])
    assert (jax.grad(lambda x: fires(x).sum())(XS) > 0).all()


def test_flatten_puts_channels_first():
    image = jnp.arange(12.0).reshape(1, 1, 2, 2, 3)
    expected = [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    np.testing.assert_array_equal(Flatten()(image)[0, 0], expected)


def test_pooling_counts_padding_as_zeros():
    image = jnp.arange(16.0).reshape(1, 1, 4, 4, 1)
    ys = Pool((2, 2), (2, 2), mean=True)(image)
    np.testing.assert_array_equal(ys[0, 0, ..., 0], [[2.5, 4.5], [10.5, 12.5]])
    ys = Pool((3, 3), (2, 2), (1, 1), mean=False)(image)
    np.testing.assert_array_equal(ys[0, 0, ..., 0], [[10, 24], [51, 90]])


def test_scale_multiplies():
    np.testing.assert_array_equal(Scale([2.0])(XS), 2 * XS)
