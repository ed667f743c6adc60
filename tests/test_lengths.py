"""Sequences of different lengths in one batch, against each of them alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from spikejax import LI, MultiThreshold, energy, losses
from spikejax.models.recurrent import RecurrentSNN, dense, feedback, gru
from spikejax.nn.delay import DelayedLinear
from spikejax.train import TrainConfig, sharding
from spikejax.train.loop import evaluate, graphs
from spikejax.train.step import (
    initial_state,
    make_eval_step,
    make_predict,
    make_train_step,
)

LENGTHS = np.array([7, 2, 5], np.int32)
LABELS = np.array([1, 0, 2], np.int32)
XS = np.random.default_rng(0).normal(size=(3, 7, 3)).astype(np.float32) * 3
PADDED = np.where(np.arange(7)[:, None] < LENGTHS[:, None, None], XS, 99.5)
ONE = sharding.data_mesh(jax.devices()[:1])


DELAYED = partial(feedback, linear=partial(DelayedLinear, max_delay=3))


def network(kind=DELAYED):
    # Of unequal size, so that a spike is no 1, and few enough to differ between rows.
    neuron = partial(MultiThreshold, (1.0, 1.7), tau=10.0, decay_input=False)
    options = {"neuron": neuron, "readout": LI(3.0)}
    return RecurrentSNN(3, [4], 3, kind=kind, **options, rngs=nnx.Rngs(2))


def train(loss, readout, rows, ends):
    """Loss, accuracy and gradient of some rows, cut where the longest of them ends."""
    model, optimizer = network(), optax.sgd(1.0)
    state = initial_state(model, optimizer, TrainConfig())
    step = make_train_step(
        graphs(model)[0], loss, lambda xs, _: xs, optimizer, readout=readout
    )
    xs = jnp.asarray(PADDED[rows, : LENGTHS[rows].max()])
    batch = {"image": xs, "label": LABELS[rows]} | ends
    new, metrics = jax.jit(step)(state, batch)
    gradient = jax.tree.map(lambda a, b: a - b, state["params"], new["params"])
    return metrics["loss"], metrics["accuracy"], gradient


def test_a_step_is_the_mean_of_the_steps_of_each_sequence_alone():
    loss, readout = losses.max_cross_entropy, losses.max_over_time
    whole = train(loss, readout, np.arange(3), {"length": LENGTHS})
    alone = [train(loss, readout, np.array([k]), {}) for k in range(3)]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *alone)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, mean
    )
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(whole[2]))


def test_evaluation_is_that_of_each_sequence_alone():
    model, readout = network(dense), losses.mean_over_time
    state = initial_state(model, optax.sgd(1.0), TrainConfig())
    predict = make_predict(graphs(model)[1], lambda xs, _: jnp.asarray(xs))
    step = make_eval_step(predict, losses.rate_cross_entropy, readout)
    batch = {"image": PADDED, "label": LABELS, "length": LENGTHS}
    found = evaluate(jax.jit(step), state, [batch], 4, ONE)  # a row of padding too
    model.eval()
    logits = [model(jnp.asarray(XS[k : k + 1, :n])) for k, n in enumerate(LENGTHS)]
    pairs = list(zip(logits, LABELS, strict=True))
    answers = [readout(row).argmax(-1)[0] == label for row, label in pairs]
    costs = [losses.rate_cross_entropy(row, label[None]) for row, label in pairs]
    assert found["accuracy"] == pytest.approx(np.mean(answers))
    assert found["loss"] == pytest.approx(np.mean(costs), rel=1e-5)


KINDS = {"delayed": DELAYED, "dense": dense, "gru": gru}
DENSE = {  # MACs of a step: inputs times outputs, of delays of 0 to 3 steps four times
    "delayed": [4 * 3 * 4, 4 * 4, 4 * 3],
    "dense": [3 * 4, 4 * 3],
    "gru": [3 * 3 * 4, 3 * 4 * 4, 4 * 3],
}


@pytest.mark.parametrize("kind", KINDS)
def test_spikes_and_energy_are_those_of_each_sequence_alone(kind):
    model = network(KINDS[kind])
    found = energy.measure(model, jnp.asarray(PADDED), LENGTHS)
    alone = [
        energy.measure(model, jnp.asarray(XS[k : k + 1, :n]))
        for k, n in enumerate(LENGTHS)
    ]
    for name in ("spikes_per_image", "acs", "macs"):
        expected = np.mean([getattr(report, name) for report in alone])
        assert getattr(found, name) == pytest.approx(expected), name
    assert found.macs > 0 and (found.acs > 0) == (kind != "gru")
    for k, row in enumerate(found.neurons):
        rates = [report.neurons[k].rate for report in alone]
        assert row.rate == pytest.approx(np.average(rates, weights=LENGTHS))
        assert row.path == alone[0].neurons[k].path
    assert [row.dense_macs for row in found.connections] == DENSE[kind]


def test_energy_of_lengths_needs_layers_that_keep_their_state():
    with pytest.raises(ValueError, match="expected a model with spiking neurons"):
        energy.measure(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 2, 3)), [2])


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([1], "measure: expected lengths of 4 sequences"),
        ([1, 2], "measure: expected lengths of 4 sequences"),
        ([1, 2, 3, 7], "measure: expected lengths of 1 to 6 steps, got 1 to 7"),
        ([0, 2, 3, 6], "measure: expected lengths of 1 to 6 steps, got 0 to 6"),
    ],
)
def test_lengths_that_the_batch_cannot_have(lengths, message):
    model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), MultiThreshold(4))
    with pytest.raises(ValueError, match=message):
        energy.measure(model, jnp.ones((4, 6, 3)), lengths)
