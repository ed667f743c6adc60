"""Residual networks over sequences [B, T, H, W, C], for CIFAR and for ImageNet.

The function ``residual`` places the neurons: ``plain``, ``sew`` or ``ms``. The factory
``neuron`` makes them: a ReLU network is the same code.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax._compat import List
from spikejax.layers import Factory, Layer
from spikejax.models.check import check_factory, check_images
from spikejax.nn.norm import td_batch_norm

Residual = Callable[["Block", jax.Array], jax.Array]


def plain(block: "Block", xs: jax.Array) -> jax.Array:
    """Return neuron(f(x) + shortcut(x)), with neurons between f's convolutions too.

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
    """Return f(x) + shortcut(x), a sum of spikes: neurons after each convolution.

    Reference: spike-element-wise residual (ADD), Fang et al. 2021, arXiv:2102.04159.
    """
    ys = xs
    for conv, norm, neuron in block.units:
        ys = neuron(norm(conv(ys)))
    return ys + block.shortcut(xs)


def ms(block: "Block", xs: jax.Array) -> jax.Array:
    """Return f(x) + shortcut(x), a sum of currents: neurons before each convolution.

    No neuron follows the sum, so the shortcut is an identity through the network.

    Reference: membrane shortcut, Hu et al. 2021, arXiv:2112.08954.
    """
    ys = xs
    for conv, norm, neuron in block.units:
        ys = norm(conv(neuron(ys)))
    return ys + block.shortcut(xs)


# Start of the scale of the norm before the sum, in thresholds. Two summands of plain
# have half the variance each; an ms block starts as the identity.
LAST_SCALE: dict[Residual, float] = {plain: 2**-0.5, sew: 1.0, ms: 0.0}


