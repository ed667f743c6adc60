"""Networks in binary spikes: the same answers, and each accumulate counted."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax import (
    LIF,
    PLIF,
    MultiThreshold,
    energy,
    keep_membranes,
    neurons,
    spike_driven,
    stepper,
)
from spikejax.conversion import calibrate, convert
from spikejax.functions import Function
from spikejax.layers import LI, Neuron
from spikejax.models import MODELS, resnet
from spikejax.models.vgg import POOL, VGG
from spikejax.models.whitened import WhitenedCNN
from spikejax.neurons import NeuronParams
from spikejax.nir import node, to_nir
from spikejax.nn import cpu
from spikejax.nn.norm import fast_td_batch_norm
from spikejax.nn.quant import ScaledIF
from spikejax.nn.recurrent import Recurrent

R = nnx.Rngs
mt = partial(MultiThreshold, 4, v_threshold=0.5, decay_input=False)
cascade = partial(MultiThreshold, 3, neurons.cascade, v_threshold=0.5)
dyadic = partial(MultiThreshold, (1.0, 0.5, 0.25), neurons.cascade)
unequal = partial(MultiThreshold, (0.25, 0.75, 2.0))


def i_lif():
    levels = (0.5, 1.5, 2.5, 3.5)
    return Neuron(neurons.parallel, NeuronParams(0.75, levels, (1.0,) * 4))


def noise(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def vgg(**options):
    return VGG((4, POOL, 6, 5), 3, rngs=R(0), **options)


def block(**options):
    return resnet.ResNet((1, 1), (4, 6), 3, neuron=mt, rngs=R(0), **options)


fast = {"conv": cpu.Conv, "norm": fast_td_batch_norm, "pool": cpu.max_pool}
IMAGES = noise(2, 1, 8, 8, 3)

# How to make a network, input, trains of the layers with weights; 0 for analog values.
NETWORKS = {
    "parallel": (partial(vgg, neuron=mt), IMAGES, [0, 4, 4, 0]),
    "cascade": (partial(vgg, neuron=cascade), IMAGES, [0, 3, 3, 0]),
    "unequal": (partial(vgg, neuron=unequal), IMAGES, [0, 3, 3, 0]),
    "i-lif": (partial(vgg, neuron=i_lif), noise(2, 5, 8, 8, 3), [0, 4, 4, 0]),
    "plif": (partial(vgg, neuron=PLIF), noise(2, 5, 8, 8, 3), [0, 1, 1, 0]),
    "mean pooling": (partial(vgg, neuron=mt, pool=nnx.avg_pool), IMAGES, [0, 0, 4, 0]),
    "counts": (partial(vgg, neuron=mt), jnp.clip(IMAGES // 0.7, 0, 4), [4, 4, 4, 0]),
    "sew": (partial(block, residual=resnet.sew), IMAGES, [0, 4, 4, 8, 4, 8, 0]),
    "ms": (partial(block, residual=resnet.ms), IMAGES, [0, 4, 4, 4, 4, 0, 0]),
    "plain": (partial(block, residual=resnet.plain), IMAGES, [0, 4, 4, 4, 4, 4, 0]),
    "remat": (
        partial(block, residual=resnet.sew, remat=True),
        IMAGES,
        [0, 4, 4, 8, 4, 8, 0],
    ),
    "kernels of a cpu": (
        partial(block, residual=resnet.sew, imagenet_stem=True, **fast),
        noise(2, 1, 16, 16, 3),
        [0, 4, 4, 8, 4, 8, 0],
    ),
    "whitened": (
        lambda: WhitenedCNN((4, 6), 3, neuron=mt, rngs=R(0)),
        noise(2, 1, 9, 9, 3),
        [0, 4, 4, 4, 4, 4],
    ),
    "recurrent": (
        lambda: nnx.Sequential(
            Recurrent(mt(), 3, rngs=R(0)), nnx.Linear(3, 2, rngs=R(1))
        ),
        noise(2, 5, 3),
        [4, 4],
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_answers_and_accumulates_are_those_of_the_network(name):
    make, xs, trains = NETWORKS[name]
    model = make()
    logits, report = spike_driven(model, xs)
    model.eval()
    expected = model(xs)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6)
    assert report.difference == jnp.abs(logits - expected).max()
    assert [layer.trains for layer in report.layers] == trains
    assert report.virtual_steps == max(trains)
    rows = {row.path: row for row in energy.measure(model, xs).connections}
    assert [layer.path for layer in report.layers] == list(rows)
    for layer in report.layers:
        counted = rows[layer.path].acs, rows[layer.path].macs
        np.testing.assert_allclose((layer.acs, layer.macs), counted, rtol=1e-6)
        assert bool(layer.trains) == (not layer.reason)


@pytest.mark.parametrize("neuron", [mt, dyadic])
def test_sums_that_are_exact_give_the_same_bits(neuron):
    """With weights of whole 64ths every sum is exact, in any order."""
    model = vgg(neuron=neuron)
    model.eval()
    for conv in model.convs:
        conv.kernel = nnx.Param(jnp.round(64 * conv.kernel[...]) / 64)
    xs = jnp.round(8 * IMAGES) / 8
    logits, report = spike_driven(model, xs)
    np.testing.assert_array_equal(logits, model(xs))
    assert report.difference == 0


def test_by_hand():
    """Currents 1 and 2.5 make 1 and 2 spikes; the second meets one weight that is 0."""
    linear = nnx.Linear(2, 2, use_bias=False, rngs=R(0))
    linear.kernel = nnx.Param(jnp.array([[1.0, 2.0], [4.0, 0.0]]))
    neuron = MultiThreshold(3, decay_input=False)
    xs = jnp.array([[[1.0, 2.5]]])
    logits, report = spike_driven(nnx.Sequential(neuron, linear), xs)
    np.testing.assert_array_equal(logits, [[[1 + 2 * 4, 2]]])
    (layer,) = report.layers
    assert layer == ("layers/1", 3, 1 * 2 + 2 * 1, 0.0, "")
    assert str(report).splitlines()[1].split() == ["layers/1", "3", "4", "0"]


def test_the_largest_of_weighed_spikes_are_spikes_again():
    """Of 1.75 = 1 + 1/2 + 1/4 and 1.5, the larger has three spikes."""

    class Pooled(nnx.Module):
        def __init__(self):
            self.neuron, self.head = dyadic(), nnx.Linear(1, 1, rngs=R(0))

        def __call__(self, xs):
            return self.head(self.neuron(xs).max(-1, keepdims=True))

    xs = jnp.array([[[3.75, 3.25]]])  # tau = 2 halves them
    _, report = spike_driven(Pooled(), xs)
    assert report.layers[0][1:4] == (3, 3.0, 0.0)


class Attention(nnx.Module):
    """Products of spikes with spikes."""

    def __init__(self):
        self.queries, self.keys = mt(), LIF(v_threshold=0.5)

    def __call__(self, xs):
        queries, keys = self.queries(xs), self.keys(-xs)
        return jnp.einsum("btnd,btmd->btnm", queries, keys)


def test_a_product_of_spikes_is_one_of_each_pair_of_trains():
    xs, model = noise(2, 1, 3, 4), Attention()
    logits, report = spike_driven(model, xs)
    np.testing.assert_array_equal(logits, model(xs))
    (layer,) = report.layers
    assert layer.trains == 4 and layer.acs == float(logits.sum()) / 2


def test_the_report_says_why_values_are_analog():
    li = nnx.Sequential(LI(), nnx.Linear(3, 2, rngs=R(0)), nnx.Linear(2, 2, rngs=R(0)))
    _, report = spike_driven(li, noise(2, 2, 3))
    assert [layer.reason for layer in report.layers] == ["membranes", "currents"]
    make, xs, _ = NETWORKS["mean pooling"]
    reasons = [layer.reason for layer in spike_driven(make(), xs).report.layers]
    means = "average pooling of spikes", "sum or mean of spikes"
    assert reasons == ["the input", means[0], "", means[1]]
    scaled = nnx.Sequential(
        MultiThreshold(2, v_threshold=np.array([0.5, 1.0])),
        lambda xs: xs * jnp.array([1.0, 2.0]),
        nnx.Linear(2, 2, rngs=R(0)),
    )
    _, report = spike_driven(scaled, noise(2, 1, 2))
    assert report.layers[0].reason == "mul of spikes"


def test_thresholds_per_channel_are_driven_where_spikes_weigh_alike():
    rows = []
    for last in ([1.0, 2.0], [1.0, 5.0]):  # twice the first, and not
        neuron = MultiThreshold([np.array([0.5, 1.0]), np.array(last)])
        model = nnx.Sequential(neuron, nnx.Linear(2, 2, rngs=R(0)))
        rows += spike_driven(model, 4 * noise(2, 1, 2)).report.layers
    assert [row.trains for row in rows] == [2, 0]
    assert [row.reason for row in rows] == ["", "spikes of other weights per channel"]


def test_general_snns_meet_binary_spikes():
    model = MODELS["general-cnn"](3, neuron=LIF, width=0.05, depths=(2,), rngs=R(0))
    xs = noise(1, 1, 4, 4, 3)
    logits, report = spike_driven(model, xs)
    model.eval()
    np.testing.assert_allclose(logits, model(xs), rtol=0, atol=1e-6)
    reasons = {layer.path: layer.reason for layer in report.layers}
    assert reasons["stem"] == "the input"
    assert not reasons["stages/0/0/mixer/network/layers/0"]
    assert reasons["stages/0/0/widen"] == "currents"


@pytest.mark.parametrize("steps", [1, 3])
def test_a_converted_function_of_images_is_as_one_of_sequences(steps):
    """Its neurons see time, though the function has it in the batch: for NIR, too."""
    weights = [noise(5, 6), noise(6, 4), noise(4, 3)]

    def f(params, x):
        first, second, last = params
        return jax.nn.relu(jax.nn.relu(x @ first) @ second) @ last

    xs = noise(2, steps, 5)
    found = []
    for time in (False, True):
        network = Function(f, weights, time=time)
        snn = convert(calibrate(network, noise(8, 1, 5)).model, xs).model
        logits, report = spike_driven(snn, xs)
        np.testing.assert_allclose(logits, snn(xs), rtol=0, atol=1e-5)
        nodes = to_nir(snn, xs, dt=1.0, soft_reset=node).nodes.values()
        assert [type(n).__name__ for n in nodes].count("IF") == 2
        found.append((logits, report.layers, energy.measure(snn, xs)))
    folded, whole = found
    np.testing.assert_allclose(folded[0], whole[0], rtol=0, atol=1e-5)
    assert folded[1] == whole[1] and str(folded[2]) == str(whole[2])
    state, step = stepper(snn, xs)  # the path of its own that slices take
    slices = []
    for t in range(steps):
        state, ys = step(state, xs[:, t : t + 1])
        slices.append(ys)
    np.testing.assert_allclose(jnp.concatenate(slices, 1), folded[0], 0, 1e-5)


@pytest.mark.parametrize("dyadic", [False, True])
@pytest.mark.parametrize("lowest", [0.0, -jnp.inf])
def test_spikes_that_take_others_back_are_trains_of_their_own(dyadic, lowest):
    """Of n thresholds, n trains add and n take back; NIR has no node for it."""
    weights = partial(nnx.Linear, rngs=nnx.Rngs(0))
    neuron = ScaledIF(1.0, 3, dyadic=dyadic, lowest=lowest)
    model = nnx.Sequential(weights(4, 16), neuron, weights(16, 3))
    xs = 9 * noise(5, 3, 4)  # another current in each step: spikes are taken back
    assert model.layers[1](model.layers[0](xs)).min() < 0
    logits, report = spike_driven(model, xs)
    np.testing.assert_allclose(logits, model(xs), 0, 1e-5)
    assert [layer.trains for layer in report.layers] == [0, 6]
    assert report.layers[1].acs == pytest.approx(energy.measure(model, xs).acs)
    with pytest.raises(ValueError, match="'layers/1', got the cell 'signed'"):
        to_nir(model, xs, dt=1e-3)


def test_held_membranes_are_ignored():
    make, xs, _ = NETWORKS["parallel"]
    model = make()
    model.eval()
    held = keep_membranes(nnx.clone(model), xs)
    held(xs)
    np.testing.assert_array_equal(spike_driven(held, xs)[0], spike_driven(model, xs)[0])


def test_what_cannot_be_driven():
    with pytest.raises(ValueError, match="spike_driven: expected an nnx.Module, got a"):
        spike_driven(LIF, IMAGES)
    with pytest.raises(ValueError, match="expected a network with weights .* a LIF"):
        spike_driven(LIF(), IMAGES)

    class Loop(nnx.Module):
        def __call__(self, xs):
            return jax.lax.scan(lambda c, x: (c + x, c), xs[:, 0], xs[0])[1]

    with pytest.raises(ValueError, match=r"got a scan at test_driven.py:\d+"):
        spike_driven(Loop(), noise(1, 2, 1))


class WithConstants(nnx.Module):
    """Spikes, beside numbers that do not depend on the input."""

    def __init__(self, constants):
        rngs = nnx.Rngs(0)
        self.neuron = MultiThreshold(4, v_threshold=0.5, decay_input=False)
        self.constants = nnx.Param(jnp.array(constants))
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, xs):
        spikes = self.neuron(xs)
        more = jnp.broadcast_to(self.constants[...], (*xs.shape[:2], 2))
        return self.head(jnp.concatenate([spikes, more], -1))


@pytest.mark.parametrize(("constants", "trains"), [((0.3, -0.7), 0), ((0.0, 0.0), 4)])
def test_numbers_beside_spikes_are_counted_once(constants, trains):
    xs = 2 * jax.random.normal(jax.random.key(2), (2, 1, 4))
    model = WithConstants(constants)
    logits, report = spike_driven(model, xs)
    np.testing.assert_allclose(logits, model(xs), atol=1e-6)
    (row,) = report.layers
    assert row.trains == trains and (not trains) == (row.reason != "")


def test_feedback_of_unequal_weights_and_a_quotient():
    dyadic = MultiThreshold((1.0, 0.5, 0.25), neurons.cascade)
    xs = 2 * jax.random.normal(jax.random.key(0), (2, 5, 3))
    layers = (
        Recurrent(dyadic, 3, rngs=R(0)),
        lambda xs: xs / 4,
        nnx.Linear(3, 2, rngs=R(1)),
    )
    layers[0].recurrent.kernel[...] *= 5
    model = nnx.Sequential(*layers)
    logits, report = spike_driven(model, xs)
    np.testing.assert_allclose(logits, model(xs), atol=1e-6)
    assert report.layers[1].trains == 3
