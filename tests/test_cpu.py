"""The kernels for CPUs: values and gradients of Flax and JAX, and how they compile."""

import logging
import os
import platform
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spikejax import encode, energy
from spikejax.layers import LIF
from spikejax.losses import rate_cross_entropy
from spikejax.models.resnet import ResNet
from spikejax.nn import cpu
from spikejax.nn.cpu import compiler_options, convolve, max_pool
from spikejax.nn.norm import fast_td_batch_norm
from spikejax.train import TrainConfig
from spikejax.train.recipe import make_optimizer
from spikejax.train.step import initial_state, make_train_step

NUMBERS = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
OPTIONS = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "precision": None}
OPTIONS |= {"dimension_numbers": NUMBERS, "feature_group_count": 1}
FAST = {"conv": cpu.Conv, "norm": fast_td_batch_norm, "pool": cpu.max_pool}


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
    monkeypatch.setattr(cpu, "PIECE", 1000)


# Convolution


@pytest.mark.parametrize("batch", [7, 48])
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


@pytest.mark.parametrize(("size", "stride"), [(3, 2), (5, 1)])
def test_a_kernel_for_each_channel_is_a_sum_of_shifted_images(size, stride):
    x, kernel = some(0, 2, 6, 7, 4), some(1, size, size, 1, 4)
    options = OPTIONS | {"feature_group_count": 4}
    same(convolve, x, kernel, (stride, stride), "SAME", **options)
    function = partial(convolve, strides=(stride, 1), padding="SAME", **options)
    compiled = jax.jit(function).lower(x, kernel).compile().as_text()
    assert "convolution(" not in compiled


def test_any_number_of_images_is_exported_where_the_kernel_is_larger():
    x, conv = some(0, 3, 2, 2, 4), cpu.Conv(4, 5, (3, 3), rngs=nnx.Rngs(0))
    shape = export.symbolic_shape("b, 2, 2, 4")
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    exported = export.export(jax.jit(lambda x: conv(x)))(images)
    np.testing.assert_allclose(exported.call(x), conv(x), rtol=1e-5, atol=1e-5)


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
def test_a_layer_of_flax_takes_the_fast_implementation(small_pieces, strides):
    xs = some(0, 2, 4, 6, 6, 3)  # two axes of batch
    layers = [
        make(3, 5, (3, 3), strides, rngs=nnx.Rngs(0)) for make in (cpu.Conv, nnx.Conv)
    ]
    assert "custom_vjp" in str(jax.make_jaxpr(layers[0])(xs))

    def loss(layer, xs):
        return (layer(xs) ** 2).sum()

    (ours, dx), (theirs, dx2) = (
        nnx.value_and_grad(loss, argnums=1)(layer, xs) for layer in layers
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    np.testing.assert_allclose(dx, dx2, rtol=1e-4, atol=1e-4)


def test_gradients_with_strides_are_matrix_products(small_pieces):
    x, kernel = some(0, 8, 6, 6, 3), some(1, 3, 3, 3, 2)
    function = partial(
        value_and_gradients, convolve, strides=(2, 2), padding="SAME", **OPTIONS
    )
    text = jax.jit(function).lower(x, kernel).as_text()
    assert text.count("stablehlo.convolution") == 1  # the value


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
        # jit: compiled operation by operation, both take three times as long.
        ours = jax.jit(jax.grad(partial(slope, convolve), k))(x, kernel)
        flax = partial(slope, lax.conv_general_dilated)
        theirs = jax.jit(jax.grad(flax, k))(x, kernel)
        scale = jnp.abs(theirs).max()
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-5)


def test_a_kernel_that_does_not_fit_is_named_by_jax():
    with pytest.raises((TypeError, ValueError), match="feature"):
        convolve(some(0, 2, 4, 4, 3), some(1, 3, 3, 2, 2), (2, 2), "SAME", **OPTIONS)


# Linear layers

LAST = (((1,), (0,)), ((), ()))


