"""VGG networks of convolutions, norms and neurons, over sequences [B, T, H, W, C]."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax._compat import List
from spikejax.layers import check_factory
from spikejax.nn import pooling
from spikejax.nn.convolution import convolve
from spikejax.nn.norm import td_batch_norm

POOL = 0  # stands in a plan for pooling


def max_pool(xs: jax.Array) -> jax.Array:
    """Maximum over 2x2 fields with stride 2; of spikes it is their OR."""
    return pooling.max_pool(xs, (2, 2), (2, 2))


def avg_pool(xs: jax.Array) -> jax.Array:
    """Mean over 2x2 fields with stride 2."""
    return nnx.avg_pool(xs, (2, 2), (2, 2))


class VGG(nnx.Module):
    """Convolutions 3x3, each with norm and neurons, with pooling between; then a head.

    Args:
        plan: channels of each convolution, or ``POOL``.
        num_classes: logits.
        hidden: widths of the fully connected layers before the logits.
        neuron: factory of the activation, ``neuron() -> callable``; a ReLU network is
            ``neuron=lambda: nnx.relu``.
        norm: ``norm(features, rngs=rngs)``.
        pool: function over [B, T, H, W, C].
        in_channels: channels of the input.
        dtype: of the computation; parameters stay float32.

    Returns:
        logits [B, T, num_classes] for input [B, T, H, W, in_channels].

    Reference: Simonyan and Zisserman 2014, arXiv:1409.1556; norms are added, and a
    global mean before the head takes any size.
    """

    def __init__(
        self,
        plan: Sequence[int],
        num_classes: int,
        *,
        neuron: Callable[[], Callable],
        rngs: nnx.Rngs,
        hidden: Sequence[int] = (),
        norm: Callable = td_batch_norm,
        pool: Callable = max_pool,
        in_channels: int = 3,
        dtype: jnp.dtype = jnp.float32,
    ):
        check_factory("VGG", neuron)
        self.plan = tuple(plan)
        self.pool = pool
        widths = [step for step in plan if step != POOL]
        inputs = [in_channels, *widths[:-1]]
        conv = partial(nnx.Conv, conv_general_dilated=convolve)
        self.convs = List(
            conv(a, b, (3, 3), use_bias=False, dtype=dtype, rngs=rngs)
            for a, b in zip(inputs, widths, strict=True)
        )
        self.norms = List(norm(width, rngs=rngs) for width in widths)
        inputs = [widths[-1], *hidden]
        self.dense = List(
            nnx.Linear(a, b, dtype=dtype, rngs=rngs)
            for a, b in zip(inputs, [*hidden, num_classes], strict=True)
        )
        self.neurons = List(neuron() for _ in [*widths, *hidden])

    def __call__(self, xs: jax.Array) -> jax.Array:
        units = zip(self.convs, self.norms, self.neurons, strict=False)
        for step in self.plan:
            if step == POOL:
                xs = self.pool(xs)
            else:
                conv, norm, neuron = next(units)
                xs = neuron(norm(conv(xs)))
        xs = xs.mean((2, 3))
        *hidden, head = self.dense
        for dense, neuron in zip(hidden, self.neurons[len(self.convs) :], strict=True):
            xs = neuron(dense(xs))
        return head(xs)


vgg11 = partial(
    VGG, (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL)
)
vgg16 = partial(
    VGG,
    (64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL)
    + (512, 512, 512, POOL),
)

# For frames of events. Both end in a global mean where the papers flatten the last
# maps, and have no dropout: our choice, so that any size of frame will do.

# Deng et al. 2022, arXiv:2202.11946, for frames 48x48.
vggsnn = partial(
    VGG,
    (64, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL),
    pool=avg_pool,
)
# Fang et al. 2021, arXiv:2007.05785, for DVS-CIFAR10, without the vote of ten neurons a
# class; its neurons are PLIF.
plif_net = partial(VGG, (128, POOL) * 4, hidden=(512,))
