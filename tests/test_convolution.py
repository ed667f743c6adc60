"""The convolution that is fast on CPUs is XLA's, forward and gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spikejax.nn import convolution
from spikejax.nn.convolution import convolve

NUMBERS = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
OPTIONS = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "precision": None}
OPTIONS |= {"dimension_numbers": NUMBERS}


def some(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def value_and_gradients(function, x, kernel, *options, **others):
    y, vjp = jax.vjp(lambda x, k: function(x, k, *options, **others), x, kernel)
    return (y, *vjp(jnp.cos(y)))


def same(function, x, kernel, *options, **others):
    found = jax.jit(
        lambda x, k: value_and_gradients(function, x, k, *options, **others)
    )(x, kernel)
    expected = value_and_gradients(
        lax.conv_general_dilated, x, kernel, *options, **others
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(convolution, "PIECE", 1000)


@pytest.mark.parametrize("batch", [1, 7, 16, 48])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (1, 3)])
def test_equal_whatever_the_batch_and_the_strides(small_pieces, batch, strides):
    same(
        convolve,
        some(0, batch, 6, 9, 3),
        some(1, 3, 3, 3, 4),
        strides,
        "SAME",
        **OPTIONS,
    )


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
@pytest.mark.parametrize(
    "size, padding",
    [
        ((3, 3), "VALID"),
        ((3, 3), ((1, 1), (1, 1))),
        ((1, 1), "SAME"),
        ((7, 7), ((3, 3), (3, 3))),
        ((2, 4), ((0, 3), (2, 1))),
        ((3, 3), ((0, 0), (5, 0))),
        ((2, 2), ((-1, 0), (0, -2))),
    ],
)
def test_equal_whatever_the_kernel_and_the_padding(
    small_pieces, size, padding, strides
):
    x, kernel = some(0, 16, 9, 8, 3), some(1, *size, 3, 2)
    same(convolve, x, kernel, strides, padding, **OPTIONS)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
@pytest.mark.parametrize("height, width", [(2, 5), (5, 2), (1, 1)])
def test_equal_where_the_kernel_is_larger_than_the_images(
    small_pieces, height, width, strides
):
    x, kernel = some(0, 16, height, width, 3), some(1, 3, 3, 3, 2)
    same(convolve, x, kernel, strides, "SAME", **OPTIONS)
    text = jax.jit(partial(convolve, strides=strides, padding="SAME", **OPTIONS))
    assert "stablehlo.convolution" not in text.lower(x, kernel).as_text()


def test_pixels_that_no_patch_sees_have_gradient_zero():
    x, kernel = some(0, 8, 4, 4, 1), some(1, 1, 1, 1, 1)
    _, gradient, _ = value_and_gradients(
        convolve, x, kernel, (2, 2), "VALID", **OPTIONS
    )
    assert not gradient[:, 1::2].any() and not gradient[:, :, 1::2].any()
    assert gradient[:, ::2, ::2].all()


@pytest.mark.parametrize(
    "changes",
    [
        {"rhs_dilation": (2, 2)},
        {"lhs_dilation": (2, 1)},
        {"feature_group_count": 2},
        {"precision": lax.Precision.HIGHEST},
        {"preferred_element_type": jnp.float32},
    ],
)
def test_other_convolutions_are_those_of_xla(changes):
    groups = changes.get("feature_group_count", 1)
    x, kernel = some(0, 8, 6, 6, 4), some(1, 3, 3, 4 // groups, 2)
    same(convolve, x, kernel, (1, 1), ((1, 1), (1, 1)), **OPTIONS | changes)


def test_other_types_and_axes_are_those_of_xla():
    x, kernel = some(0, 8, 6, 6, 4), some(1, 3, 3, 4, 2)
    y = convolve(
        x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), (2, 2), "SAME", **OPTIONS
    )
    assert y.dtype == jnp.bfloat16
    same(convolve, some(0, 8, 4, 9), some(1, 2, 4, 3), (2,), "SAME")
    same(convolve, some(0, 8, 4, 9, 9), some(1, 2, 4, 3, 3), (2, 2), "SAME")


@pytest.mark.parametrize("strides", [1, 2])
def test_a_layer_of_flax_takes_it(small_pieces, strides):
    xs = some(0, 2, 4, 6, 6, 3)  # two axes of batch
    layers = [
        nnx.Conv(3, 5, (3, 3), strides, conv_general_dilated=function, rngs=nnx.Rngs(0))
        for function in (convolve, lax.conv_general_dilated)
    ]

    def loss(layer, xs):
        return (layer(xs) ** 2).sum()

    (ours, dx), (theirs, dx2) = (
        nnx.value_and_grad(loss, argnums=1)(layer, xs) for layer in layers
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    np.testing.assert_allclose(dx, dx2, rtol=1e-4, atol=1e-4)


def test_the_way_is_chosen_for_the_platform(small_pieces):
    x, kernel = some(0, 8, 6, 6, 3), some(1, 3, 3, 3, 2)
    function = partial(
        value_and_gradients, convolve, strides=(2, 2), padding="SAME", **OPTIONS
    )
    traced = jax.jit(function).trace(x, kernel)

    def convolutions(platform):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return text.count("stablehlo.convolution")

    assert convolutions("cpu") == 1  # gradients are matrix products
    assert convolutions("tpu") == convolutions("cuda") == 3


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_devices_exchange_the_gradient_of_the_kernel_alone(small_pieces, strides):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    batch = NamedSharding(mesh, PartitionSpec("data"))
    x, kernel = some(0, 64, 6, 6, 3), some(1, 3, 3, 3, 2)
    function = partial(
        value_and_gradients, convolve, strides=strides, padding="SAME", **OPTIONS
    )
    whole = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(function, in_shardings=(batch, whole))
    text = step.lower(x, kernel).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    assert "collective-permute" not in text
    assert text.count("all-reduce(") == 1
    for ours, alone in zip(step(x, kernel), function(x, kernel), strict=True):
        np.testing.assert_allclose(ours, alone, rtol=2e-4, atol=2e-4)


def test_equal_in_a_batch_of_batches(small_pieces):
    xs, kernel = some(0, 3, 16, 6, 6, 2), some(1, 3, 3, 2, 2)
    function = partial(convolve, strides=(2, 2), padding="SAME", **OPTIONS)
    ys = jax.vmap(function, (0, None))(xs, kernel)
    for x, y in zip(xs, ys, strict=True):
        np.testing.assert_allclose(y, function(x, kernel), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_equal_second_derivatives(small_pieces, strides):
    x, kernel = some(0, 16, 5, 5, 2), some(1, 3, 3, 2, 2)

    def slope(function, x, kernel):
        y, vjp = jax.vjp(lambda k: function(x, k, strides, "SAME", **OPTIONS), kernel)
        return (vjp(y**2)[0] ** 2).sum()

    for k in (0, 1):
        ours = jax.grad(partial(slope, convolve), k)(x, kernel)
        theirs = jax.grad(partial(slope, lax.conv_general_dilated), k)(x, kernel)
        scale = jnp.abs(theirs).max()
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-5)


def test_a_kernel_that_does_not_fit_is_named_by_jax():
    with pytest.raises((TypeError, ValueError), match="feature"):
        convolve(some(0, 2, 4, 4, 3), some(1, 3, 3, 2, 2), (2, 2), "SAME", **OPTIONS)
