"""A convolution of images that is fast on CPUs; on other platforms it is XLA's own.

    nnx.Conv(64, 128, (3, 3), strides=2, conv_general_dilated=convolve, rngs=rngs)

On a CPU XLA is slow in some places (JAX 0.10.2). Gradients with strides, and kernels
larger than the images, are matrix products of patches here; the gradient of a kernel
without strides is a sum over parts of the batch. It needs ``compiler_options`` besides,
without which XLA's convolutions of up to 64 channels keep to one core.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PIECE = 2 * 2**20  # bytes that are worked on at a time, so that they stay in the cache
SUMMANDS = 8  # largest number of parts of the batch that are written out one by one
IMAGES = ("NHWC", "HWIO", "NHWC")


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, ...],
    padding: Any,
    *,
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    **options: Any,
) -> jax.Array:
    """The convolution of ``jax.lax.conv_general_dilated``, faster on a CPU.

    y[b, i, j] = sum over u, v of x[b, s i + u - p, s j + v - p] @ kernel[u, v]

    Images in float32 without dilation and groups take the faster way, if the program is
    compiled for a CPU; all ways give one answer and one gradient. Derivatives in
    forward mode (``jax.jvp``) are the price.

    Args:
        x: images [B, H, W, C].
        kernel: [kh, kw, C, features].
        Others are those of ``jax.lax.conv_general_dilated``.
    """
    usual = (
        x.ndim == kernel.ndim == 4
        and dimension_numbers
        == lax.conv_dimension_numbers(x.shape, kernel.shape, IMAGES)
        and {*(lhs_dilation or ()), *(rhs_dilation or ()), feature_group_count} == {1}
        and x.shape[3] == kernel.shape[2]
        and x.dtype == kernel.dtype == jnp.float32
        and not any(option is not None for option in options.values())
    )
    if not usual:
        return lax.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            **options,
        )
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    return _convolve(x, kernel, tuple(strides), tuple(map(tuple, padding)))


def _larger(x, kernel):
    """Whether the kernel is larger than the images."""
    return kernel.shape[0] > x.shape[1] or kernel.shape[1] > x.shape[2]


def plain(x, kernel, strides, padding):
    """XLA's convolution of images."""
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=IMAGES
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x, kernel, strides, padding):
    options = {"strides": strides, "padding": padding}
    usual = partial(plain, **options)
    on_cpu = partial(from_patches, **options) if _larger(x, kernel) else usual
    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=usual)


def _forward(x, kernel, strides, padding):
    return _convolve(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, kept, g):
    def usual(x, kernel, g):
        return jax.vjp(lambda x, k: plain(x, k, strides, padding), x, kernel)[1](g)

    def on_cpu(x, kernel, g):
        if max(strides) > 1 or _larger(x, kernel):
            dx = image_gradient(x, kernel, g, strides, padding)
            dk = kernel_gradient(x, kernel, g, strides, padding)
        else:
            dx, dk = usual(x, kernel, g)[0], summed_gradient(x, kernel, g, padding)
        # Else XLA puts dk off to the end, and keeps x and g of every layer until then.
        return lax.optimization_barrier((dx, dk))

    return lax.platform_dependent(*kept, g, cpu=on_cpu, default=usual)


_convolve.defvjp(_forward, _backward)


def from_patches(x, kernel, strides, padding):
    """The convolution as matrix products of patches."""
    height, width = _output(x, kernel, strides, padding)
    matrix = kernel.reshape(-1, kernel.shape[-1])
    parts = _in_parts(x, _patch_bytes(x, kernel, strides, padding))

    def add(i, ys):
        patches = _patches(_part(parts, i), kernel, strides, padding)
        y = (patches @ matrix).reshape(-1, height, width, matrix.shape[1])
        return lax.dynamic_update_index_in_dim(ys, y, i, 1)

    ys = _space(parts, (height, width, matrix.shape[1]))
    ys = lax.fori_loop(0, parts.shape[1], add, ys)
    return ys.reshape(-1, *ys.shape[2:])


