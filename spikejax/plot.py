"""Pictures of neurons, readable by the colour-blind. Needs matplotlib.

Every function draws into ``axes``, or into a new figure (``axes.figure``) where none
are given, and returns them. None of them touches pyplot or its settings. Those of whole
networks are in ``spikejax.chart``.
"""

import io
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spikejax import neurons
from spikejax.layers import Neuron
from spikejax.nn.quant import QuantReLU, ScaledIF

# Okabe and Ito's colours without the yellow, which is faint on white.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, AMBER, BLACK = "#56B4E9", "#E69F00", "#000000"
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, AMBER, BLACK)
GREY, PALE = "#767676", "#dddddd"

POINTS = 2001  # inputs of a staircase
NOISY_POINTS, DRAWS = 400, 4000  # of noise, for its mean


class Picture(Figure):
    """A figure that a notebook shows where it is the value of a cell."""

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, dpi=100)
        return png.getvalue()


def own_axes(axes: Axes | None, width: float, height: float) -> Axes:
    """The axes given, or those of a new figure of that size in inches."""
    if axes is not None:
        return axes
    return Picture(figsize=(width, height), layout="constrained").subplots()


def frame(axes: Axes) -> None:
    """A pale grid, and no lines above and to the right."""
    axes.grid(color=PALE, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes, *handles, **options):
    """Right of the axes, where it covers nothing."""
    axes.legend(
        *handles, frameon=False, loc="upper left", bbox_to_anchor=(1, 1), **options
    )


