"""Spiking transformers over images [B, T, H, W, C]: the network, and its layers.

A design is a list of layers: those that shrink the map, and blocks of attention.
Neurons are after the weighted layers, and blocks add up spikes; or before them, and
blocks add up membranes. ``spikejax.models.spikformer`` has the designs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax._compat import List
from spikejax.layers import Factory, Fixed, Layer
from spikejax.models.check import check_factory, check_images
from spikejax.models.whitened import patch_basis
from spikejax.nn.attention import token_attention
from spikejax.nn.norm import td_batch_norm
from spikejax.nn.penalty import unpenalised


class Make(NamedTuple):
    """Factories of layers, with the type of numbers and the keys bound.

    neuron, attention_neuron: of all neurons, and of those of attention.
    largest: spikes that a neuron fires per time step at most.
    in_channels: channels of the images.
    """

    conv: Callable[..., Layer]
    linear: Callable[..., Layer]
    norm: Callable[..., Layer]
    pool: Callable[..., jax.Array]
    neuron: Factory
    attention_neuron: Factory
    largest: int
    in_channels: int


class Design(NamedTuple):
    """Layers of a family in a size, and its authors' neurons.

    layers: makes the layers in the order of computation.
    channels: of the last map.
    neuron, attention_neuron: of the paper.
    fires_last: whether neurons are between the mean over the map and the head.
    side: the smallest height and width of the images.
    """

    layers: Callable[[Make], list[nnx.Module]]
    channels: int
    neuron: Factory
    attention_neuron: Factory
    fires_last: bool
    side: int = 1


class Weighted(nnx.Module):
    """A weighted layer with a norm: a linear map of each pixel, or a convolution.

    Args:
        make: factories.
        inputs, outputs, size, stride: channels, side of the kernel, and its stride.
        bias: whether the layer has one besides that of the norm.
        groups: of channels that see each other in a convolution.
        pooled: side of the windows of max-pooling that halves the map after the norm,
            2 or 3; 0 does not pool.
    """

    def __init__(
        self,
        make: Make,
        inputs: int,
        outputs: int,
        size: int = 1,
        stride: int = 1,
        *,
        bias: bool = False,
        groups: int = 1,
        pooled: int = 0,
    ):
        if size == stride == 1:
            self.layer = make.linear(inputs, outputs, use_bias=bias)
        else:
            pads = ((size // 2, size // 2),) * 2
            parts = {"padding": pads, "feature_group_count": groups, "use_bias": bias}
            sizes = (size, size), (stride, stride)
            self.layer = make.conv(inputs, outputs, *sizes, **parts)
        self.norm = make.norm(outputs)
        self.pool, self.pooled = make.pool, pooled

    def __call__(self, xs: jax.Array) -> jax.Array:
        xs = self.norm(self.layer(xs))
        return _halve(self.pool, xs, self.pooled) if self.pooled else xs


def _halve(pool: Callable[..., jax.Array], xs: jax.Array, side: int = 3) -> jax.Array:
    """Return the maximum of square windows with a stride of 2."""
    pads = (side % 2, side % 2)
    # Time is an axis of the window: nnx.max_pool pads one batch axis only.
    return pool(xs, (1, side, side), (1, 2, 2), ((0, 0), pads, pads))


class Chain(nnx.Module):
    """Weighted layers in a row, with neurons after each of them, or before.

    Args:
        make: factories.
        units: the layers.
        before: whether the neurons are before each layer.
        halve: numbers of the layers after whose neurons max-pooling follows.
    """

    def __init__(
        self,
        make: Make,
        *units: Weighted,
        before: bool = False,
        halve: Sequence[int] = (),
    ):
        self.units, self.before = List(units), before
        self.neurons = List(make.neuron() for _ in units)
        self.halve, self.pool = tuple(halve), make.pool

    def __call__(self, xs: jax.Array) -> jax.Array:
        pairs = zip(self.units, self.neurons, strict=True)
        for k, (unit, neuron) in enumerate(pairs):
            xs = unit(neuron(xs)) if self.before else neuron(unit(xs))
            xs = _halve(self.pool, xs) if k in self.halve else xs
        return xs


class Attention(nnx.Module):
    """Attention over the pixels of a map, between two weighted layers.

    Args:
        make: factories.
        channels: of the map.
        mix: function of ``spikejax.nn.attention``.
        options: of mix.
        before: whether neurons are before the first weights, else after the last.
        biases: whether the weights of q, k and v have one, and whether the last have.
        widen: factor on the channels of v.
    """

    def __init__(
        self,
        make: Make,
        channels: int,
        mix: Callable[..., jax.Array],
        *,
        before: bool = False,
        biases: tuple[bool, bool] = (False, True),
        widen: int = 1,
        **options: float,
    ):
        # Pairs, not a partial: a model has to be equal to its copies.
        self.mix, self.options = mix, tuple(options.items())
        self.before = before
        sizes = [channels, channels, widen * channels]
        sizes = sizes[: 2 if mix is token_attention else 3]
        self.units = List(Weighted(make, channels, n, bias=biases[0]) for n in sizes)
        self.neurons = List(make.neuron() for _ in sizes)
        self.attention_neuron, self.neuron = make.attention_neuron(), make.neuron()
        self.last = Weighted(make, sizes[-1], channels, bias=biases[1])

    def __call__(self, xs: jax.Array) -> jax.Array:
        if self.before:
            xs = self.neuron(xs)
        tokens = xs.reshape(*xs.shape[:2], -1, xs.shape[-1])
        pairs = zip(self.units, self.neurons, strict=True)
        spikes = [neuron(unit(tokens)) for unit, neuron in pairs]
        ys = self.mix(*spikes, self.attention_neuron, **dict(self.options))
        ys = self.last(ys).reshape(xs.shape)
        return ys if self.before else self.neuron(ys)


class Block(nnx.Module):
    """Residual branches in a row: x <- x + branch(x)."""

    def __init__(self, *branches: Layer):
        self.branches = List(branches)

    def __call__(self, xs: jax.Array) -> jax.Array:
        for branch in self.branches:
            xs = xs + branch(xs)
        return xs


class Paths(nnx.Module):
    """The sum of two layers of one input: QKFormer's deformed shortcut."""

    def __init__(self, main: Layer, side: Layer):
        self.main, self.side = main, side

    def __call__(self, xs: jax.Array) -> jax.Array:
        return self.main(xs) + self.side(xs)


