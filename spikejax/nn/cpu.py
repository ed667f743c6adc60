"""Convolution, linear layer and max-pooling that are fast on XLA:CPU.

    cpu.keep_memory()
    kernels = {"conv": cpu.Conv, "pool": cpu.max_pool, "norm": fast_td_batch_norm}
    model = resnet18(10, neuron=LIF, **kernels, rngs=rngs)
    step = jax.jit(step, compiler_options=cpu.compiler_options("cpu"))

Values and gradients equal those of Flax and JAX. Pass them on a CPU only: nothing here
looks at the platform, and ``jax.jvp`` does not work, which it does with Flax's own.
Times in comments are CPU time of JAX 0.10.2 on two cores.
"""

import ctypes
import logging
import os
from collections.abc import Callable, Sequence
from functools import cache, partial, reduce
from itertools import product
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

Arrays = tuple[Array, ...]
Padding = str | Sequence[tuple[int, int]]

CPU_OPTIONS = {
    # The order of operations with the least memory, not with the most parallel ones.
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    # This pass removes barriers: those below, and those of jax.checkpoint, whose
    # recomputation XLA then merges with the first computation.
    "xla_disable_hlo_passes": "cse_barrier_expander",
    # Convolutions by Eigen, as YNNPACK's use one core for up to 64 channels: 3x3 over
    # [256, 32, 32, 64] takes 134 ms instead of 284, its kernel gradient 182 instead of
    # 620. Sums stay with YNNPACK: by Eigen, three layers take 434 ms instead of 297.
    "xla_cpu_experimental_ynn_fusion_type": (
        "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    ),
}


@cache
def compiler_options(platform: str) -> dict[str, str]:
    """Return options for ``jax.jit(step, compiler_options=...)`` of a training step.

    On "cpu" a step takes two fifths of the memory and two thirds of the time; other
    platforms have none. Those that this XLA does not know are left out, with a warning
    in the log.
    """
    known: dict[str, str] = {}
    for name, value in CPU_OPTIONS.items() if platform == "cpu" else ():
        try:
            jax.jit(lambda: 0, compiler_options={name: value})()
            known[name] = value
        except jax.errors.JaxRuntimeError:
            # Debug flags of XLA come and go: silently, steps would just be slower.
            logging.getLogger(__name__).warning(
                "compiler_options: this XLA does not know %s. Steps on a CPU may be "
                "slower and take more memory.",
                name,
            )
    return known


# Parameters of mallopt in malloc.h of glibc, and the values that keep all memory.
MEMORY = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}
POSIX = os.name == "posix"


@cache
def keep_memory() -> bool:
    """Keep the memory that a step frees for the next one; return whether it worked.

    By default glibc gives the arrays of a step back to the kernel, which clears each
    page again for the next step: a fifth of the CPU time of the network of
    ``experiments.cifar10 --model whitened``. Acts on the whole process, so scripts call
    it and the library does not. Other C libraries than glibc are left as they are, and
    so is one that the environment has set, by a variable MALLOC_....
    """
    if not POSIX or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt) and all([mallopt(*pair) for pair in MEMORY.values()])


# Convolution

PIECE = 2 * 2**20  # bytes of patches at a time: they stay in the cache of a core
SUMMANDS = 8  # parts of a batch, each its own convolution in the program
IMAGES = ("NHWC", "HWIO", "NHWC")


