"""The windowed spiking layer: windows of a map, visited one after another.

The membranes of one window are the start of the next, so neurons see each other within
one time step. Only this is sequential, and it is elementwise: convolutions and LSTMs
see all windows in one call.

Reference: Training a General SNN with Improved Efficiency and Minimum Latency, 2024,
arXiv:2401.10843, after the authors' code.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spikejax import surrogate
from spikejax._compat import List
from spikejax.layers import LIF, Factory, Layer, Neuron
from spikejax.neurons import State
from spikejax.nn.penalty import Penalised
from spikejax.nn.recurrent import Bidirectional

Window = Callable[[int], int]  # side of the map -> side of a window
Binarise = Callable[[jax.Array, jax.Array], jax.Array]  # (x, random key) -> spikes
Projection = Callable[[jax.Array, jax.Array], jax.Array]  # two membranes -> one

# The authors' neuron: u = 0.4 v + x, fires at 0.5 with derivative [|u - 0.5| < 0.5].
TAU = 1 / 0.6
FIRING = {"v_threshold": 0.5, "surrogate": surrogate.rectangle()}
general_lif = partial(LIF, tau=TAU, decay_input=False, **FIRING)


# Windows of a map, in the order top left, top right, bottom left, bottom right


def tile(side: int) -> int:
    """Return half the side, of a map with even sides: windows do not overlap."""
    return side // 2


def overlap(side: int) -> int:
    """Return three quarters of the side: windows share a band of half the side."""
    return 3 * side // 4


def whole(side: int) -> int:
    """Return the side: one window, the map itself."""
    return side


def split(xs: jax.Array, window: Window) -> jax.Array:
    """Cut maps [..., H, W, C] into windows [..., G, h, w, C] in their corners.

    Args:
        xs: the maps.
        window: tile, overlap, whole, or any (side of a map) -> side of a window, from
            half the side to all of it. G is 4, or less where it is all of it.

    Raises:
        ValueError: the windows do not cover the map, or exceed it.
    """
    height, width, corners = _layout(xs.shape[-3:-1], window)
    parts = [xs[..., y : y + height, x : x + width, :] for y, x in corners]
    return jnp.stack(parts, -4)


def stitch(parts: jax.Array, sides: tuple[int, ...], window: Window) -> jax.Array:
    """Put windows together to maps [..., H, W, C]: where several overlap, their mean.

    Args:
        parts, window: windows [..., G, h, w, C] and their rule, as in ``split``.
        sides: H and W.
    """
    height, width, corners = _layout(sides, window)
    covered = np.zeros((*sides, 1), np.float32)
    total: Any = 0.0
    for g, (y, x) in enumerate(corners):
        covered[y : y + height, x : x + width] += 1
        edges = [(0, 0)] * (parts.ndim - 1)
        edges[-3:-1] = (y, sides[0] - height - y), (x, sides[1] - width - x)
        # Padding adds up in one fusion, where .at[].add copies the map per window.
        total = total + jnp.pad(parts[..., g, :, :, :], edges)
    return total * jnp.asarray(1 / covered, parts.dtype)  # 1, 1/2 and 1/4 are exact


def _layout(sides: tuple[int, ...], window: Window) -> tuple[int, int, list]:
    """Return height and width of a window, and the top left pixel (y, x) of each."""
    for side in sides:
        if not side <= 2 * window(side) <= 2 * side:
            raise ValueError(
                "windows: expected windows from half the map to all of it, got "
                f"{window(side)} for a map of side {side}. Take images whose sides "
                "stay even in every stage, such as 64, and tile, overlap or whole."
            )
    height, width = map(window, sides)
    corners = [(y, x) for y in (0, sides[0] - height) for x in (0, sides[1] - width)]
    return height, width, list(dict.fromkeys(corners))


# Real values to spikes


def bernoulli(x: jax.Array, rng: jax.Array) -> jax.Array:
    """Draw z = [x > U(0, 1)], without a gradient, as the authors do.

    Earlier layers are trained through the residual connection only.
    """
    x = jax.lax.stop_gradient(x)
    # The same numbers as for x.shape; six axes take eight times as long to compile.
    # Of float32: a bfloat16 one has 7 bits, and small x fire twice as often.
    u = jax.random.uniform(rng, (x.size,), jnp.float32).reshape(x.shape)
    return (x > u).astype(x.dtype)


def straight_through(x: jax.Array, rng: jax.Array) -> jax.Array:
    """Draw as ``bernoulli``, with the gradient of the mean, clip(x, 0, 1): ours."""
    mean = jnp.clip(x, 0, 1)
    return bernoulli(x, rng) + (mean - jax.lax.stop_gradient(mean))


# From the membranes of two neighbours to those of the next window


def sine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return F(a, b) = 2 sin(pi/4 a cos(pi/4 b)), in [-2, 2]; near zero it is pi/2 a.

    F(0, b) is 0: a neighbour at rest passes nothing on.
    """
    return 2 * jnp.sin(math.pi / 4 * a * jnp.cos(math.pi / 4 * b))