class Whitening(nnx.Module):
    """The fixed filters of ``WhitenedCNN`` in both signs, with a norm."""

    def __init__(self, make: Make):
        basis = patch_basis(make.in_channels)
        sizes = *basis.shape[2:], basis.shape[:2]
        self.filters = make.conv(*sizes, padding="VALID", use_bias=False)
        self.filters.kernel = Fixed(basis)
        self.channels = 2 * basis.shape[-1]
        self.norm = make.norm(self.channels)

    def __call__(self, xs: jax.Array) -> jax.Array:
        xs = self.filters(xs)
        return self.norm(jnp.concatenate([xs, -xs], -1))


class Transformer(nnx.Module):
    """The layers of a design, global mean, head.

    Args:
        design: from ``spikejax.models.spikformer``.
        num_classes: number of logits.
        neuron: factory of the activation, such as ``LIF`` or ``lambda: nnx.relu``; the
            paper's by default.
        attention_neuron: factory of those that attention ends in: by default ``neuron``
            if that is given, else the paper's.
        conv, norm, pool, in_channels, dtype, rngs: as in ``ResNet``.
        linear: factory of the linear layers, with the arguments of nnx.Linear.
        remat: keep only the input of each layer of the design, and recompute the layer
            for the gradient.

    Returns:
        logits [B, T, num_classes] for input [B, T, H, W, in_channels].

    Raises:
        ValueError: neuron is not a factory, or the images do not fit.

    The weights start as Flax's, those of the head as the papers': normal, cut at two
    standard deviations of 0.02.
    """

    def __init__(
        self,
        design: Design,
        num_classes: int,
        *,
        neuron: Factory | None = None,
        attention_neuron: Factory | None = None,
        rngs: nnx.Rngs,
        conv: Callable[..., Layer] = nnx.Conv,
        linear: Callable[..., Layer] = nnx.Linear,
        norm: Callable[..., Layer] = td_batch_norm,
        pool: Callable[..., jax.Array] = nnx.max_pool,
        in_channels: int = 3,
        dtype: jnp.dtype = jnp.float32,
        remat: bool = False,
    ):
        if neuron is None:
            attention_neuron = attention_neuron or design.attention_neuron
        neuron = neuron or design.neuron
        for factory in (neuron, attention_neuron or neuron):
            check_factory("Transformer", factory)
        options = {"dtype": dtype, "rngs": rngs}
        make = Make(
            partial(conv, **options),
            partial(linear, **options),
            partial(norm, **options),
            pool,
            neuron,
            attention_neuron or neuron,
            getattr(unpenalised(neuron()), "num_thresholds", 1),
            in_channels,
        )
        self.in_channels, self.side, self.remat = in_channels, design.side, remat
        self.layers = List(design.layers(make))
        self.neuron = neuron() if design.fires_last else None
        start = nnx.initializers.truncated_normal(0.02)
        self.head = make.linear(design.channels, num_classes, kernel_init=start)

    def __call__(self, xs: jax.Array) -> jax.Array:
        check_images("Transformer", xs, self.in_channels, self.side)
        run = nnx.remat(_apply) if self.remat else _apply
        for layer in self.layers:
            xs = run(layer, xs)
        xs = xs.mean((2, 3))
        return self.head(xs if self.neuron is None else self.neuron(xs))


def _apply(layer: Layer, xs: jax.Array) -> jax.Array:
    return layer(xs)
