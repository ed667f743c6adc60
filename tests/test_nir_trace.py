"""What a model computes, as operations."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from spikejax._compat import List
from spikejax.layers import LIF
from spikejax.nir.trace import trace

XS = jnp.ones((1, 2, 4, 4, 3))
WHOLE = (nnx.Conv, nnx.Linear)


class Net(nnx.Module):
    """One of what a method may do."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 3, (3, 3), rngs=rngs)
        self.parts = List([LIF()])
        self.gain = nnx.Param(jnp.float32(2.0))

    def __call__(self, xs):
        gain = jnp.exp(self.gain[...]) + 1  # of no input: worked out
        return jax.jit(lambda x: x * gain)(self.parts[0](self.conv(xs))) + xs


def test_layers_are_whole_and_what_joins_them_is_named():
    traced = trace(Net(), XS, WHOLE)
    first, second, third, fourth = traced.operations
    assert (first.name, first.params["path"], first.inputs) == ("layer", "conv", (0,))
    assert (second.name, second.params["path"]) == ("layer", "parts/0")
    assert third.name == "mul" and fourth.name == "add"
    (constant,) = (i for i in third.inputs if not isinstance(i, int))
    assert float(constant) == pytest.approx(float(jnp.exp(2.0)) + 1)
    assert fourth.inputs == (third.output, 0) and traced.output == fourth.output
    assert fourth.shape == XS.shape and fourth.where.startswith("test_nir_trace.py")


def test_a_layer_may_be_the_model_and_is_left_as_it_was():
    layer = LIF()
    (only,) = trace(layer, XS, WHOLE).operations
    assert only.name == "layer" and only.params["path"] == ""
    assert layer(XS).shape == XS.shape


def test_a_layer_that_is_called_twice_is_there_twice():
    conv = nnx.Conv(3, 3, (3, 3), rngs=nnx.Rngs(0))
    operations = trace(nnx.Sequential(conv, conv), XS, WHOLE).operations
    assert [op.name for op in operations] == ["layer", "layer"]


class Wrong(nnx.Module):
    """Does what its function says."""

    def __init__(self, does):
        self.neurons, self.does = LIF(), does

    def __call__(self, xs):
        return self.does(self, xs)


@pytest.mark.parametrize(
    ("does", "message"),
    [
        (
            lambda self, xs: self.neurons(xs, trains=True),
            "trace: expected the layer 'neurons' to be called with its input alone",
        ),
        (lambda self, xs: (xs, xs), "trace: expected a model with one input and one"),
        (lambda self, xs: jnp.ones(3), "trace: expected an output that depends on"),
    ],
)
def test_models_that_cannot_be_traced(does, message):
    with pytest.raises(ValueError, match=message):
        trace(Wrong(does), XS, WHOLE)
