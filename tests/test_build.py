"""The network that the options name: neurons, thresholds, models, types of numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax import neurons
from spikejax._compat import iter_modules
from spikejax.experiment.build import (
    ActivationOptions,
    GeneralOptions,
    MultiThresholdOptions,
    NetworkOptions,
    ReLUOptions,
    ResNetOptions,
    SequenceOptions,
    SingleOptions,
    TransformerOptions,
    VGGOptions,
    build_model,
    neuron_factory,
)
from spikejax.experiment.cli import alternatives
from spikejax.layers import IF, LIF, PLIF, MultiThreshold
from spikejax.models import MODELS
from spikejax.nn import cpu, windowed
from spikejax.nn.cells import ALIF, ILIF, adaptive
from spikejax.nn.quant import half_up, quantise
from spikejax.train.checksum import by_path

NEURONS = alternatives(ActivationOptions.__args__)[1]
FAMILIES = alternatives(NetworkOptions.__args__)[1]
NAMES = ("lif", "plif", "if", "mt-parallel", "mt-cascade", "i-lif", "alif", "relu")
# Others with larger numbers: test_models has their parameters.
DEEP = {"resnet50", "resnet101", "resnet152"} | {
    name for name, kind in FAMILIES.items() if kind is TransformerOptions
} - {"transformer-small"}
DEEP |= {f"efficientnet-lite{k}" for k in range(1, 5)}
CONVNET = VGGOptions("convnet")


def made(name, network=CONVNET, **options):
    return neuron_factory(NEURONS[name](name, **options), network)()


@pytest.mark.parametrize("name", NAMES)
def test_every_neuron_has_its_layer(name):
    layer = made(name)
    kinds = {"lif": LIF, "plif": PLIF, "if": IF, "i-lif": ILIF, "alif": ALIF}
    if name == "relu":
        assert layer is nnx.relu
        return
    assert type(layer) is kinds.get(name, MultiThreshold)
    assert layer.num_thresholds == (4 if name in ("i-lif", *NAMES[3:5]) else 1)
    cells = {"mt-parallel": neurons.parallel, "mt-cascade": neurons.cascade}
    cells |= {"i-lif": neurons.parallel, "alif": adaptive}
    assert layer.cell is cells.get(name, neurons.lif)
    assert layer.options.v_reset is None and layer.options.detach_reset
    learned = jax.tree.leaves(nnx.state(layer, nnx.Param))
    assert len(learned) == (name == "plif")  # mt-* and lif learn the same: nothing
    assert made(name) is not layer


def test_the_names_are_those_of_the_models():
    sequences = {"dense", "gru", "linear"}  # of one class
    assert set(FAMILIES) - sequences == set(MODELS) and set(NEURONS) == set(NAMES)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("lif", {}, [1.0]),
        ("mt-parallel", {"num_thresholds": 1}, [1.0]),
        ("mt-parallel", {"num_thresholds": 3}, [0.5, 1.0, 1.5]),
        ("mt-cascade", {"num_thresholds": 3}, [0.5, 0.5, 0.5]),
    ],
)
def test_several_thresholds_cover_normalised_inputs(name, options, expected):
    layer = made(name, **options)
    assert jnp.allclose(jnp.array(layer.params.thresholds), jnp.array(expected))
    assert jnp.allclose(layer.params.leak, 0.5)


@pytest.mark.parametrize(("name", "shift"), [("i-lif", 0.0), ("mt-parallel", 0.25)])
def test_rectangles_make_a_quantised_relu_with_a_straight_through_gradient(name, shift):
    layer = made(name, surrogate="rectangle")
    # The first step of four thresholds 0.5 apart, which I-LIF rounds and others cut.
    xs = jnp.linspace(-1.0, 3.0, 200)[:, None] + shift
    spikes, pull = jax.vjp(layer, xs)
    relu = partial(quantise, scale=0.5, noise=0.0, levels=4.0, rounding=half_up)
    expected, expected_pull = jax.vjp(lambda x: relu(x - shift) / 0.5, xs)
    np.testing.assert_array_equal(spikes, expected)
    g = jnp.ones_like(xs)
    np.testing.assert_allclose(pull(g)[0], expected_pull(g)[0], rtol=1e-6)
    assert set(np.unique(spikes)) == {0.0, 1.0, 2.0, 3.0, 4.0}


def test_the_rectangle_of_one_threshold_is_as_wide_as_it_is_high():
    xs = jnp.array([[0.4], [0.6], [1.4], [1.6]])
    _, pull = jax.vjp(made("lif", surrogate="rectangle"), xs)
    np.testing.assert_array_equal(pull(jnp.ones_like(xs))[0][:, 0], [0, 1, 1, 0])


def test_the_gain_of_the_norms_does_not_depend_on_the_neurons():
    for options in (SingleOptions("lif"), MultiThresholdOptions(num_thresholds=4)):
        values = parameters(options)
        assert {float(v.mean()) for k, v in values.items() if "scale" in k} == {1.0}


@pytest.mark.parametrize(
    "network",
    [
        GeneralOptions(width=0.1),
        TransformerOptions(),
        SequenceOptions(),
        SequenceOptions(recurrent=True),
    ],
)
def test_linear_layers_are_those_of_the_platform(network):
    def kinds(platform):
        options = {"num_classes": 3, "in_channels": 3, "seed": 0, "platform": platform}
        model = build_model(network, SingleOptions("lif"), **options)
        return {
            module.dot_general
            for _, module in iter_modules(model)
            if isinstance(module, nnx.Linear)
        }

    assert cpu.dot_general in kinds("cpu") and cpu.dot_general not in kinds("tpu")


def test_an_imagenet_network_can_pool_by_the_mean():
    def pool(name):
        options = ResNetOptions("resnet18-imagenet", width=0.02, pool=name)
        parts = {"neuron": LIF, "num_classes": 3, "pool": nnx.max_pool}
        return nnx.eval_shape(lambda: options.build(**parts, rngs=nnx.Rngs(0))).pool

    # test_nir_write writes such a network to NIR.
    assert pool("avg") is nnx.avg_pool and pool("max") is nnx.max_pool


def test_networks_that_do_not_pool_refuse_a_pooling():
    message = "pool: expected a network for ImageNet, .* got 'avg' for resnet20"
    with pytest.raises(ValueError, match=message):
        ResNetOptions("resnet20", pool="avg")


@pytest.mark.parametrize("name", ["lif", "mt-parallel"])
def test_a_general_snn_has_the_neurons_of_its_authors(name):
    layer = made(name, GeneralOptions())
    assert jnp.allclose(layer.params.leak, 1 / windowed.TAU)
    assert jnp.allclose(layer.params.thresholds[0], windowed.FIRING["v_threshold"])


def parameters(activation, network=CONVNET, seed=0):
    """{path: value} of the network for digits."""
    model = build_model(network, activation, num_classes=10, in_channels=1, seed=seed)
    return by_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def test_the_parameters_depend_on_the_seed():
    relu = ReLUOptions()
    one, other = parameters(relu), parameters(relu, seed=1)
    different = [path for path in one if not jnp.array_equal(one[path], other[path])]
    assert {path for path in one if path.endswith("kernel")} <= set(different)


@pytest.mark.parametrize("model", ["convnet", "whitened", "vggsnn", "plifnet"])
def test_pooling_is_that_of_the_flags_on_every_platform(model):
    def pools(platform, **flags):
        options = VGGOptions(model, **flags), SingleOptions("lif")
        network = build_model(
            *options, num_classes=2, in_channels=2, seed=0, platform=platform
        )
        return network.pool

    assert pools("cpu") is cpu.max_pool
    assert pools("gpu") is pools("tpu") is nnx.max_pool
    for platform in ("cpu", "gpu", "tpu"):
        assert pools(platform, pool="avg") is nnx.avg_pool


@pytest.mark.parametrize("neuron", ["plif", "mt-parallel"])
def test_the_relu_twin_has_the_same_kernels(neuron):
    twin, spiking = parameters(ReLUOptions()), parameters(NEURONS[neuron]())
    kernels = [path for path in spiking if path.endswith("kernel")]
    assert len(kernels) == 4
    for path in kernels:
        assert jnp.array_equal(twin[path], spiking[path])
    assert set(twin) == {path for path in spiking if "leak" not in path}


def abstract(network, xs):
    """Shapes of logits and state of a network, without its weights."""

    def answer(xs):
        net = network.build(
            num_classes=10,
            in_channels=xs.shape[-1],
            neuron=neuron_factory(SingleOptions("lif"), network),
            rngs=nnx.Rngs(0),
        )
        net.eval()
        return net(xs), nnx.to_pure_dict(nnx.state(net))

    return jax.eval_shape(answer, xs)


@pytest.mark.parametrize("name", sorted({*MODELS} - DEEP))
def test_every_model_returns_a_logit_per_class(name):
    logits, _ = abstract(FAMILIES[name](name), jnp.zeros((2, 2, 32, 32, 3)))
    assert logits.shape == (2, 2, 10)


@pytest.mark.parametrize(
    "network",
    [
        VGGOptions(dtype="bfloat16"),
        ResNetOptions(dtype="bfloat16"),
        TransformerOptions(dtype="bfloat16"),
    ],
)
def test_bfloat16_is_of_the_computation_and_not_of_the_parameters(network):
    logits, state = abstract(network, jnp.zeros((2, 1, 32, 32, 3)))
    assert logits.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))


def test_width_scales_the_channels():
    def shapes(width):
        xs = jnp.zeros((2, 1, 32, 32, 3))
        _, state = abstract(ResNetOptions("resnet19", width=width), xs)
        return [leaf.shape for leaf in jax.tree.leaves(state)]

    for whole, part in zip(shapes(1.0), shapes(0.125), strict=True):
        logits = whole[-1:] == (10,)
        assert whole == part == () or logits or whole[-1] == 8 * part[-1]
