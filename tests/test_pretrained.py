"""Neurons and weights of SpikingJelly and snnTorch."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden.seeded import images, weights

from spikejax import surrogate
from spikejax.layers import IF, LIF, PLIF
from spikejax.models.pretrained import load_resnet, snntorch_neuron, spikingjelly_neuron
from spikejax.models.resnet import ResNet, ms, resnet18, sew
from spikejax.neurons import late_reset

GOLDEN = np.load(Path(__file__).parent / "golden/sew_resnet.npz")
SEED, NAMES = int(GOLDEN["seed"]), list(map(str, GOLDEN["names"]))
SHAPES = [tuple(map(int, shape.split())) for shape in GOLDEN["shapes"]]
NEURONS = {
    "spikingjelly": partial(
        spikingjelly_neuron, tau=float(GOLDEN["tau"]), v_reset=None
    ),
    "snntorch": partial(snntorch_neuron, float(GOLDEN["beta"])),
}
XS = jax.random.uniform(jax.random.key(0), (1, 20, 3), maxval=1.5)


@pytest.fixture(scope="module")
def state():
    return weights(NAMES, SHAPES, SEED)


def empty(classes=10, model=resnet18, residual=sew, neuron=NEURONS["spikingjelly"]):
    """The network with shapes for weights."""
    return nnx.eval_shape(
        lambda: model(classes, neuron=neuron, residual=residual, rngs=nnx.Rngs(0))
    )


@pytest.mark.parametrize("library", NEURONS)
def test_sew_resnet_18_answers_as_there(library, state):
    model = load_resnet(empty(neuron=NEURONS[library]), state)
    expected = np.moveaxis(GOLDEN[f"{library}/logits"], 0, 1)
    assert GOLDEN[f"{library}/rates"].min() > 0.005 and np.abs(expected).max() > 0.5
    graphdef, arrays = nnx.split(model)
    answer = jax.jit(lambda arrays, xs: nnx.merge(graphdef, arrays)(xs))
    xs = jnp.asarray(np.moveaxis(images(SEED), 2, -1))
    np.testing.assert_allclose(answer(arrays, xs), expected, atol=1e-5)


def test_neurons_of_spikingjelly():
    layer = spikingjelly_neuron()
    assert layer.params.leak == 0.5
    assert (layer.options.v_reset, layer.options.decay_input) == (0.0, True)
    layer = spikingjelly_neuron(tau=None, v_reset=None)
    assert layer.params.leak == 0 and layer.options.v_reset is None
    np.testing.assert_array_equal(layer(XS), IF()(XS))


def test_neurons_of_snntorch():
    layer = snntorch_neuron(0.75, reset_mechanism="zero")
    expected = LIF(4.0, v_reset=0.0, decay_input=False, detach_reset=True)
    assert (layer.params, layer.options) == (expected.params, expected.options)
    np.testing.assert_array_equal(layer(XS), expected(XS))
    layer = snntorch_neuron(0.75, 0.5, reset_delay=False)
    assert layer.options.v_reset is None and layer.params.thresholds == (0.5,)
    late = snntorch_neuron(0.75)
    assert late.cell is late_reset
    assert (late(XS) != snntorch_neuron(0.75, reset_delay=False)(XS)).any()


def test_without_a_leak_late_is_as_early():
    np.testing.assert_array_equal(snntorch_neuron(1.0)(XS), IF()(XS))


def test_betas_of_their_own():
    betas = np.array([0.5, 0.7, 0.9])
    both = snntorch_neuron(betas, reset_mechanism="zero")(XS)
    ones = [snntorch_neuron(b, reset_mechanism="zero")(XS) for b in betas]
    expected = jnp.stack([one[..., k] for k, one in enumerate(ones)], -1)
    assert expected.sum() > 5
    np.testing.assert_array_equal(both, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 1.5}, "expected 0 <= beta <= 1, .* got beta=1.5"),
        ({"beta": 0.5, "reset_mechanism": "none"}, "'none'.* layers.LI for a readout"),
        ({"beta": 0.0}, "beta > 0 with a reset that comes one step later"),
    ],
)
def test_neurons_that_snntorch_has_and_we_have_not(arguments, message):
    with pytest.raises(ValueError, match=f"snntorch_neuron: .*{message}"):
        snntorch_neuron(**arguments)


def test_what_the_state_says_of_neurons_is_taken(state):
    more = {"sn1.w": np.float32(0.5), "sn1.num_batches_tracked": np.zeros(1)}
    model = load_resnet(empty(neuron=PLIF), state | more)
    assert float(model.stage_neuron.leak_logit[...]) == 0.5
    more = {"layer1.0.sn2.beta": 0.25, "layer1.0.sn2.threshold": np.float32(2)}
    model = load_resnet(empty(neuron=NEURONS["snntorch"]), state | more)
    changed = model.blocks[0].neurons[1]
    assert changed.cell is late_reset
    assert changed.params.leak == 0.75 and changed.params.thresholds == (2.0,)
    # What else snnTorch saves of a Leaky, and an array of betas of maps [C, H, W].
    betas = np.linspace(0.25, 0.75, 64).reshape(64, 1, 1)
    more = {"sn1.beta": betas, "sn1.threshold": np.ones(())}
    more |= {"sn1.graded_spikes_factor": np.ones(()), "sn1.reset_mechanism_val": 0}
    more |= {"layer1.0.sn1.threshold": np.float32(3)}
    model = load_resnet(empty(neuron=NEURONS["snntorch"]), state | more)
    leak = model.stage_neuron.params.leak
    np.testing.assert_allclose(leak[0, 0], 1 - betas.ravel(), rtol=1e-6)
    changed = model.blocks[0].neurons[0]
    assert changed.params.thresholds == (3.0,)
    assert changed.params.leak == pytest.approx(1 - float(GOLDEN["beta"]))


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"residual": ms}, {}, "expected a residual network, plain or sew, with"),
        ({"classes": 9}, {}, r"fc.weight of shape \(10, 512\) in place of \(9, 512"),
        ({}, {"fc.bias": None}, r"fc.bias of shape None in place of \(10,\). Make"),
        ({}, {"conv9.weight": np.ones(3)}, "got 1 other: conv9.weight"),
        ({}, {"layer4.2.bn1.bias": np.ones(512)}, "layer4.2.* Make the model as deep"),
        (
            {},
            {"sn1.w": np.ones(())},
            "expected neurons that learn tau at 'sn1', got LIF",
        ),
        ({}, {"sn1.graded_spikes_factor": 2.0}, "'sn1' with spikes of 1 and the reset"),
        (
            {},
            {"sn1.reset_mechanism_val": 1},
            "got graded_.* reset_mechanism_val 1",
        ),
    ],
)
def test_weights_of_another_network_are_refused(state, options, change, message):
    given = {k: v for k, v in (state | change).items() if v is not None}
    with pytest.raises(ValueError, match=f"load_resnet: .*{message}"):
        load_resnet(empty(**options), given)


def test_the_names_are_those_of_any_depth():
    small = partial(ResNet, (1, 2), (4, 8), imagenet_stem=True, bottleneck=True)
    model = empty(3, model=small)
    names, shapes = ["conv1.weight"], [(4, 3, 7, 7)]
    for name, width, inputs in [
        ("layer1.0", 4, 4),
        ("layer2.0", 8, 16),
        ("layer2.1", 8, 32),
    ]:
        kernels = [
            (width, inputs, 1, 1),
            (width, width, 3, 3),
            (4 * width, width, 1, 1),
        ]
        names += [f"{name}.conv{k}.weight" for k in (1, 2, 3)]
        shapes += kernels
        if name.endswith("0"):
            names.append(f"{name}.downsample.0.weight")
            shapes.append((4 * width, inputs, 1, 1))
    for name, shape in list(zip(names, shapes, strict=True)):
        norm = name.removesuffix(".weight").replace("conv", "bn")
        norm = norm.replace("downsample.0", "downsample.1")
        for key in ("weight", "bias", "running_mean", "running_var"):
            names.append(f"{norm}.{key}")
            shapes.append(shape[:1])
    names += ["fc.weight", "fc.bias"]
    shapes += [(3, 32), (3,)]
    given = weights(names, shapes, 0)
    load_resnet(model, given)
    kernel = model.blocks[2].convs[1].kernel[...]
    np.testing.assert_array_equal(
        kernel[0, 2, 3, 1], given["layer2.1.conv2.weight"][1, 3, 0, 2]
    )
    np.testing.assert_array_equal(
        model.blocks[1].norms[2].mean[...], given["layer2.0.bn3.running_mean"]
    )


def leaky(mode, xs, beta, threshold):
    """The loop of snnTorch 1.0.0's Leaky over [T], with its detached late reset."""
    membrane, spikes = jnp.zeros(()), []
    reset_delay, subtract = "delay" in mode, "subtract" in mode
    for x in xs:
        reset = jax.lax.stop_gradient(surrogate.ATAN(membrane - threshold))
        if reset_delay and not subtract:
            membrane = (1 - reset) * membrane
        membrane = beta * membrane + x
        if reset_delay and subtract:
            membrane = membrane - reset * threshold
        z = surrogate.ATAN(membrane - threshold)
        if not reset_delay:
            membrane = membrane - z * (threshold if subtract else membrane)
        spikes.append(z)
    return jnp.stack(spikes)


@pytest.mark.parametrize("mode", ["subtract, delay", "zero, delay", "subtract", "zero"])
def test_gradients_are_those_of_snntorch(mode):
    """A reset that comes one step later is detached there, the other is not."""
    kind, *late = mode.split(", ")
    layer = snntorch_neuron(0.75, 1.0, reset_mechanism=kind, reset_delay=bool(late))
    xs = jnp.array([0.4, 0.9, 0.3, 1.2, 0.2, 0.7, 0.1])
    weights = jnp.arange(1.0, 8.0)
    ours = jax.grad(lambda xs: (layer(xs[None])[0] * weights).sum())(xs)
    theirs = jax.grad(lambda xs: (leaky(mode, xs, 0.75, 1.0) * weights).sum())(xs)
    np.testing.assert_array_equal(layer(xs[None])[0], leaky(mode, xs, 0.75, 1.0))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
