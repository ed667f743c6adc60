"""What a TPU runs, run here: the same values and gradients as Flax's and the loop's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax import energy
from spikejax.experiment.build import SingleOptions, VGGOptions, build_model
from spikejax.nn import norm, tpu

XS = jax.random.normal(jax.random.key(0), (2, 3, 7, 6, 4))


def both(**options):
    """The same convolution by Flax and as a TPU runs it."""
    options = {"kernel_size": (3, 3), **options}
    return [conv(4, 6, **options, rngs=nnx.Rngs(0)) for conv in (nnx.Conv, tpu.Conv)]


def value_and_gradients(layer, xs):
    graphdef, params = nnx.split(layer)

    def f(params, xs):
        ys = nnx.merge(graphdef, params)(xs)
        return (ys * jnp.cos(jnp.arange(ys.size)).reshape(ys.shape)).sum(), ys

    (_, ys), gradients = jax.value_and_grad(f, (0, 1), has_aux=True)(params, xs)
    return ys, jax.tree.leaves(gradients)


@pytest.mark.parametrize(
    "options",
    [
        {"strides": (2, 1), "padding": ((1, 1), (0, 2))},
        {"strides": 2, "padding": "SAME"},
        {"padding": "VALID", "kernel_dilation": 2},
        {"feature_group_count": 2, "use_bias": False},
        {"input_dilation": (2, 1), "padding": 1},
        {"dtype": jnp.bfloat16},
        {"padding": "CIRCULAR"},
        {"mask": jnp.ones((3, 3, 4, 6)).at[1, 1].set(0)},
    ],
    ids=str,
)
def test_convolution_over_time_equals_that_of_flax(options):
    layers = both(**options)
    (ys, grads), (same, equal) = (value_and_gradients(layer, XS) for layer in layers)
    assert ys.shape == same.shape and ys.dtype == same.dtype
    exact = {} if options.get("dtype") else {"rtol": 1e-5, "atol": 1e-5}
    tolerance = exact or {"rtol": 0.02, "atol": 0.3}
    for one, other in zip([ys, *grads], [same, *equal], strict=True):
        one, other = (np.asarray(a, np.float32) for a in (one, other))
        np.testing.assert_allclose(one, other, **tolerance)


def test_time_is_an_axis_of_the_convolution_and_is_not_folded():
    flax, ours = (str(jax.make_jaxpr(layer)(XS)) for layer in both())
    assert "reshape" in flax and "reshape" not in ours.replace("reshape[", "", 1)
    assert "lhs_spec=(0, 4, 1, 2, 3)" in ours


@pytest.mark.parametrize("shape", [(2, 7, 6, 4), (2, 1, 7, 6, 4), (7, 6, 4)], ids=str)
def test_other_inputs_are_those_of_flax(shape):
    flax, ours = both()
    xs = XS.reshape(-1)[: np.prod(shape)].reshape(shape)
    np.testing.assert_array_equal(flax(xs), ours(xs))


def test_networks_for_a_tpu_have_it_and_the_same_parameters_and_energy():
    made = partial(
        build_model,
        VGGOptions("convnet"),
        SingleOptions(),
        num_classes=3,
        in_channels=3,
        seed=0,
    )
    flax, chip = made(platform="gpu"), made(platform="tpu")
    kinds = {type(module) for _, module in nnx.iter_graph(chip)}
    assert {tpu.Conv, norm.BatchNorm} <= kinds
    leaves = [jax.tree.leaves(nnx.state(model)) for model in (flax, chip)]
    jax.tree.map(np.testing.assert_array_equal, *leaves)
    xs = jax.random.uniform(jax.random.key(1), (2, 3, 8, 8, 3))
    ours, theirs = (energy.measure(model, xs) for model in (chip, flax))
    for one, other in zip(ours.connections, theirs.connections, strict=True):
        assert one == other


@pytest.mark.parametrize("padding", [(1, 1), [0, 1], 1, ((1, 0), (0, 1)), "SAME"])
def test_paddings_are_those_of_flax(padding):
    xs = jax.random.normal(jax.random.key(0), (1, 2, 6, 6, 3))
    ours, flax = (
        kind(3, 4, (3, 3), padding=padding, rngs=nnx.Rngs(0))
        for kind in (tpu.Conv, nnx.Conv)
    )
    np.testing.assert_allclose(ours(xs), flax(xs), rtol=1e-5, atol=1e-5)
