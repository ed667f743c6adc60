"""State between calls: kept, dropped, stepped, in every kind of layer."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax import surrogate
from spikejax.layers import IF, LIF, PLIF, MultiThreshold
from spikejax.memory import (
    Membrane,
    _advance,
    drop_membranes,
    has_held,
    keep_membranes,
    stepper,
)
from spikejax.neurons import cascade, independent

# name -> a layer, so that every option is on somewhere
LAYERS = {
    "if": lambda: IF(),
    "if hard": lambda: IF(0.75, v_reset=0.0),
    "lif": lambda: LIF(3.0),
    "lif below": lambda: LIF(v_reset=-0.25, decay_input=False),
    "lif learned": lambda: LIF(1.5, 0.5, learn_tau=True, learn_thresholds=True),
    "plif": lambda: PLIF(v_reset=0.0, detach_reset=True),
    "parallel": lambda: MultiThreshold(4, decay_input=False),
    "parallel given": lambda: MultiThreshold((0.5, 0.75, 2), learn_thresholds=True),
    "parallel hard": lambda: MultiThreshold(2, v_threshold=0.5, v_reset=-0.25),
    "cascade": lambda: MultiThreshold(3, cascade, tau=math.inf, decay_input=False),
    "cascade dyadic": lambda: MultiThreshold((1, 0.5, 0.25), cascade, learn_tau=True),
    "cascade learned": lambda: MultiThreshold(2, cascade, learn_thresholds=True),
    "independent": lambda: MultiThreshold(3, independent, v_threshold=0.5),
    "independent hard": lambda: MultiThreshold(
        (0.6, 1.6), independent, v_reset=0.0, surrogate=surrogate.rectangle()
    ),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def currents(steps, seed=0, shape=(3,)):
    return 2 * jax.random.normal(jax.random.key(seed), (2, steps, *shape)) + 0.5


def two_layers(neuron):
    """Two layers of neurons with weights before them."""
    rngs = nnx.Rngs(0)
    first, second = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)
    return nnx.Sequential(first, neuron(), second, neuron())


def held(layer):
    """The state that a layer of neurons keeps."""
    return layer.memory.held[0][...]


@every_layer
def test_whole_equals_step_by_step(name):
    xs = currents(4)
    whole = LAYERS[name]()(xs)
    layer = keep_membranes(LAYERS[name](), xs)
    steps = [layer(xs[:, t : t + 1]) for t in range(4)]
    assert 0 < (whole > 0).mean() < 1
    np.testing.assert_array_equal(whole, jnp.concatenate(steps, 1))


@pytest.mark.parametrize("name", ["plif", "independent hard"])
def test_a_long_sequence_equals_its_slices_whatever_their_lengths(name):
    xs = currents(80)
    whole = keep_membranes(LAYERS[name](), xs)
    sliced = keep_membranes(LAYERS[name](), xs)
    spikes = whole(xs)
    slices = [sliced(piece) for piece in np.split(np.asarray(xs), [1, 4, 10, 75], 1)]
    np.testing.assert_array_equal(spikes, jnp.concatenate(slices, 1))
    np.testing.assert_allclose(held(whole), held(sliced), 0, 1e-5)


def test_without_keep_membranes_every_call_starts_from_rest():
    layer, xs = LIF(), currents(3)
    np.testing.assert_array_equal(layer(xs), layer(xs))
    assert not has_held(layer)
    assert not jax.tree.leaves(nnx.state(layer))


def test_keep_membranes_again_starts_from_rest():
    xs = currents(3)
    layer = keep_membranes(LIF(4.0, v_reset=-0.5), xs)
    first, second = layer(xs), layer(xs)
    assert (first != second).any()
    np.testing.assert_array_equal(keep_membranes(layer, xs)(xs), first)
    other = currents(3, shape=(5,))
    assert keep_membranes(layer, other)(other).shape == (2, 3, 5)


def test_drop_membranes_is_the_way_back():
    xs = currents(3)
    layer = keep_membranes(LIF(4.0), xs)
    first, second = layer(xs), layer(xs)
    assert has_held(layer) and (first != second).any()
    assert not has_held(drop_membranes(layer))
    np.testing.assert_array_equal(layer(xs), first)
    np.testing.assert_array_equal(layer(xs), first)
    assert not jax.tree.leaves(nnx.state(layer))


def test_states_have_their_shape_and_start_from_the_first():
    layer = keep_membranes(LIF(v_reset=-0.5, decay_input=False), jnp.zeros((2, 1, 3)))
    np.testing.assert_array_equal(held(layer), jnp.full((2, 3), -0.5))
    layer(jnp.zeros((2, 1, 3)))
    np.testing.assert_array_equal(held(layer), jnp.full((2, 3), -0.5))
    started = keep_membranes(LIF(v_start=0.25), jnp.zeros((2, 1, 3)))
    np.testing.assert_array_equal(held(started), jnp.full((2, 3), 0.25))


def test_a_membrane_of_tau_one_forgets():
    xs = jnp.full((1, 3, 1), 0.75)
    layer = keep_membranes(LIF(1.0), xs)
    layer(xs)
    assert held(layer).tolist() == [[0.75]]


def test_membranes_are_no_parameters():
    network = keep_membranes(two_layers(PLIF), currents(2))
    params, membranes, rest = nnx.state(network, nnx.Param, Membrane, ...)
    assert len(jax.tree.leaves(membranes)) == 2 and not jax.tree.leaves(rest)
    assert len(jax.tree.leaves(params)) == 6


def test_a_stepper_is_a_pure_function_of_one_slice():
    xs, network = currents(5), two_layers(MultiThreshold)
    whole = network(xs)
    state, step = stepper(network, xs)
    assert not has_held(network)  # not modified

    # In a scan: one step of every sequence of a batch after the other.
    def body(state, x):
        return step(state, x[:, None])

    _, slices = jax.lax.scan(body, state, jnp.moveaxis(xs, 1, 0))
    np.testing.assert_allclose(jnp.moveaxis(slices[:, :, 0], 0, 1), whole, 0, 1e-6)

    # Compiled once for slices of one length.
    traced = []

    @jax.jit
    def compiled(state, x):
        traced.append(x)
        return step(state, x)

    later, outputs = state, []
    for t in range(5):
        later, spikes = compiled(later, xs[:, t : t + 1])
        outputs.append(spikes)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), whole, 0, 1e-6)
    assert len(traced) == 1
    _, again = step(state, xs)  # from rest, of any length
    np.testing.assert_allclose(again, whole, 0, 1e-6)


def test_later_slices_do_not_compile_again():
    """Not even after a training, which puts the parameters on a device of theirs."""
    network = two_layers(MultiThreshold)
    graphdef, state = nnx.split(network)
    network = nnx.merge(graphdef, jax.device_put(state, jax.devices()[0]))
    xs = currents(3)
    state, step = stepper(network, xs)
    state, _ = step(state, xs[:, :1])
    compiled = _advance._cache_size()
    for t in (1, 2):
        state, _ = step(state, xs[:, t : t + 1])
    assert _advance._cache_size() == compiled


def test_a_stepper_runs_in_evaluation_mode():
    rngs = nnx.Rngs(0)
    network = nnx.Sequential(nnx.Dropout(0.9, rngs=rngs), LIF())
    xs = currents(2)
    state, step = stepper(network, xs)
    np.testing.assert_array_equal(step(state, xs)[1], LIF()(xs))
    assert not network.layers[0].deterministic


def test_membranes_stream_through_nnx_jit():
    xs = currents(4)
    layer = keep_membranes(MultiThreshold(), xs)
    step = nnx.jit(lambda layer, x: layer(x[:, None]))
    steps = [step(layer, xs[:, t]) for t in range(4)]
    np.testing.assert_array_equal(MultiThreshold()(xs), jnp.concatenate(steps, 1))


@pytest.mark.parametrize(
    "name", ["lif", "parallel given", "cascade dyadic", "independent"]
)
def test_bfloat16_in_gives_bfloat16_out_and_a_float32_membrane(name):
    xs = currents(4).astype(jnp.bfloat16)
    layer = keep_membranes(LAYERS[name](), xs)
    spikes, backward = jax.vjp(LAYERS[name](), xs)
    (gradient,) = backward(jnp.ones_like(spikes))
    assert spikes.dtype == gradient.dtype == jnp.bfloat16
    assert gradient.shape == xs.shape
    layer(xs)
    assert held(layer).dtype == jnp.float32
    exact = LAYERS[name]()(xs.astype(jnp.float32))
    np.testing.assert_array_equal(spikes, exact.astype(jnp.bfloat16))


def test_small_bfloat16_currents_add_up_to_a_spike():
    # In bfloat16 the sum stops at 1/2, where half a bit is all that an input adds.
    xs = jnp.full((1, 600, 1), 2.0**-9, jnp.bfloat16)
    spikes = IF()(xs)
    assert spikes[0, 511, 0] == 1 and spikes.sum() == 1


@pytest.mark.parametrize("neuron", [LIF, partial(MultiThreshold, 2, independent)])
def test_a_held_membrane_refuses_input_of_another_batch_size(neuron):
    layer = keep_membranes(neuron(), jnp.zeros((2, 4, 3)))
    with pytest.raises(
        ValueError,
        match=r"expected input for membranes \(.*2, 3\), got input for \(.*5, 3\). "
        r"Call keep_membranes\(model, xs\) for the new shape",
    ):
        layer(jnp.zeros((5, 4, 3)))


@pytest.mark.parametrize("function", [keep_membranes, stepper])
def test_keep_membranes_needs_a_model_with_neurons(function):
    with pytest.raises(
        ValueError, match="with spiking neurons, got Linear without any.* an attribute"
    ):
        function(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), jnp.zeros((1, 1, 2)))


def test_a_neuron_at_two_places_has_no_membrane_of_its_own():
    linear, neuron = nnx.Linear(3, 3, rngs=nnx.Rngs(0)), LIF()
    model = nnx.Sequential(linear, neuron, linear, neuron)
    with pytest.raises(ValueError, match="called at one place, got .* at two. Give"):
        keep_membranes(model, jnp.ones((1, 2, 3)))


def test_a_slice_without_its_time_axis_is_refused():
    layer = keep_membranes(LIF(), jnp.zeros((2, 3, 4, 5)))
    with pytest.raises(ValueError, match="keeps its time axis: xs"):
        layer(jnp.zeros((2, 4, 5)))