def _conv(
    make: Callable[..., Layer], inputs: int, outputs: int, size: int, stride: int
) -> Layer:
    pad = size // 2  # as in the reference code: symmetric, unlike SAME with a stride
    return make(
        inputs,
        outputs,
        (size, size),
        (stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=False,  # a norm with a bias of its own follows
        kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
    )


class Block(nnx.Module):
    """A residual block: convolutions with norms and neurons, and a shortcut.

    Args:
        inputs, width, stride: channels of the input and inside, stride of the block.
        bottleneck: 1x1, 3x3, 1x1 to four times the width, else two 3x3.
        residual, neuron, conv, norm: as in ``ResNet``, with dtype and rngs bound.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int,
        *,
        bottleneck: bool,
        residual: Residual,
        neuron: Factory,
        conv: Callable[..., Layer],
        norm: Callable[..., Layer],
    ):
        last = LAST_SCALE[residual]
        # (channels, kernel size, stride, alpha of the norm); the 3x3 one strides, as in
        # torchvision
        layers = [(width, 3, stride, 1.0), (width, 3, 1, last)]
        if bottleneck:
            layers = [(width, 1, 1, 1.0), (width, 3, stride, 1.0)]
            layers += [(4 * width, 1, 1, last)]
        self.residual = residual
        widths = [inputs, *(outputs for outputs, *_ in layers)]
        # All convolutions first: each layer takes the next keys of rngs.
        self.convs = List(
            _conv(conv, before, *layer[:3])
            for before, layer in zip(widths, layers, strict=False)
        )
        self.norms = List(norm(width, alpha=alpha) for width, _, _, alpha in layers)
        self.neurons = List(neuron() for _ in layers)
        self.projects = stride != 1 or inputs != widths[-1]
        if self.projects:
            self.shortcut_conv = _conv(conv, inputs, widths[-1], 1, stride)
            self.shortcut_norm = norm(widths[-1], alpha=last or 1.0)
            if residual is sew:  # both summands are spikes
                self.shortcut_neuron = neuron()

    @property
    def units(self) -> list[tuple[Layer, Layer, Layer]]:
        """(convolution, norm, neurons) of f, in order."""
        return list(zip(self.convs, self.norms, self.neurons, strict=True))

    def shortcut(self, xs: jax.Array) -> jax.Array:
        """Return xs, or where f changes its shape a 1x1 convolution of it with norm."""
        if not self.projects:
            return xs
        xs = self.shortcut_norm(self.shortcut_conv(xs))
        return self.shortcut_neuron(xs) if self.residual is sew else xs

    def __call__(self, xs: jax.Array) -> jax.Array:
        return self.residual(self, xs)


class ResNet(nnx.Module):
    """A residual network: stem, stages of blocks, global mean, head.

    Args:
        depths, widths: blocks and channels per stage.
        num_classes: number of logits.
        neuron: factory of the activation, such as ``LIF`` or ``lambda: nnx.relu``.
        residual: plain, sew or ms.
        bottleneck: blocks of 1x1, 3x3, 1x1.
        imagenet_stem: 7x7 convolution with stride 2 and max-pooling, else 3x3.
        stem_width: channels after the stem, the first stage's by default.
        hidden: width of a fully connected layer of neurons before the logits, or 0.
        width: factor on all channels but the logits, > 0.
        conv: factory of convolutions, with the arguments of nnx.Conv.
        norm: factory of norms, with the arguments of td_batch_norm.
        pool: max-pooling, with the arguments of nnx.max_pool.
        in_channels: channels of the input.
        dtype: of the computation; parameters stay float32.
        remat: keep only the input of each block, and recompute the block for the
            gradient: 0.6 of the memory, a quarter more time (docs/speed.md).
        rngs: source of the weights.

    Returns:
        logits [B, T, num_classes] for input [B, T, H, W, in_channels].

    Raises:
        ValueError: the stages or residual are not possible, neuron is not a factory, or
            the images do not fit.

    Reference: He et al. 2015, arXiv:1512.03385.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
        *,
        neuron: Factory,
        rngs: nnx.Rngs,
        residual: Residual = ms,
        bottleneck: bool = False,
        imagenet_stem: bool = False,
        stem_width: int | None = None,
        hidden: int = 0,
        width: float = 1.0,
        conv: Callable[..., Layer] = nnx.Conv,
        norm: Callable[..., Layer] = td_batch_norm,
        pool: Callable[..., jax.Array] = nnx.max_pool,
        in_channels: int = 3,
        dtype: jnp.dtype = jnp.float32,
        remat: bool = False,
    ):
        def scaled(channels: int) -> int:
            return max(1, round(width * channels))

        check_factory("ResNet", neuron)
        stages = len(depths), len(widths)
        if residual not in LAST_SCALE or not width > 0 or min(stages) != max(stages):
            raise ValueError(
                "ResNet: expected residual=resnet.plain, sew or ms, width > 0, and a "
                "width for each depth, got "
                f"{getattr(residual, '__name__', residual)}, {width}, {depths} and "
                f"{widths}."
            )
        self.residual, self.in_channels = residual, in_channels
        self.imagenet_stem = imagenet_stem
        self.pool = pool
        self.remat = remat
        options = {"dtype": dtype, "rngs": rngs}
        conv, norm = partial(conv, **options), partial(norm, **options)
        channels = scaled(stem_width or widths[0])
        size, stride = (7, 2) if imagenet_stem else (3, 1)
        self.stem_conv = _conv(conv, in_channels, channels, size, stride)
        self.stem_norm = norm(channels)
        self.stage_neuron = neuron()  # after the stem; for ms before the global mean
        parts = {"bottleneck": bottleneck, "residual": residual, "neuron": neuron}
        make = partial(Block, **parts, conv=conv, norm=norm)
        self.blocks = List([])
        for stage, (depth, inside) in enumerate(zip(depths, widths, strict=True)):
            for k in range(depth):
                stride = 2 if stage and not k else 1
                self.blocks.append(make(channels, scaled(inside), stride))
                channels = scaled(inside) * (4 if bottleneck else 1)
        self.has_hidden = bool(hidden)
        if hidden:
            self.hidden = nnx.Linear(channels, scaled(hidden), **options)
            self.hidden_neuron = neuron()
            channels = scaled(hidden)
        self.head = nnx.Linear(channels, num_classes, **options)

    def __call__(self, xs: jax.Array) -> jax.Array:
        check_images("ResNet", xs, self.in_channels)
        xs = self.stem_norm(self.stem_conv(xs))
        if self.residual is not ms:
            xs = self.stage_neuron(xs)
        if self.imagenet_stem:
            # Time is an axis of the window: nnx.max_pool pads one batch axis only.
            xs = self.pool(xs, (1, 3, 3), (1, 2, 2), ((0, 0), (1, 1), (1, 1)))
        run = nnx.remat(Block.__call__) if self.remat else Block.__call__
        for block in self.blocks:
            xs = run(block, xs)
        if self.residual is ms:
            xs = self.stage_neuron(xs)
        xs = xs.mean((2, 3))
        if self.has_hidden:
            xs = self.hidden_neuron(self.hidden(xs))
        return self.head(xs)


WIDTHS = (64, 128, 256, 512)
cifar_resnet18 = partial(ResNet, (2, 2, 2, 2), WIDTHS)
# Zheng et al. 2021, arXiv:2011.05280.
resnet19 = partial(ResNet, (3, 3, 2), (128, 256, 512), stem_width=64, hidden=256)
resnet20 = partial(ResNet, (3, 3, 3), (16, 32, 64))

# Those of torchvision, with as many parameters.
resnet18 = partial(ResNet, (2, 2, 2, 2), WIDTHS, imagenet_stem=True)
resnet34 = partial(ResNet, (3, 4, 6, 3), WIDTHS, imagenet_stem=True)
resnet50 = partial(resnet34, bottleneck=True)
resnet101 = partial(ResNet, (3, 4, 23, 3), WIDTHS, imagenet_stem=True, bottleneck=True)
resnet152 = partial(ResNet, (3, 8, 36, 3), WIDTHS, imagenet_stem=True, bottleneck=True)
