"""Batch normalisation: statistics, start of the scale, gradient in closed form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax.nn.norm import BatchNorm, fast_td_batch_norm, td_batch_norm

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


def test_it_is_the_layer_of_flax_or_the_one_given():
    assert type(td_batch_norm(2, rngs=nnx.Rngs(0))) is nnx.BatchNorm
    fast = fast_td_batch_norm(2, alpha=0.5, v_threshold=3.0, rngs=nnx.Rngs(0))
    assert type(fast) is BatchNorm
    np.testing.assert_allclose(fast.scale[...], 1.5)


def norms(dtype=None):
    """Our layer and Flax's own, with the same numbers."""
    made = (
        td_batch_norm(2, layer=BatchNorm, dtype=dtype, rngs=nnx.Rngs(0)),
        nnx.BatchNorm(2, momentum=0.9, dtype=dtype, rngs=nnx.Rngs(0)),
    )
    for norm in made:
        norm.scale[...] = jnp.array([1.5, -0.5])
        norm.bias[...] = jnp.array([0.25, -1.0])
    return made


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_values_and_types_of_the_norm_equal_flax(dtype):
    ours, theirs = norms(dtype)
    near = 2e-2 if dtype else 1e-5
    for x in (XS, XS.astype(jnp.bfloat16)):
        y, expected = ours(x), theirs(x)
        assert y.dtype == expected.dtype and ours.mean[...].dtype == jnp.float32
        wide = y.astype(jnp.float32), expected.astype(jnp.float32)
        np.testing.assert_allclose(*wide, rtol=near, atol=near)
        np.testing.assert_allclose(ours.mean[...], theirs.mean[...], rtol=near)
        np.testing.assert_allclose(ours.var[...], theirs.var[...], rtol=near)


def pulled(norm, x, scale, bias):
    """A scalar that depends on every y in its own way."""
    norm = nnx.clone(norm)
    norm.scale, norm.bias = nnx.Param(scale), nnx.Param(bias)
    return (jnp.sin(norm(x)) * jnp.arange(x.size).reshape(x.shape) / x.size).sum()


def test_gradients_of_both_orders_equal_flax():
    def length(norm, *arguments):
        gradients = jax.grad(pulled, (1, 2, 3))(norm, *arguments)
        return sum((g * g).sum() for g in gradients), gradients

    found = []
    for norm in norms():
        arguments = XS, norm.scale[...], norm.bias[...]
        gradient = jax.grad(partial(length, norm), (0, 1, 2), has_aux=True)
        second, first = jax.jit(gradient)(*arguments)
        found.append([*first, *second])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=1e-4 * abs(other).max())


@pytest.mark.parametrize("mask", [None, jnp.arange(4)[:, None, None, None] < 2])
def test_evaluation_and_masks_of_the_norm_are_those_of_flax(mask):
    ours, theirs = norms()
    ours.eval()
    theirs.eval()
    np.testing.assert_array_equal(ours(XS), theirs(XS))
    ys = ours(XS, use_running_average=False, mask=mask)
    np.testing.assert_allclose(ys, theirs(XS, False, mask=mask), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.mean[...], theirs.mean[...], rtol=1e-6)


def test_other_axes_and_statistics_over_devices_are_those_of_flax():
    xs = jax.random.normal(jax.random.key(0), (3, 4, 4)) + jnp.arange(4.0)[:, None]
    ours, flax = (
        kind(4, axis=1, rngs=nnx.Rngs(0)) for kind in (BatchNorm, nnx.BatchNorm)
    )
    np.testing.assert_array_equal(ours(xs), flax(xs))
    found = []
    for kind in (BatchNorm, nnx.BatchNorm):
        graphdef, state = nnx.split(kind(4, axis_name="device", rngs=nnx.Rngs(0)))
        stack = partial(jax.vmap, axis_name="device", in_axes=(None, 0))
        found.append(stack(lambda s, x, g=graphdef: nnx.merge(g, s)(x))(state, xs))
    np.testing.assert_array_equal(*found)


def test_a_mask_counts_in_training_too():
    xs = jax.random.normal(jax.random.key(0), (3, 4, 2))
    mask = jnp.arange(4)[:, None] < 2
    ours, flax = (kind(2, rngs=nnx.Rngs(0)) for kind in (BatchNorm, nnx.BatchNorm))
    np.testing.assert_allclose(ours(xs, mask=mask), flax(xs, mask=mask), atol=1e-6)
    np.testing.assert_allclose(ours.mean[...], flax.mean[...], atol=1e-6)


def test_the_slow_variance_is_that_of_flax():
    xs = 100 + 1e-3 * jax.random.normal(jax.random.key(0), (64, 2))
    make = partial(nnx.BatchNorm, 2, use_fast_variance=False)
    flax, ours = (
        make(rngs=nnx.Rngs(0)),
        BatchNorm(2, use_fast_variance=False, rngs=nnx.Rngs(0)),
    )
    np.testing.assert_allclose(ours(xs), flax(xs), atol=1e-5)
