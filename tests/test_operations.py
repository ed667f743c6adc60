"""Models as operations."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from spikejax import energy
from spikejax.layers import LIF
from spikejax.nn.operations import trace_operations
from spikejax.nn.recurrent import Recurrent
from spikejax.trace import run

XS = jnp.ones((1, 2, 4, 4, 3))


def operations(model, xs=XS):
    """(name, inputs, site, parameters) of each operation; values are their numbers."""
    traced, state, layers = trace_operations(model, xs)
    found = []

    def handler(number, site, inputs, given):
        eqn = site.eqn
        found.append((eqn.primitive.name, inputs, site.name, eqn.params))
        return len(found), None

    (output, _), _ = run(traced, state, 0, handler)
    return SimpleNamespace(found=found, output=output, layers=layers)


class Net(nnx.Module):
    """One of each thing that a method may do."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 3, (3, 3), use_bias=False, rngs=rngs)
        self.parts = (
            nnx.Dict(spikes=LIF()) if hasattr(nnx, "Dict") else {"spikes": LIF()}
        )
        self.gain = nnx.Param(jnp.float32(2.0))

    def __call__(self, xs):
        gain = jnp.exp(self.gain[...]) + 1  # of no input: computed
        ys = nnx.remat(lambda conv, xs: conv(xs))(self.conv, xs)
        return jax.jit(lambda x: x * gain)(self.parts["spikes"](ys)) + xs


def test_neurons_are_whole_and_constants_are_computed():
    model = Net()
    traced = operations(model)
    names = [name for name, *_ in traced.found if name != "reshape"]
    assert names == ["conv_general_dilated", "neurons", "mul", "add"]
    by_name = {name: operation for name, *operation in traced.found}
    assert by_name["conv_general_dilated"][1] == "conv"
    assert by_name["neurons"][2]["path"] == "parts/spikes"
    assert isinstance(traced.layers["parts/spikes"], LIF)
    (constant,) = (i for i in by_name["mul"][0] if not isinstance(i, int))
    assert float(constant) == pytest.approx(float(jnp.exp(2.0)) + 1)
    assert by_name["add"][0][1] == 0 and traced.output == len(traced.found)
    assert model.parts["spikes"].name == ""  # not modified
    assert model(XS).shape == XS.shape


def test_a_layer_may_be_the_model_and_is_called_as_before_afterwards():
    layer = LIF()
    ((name, _, _, params),) = operations(layer).found
    assert (name, params["path"]) == ("neurons", "LIF")
    assert layer(2 * XS).sum() > 0 and layer(XS, trains=True).ndim == XS.ndim + 1


def test_a_recurrent_layer_is_whole():
    layer = nnx.Sequential(Recurrent(LIF(), 3, rngs=nnx.Rngs(0)))
    traced = operations(layer, XS[:, :, 0, 0])
    ((name, _, _, params),) = traced.found
    assert name == "neurons"
    assert isinstance(traced.layers[params["path"]], Recurrent)


def test_a_layer_that_is_called_twice_is_there_twice():
    layer = LIF()
    names = [name for name, *_ in operations(nnx.Sequential(layer, layer)).found]
    assert names == ["neurons", "neurons"]


def test_branches_by_platform_are_the_default():
    def model(xs):
        return jax.lax.platform_dependent(xs, cpu=jnp.sin, default=jnp.cos)

    assert [name for name, *_ in operations(nnx.Sequential(model)).found] == ["cos"]


def test_a_call_without_operations_is_entered():
    model = nnx.Sequential(jax.jit(lambda xs: xs), jnp.sin)
    assert [name for name, *_ in operations(model).found] == ["sin"]


def test_dense_operations_with_holes_by_hand():
    options = {"kernel_init": nnx.initializers.ones, "rngs": nnx.Rngs(0)}
    xs = jnp.ones((1, 1, 4, 4, 1))
    up = nnx.ConvTranspose(1, 1, (3, 3), strides=(2, 2), **options)
    # A line of 4 meets 3 weights each, one of them beyond the 8 of the output.
    report = energy.measure(up, xs)
    assert report.dense_macs == report.acs == 121
    wide = nnx.Conv(1, 1, (3, 3), kernel_dilation=2, **options)
    # Of a line of 4 the weights at -2, 0 and 2 meet 2, 4 and 2 values: 8 each way.
    report = energy.measure(wide, xs)
    assert report.dense_macs == report.acs == 64


def test_comparisons_make_spikes_of_products():
    linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    q = jax.random.normal(jax.random.key(0), (2, 1, 3, 3))
    report = energy.measure(Compared(linear), q)
    assert report.connections[-1].acs > 0 == report.connections[-1].macs


class Compared(nnx.Module):
    def __init__(self, linear):
        self.linear = linear

    def __call__(self, xs):
        return self.linear((xs @ xs.mT > 0.5).astype(jnp.float32))
