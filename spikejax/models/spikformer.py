"""Designs of spiking transformers: Spikformer, SDT, QKFormer, E-SpikeFormer, small.

model = Transformer(spikformer(384, 4, heads=12), 10, rngs=nnx.Rngs(0))

Spikformer and QKFormer add up spikes in their blocks, the others membranes. Weights
that the authors' code makes and never uses are left out.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from flax import nnx

from spikejax import surrogate
from spikejax.layers import LIF
from spikejax.models.transformer import (
    Attention,
    Block,
    Chain,
    Design,
    Make,
    Paths,
    Weighted,
    Whitening,
)
from spikejax.nn.attention import (
    driven_attention,
    linear_attention,
    self_attention,
    token_attention,
)
from spikejax.nn.cells import ILIF

# Of Spikformer, SDT and QKFormer: the defaults of SpikingJelly 0.0.0.0.12.
_lif = partial(LIF, v_reset=0.0, detach_reset=True, surrogate=surrogate.sigmoid(4.0))
_half_lif = partial(_lif, v_threshold=0.5)


def _mlp(make: Make, channels: int, *, before: bool = False) -> Chain:
    widen = Weighted(make, channels, 4 * channels, bias=True)
    narrow = Weighted(make, 4 * channels, channels, bias=True)
    return Chain(make, widen, narrow, before=before)


def _scale(make: Make) -> float:
    """Return the scale of Spikformer's attention, for neurons of several spikes."""
    # Products of three neurons' outputs; binary spikes have the paper's scale.
    return 0.125 / make.largest**3


