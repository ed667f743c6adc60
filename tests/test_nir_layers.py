"""Layers without time as nodes of NIR."""

import jax
import jax.numpy as jnp
import nir
import numpy as np
import pytest
from flax import nnx

from spikejax.nir.layers import broadcastable, convolution, linear, read_layer
from spikejax.nodes import Flatten, Pool, Scale, Threshold

RNGS = nnx.Rngs(0)


def conv(**options):
    options = {"padding": ((1, 1), (1, 1))} | options
    return nnx.Conv(2, 3, (3, 3), rngs=RNGS, **options)


def same(layer, made, shape):
    xs = jax.random.normal(jax.random.key(0), (1, 2, *shape))
    np.testing.assert_allclose(read_layer("n", made)(xs), layer(xs), atol=1e-6)


def test_kernels_are_channels_first():
    layer = conv(strides=2)
    made = convolution("c", layer, (7, 7, 2), 2.0)
    expected = 2 * np.asarray(layer.kernel[...])
    assert (
        made.weight.shape == (3, 2, 3, 3)
        and made.weight[2, 1, 0, 1] == (expected[0, 1, 1, 2])
    )
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
    layer = conv(**options)
    made = convolution("c", layer, (6, 6, 2), 1.0)
    assert made.padding == padding
    same(layer, made, (6, 6, 2))


def test_convolutions_over_one_axis_and_back():
    layer = nnx.Conv(2, 3, 5, strides=2, padding=2, rngs=RNGS)
    made = convolution("c", layer, (9, 2), 1.0)
    assert isinstance(made, nir.Conv1d) and tuple(made.output_type["output"]) == (3, 5)
    same(layer, made, (9, 2))


@pytest.mark.parametrize(
    "layer",
    [
        conv(padding="SAME", strides=2),  # one row more below than above
        conv(padding="CIRCULAR"),
        nnx.Conv(2, 2, (3, 3), feature_group_count=2, rngs=RNGS),
        nnx.Conv(2, 3, (3, 1), rngs=RNGS),
        nnx.Conv(2, 3, (3, 3), input_dilation=2, padding="VALID", rngs=RNGS),
        nnx.Conv(2, 3, (3, 3, 3), rngs=RNGS),
    ],
)
def test_convolutions_that_nir_has_not(layer):
    shape = (6,) * len(layer.kernel_size) + (2,)
    with pytest.raises(ValueError, match="to_nir: expected a convolution over 1 or 2"):
        convolution("c", layer, shape, 1.0)


def test_weights_after_a_flattened_image_are_in_the_order_of_channels_first():
    layer = nnx.Linear(12, 5, rngs=RNGS)
    made = linear("d", layer, (12,), (2, 2, 3), 1.0)
    image = jax.random.normal(jax.random.key(0), (1, 1, 2, 2, 3))
    expected = layer(image.reshape(1, 1, -1))
    np.testing.assert_allclose(
        read_layer("d", made)(Flatten()(image)), expected, atol=1e-6
    )


def test_linear_layers_and_back():
    layer = nnx.Linear(4, 5, use_bias=False, rngs=RNGS)
    made = linear("d", layer, (4,), None, 3.0)
    assert isinstance(made, nir.Linear)
    same(lambda xs: layer(3 * xs), made, (4,))
    with pytest.raises(ValueError, match="expected a vector before the linear layer"):
        linear("d", layer, (2, 2, 4), None, 1.0)


def test_parameters_broadcast_with_channels_last():
    assert broadcastable(np.full((2, 3, 4), 0.5)) == 0.5
    array = np.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(broadcastable(array), np.moveaxis(array, 0, -1))


def test_other_nodes():
    size = np.array([2, 2])
    assert read_layer("n", nir.LI(np.ones(1), np.ones(1), np.ones(1))) is None
    pool = read_layer("n", nir.AvgPool2d(size, size, 0 * size))
    assert isinstance(pool, Pool) and pool.mean and pool.size == (2, 2)
    assert not read_layer("n", nir.SumPool2d(2, 2, 0)).mean
    flat = nir.Flatten({"input": np.array([2, 3, 3])}, 0, 2)
    assert isinstance(read_layer("n", flat), Flatten)
    assert isinstance(read_layer("n", nir.Threshold(np.ones(3))), Threshold)
    scale = read_layer("n", nir.Scale(np.arange(3.0)))
    assert isinstance(scale, Scale)
    np.testing.assert_array_equal(scale(jnp.ones((1, 1, 3)))[0, 0], [0, 1, 2])
    same_padding = nir.Conv2d(None, np.ones((3, 2, 3, 3)), 1, "same", 1, 1, np.ones(3))
    assert read_layer("n", same_padding)(jnp.ones((1, 1, 5, 5, 2))).shape[2:4] == (5, 5)


def test_nodes_of_other_shapes_are_refused():
    part = nir.Flatten({"input": np.array([2, 3, 3])}, 1, 2)
    with pytest.raises(ValueError, match="from_nir: expected 'n' to flatten all axes"):
        read_layer("n", part)
    with pytest.raises(ValueError, match="from_nir: expected a matrix of weights in"):
        read_layer("n", nir.Linear(np.ones((2, 3, 4))))
