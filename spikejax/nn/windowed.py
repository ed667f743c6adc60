"""The windowed spiking layer: windows of a map, visited one after another.

The membranes that one window leaves enter the next, so neurons see each other within
one time step. Only this is sequential, and it is elementwise: convolutions and LSTMs
see all the windows at once.

Reference: Training a General SNN with Improved Efficiency and Minimum Latency, 2024,
arXiv:2401.10843, after the authors' code.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax import surrogate
from spikejax._compat import List
from spikejax.layers import LIF, Neuron
from spikejax.nn.convolution import convolve
from spikejax.nn.recurrent import Bidirectional
from spikejax.nn.windows import Window, split, stitch, tile

Binarise = Callable[[jax.Array, jax.Array], jax.Array]  # (x, random key) -> spikes
Projection = Callable[[jax.Array, jax.Array], jax.Array]  # two membranes -> one

# The authors' neuron: u = 0.4 v + x, fires at 0.5 with derivative [|u - 0.5| < 0.5].
TAU = 1 / 0.6
FIRING = {"v_threshold": 0.5, "surrogate": surrogate.rectangle()}
general_lif = partial(LIF, tau=TAU, decay_input=False, **FIRING)


def bernoulli(x: jax.Array, rng: jax.Array) -> jax.Array:
    """z = [x > U(0, 1)], without a gradient, as the authors have it.

    The layers before learn through what goes around this one.
    """
    x = jax.lax.stop_gradient(x)
    # The same numbers as for x.shape; six axes take eight times as long to compile.
    u = jax.random.uniform(rng, (x.size,), x.dtype).reshape(x.shape)
    return (x > u).astype(x.dtype)


def straight_through(x: jax.Array, rng: jax.Array) -> jax.Array:
    """``bernoulli`` with the gradient of its mean, clip(x, 0, 1). Our choice."""
    mean = jnp.clip(x, 0, 1)
    return bernoulli(x, rng) + (mean - jax.lax.stop_gradient(mean))


def threshold(x: jax.Array, rng: jax.Array) -> jax.Array:
    """z = [x >= 1/2], with the gradient of clip(x, 0, 1) and no noise. Our choice."""
    return _HALF(x - 0.5)


def unchanged(x: jax.Array, rng: jax.Array) -> jax.Array:
    """x itself, for a network that does not spike."""
    return x


_HALF = surrogate.rectangle()


def sine(a: jax.Array, b: jax.Array) -> jax.Array:
    """F(a, b) = 2 sin(pi/4 a cos(pi/4 b)), in [-2, 2]; near zero it is pi/2 a."""
    return 2 * jnp.sin(math.pi / 4 * a * jnp.cos(math.pi / 4 * b))


def mean(a: jax.Array, b: jax.Array) -> jax.Array:
    """F(a, b) = (a + b) / 2."""
    return (a + b) / 2


class Network(Protocol):
    """What a mixer runs over its windows.

    features: channels that come out. carries: whether membranes go on to the next
    block, which costs weights between stages.
    """

    features: int
    carries: bool

    def __call__(
        self, xs: jax.Array, carried: Any = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """(spikes, membranes to carry on) of windows [B, T, G, h, w, C]."""
        ...


class Stacked(nnx.Module):
    """Layers, each with neurons that start at rest in the first window of a block.

    u_k[g] = charge(start_k[g], layer_k(z_(k-1)[g])),  z_k[g] = fire(u_k[g])
    start_1[g] = u_1[g-1],  start_k[g] = F(u_(k-1)[g-1], u_k[g-1])

    Args:
        layers: callables from [B, T, G, h, w, C] to currents, such as nnx.Conv.
        neurons: as many spikejax neurons; any other function, as a ReLU, is without
            membrane.
        features: channels of the last layer.
        projection: F, sine or mean or any function of two membranes.
        carry_reset: carry the membrane as it is after the reset of a spike. The
            authors do not reset it: what is carried is u.
    """

    carries = False

    def __init__(
        self,
        layers: Sequence[Callable],
        neurons: Sequence[Callable],
        features: int,
        *,
        projection: Projection = sine,
        carry_reset: bool = False,
    ):
        self.layers = List(layers)
        self.neurons = List(neurons)
        self.features = features
        self.projection = projection
        self.carry_reset = carry_reset

    def __call__(
        self, xs: jax.Array, carried: None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Spikes [B, T, G, h, w, features] of windows, and None: nothing is carried."""
        below: list[jax.Array] = []
        for layer, neuron in zip(self.layers, self.neurons, strict=True):
            currents = _windows(layer(xs))
            v, here, spikes = _rest(neuron, currents[0]), [], []
            for g, x in enumerate(currents):
                if g and below:
                    v = _project(self.projection, below[g - 1], v)
                v, z = _fire(neuron, v, x, self.carry_reset)
                here.append(v)
                spikes.append(z)
            xs, below = jnp.stack(spikes, -4), here
        return xs, carried


