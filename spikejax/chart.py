"""Charts that compare networks, readable by the colour-blind. Needs matplotlib.

Every function draws into ``axes``, or into a new figure (``axes.figure``) where none
are given, and returns them; ``comparison``, which has four, returns the figure.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spikejax.plot import BLUE, COLOURS, ORANGE, PALE, Picture, frame, own_axes

MARKERS = "os^Dv<>"

# key of a row -> title, unit of the axis, factor
PANELS = {
    "accuracy": ("Accuracy", "%", 100),
    "seconds": ("Training", "seconds", 1),
    "spikes_per_image": ("Spikes", "per image", 1),
    "energy_nj": ("Energy", "nJ per image", 1),
}


def accuracy_by_steps(
    accuracies: Mapping[str, Sequence[float]], *, axes: Axes | None = None
) -> Axes:
    """Accuracy against the number of time steps.

    Args:
        accuracies: name -> accuracy (0 to 1) after 1, 2, ... steps, as from
            ``evaluate_steps``.
        axes: where to draw, a new figure by default.
    """
    axes = own_axes(axes, 7, 4)
    most = max((len(values) for values in accuracies.values()), default=0)
    if not most:
        raise ValueError("accuracy_by_steps: expected at least one accuracy, got none.")
    shown = [2**k for k in range(most.bit_length())]
    for k, (name, values) in enumerate(accuracies.items()):
        axes.plot(
            range(1, len(values) + 1),
            100 * np.asarray(values),
            color=COLOURS[k % len(COLOURS)],
            marker=MARKERS[k % len(MARKERS)],
            markevery=[steps - 1 for steps in shown if steps <= len(values)],
            ls="-" if k % 2 == 0 else "--",
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(shown, [str(steps) for steps in shown])
    axes.set_xlabel("time steps")
    axes.set_ylabel("accuracy, %")
    axes.legend(frameon=False)
    frame(axes)
    return axes


def rates(report: Any, *, axes: Axes | None = None) -> Axes:
    """Spikes per neuron and time step of each layer, the first on top.

    Args:
        report: from ``energy.measure``.
        axes: where to draw, a new figure by default.
    """
    rows = report.neurons
    if not rows:
        raise ValueError("rates: expected a report with spiking neurons, got none.")
    axes = own_axes(axes, 5.5, 1 + 0.32 * len(rows))
    rate = [("", BLUE, [row.rate for row in rows])]
    _bars(axes, [row.path for row in rows], rate, "{:.3f}".format)
    axes.set_xlabel("spikes per neuron and time step")
    return axes


def energy_bars(reports: Mapping[str, Any], *, axes: Axes | None = None) -> Axes:
    """Energy of an image in several networks: that of spikes, and of the rest.

    Args:
        reports: name -> report, from ``energy.measure``.
        axes: where to draw, a new figure by default.
    """
    if not reports:
        raise ValueError("energy_bars: expected at least one report, got none.")
    axes = own_axes(axes, 6.5, 1.2 + 0.42 * len(reports))
    parts = [
        ("accumulates (spikes)", BLUE, [r.ac_nj for r in reports.values()]),
        ("multiply-accumulates", ORANGE, [r.mac_nj for r in reports.values()]),
    ]
    _bars(axes, list(reports), parts, _three_digits)
    axes.set_xlabel("energy, nJ per image")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return axes


def comparison(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy, training time, spikes and energy of several settings, side by side.

    Accuracies are points on an axis that is cut off, since their differences are small;
    the other three are bars from zero.

    Args:
        rows: each with name, accuracy (0 to 1), seconds, spikes_per_image, energy_nj.
    """
    missing = sorted({k for row in rows for k in ("name", *PANELS) if k not in row})
    if missing or not rows:
        raise ValueError(
            f"comparison: expected at least one row with name, {', '.join(PANELS)}, "
            f"got {len(rows)} rows; missing: {', '.join(missing) or 'all'}."
        )
    figure = Picture(figsize=(11, 1.3 + 0.42 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    names = [row["name"] for row in rows]
    for axes, (key, (title, unit, factor)) in zip(panels, PANELS.items(), strict=True):
        values = [float(row[key]) * factor for row in rows]
        if key == "accuracy":
            _points(axes, names, values)
        else:
            _bars(axes, names, [("", BLUE, values)], _three_digits)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel(unit)
    return figure


def _points(axes, names, values):
    """A point for each name, its value above it."""
    places = range(len(names))
    axes.plot(values, places, "o", color=ORANGE, markersize=9)
    margin = max(0.2, 0.15 * (max(values) - min(values)))
    axes.set_xlim(min(values) - margin, max(values) + margin)
    axes.grid(axis="y", color=PALE)
    for value, place in zip(values, places, strict=True):
        _write(axes, f"{value:.2f}", (value, place), (0, 7), ha="center", va="bottom")
    _rows(axes, names)


def _bars(axes, names, parts, text):
    """A bar for each name, of parts (label, colour, values) end to end, and its sum."""
    ends = np.zeros(len(names))
    for label, colour, values in parts:
        axes.barh(range(len(names)), values, 0.6, left=ends, color=colour, label=label)
        ends = ends + np.asarray(values)
    axes.set_xlim(0, 1.3 * (ends.max() or 1))
    for place, end in enumerate(ends):
        _write(axes, text(end), (end, place), (4, 0), ha="left", va="center")
    _rows(axes, names)


def _three_digits(value):
    """Thousands in full."""
    return "0" if value == 0 else f"{value:,.{0 if value >= 100 else 1}f}"


def _write(axes, text, place, offset, **align):
    axes.annotate(
        text, place, xytext=offset, textcoords="offset points", fontsize=9, **align
    )


def _rows(axes, names):
    """The names at the left, the first on top, and nothing else around."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter("{x:,.6g}")