def mean(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return F(a, b) = (a + b) / 2."""
    return (a + b) / 2


class Stacked(nnx.Module):
    """Layers with neurons, which start from rest in the first window of each block.

    u_k[g] = charge(start_k[g], layer_k(z_(k-1)[g])),  z_k[g] = fire(u_k[g])
    start_1[g] = u_1[g-1],  start_k[g] = F(u_(k-1)[g-1], u_k[g-1])

    Args:
        layers: callables from [B, T, G, h, w, C] to currents, such as nnx.Conv.
        neurons: one per layer; a function that is no spikejax neuron has no membrane.
        features: channels of the last layer.
        projection: F: sine, mean, or any elementwise function of two membranes. With
            None windows do not see each other, and membranes last through time.
    """

    carries = False  # no membranes last until the next block

    def __init__(
        self,
        layers: Sequence[Layer],
        neurons: Sequence[Layer],
        features: int,
        *,
        projection: Projection | None = sine,
    ):
        for neuron in neurons:
            _check_neuron("Stacked", neuron)
        self.layers = List(layers)
        self.neurons = List(neurons)
        self.features = features
        self.projection = projection

    def __call__(self, xs: jax.Array, carried: None = None) -> tuple[jax.Array, State]:
        """Return spikes [B, T, G, h, w, features] of windows, and None."""
        below: list[State] = []
        for layer, neuron in zip(self.layers, self.neurons, strict=True):
            currents = layer(xs)
            if self.projection is None or not isinstance(neuron, Neuron):
                xs, below = neuron(currents), []
                continue
            membranes, spikes = [], []
            for g, x in enumerate(_windows(currents)):
                start = membranes[-1] if membranes else neuron.start(x.shape)
                if membranes and below:
                    start = jax.tree.map(self.projection, below[g - 1], start)
                u, z = _fire(neuron, start, x)
                membranes.append(u)
                spikes.append(z)
            xs, below = jnp.stack(spikes, -4), membranes
        return xs, carried


class PersistentState(nnx.Module):
    """A layer with neurons whose membranes M persist from block to block.

    M'[g], z[g] = fire(start[g], layer(x)[g])
    start[1] = F(M[1], M[2]),  start[2] = F(M'[1], M[2])
    start[g] = F(M[g], M'[g-1])  for g = 3, 4

    With one window for the whole map, start = M. The first block starts from rest.
    Args as in ``Stacked``; the layer sees sequences [..., h w, C] of pixels, by rows.
    """

    def __init__(
        self,
        layer: Layer,
        neuron: Layer,
        features: int,
        *,
        projection: Projection = sine,
    ):
        _check_neuron("PersistentState", neuron)
        self.layer = layer
        self.neuron = neuron
        self.features = features
        self.carries = isinstance(neuron, Neuron)
        self.projection = projection

    def __call__(self, xs: jax.Array, carried: State = None) -> tuple[jax.Array, State]:
        """Return spikes [B, T, G, h, w, features] and M' of windows and their M."""
        pixels = xs.reshape(*xs.shape[:3], -1, xs.shape[-1])
        currents = self.layer(pixels).reshape(*xs.shape[:-1], -1)
        neuron = self.neuron
        if not isinstance(neuron, Neuron):
            return neuron(currents), None
        project = partial(jax.tree.map, self.projection)
        rest = partial(neuron.start, currents[..., 0, :, :, :].shape)
        windows = _windows(currents)
        old = [rest() for _ in windows] if carried is None else _windows(carried)
        new, spikes = [], []
        for g, x in enumerate(windows):
            # The order of F's arguments is the authors', and so is the exception.
            if len(old) == 1:
                start = old[0]
            elif g < 2:
                start = project(new[0] if g else old[0], old[1])
            else:
                start = project(old[g], new[g - 1])
            u, z = _fire(neuron, start, x)
            new.append(u)
            spikes.append(z)
        carried = jax.tree.map(lambda *leaves: jnp.stack(leaves, -4), *new)
        return jnp.stack(spikes, -4), carried


Network = Stacked | PersistentState
Tree = TypeVar("Tree")


def _check_neuron(who: str, neuron: Layer) -> None:
    if isinstance(neuron, Penalised):
        raise ValueError(
            f"{who}: expected neurons, whose membranes windows pass on, got Penalised. "
            "Add a cost of their spikes to the loss."
        )


def _windows(xs: Tree) -> list[Tree]:
    """Return [..., h, w, C] of each window of [..., G, h, w, C]."""
    count = jax.tree.leaves(xs)[0].shape[-4]
    return [jax.tree.map(lambda x, g=g: x[..., g, :, :, :], xs) for g in range(count)]


def _fire(neuron: Neuron, v: State, x: jax.Array) -> tuple[State, jax.Array]:
    """Return the membranes u that the currents x of a window charge, and the spikes."""
    if len(jax.tree.leaves(v)) > 1:
        raise ValueError(
            "windows: expected neurons whose state is one membrane, which windows pass "
            f"on, such as LIF or MultiThreshold, got {type(neuron).__name__}."
        )
    # The authors carry u to the next window, not the membrane after the reset.
    return jax.tree.map(lambda v: neuron.charge(v, x), v), neuron.step(v, x)[1]


class Mixer(nnx.Module):
    """A layer that sends binarised windows of a map through one spiking network.

    y = W stitch(network(binarise(split(x)))) + b

    Args:
        channels: of the map that comes out.
        network: ``conv_network`` or ``lstm_network``; all windows share its weights.
        window: tile, overlap or whole.
        binarise: bernoulli, straight_through, or any (x, random key) -> z, which draws
            in evaluation too, as the authors do; None passes real values on.
        region_threshold: means of several windows above it become 1, without a
            gradient; None keeps the means.
        rngs: source of the weights; its stream 'noise' is that of the random keys.

    Reference: arXiv:2401.10843; straight_through is our choice.
    """

    def __init__(
        self,
        channels: int,
        network: Network,
        *,
        window: Window = tile,
        binarise: Binarise | None = bernoulli,
        region_threshold: float | None = None,
        rngs: nnx.Rngs,
    ):
        self.network = network
        self.window = window
        self.binarise = binarise
        self.region_threshold = region_threshold
        xavier = nnx.initializers.xavier_uniform()
        self.linear = nnx.Linear(
            network.features, channels, kernel_init=xavier, rngs=rngs
        )
        # A stream of its own: draws of one layer do not depend on those of others.
        self.rngs = rngs["noise"].fork()

    def __call__(self, xs: jax.Array, carried: State = None) -> tuple[jax.Array, State]:
        """Return the mixed maps, and the membranes for the next block.

        Args:
            xs: maps [B, T, H, W, C]; time steps do not see each other.
            carried: membranes [B, T, H, W, C'] of the previous block, if it has any.

        Raises:
            ValueError: xs has no axis of time.
        """
        if xs.ndim != 5:
            raise ValueError(
                f"Mixer: expected maps [B, T, H, W, C], got shape {xs.shape}. For one "
                "time step, add the time axis: x[:, None]."
            )
        cut = partial(split, window=self.window)
        put = partial(stitch, sides=xs.shape[2:4], window=self.window)
        parts = cut(xs)
        if self.binarise is not None:
            parts = self.binarise(parts, self.rngs())
        # None is a tree without leaves.
        spikes, carried = self.network(parts, jax.tree.map(cut, carried))
        ys, carried = put(spikes), jax.tree.map(put, carried)
        if self.region_threshold is not None:
            # Of several thresholds the counts: those of the authors are binary.
            whole = jax.lax.stop_gradient(jnp.maximum(ys, 1))
            ys = jnp.where(ys > self.region_threshold, whole, ys)
        return self.linear(ys), carried


def conv_network(
    channels: int,
    neuron: Factory = general_lif,
    *,
    conv: Callable[..., Layer] = nnx.Conv,
    projection: Projection | None = sine,
    rngs: nnx.Rngs,
) -> Stacked:
    """Make two 3x3 convolutions from ``conv``, with neurons from ``neuron()``."""
    layers = [conv(channels, channels, (3, 3), rngs=rngs) for _ in range(2)]
    return Stacked(layers, [neuron(), neuron()], channels, projection=projection)


def lstm_network(
    channels: int,
    neuron: Factory = general_lif,
    *,
    projection: Projection = sine,
    rngs: nnx.Rngs,
) -> PersistentState:
    """Make a bidirectional LSTM over the pixels of a window, then neurons: 2 C."""
    layer = Bidirectional(channels, channels, rngs=rngs)
    return PersistentState(layer, neuron(), 2 * channels, projection=projection)
