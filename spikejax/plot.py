"""Pictures of neurons and charts of networks, readable by the colour-blind.

Every function draws into ``axes``, or into a new figure (``axes.figure``) by default,
and returns them; ``comparison``, which has four, returns the figure. None of them
touches pyplot or its settings. Needs matplotlib.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spikejax import neurons
from spikejax.energy import Report
from spikejax.layers import Neuron
from spikejax.memory import drop_membranes
from spikejax.nn.quant import QuantReLU, ScaledIF

# Okabe and Ito's colours without the yellow, which is faint on white.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, AMBER, BLACK = "#56B4E9", "#E69F00", "#000000"
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, AMBER, BLACK)
GREY, PALE = "#767676", "#dddddd"
MARKERS = "os^Dv<>"
WHOLE: dict[str, Any] = {"integer": True, "min_n_ticks": 1}  # of ticks

POINTS = 2001  # inputs of a staircase
TOGETHER = neurons.lif, neurons.parallel, neurons.independent  # comparisons
NOISY_POINTS, DRAWS = 400, 4000  # the mean's error is then 0.5 s / sqrt(4000) at most

# key of a row -> title, unit of the axis, factor
PANELS = {
    "accuracy": ("Accuracy", "%", 100),
    "seconds": ("Training", "seconds", 1),
    "spikes_per_image": ("Spikes", "per image", 1),
    "energy_nj": ("Energy", "nJ per image", 1),
}


class Picture(Figure):
    """Figure that a notebook shows if it is the value of a cell."""

    # Without pyplot a figure has no representation of its own in a notebook.
    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, dpi=100)
        return png.getvalue()


def _or_new(axes: Axes | None, width: float, height: float) -> Axes:
    """Return the axes, or those of a new figure of that size in inches."""
    if axes is not None:
        return axes
    return Picture(figsize=(width, height), layout="constrained").subplots()


def frame(axes: Axes, *, grid: bool = True) -> Axes:
    """Remove the lines above and to the right, and add a pale grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(color=PALE, lw=0.8)
    return axes


def _legend(axes: Axes, *handles: Any, **options: Any) -> None:
    """Draw the legend right of the axes, where it covers nothing."""
    options = {"frameon": False, "loc": "upper left"} | options
    axes.legend(*handles, bbox_to_anchor=(1, 1), **options)


def raster(spikes: ArrayLike, *, axes: Axes | None = None) -> Axes:
    """Draw a dot for each neuron and step with spikes, larger and darker for more.

    Args:
        spikes: output of a layer for one example, [T, ...]; every place after T is a
            neuron, numbered from 0.

    Raises:
        ValueError: spikes have no time axis or no neurons.
    """
    counts = np.asarray(spikes)
    if counts.ndim < 2 or 0 in counts.shape:
        raise ValueError(
            f"raster: expected the spikes of one example, [T, ...], got shape "
            f"{counts.shape}. Of a batch, take one: spikes[0]."
        )
    counts = counts.reshape(len(counts), -1)
    steps, size = counts.shape
    axes = _or_new(axes, 6, 3.6)
    step, neuron = np.nonzero(counts)
    count = counts[step, neuron]
    most = count.max(initial=1)
    dots = axes.scatter(
        step + 1,
        neuron,
        s=np.clip(1200 / size, 4, 40) * (0.4 + 0.6 * count / most),
        c=count,
        cmap="Blues",
        vmin=-0.6 * most,  # from zero on, one spike among many would be white
        vmax=most,
        linewidths=0,
    )
    shown = np.unique(count)
    if len(shown) > 1:
        handles = dots.legend_elements(num=list(shown) if len(shown) <= 6 else 5)
        _legend(axes, *handles, title="spikes", handletextpad=0)
    axes.set(xlim=(0.5, steps + 0.5), xlabel="time step")
    axes.set(ylim=(-0.7, size - 0.3), ylabel="neuron")
    axes.locator_params("x", nbins=10, **WHOLE)
    axes.locator_params("y", nbins=6, **WHOLE)
    return frame(axes, grid=False)


