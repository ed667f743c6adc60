"""VGG networks of convolutions, norms and neurons, over sequences [B, T, H, W, C]."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax._compat import List
from spikejax.layers import Factory, Layer
from spikejax.models.check import check_factory, check_images
from spikejax.nn.norm import td_batch_norm

POOL = 0
"""Pooling in a plan."""


class VGG(nnx.Module):
    """A stack of 3x3 convolutions with norms, neurons and pooling, then a head.

    Args:
        plan: channels of each convolution, or ``POOL``.
        num_classes: number of logits.
        hidden: widths of the fully connected layers before the logits.
        neuron: factory of the activation, such as ``LIF`` or ``lambda: nnx.relu``.
        conv, norm, in_channels, dtype, rngs: as in ``ResNet``.
        pool: nnx.max_pool, nnx.avg_pool, or a function with their arguments.

    Returns:
        logits [B, T, num_classes] for input [B, T, H, W, in_channels].

    Raises:
        ValueError: there is nothing to build, neuron is not a factory, or the images
            do not fit.

    Reference: Simonyan and Zisserman 2014, arXiv:1409.1556. Norms and the global mean
    before the head, which takes any size, are ours.
    """

    def __init__(
        self,
        plan: Sequence[int],
        num_classes: int,
        *,
        neuron: Factory,
        rngs: nnx.Rngs,
        hidden: Sequence[int] = (),
        conv: Callable[..., Layer] = nnx.Conv,
        norm: Callable[..., Layer] = td_batch_norm,
        pool: Callable[..., jax.Array] = nnx.max_pool,
        in_channels: int = 3,
        dtype: jnp.dtype = jnp.float32,
    ):
        check_factory("VGG", neuron)
        widths = [channels for channels in plan if channels != POOL]
        if not widths or num_classes < 1:
            raise ValueError(
                "VGG: expected a plan with a convolution, and at least one class, got "
                f"{plan} and {num_classes}."
            )
        self.plan, self.pool, self.in_channels = tuple(plan), pool, in_channels
        self.convs = List(
            # no bias: the norm that follows has one
            conv(a, b, (3, 3), use_bias=False, dtype=dtype, rngs=rngs)
            for a, b in zip([in_channels, *widths], widths, strict=False)
        )
        self.norms = List(norm(width, dtype=dtype, rngs=rngs) for width in widths)
        sizes = [widths[-1], *hidden, num_classes]
        self.dense = List(
            nnx.Linear(a, b, dtype=dtype, rngs=rngs)
            for a, b in zip(sizes, sizes[1:], strict=False)
        )
        self.neurons = List(neuron() for _ in [*widths, *hidden])

    def __call__(self, xs: jax.Array) -> jax.Array:
        side = 2 ** self.plan.count(POOL)
        check_images("VGG", xs, self.in_channels, side)
        neurons = iter(self.neurons)
        units = zip(self.convs, self.norms, strict=True)
        for step in self.plan:
            if step == POOL:
                xs = self.pool(xs, (2, 2), (2, 2))  # the maximum of spikes is their OR
            else:
                conv, norm = next(units)
                xs = next(neurons)(norm(conv(xs)))
        xs = xs.mean((2, 3))
        *hidden, head = self.dense
        for dense in hidden:
            xs = next(neurons)(dense(xs))
        return head(xs)


vgg11 = partial(
    VGG, (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL)
)
vgg16 = partial(
    VGG,
    (64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL)
    + (512, 512, 512, POOL),
)

# For frames of events. Both end in a global mean, where the papers flatten the last
# maps, and have no dropout: our choice, which takes frames of any size.

# Deng et al. 2022, arXiv:2202.11946, for frames 48x48.
vggsnn = partial(
    VGG,
    (64, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL),
    pool=nnx.avg_pool,
)
# Fang et al. 2021, arXiv:2007.05785, for DVS-CIFAR10, without the vote of ten neurons
# per class; its neurons are PLIF.
plif_net = partial(VGG, (128, POOL) * 4, hidden=(512,))
