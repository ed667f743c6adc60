"""Layers without time as nodes of NIR, and modules for such nodes."""

import jax
import jax.numpy as jnp
import nir
import numpy as np
import pytest
from flax import nnx

from spikejax.nir.layers import (
    Flatten,
    Pool,
    Scale,
    Threshold,
    broadcastable,
    read_layer,
)
from spikejax.nir.write import to_nir

RNGS = nnx.Rngs(0)


def conv(**options):
    options = {"padding": ((1, 1), (1, 1))} | options
    return nnx.Conv(2, 3, (3, 3), rngs=RNGS, **options)


def written(layer, shape):
    """The one node of a layer, for inputs of one example of that shape."""
    nodes = to_nir(layer, jnp.ones((1, 2, *shape)), dt=1.0).nodes
    (made,) = (n for n in nodes.values() if not isinstance(n, nir.Input | nir.Output))
    return made


def same(layer, shape):
    made = written(layer, shape)
    xs = jax.random.normal(jax.random.key(0), (1, 2, *shape))
    np.testing.assert_allclose(read_layer(made)(xs), layer(xs), atol=1e-6)
    return made


def test_kernels_are_channels_first():
    layer = conv(strides=2)
    made = written(nnx.Sequential(lambda xs: 2 * xs, layer), (7, 7, 2))
    expected = 2 * np.asarray(layer.kernel[...])
    assert made.weight.shape == (3, 2, 3, 3)
    assert made.weight[2, 1, 0, 1] == expected[0, 1, 1, 2]
    assert made.stride == (2, 2) and made.padding == (1, 1)
    assert tuple(made.output_type["output"]) == (3, 4, 4)


@pytest.mark.parametrize(
    ("options", "padding"),
    [
        ({"padding": "SAME"}, (1, 1)),
        ({"padding": "VALID", "use_bias": False}, (0, 0)),
        ({"padding": 2, "kernel_dilation": 2}, (2, 2)),
        ({"padding": (1, 0), "strides": 2}, (1, 0)),
    ],
)
def test_convolutions_and_back(options, padding):
    assert same(conv(**options), (6, 6, 2)).padding == padding


@pytest.mark.parametrize("size", [(6, 6), (7, 6), (8, 5)])
@pytest.mark.parametrize(
    ("kernel", "options", "side"),
    [
        ((3, 3), {"padding": "SAME", "strides": 2}, None),  # a row more below, or not
        ((2, 2), {"padding": "SAME"}, 3),
        ((4, 4), {"padding": ((0, 3), (2, 1))}, 7),
        ((3, 1), {"padding": "SAME"}, 3),
        ((1, 4), {"padding": ((0, 1), (1, 2)), "strides": 2}, None),
        ((3, 3), {"padding": ((1, 3), (4, 2)), "kernel_dilation": 2}, 4),
    ],
)
def test_zeros_make_kernels_square_and_padding_even(kernel, options, side, size):
    layer = nnx.Conv(2, 3, kernel, rngs=RNGS, **options)
    layer.bias[...] = jnp.arange(3.0)
    made = same(layer, (*size, 2))
    height, width = made.weight.shape[2:]
    assert height == width and side in (None, width)
    expected = layer(jnp.zeros((1, 1, *size, 2))).shape[2:4]
    assert tuple(made.output_type["output"][1:]) == expected


def test_convolutions_over_one_axis_and_back():
    layer = nnx.Conv(2, 3, 5, strides=2, padding=2, rngs=RNGS)
    layer.bias = nnx.Param(jnp.arange(3.0))
    made = same(layer, (9, 2))
    assert isinstance(made, nir.Conv1d) and tuple(made.output_type["output"]) == (3, 5)


@pytest.mark.parametrize(
    "layer",
    [
        conv(padding=((0, 1), (0, 1)), kernel_dilation=2),
        nnx.Conv(2, 2, (3, 3), feature_group_count=2, rngs=RNGS),
        nnx.Conv(2, 3, (3, 2), padding="VALID", rngs=RNGS),
        conv(input_dilation=2),
        nnx.ConvTranspose(2, 2, (3, 3), strides=(2, 2), rngs=RNGS),
    ],
)
def test_convolutions_that_nir_has_not(layer):
    with pytest.raises(ValueError, match="to_nir: .* got a convolution of kernel"):
        written(layer, (6, 6, 2))


def test_weights_over_time_are_refused():
    over_time = nnx.Conv(2, 2, 3, rngs=RNGS)  # [B, T, C]
    with pytest.raises(ValueError, match="to_nir: .* got a convolution of kernel"):
        written(over_time, (2,))
    product = nnx.Sequential(lambda xs: jnp.einsum("btc,tk->bck", xs, jnp.ones((2, 2))))
    with pytest.raises(ValueError, match="to_nir: .* not of the last axis of a vector"):
        written(product, (2,))


def test_a_convolution_with_circular_padding_is_refused():
    with pytest.raises(ValueError, match="to_nir: expected what NIR can say"):
        written(conv(padding="CIRCULAR"), (6, 6, 2))


