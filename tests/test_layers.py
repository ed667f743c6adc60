"""Layers: modules over [B, T, ...], their memory, their parameters, their errors."""

import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax import neurons, surrogate
from spikejax.compat import List
from spikejax.layers import (
    IF,
    LIF,
    PLIF,
    Membrane,
    MultiThreshold,
    keep_membranes,
    neuron_layers,
)
from spikejax.neurons import cascade, independent, parallel
from spikejax.unroll import unroll

GOLDEN = np.load(Path(__file__).parent / "golden/spikingjelly.npz")

# name -> a layer, so that every option is on somewhere
LAYERS = {
    "if": lambda: IF(),
    "if hard": lambda: IF(0.75, v_reset=0.0),
    "lif": lambda: LIF(3.0),
    "lif below": lambda: LIF(v_reset=-0.25, decay_input=False),
    "lif learned": lambda: LIF(1.5, 0.5, learn_tau=True, learn_threshold=True),
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


class Network(nnx.Module):
    """Two layers of neurons, one of them in a list."""

    def __init__(self, neuron=LIF, rngs=None):
        rngs = rngs or nnx.Rngs(0)
        self.blocks = List([nnx.Linear(3, 8, rngs=rngs), neuron()])
        self.head = nnx.Linear(8, 5, rngs=rngs)
        self.out = neuron()

    def __call__(self, xs):
        for block in self.blocks:
            xs = block(xs)
        return self.out(self.head(xs))


# --- the same, whole or in slices


@every_layer
def test_whole_equals_step_by_step(name):
    xs = currents(4)
    whole = LAYERS[name]()(xs)
    layer = keep_membranes(LAYERS[name]())
    steps = [layer(xs[:, t : t + 1]) for t in range(4)]
    assert 0 < (whole > 0).mean() < 1
    np.testing.assert_array_equal(whole, jnp.concatenate(steps, 1))


@pytest.mark.parametrize("name", ["plif", "independent hard"])
def test_a_long_sequence_equals_its_slices_whatever_their_lengths(name):
    xs = currents(80)
    whole = keep_membranes(LAYERS[name]())
    sliced = keep_membranes(LAYERS[name]())
    spikes = whole(xs)
    slices = [sliced(piece) for piece in np.split(np.asarray(xs), [1, 4, 10, 75], 1)]
    np.testing.assert_array_equal(spikes, jnp.concatenate(slices, 1))
    np.testing.assert_allclose(whole.membrane[...], sliced.membrane[...], 0, 1e-5)


def test_a_network_is_equal_layer_by_layer_and_step_by_step():
    xs = currents(4)
    whole = Network(MultiThreshold)(xs)
    network = keep_membranes(Network(MultiThreshold))
    steps = [network(xs[:, t : t + 1]) for t in range(4)]
    np.testing.assert_allclose(whole, jnp.concatenate(steps, 1), 0, 1e-6)


def test_without_keep_membranes_every_call_starts_from_rest():
    layer, xs = LIF(), currents(3)
    np.testing.assert_array_equal(layer(xs), layer(xs))
    assert layer.membrane is None
    assert not jax.tree.leaves(nnx.state(layer))


def test_keep_membranes_again_starts_anew():
    layer, xs = keep_membranes(LIF(4.0, v_reset=-0.5)), currents(3)
    first, second = layer(xs), layer(xs)
    assert (first != second).any()
    np.testing.assert_array_equal(keep_membranes(layer)(xs), first)
    other = keep_membranes(layer)(currents(3, shape=(5,)))  # and for another shape
    assert other.shape == (2, 3, 5)


def test_rest_is_the_reset_value():
    layer = keep_membranes(LIF(v_reset=-0.5, decay_input=False))
    layer(jnp.zeros((2, 1, 3)))
    assert jnp.all(layer.membrane[...] == -0.5)


def test_membranes_are_no_parameters():
    network = keep_membranes(Network(PLIF))
    network(currents(2))
    params, membranes, rest = nnx.state(network, nnx.Param, Membrane, ...)
    assert len(jax.tree.leaves(membranes)) == 2 and not jax.tree.leaves(rest)
    assert len(jax.tree.leaves(params)) == 6


# --- what a layer is


def test_the_plain_layers_are_the_cells_with_their_parameters():
    xs = currents(6)
    np.testing.assert_array_equal(IF()(xs), LIF(math.inf, decay_input=False)(xs))
    np.testing.assert_array_equal(PLIF(3.0)(xs), LIF(3.0, learn_tau=True)(xs))
    np.testing.assert_array_equal(MultiThreshold(1)(xs), LIF()(xs))
    _, spikes = neurons.lif(IF().params, 0.0, xs[:, 0], decay_input=False)
    np.testing.assert_array_equal(IF()(xs)[:, 0], spikes)
    assert IF().params == (0.0, (1.0,)) and LIF(4.0, 0.5).params == (0.25, (0.5,))


def test_neurons_that_could_never_fire_are_refused():
    with pytest.raises(ValueError, match="LIF: expected a finite tau with decay_input"):
        LIF(math.inf)


def test_the_plain_cell_takes_one_threshold():
    with pytest.raises(ValueError, match="expected one threshold for the cell lif"):
        MultiThreshold(4, neurons.lif)


def test_the_number_of_thresholds_may_be_numpys():
    assert MultiThreshold(np.int64(3)).thresholds == (1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    "option",
    [
        {"v_reset": -0.25},
        {"decay_input": False},
        {"detach_reset": True},
        {"surrogate": surrogate.triangle()},
    ],
    ids=lambda option: next(iter(option)),
)
@pytest.mark.parametrize("cell", [neurons.lif, parallel])
def test_every_option_reaches_the_cell(cell, option):
    layer = {neurons.lif: LIF, parallel: MultiThreshold}[cell](**option)
    options = dict(option)
    if "surrogate" in options:
        options["spike"] = options.pop("surrogate")
    rest = jnp.full((2, 3), options.get("v_reset", 0.0))

    def by_cell(xs):
        return unroll(partial(cell, **options), layer.params, rest, xs)[1]

    xs = currents(3)
    spikes, backward = jax.vjp(layer, xs)
    expected, expected_backward = jax.vjp(by_cell, xs)
    np.testing.assert_array_equal(spikes, expected)
    gradient = backward(spikes)[0]
    np.testing.assert_array_equal(gradient, expected_backward(spikes)[0])
    without = {neurons.lif: LIF, parallel: MultiThreshold}[cell]()
    assert jnp.any(gradient != jax.vjp(without, xs)[1](spikes)[0])


@pytest.mark.parametrize(
    "cell, thresholds",
    [
        (parallel, (0.5, 1.0, 1.5)),
        (cascade, (0.5, 0.5, 0.5)),
        (independent, (0.5, 1.0, 1.5)),
    ],
)
def test_a_number_of_thresholds_spaces_them_equally(cell, thresholds):
    layer = MultiThreshold(3, cell, v_threshold=0.5)
    assert layer.params.thresholds == thresholds
    assert layer.num_thresholds == 3


@pytest.mark.parametrize("tau", [1.125, 2.0, 50.0])
def test_learned_parameters_start_at_the_values_given(tau):
    layer = MultiThreshold(
        (0.5, 1.0, 4.0), tau=tau, learn_tau=True, learn_thresholds=True
    )
    assert layer.params.leak == pytest.approx(1 / tau, rel=1e-5)
    np.testing.assert_allclose(layer.params.thresholds, (0.5, 1.0, 4.0), 1e-6)


def test_trains_sum_up_to_the_output():
    layer = MultiThreshold((1.0, 0.5, 0.25), cascade)
    xs = currents(4, shape=(3, 2))
    trains = layer(xs, trains=True)
    assert trains.shape == (2, 4, 3, 2, 3) and set(np.unique(trains)) == {0, 1}
    np.testing.assert_array_equal(trains @ jnp.array([1, 0.5, 0.25]), layer(xs))
    assert LIF()(xs, trains=True).shape == (2, 4, 3, 2, 1)


def test_neuron_layers_finds_them_by_their_paths():
    network = Network(MultiThreshold)
    found = neuron_layers(network)
    assert set(found) == {"blocks/1", "out"}
    assert found["blocks/1"] is network.blocks[1]


def test_two_networks_built_alike_share_one_compilation():
    assert nnx.split(Network())[0] == nnx.split(Network())[0]
    assert nnx.split(Network())[0] != nnx.split(Network(partial(LIF, 3.0)))[0]


# --- learning


def gradients(layer, xs, weights=1.0):
    def loss(layer):
        return (weights * layer(xs)).sum()

    return nnx.to_pure_dict(nnx.grad(loss)(layer))


@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("cell", [parallel, cascade, independent])
def test_tau_and_every_threshold_get_a_gradient(cell, detach_reset):
    layer = MultiThreshold(
        (1.0, 1.5, 2.0),
        cell,
        learn_tau=True,
        learn_thresholds=True,
        detach_reset=detach_reset,
    )
    found = gradients(layer, currents(3))
    assert set(found) == {"leak_logit", "log_steps"}
    assert found["leak_logit"].shape == () and found["log_steps"].shape == (3,)
    assert all(jnp.all(jnp.isfinite(g) & (g != 0)) for g in found.values())


def test_nothing_is_learned_unless_asked_for():
    assert not nnx.state(MultiThreshold(3), nnx.Param)
    assert set(nnx.to_pure_dict(nnx.state(PLIF(), nnx.Param))) == {"leak_logit"}
    learned = nnx.state(LIF(learn_threshold=True), nnx.Param)
    assert set(nnx.to_pure_dict(learned)) == {"log_steps"}


def test_plif_learns_tau_as_spikingjellys_does():
    def loss(layer):
        def both(params, v, x):
            v, z = layer.cell(params, v, x)
            return v, jnp.stack([z, v], -1)

        xs = jnp.asarray(GOLDEN["xs"])[None]
        _, out = unroll(both, layer.params, jnp.zeros((1, 6)), xs)
        weights = GOLDEN["spike_weights"], GOLDEN["membrane_weights"]
        return (jnp.stack(weights, -1) * out[0]).sum()

    found = nnx.to_pure_dict(nnx.grad(loss)(PLIF(float(GOLDEN["plif_tau"]))))
    expected = GOLDEN["PLIF-soft-decay=True/atan-detach=False/dw"]
    np.testing.assert_allclose(found["leak_logit"], expected, 1e-5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("cell", [parallel, cascade])
def test_thresholds_stay_positive_and_rising_after_large_updates(cell, seed):
    layer = MultiThreshold(6, cell, learn_thresholds=True)
    update = jax.random.uniform(jax.random.key(seed), (6,), minval=-5, maxval=5)
    layer.log_steps[...] = layer.log_steps[...] + update
    thresholds = np.array(layer.params.thresholds)
    assert thresholds.min() > 0
    if cell is parallel:
        assert np.diff(thresholds).min() > 0
    assert jnp.all(jnp.isfinite(layer(currents(2))))


def test_gradient_descent_finds_the_tau_and_threshold_of_a_teacher():
    xs = currents(8, shape=(64,))
    options = {"decay_input": False, "detach_reset": True}
    teacher = LIF(4.0, 1.5, **options)(xs)
    student = LIF(1.5, 1.0, learn_tau=True, learn_threshold=True, **options)
    graphdef, state = nnx.split(student)

    @jax.jit
    @jax.grad
    def gradient(state):
        return jnp.mean((nnx.merge(graphdef, state)(xs) - teacher) ** 2)

    for _ in range(100):
        state = jax.tree.map(lambda p, g: p - g, state, gradient(state))
    leak, thresholds = nnx.merge(graphdef, state).params
    assert 1 / leak == pytest.approx(4.0, rel=0.1)
    assert thresholds[0] == pytest.approx(1.5, rel=0.02)


# --- bfloat16


@pytest.mark.parametrize(
    "name", ["lif", "parallel given", "cascade dyadic", "independent"]
)
def test_bfloat16_in_gives_bfloat16_out_and_a_float32_membrane(name):
    xs = currents(4).astype(jnp.bfloat16)
    layer = keep_membranes(LAYERS[name]())
    spikes, backward = jax.vjp(LAYERS[name](), xs)
    (gradient,) = backward(jnp.ones_like(spikes))
    assert spikes.dtype == gradient.dtype == jnp.bfloat16
    assert gradient.shape == xs.shape
    layer(xs)
    assert layer.membrane[...].dtype == jnp.float32
    exact = LAYERS[name]()(xs.astype(jnp.float32))
    np.testing.assert_array_equal(spikes, exact.astype(jnp.bfloat16))


def test_small_bfloat16_currents_add_up_to_a_spike():
    # In bfloat16 the sum stops at 1/2, where half a bit is all that an input adds.
    xs = jnp.full((1, 600, 1), 2.0**-9, jnp.bfloat16)
    spikes = IF()(xs)
    assert spikes[0, 511, 0] == 1 and spikes.sum() == 1


# --- jax.jit without Flax's own transforms


def test_a_layer_runs_inside_plain_jit_as_a_pure_function():
    network, xs = Network(PLIF), currents(6)
    graphdef, state = nnx.split(network)
    state = nnx.to_pure_dict(state)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(state, xs):
        spikes = nnx.merge(graphdef, state)(xs)
        return spikes.sum(), spikes

    (_, spikes), gradient = loss(state, xs)
    np.testing.assert_array_equal(spikes, network(xs))
    assert jax.tree.structure(gradient) == jax.tree.structure(state)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradient))


