"""Figures: settings compared, and what a neuron answers. Needs matplotlib."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spikejax import neurons
from spikejax.layers import Neuron

BLUE, ORANGE = "#0072B2", "#D55E00"  # told apart by the colour-blind
# key of a row -> title, unit of the axis, factor
PANELS = {
    "accuracy": ("Accuracy", "%", 100),
    "seconds": ("Training", "seconds", 1),
    "spikes_per_image": ("Spikes", "per image", 1),
    "energy_nj": ("Energy", "nJ per image", 1),
}


def accuracy_bars(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy, training time, spikes and energy of several settings, side by side.

    Accuracies are points on an axis that is cut off, since their differences are small;
    the other three are bars from zero.

    Args:
        rows: each with name, accuracy (0 to 1), seconds, spikes_per_image, energy_nj.
    """
    missing = sorted({k for row in rows for k in ("name", *PANELS) if k not in row})
    if missing or not rows:
        raise ValueError(
            f"accuracy_bars: expected at least one row with name, {', '.join(PANELS)}, "
            f"got {len(rows)} rows; missing: {', '.join(missing) or 'all'}."
        )
    figure = Figure(figsize=(11, 1.3 + 0.42 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    places = range(len(rows))
    for axes, (key, (title, unit, factor)) in zip(panels, PANELS.items(), strict=True):
        values = [float(row[key]) * factor for row in rows]
        if key == "accuracy":
            axes.plot(values, places, "o", color=ORANGE, markersize=9)
            margin = max(0.2, 0.15 * (max(values) - min(values)))
            axes.set_xlim(min(values) - margin, max(values) + margin)
            axes.grid(axis="y", color="#dddddd")
            axes.set_yticks(places, [row["name"] for row in rows])
        else:
            axes.barh(places, values, height=0.6, color=BLUE)
            axes.set_xlim(0, 1.3 * (max(values) or 1))
        _label(axes, values, places, percent=key == "accuracy")
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel(unit)
        _strip(axes)
    panels[0].set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    return figure


def _label(axes, values, places, *, percent):
    """The value right of each bar, or above each point."""
    for value, place in zip(values, places, strict=True):
        # Three digits, and thousands in full.
        text = f"{value:.2f}" if percent else f"{value:,.{0 if value >= 100 else 1}f}"
        axes.annotate(
            "0" if value == 0 else text,
            (value, place),
            xytext=(0, 7) if percent else (4, 0),
            textcoords="offset points",
            ha="center" if percent else "left",
            va="bottom" if percent else "center",
            fontsize=9,
        )


def _strip(axes):
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter("{x:,.6g}")


def response(layer: Neuron, *, axes: Axes | None = None, points: int = 2001) -> Axes:
    """The answer of a neuron at rest to one time step of input, a staircase.

    Where thresholds have unequal weights, the number of spikes is drawn too.

    Args:
        layer: a layer of neurons; its membranes stay as they are.
        axes: where to draw, a new figure by default.
        points: inputs that are tried, from below zero to where the answer is largest.
    """
    fresh = nnx.clone(layer)
    fresh.membrane = None
    top = _saturation(layer)
    x = jnp.linspace(-0.1 * top, 1.2 * top, points)
    output = np.asarray(fresh(x[:, None])[:, 0])
    count = np.asarray(fresh(x[:, None], trains=True)[:, 0].sum(-1))
    if axes is None:
        axes = Figure(figsize=(5, 3.6), layout="constrained").subplots()
    weighted = not np.allclose(count, output)
    if weighted:
        axes.plot(x, count, color=ORANGE, lw=1.5, ls="--", label="number of spikes")
    axes.plot(x, output, color=BLUE, lw=2.5, label="output")
    axes.set_xlabel("input current, one time step from rest")
    axes.set_ylabel("output")
    axes.set_title(_title(layer), loc="left")
    if weighted:
        axes.legend(frameon=False, loc="upper left")
    axes.grid(color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
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