def spikformer(
    channels: int,
    depth: int,
    *,
    heads: int,
    halve: Sequence[int] = (2, 3),
    bias: bool = True,
) -> Design:
    """Return the design of a Spikformer: sums of spikes, attention over all tokens.

    Args:
        channels, depth, heads: of the blocks.
        halve: numbers of the four first convolutions that max-pooling follows.
        bias: whether the weights of q, k and v have one, as in the code for CIFAR;
            that for ImageNet has none.

    Reference: Zhou et al. 2022, arXiv:2209.15425.
    """

    def layers(make: Make) -> list[nnx.Module]:
        sizes = [make.in_channels, *(channels // n for n in (8, 4, 2, 1))]
        units = [Weighted(make, *pair, 3) for pair in pairwise(sizes)]
        position = Chain(make, Weighted(make, channels, channels, 3))
        options = {"heads": heads, "scale": _scale(make), "biases": (bias, True)}
        blocks = [
            Block(
                Attention(make, channels, self_attention, **options),
                _mlp(make, channels),
            )
            for _ in range(depth)
        ]
        return [Chain(make, *units, halve=halve), Block(position), *blocks]

    return Design(layers, channels, _lif, _half_lif, fires_last=False)


def sdt(channels: int, depth: int, *, halve: Sequence[int] = (0, 1, 2, 3)) -> Design:
    """Return the design of a Spike-driven Transformer (V1): sums of membranes.

    Args:
        channels, depth, halve: as in ``spikformer``.

    Reference: Yao et al. 2023, arXiv:2307.01694, where heads change nothing.
    """

    def layers(make: Make) -> list[nnx.Module]:
        sizes = [make.in_channels, *(channels // n for n in (8, 4, 2))]
        units = [Weighted(make, *pair, 3) for pair in pairwise(sizes)]
        last = Weighted(make, channels // 2, channels, 3, pooled=3 * (3 in halve))
        position = Weighted(make, channels, channels, 3)
        blocks = [
            Block(
                Attention(make, channels, driven_attention, before=True),
                _mlp(make, channels, before=True),
            )
            for _ in range(depth)
        ]
        first = Chain(make, *units, halve=[k for k in halve if k < 3])
        return [first, last, Block(Chain(make, position, before=True)), *blocks]

    return Design(layers, channels, _lif, _half_lif, fires_last=True)


def qkformer(
    channels: int,
    depths: tuple[int, int, int],
    *,
    heads: int,
    imagenet: bool = False,
) -> Design:
    """Return the design of a QKFormer: three stages, the first two of Q-K attention.

    The authors' code applies the last neurons of self-attention to [T B, C, N], whose
    first axis it takes for time: spikes of one image depend on the images before it,
    and a time step on other images. Here every image has its own time axis, so weights
    of theirs do not have the accuracy that they report.

    Args:
        channels: of the last stage; the others have a quarter and a half of them.
        depths: blocks per stage.
        heads: of all blocks.
        imagenet: halve the map in the first convolution of each embedding and twice
            more, else in the second one of the last two.

    Reference: Zhou et al. 2024, arXiv:2403.16552.
    """

    early, late = (3, 0) if imagenet else (0, 3)  # side of the pooling windows

    def embed(make: Make, outputs: int, halves: bool) -> Paths:
        inputs = outputs // 2
        units = [Weighted(make, inputs, outputs, 3, pooled=early)]
        if halves:
            units.append(Weighted(make, outputs, outputs, 3, pooled=late))
        side = Weighted(make, inputs, outputs, 1, 2 if halves else 1)
        return Paths(Chain(make, *units), Chain(make, side))

    def layers(make: Make) -> list[nnx.Module]:
        stem = Weighted(make, make.in_channels, channels // 8, 3, pooled=early)
        made: list[nnx.Module] = [Chain(make, stem)]
        for stage, depth in enumerate(depths):
            width = channels // (4, 2, 1)[stage]
            attend = partial(Attention, mix=token_attention)
            if stage == 2:
                attend = partial(Attention, mix=self_attention, scale=_scale(make))
            made.append(embed(make, width, imagenet or stage > 0))
            for _ in range(depth):
                attention = attend(make, width, heads=heads)
                made.append(Block(attention, _mlp(make, width)))
        return made

    return Design(layers, channels, _lif, _half_lif, fires_last=False)


def _separable(make: Make, channels: int, size: int) -> Chain:
    inside = 2 * channels
    return Chain(
        make,
        Weighted(make, channels, inside),
        Weighted(make, inside, inside, size, groups=inside),
        Weighted(make, inside, channels),
        before=True,
    )


def _conv_block(make: Make, channels: int) -> Block:
    """Return a block of the first two stages of E-SpikeFormer."""
    inside = 4 * channels
    units = Weighted(make, channels, inside, 3), Weighted(make, inside, channels, 3)
    return Block(_separable(make, channels, 7), Chain(make, *units, before=True))


def _linear_block(make: Make, channels: int, heads: int) -> Block:
    """Return a block of the last two stages of E-SpikeFormer."""
    attention = Attention(
        make,
        channels,
        linear_attention,
        before=True,
        biases=(False, False),
        widen=4,
        heads=heads,
        largest=make.largest,
    )
    mlp = _mlp(make, channels, before=True)
    return Block(_separable(make, channels, 3), attention, mlp)


def e_spikeformer(
    widths: tuple[int, int, int, int],
    *,
    depths: tuple[int, int] = (6, 2),
    heads: int = 8,
) -> Design:
    """Return the design of an E-SpikeFormer (SDT-V3), for one time step.

    Neurons hand on whole numbers, 0 to 4. The authors divide them by 4, except before
    the head. All other weights that get them are followed by a norm, so this is their
    network with four times smaller weights, and attention has the factor 1/4³.

    Args:
        widths: channels of the four stages.
        depths: blocks of the last two, which have attention.
        heads: of attention.

    Reference: Yao et al. 2024, arXiv:2411.16061.
    """

    def layers(make: Make) -> list[nnx.Module]:
        half = widths[0] // 2
        made: list[nnx.Module] = [
            Weighted(make, make.in_channels, half, 7, 2, bias=True)
        ]
        made.append(_conv_block(make, half))
        stages = zip((half, *widths), widths, (2, 2, 2, 1), strict=False)
        for stage, (before, width, stride) in enumerate(stages):
            down = Weighted(make, before, width, 3, stride, bias=True)
            made.append(Chain(make, down, before=True))
            if stage < 2:
                made += [_conv_block(make, width) for _ in range(1 + stage)]
            else:
                depth = depths[stage - 2]
                made += [_linear_block(make, width, heads) for _ in range(depth)]
        return made

    return Design(layers, widths[-1], ILIF, ILIF, fires_last=True)


def small(channels: int = 128, depth: int = 4, *, heads: int = 4) -> Design:
    """Return the design of a small transformer for images of 32x32: ours.

    The fixed filters of ``WhitenedCNN``, two convolutions that halve the map, and
    blocks of E-SpikeFormer over 7x7 tokens.

    Args:
        channels, depth, heads: of the blocks.
    """

    def layers(make: Make) -> list[nnx.Module]:
        whitening = Whitening(make)
        sizes = whitening.channels, channels // 2, channels
        units = [Weighted(make, *pair, 3, pooled=2) for pair in pairwise(sizes)]
        blocks = [_linear_block(make, channels, heads) for _ in range(depth)]
        return [whitening, Chain(make, *units, before=True), *blocks]

    return Design(layers, channels, ILIF, ILIF, fires_last=True, side=5)
