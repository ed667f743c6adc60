"""Gradients in each time step: equal to BPTT at T = 1 and to sums by hand at T = 3."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax import losses
from spikejax.layers import LIF, MultiThreshold
from spikejax.memory import has_held
from spikejax.nn import online
from spikejax.nn.online import Traced
from spikejax.nn.penalty import Penalised

LABELS = jnp.array([[1.0, 0.0], [0.0, 1.0]])
TAU = 4.0


def squares(logits, labels):
    return 0.5 * ((logits.mean(1) - labels) ** 2).sum(-1)


def network(wrap, norm=()):
    rngs = nnx.Rngs(0)
    first, last = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
    first.kernel[...] *= 3
    layers = wrap(first), *norm, LIF(TAU), wrap(last)
    return nnx.Sequential(*layers)


def traced(layer):
    return Traced(layer, TAU)


def currents(steps):
    return 2 * jax.random.normal(jax.random.key(steps), (2, steps, 3)) + 1


@nnx.jit
def of_steps(model, xs):
    return online.value_and_grad(model, squares, xs, LABELS)


@nnx.jit
def through_time(model, xs):
    return nnx.value_and_grad(lambda m: squares(m(xs), LABELS).mean())(model)


def assert_equal(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), one, other)


@pytest.mark.parametrize("wrap", [lambda layer: layer, traced])
def test_one_step_is_backpropagation(wrap):
    model = network(wrap)
    value, gradients = of_steps(model, currents(1))
    expected, all_gradients = through_time(model, currents(1))
    assert_equal((value, gradients), (expected, all_gradients))
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(gradients))


def by_hand(model, xs, traces):
    """Loss and gradients of kernels and biases, each step written out in NumPy."""
    layers = [model.layers[0], model.layers[2]]
    layers = [getattr(layer, "layer", layer) for layer in layers]
    (w1, b1), (w2, b2) = [
        (np.asarray(layer.kernel[...], float), np.asarray(layer.bias[...], float))
        for layer in layers
    ]
    v, a1, a2, total = 0.0, 0.0, 0.0, 0.0
    sums = [np.zeros_like(w) for w in (b1, w1, b2, w2)]
    keep = (1 - 1 / TAU) if traces else 0.0
    for x in np.moveaxis(np.asarray(xs, float), 1, 0):
        u = v + (x @ w1 + b1 - v) / TAU
        z = (u >= 1).astype(float)
        v = u - z
        d_o = z @ w2 + b2 - LABELS
        total += 0.5 * (d_o**2).sum(1).mean()
        d_o = np.asarray(d_o) / 2  # the mean over two examples
        d_u = d_o @ w2.T / (1 + (np.pi * (u - 1)) ** 2)  # atan of width 2
        d_i = d_u / TAU
        a1, a2 = keep * a1 + x, keep * a2 + z
        for total_g, g in zip(
            sums, (d_i.sum(0), a1.T @ d_i, d_o.sum(0), a2.T @ d_o), strict=True
        ):
            total_g += g
    steps = xs.shape[1]
    return total / steps, [g / steps for g in sums]


@pytest.mark.parametrize("wrap", [lambda layer: layer, traced], ids=["SLTT", "OTTT"])
def test_three_steps_are_the_sum_by_hand(wrap):
    model, xs = network(wrap), currents(3)
    value, gradients = of_steps(model, xs)
    expected, sums = by_hand(model, xs, wrap is traced)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    leaves = jax.tree.leaves(gradients)  # bias before kernel, layer by layer
    for found, wanted in zip(leaves, sums, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    # They are not the gradients of backpropagation through time.
    other = jax.tree.leaves(through_time(network(lambda layer: layer), xs)[1])
    assert jnp.abs(other[1] - leaves[1]).max() > 1e-3


def test_traced_layers_are_plain_in_a_whole_sequence():
    xs = currents(3)
    plain, wrapped = network(lambda layer: layer), network(traced)
    one, other = through_time(plain, xs), through_time(wrapped, xs)
    assert_equal(jax.tree.leaves(one), jax.tree.leaves(other))
    np.testing.assert_array_equal(plain(xs), wrapped(xs))


def test_the_loss_is_that_of_the_sequence_and_statistics_are_saved():
    norm, xs = nnx.BatchNorm(8, momentum=0.5, rngs=nnx.Rngs(0)), currents(3)
    model = network(lambda layer: layer, [norm])
    inputs = model.layers[0](xs)
    of_steps(model, xs)
    assert not has_held(model)
    mean = np.zeros(8)
    for t in range(3):
        mean = 0.5 * mean + 0.5 * np.asarray(inputs[:, t].mean(0))
    np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-5, atol=1e-6)
    model.eval()  # statistics stay as they are
    value, _ = of_steps(model, xs)
    logits = model(xs)
    each = [squares(logits[:, t : t + 1], LABELS).mean() for t in range(3)]
    np.testing.assert_allclose(value, np.mean(each), rtol=1e-5)


def scratch(gradient, steps):
    """Bytes of memory of the compiled gradient, beside its arguments and results."""
    model = nnx.Sequential(
        Traced(nnx.Linear(3, 64, rngs=nnx.Rngs(0))),
        MultiThreshold(2),
        nnx.Linear(64, 2, rngs=nnx.Rngs(1)),
    )
    graphdef, state = nnx.split(model)

    def compiled(state, xs):
        return gradient(nnx.merge(graphdef, state), xs)

    given = state, jax.ShapeDtypeStruct((2, steps, 3), jnp.float32)
    memory = jax.jit(compiled).lower(*given).compile().memory_analysis()
    return memory.temp_size_in_bytes


def test_memory_does_not_grow_with_time():
    few, many = (scratch(of_steps.__wrapped__, steps) for steps in (8, 256))
    assert many <= 1.01 * few
    assert scratch(through_time.__wrapped__, 256) > 4 * many


def test_bad_input():
    message = "online.value_and_grad: expected a floating point sequence [B, T, ...]"
    with pytest.raises(ValueError, match=re.escape(message)):
        online.value_and_grad(network(traced), squares, jnp.zeros(3), LABELS)
    linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="expected a model with spiking neurons"):
        online.value_and_grad(linear, losses.rate_mse, currents(2), LABELS)
    with pytest.raises(ValueError, match="Traced: expected tau >= 1"):
        Traced(linear, 0.5)


def test_steps_after_the_end_do_not_count(monkeypatch):
    """As each sequence alone, without what pads it."""
    xs, lengths = currents(6), jnp.array([6, 3, 1])[: len(currents(6))]
    model = network(traced)

    def alone(k):
        part = xs[k : k + 1, : int(lengths[k])]
        labels = LABELS[k : k + 1]
        return online.value_and_grad(nnx.clone(model), squares, part, labels)

    padded = [x.at[n:].set(99.0) for x, n in zip(xs, lengths.tolist(), strict=True)]
    given = jnp.stack(padded), LABELS, lengths
    value, gradients = online.value_and_grad(nnx.clone(model), squares, *given)
    found = [alone(k) for k in range(len(xs))]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *found)
    np.testing.assert_allclose(value, mean[0], rtol=1e-5)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, gradients, mean[1])


def test_costs_of_layers_are_added():
    xs, labels = jnp.ones((2, 3, 4)), jnp.array([0, 1])
    found = []
    for weight in (0.0, 2.0):
        rngs = nnx.Rngs(0)
        cost = Penalised(LIF(), lambda ys: (ys.mean((1, 2)) - 1) ** 2, weight)
        model = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), cost)
        model = nnx.Sequential(*model.layers, nnx.Linear(4, 2, rngs=rngs))
        loss = losses.rate_cross_entropy
        found.append(online.value_and_grad(model, loss, xs, labels)[0])
        steps = [cost.layer(model.layers[0](xs))[:, t].mean(-1) for t in range(3)]
    expected = 2 * np.mean([(np.asarray(s) - 1) ** 2 for s in steps])
    np.testing.assert_allclose(found[1] - found[0], expected, rtol=1e-5)


def test_each_step_draws_its_own_numbers_and_the_model_keeps_the_count():
    layers = (
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)),
        LIF(),
        nnx.Dropout(0.5, rngs=nnx.Rngs(0)),
    )
    model = nnx.Sequential(*layers)

    def squares(logits, labels):
        return (logits.mean(1) ** 2).sum(-1)

    online.value_and_grad(model, squares, jnp.ones((2, 3, 3)), jnp.zeros(2, int))
    assert int(model.layers[2].rngs.count[...]) == 3
    with pytest.raises(
        ValueError, match="online.value_and_grad: expected lengths of 2"
    ):
        online.value_and_grad(model, squares, jnp.ones((2, 3, 3)), None, [1, 2, 3])
