"""Convolution that is fast on a TPU.

    kernels = {"conv": tpu.Conv, "norm": fast_td_batch_norm}
    model = resnet18(10, neuron=LIF, **kernels, rngs=rngs)

XLA puts the batch of an image into the lanes of a TPU. nnx.Conv folds [B, T, H, W, C]
to [B T, H, W, C], whose layout is another one, so that copies surround it. Values and
gradients equal those of Flax; ``jax.jvp`` does not work.
"""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax import lax

SEQUENCES = ("NDHWC", "DHWIO", "NDHWC")


class Conv(nnx.Conv):
    """nnx.Conv, with the same parameters and values, faster over time on a TPU.

    Time becomes an axis of the image along which the kernel has one element:
    y[b, t, i, j] = sum over u, v of x[b, t, s i + u - p, s j + v - p] @ kernel[u, v]

    Images in one time step, masks, and paddings other than "SAME", "VALID" and pairs
    of numbers are left to nnx.Conv.
    """

    def __call__(self, xs: jax.Array) -> jax.Array:
        """Return the convolution of xs [B, T, H, W, C], or what nnx.Conv takes."""
        pads: Any = self.padding
        if (
            xs.ndim != 5
            or len(self.kernel_size) != 2
            or xs.shape[1] == 1
            or self.mask is not None
            or getattr(self, "preferred_element_type", None) is not None
            or (pads not in ("SAME", "VALID") and not _is_pairs(pads))
        ):
            return super().__call__(xs)
        bias = self.bias[...] if self.bias is not None else None
        given = (xs, self.kernel[...], bias)
        xs, kernel, bias = self.promote_dtype(given, dtype=self.dtype)
        ys = lax.conv_general_dilated(
            xs,
            kernel[None],
            (1, *_pair(self.strides)),
            pads if isinstance(pads, str) else ((0, 0), *pads),
            lhs_dilation=(1, *_pair(self.input_dilation)),
            rhs_dilation=(1, *_pair(self.kernel_dilation)),
            dimension_numbers=SEQUENCES,
            feature_group_count=self.feature_group_count,
            precision=self.precision,
        )
        return ys if bias is None else ys + bias


def _is_pairs(pads: str | int | Sequence[int | Sequence[int]]) -> bool:
    return not isinstance(pads, str | int) and all(
        isinstance(p, Sequence) for p in pads
    )


def _pair(value: int | Sequence[int] | None) -> Sequence[int]:
    return (value or 1,) * 2 if value is None or isinstance(value, int) else value
