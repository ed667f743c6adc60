"""EfficientNet-lite0 to lite4 over sequences [B, T, H, W, C]: no squeezing, no swish.

Depthwise convolutions between narrow 1x1 ones, whose outputs no neuron follows: they
are sums of weighted spikes, and so is the shortcut.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax._compat import List
from spikejax.layers import Factory, Layer
from spikejax.models.check import check_factory, check_images
from spikejax.nn.norm import td_batch_norm

STEM, HEAD = 32, 1280  # channels, whatever the width
# Repeats, kernel size, stride, factor of the inner channels, channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class Block(nnx.Module):
    """An inverted residual: a 1x1 convolution widens, a depthwise one, 1x1 narrows.

    Args:
        inputs, outputs: channels.
        factor: of the channels inside; 1 has no convolution that widens.
        size, stride: of the depthwise convolution.
        neuron, conv, norm: as in ``EfficientNet``, with dtype and rngs bound.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        factor: int,
        size: int,
        stride: int,
        *,
        neuron: Factory,
        conv: Callable[..., Layer],
        norm: Callable[..., Layer],
    ):
        inner = factor * inputs
        layers = [(inputs, inner, 1, 1, 1)] if factor > 1 else []
        layers += [(inner, inner, size, stride, inner), (inner, outputs, 1, 1, 1)]
        self.convs = List(_conv(conv, *layer) for layer in layers)
        self.norms = List(norm(layer[1]) for layer in layers)
        self.neurons = List(neuron() for _ in layers[:-1])
        self.adds = stride == 1 and inputs == outputs

    def __call__(self, xs: jax.Array) -> jax.Array:
        ys = xs
        for k, neuron in enumerate(self.neurons):
            ys = neuron(self.norms[k](self.convs[k](ys)))
        ys = self.norms[-1](self.convs[-1](ys))
        return xs + ys if self.adds else ys


class EfficientNet(nnx.Module):
    """EfficientNet-lite: stem, stages of inverted residuals, head, global mean, logits.

    Args:
        width, depth: factors on the channels and the blocks of the stages, > 0.
        num_classes: number of logits.
        neuron: factory of the activation; the published one is ``lambda: nnx.relu6``.
        conv: factory of convolutions, with the arguments of nnx.Conv.
        norm: factory of norms, with the arguments of td_batch_norm.
        in_channels: channels of the input.
        dtype: of the computation; parameters stay float32.
        rngs: source of the weights.

    Returns:
        logits [B, T, num_classes] for input [B, T, H, W, in_channels].

    Raises:
        ValueError: a factor is not positive, neuron is not a factory, or the images do
            not fit.

    Reference: Tan and Le 2019, arXiv:1905.11946; lite is TensorFlow's
    models/official/efficientnet/lite. Dropout and drop connect, which act in training
    only, are left out.
    """

    def __init__(
        self,
        width: float,
        depth: float,
        num_classes: int,
        *,
        neuron: Factory,
        rngs: nnx.Rngs,
        conv: Callable[..., Layer] = nnx.Conv,
        norm: Callable[..., Layer] = td_batch_norm,
        in_channels: int = 3,
        dtype: jnp.dtype = jnp.float32,
    ):
        check_factory("EfficientNet", neuron)
        if not min(width, depth) > 0:
            raise ValueError(
                "EfficientNet: expected width > 0 and depth > 0, got "
                f"{width} and {depth}."
            )
        self.in_channels = in_channels
        options = {"dtype": dtype, "rngs": rngs}
        conv, norm = partial(conv, **options), partial(norm, epsilon=1e-3, **options)
        self.stem_conv = _conv(conv, in_channels, STEM, 3, 2, 1)
        self.stem_norm, self.stem_neuron = norm(STEM), neuron()
        make = partial(Block, neuron=neuron, conv=conv, norm=norm)
        self.blocks, inputs = List([]), STEM
        for stage, (repeats, size, stride, factor, channels) in enumerate(STAGES):
            inside = 0 < stage < len(STAGES) - 1  # the first and the last stay as deep
            repeats = math.ceil(depth * repeats) if inside else repeats
            outputs = _round(width * channels)
            for k in range(repeats):
                at = 1 if k else stride
                self.blocks.append(make(inputs, outputs, factor, size, at))
                inputs = outputs
        self.head_conv = _conv(conv, inputs, HEAD, 1, 1, 1)
        self.head_norm, self.head_neuron = norm(HEAD), neuron()
        self.head = nnx.Linear(HEAD, num_classes, **options)

    def __call__(self, xs: jax.Array) -> jax.Array:
        check_images("EfficientNet", xs, self.in_channels)
        xs = self.stem_neuron(self.stem_norm(self.stem_conv(xs)))
        for block in self.blocks:
            xs = block(xs)
        xs = self.head_neuron(self.head_norm(self.head_conv(xs)))
        return self.head(xs.mean((2, 3)))


def _conv(
    make: Callable[..., Layer],
    inputs: int,
    outputs: int,
    size: int,
    stride: int,
    groups: int,
) -> Layer:
    return make(
        inputs,
        outputs,
        (size, size),
        (stride, stride),
        padding="SAME",  # with a stride it depends on the size, as in TensorFlow
        feature_group_count=groups,
        use_bias=False,  # a norm with a bias of its own follows
        kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
    )


def _round(channels: float) -> int:
    """Return the nearest multiple of 8, not more than a tenth below."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


# Google's lite0 to lite4, for images of 224, 240, 260, 280 and 300 pixels.
FACTORS = (1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8)
LITE = lite0, lite1, lite2, lite3, lite4 = [partial(EfficientNet, *f) for f in FACTORS]
