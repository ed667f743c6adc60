"""Residual networks over sequences [B, T, H, W, C], for CIFAR and for ImageNet.

Where the neurons stand is a function, ``residual``: ``plain``, ``sew`` or ``ms``. What
a neuron is, is the factory ``neuron``: a ReLU network is the same code.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax._compat import List
from spikejax.layers import check_factory
from spikejax.nn.convolution import convolve
from spikejax.nn.norm import td_batch_norm
from spikejax.nn.pooling import max_pool


def plain(block: "Block", xs: jax.Array) -> jax.Array:
    """n(f(x) + shortcut(x)), neurons between the convolutions and after the sum.

    Reference: He et al. 2015, arXiv:1512.03385; spiking: Zheng et al. 2021,
    arXiv:2011.05280.
    """
    *inner, last = block.units
    ys = xs
    for conv, norm, neuron in inner:
        ys = neuron(norm(conv(ys)))
    conv, norm, neuron = last
    return neuron(norm(conv(ys)) + block.shortcut(xs))


def sew(block: "Block", xs: jax.Array) -> jax.Array:
    """f(x) + shortcut(x), both of them spikes: neurons after each convolution.

    Reference: spike-element-wise residual (ADD), Fang et al. 2021, arXiv:2102.04159.
    """
    ys = xs
    for conv, norm, neuron in block.units:
        ys = neuron(norm(conv(ys)))
    return ys + block.shortcut(xs)


def ms(block: "Block", xs: jax.Array) -> jax.Array:
    """f(x) + shortcut(x), a sum of membrane inputs: neurons before each convolution.

    Nothing follows the sum, so the shortcut runs undisturbed through the network.

    Reference: membrane shortcut, Hu et al. 2021, arXiv:2112.08954.
    """
    ys = xs
    for conv, norm, neuron in block.units:
        ys = norm(conv(neuron(ys)))
    return ys + block.shortcut(xs)


LAST_SCALE = {plain: 2**-0.5, sew: 1.0, ms: 0.0}  # of the norm before the sum


def _conv(inputs, outputs, size, stride, dtype, rngs):
    pad = size // 2  # as in the reference code: symmetric, unlike SAME with a stride
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        (stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=False,
        conv_general_dilated=convolve,
        kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
        dtype=dtype,
        rngs=rngs,
    )


class Block(nnx.Module):
    """One residual block: convolutions with norms and neurons, and a shortcut.

    Args:
        inputs, width, stride: channels in, channels inside, stride of the block.
        bottleneck: 1x1, 3x3, 1x1 to four times the width, else two 3x3.
        residual: plain, sew or ms.
        neuron, norm, dtype: as in ResNet.
    """

    def __init__(
        self, inputs, width, stride, *, bottleneck, residual, neuron, norm, dtype, rngs
    ):
        outputs = 4 * width if bottleneck else width
        sizes, widths, strides = (3, 3), (width, width), (stride, 1)
        if bottleneck:
            sizes, widths, strides = (1, 3, 1), (width, width, outputs), (1, stride, 1)
        self.residual = residual
        self.convs = List(
            _conv(a, b, size, s, dtype, rngs)
            for a, b, size, s in zip(
                (inputs, *widths[:-1]), widths, sizes, strides, strict=True
            )
        )
        last = len(widths) - 1
        self.norms = List(
            norm(w, alpha=LAST_SCALE[residual] if k == last else 1.0, rngs=rngs)
            for k, w in enumerate(widths)
        )
        self.neurons = List(neuron() for _ in widths)
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            alpha = LAST_SCALE[residual] or 1.0
            self.shortcut_conv = _conv(inputs, outputs, 1, stride, dtype, rngs)
            self.shortcut_norm = norm(outputs, alpha=alpha, rngs=rngs)
            if residual is sew:
                self.shortcut_neuron = neuron()

    @property
    def units(self) -> list[tuple[nnx.Module, nnx.Module, Callable]]:
        """(convolution, norm, neurons) of f, in order."""
        return list(zip(self.convs, self.norms, self.neurons, strict=True))

    def shortcut(self, xs: jax.Array) -> jax.Array:
        """The identity, or convolution 1x1 and norm (and neurons for sew) to fit f."""
        if not self.projects:
            return xs
        xs = self.shortcut_norm(self.shortcut_conv(xs))
        return self.shortcut_neuron(xs) if self.residual is sew else xs

    def __call__(self, xs: jax.Array) -> jax.Array:
        return self.residual(self, xs)


def _run(block, xs):
    return block(xs)


class ResNet(nnx.Module):
    """Residual network: stem, stages of blocks, global mean, head.

    Args:
        depths: blocks in each stage.
        widths: channels of each stage.
        num_classes: logits.
        neuron: factory of the activation, ``neuron() -> callable``; a ReLU network is
            ``neuron=lambda: nnx.relu``.
        residual: plain, sew or ms.
        bottleneck: blocks of 1x1, 3x3, 1x1.
        imagenet_stem: 7x7 convolution with stride 2 and max-pooling, else 3x3.
        stem_width: channels after the stem, the first stage's by default.
        hidden: width of a fully connected layer of neurons before the logits, or 0.
        norm: ``norm(features, alpha=..., rngs=rngs)``.
        in_channels: channels of the input.
        dtype: of the computation; parameters stay float32.
        remat: keep the input of each block alone and compute the rest of it again for
            the gradient: less memory, a third more work.

    Returns:
        logits [B, T, num_classes] for input [B, T, H, W, in_channels].

    Reference: He et al. 2015, arXiv:1512.03385.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
        *,
        neuron: Callable[[], Callable],
        rngs: nnx.Rngs,
        residual: Callable = ms,
        bottleneck: bool = False,
        imagenet_stem: bool = False,
        stem_width: int | None = None,
        hidden: int = 0,
        norm: Callable = td_batch_norm,
        in_channels: int = 3,
        dtype: jnp.dtype = jnp.float32,
        remat: bool = False,
    ):
        check_factory("ResNet", neuron)
        self.residual = residual
        self.imagenet_stem = imagenet_stem
        self.remat = remat
        stem = stem_width or widths[0]
        size, stride = (7, 2) if imagenet_stem else (3, 1)
        self.stem_conv = _conv(in_channels, stem, size, stride, dtype, rngs)
        self.stem_norm = norm(stem, rngs=rngs)
        self.stage_neuron = neuron()  # after the stem; for ms before the global mean
        make = partial(
            Block,
            bottleneck=bottleneck,
            residual=residual,
            neuron=neuron,
            norm=norm,
            dtype=dtype,
            rngs=rngs,
        )
        blocks, inputs = [], stem
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            for k in range(depth):
                blocks.append(make(inputs, width, 2 if stage and not k else 1))
                inputs = 4 * width if bottleneck else width
        self.blocks = List(blocks)
        if hidden:
            self.hidden = nnx.Linear(inputs, hidden, dtype=dtype, rngs=rngs)
            self.hidden_neuron = neuron()
        self.has_hidden = bool(hidden)
        self.head = nnx.Linear(hidden or inputs, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, xs: jax.Array) -> jax.Array:
        xs = self.stem_norm(self.stem_conv(xs))
        if self.residual is not ms:
            xs = self.stage_neuron(xs)
        if self.imagenet_stem:
            xs = max_pool(xs, (3, 3), (2, 2), ((1, 1), (1, 1)))
        run = nnx.remat(_run) if self.remat else _run
        for block in self.blocks:
            xs = run(block, xs)
        if self.residual is ms:
            xs = self.stage_neuron(xs)
        xs = xs.mean((2, 3))
        if self.has_hidden:
            xs = self.hidden_neuron(self.hidden(xs))
        return self.head(xs)


