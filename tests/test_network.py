"""The network that the flags name: neurons, thresholds, models, types of numbers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from spikejax import neurons
from spikejax.data import images
from spikejax.experiment import Experiment
from spikejax.experiment import build as network
from spikejax.layers import IF, LIF, PLIF, MultiThreshold
from spikejax.models import MODELS
from spikejax.train import TrainConfig
from spikejax.train.checksum import by_path

NAMES = ("lif", "plif", "if", "mt-parallel", "mt-cascade", "relu")


@pytest.mark.parametrize("name", NAMES)
def test_every_neuron_has_its_layer(name):
    layer = network.neuron_factory(Experiment(Path("x"), neuron=name))()
    kinds = {"lif": LIF, "plif": PLIF, "if": IF}
    if name == "relu":
        assert layer is nnx.relu
        return
    assert type(layer) is kinds.get(name, MultiThreshold)
    assert layer.v_reset is None
    assert layer.num_thresholds == (4 if name.startswith("mt-") else 1)
    cells = {"mt-parallel": neurons.parallel, "mt-cascade": neurons.cascade}
    assert layer.cell is cells.get(name, neurons.lif)


def test_the_names_are_those_of_the_flag():
    assert network.NeuronName.__args__ == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_call_gives_a_neuron_of_its_own(name):
    factory = network.neuron_factory(Experiment(Path("x"), neuron=name))
    assert name == "relu" or factory() is not factory()


@pytest.mark.parametrize(
    ("neuron", "count", "expected"),
    [
        ("lif", 4, 1.0),
        ("relu", 4, 1.0),
        ("mt-parallel", 1, 1.0),
        ("mt-cascade", 4, 0.5),
    ],
)
def test_several_thresholds_stand_closer(neuron, count, expected):
    flags = Experiment(Path("x"), neuron=neuron, num_thresholds=count)
    assert network.spacing(flags) == expected


def parameters(**flags):
    """{path: value} of the network for digits."""
    made = Experiment(Path("x"), **flags)
    model = network.build_model(made, images.load("digits"))
    return by_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def test_the_parameters_do_not_depend_on_the_time_steps():
    one, four = parameters(), parameters(time_steps=4)
    assert one.keys() == four.keys()
    assert all(jnp.array_equal(one[path], four[path]) for path in one)


def test_the_parameters_depend_on_the_seed():
    one, other = parameters(), parameters(train=TrainConfig(seed=1))
    different = [path for path in one if not jnp.array_equal(one[path], other[path])]
    assert {path for path in one if path.endswith("kernel")} <= set(different)


@pytest.mark.parametrize("neuron", ["lif", "mt-parallel"])
def test_the_relu_twin_has_the_same_kernels(neuron):
    twin, spiking = parameters(neuron="relu"), parameters(neuron=neuron)
    kernels = [path for path in spiking if path.endswith("kernel")]
    assert len(kernels) == 4
    for path in kernels:
        assert jnp.array_equal(twin[path], spiking[path])
    assert set(twin) == {path for path in spiking if "leak" not in path}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_answers_with_a_logit_a_class(name):
    flags = Experiment(Path("x"), data="fake", model=name, time_steps=2)
    fake = images.load("fake")

    def answer(xs):
        model = network.build_model(flags, fake)
        model.eval()
        return model(xs)

    xs = jnp.zeros((2, 2, 32, 32, 3))
    assert jax.eval_shape(answer, xs).shape == (2, 2, 10)


@pytest.mark.parametrize("model", ["convnet", "resnet20"])
def test_bfloat16_is_of_the_computation_and_not_of_the_parameters(model):
    flags = Experiment(Path("x"), data="fake", model=model, dtype="bfloat16")

    def answer(xs):
        net = network.build_model(flags, images.load("fake"))
        return net(xs), nnx.to_pure_dict(nnx.state(net))

    logits, state = jax.eval_shape(answer, jnp.zeros((2, 1, 32, 32, 3)))
    assert logits.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))


def test_width_scales_the_channels():
    def shapes(width):
        flags = Experiment(Path("x"), data="fake", model="resnet19", width=width)

        def make():
            net = network.build_model(flags, images.load("fake"))
            return nnx.to_pure_dict(nnx.state(net, nnx.Param))

        return [leaf.shape for leaf in by_path(jax.eval_shape(make)).values()]

    for whole, part in zip(shapes(1.0), shapes(0.125), strict=True):
        logits = whole[-1:] == (10,)
        assert whole == part == () or logits or whole[-1] == 8 * part[-1]


@pytest.mark.parametrize("remat", ["none", "blocks"])
def test_recomputing_blocks_is_passed_on(remat):
    flags = Experiment(Path("x"), data="fake", model="resnet20", remat=remat, width=0.1)
    found = []

    def make():
        found.append(network.build_model(flags, images.load("fake")).remat)

    jax.eval_shape(make)
    assert found == [remat == "blocks"]
