"""Threshold-dependent batch normalisation: statistics, scale, running averages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax import LIF
from spikejax.models.resnet import ResNet
from spikejax.nn.compiler import compiler_options
from spikejax.nn.norm import td_batch_norm

# [B, T, H, W, C]; mean and spread differ from channel to channel, and over time
XS = jax.random.normal(jax.random.key(0), (3, 4, 5, 5, 2)) * jnp.array([2.0, 0.1])
XS = XS + jnp.array([1.0, -3.0]) + jnp.arange(4.0)[:, None, None, None]
AXES = (0, 1, 2, 3)


def test_statistics_are_over_batch_time_and_space():
    ys = td_batch_norm(2, rngs=nnx.Rngs(0))(XS)
    np.testing.assert_allclose(ys.mean(AXES), 0, atol=1e-5)
    np.testing.assert_allclose(ys.std(AXES), 1, atol=1e-4)
    assert np.all(np.ptp(ys.mean((0, 2, 3)), 0) > 0.5)  # each step is not alone


@pytest.mark.parametrize(("alpha", "v_threshold"), [(1.0, 0.5), (2**-0.5, 3.0)])
def test_inputs_get_the_spread_of_the_threshold(alpha, v_threshold):
    norm = td_batch_norm(2, alpha=alpha, v_threshold=v_threshold, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(norm.scale[...], alpha * v_threshold)
    np.testing.assert_allclose(norm(XS).std(AXES), alpha * v_threshold, rtol=1e-3)


def test_equals_the_equation():
    norm = td_batch_norm(2, alpha=0.5, v_threshold=3.0, rngs=nnx.Rngs(0))
    norm.bias[...] = jnp.array([0.25, -1.0])
    x = np.asarray(XS, np.float64)
    expected = 1.5 * (x - x.mean(AXES)) / np.sqrt(x.var(AXES) + 1e-5) + [0.25, -1]
    np.testing.assert_allclose(norm(XS), expected, atol=2e-4)


def test_running_statistics_move_by_a_tenth_and_are_used_in_evaluation():
    norm = td_batch_norm(2, rngs=nnx.Rngs(0))
    norm(XS)
    mean, var = 0.1 * XS.mean(AXES), 0.9 + 0.1 * XS.var(AXES)
    np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-4)
    np.testing.assert_allclose(norm.var[...], var, rtol=1e-4)
    norm.eval()
    np.testing.assert_allclose(
        norm(XS), (XS - mean) / jnp.sqrt(var + 1e-5), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-4)  # and stay


def test_evaluation_of_one_step_is_that_of_the_sequence():
    norm = td_batch_norm(2, rngs=nnx.Rngs(0))
    norm(XS)
    norm.eval()
    np.testing.assert_array_equal(norm(XS)[:, 1:2], norm(XS[:, 1:2]))


def flax(dtype=None):
    """Flax's own layer, with the same numbers."""
    norm = nnx.BatchNorm(2, momentum=0.9, dtype=dtype, rngs=nnx.Rngs(0))
    return given(norm)


def given(norm):
    norm.scale[...], norm.bias[...] = jnp.array([1.5, -0.5]), jnp.array([0.25, -1.0])
    return norm


def pulled(norm, x, scale, bias):
    """A scalar that depends on every y in its own way."""
    norm = nnx.clone(norm)
    norm.scale, norm.bias = nnx.Param(scale), nnx.Param(bias)
    return (jnp.sin(norm(x)) * jnp.arange(x.size).reshape(x.shape) / x.size).sum()


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_values_and_types_are_those_of_flax(dtype):
    ours, theirs = given(td_batch_norm(2, dtype=dtype, rngs=nnx.Rngs(0))), flax(dtype)
    near = 2e-2 if dtype else 1e-5
    for x in (XS, XS.astype(jnp.bfloat16)):
        y, expected = ours(x), theirs(x)
        assert y.dtype == expected.dtype and ours.mean[...].dtype == jnp.float32
        wide = y.astype(jnp.float32), expected.astype(jnp.float32)
        np.testing.assert_allclose(*wide, rtol=near, atol=near)
        np.testing.assert_allclose(ours.mean[...], theirs.mean[...], rtol=near)
        np.testing.assert_allclose(ours.var[...], theirs.var[...], rtol=near)


@pytest.mark.parametrize("order", [1, 2])
def test_gradients_are_those_of_flax(order):
    ours, theirs = given(td_batch_norm(2, rngs=nnx.Rngs(0))), flax()
    arguments = XS, ours.scale[...], ours.bias[...]

    def gradient(norm):
        function = jax.grad(pulled, (1, 2, 3))
        if order == 2:
            first = function

            def length(norm, *arguments):
                return sum((g * g).sum() for g in first(norm, *arguments))

            function = jax.grad(length, (1, 2, 3))
        return function(norm, *arguments)

    for one, other in zip(gradient(ours), gradient(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=1e-4 * abs(other).max())


def scratch(blocks):
    """Of a gradient with recomputed blocks, in arrays of a block's output."""
    network = ResNet((blocks,), (8,), 10, neuron=LIF, remat=True, rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(network, nnx.Param, ...)

    def loss(params, rest, xs):
        return (nnx.merge(graphdef, params, rest, copy=True)(xs) ** 2).sum()

    step = jax.jit(jax.grad(loss), compiler_options=compiler_options("cpu"))
    lowered = step.lower(params, rest, jnp.zeros((16, 4, 16, 16, 3)))
    memory = lowered.compile().memory_analysis()
    return memory.temp_size_in_bytes / (16 * 4 * 16 * 16 * 8 * 4)


def test_no_norm_waits_with_its_bias():
    """A block more costs its input; derived by JAX, also what its biases sum up."""
    if not compiler_options("cpu"):
        pytest.skip("this XLA does not know the options")
    assert scratch(4) - scratch(2) < 2.2


@pytest.mark.parametrize("mask", [None, jnp.arange(4)[:, None, None, None] < 2])
def test_what_flax_can_do_besides_stays(mask):
    frozen, theirs = given(td_batch_norm(2, rngs=nnx.Rngs(0))), flax()
    frozen.eval()
    theirs.eval()
    np.testing.assert_array_equal(frozen(XS), theirs(XS))
    ys = frozen(XS, use_running_average=False, mask=mask)
    np.testing.assert_allclose(ys, theirs(XS, False, mask=mask), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(frozen.mean[...], theirs.mean[...], rtol=1e-6)
