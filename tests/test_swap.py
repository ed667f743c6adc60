"""Finding modules and functions in models, and hanging others in their place."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from spikejax._compat import List
from spikejax.conversion.surgery import Spy, activations, check_answer, places
from spikejax.layers import LIF
from spikejax.models.vgg import VGG
from spikejax.nn.quant import QuantReLU


class Gelu(nnx.Module):
    """An activation of the user's own."""

    def __call__(self, x):
        return nnx.gelu(x)


class Net(nnx.Module):
    """Activations everywhere that they may hang."""

    def __init__(self, other=None):
        self.dense = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.one = QuantReLU()
        self.many = List([QuantReLU(), nnx.relu])
        self.chain = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), QuantReLU())
        self.pool = partial(nnx.max_pool, window_shape=(2, 2))
        self.identity = lambda x: x
        self.double = lambda x: 2 * x
        self.combine = lambda x, y: x + y
        self.other = other


def test_all_activations_are_found_and_nothing_else():
    found = activations("test", Net(), relu=True)
    paths = {place.path for place in found}
    assert paths == {"one", "many/0", "many/1", "chain/layers/1"}


@pytest.mark.parametrize("again", [False, True])
def test_others_hang_in_their_place(again):
    net = Net()
    for place in activations("test", net, relu=True):
        place.put(QuantReLU(3))
        if again:
            place.put(QuantReLU(3))
    found = activations("test", nnx.clone(net), relu=False)
    assert [place.value.levels for place in found] == [7] * 4


def test_a_module_that_hangs_twice_is_entered_once():
    net = Net()
    net.again = net.chain
    paths = [place.path for place in places(net)]
    assert {"chain", "again"} < set(paths)
    assert paths.count("chain/layers/1") + paths.count("again/layers/1") == 1


@pytest.mark.parametrize(
    "other, name",
    [
        (nnx.gelu, "gelu"),
        (jnp.tanh, "tanh"),
        (nnx.leaky_relu, "leaky_relu"),
        (lambda x: nnx.relu(x), "<lambda>"),
        (Gelu(), "Gelu"),
        (LIF(), "LIF"),
    ],
    ids=["gelu", "tanh", "leaky_relu", "lambda", "module", "spiking"],
)
def test_an_activation_that_cannot_be_converted(other, name):
    message = f"test: expected nnx.relu or QuantReLU .*, got {name} at 'other', which"
    with pytest.raises(ValueError, match=message):
        activations("test", Net(nnx.data(other)), relu=True)


def test_a_plain_relu_wants_calibration():
    with pytest.raises(
        ValueError, match="got a plain ReLU at 'many/1'. Call calibrate"
    ):
        activations("test", Net(), relu=False)


def test_a_model_without_activations():
    message = "test: expected a model with nnx.relu or QuantReLU, found none in Linear"
    with pytest.raises(ValueError, match=message):
        activations("test", nnx.Linear(3, 3, rngs=nnx.Rngs(0)), relu=True)


def test_an_activation_in_a_tuple_cannot_be_replaced():
    net = Net((nnx.relu,))
    with pytest.raises(ValueError, match="in a tuple at 'other/0'. Hold it in an nnx"):
        for place in activations("test", net, relu=True):
            place.put(QuantReLU())


def test_a_spy_notes_inputs_and_outputs():
    calls = []
    model = VGG((4,), 3, neuron=QuantReLU, in_channels=1, rngs=nnx.Rngs(0))
    model.eval()
    xs = jax.random.normal(jax.random.key(0), (4, 1, 8, 8, 1))
    expected = model(xs)
    (place,) = activations("test", model, relu=False)
    place.put(Spy(place.value, place.path, calls.append))
    assert (model(xs) == expected).all()
    [(path, x, y)] = calls
    assert path == "neurons/0" and (place.value(x) == y).all()


@pytest.mark.parametrize("shape", [(4, 3), (4, 8, 3)])
def test_an_answer_without_time_is_an_error(shape):
    message = re.escape(f"[B, T, K] to an input (4, 1, 8, 8, 1), got {shape}. Images")
    with pytest.raises(ValueError, match=f"test: .* {message}"):
        check_answer("test", shape, (4, 1, 8, 8, 1))
    check_answer("test", (4, 1, 3), (4, 1, 8, 8, 1))
