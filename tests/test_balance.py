"""Scales by which layers fire at a rate: by hand, counted by energy, and trained."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

from spikejax import IF, LI, LIF, MultiThreshold, balance, energy, losses
from spikejax._compat import List
from spikejax.models.resnet import ResNet, ms
from spikejax.models.vgg import POOL, VGG
from spikejax.nn.delay import Delay
from spikejax.nn.recurrent import LSTM, Recurrent

R = nnx.Rngs
lif = partial(LIF, decay_input=False, detach_reset=True)


class Plain(nnx.Module):
    """Layers one after the other, without norms, which share their neurons."""

    def __init__(self, layers, neuron, head):
        self.layers, self.neuron, self.head = List(layers), neuron, head

    def __call__(self, xs):
        for layer in self.layers:
            xs = self.neuron(layer(xs))
        return self.head(xs.mean((2, 3)) if xs.ndim == 5 else xs)


def dense(depth, width=64):
    rngs = R(0)
    sizes = pairwise([64] + depth * [width])
    layers = [nnx.Linear(*size, rngs=rngs) for size in sizes]
    return Plain(layers, lif(), nnx.Linear(width, 10, rngs=rngs))


def convolutional(depth):
    rngs = R(0)
    layers = [nnx.Conv(4 if k else 1, 4, (3, 3), rngs=rngs) for k in range(depth)]
    return Plain(layers, lif(), nnx.Linear(4, 10, rngs=rngs))


def counted(model, xs):
    """Spikes per neuron and step behind each layer, of the neurons themselves."""
    rates = []
    for layer in model.layers:
        xs = model.neuron(layer(xs))
        rates.append(float(xs.mean()))
    return np.array(rates)


def digits(image=()):
    images, labels = load_digits(return_X_y=True)
    xs = jnp.asarray(images / 16, jnp.float32).reshape(len(images), 1, *image or (64,))
    return jnp.repeat(xs, 2, 1), jnp.asarray(labels)


def test_two_layers_by_hand():
    """Currents g/100 to 10 g/100, of which 3 in 10 are to reach 1: g = 100/8.

    Their spikes meet 0.08, 0.09 and 0.1: all three are to fire, g = 1/0.08.
    """
    rngs = R(0)
    first, second = (nnx.Linear(10, 10, rngs=rngs) for _ in range(2))
    first.kernel[...] = jnp.eye(10)
    second.kernel[...] = jnp.diag(jnp.arange(1.0, 11) / 100)
    model = nnx.Sequential(first, IF(), second, IF())
    xs = jnp.arange(1.0, 11).reshape(1, 1, 10) / 100
    made = balance(model, xs, rate=0.3)
    scales = [layer.scale for layer in made.layers]
    np.testing.assert_allclose(scales, [12.5, 12.5], rtol=2e-3)
    assert [layer.weights for layer in made.layers] == [("layers/0",), ("layers/2",)]
    assert [layer.before for layer in made.layers] == [0, 0]
    np.testing.assert_allclose([layer.rate for layer in made.layers], 0.3, rtol=1e-6)
    np.testing.assert_allclose(made.model.layers[0].kernel[...], scales[0] * np.eye(10))
    assert made.model(xs).sum() == 3 and model(xs).sum() == 0


def test_a_bias_is_scaled_as_its_kernel():
    """Currents 0.05 and 0.15, of which one in two is to reach 1: g = 1/0.15."""
    model = nnx.Sequential(nnx.Linear(2, 2, rngs=R(0)), IF())
    model.layers[0].kernel[...] = jnp.eye(2) / 10
    model.layers[0].bias[...] = jnp.array([-0.05, 0.05])
    made = balance(model, jnp.ones((1, 1, 2)), rate=0.5)
    linear = made.model.layers[0]
    np.testing.assert_allclose(linear.kernel[...], np.eye(2) / 1.5, rtol=2e-3)
    np.testing.assert_allclose(linear.bias[...], [-1 / 3, 1 / 3], rtol=2e-3)
    assert made.model(jnp.ones((1, 1, 2))).tolist() == [[[0, 1]]]


@pytest.mark.parametrize(
    ("make", "image"),
    [(partial(dense, 20), ()), (partial(convolutional, 10), (8, 8, 1))],
)
def test_deep_layers_that_are_silent_fire_at_the_rate(make, image):
    xs = digits(image)[0][:32]
    model = make()
    assert (counted(model, xs)[-5:] == 0).all()
    made = balance(model, xs, rate=0.2)
    rates = counted(made.model, xs)
    np.testing.assert_allclose(rates, 0.2, rtol=0.05)
    np.testing.assert_allclose(rates, [layer.rate for layer in made.layers], rtol=1e-6)
    assert (counted(model, xs)[-5:] == 0).all()  # it is not modified


def test_layers_that_are_saturated_fire_at_the_rate():
    model, xs = dense(3), digits()[0][:32]
    for layer in model.layers:
        layer.kernel[...] = 4 * abs(layer.kernel[...])
    assert (counted(model, xs)[1:] == 1).all()
    np.testing.assert_allclose(counted(balance(model, xs).model, xs), 0.1, rtol=0.05)


@partial(jax.jit, static_argnums=0)
def accuracy(graphdef, params, rest, xs, labels):
    optimizer = optax.adam(1e-3)

    def step(carry, key):
        params, state = carry
        i = jax.random.randint(key, (64,), 0, 1400)

        def loss(params):
            logits = nnx.merge(graphdef, params, rest)(xs[i])
            return losses.rate_cross_entropy(logits, labels[i]).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(0), 250)
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    logits = nnx.merge(graphdef, params, rest)(xs[1400:]).mean(1)
    return (logits.argmax(-1) == labels[1400:]).mean()


def test_ten_layers_learn_where_those_of_the_default_start_do_not():
    xs, labels = digits()
    model = dense(10)
    scaled = balance(model, xs[:64], rate=0.2).model
    parts = [nnx.split(m, nnx.Param, ...) for m in (model, scaled)]
    before, after = (accuracy(*split, xs, labels) for split in parts)
    assert before < 0.2 and after > 0.3


IMAGES = jax.random.uniform(jax.random.key(0), (8, 2, 8, 8, 3))


def test_with_norms_their_scales_change_a_little():
    neuron = partial(MultiThreshold, 2, decay_input=False)
    model = VGG((4, POOL, 6), 3, neuron=neuron, rngs=R(0))
    made = balance(model, IMAGES, rate=0.3)
    for k, layer in enumerate(made.layers):
        assert layer.weights == (f"norms/{k}",) and 0.5 < layer.scale < 2
    assert not made.model.norms[0].mean[...].any()  # statistics are not modified
    for norm in made.model.norms:
        norm.momentum = 0.0
    made.model(IMAGES)  # now its statistics are those of the batch
    report = energy.measure(made.model, IMAGES)
    rates = [row.rate for row in report.neurons]
    np.testing.assert_allclose(rates, 0.3, rtol=0.05)


def test_currents_that_charge_earlier_neurons_keep_their_scale():
    """The stream of an MS block that starts as the identity is that of the stem."""
    model = ResNet((2,), (4,), 3, neuron=LIF, residual=ms, rngs=R(0))
    rows = {layer.path: layer for layer in balance(model, IMAGES).layers}
    assert rows["blocks/0/neurons/0"].weights == ("stem_norm",)
    second = rows["blocks/1/neurons/0"]
    assert not second.weights and second.scale == 1
    assert second.before == second.rate == pytest.approx(0.1, rel=0.05)
    assert rows["blocks/1/neurons/1"].weights == ("blocks/1/norms/0",)


class Streams(nnx.Module):
    """Sums before and after neurons, a norm over features, and what is not linear."""

    def __init__(self):
        rngs = R(0)
        linear = partial(nnx.Linear, 3, 3, rngs=rngs)
        self.a, self.b, self.c, self.d = linear(), linear(), linear(), linear()
        self.norm, self.delay = nnx.LayerNorm(3, rngs=rngs), Delay(2, 3, rngs=rngs)
        self.feedback, self.lstm = Recurrent(lif(), 3, rngs=rngs), LSTM(3, 3, rngs=rngs)
        self.neurons, self.output = List([lif() for _ in range(5)]), LI()
        self.position = nnx.Param(jnp.ones(3))

    def __call__(self, xs):
        stream = self.a(xs) - 2 * self.b(xs)
        zs = self.neurons[0](self.delay(stream))
        stream = stream + self.c(zs)
        zs = self.neurons[1](stream) + self.feedback(self.norm(stream))
        ys = self.neurons[2](self.d(zs) + self.position[...])
        zs = self.neurons[3](self.lstm(zs)) + self.neurons[4](jnp.tanh(self.d(zs)))
        return self.output(ys + zs)


def test_what_charges_neurons_is_found_through_sums_norms_and_delays():
    xs = jax.random.normal(jax.random.key(0), (32, 3, 3))
    rows = balance(Streams(), xs, rate=0.3).layers
    assert [(row.path, row.weights) for row in rows] == [
        ("neurons/0", ("a", "b")),
        ("neurons/1", ()),
        ("feedback", ("norm",)),
        ("neurons/2", ()),
        ("neurons/3", ()),
        ("neurons/4", ()),
    ]
    # The second stream has the scale of the first in it.
    assert rows[0].scale > 1.05 and rows[0].rate == pytest.approx(0.3, rel=0.1)
    assert rows[2].rate == pytest.approx(0.3, rel=0.1)
    for row in rows[1:2] + rows[3:]:
        assert row.before == pytest.approx(row.rate, rel=1e-6)


def test_a_rate_that_no_scale_reaches_is_in_its_row():
    model = nnx.Sequential(nnx.Linear(2, 2, rngs=R(0)), IF())
    model.layers[0].kernel[...] = jnp.array([[1.0, -1.0], [1.0, -1.0]]) / 8
    made = balance(model, jnp.ones((1, 1, 2)), rate=0.9)
    assert made.layers[0].rate == 0.5 and made.layers[0].scale == pytest.approx(
        4, rel=2e-3
    )
    model.layers[0].kernel[...] = -jnp.ones((2, 2))
    made = balance(model, jnp.ones((1, 1, 2)))
    assert made.layers[0] == ("layers/1", 0.0, 0.0, (), 1.0)


def test_bad_input():
    xs = jnp.ones((1, 1, 2))
    linear = nnx.Linear(2, 2, rngs=R(0))
    with pytest.raises(ValueError, match="balance: expected a rate above 0, got -1"):
        balance(linear, xs, rate=-1)
    with pytest.raises(
        ValueError, match="balance: expected a model with .* a Linear wi"
    ):
        balance(linear, xs)
    with pytest.raises(
        ValueError, match="balance: expected an nnx.Module, got a ModuleMeta"
    ):
        balance(LIF, xs)