def membrane(layer: Neuron, x: ArrayLike, *, axes: Axes | None = None) -> Axes:
    """Draw the membrane of one neuron from rest, its thresholds, its spikes above.

    The line rises or falls to the membrane after the input, u, and drops by the reset.

    Args:
        layer: a layer of neurons, not modified.
        x: input current [T].

    Raises:
        ValueError: x is not one-dimensional, or empty.
    """
    x = jnp.asarray(x, jnp.float32)
    if x.ndim != 1 or not x.size:
        raise ValueError(
            f"membrane: expected the current of one neuron, [T], got shape {x.shape}."
        )
    v = layer.start(())
    states = len(jax.tree.leaves(v))
    _check_spiking("membrane", layer, one=states == 1 and hasattr(layer.params, "leak"))
    values, trains = [v], []
    for current in x:
        u = layer.charge(v, current)
        v, spikes = layer.step(v, current, trains=True)
        values += [u, v]
        trains.append(spikes)
    lines, fired = np.stack(values), np.stack(trains)
    times = (np.arange(len(lines)) + 1) // 2  # u and v of a step are at one place

    axes = _or_new(axes, 7, 3.4)
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
    # The axis ends below the spikes, whose height means nothing.
    bottom, _ = axes.get_ylim()
    axes.spines["left"].set_bounds(bottom, top)
    axes.set_yticks([tick for tick in axes.get_yticks() if bottom <= tick <= top])
    axes.set(xlim=(0, len(x) + 0.5), xlabel="time step")
    axes.set(ylim=(bottom, top + (fired.shape[1] + 1) * gap), ylabel="membrane")
    axes.locator_params("x", nbins=10, **WHOLE)
    axes.set_title(_title(layer), loc="left")
    _legend(axes)
    return frame(axes, grid=False)


def response(
    layers: Neuron | Mapping[str, Neuron], *, axes: Axes | None = None
) -> Axes:
    """Draw the staircase from the input of one step to the output of resting neurons.

    For a single layer whose thresholds have unequal weights, the number of spikes is
    drawn too.

    Args:
        layers: a layer of neurons, or several by name, not modified.
    """
    named = {_title(layers): layers} if isinstance(layers, Neuron) else dict(layers)
    for layer in named.values():
        _check_spiking("response", layer)
    axes = _or_new(axes, 5.2, 3.6)
    top = max(_saturation(layer) for layer in named.values())
    x = jnp.linspace(-0.1 * top, 1.2 * top, POINTS)
    for k, (name, layer) in enumerate(named.items()):
        fresh = drop_membranes(nnx.clone(layer))
        output = np.asarray(fresh(x[:, None])[:, 0])
        count = np.asarray(fresh(x[:, None], trains=True)[:, 0].sum(-1))
        if len(named) == 1 and not np.allclose(count, output):
            axes.plot(x, count, color=ORANGE, lw=1.3, ls="--", label="number of spikes")
        # The first is the widest, so that it shows where they are equal.
        width = 2.2 + 1.4 * (len(named) - 1 - k)
        label = name if len(named) > 1 else "output"
        axes.plot(x, output, color=COLOURS[k % len(COLOURS)], lw=width, label=label)
    axes.locator_params("y", nbins=8, **WHOLE)
    if len(axes.lines) > 1:
        _legend(axes)
    if len(named) == 1:
        axes.set_title(" ".join(named), loc="left")
    axes.set(xlabel="input current, one time step from rest", ylabel="output")
    return frame(axes)


def _saturation(layer: Neuron) -> float:
    """Return an input above which the output of a resting neuron is constant."""
    values = [float(t) for t in layer.params.thresholds]
    # A cascade subtracts each threshold that it passed before it compares the next.
    top = max(values) if layer.cell in TOGETHER else sum(values)
    rest = layer.options.v_reset or 0.0
    leak = float(getattr(layer.params, "leak", 0.0))
    scale = leak if layer.options.decay_input else 1.0
    _, (_, size) = layer.bind()
    unit = 1.0 if size is None else float(size)
    return unit * (top - rest) / (scale or 1.0)


def _check_spiking(who: str, layer: Neuron, *, one: bool = True) -> None:
    held = (getattr(layer.params, "leak", 0), *getattr(layer.params, "thresholds", ()))
    if any(shapes := [np.shape(value) for value in held]):
        raise ValueError(
            f"{who}: expected one neuron, got a {type(layer).__name__} with parameters "
            f"of shape {max(shapes)}. Make one with numbers."
        )
    if layer.cell is neurons.integrate or not one:
        expected = "spiking neurons" if one else "neurons whose state is one membrane"
        raise ValueError(
            f"{who}: expected {expected}, such as LIF or MultiThreshold, got "
            f"{type(layer).__name__}."
        )


def _title(layer: Neuron) -> str:
    several = layer.num_thresholds > 1
    cell = f", {layer.cell.__name__}, N={layer.num_thresholds}" if several else ""
    return type(layer).__name__ + cell


def staircase(
    quant: QuantReLU, time_steps: Sequence[int] = (1, 3, 8), *, axes: Axes | None = None
) -> Axes:
    """Draw a quantised ReLU and the rate of its IF neuron after T steps.

    With noise, the mean output of training is drawn too, over 4,000 draws.

    Args:
        quant: the quantised ReLU with p levels, not modified.
        time_steps: values of T; at T = p the two staircases are equal.
    """
    axes = _or_new(axes, 6.8, 3.9)
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
        colour = (SKY, BLUE, GREEN, PINK, ORANGE)[k % 5]  # amber and black are taken
        axes.plot(x, rate, color=colour, lw=1.8, label=f"IF neuron, T={steps}")
    axes.set(xlabel="input", ylabel="activation, or rate × threshold")
    _legend(axes)
    return frame(axes)