def scaled(network: Any, width: float) -> partial:
    """One of the networks below with ``width`` times the channels, rounded."""
    depths, widths = network.args
    widths = tuple(max(1, round(width * w)) for w in widths)
    extra = {
        name: max(1, round(width * network.keywords[name]))
        for name in ("stem_width", "hidden")
        if name in network.keywords
    }
    return partial(network.func, depths, widths, **network.keywords | extra)


WIDTHS = (64, 128, 256, 512)
cifar_resnet18 = partial(ResNet, (2, 2, 2, 2), WIDTHS)
resnet19 = partial(ResNet, (3, 3, 2), (128, 256, 512), stem_width=64, hidden=256)
resnet20 = partial(ResNet, (3, 3, 3), (16, 32, 64))

resnet18 = partial(ResNet, (2, 2, 2, 2), WIDTHS, imagenet_stem=True)
resnet34 = partial(ResNet, (3, 4, 6, 3), WIDTHS, imagenet_stem=True)
resnet50 = partial(resnet34, bottleneck=True)
resnet101 = partial(ResNet, (3, 4, 23, 3), WIDTHS, imagenet_stem=True, bottleneck=True)
resnet152 = partial(ResNet, (3, 8, 36, 3), WIDTHS, imagenet_stem=True, bottleneck=True)