def test_weights_after_a_flattened_image_are_in_the_order_of_channels_first():
    layer = nnx.Linear(12, 5, rngs=RNGS)
    image = jax.random.normal(jax.random.key(0), (1, 1, 2, 2, 3))
    model = nnx.Sequential(lambda xs: xs.reshape(*xs.shape[:2], -1), layer)
    nodes = to_nir(model, image, dt=1.0).nodes
    ys = read_layer(nodes["layers.1"])(Flatten()(image))
    np.testing.assert_allclose(ys, layer(image.reshape(1, 1, -1)), atol=1e-6)


def test_linear_layers_and_back():
    layer = nnx.Linear(4, 5, use_bias=False, rngs=RNGS)
    made = written(nnx.Sequential(lambda xs: 3 * xs, layer), (4,))
    assert isinstance(made, nir.Linear)
    np.testing.assert_allclose(made.weight, 3 * np.asarray(layer.kernel[...]).T)
    layer = nnx.Linear(4, 5, rngs=RNGS)
    layer.bias = nnx.Param(jnp.arange(5.0))
    assert isinstance(same(layer, (4,)), nir.Affine)
    with pytest.raises(
        ValueError, match="got a linear layer of an input .* not of the"
    ):
        written(layer, (2, 2, 4))


def test_norms_move_into_the_weights_before_them():
    norm = nnx.BatchNorm(3, rngs=RNGS)
    for name, kind in [("mean", nnx.BatchStat), ("var", nnx.BatchStat)]:
        setattr(norm, name, kind(jnp.asarray([1.0, 2.0, 0.5])))
    norm.scale, norm.bias = nnx.Param(jnp.arange(3.0)), nnx.Param(jnp.ones(3))
    model = nnx.Sequential(conv(), norm)
    model.eval()
    same(model, (6, 6, 2))
    with pytest.raises(ValueError, match="the addition of a constant"):
        written(nnx.Sequential(conv(), lambda xs: xs[:, :, :1] + xs, norm), (1, 1, 2))


def test_parameters_broadcast_with_channels_last():
    assert broadcastable(np.full((2, 3, 4), 0.5)) == 0.5
    array = np.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(broadcastable(array), np.moveaxis(array, 0, -1))


def test_other_nodes():
    size = np.array([2, 2])
    assert read_layer(nir.LI(np.ones(1), np.ones(1), np.ones(1))) is None
    pool = read_layer(nir.AvgPool2d(size, size, 0 * size))
    assert isinstance(pool, Pool) and pool.mean and pool.size == (2, 2)
    assert not read_layer(nir.SumPool2d(2, 2, 0)).mean
    flat = nir.Flatten({"input": np.array([2, 3, 3])}, 0, 2)
    assert isinstance(read_layer(flat), Flatten)
    assert isinstance(read_layer(nir.Threshold(np.ones(3))), Threshold)
    scale = read_layer(nir.Scale(np.arange(3.0)))
    assert isinstance(scale, Scale)
    np.testing.assert_array_equal(scale(jnp.ones((1, 1, 3)))[0, 0], [0, 1, 2])
    same_padding = nir.Conv2d(None, np.ones((3, 2, 3, 3)), 1, "same", 1, 1, np.ones(3))
    assert read_layer(same_padding)(jnp.ones((1, 1, 5, 5, 2))).shape[2:4] == (5, 5)


def test_nodes_of_other_shapes_are_not_layers():
    assert read_layer(nir.Flatten({"input": np.array([2, 3, 3])}, 1, 2)) is None
    assert read_layer(nir.Linear(np.ones((2, 3, 4)))) is None


def test_threshold_fires_where_it_is_reached_and_has_a_gradient():
    fires = Threshold(0.5)
    xs = jnp.asarray([0.4, 0.5, 0.6])
    np.testing.assert_array_equal(fires(xs), [0, 1, 1])
    assert (jax.grad(lambda x: fires(x).sum())(xs) > 0).all()


def test_flatten_puts_channels_first():
    image = jnp.arange(12.0).reshape(1, 1, 2, 2, 3)
    expected = [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    np.testing.assert_array_equal(Flatten()(image)[0, 0], expected)


def test_pooling_counts_padding_as_zeros():
    image = jnp.arange(16.0).reshape(1, 1, 4, 4, 1)
    ys = Pool((2, 2), (2, 2), mean=True)(image)
    np.testing.assert_array_equal(ys[0, 0, ..., 0], [[2.5, 4.5], [10.5, 12.5]])
    ys = Pool((3, 3), (2, 2), (1, 1), mean=False)(image)
    np.testing.assert_array_equal(ys[0, 0, ..., 0], [[10, 24], [51, 90]])


def test_pools_need_not_be_square():
    image = jnp.arange(24.0).reshape(1, 1, 4, 6, 1)
    sums = Pool((2, 3), (2, 3), mean=False)(image)
    assert (
        sums.shape == (1, 1, 2, 2, 1) and sums[0, 0, 0, 0, 0] == 0 + 1 + 2 + 6 + 7 + 8
    )
    assert Pool((2, 2), (2, 2), (0, 1), mean=False)(image).shape == (1, 1, 2, 4, 1)


def test_nodes_of_groups_and_of_a_part():
    assert read_layer(nir.Flatten({"input": np.array([2, 3, 3])}, 0, 1)) is None
    weights = np.ones((4, 1, 3, 3))
    grouped = read_layer(nir.Conv2d(None, weights, 1, 1, 1, 2, np.zeros(4)))
    assert grouped(jnp.ones((1, 1, 5, 5, 2))).shape == (1, 1, 5, 5, 4)