def accuracy_by_steps(
    accuracies: Mapping[str, Sequence[float]], *, axes: Axes | None = None
) -> Axes:
    """Draw accuracy against the number of time steps.

    Args:
        accuracies: name -> accuracy (0 to 1) after 1, 2, ... steps, as from
            ``evaluate_steps``; at least one.
    """
    axes = _or_new(axes, 7, 4)
    longest = max(len(values) for values in accuracies.values())
    shown = [2**k for k in range(longest.bit_length())]
    for k, (name, values) in enumerate(accuracies.items()):
        axes.plot(
            range(1, len(values) + 1),
            100 * np.asarray(values),
            color=COLOURS[k % len(COLOURS)],
            marker=MARKERS[k % len(MARKERS)],
            markevery=[steps - 1 for steps in shown if steps <= len(values)],
            ls="-" if k % 2 == 0 else "--",  # colour alone is not enough in grey print
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(shown, [str(steps) for steps in shown])
    axes.set(xlabel="time steps", ylabel="accuracy, %")
    axes.legend(frameon=False)
    return frame(axes)


def rates(report: Report, *, axes: Axes | None = None) -> Axes:
    """Draw the spikes per neuron and time step of each layer, the first on top.

    Args:
        report: from ``energy.measure``.

    Raises:
        ValueError: no neuron of the network spikes.
    """
    rows = report.neurons
    if not rows:
        raise ValueError("rates: expected a report with spiking neurons, got none.")
    axes = _or_new(axes, 5.5, 1 + 0.32 * len(rows))
    parts = [("", BLUE, [row.rate for row in rows])]
    _bars(axes, [row.path for row in rows], parts, "{:.3f}".format)
    axes.set_xlabel("spikes per neuron and time step")
    return axes


def energy_bars(reports: Mapping[str, Report], *, axes: Axes | None = None) -> Axes:
    """Draw the energy per image of several networks: of spikes, and of the rest.

    Args:
        reports: name -> report, from ``energy.measure``; at least one.
    """
    axes = _or_new(axes, 6.5, 1.2 + 0.42 * len(reports))
    parts = [
        ("accumulates (spikes)", BLUE, [r.ac_nj for r in reports.values()]),
        ("multiply-accumulates", ORANGE, [r.mac_nj for r in reports.values()]),
    ]
    _bars(axes, list(reports), parts, _three_digits)
    axes.set_xlabel("energy, nJ per image")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return axes


def comparison(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw accuracy, training time, spikes and energy of several settings.

    Args:
        rows: each with name, accuracy (0 to 1), seconds, spikes_per_image, energy_nj;
            at least one.
    """
    figure = Picture(figsize=(11, 1.3 + 0.42 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    names = [row["name"] for row in rows]
    for axes, (key, (title, unit, factor)) in zip(panels, PANELS.items(), strict=True):
        values = [float(row[key]) * factor for row in rows]
        if key == "accuracy":
            # Points, as bars from zero would all look the same.
            axes.plot(values, range(len(names)), "o", color=ORANGE, markersize=9)
            margin = max(0.2, 0.15 * (max(values) - min(values)))
            axes.set_xlim(min(values) - margin, max(values) + margin)
            axes.grid(axis="y", color=PALE)
            style: dict[str, Any] = {"textcoords": "offset points", "ha": "center"}
            for k, value in enumerate(values):
                axes.annotate(f"{value:.2f}", (value, k), (0, 7), fontsize=9, **style)
            _name_rows(axes, names)
        else:
            _bars(axes, names, [("", BLUE, values)], _three_digits)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel(unit)
    return figure


def _bars(
    axes: Axes,
    names: Sequence[str],
    parts: Sequence[tuple[str, str, Sequence[float]]],
    text: Callable[[float], str],
) -> None:
    """Draw a bar per name, of parts (label, colour, values) end to end, and its sum."""
    y, ends = range(len(names)), np.zeros(len(names))
    for label, colour, values in parts:
        bars = axes.barh(y, values, 0.6, left=ends, color=colour, label=label)
        ends = ends + np.asarray(values)
    axes.set_xlim(0, 1.3 * (ends.max() or 1))  # the sum is written beside its bar
    axes.bar_label(bars, [text(end) for end in ends], padding=4, fontsize=9)
    _name_rows(axes, names)


def _three_digits(value: float) -> str:
    """Return thousands in full, one decimal below 100."""
    return "0" if value == 0 else f"{value:,.{0 if value >= 100 else 1}f}"


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Write the names at the left, the first on top, and nothing else around."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter("{x:,.6g}")
