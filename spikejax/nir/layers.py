"""Layers without time as nodes of NIR, which is channels-first, and back."""

from typing import Any

import jax
import jax.numpy as jnp
import nir
import numpy as np
from flax import nnx

from spikejax.nodes import Flatten, Pool, Scale, Threshold


def linear(
    path: str,
    layer: nnx.Linear,
    shape: tuple[int, ...],
    unflat: tuple[int, ...] | None,
    factor: float,
) -> Any:
    """Linear or Affine node: y = W x + b.

    Args:
        path: names the layer in errors.
        shape: of the input.
        unflat: [H, W, C] of the image that was flattened to it, or None.
        factor: of the input, which moves into W.
    """
    if len(shape) != 1:
        raise ValueError(
            f"to_nir: expected a vector before the linear layer {path!r}, got {shape}. "
            "For an image, take a convolution with a kernel of (1, 1)."
        )
    kernel = np.asarray(layer.kernel[...], np.float32) * np.float32(factor)
    if unflat is not None:
        kernel = np.moveaxis(kernel.reshape(*unflat, -1), -2, 0)
    weight = np.ascontiguousarray(kernel.reshape(-1, kernel.shape[-1]).T)
    if layer.bias is None:
        return nir.Linear(weight=weight)
    return nir.Affine(weight=weight, bias=np.asarray(layer.bias[...], np.float32))


def convolution(
    path: str, layer: nnx.Conv, shape: tuple[int, ...], factor: float
) -> Any:
    """Conv1d or Conv2d node; kernels [H, W, in, out] become [out, in, H, W].

    Args:
        path: names the layer in errors.
        shape: [H, W, C] or [L, C] of the input.
        factor: of the input, which moves into the kernel.
    """
    sizes, rank = tuple(layer.kernel_size), len(layer.kernel_size)
    strides = _numbers(layer.strides, rank)
    dilation = _numbers(layer.kernel_dilation, rank)
    padding = _padding(layer.padding, shape[:-1], sizes, strides, dilation)
    if (
        rank not in (1, 2)
        or layer.feature_group_count != 1
        or _numbers(layer.input_dilation, rank) != (1,) * rank
        or padding is None
        or len(set(sizes)) > 1
    ):
        raise ValueError(
            f"to_nir: expected a convolution over 1 or 2 axes at {path!r}, with a "
            "square kernel, the same zero padding on both sides, and one group, got "
            f"kernel {sizes}, padding {layer.padding}, strides {strides}, "
            f"{layer.feature_group_count} groups. NIR 1.0 has no other."
        )
    kernel = np.asarray(layer.kernel[...], np.float32) * np.float32(factor)
    weight = np.ascontiguousarray(np.moveaxis(kernel, (-1, -2), (0, 1)))
    bias = np.zeros(weight.shape[0], np.float32)
    if layer.bias is not None:
        bias = np.asarray(layer.bias[...], np.float32)
    numbers: Any = (tuple(shape[:-1]), strides, padding, dilation)
    kind: Any = nir.Conv2d
    if rank == 1:
        kind, numbers = nir.Conv1d, tuple(n[0] for n in numbers)
    size, stride, pad, reach = numbers
    return kind(size, weight, stride, pad, reach, 1, bias)


def _numbers(given, rank):
    if given is None or isinstance(given, int | np.integer):
        given = (1 if given is None else given,) * rank
    return tuple(int(n) for n in given)


def _padding(given, shape, sizes, strides, dilation):
    """Zeros on each side of each axis, or None where sides differ or it is no zeros."""
    if isinstance(given, str):
        if given not in ("SAME", "VALID"):
            return None
        reach = [(k - 1) * d + 1 for k, d in zip(sizes, dilation, strict=True)]
        given = jax.lax.padtype_to_pads(shape, reach, strides, given)
    if isinstance(given, int):
        given = (given,) * len(sizes)
    pairs = [(p, p) if isinstance(p, int) else tuple(p) for p in given]
    return tuple(a for a, _ in pairs) if all(a == b for a, b in pairs) else None


def broadcastable(value: Any) -> Any:
    """An array of NIR, channels-first, as one that broadcasts with [B, T, ..., C].

    A number where all its entries are equal.
    """
    array = np.asarray(value, np.float64)
    if array.size and (array == array.flat[0]).all():
        return float(array.flat[0])
    return np.moveaxis(array, 0, -1)


def read_layer(name: str, node: Any) -> nnx.Module | None:
    """The layer that a node without time stands for; None for other nodes."""
    if isinstance(node, nir.Affine | nir.Linear):
        return _read_linear(name, node)
    if isinstance(node, nir.Conv1d | nir.Conv2d):
        return _read_convolution(node)
    if isinstance(node, nir.SumPool2d | nir.AvgPool2d):
        mean = isinstance(node, nir.AvgPool2d)
        size, stride, padding = (
            _numbers(np.asarray(n).tolist(), 2)
            for n in (node.kernel_size, node.stride, node.padding)
        )
        return Pool(size, stride, padding, mean=mean)
    if isinstance(node, nir.Flatten):
        shape = (node.input_type or {}).get("input")
        last = -1 if shape is None else len(shape) - 1
        if int(node.start_dim) != 0 or int(node.end_dim) not in (-1, last):
            raise ValueError(
                f"from_nir: expected {name!r} to flatten all axes, got axes "
                f"{node.start_dim} to {node.end_dim}."
            )
        return Flatten()
    if isinstance(node, nir.Scale):
        return Scale(broadcastable(node.scale))
    if isinstance(node, nir.Threshold):
        return Threshold(broadcastable(node.threshold))
    return None


def _unset() -> dict[str, Any]:
    """For a layer whose weights come next; random ones would compile for each shape."""
    return {"kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0)}


def _read_linear(name, node):
    weight = np.asarray(node.weight)
    if weight.ndim != 2:
        raise ValueError(
            f"from_nir: expected a matrix of weights in {name!r}, got {weight.shape}."
        )
    bias = np.asarray(node.bias) if isinstance(node, nir.Affine) else None
    layer = nnx.Linear(
        weight.shape[1], weight.shape[0], use_bias=bias is not None, **_unset()
    )
    layer.kernel = nnx.Param(jnp.asarray(weight.T, jnp.float32))
    if bias is not None:
        layer.bias = nnx.Param(jnp.asarray(bias, jnp.float32))
    return layer


def _read_convolution(node):
    weight = np.asarray(node.weight)
    rank = weight.ndim - 2
    padding = node.padding
    if isinstance(padding, str | bytes):
        padding = (padding if isinstance(padding, str) else padding.decode()).upper()
    else:
        padding = tuple((p, p) for p in _numbers(np.asarray(padding).tolist(), rank))
    groups = int(node.groups)
    layer = nnx.Conv(
        weight.shape[1] * groups,
        weight.shape[0],
        weight.shape[2:],
        strides=_numbers(np.asarray(node.stride).tolist(), rank),
        padding=padding,
        kernel_dilation=_numbers(np.asarray(node.dilation).tolist(), rank),
        feature_group_count=groups,
        **_unset(),
    )
    kernel = np.moveaxis(weight, (0, 1), (-1, -2))
    layer.kernel = nnx.Param(jnp.asarray(kernel, jnp.float32))
    layer.bias = nnx.Param(jnp.asarray(np.asarray(node.bias), jnp.float32))
    return layer