def test_membranes_stream_through_plain_jit():
    xs = currents(5)
    network = keep_membranes(Network(MultiThreshold))
    network(xs[:, :1])  # now the membranes have their shapes
    graphdef, state = nnx.split(network)
    traced = []

    @jax.jit
    def step(state, x):
        traced.append(x)
        network = nnx.merge(graphdef, state)
        spikes = network(x[:, None])
        return nnx.to_pure_dict(nnx.state(network)), spikes

    state, slices = nnx.to_pure_dict(state), []
    for t in range(1, 5):
        state, spikes = step(state, xs[:, t])
        slices.append(spikes)
    whole = Network(MultiThreshold)(xs)
    np.testing.assert_allclose(whole[:, 1:], jnp.concatenate(slices, 1), 0, 1e-6)
    assert len(traced) == 1


def test_membranes_stream_through_nnx_jit():
    xs = currents(4)
    layer = keep_membranes(MultiThreshold())
    step = nnx.jit(lambda layer, x: layer(x[:, None]))
    steps = [step(layer, xs[:, t]) for t in range(4)]
    np.testing.assert_array_equal(MultiThreshold()(xs), jnp.concatenate(steps, 1))


# --- errors


@pytest.mark.parametrize(
    "shape, dtype, message",
    [
        ((2, 0, 3), "float32", r"LIF: expected a sequence \[B, T, ...\] with T >= 1, "),
        ((2, 0, 3), "float32", r"got shape \(2, 0, 3\)"),
        ((3,), "float32", r"got shape \(3,\). For one time step, add .*: x\[:, None\]"),
        ((), "float32", r"LIF: expected a sequence .*, got shape \(\)"),
        ((2, 4), "int32", r"LIF: expected floating point input, got int32. Convert it"),
        ((2, 4), "bool", "LIF: expected floating point input, got bool"),
        ((2, 4), "uint8", r"got uint8. Convert it: xs.astype\(jnp.float32\)"),
    ],
)
def test_input_must_be_a_sequence_of_floats(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        LIF()(jnp.zeros(shape, dtype))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: LIF(0.5), "LIF: expected tau >= 1, got 0.5. The membrane keeps"),
        (lambda: LIF(-2.0), "LIF: expected tau >= 1, got -2.0"),
        (lambda: LIF(math.nan), "LIF: expected tau >= 1, got nan"),
        (lambda: PLIF(1.0), "PLIF: expected tau > 1 and finite, got 1.0"),
        (lambda: PLIF(math.inf), "PLIF: expected tau > 1 and finite, got inf"),
        (lambda: MultiThreshold(2, tau=0), "MultiThreshold: expected tau >= 1, got 0"),
        (
            lambda: MultiThreshold(2, tau=1, learn_tau=True),
            "MultiThreshold: expected tau > 1 and finite, got 1",
        ),
        (lambda: IF(0.0), r"IF: expected positive thresholds, got \[0.0\]"),
        (lambda: LIF(2.0, -1.0), r"LIF: expected positive thresholds, got \[-1.0\]"),
        (
            lambda: MultiThreshold((0.5, -1.0), cascade),
            r"MultiThreshold: expected positive thresholds, got \[0.5, -1.0\]",
        ),
        (
            lambda: MultiThreshold((1.0, 0.5)),
            r"MultiThreshold: expected rising thresholds, got \[1.0, 0.5\]. Sort",
        ),
        (lambda: MultiThreshold((1.0, 1.0)), "drop those that are equal"),
        (lambda: MultiThreshold(()), "MultiThreshold: expected at least 1 threshold"),
        (lambda: MultiThreshold(0), "num_thresholds: expected at least 1, got 0. One"),
        (lambda: MultiThreshold(-3, cascade), "expected at least 1, got -3"),
        (
            lambda: LIF(v_reset=1.0),
            "LIF: expected v_reset below every threshold 1.0, got 1.0. Give None",
        ),
        (
            lambda: MultiThreshold((1.0, 0.5), cascade, v_reset=0.75),
            "MultiThreshold: expected v_reset below every threshold 0.5, got 0.75",
        ),
    ],
)
def test_options_out_of_range_are_refused_at_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_descending_thresholds_are_for_the_cascade_and_tau_one_has_no_memory():
    MultiThreshold((1.0, 0.5), cascade)
    layer = keep_membranes(LIF(1.0))
    layer(jnp.full((1, 3, 1), 0.75))
    assert layer.membrane[...].tolist() == [[0.75]]


@pytest.mark.parametrize("neuron", [LIF, partial(MultiThreshold, 2, independent)])
def test_a_held_membrane_refuses_input_of_another_batch_size(neuron):
    layer = keep_membranes(neuron())
    layer(jnp.zeros((2, 4, 3)))
    with pytest.raises(
        ValueError,
        match=r"expected input for its membrane \(.*2, 3\), got \(5, 4, 3\). "
        r"Call keep_membranes\(model\) to start anew",
    ):
        layer(jnp.zeros((5, 4, 3)))


def test_keep_membranes_needs_a_model_with_neurons():
    with pytest.raises(ValueError, match="with spiking neurons, found none in Linear."):
        keep_membranes(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
