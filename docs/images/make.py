"""Draws the pictures of the documentation that need no training, beside this file.

    python docs/images/make.py

digits.png and convert.png are written by experiments/digits.py and convert.py,
accuracy.png and growth.png by benchmarks/accuracy.py and growth.py.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from spikejax import LIF, MultiThreshold, QuantReLU, neurons, plot

HERE = Path(__file__).parent
CURRENT = np.repeat([0.4, 1.2, 3.2, 0.0, 0.8, 2.1], [6, 6, 6, 4, 6, 6])
INPUT: Any = {"decay_input": False}  # from rest the membrane is then the input itself


def staircase() -> Figure:
    """The quantised ReLU and the IF neuron that takes its place."""
    quant = QuantReLU(2, noise=1.0, scale=1 / 3, rngs=nnx.Rngs(noise=0))
    figure = Figure(figsize=(6.8, 3.9), layout="constrained")
    axes = plot.staircase(quant, axes=figure.subplots())
    axes.set_xlabel("input, in thresholds")
    return figure


def response() -> Figure:
    """Parallel and cascade, equal and unequal thresholds."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot.response(
        {
            "parallel, N=4": MultiThreshold(4, **INPUT),
            "cascade, N=4": MultiThreshold(4, neurons.cascade, **INPUT),
            "LIF": LIF(**INPUT),
        },
        axes=left,
    )
    left.set_title("equal levels", loc="left")
    halving = neurons.dyadic_thresholds(4)
    plot.response(MultiThreshold(halving, neurons.cascade, **INPUT), axes=right)
    right.set_title("cascade, thresholds 1, 1/2, 1/4, 1/8", loc="left")
    return figure


def membrane() -> Figure:
    """The same current into one threshold and into four."""
    figure = Figure(figsize=(8, 6.4), layout="constrained")
    top, *below = figure.subplots(3, 1, sharex=True, height_ratios=(1, 2, 2.6))
    steps = np.arange(1, len(CURRENT) + 1)
    top.bar(steps, CURRENT, width=0.8, color=plot.GREY)
    top.set_ylabel("input")
    top.spines[["top", "right"]].set_visible(False)
    layers = {
        "LIF: at most one spike a step, and the rest piles up": LIF(**INPUT),
        "four thresholds: up to four spikes a step": MultiThreshold(4, **INPUT),
    }
    for axes, (title, layer) in zip(below, layers.items(), strict=True):
        plot.membrane(layer, CURRENT, axes=axes)
        axes.set_title(title, loc="left")
    below[0].set_xlabel("")
    return figure


def raster() -> Figure:
    """A layer of neurons with four thresholds under random currents."""
    currents = jax.random.gamma(jax.random.key(0), 0.8, (1, 30, 40))
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    plot.raster(MultiThreshold(4, **INPUT)(currents)[0], axes=figure.subplots())
    return figure


if __name__ == "__main__":
    for draw in (staircase, response, membrane, raster):
        path = HERE / f"{draw.__name__}.png"
        draw().savefig(path, dpi=130, metadata={"Software": None})
        print(f"{path} {path.stat().st_size / 1000:.0f} kB")
