"""General SNN: windows of a map that see each other within one time step.

Reference: Training a General SNN with Improved Efficiency and Minimum Latency, 2024,
arXiv:2401.10843, after the authors' code; docs/general.md says what is ours.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax._compat import List
from spikejax.layers import Neuron, check_factory
from spikejax.nn.convolution import convolve
from spikejax.nn.windowed import (
    Binarise,
    Mixer,
    Projection,
    bernoulli,
    conv_network,
    general_lif,
    lstm_network,
    mean,
    sine,
    unchanged,
)
from spikejax.nn.windows import Window, overlap, tile, whole

Conv = partial(nnx.Conv, conv_general_dilated=convolve)
REGION = 0.2  # what the authors take for a spike among the means of several windows


def _linear(inputs, outputs, rngs, **options):
    init = nnx.initializers.xavier_uniform()
    return nnx.Linear(inputs, outputs, kernel_init=init, rngs=rngs, **options)


class Block(nnx.Module):
    """x <- x + mixer(x),  x <- x + MLP(x), with real values between the two.

    Args:
        mixer: windowed spiking layer.
        channels: of the map; the MLP is three times as wide.
        rngs: source of the weights.
    """

    def __init__(self, mixer: Mixer, channels: int, *, rngs: nnx.Rngs):
        self.mixer = mixer
        self.widen = _linear(channels, 3 * channels, rngs)
        self.narrow = _linear(3 * channels, channels, rngs)

    def __call__(
        self, xs: jax.Array, carried: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The map and the membranes for the next block."""
        ys, carried = self.mixer(xs, carried)
        xs = xs + ys
        hidden = nnx.gelu(self.widen(xs), approximate=False)
        return xs + self.narrow(hidden), carried


class PatchMerging(nnx.Module):
    """Half the sides and twice the channels: a linear map of 2x2 pixels, no bias."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.linear = _linear(4 * channels, 2 * channels, rngs, use_bias=False)

    def __call__(self, xs: jax.Array) -> jax.Array:
        """[..., H/2, W/2, 2 C] for a map [..., H, W, C]."""
        pixels = [xs[..., i::2, j::2, :] for j in (0, 1) for i in (0, 1)]
        return self.linear(jnp.concatenate(pixels, -1))


def _block(channels, window, *, network, neuron, binarise, region_threshold=None, rngs):
    mixer = Mixer(
        channels,
        network(channels, neuron, rngs=rngs),
        window=window,
        binarise=binarise,
        region_threshold=region_threshold,
        rngs=rngs,
    )
    return Block(mixer, channels, rngs=rngs)


class General(nnx.Module):
    """Stem 2x2, stages of blocks with patch merging between them, global mean, head.

    Blocks of a stage take the two windows in turn; the last stage the first only. The
    membranes that a network carries from block to block are merged between stages too,
    by weights of their own.

    Args:
        num_classes: logits.
        network: (channels, neuron, projection=, carry_reset=, rngs=) -> what runs over
            the windows: conv_network, lstm_network, Through.
        neuron: factory of the spiking cell. With one that makes no spikejax neuron, as
            ``lambda: nnx.relu``, the network does not spike: nothing is binarised, and
            no region threshold acts.
        projection: joins two membranes: sine or mean.
        windows: of the blocks in turn.
        region_threshold: in the blocks of the second window; None for no threshold.
        binarise: bernoulli, straight_through or threshold.
        carry_reset: carry membranes as a spike leaves them.
        width: factor on the channels 48, 96, 192 and 384.
        depths: blocks of each stage.
        in_channels: channels of the input.
        rngs: source of the weights and of the random input of the mixers.

    Returns:
        logits [B, T, num_classes] for input [B, T, H, W, in_channels], H and W
        multiples of 32. Time steps do not see each other, but for ``plain``.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        network: Callable = conv_network,
        neuron: Callable[[], Callable] = general_lif,
        projection: Projection = sine,
        windows: tuple[Window, Window] = (tile, overlap),
        region_threshold: float | None = None,
        binarise: Binarise = bernoulli,
        carry_reset: bool = False,
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
        make = partial(
            _block,
            network=partial(network, projection=projection, carry_reset=carry_reset),
            neuron=neuron,
            binarise=binarise if spiking else unchanged,
            rngs=rngs,
        )
        second = {"region_threshold": region_threshold if spiking else None}
        channels = round(48 * width)
        self.stem = Conv(in_channels, channels, (2, 2), (2, 2), rngs=rngs)
        stages, merges, carried_merges = [], [], []
        for stage, depth in enumerate(depths):
            last = stage == len(depths) - 1
            blocks = [
                make(channels, windows[1], **second)
                if k % 2 and not last
                else make(channels, windows[0])
                for k in range(depth)
            ]
            stages.append(List(blocks))
            if last:
                break
            merges.append(PatchMerging(channels, rngs=rngs))
            inner = blocks[0].mixer.network
            if inner.carries:
                carried_merges.append(PatchMerging(inner.features, rngs=rngs))
            channels *= 2
        self.stages = List(stages)
        self.merges = List(merges)
        self.carried_merges = List(carried_merges)
        zeros = nnx.initializers.zeros_init()
        self.head = nnx.Linear(channels, num_classes, kernel_init=zeros, rngs=rngs)

    def __call__(self, xs: jax.Array) -> jax.Array:
        last = 2 ** len(self.stages)
        if xs.ndim != 5 or xs.shape[2] % (2 * last) or xs.shape[3] % (2 * last):
            raise ValueError(
                f"General: expected images [B, T, H, W, C] with sides that are "
                f"multiples of {2 * last}, got shape {xs.shape}. Take another data "
                "set, or resize its images."
            )
        xs, carried = self.stem(xs), None
        for stage, blocks in enumerate(self.stages):
            for block in blocks:
                xs, carried = block(xs, carried)
            if stage < len(self.merges):
                xs = self.merges[stage](xs)
                if carried is not None:
                    carried = self.carried_merges[stage](carried)
        return self.head(xs.mean((2, 3)))


class Through(nnx.Module):
    """Two 3x3 convolutions over the whole map, the neurons' membranes through time.

    What a spiking network is without windows, to compare with: see ``plain``.
    """

    carries = False

    def __init__(self, channels: int, neuron: Callable, *, rngs: nnx.Rngs, **_):
        self.features = channels
        self.convs = List(Conv(channels, channels, (3, 3), rngs=rngs) for _ in range(2))
        self.neurons = List([neuron(), neuron()])

    def __call__(self, xs: jax.Array, carried: None = None) -> tuple[jax.Array, None]:
        """Spikes of maps [B, T, 1, H, W, C]."""
        for conv, neuron in zip(self.convs, self.neurons, strict=True):
            xs = neuron(conv(xs))
        return xs, None


cnn_10 = partial(General, network=conv_network)
cnn_100 = partial(cnn_10, projection=mean, region_threshold=REGION)
lstm_10 = partial(General, network=lstm_network)
lstm_100 = partial(lstm_10, windows=(whole, whole), region_threshold=REGION)
plain = partial(General, network=Through, windows=(whole, whole))


def cnn(num_classes: int, **options) -> General:
    """cnn_10 for up to ten classes, else cnn_100."""
    return (cnn_10 if num_classes <= 10 else cnn_100)(num_classes, **options)


def lstm(num_classes: int, **options) -> General:
    """lstm_10 for up to ten classes, else lstm_100."""
    return (lstm_10 if num_classes <= 10 else lstm_100)(num_classes, **options)
