"""General SNN: windows of a map that see each other within one time step.

Reference: Training a General SNN with Improved Efficiency and Minimum Latency, 2024,
arXiv:2401.10843, after the authors' code; docs/general.md lists what is ours.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax._compat import List
from spikejax.layers import Factory, Layer, Neuron
from spikejax.models.check import check_factory, check_images
from spikejax.neurons import State
from spikejax.nn.windowed import (
    Binarise,
    Mixer,
    Network,
    Window,
    bernoulli,
    conv_network,
    general_lif,
    lstm_network,
    mean,
    overlap,
    tile,
    whole,
)

REGION = 0.2  # the authors' threshold for the means of several windows

# The authors' start of every linear layer but the head.
_start = nnx.initializers.xavier_uniform()


class Block(nnx.Module):
    """A residual block: x <- x + mixer(x),  x <- x + MLP(x), with real values."""

    def __init__(self, mixer: Mixer, channels: int, linear: Callable[..., Layer]):
        self.mixer = mixer
        self.widen = linear(channels, 3 * channels)
        self.narrow = linear(3 * channels, channels)

    def __call__(self, xs: jax.Array, carried: State) -> tuple[jax.Array, State]:
        """Return the map and the membranes for the next block."""
        mixed, carried = self.mixer(xs, carried)
        xs = xs + mixed
        # The authors' GELU is PyTorch's, which is exact; Flax approximates by default.
        hidden = nnx.gelu(self.widen(xs), approximate=False)
        return xs + self.narrow(hidden), carried


class PatchMerging(nnx.Module):
    """A linear map of 2x2 pixels without bias: half the sides, twice the channels."""

    def __init__(self, channels: int, linear: Callable[..., Layer]):
        self.linear = linear(4 * channels, 2 * channels, use_bias=False)

    def __call__(self, xs: jax.Array) -> jax.Array:
        """Return [..., H/2, W/2, 2 C] for a map [..., H, W, C]."""
        # Columns first: the order of Swin Transformer, which the authors follow.
        pixels = [xs[..., i::2, j::2, :] for j in (0, 1) for i in (0, 1)]
        return self.linear(jnp.concatenate(pixels, -1))


class General(nnx.Module):
    """A stem 2x2, stages of blocks with patch merging in between, global mean, head.

    Blocks of a stage take the two windows in turn; the last stage takes the first only.
    Membranes that a network carries from block to block are merged between stages too,
    by weights of their own.

    Args:
        num_classes: number of logits.
        network: factory of what runs over the windows: conv_network, lstm_network, or
            a partial of them.
        neuron: factory of the spiking cell. With one that makes no spikejax neuron, as
            ``lambda: nnx.relu``, nothing is binarised, and no region threshold acts.
        conv: factory of the stem's convolution, with the arguments of nnx.Conv.
        linear: factory of the linear layers, with the arguments of nnx.Linear.
        windows: of the blocks in turn.
        region_threshold: in the blocks of the second window; None for no threshold.
        binarise, rngs: as in ``Mixer``.
        width: factor on the channels 48, 96, 192 and 384.
        depths: blocks per stage.
        in_channels: channels of the input.

    Returns:
        logits [B, T, num_classes] for input [B, T, H, W, in_channels], H and W
        multiples of 32. Time steps do not see each other, except in ``plain``.

    Raises:
        ValueError: the width leaves no channels, or the sides do not fit.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        network: Callable[..., Network] = conv_network,
        neuron: Factory = general_lif,
        conv: Callable[..., Layer] = nnx.Conv,
        linear: Callable[..., Layer] = nnx.Linear,
        windows: tuple[Window, Window] = (tile, overlap),
        region_threshold: float | None = None,
        binarise: Binarise = bernoulli,
        width: float = 1.0,
        depths: Sequence[int] = (2, 2, 6, 2),
        in_channels: int = 3,
        rngs: nnx.Rngs,
    ):
        if not width * 48 >= 1:
            raise ValueError(
                f"General: expected a width that leaves channels, got {width}. 1 is "
                "the paper's; 0.25 trains on a CPU."
            )
        check_factory("General", neuron)
        spiking = isinstance(neuron(), Neuron)
        linear = partial(linear, kernel_init=_start, rngs=rngs)
        self.in_channels, channels = in_channels, round(48 * width)
        self.stem = conv(in_channels, channels, (2, 2), (2, 2), rngs=rngs)

        def block(second: bool) -> Block:
            mixer = Mixer(
                channels,
                network(channels, neuron, rngs=rngs),
                window=windows[second],
                binarise=binarise if spiking else None,
                region_threshold=region_threshold if spiking and second else None,
                rngs=rngs,
            )
            return Block(mixer, channels, linear)

        stages, merges, carried_merges = [], [], []
        for depth in depths:
            if stages:
                merges.append(PatchMerging(channels, linear))
                inner = stages[-1][0].mixer.network
                if inner.carries:
                    carried_merges.append(PatchMerging(inner.features, linear))
                channels *= 2
            # The last maps of a 32x32 image are 2x2: windows could not overlap there.
            last = len(stages) == len(depths) - 1
            stages.append(List(block(k % 2 == 1 and not last) for k in range(depth)))
        self.stages, self.merges = List(stages), List(merges)
        self.carried_merges = List(carried_merges)
        zeros = nnx.initializers.zeros_init()  # the first loss is log(num_classes)
        self.head = nnx.Linear(channels, num_classes, kernel_init=zeros, rngs=rngs)

    def __call__(self, xs: jax.Array) -> jax.Array:
        check_images("General", xs, self.in_channels)
        factor = 2 * 2 ** len(self.stages)  # stem, merging, and windows of the last map
        if xs.shape[2] % factor or xs.shape[3] % factor:
            raise ValueError(
                "General: expected images [B, T, H, W, C] with sides that are "
                f"multiples of {factor}, got shape {xs.shape}. Resize the images."
            )
        xs, carried = self.stem(xs), None
        for stage, blocks in enumerate(self.stages):
            if stage:
                xs = self.merges[stage - 1](xs)
                if carried is not None:
                    carried = jax.tree.map(self.carried_merges[stage - 1], carried)
            for block in blocks:
                xs, carried = block(xs, carried)
        return self.head(xs.mean((2, 3)))


def cnn(
    num_classes: int, *, conv: Callable[..., Layer] = nnx.Conv, **options: Any
) -> General:
    """Make the authors' CNN: for CIFAR-10 up to ten classes, else for CIFAR-100.

    Args as in ``General``; ``conv`` makes all convolutions.
    """
    network = partial(conv_network, conv=conv)
    if num_classes > 10:
        network = partial(network, projection=mean)
        options = {"region_threshold": REGION} | options
    return General(num_classes, network=network, conv=conv, **options)


def lstm(num_classes: int, **options: Any) -> General:
    """Make the authors' LSTM: for CIFAR-10 up to ten classes, else for CIFAR-100.

    Args as in ``General``.
    """
    # With more classes the authors cut windows, and give the network the whole map.
    if num_classes > 10:
        options = {"windows": (whole, whole), "region_threshold": REGION} | options
    return General(num_classes, network=lstm_network, **options)


def plain(
    num_classes: int, *, conv: Callable[..., Layer] = nnx.Conv, **options: Any
) -> General:
    """Make the same network without windows, whose membranes last through time.

    For comparison, as any spiking network. Args as in ``cnn``.
    """
    network = partial(conv_network, conv=conv, projection=None)
    options = {"windows": (whole, whole)} | options
    return General(num_classes, network=network, conv=conv, **options)