@pytest.mark.parametrize("shape", [(5, 4), (1, 4), (3, 2, 4), (2, 1, 3, 3, 4)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_equals_that_of_jax_forward_and_gradient(shape, dtype):
    found, expected = (
        value_and_gradients(
            lambda x, k, multiply=multiply: multiply(
                x, k, (((x.ndim - 1,), (0,)), ((), ()))
            ),
            some(0, *shape).astype(dtype),
            some(1, 4, 3).astype(dtype),
        )
        for multiply in (cpu.dot_general, lax.dot_general)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype == dtype and ours.shape == theirs.shape
        tolerance = 1e-6 if dtype == jnp.float32 else 0.02
        np.testing.assert_allclose(
            *(a.astype(jnp.float32) for a in (ours, theirs)), tolerance, tolerance
        )


def test_the_gradient_of_a_linear_layer_transposes_nothing():
    def text(linear):
        graphdef, params = nnx.split(linear(4, 3, rngs=nnx.Rngs(0)))

        def loss(params, xs):
            return nnx.merge(graphdef, params)(xs).sum()

        return jax.jit(jax.grad(loss, (0, 1))).lower(params, some(0, 5, 4)).as_text()

    assert "transpose" in text(nnx.Linear)
    assert "transpose" not in text(cpu.Linear)


@pytest.mark.parametrize(
    "dimensions, options",
    [
        ((((0,), (0,)), ((), ())), {}),
        ((((1,), (1,)), ((), ())), {}),
        ((((1,), (1,)), ((0,), (0,))), {}),
        (LAST, {"precision": lax.Precision.HIGHEST}),
        (LAST, {"preferred_element_type": jnp.float32}),
    ],
)
def test_other_products_are_left_to_jax(dimensions, options):
    x, kernel = some(0, 4, 4), some(1, 4, 4)
    theirs = jax.make_jaxpr(lambda *a: lax.dot_general(*a, dimensions, **options))
    ours = jax.make_jaxpr(lambda *a: cpu.dot_general(*a, dimensions, **options))
    assert str(ours(x, kernel)) == str(theirs(x, kernel))


def test_energy_of_linear_layers_does_not_depend_on_their_kernel():
    def measure(linear):
        layers = linear(4, 3, rngs=nnx.Rngs(0)), LIF(), linear(3, 2, rngs=nnx.Rngs(1))
        report = energy.measure(nnx.Sequential(*layers), 9 * some(0, 2, 3, 4))
        return report.acs, report.macs, report.dense_macs

    assert measure(cpu.Linear) == measure(nnx.Linear)


# Max-pooling


def spikes(*shape):
    """Few values, so that most windows have several maxima."""
    return jnp.asarray(np.random.default_rng(0).integers(0, 3, shape), jnp.float32)


def pooled(function, xs):
    """Value and gradient of a max-pooling."""
    ys, vjp = jax.vjp(function, xs)
    return ys, *vjp(jnp.cos(jnp.arange(ys.size).reshape(ys.shape)).astype(ys.dtype))


@pytest.mark.parametrize(
    ("xs", "options"),
    [
        (spikes(3, 7, 8, 2), ((2, 2),)),
        (spikes(3, 7, 8, 2).astype(jnp.bfloat16), ((3, 2), (2, 3))),
        (-1 - spikes(3, 7, 8, 2), ((3, 3), (2, 2), "SAME")),  # below the padding's 0
        (spikes(3, 7, 8, 2), ((2, 3), None, ((1, 0), (0, 2)))),
        (spikes(2, 3, 6, 6, 2), ((2, 2), (2, 2))),
        (spikes(2, 3, 6, 6, 2), ((1, 3, 3), (1, 2, 2), ((0, 0), (1, 1), (1, 1)))),
        (spikes(2, 9, 2), ((3,), (3,))),
    ],
    ids=lambda value: "" if isinstance(value, jax.Array) else str(value),
)
def test_max_pooling_equals_flax(xs, options):
    ours, theirs = (
        pooled(jax.jit(lambda xs, pool=pool: pool(xs, *options)), xs)
        for pool in (max_pool, nnx.max_pool)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_the_first_of_equal_maxima_has_the_gradient():
    xs = jnp.ones((1, 2, 2, 1)).at[0, 0, 0, 0].set(0.0)
    gradient = jax.grad(lambda xs: max_pool(xs, (2, 2)).sum())(xs)
    assert gradient[0, :, :, 0].tolist() == [[0, 1], [0, 0]]


def test_max_pooling_of_devices_exchanges_nothing_and_scatters_nothing():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    batch = NamedSharding(mesh, PartitionSpec("data"))
    function = partial(pooled, lambda xs: max_pool(xs, (2, 2), (2, 2)))
    xs = spikes(16, 4, 4, 1)
    step = jax.jit(function, in_shardings=batch, out_shardings=batch)
    lowered = step.lower(xs)
    assert "scatter" not in lowered.as_text()
    text = lowered.compile().as_text()
    assert "all-" not in text and "collective" not in text
    for ours, alone in zip(step(xs), function(xs), strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-6)


# Batch norm


def scratch(blocks):
    """Memory of a gradient with recomputed blocks, in arrays of a block's output."""
    network = ResNet(
        (blocks,), (8,), 10, neuron=LIF, remat=True, rngs=nnx.Rngs(0), **FAST
    )
    graphdef, params, rest = nnx.split(network, nnx.Param, ...)

    def loss(params, rest, xs):
        return (nnx.merge(graphdef, params, rest, copy=True)(xs) ** 2).sum()

    step = jax.jit(jax.grad(loss), compiler_options=compiler_options("cpu"))
    lowered = step.lower(params, rest, jnp.zeros((16, 4, 16, 16, 3)))
    memory = lowered.compile().memory_analysis()
    return memory.temp_size_in_bytes / (16 * 4 * 16 * 16 * 8 * 4)


def test_no_norm_waits_with_its_bias():
    """A block more costs its input; derived by JAX, also what its biases sum up."""
    if compiler_options("cpu") != cpu.CPU_OPTIONS:
        pytest.skip("this XLA does not know the options")
    assert scratch(4) - scratch(2) < 2.2


# The options of the compiler


def compiled_step(options):
    """A step of a small residual network, compiled with the options."""
    model = ResNet((2, 2), (4, 8), 3, neuron=LIF, rngs=nnx.Rngs(0), **FAST)
    config = TrainConfig(steps=10)
    optimizer = make_optimizer(config, 10)
    state = initial_state(model, optimizer, config)
    step = make_train_step(
        nnx.graphdef(model),
        rate_cross_entropy,
        lambda images, rng: encode.direct(images, 4),
        optimizer,
    )
    images = jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
    batch = {"image": images, "label": jnp.arange(16) % 3}
    jitted = jax.jit(step, compiler_options=options)
    return jitted.lower(state, batch).compile(), state, batch


def test_memory_is_kept_from_one_step_to_the_next():
    program = """
import resource
from spikejax.nn import cpu

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 2**27  # 32,768 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
given_back = faults()  # of huge pages these are fewer
assert cpu.keep_memory()
faults()
assert faults() < given_back / 10, given_back
"""
    libc = platform.libc_ver()[0]
    if libc != "glibc":
        pytest.skip(f"the C library is {libc or 'unknown'}, which is left as it is")
    environment = {k: v for k, v in os.environ.items() if "MALLOC" not in k}
    environment["JAX_PLATFORMS"] = "cpu"
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_a_c_library_without_the_settings_or_set_by_hand_is_left_as_it_is(monkeypatch):
    keep = cpu.keep_memory.__wrapped__
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda name: object())
    assert not keep()
    monkeypatch.setattr(cpu.ctypes, "CDLL", None)  # not to be called
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    assert not keep()
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    monkeypatch.setattr(cpu, "POSIX", False)
    assert not keep()


def test_options_of_the_compiler_spare_memory_and_change_nothing():
    options = compiler_options("cpu")
    if len(options) < len(cpu.CPU_OPTIONS):
        pytest.skip(f"this XLA has {list(options)} of {list(cpu.CPU_OPTIONS)} only")
    plain, state, batch = compiled_step({})
    spared, _, _ = compiled_step(options)

    def memory(compiled):
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(spared) < 0.7 * memory(plain)
    one, other = plain(state, batch), spared(state, batch)
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_an_option_that_xla_refuses_is_logged_once_and_left_out(monkeypatch, caplog):
    passes = {"xla_disable_hlo_passes": "nobody_has_this"}
    monkeypatch.setattr(cpu, "CPU_OPTIONS", passes | {"xla_cpu_nobody_has_this": True})
    compiler_options.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert compiler_options("cpu") == compiler_options("cpu") == passes
        assert compiler_options("tpu") == {}
    compiler_options.cache_clear()
    (line,) = caplog.messages
    assert line.startswith(
        "compiler_options: this XLA does not know xla_cpu_nobody_has_this. Steps on"
    )
