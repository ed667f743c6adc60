"""Layers without time: modules for nodes of NIR, which is channels-first, and back."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import nir
import numpy as np
import numpy.typing as npt
from flax import nnx

from spikejax import surrogate
from spikejax.layers import Fixed

Array = np.ndarray | jax.Array
Node = Any  # a nir.NIRNode; what its classes share has no type


class Threshold(nnx.Module):
    """Step function of its input: 1 where x reaches the threshold, else 0.

    Args:
        threshold: number or array that broadcasts with [B, T, ...].
    """

    def __init__(self, threshold: float | Array):
        self.threshold = Fixed(jnp.asarray(threshold, jnp.float32))

    def __call__(self, xs: jax.Array) -> jax.Array:
        return surrogate.ATAN(xs - self.threshold[...]).astype(xs.dtype)


class Scale(nnx.Module):
    """Elementwise product with learned numbers.

    Args:
        scale: number or array that broadcasts with [B, T, ...].
    """

    def __init__(self, scale: float | Array):
        self.scale = nnx.Param(jnp.asarray(scale, jnp.float32))

    def __call__(self, xs: jax.Array) -> jax.Array:
        return (xs * self.scale[...]).astype(xs.dtype)


class Flatten(nnx.Module):
    """Map from [B, T, H, W, C] to [B, T, C H W], in this order."""

    def __call__(self, xs: jax.Array) -> jax.Array:
        # The weights that follow in the file are in the order of channels-first.
        return jnp.moveaxis(xs, -1, 2).reshape(*xs.shape[:2], -1)


class Pool(nnx.Module):
    """Sum or mean over windows of [B, T, H, W, C]; padding counts as zeros.

    Args:
        size, stride, padding: two numbers each.
        mean: divide by the size of the window.
    """

    def __init__(
        self,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...] = (0, 0),
        *,
        mean: bool,
    ):
        self.size, self.stride, self.mean = size, stride, mean
        self.padding = padding

    def __call__(self, xs: jax.Array) -> jax.Array:
        # Over [T, H, W]: Flax pads one more axis in front of these, and no two.
        size, stride = (1, *self.size), (1, *self.stride)
        pads = ((0, 0), *((p, p) for p in self.padding))
        ys = nnx.pool(xs, 0.0, jax.lax.add, size, stride, pads)
        return ys / math.prod(self.size) if self.mean else ys


def linear(
    kernel: np.ndarray,
    rank: int,
    image: tuple[int, ...] | None,
    params: Mapping[str, Any],
) -> nir.Linear | None:
    """Return a Linear node y = W x, or None if NIR has none.

    Args:
        kernel: constant operand of the product.
        rank: of the input with its leading axes, the last of which is contracted.
        image: [H, W, C] of the image that was flattened to the input, or None.
        params: those of ``jax.lax.dot_general_p``.
    """
    (ours, theirs), batch = params["dimension_numbers"]
    # Over any other axis of the input it would be a sum over steps or examples.
    if tuple(ours) != (rank - 1,) or kernel.ndim != 2 or batch[0]:
        return None
    kernel = np.moveaxis(kernel, theirs[0], 0)
    if image is not None:  # rows in the order of channels-first
        kernel = np.moveaxis(kernel.reshape(*image, -1), -2, 0)
    return nir.Linear(np.ascontiguousarray(kernel.reshape(-1, kernel.shape[-1]).T))


def convolution(
    kernel: np.ndarray, size: Sequence[int], params: Mapping[str, Any]
) -> nir.Conv1d | nir.Conv2d | None:
    """Return a Conv1d or Conv2d node without bias, or None if NIR 1.0 has none.

    Its kernel has zeros at its edges where it would not be square otherwise, or where
    its padding would differ between two sides.

    Args:
        kernel: [H, W, in, out] or [L, in, out].
        size: [H, W] or [L] of the input.
        params: those of ``jax.lax.conv_general_dilated_p``.
    """
    rank = kernel.ndim - 2
    axes = tuple(range(rank))
    last = (0, rank + 1, *(a + 1 for a in axes))  # batch and channels of [B, H, W, C]
    if (
        rank not in (1, 2)
        or len(size) != rank  # else it is over time
        or tuple(params["dimension_numbers"]) != (last, (rank + 1, rank, *axes), last)
        or params["feature_group_count"] * params["batch_group_count"] != 1
        or set(params["lhs_dilation"]) != {1}  # a transposed convolution
        or (edges := _edges(kernel.shape, size, **params)) is None
    ):
        return None
    weight = np.moveaxis(np.pad(kernel, [*edges, (0, 0), (0, 0)]), (-1, -2), (0, 1))
    weight, dilation = np.ascontiguousarray(weight), params["rhs_dilation"]
    sides = zip(params["padding"], edges, dilation, strict=True)
    padding = tuple(low + front * step for (low, _), (front, _), step in sides)
    numbers = (size, params["window_strides"], padding, dilation)
    if rank == 1:
        numbers = tuple(n[0] for n in numbers)
    shape, *strides_and_pads, dilation = numbers
    kind: Any = (nir.Conv1d, nir.Conv2d)[rank - 1]
    bias = np.zeros(len(weight), np.float32)
    return kind(shape, weight, *strides_and_pads, dilation, 1, bias)


def _edges(
    shape: Sequence[int],
    size: Sequence[int],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    rhs_dilation: Sequence[int],
    **_: Any,
) -> list[tuple[int, int]] | None:
    """Return the zeros before and behind a kernel that NIR needs, None if none do.

    NIR pads both sides alike, and nir 1.0 infers a wrong shape for kernels that are not
    square. Zeros before a kernel move its first weight, those behind it only its end:
    y[i] = sum over u of x[s i + r u - low] w[u] stays the same with low + r zeros.
    """
    axes = list(zip(shape, size, window_strides, padding, rhs_dilation, strict=False))

    def zeros_before(side: int, axis: tuple) -> int | None:
        k, n, stride, (low, high), step = axis
        last = n + low + high - step * (k - 1) - 1  # place of the last weight's end
        for zeros in range(side - k + 1):
            start = low + step * zeros
            end = n + 2 * start - step * (side - 1) - 1
            if start >= 0 <= end and end // stride == last // stride:
                return zeros
        return None

    largest, most = max(shape[: len(size)]), max(map(sum, padding), default=0)
    for side in range(largest, largest + most + 2):
        found = [zeros_before(side, axis) for axis in axes]
        if None not in found:
            pairs: Any = zip(found, shape, strict=False)
            return [(zeros, side - k - zeros) for zeros, k in pairs]
    return None


def absorb(
    node: Node, gain: np.ndarray, shift: np.ndarray | None, *, mean: bool
) -> nir.NIRNode | None:
    """Return a node that computes gain y + shift, None if no node does.

    Args:
        node: whose output y is. Linear, Affine, Conv1d, Conv2d, or SumPool2d.
        gain, shift: in the shape of y, channels-first; no shift is None.
        mean: let SumPool2d become AvgPool2d.
    """
    if isinstance(node, nir.SumPool2d):
        fits = np.allclose(gain * math.prod(node.kernel_size), 1, rtol=1e-6, atol=0)
        if mean and fits and shift is None:
            return nir.AvgPool2d(node.kernel_size, node.stride, node.padding)
        return None
    both = (gain, np.zeros_like(gain) if shift is None else shift)
    flat = [array.reshape(len(array), -1) for array in both]
    if not hasattr(node, "weight") or any(np.ptp(a, 1).any() for a in flat):
        return None
    gain, bias = (array[:, 0] for array in flat)
    weight = (node.weight.T * gain).T.astype(np.float32)
    if isinstance(node, nir.Linear) and shift is None:
        return nir.Linear(weight)
    bias = (getattr(node, "bias", 0) * gain + bias).astype(np.float32)
    if isinstance(node, nir.Linear):
        return nir.Affine(weight, bias)
    return dataclasses.replace(node, weight=weight, bias=bias)


def broadcastable(value: npt.ArrayLike) -> Any:
    """Return an array of NIR, channels-first, to broadcast with channels-last.

    A number, if all its entries are equal.
    """
    array = np.asarray(value, np.float64)
    if array.size and (array == array.flat[0]).all():
        return float(array.flat[0])
    return np.moveaxis(array, 0, -1)


def read_layer(node: Node) -> nnx.Module | None:
    """Return the layer for a node without time, or None for any other node."""
    if isinstance(node, nir.Affine | nir.Linear) and np.ndim(node.weight) == 2:
        return _weighted(nnx.Linear, node, *np.shape(node.weight)[::-1])
    if isinstance(node, nir.Conv1d | nir.Conv2d):
        return _read_convolution(node)
    if isinstance(node, nir.SumPool2d | nir.AvgPool2d):
        numbers = (node.kernel_size, node.stride, node.padding)
        mean = isinstance(node, nir.AvgPool2d)
        return Pool(*(_numbers(n, 2) for n in numbers), mean=mean)
    if isinstance(node, nir.Flatten) and int(node.start_dim) == 0:
        shape = (node.input_type or {}).get("input")
        last = -1 if shape is None else len(shape) - 1
        return Flatten() if int(node.end_dim) in (-1, last) else None
    if isinstance(node, nir.Scale):
        return Scale(broadcastable(node.scale))
    if isinstance(node, nir.Threshold):
        return Threshold(broadcastable(node.threshold))
    return None


def _weighted(
    kind: Callable[..., Any], node: Node, *shape: Any, **options: Any
) -> nnx.Module:
    """Return a Linear or Conv with weights [out, in, ...] and bias of a node."""
    bias = getattr(node, "bias", None)
    # Random weights would compile once per shape.
    options |= {"kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0)}
    layer = kind(*shape, use_bias=bias is not None, **options)
    kernel = np.moveaxis(np.asarray(node.weight), (0, 1), (-1, -2))
    layer.kernel = nnx.Param(jnp.asarray(kernel, jnp.float32))
    if bias is not None:
        layer.bias = nnx.Param(jnp.asarray(np.asarray(bias), jnp.float32))
    return layer


def _read_convolution(node: Node) -> nnx.Module:
    outputs, inputs, *size = np.shape(node.weight)
    padding, groups = node.padding, int(node.groups)
    if isinstance(padding, str | bytes):  # bytes where the node comes from a file
        padding = (padding if isinstance(padding, str) else padding.decode()).upper()
    else:
        padding = tuple((p, p) for p in _numbers(padding, len(size)))
    strides, dilation = (_numbers(n, len(size)) for n in (node.stride, node.dilation))
    options = {"strides": strides, "padding": padding, "kernel_dilation": dilation}
    shape = (inputs * groups, outputs, size)
    return _weighted(nnx.Conv, node, *shape, feature_group_count=groups, **options)


def _numbers(value: npt.ArrayLike, rank: int) -> tuple[int, ...]:
    """Return one integer per axis, for a number or a sequence of them."""
    return tuple(np.broadcast_to(np.asarray(value), rank).astype(int).tolist())