class Lasting(nnx.Module):
    """One layer with neurons whose membranes M last from block to block.

    M'[g], z[g] = fire(start[g], layer(x)[g])
    start[1] = F(M[1], M[2]),  start[2] = F(M'[1], M[2])
    start[g] = F(M[g], M'[g-1])  for g = 3, 4

    With one window for the whole map, start = M. The first block starts at rest.
    F(0, b) is 0, so in the first block the third and fourth window see none before
    them. Arguments are those of ``Stacked``, for one layer.
    """

    def __init__(
        self,
        layer: Callable,
        neuron: Callable,
        features: int,
        *,
        projection: Projection = sine,
        carry_reset: bool = False,
    ):
        self.layer = layer
        self.neuron = neuron
        self.features = features
        self.carries = isinstance(neuron, Neuron)
        self.projection = projection
        self.carry_reset = carry_reset

    def __call__(
        self, xs: jax.Array, carried: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Spikes [B, T, G, h, w, features] and M' of windows and their M."""
        currents = _windows(self.layer(xs))
        if carried is None:
            old = [_rest(self.neuron, x) for x in currents]
        else:
            old = _windows(carried)
        project = partial(_project, self.projection)
        new, spikes = [], []
        for g, x in enumerate(currents):
            if len(old) == 1:
                v = old[0]
            elif g < 2:
                v = project(new[0] if g else old[0], old[1])
            else:
                v = project(old[g], new[g - 1])
            v, z = _fire(self.neuron, v, x, self.carry_reset)
            new.append(v)
            spikes.append(z)
        return jnp.stack(spikes, -4), jnp.stack(new, -4) if self.carries else None


def _windows(xs):
    return [xs[..., g, :, :, :] for g in range(xs.shape[-4])]


def _rest(neuron, x):
    return neuron.start(x.shape) if isinstance(neuron, Neuron) else jnp.zeros_like(x)


def _fire(neuron, v, x, carry_reset):
    """What the membranes v become with the currents x of one window, and its spikes."""
    if not isinstance(neuron, Neuron):
        return v, neuron(x)
    after, z = neuron.step(v, x)
    return (after if carry_reset else neuron.charge(v, x)), z


def _project(projection, a, b):
    v = projection(a, b)
    if v.shape != a.shape:
        raise ValueError(
            f"projection: expected a function that keeps the shape of two membranes "
            f"{a.shape}, got {v.shape}. Take sine or mean, or work elementwise."
        )
    return v


class Mixer(nnx.Module):
    """Four windows of a map, binarised, through one spiking network, stitched again.

    y = W stitch(network(binarise(split(x)))) + b

    Args:
        channels: of the map that comes out.
        network: a Network, whose weights all the windows share, as of
            ``conv_network`` and ``lstm_network``.
        window: tile, overlap or whole.
        binarise: bernoulli, straight_through, threshold, or any (x, random key) -> z.
            Evaluation draws random numbers too, as the authors do.
        region_threshold: what is above it after stitching becomes 1, without a
            gradient; None leaves the means as they are.
        rngs: source of the weights, and of the random numbers, its stream 'noise'. As
            for QuantReLU, each layer draws a stream of its own from it.

    Reference: arXiv:2401.10843; straight-through and threshold are our choice.
    """

    def __init__(
        self,
        channels: int,
        network: Network,
        *,
        window: Window = tile,
        binarise: Binarise = bernoulli,
        region_threshold: float | None = None,
        rngs: nnx.Rngs,
    ):
        if "noise" not in rngs and "default" not in rngs:
            raise ValueError(
                f"Mixer: expected rngs with a stream 'noise', got {', '.join(rngs)}. "
                "Give nnx.Rngs(seed), or nnx.Rngs(params=seed, noise=seed)."
            )
        self.network = network
        self.window = window
        self.binarise = binarise
        self.region_threshold = region_threshold
        self.linear = nnx.Linear(
            network.features,
            channels,
            kernel_init=nnx.initializers.xavier_uniform(),
            rngs=rngs,
        )
        self.rngs = rngs["noise"].fork()

    def __call__(
        self, xs: jax.Array, carried: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The mixed maps, and the membranes for the next block.

        Args:
            xs: maps [B, T, H, W, C]; time steps do not see each other.
            carried: membranes [B, T, H, W, C'] of the block before, None at the start
                or where the network has none.
        """
        if xs.ndim != 5:
            raise ValueError(
                f"Mixer: expected maps [B, T, H, W, C], got shape {xs.shape}. For one "
                "time step, add the time axis: x[:, None]."
            )
        sides = xs.shape[2], xs.shape[3]
        parts = self.binarise(split(xs, self.window), self.rngs())
        if carried is not None:
            carried = split(carried, self.window)
        spikes, carried = self.network(parts, carried)
        ys = stitch(spikes, sides, self.window)
        if carried is not None:
            carried = stitch(carried, sides, self.window)
        if self.region_threshold is not None:
            ys = jnp.where(ys > self.region_threshold, 1, ys)
        return self.linear(ys), carried


class Tokens(nnx.Module):
    """A layer of sequences [..., L, C] over maps [..., h, w, C], row by row."""

    def __init__(self, layer: Callable):
        self.layer = layer

    def __call__(self, xs: jax.Array) -> jax.Array:
        """[..., h, w, C'] for maps [..., h, w, C]."""
        *lead, height, width, channels = xs.shape
        ys = self.layer(xs.reshape(*lead, height * width, channels))
        return ys.reshape(*lead, height, width, -1)


def conv_network(
    channels: int, neuron: Callable = general_lif, *, rngs: nnx.Rngs, **options
) -> Stacked:
    """Two 3x3 convolutions with neurons, from ``neuron()``; options of ``Stacked``."""
    conv = partial(nnx.Conv, conv_general_dilated=convolve)
    layers = [conv(channels, channels, (3, 3), rngs=rngs) for _ in range(2)]
    return Stacked(layers, [neuron(), neuron()], channels, **options)


def lstm_network(
    channels: int, neuron: Callable = general_lif, *, rngs: nnx.Rngs, **options
) -> Lasting:
    """A bidirectional LSTM over the pixels of a window, then neurons; 2 C come out."""
    layer = Tokens(Bidirectional(channels, channels, rngs=rngs))
    return Lasting(layer, neuron(), 2 * channels, **options)