class _Grid(NamedTuple):
    """Positions of a kernel on an image."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]


def convolve(
    x: Array, kernel: Array, strides: Sequence[int], padding: Padding, **options: Any
) -> Array:
    """Convolve as ``jax.lax.conv_general_dilated`` does, faster on a CPU.

    y[b, i, j] = sum over u, v of x[b, s i + u - p, s j + v - p] @ kernel[u, v]

    Images in float32 without dilation take the fast implementations, in one group or
    in as many as there are channels; all else is left to JAX.

    Args:
        x: images [B, H, W, C].
        kernel: [kh, kw, C, features].
        strides, padding, options: those of ``jax.lax.conv_general_dilated``.
    """
    given = {name: value for name, value in options.items() if value is not None}
    plain = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "feature_group_count": 1}
    if x.ndim == kernel.ndim == 4 and x.dtype == kernel.dtype == jnp.float32:
        numbers = lax.conv_dimension_numbers(x.shape, kernel.shape, IMAGES)
        plain |= {"dimension_numbers": numbers}
        pads = padding
        if isinstance(pads, str):
            pads = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, pads)
        grid = _Grid(tuple(strides), tuple((a, b) for a, b in pads))
        depthwise = kernel.shape[2:] == (1, x.shape[3]) and x.shape[3] > 1
        if given == plain | {"feature_group_count": x.shape[3]} and depthwise:
            fast = partial(_depthwise, grid=grid)
            # The tracer, and so energy.measure, sees the default.
            default = partial(_xla, grid=grid, groups=x.shape[3])
            return lax.platform_dependent(x, kernel, cpu=fast, default=default)
        if given == plain:
            return _convolve(x, kernel, grid)
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)


Conv: Callable[..., nnx.Conv] = partial(nnx.Conv, conv_general_dilated=convolve)


def _xla(x: Array, kernel: Array, grid: _Grid, groups: int = 1) -> Array:
    options: dict[str, Any] = {"dimension_numbers": IMAGES}
    options["feature_group_count"] = groups
    return lax.conv_general_dilated(x, kernel, *grid, **options)


def _depthwise(x: Array, kernel: Array, grid: _Grid) -> Array:
    """Return the convolution of each channel with a kernel of its own."""
    # By XLA's convolution, 3x3 over [8, 28, 28, 240] takes 80 ms, by this one 3.
    seen = _shifted(x, kernel.shape[:2], grid)
    weights = kernel.reshape(-1, x.shape[-1])
    return reduce(add, (v * w for v, w in zip(seen, weights, strict=True)))


def _is_larger(kernel: Array, x: Array) -> bool:
    # Such as the last stage of a ResNet on 64x64. XLA falls into a slow loop there: 3x3
    # over [64, 2, 2, 512] takes 1,280 ms forward, and 14 as a product of patches; over
    # [64, 4, 4, 512], where the kernel fits, 33 and 46.
    if not isinstance(x.shape[0], int):  # jax.export, for any number of images
        return False
    return kernel.shape[0] > x.shape[1] or kernel.shape[1] > x.shape[2]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x: Array, kernel: Array, grid: _Grid) -> Array:
    return (_in_patches if _is_larger(kernel, x) else _xla)(x, kernel, grid)


def _backward(grid: _Grid, saved: Arrays, g: Array) -> Arrays:
    x, kernel = saved
    if max(grid.strides) > 1 or _is_larger(kernel, x):
        # XLA dilates g by the stride: 17 to 37 GFLOP/s. Patches: 56 to 80.
        dx, dk = _patch_gradients(x, kernel, g, grid)
    else:
        dx = jax.vjp(lambda x: _xla(x, kernel, grid), x)[1](g)[0]
        dk = _summed_gradient(x, kernel, g, grid)
    # Without this barrier XLA moves every dk to the end of the step, and keeps x and g
    # of all layers until then: ResNet-18 with LIF, T=4, took 2,672 MiB, not 1,079.
    return lax.optimization_barrier((dx, dk))


_convolve.defvjp(lambda x, k, grid: (_convolve(x, k, grid), (x, k)), _backward)


def _product(x: Array, kernel: Array, grid: _Grid) -> Array:
    """Return the convolution of a few images, as one matrix product of patches."""
    features = kernel.shape[-1]
    seen = _shifted(x, kernel.shape[:2], grid)
    patches = jnp.concatenate(seen, -1).reshape(-1, kernel.size // features)
    y = patches @ kernel.reshape(-1, features)
    return y.reshape(*seen[0].shape[:3], features)


def _shifted(x: Array, size: tuple[int, ...], grid: _Grid) -> list[Array]:
    """Return the pixels that each weight of a kernel sees, [B, height, width, C]."""
    (kh, kw), (sy, sx) = size, grid.strides
    edges = (0, 0), *grid.padding, (0, 0)
    x = lax.pad(x, jnp.float32(0), [(a, b, 0) for a, b in edges])

    # Not x[:, u::sy, v::sx], which is a gather in JAX 0.7, and its gradient a scatter.
    def pixels(u: int, v: int) -> Array:
        end = x.shape[0], x.shape[1] - kh + u + 1, x.shape[2] - kw + v + 1, x.shape[3]
        return lax.slice(x, (0, u, v, 0), end, (1, sy, sx, 1))

    return [pixels(u, v) for u, v in product(range(kh), range(kw))]


def _in_patches(x: Array, kernel: Array, grid: _Grid) -> Array:
    """Return the convolution, in matrix products of PIECE bytes."""
    y = jax.eval_shape(partial(_xla, grid=grid), x, kernel)
    xs = _in_parts(x, _patch_bytes(y, kernel))

    def put(i: Array, ys: Array) -> Array:
        return _put(ys, _product(_at(xs, i), kernel, grid), i)

    ys = lax.fori_loop(0, xs.shape[1], put, _space(xs, y.shape[1:]))
    return ys.reshape(y.shape)


def _patch_gradients(x: Array, kernel: Array, g: Array, grid: _Grid) -> Arrays:
    """Return the gradients of images and kernel, by the same matrix products."""
    size = _patch_bytes(g, kernel)
    xs, gs = _in_parts(x, size), _in_parts(g, size)

    def add(i: Array, sums: Arrays) -> Arrays:
        pull = jax.vjp(partial(_product, grid=grid), _at(xs, i), kernel)[1]
        dx, dk = pull(_at(gs, i))
        return _put(sums[0], dx, i), sums[1] + dk

    start = _space(xs, x.shape[1:]), jnp.zeros_like(kernel)
    dx, dk = lax.fori_loop(0, xs.shape[1], add, start)
    return dx.reshape(x.shape), dk


def _summed_gradient(x: Array, kernel: Array, g: Array, grid: _Grid) -> Array:
    """Return the gradient of a kernel without strides, summed over parts of a batch."""
    # Eigen slows down with the batch: 3x3 over [256, 16, 16, 128] takes 1,146 ms in one
    # piece and 291 in eight.
    size = 4 * x[:1].size
    xs, gs = _in_parts(x, size, SUMMANDS), _in_parts(g, size, SUMMANDS)
    total = jnp.zeros_like(kernel)
    for i in range(xs.shape[1]):
        # Written out, as convolutions in a loop of XLA are up to 16 times slower.
        total += jax.vjp(lambda k, i=i: _xla(xs[:, i], k, grid), kernel)[1](gs[:, i])[0]
    return total


def _patch_bytes(y: Array | jax.ShapeDtypeStruct, kernel: Array) -> int:
    """Return the bytes of the patches of one image, whose convolution is in y."""
    return 4 * y.shape[1] * y.shape[2] * (kernel.size // kernel.shape[-1])


def _in_parts(images: Array, size: int, most: int | None = None) -> Array:
    """Reshape [B, ...] to [B / n, n, ...]: n parts of PIECE, for ``size`` per image."""
    total, devices = len(images), jax.device_count()
    wanted = min(total * size // PIECE, most or total)
    # Images of a part are n apart, and n divides the batch of each device: so a batch
    # that is sharded stays so, and only the sum of the kernel's gradient is exchanged.
    counts = [n for n in range(1, wanted + 1) if total % (n * devices) == 0]
    return images.reshape(-1, max(counts, default=1), *images.shape[1:])


def _at(parts: Array, i: Array) -> Array:
    return lax.dynamic_index_in_dim(parts, i, 1, keepdims=False)


def _put(parts: Array, part: Array, i: Array) -> Array:
    return lax.dynamic_update_index_in_dim(parts, part, i, 1)


def _space(parts: Array, shape: tuple[int, ...]) -> Array:
    # Overwritten in full. XLA would allocate zeros, a constant, early in the step.
    return jnp.broadcast_to(parts[:, :, :1, :1, :1], (*parts.shape[:2], *shape))


# Linear layers


def dot_general(
    x: Array,
    kernel: Array,
    dimensions: lax.DotDimensionNumbers,
    precision: lax.PrecisionLike = None,
    **options: Any,
) -> Array:
    """Multiply as ``jax.lax.dot_general`` does, with a faster gradient on a CPU.

    y[..., o] = sum over i of x[..., i] kernel[i, o]

    Args:
        x: values [..., features].
        kernel: [features, outputs]. Other products are left to JAX.
        dimensions, precision, options: those of ``jax.lax.dot_general``.
    """
    plain = ((x.ndim - 1,), (0,)), ((), ())
    given = [value for value in (precision, *options.values()) if value is not None]
    if x.ndim > 1 and kernel.ndim == 2 and dimensions == plain and not given:
        return _multiply(x, kernel)
    return lax.dot_general(x, kernel, dimensions, precision, **options)


@jax.custom_vjp
def _multiply(x: Array, kernel: Array) -> Array:
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _multiply_backward(saved: Arrays, g: Array) -> Arrays:
    x, kernel = saved
    dx = lax.dot_general(g, kernel, (((g.ndim - 1,), (1,)), ((), ())))
    # JAX computes the transpose of dk, for which XLA writes g transposed. A layer from
    # 128 to 512 channels with norm and ReLU takes 266 ms for 12,544 pixels, so 163.
    xs, gs = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return dx, lax.dot_general(xs, gs, (((0,), (0,)), ((), ())))


_multiply.defvjp(
    lambda x, kernel: (_multiply(x, kernel), (x, kernel)), _multiply_backward
)

Linear: Callable[..., nnx.Linear] = partial(nnx.Linear, dot_general=dot_general)


# Max-pooling


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def max_pool(
    xs: Array,
    window_shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
    padding: Padding = "VALID",
) -> Array:
    """Return the maximum of each window; of spikes it is their OR.

    Args and gradient as in ``nnx.max_pool``: to the first of equal maxima, row by row.
    """
    # Not the comparisons below: NIR and energy know a maximum by its reduce_window.
    pads: Any = padding  # Flax's stub knows the strings only
    return nnx.max_pool(xs, window_shape, strides, pads)


def _pool_backward(
    window: tuple[int, ...],
    strides: tuple[int, ...] | None,
    padding: Padding,
    xs: Array,
    g: Array,
) -> Arrays:
    # XLA scatters this gradient element by element: 629 ms and 544 MiB for windows 2x2
    # of [128, 64, 64, 64]. The gradient of comparisons: 83 ms, no memory, same numbers.
    batch = xs.ndim - 1 - len(window)
    strides = strides or (1,) * len(window)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(xs.shape[batch:-1], window, strides, padding)
    pads = [(0, 0)] * batch + [*padding, (0, 0)]

    def compared(xs: Array) -> Array:
        xs = jnp.pad(xs, pads, constant_values=-jnp.inf)
        seen = []
        for offset in product(*map(range, window)):
            sizes = zip(offset, xs.shape[batch:], window, strict=False)
            ends = [i + n - w + 1 for i, n, w in sizes]
            start = (0,) * batch + (*offset, 0)
            end = (*xs.shape[:batch], *ends, xs.shape[-1])
            seen.append(lax.slice(xs, start, end, (1,) * batch + (*strides, 1)))
        return reduce(lambda a, b: jnp.where(a >= b, a, b), seen)

    return jax.vjp(compared, xs)[1](g)


max_pool.defvjp(lambda xs, *options: (max_pool(xs, *options), xs), _pool_backward)
