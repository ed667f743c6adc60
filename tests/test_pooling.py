"""Max-pooling that is fast on CPUs is Flax's, forward and gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spikejax.nn.pooling import max_pool


def spikes(*shape):
    """Few values, so that most windows have several maxima."""
    return jnp.asarray(np.random.default_rng(0).integers(0, 3, shape), jnp.float32)


def value_and_gradient(function, xs):
    ys, vjp = jax.vjp(function, xs)
    return ys, *vjp(jnp.cos(jnp.arange(ys.size).reshape(ys.shape)).astype(ys.dtype))


def same(xs, *options):
    ours, theirs = (
        value_and_gradient(jax.jit(lambda xs, pool=pool: pool(xs, *options)), xs)
        for pool in (max_pool, nnx.max_pool)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        ((2, 2), (2, 2)),
        ((2, 2),),
        ((3, 2), (2, 3)),
        ((3, 3), (2, 2), "SAME"),
        ((3, 3), (2, 2), ((1, 1), (1, 1))),
        ((2, 3), None, ((1, 0), (0, 2))),
    ],
    ids=str,
)
def test_equal_whatever_the_window(options, dtype):
    same(spikes(3, 7, 8, 2).astype(dtype), *options)
    same(-spikes(3, 7, 8, 2).astype(dtype) - 1, *options)  # below the padding's 0


def test_equal_with_an_axis_of_time_and_in_one_dimension():
    xs = spikes(2, 3, 6, 6, 2)
    same(xs, (2, 2), (2, 2))
    same(spikes(2, 9, 2), (3,), (3,))
    edges = ((1, 1), (1, 1))
    ours = value_and_gradient(lambda xs: max_pool(xs, (3, 3), (2, 2), edges), xs)
    edges = ((0, 0), *edges)  # Flax takes one axis only before the places
    over_time = (1, 3, 3), (1, 2, 2), edges
    theirs = value_and_gradient(lambda xs: nnx.max_pool(xs, *over_time), xs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_the_first_of_equal_maxima_has_the_gradient():
    xs = jnp.ones((1, 2, 2, 1)).at[0, 0, 0, 0].set(0.0)
    gradient = jax.grad(lambda xs: max_pool(xs, (2, 2)).sum())(xs)
    assert gradient[0, :, :, 0].tolist() == [[0, 1], [0, 0]]


def test_the_way_is_chosen_for_the_platform():
    gradient = jax.jit(jax.grad(lambda xs: max_pool(xs, (2, 2), (2, 2)).sum()))
    traced = gradient.trace(spikes(1, 4, 4, 1))

    def scatters(platform):
        return "scatter" in traced.lower(lowering_platforms=(platform,)).as_text()

    assert not scatters("cpu")
    assert scatters("tpu") and scatters("cuda")


def test_devices_exchange_nothing():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    batch = NamedSharding(mesh, PartitionSpec("data"))
    function = partial(value_and_gradient, lambda xs: max_pool(xs, (2, 2), (2, 2)))
    xs = spikes(16, 4, 4, 1)
    step = jax.jit(function, in_shardings=batch, out_shardings=batch)
    text = step.lower(xs).compile().as_text()
    assert "all-" not in text and "collective" not in text
    for ours, alone in zip(step(xs), function(xs), strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        ((2, 2), (2, 2, 2)),
        ((2, 2), None, ((1, 1),)),
        ((2, 2, 2, 2),),
        ((2, 2, 2, 2), None, "SAME"),
    ],
    ids=str,
)
def test_a_window_that_does_not_fit_is_an_error(options):
    message = (
        r"max_pool: expected xs \[..., . places, C\] with a stride and a padding for"
    )
    with pytest.raises(ValueError, match=message):
        max_pool(spikes(1, 4, 4, 1), *options)
