"""Layers that feed back: by hand, past and future, and against numpy and Flax."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import slow_general
from flax import nnx

from spikejax import (
    LI,
    LIF,
    PLIF,
    DelayedLinear,
    MultiThreshold,
    independent,
    keep_membranes,
    losses,
)
from spikejax.data import images
from spikejax.memory import stepper
from spikejax.models.pretrained import snntorch_neuron
from spikejax.models.recurrent import RecurrentSNN, dense, feedback, gru
from spikejax.nn.quant import ScaledIF
from spikejax.nn.recurrent import GRU, LSTM, Bidirectional, Recurrent

XS = jax.random.normal(jax.random.key(0), (2, 6, 3))
NEURONS = {
    "lif": lambda: LIF(v_threshold=0.4),
    "hard": lambda: LIF(v_threshold=0.4, v_reset=0.0),
    "several": lambda: MultiThreshold(3, v_threshold=0.3, learn_thresholds=True),
    "independent": lambda: MultiThreshold(2, independent, v_threshold=0.3),
}


def layer(name="lif", features=3):
    return Recurrent(NEURONS[name](), features, rngs=nnx.Rngs(0))


def test_the_first_weights_are_three_tenths_of_an_orthogonal_matrix():
    weights = np.asarray(layer(features=5).recurrent.kernel[...])
    np.testing.assert_allclose(weights @ weights.T, 0.09 * np.eye(5), atol=1e-6)


def test_by_hand():
    """u[t] = u[t-1] / 2 + x[t] + 0.8 z[t-1], threshold 1, soft reset.

    1.0 fires, leaves 0; 0 + 0.3 + 0.8 = 1.1 fires, leaves 0.1;
    0.05 + 0 + 0.8 = 0.85;  0.425 + 0.5 = 0.925;  0.4625 + 0.6 = 1.0625 fires
    """
    neurons = Recurrent(LIF(decay_input=False), 1, rngs=nnx.Rngs(0))
    neurons.recurrent.kernel[...] = jnp.array([[0.8]])
    xs = jnp.array([1.0, 0.3, 0.0, 0.5, 0.6]).reshape(1, 5, 1)
    assert neurons(xs)[0, :, 0].tolist() == [1, 1, 0, 0, 1]


@pytest.mark.parametrize("name", NEURONS)
def test_without_recurrent_weights_it_is_the_neuron(name):
    neurons = layer(name)
    neurons.recurrent.kernel[...] = jnp.zeros((3, 3))
    for trains in (False, True):
        alone = NEURONS[name]()(XS, trains=trains)
        np.testing.assert_array_equal(neurons(XS, trains=trains), alone)


def test_trains_sum_up_to_the_spikes():
    neurons = layer("several")
    spikes, trains = neurons(XS), neurons(XS, trains=True)
    assert trains.shape == (*XS.shape, 3) and spikes.max() > 1
    np.testing.assert_allclose(trains.sum(-1), spikes, rtol=1e-6)


@pytest.mark.parametrize("name", NEURONS)
def test_step_by_step_is_the_whole_sequence(name):
    neurons = layer(name)
    spikes = neurons(XS)
    for _ in range(2):  # keep_membranes starts from rest
        keep_membranes(neurons, XS)
        steps = [neurons(XS[:, t : t + 1]) for t in range(6)]
        np.testing.assert_allclose(jnp.concatenate(steps, 1), spikes, atol=1e-6)


def test_spikes_of_one_neuron_reach_the_others_later():
    neurons = layer()
    g = jax.grad(lambda xs: neurons(xs)[:, 3, 0].sum())(XS)
    assert (g[:, :3, 1:] != 0).any() and (g[:, 4:] == 0).all()
    assert (g[:, 3, 1:] == 0).all()  # not within the step


@pytest.mark.parametrize(
    ("made", "features"), [(LSTM, 4), (Bidirectional, 8)], ids=["one", "both"]
)
def test_lstm_is_that_of_plain_numpy(made, features):
    module = made(3, 4, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    params = jax.tree.map(np.float64, params)
    read = slow_general.lstm if made is LSTM else slow_general.both_ways
    xs = XS if made is LSTM else XS[:, None]  # sequences in space, at one time step
    hs = module(xs).reshape(2, 6, features)
    for b in range(2):
        np.testing.assert_allclose(hs[b], read(np.float64(XS[b]), params), atol=1e-6)


def test_lstm_is_that_of_flax():
    ours = LSTM(3, 4, rngs=nnx.Rngs(0))
    theirs = nnx.OptimizedLSTMCell(3, 4, rngs=nnx.Rngs(0))
    theirs.dense_i.kernel[...] = ours.inputs.kernel[...]
    theirs.dense_h.kernel[...] = ours.recurrent.kernel[...]
    theirs.dense_h.bias[...] = ours.inputs.bias[...] + ours.recurrent.bias[...]
    hs = nnx.RNN(theirs)(XS)
    np.testing.assert_allclose(ours(XS), hs, atol=1e-6)


def test_input_of_another_batch_size_does_not_fit_its_membranes():
    neurons = keep_membranes(layer(), XS)
    match = r"expected input for membranes \(2, 3\), got input for \(1, 3\)"
    with pytest.raises(ValueError, match=match):
        neurons(XS[:1])


def test_it_holds_the_neuron_and_all_that_it_knows():
    """A learned tau, a unit, a start and a cell of its own reach the loop."""
    for neuron in (PLIF(20.0), ScaledIF(2.0), snntorch_neuron(0.9)):
        recurrent = Recurrent(neuron, 3, rngs=nnx.Rngs(0))
        recurrent.recurrent.kernel[...] = jnp.zeros((3, 3))
        np.testing.assert_array_equal(recurrent(2 * XS), neuron(2 * XS))
    found = nnx.to_pure_dict(
        nnx.state(Recurrent(PLIF(), 3, rngs=nnx.Rngs(0)), nnx.Param)
    )
    assert set(found) == {"neuron", "recurrent"}


@pytest.mark.parametrize("made", [GRU, LSTM])
def test_weights_and_biases_start_as_in_pytorch(made):
    layer = made(3, 4, rngs=nnx.Rngs(0))  # uniform in +-1 / sqrt(4)
    for linear in (layer.inputs, layer.recurrent):
        for values in (linear.kernel[...], linear.bias[...]):
            assert -0.5 <= values.min() < -0.25 and 0.25 < values.max() <= 0.5


def test_a_gru_is_that_of_flax():
    layer, cell = GRU(3, 4, rngs=nnx.Rngs(0)), nnx.GRUCell(3, 4, rngs=nnx.Rngs(1))
    layer.recurrent.bias[...] = jnp.zeros(12)  # Flax has none
    cell.dense_i.kernel[...] = layer.inputs.kernel[...]
    cell.dense_i.bias[...] = layer.inputs.bias[...]
    cell.dense_h.kernel[...] = layer.recurrent.kernel[...]
    h = jnp.zeros((2, 4))
    for t in range(XS.shape[1]):
        h, _ = cell(h, XS[:, t])
        np.testing.assert_allclose(layer(XS[:, : t + 1])[:, t], h, rtol=1e-5, atol=1e-6)


def test_a_gru_by_hand():
    """All weights 1, biases 0, x = 1: r, z = s(1 + h), n = tanh(1 + r h)."""
    layer = GRU(1, 1, rngs=nnx.Rngs(0))
    for linear in (layer.inputs, layer.recurrent):
        linear.kernel[...] = jnp.ones((1, 3))
        linear.bias[...] = jnp.zeros(3)
    h, expected = 0.0, []
    for _ in range(3):
        gate = 1 / (1 + np.exp(-1 - h))
        h = (1 - gate) * np.tanh(1 + gate * h) + gate * h
        expected.append(h)
    found = layer(jnp.ones((1, 3, 1)))[0, :, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("made", [GRU, LSTM])
def test_gated_layers_take_slices(made):
    layer = made(3, 4, rngs=nnx.Rngs(0))
    state, step = stepper(layer, XS)
    parts = []
    for t in (0, 2, 4):
        state, ys = step(state, XS[:, t : t + 2])
        parts.append(ys)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), layer(XS), rtol=1e-6)


def lstm(inputs, width, neuron, rngs):
    return nnx.Sequential(LSTM(inputs, width, rngs=rngs), neuron())


delayed = partial(dense, linear=partial(DelayedLinear, max_delay=2))
KINDS = {"dense": dense, "feedback": feedback, "gru": gru, "lstm": lstm}
KINDS |= {"delayed": delayed, "both": partial(feedback, **delayed.keywords)}


@pytest.mark.parametrize("name", KINDS)
def test_networks_answer_step_by_step(name):
    # Without neurons or a readout, a GRU and an LSTM alone keep a state.
    options = {"neuron": partial(LIF, v_threshold=0.1), "kind": KINDS[name]}
    readout = None if name in ("gru", "lstm") else LI(3.0)
    model = RecurrentSNN(3, (4, 4), 2, readout=readout, rngs=nnx.Rngs(0), **options)
    model.eval()
    whole = model(XS)
    assert jnp.abs(jnp.diff(whole, axis=1)).max() > 0.01
    state, step = stepper(model, XS)
    parts = []
    for t in range(0, 6, 2):
        state, ys = step(state, XS[:, t : t + 2])
        parts.append(ys)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-6)


# The network

OPTIONS = {"decay_input": False, "detach_reset": True}


def rows_of_digits():
    """The digits row by row: 8 steps of 8 pixels."""
    found = images.load("digits")
    return [
        (
            jnp.asarray(split.values[..., 0], jnp.float32) / 255,
            jnp.asarray(split.labels),
        )
        for split in (found.train, found.test)
    ]


@pytest.mark.parametrize(
    "neuron",
    [
        partial(LIF, **OPTIONS),
        partial(MultiThreshold, 4, v_threshold=0.5, **OPTIONS),
    ],
    ids=["lif", "multi-threshold"],
)
def test_it_learns_to_read_digits_row_by_row(neuron):
    (xs, labels), (test_xs, test_labels) = rows_of_digits()
    model = RecurrentSNN(8, (64,), 10, neuron=neuron, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, 120))

    @jax.jit
    def epoch(params, state, key):
        def step(carry, rows):
            params, state = carry

            def loss(params):
                logits = nnx.merge(graphdef, params)(xs[rows])
                return losses.rate_cross_entropy(logits, labels[rows]).mean()

            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        order = jax.random.permutation(key, 1500)[:1200].reshape(12, 100)
        return jax.lax.scan(step, (params, state), order)[0]

    state = optimizer.init(params)
    for key in jax.random.split(jax.random.key(0), 10):
        params, state = epoch(params, state, key)
    logits = nnx.merge(graphdef, params)(test_xs)
    assert logits.shape == (297, 8, 10)
    accuracy = float((logits.mean(1).argmax(-1) == test_labels).mean())
    assert accuracy > 0.7  # by chance 0.1


@pytest.mark.parametrize("kind", [GRU, LSTM])
def test_axes_between_time_and_features_do_not_see_each_other(kind):
    layer = kind(3, 4, rngs=nnx.Rngs(0))
    xs = jax.random.normal(jax.random.key(0), (2, 6, 5, 3))
    ys = layer(xs)
    for k in range(5):
        np.testing.assert_allclose(ys[:, :, k], layer(xs[:, :, k]), rtol=1e-5)
