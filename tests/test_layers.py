"""Layers: modules over [B, T, ...], their options, their parameters, their errors."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from spikejax import neurons, surrogate
from spikejax._compat import List
from spikejax.layers import (
    IF,
    LIF,
    PLIF,
    MultiThreshold,
    Neuron,
    neuron_layers,
)
from spikejax.neurons import NeuronParams, cascade, independent, parallel
from spikejax.unroll import unroll


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


# --- what a layer is


def test_the_plain_layers_are_the_cells_with_their_parameters():
    xs = currents(6)
    np.testing.assert_array_equal(IF()(xs), LIF(math.inf, decay_input=False)(xs))
    np.testing.assert_array_equal(PLIF(3.0)(xs), LIF(3.0, learn_tau=True)(xs))
    np.testing.assert_array_equal(MultiThreshold(1)(xs), LIF()(xs))
    options = neurons.NeuronOptions(decay_input=False)
    _, (spikes,) = neurons.lif(IF().params, 0.0, xs[:, 0], options)
    np.testing.assert_array_equal(IF()(xs)[:, 0], spikes)
    assert IF().params == (0.0, (1.0,), None)
    assert LIF(4.0, 0.5).params == (0.25, (0.5,), None)


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
    options = neurons.NeuronOptions(**option)
    rest = jnp.full((2, 3), options.v_reset or 0.0)

    def one_step(params, v, x):
        v, trains = cell(params, v, x, options)
        return v, sum(trains)

    def by_cell(xs):
        return unroll(one_step, layer.params, rest, xs)[1]

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
    layer = MultiThreshold(np.int64(3), cell, v_threshold=0.5)
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
    first = xs[:, :1]
    _, z = layer.step(layer.start(first.shape), first)
    np.testing.assert_array_equal(z, layer(first))


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
    learned = nnx.state(LIF(learn_thresholds=True), nnx.Param)
    assert set(nnx.to_pure_dict(learned)) == {"log_steps"}


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
    student = LIF(1.5, 1.0, learn_tau=True, learn_thresholds=True, **options)
    graphdef, state = nnx.split(student)

    @jax.jit
    @jax.grad
    def gradient(state):
        return jnp.mean((nnx.merge(graphdef, state)(xs) - teacher) ** 2)

    for _ in range(100):
        state = jax.tree.map(lambda p, g: p - g, state, gradient(state))
    leak, thresholds, _ = nnx.merge(graphdef, state).params
    assert 1 / leak == pytest.approx(4.0, rel=0.1)
    assert thresholds[0] == pytest.approx(1.5, rel=0.02)


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


# --- errors


@pytest.mark.parametrize(
    "shape, dtype",
    [((2, 0, 3), "float32"), ((3,), "float32"), ((), "float32")]
    + [((2, 4), dtype) for dtype in ("int32", "bool", "uint8")],
)
def test_input_must_be_a_sequence_of_floats(shape, dtype):
    message = (
        "LIF: expected a floating point sequence [B, T, ...] with T >= 1, got "
        f"{dtype} of shape {shape}. For one time step, add the time axis: x[:, None]."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        LIF()(jnp.zeros(shape, dtype))


TAU = r"expected tau >= 1, and > 1 and finite where it is learned, got "


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: LIF(0.5), "LIF: " + TAU + "0.5. The membrane keeps"),
        (lambda: LIF(-2.0), "LIF: " + TAU + "-2.0"),
        (lambda: LIF(math.nan), "LIF: " + TAU + "nan"),
        (lambda: PLIF(1.0), "PLIF: " + TAU + "1.0"),
        (lambda: PLIF(math.inf), "PLIF: " + TAU + "inf"),
        (lambda: MultiThreshold(2, tau=0), "MultiThreshold: " + TAU + "0"),
        (lambda: MultiThreshold(2, tau=1, learn_tau=True), TAU + "1"),
        (lambda: LIF(math.inf), "LIF: .* got inf.* tau=math.inf with decay_input=Fal"),
        (lambda: LIF(np.array([2.0, 0.5])), r"LIF: .* got \[2.  0.5\]"),
        (
            lambda: MultiThreshold(4, neurons.lif),
            r"expected one threshold for the cell lif, got \(1.0, .* For several, give",
        ),
        (lambda: IF(0.0), r"IF: expected .* positive thresholds, got \(0.0,\)"),
        (lambda: LIF(2.0, -1.0), r"LIF: .* positive thresholds, got \(-1.0,\)"),
        (
            lambda: MultiThreshold((0.5, -1.0), cascade),
            r"MultiThreshold: .* positive thresholds, got \(0.5, -1.0\)",
        ),
        (
            lambda: MultiThreshold((1.0, 0.5)),
            r"MultiThreshold: .* rising thresholds, got \(1.0, 0.5\). A parallel neur",
        ),
        (lambda: MultiThreshold((1.0, 1.0)), "sorted, without equal ones"),
        (lambda: MultiThreshold(("1", "2")), r"positive thresholds, got \('1', '2'\)"),
        (lambda: MultiThreshold(()), "MultiThreshold: expected at least one threshold"),
        (
            lambda: MultiThreshold(0),
            "num_thresholds: expected a whole number >= 1, got 0. One",
        ),
        (lambda: MultiThreshold(-3, cascade), "expected a whole number >= 1, got -3"),
        (
            lambda: LIF(v_reset=1.0),
            "LIF: expected v_reset below every threshold 1.0, got 1.0. Give None",
        ),
        (
            lambda: MultiThreshold((1.0, 0.5), cascade, v_reset=0.75),
            "MultiThreshold: expected v_reset below every threshold 0.5, got 0.75",
        ),
        (
            lambda: Neuron(neurons.lif, NeuronParams(2.0, (1.0,))),
            "Neuron: expected a leak of 0 to 1, got 2.0",
        ),
        (
            lambda: Neuron(neurons.parallel, NeuronParams(math.nan, (1.0,))),
            "Neuron: expected a leak of 0 to 1, got nan",
        ),
        (
            lambda: Neuron(parallel, NeuronParams(0.5, (1.0, 2.0), (0.0, 1.0))),
            r"each of 2 thresholds, the first not 0, got \(0.0, 1.0\)",
        ),
        (
            lambda: MultiThreshold((1.0, 2.0), v_threshold=0.5),
            "expected v_threshold with a number of thresholds, got it with",
        ),
    ],
)
def test_options_out_of_range_are_refused_at_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "wrong", [("4",), (4.0,), (4, "cascade"), (4, LIF), (4, LIF())]
)
def test_what_is_no_threshold_or_cell_is_an_error(wrong):
    message = "MultiThreshold: expected the number of thresholds or a sequence of them"
    with pytest.raises(ValueError, match=message):
        MultiThreshold(*wrong)


@pytest.mark.parametrize(
    ("thresholds", "expected"),
    [((1.0, 2.0, 4.0), [0, 1, 2, 4]), ((1.0, 3.0, 4.0), [0, 1, 3, 4])],
)
def test_spikes_weigh_what_they_take_away_some_of_them_one(thresholds, expected):
    layer = MultiThreshold(thresholds, decay_input=False)
    x = jnp.array([0.5, 1.5, 3.5, 5.0])
    np.testing.assert_array_equal(layer(x[None, None])[0, 0], expected)
    # Here they are numbers, and not traced.
    np.testing.assert_array_equal(layer.step(layer.start(x.shape), x)[1], expected)


@pytest.mark.parametrize("v_threshold", [0.05, 0.1, 0.15, 0.3, 0.65])
@pytest.mark.parametrize("count", [4, 16])
def test_equally_spaced_thresholds_give_whole_numbers(count, v_threshold):
    """Also where 0.3 - 0.2 is not 0.1 in float32, as in a compiled call."""
    layer = MultiThreshold(count, v_threshold=v_threshold, decay_input=False)
    xs = v_threshold * (jnp.arange(count + 1.0) + 0.5)[None, None]
    np.testing.assert_array_equal(layer(xs)[0, 0], np.arange(count + 1))
    np.testing.assert_array_equal(layer(xs, trains=True).sum(-1), layer(xs))


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        (
            NeuronParams(0.75, (0.5, -0.5), (0.5, -0.5)),
            {"learn_thresholds": True},
            "expected positive thresholds where they are learned",
        ),
        (NeuronParams(0.0), {"learn_tau": True}, "expected a leak of more than 0"),
        (NeuronParams(1.0), {"learn_tau": True}, "expected a leak of more than 0"),
    ],
)
def test_what_cannot_be_learned_is_refused(params, options, message):
    with pytest.raises(ValueError, match=f"Neuron: {message}"):
        Neuron(parallel, params, **options)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (LIF(v_threshold=(1.0, 2.0)), r"\(2,\)"),
        (LIF(tau=jnp.full(5, 2.0)), r"\(5,\)"),
        (LIF(v_start=jnp.ones((1, 1, 1, 8))), r"\(1, 1, 1, 8\)"),
        (MultiThreshold(4, v_threshold=jnp.ones(7)), r"\(7,\)"),
        (PLIF(tau=jnp.full(5, 2.0)), r"\(5,\)"),
    ],
)
def test_parameters_of_other_features_are_refused(layer, shape):
    name = type(layer).__name__
    message = rf"{name}: expected parameters .* features \(8,\), got shape {shape}"
    with pytest.raises(ValueError, match=message):
        layer(jnp.ones((3, 4, 8)))


def test_parameters_may_be_of_places_and_examples():
    for shape in ((8,), (1,), (6, 1), (6, 8), (3, 6, 8)):
        layer = MultiThreshold(2, v_threshold=jnp.full(shape, 0.5))
        xs = jnp.ones((3, 4, 6, 8))
        np.testing.assert_array_equal(layer(xs), MultiThreshold(2, v_threshold=0.5)(xs))


def test_a_layer_that_learns_needs_the_bridge_in_linen():
    class Net(linen.Module):
        wrap: bool

        @linen.compact
        def __call__(self, x):
            make = nnx.bridge.to_linen(PLIF, skip_rng=True) if self.wrap else PLIF()
            return LIF()(make(x))

    key, x = jax.random.key(0), jnp.ones((2, 1, 3))
    assert "leak_logit" in Net(True).init(key, x)["params"]["ToLinen_0"]
    with pytest.raises(ValueError, match=r"^PLIF: expected the bridge .*to_linen\(PL"):
        Net(False).init(key, x)