def raster(spikes: ArrayLike, *, axes: Axes | None = None) -> Axes:
    """Who fires when: a dot for each neuron that does, larger and darker for more.

    Args:
        spikes: output of a layer for one example, [T, ...]; every place after T is a
            neuron, numbered from 0.
        axes: where to draw, a new figure by default.
    """
    counts = np.asarray(spikes)
    if counts.ndim < 2 or 0 in counts.shape:
        raise ValueError(
            f"raster: expected the spikes of one example, [T, ...], got shape "
            f"{counts.shape}. Of a batch, take one: spikes[0]."
        )
    counts = counts.reshape(len(counts), -1)
    steps, size = counts.shape
    axes = own_axes(axes, 6, 3.6)
    step, neuron = np.nonzero(counts)
    count = counts[step, neuron]
    most = count.max(initial=1)
    dot = np.clip(1200 / size, 4, 40)
    dots = axes.scatter(
        step + 1,
        neuron,
        s=dot * (0.4 + 0.6 * count / most),
        c=count,
        cmap="Blues",
        vmin=-0.6 * most,  # one spike among many is still seen
        vmax=most,
        linewidths=0,
    )
    shown = np.unique(count)
    if len(shown) > 1:
        handles = dots.legend_elements(num=list(shown) if len(shown) <= 6 else 5)
        _legend(axes, *handles, title="spikes", handletextpad=0)
    axes.set_xlim(0.5, steps + 0.5)
    axes.set_ylim(-0.7, size - 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    axes.set_xlabel("time step")
    axes.set_ylabel("neuron")
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def membrane(layer: Neuron, x: ArrayLike, *, axes: Axes | None = None) -> Axes:
    """The membrane of one neuron from rest, its thresholds, and its spikes above.

    The line rises or falls to the membrane after the input, u, and drops by the reset.

    Args:
        layer: a layer of neurons; its own membranes stay as they are.
        x: input current [T].
        axes: where to draw, a new figure by default.
    """
    x = jnp.asarray(x, jnp.float32)
    if x.ndim != 1 or not x.size:
        raise ValueError(
            f"membrane: expected the current of one neuron, [T], got shape {x.shape}."
        )
    current = x / layer.amplitude if isinstance(layer, ScaledIF) else x
    v = layer.rest(())
    times, values, trains = [0], [v], []
    for t in range(len(x)):
        values.append(layer.charge(v, current[t]))
        v, spikes = layer.step(v, current[t], trains=True)
        times += [t + 1, t + 1]
        values.append(v)
        trains.append(spikes)
    lines, fired = np.stack(values), np.stack(trains)

    axes = own_axes(axes, 7, 3.4)
    thresholds = sorted({float(theta) for theta in layer.params.thresholds})
    top = max(lines.max(), *thresholds)
    gap = 0.07 * (top - min(lines.min(), 0))
    for k, theta in enumerate(thresholds):
        label = "_" if k else ("thresholds" if len(thresholds) > 1 else "threshold")
        axes.axhline(theta, color=GREY, lw=1, ls=(0, (5, 4)), label=label)
    for k, line in enumerate(lines.reshape(len(times), -1).T):
        label = f"membrane {k + 1}" if lines.ndim > 1 else "membrane"
        axes.plot(times, line, color=COLOURS[k % len(COLOURS)], lw=1.8, label=label)
    for k in range(fired.shape[1]):
        steps = 1 + np.flatnonzero(fired[:, k])
        height = np.full(len(steps), top + (k + 1) * gap)
        label = "_" if k else "spikes"
        axes.plot(steps, height, "o", color=BLACK, ms=3.5, label=label)
    bottom, _ = axes.get_ylim()
    axes.spines["left"].set_bounds(bottom, top)
    axes.set_yticks([tick for tick in axes.get_yticks() if bottom <= tick <= top])
    axes.set_xlim(0, len(x) + 0.5)
    axes.set_ylim(bottom, top + (fired.shape[1] + 1) * gap)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.set_xlabel("time step")
    axes.set_ylabel("membrane")
    axes.set_title(_title(layer), loc="left")
    _legend(axes)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def response(
    layers: Neuron | Mapping[str, Neuron], *, axes: Axes | None = None
) -> Axes:
    """The answer of neurons at rest to one time step of input: staircases.

    Of a single layer whose thresholds have unequal weights, the number of spikes is
    drawn too.

    Args:
        layers: a layer of neurons, or several by name; their membranes stay as they
            are.
        axes: where to draw, a new figure by default.
    """
    named = {_title(layers): layers} if isinstance(layers, Neuron) else dict(layers)
    axes = own_axes(axes, 5.2, 3.6)
    top = max(_saturation(layer) for layer in named.values())
    x = jnp.linspace(-0.1 * top, 1.2 * top, POINTS)
    for k, (name, layer) in enumerate(named.items()):
        fresh = nnx.clone(layer)
        fresh.membrane = None
        output = np.asarray(fresh(x[:, None])[:, 0])
        count = np.asarray(fresh(x[:, None], trains=True)[:, 0].sum(-1))
        if len(named) == 1 and not np.allclose(count, output):
            axes.plot(x, count, color=ORANGE, lw=1.3, ls="--", label="number of spikes")
        # The first is the widest, so that it shows where they are equal.
        width = 2.2 + 1.4 * (len(named) - 1 - k)
        label = name if len(named) > 1 else "output"
        axes.plot(x, output, color=COLOURS[k % len(COLOURS)], lw=width, label=label)
    axes.set_xlabel("input current, one time step from rest")
    axes.set_ylabel("output")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if len(axes.lines) > 1:
        _legend(axes)
    if len(named) == 1:
        axes.set_title(" ".join(named), loc="left")
    frame(axes)
    return axes


def _saturation(layer):
    """An input from rest above which the answer changes no more."""
    leak, thresholds = layer.params
    values = [float(t) for t in thresholds]
    top = sum(values) if layer.cell is neurons.cascade else max(values)
    rest = layer.v_reset or 0.0
    scale = float(leak) if layer.decay_input else 1.0
    return (top - rest) / (scale or 1.0)


def _title(layer):
    several = layer.num_thresholds > 1
    cell = f", {layer.cell.__name__}, N={layer.num_thresholds}" if several else ""
    return type(layer).__name__ + cell


def staircase(
    quant: QuantReLU,
    time_steps: Sequence[int] = (1, 3, 8),
    *,
    axes: Axes | None = None,
) -> Axes:
    """The quantised ReLU, and the rate of the neuron in its place after T steps.

    With noise the mean answer of training is drawn too, over 4,000 draws.

    Args:
        quant: stays as it is.
        time_steps: the T to draw; at T = p the two staircases are one.
        axes: where to draw, a new figure by default.
    """
    axes = own_axes(axes, 6.8, 3.9)
    v_threshold = float(quant.scale[...]) * quant.levels
    x = jnp.linspace(-0.15 * v_threshold, 1.25 * v_threshold, POINTS)
    fresh = nnx.clone(quant)
    fresh.eval()
    name = f"quantised ReLU, p={quant.levels}"
    axes.plot(x, fresh(x[None])[0], color=AMBER, lw=7, alpha=0.5, label=name)
    if quant.noise:
        fresh.train()
        few = x[:: POINTS // NOISY_POINTS]
        mean = fresh(jnp.broadcast_to(few, (DRAWS, len(few)))).mean(0)
        axes.plot(few, mean, color=BLACK, lw=1.6, ls=":", label="its mean with noise")
    for k, steps in enumerate(time_steps):
        xs = jnp.broadcast_to(x, (1, steps, POINTS))
        rate = ScaledIF(v_threshold)(xs).mean(1)[0]
        colour = (SKY, BLUE, GREEN, PINK, ORANGE)[k % 5]
        axes.plot(x, rate, color=colour, lw=1.8, label=f"IF neuron, T={steps}")
    axes.set_xlabel("input")
    axes.set_ylabel("activation, or rate × threshold")
    _legend(axes)
    frame(axes)
    return axes