def kernel_gradient(x, kernel, g, strides, padding):
    """The gradient of the kernel as matrix products of patches."""
    size = _patch_bytes(x, kernel, strides, padding)
    parts, gradients = _in_parts(x, size), _in_parts(g, size)

    def add(i, total):
        patches = _patches(_part(parts, i), kernel, strides, padding)
        return total + patches.T @ _part(gradients, i).reshape(-1, g.shape[-1])

    total = jnp.zeros((kernel.size // g.shape[-1], g.shape[-1]))
    return lax.fori_loop(0, parts.shape[1], add, total).reshape(kernel.shape)


def image_gradient(x, kernel, g, strides, padding):
    """The gradient of the images: the patches of matrix products put back together."""
    matrix = kernel.reshape(-1, kernel.shape[-1]).T
    gradients = _in_parts(g, _patch_bytes(x, kernel, strides, padding))
    height, width = g.shape[1:3]

    def edges(axis, offset):
        before = offset - padding[axis][0]
        reach = before + (g.shape[axis + 1] - 1) * strides[axis] + 1
        return before, x.shape[axis + 1] - reach, strides[axis] - 1

    def add(i, xs):
        patches = _part(gradients, i).reshape(-1, g.shape[-1]) @ matrix
        patches = patches.reshape(-1, height, width, *kernel.shape[:3])
        image = 0.0
        for u in range(kernel.shape[0]):
            for v in range(kernel.shape[1]):
                around = (0, 0, 0), edges(0, u), edges(1, v), (0, 0, 0)
                image += lax.pad(patches[:, :, :, u, v], jnp.float32(0), around)
        return lax.dynamic_update_index_in_dim(xs, image, i, 1)

    xs = _space(gradients, x.shape[1:])
    return lax.fori_loop(0, gradients.shape[1], add, xs).reshape(x.shape)


def summed_gradient(x, kernel, g, padding):
    """The gradient of the kernel, without strides, summed over parts of the batch."""
    size = 4 * x[:1].size
    parts, gradients = _in_parts(x, size, SUMMANDS), _in_parts(g, size, SUMMANDS)
    total = jnp.zeros_like(kernel)
    for i in range(parts.shape[1]):  # XLA's convolutions are slow in loops of XLA
        _, vjp = jax.vjp(lambda k, i=i: plain(parts[:, i], k, (1, 1), padding), kernel)
        total += vjp(gradients[:, i])[0]
    return total


def _output(x, kernel, strides, padding):
    """Height and width of what comes out."""
    return tuple(
        (x.shape[1 + k] + sum(padding[k]) - kernel.shape[k]) // strides[k] + 1
        for k in range(2)
    )


def _patch_bytes(x, kernel, strides, padding):
    """Of the patches of one image."""
    height, width = _output(x, kernel, strides, padding)
    return 4 * height * width * (kernel.size // kernel.shape[-1])


def _in_parts(images, size, most=None):
    """[B, ...] as [B / n, n, ...], n parts of about PIECE bytes at ``size`` an image.

    A part has as many images from each device as from the others.
    """
    total, devices = len(images), jax.device_count()
    wanted = min(total * size // PIECE, most or total)
    counts = [n for n in range(1, wanted + 1) if total % (n * devices) == 0]
    return images.reshape(-1, max(counts, default=1), *images.shape[1:])


def _part(parts, i):
    return lax.dynamic_index_in_dim(parts, i, 1, keepdims=False)


def _space(parts, shape):
    """Images to be overwritten; XLA would make zeros long before they are needed."""
    return jnp.broadcast_to(parts[:, :, :1, :1, :1], (*parts.shape[:2], *shape))


def _patches(x, kernel, strides, padding):
    """[patches, kh kw C]: what each output position sees."""
    height, width = _output(x, kernel, strides, padding)
    (sy, sx), (rows, columns) = strides, padding
    x = lax.pad(x, jnp.float32(0), ((0, 0, 0), (*rows, 0), (*columns, 0), (0, 0, 0)))
    seen = [
        x[:, u : u + (height - 1) * sy + 1 : sy, v : v + (width - 1) * sx + 1 : sx]
        for u in range(kernel.shape[0])
        for v in range(kernel.shape[1])
    ]
    return jnp.concatenate(seen, -1).reshape(-1, kernel.size // kernel.shape[-1])
