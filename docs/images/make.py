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

from spikejax import (
    ALIF,
    IF,
    ILIF,
    LI,
    LIF,
    CubaLIF,
    MultiThreshold,
    NeuronParams,
    QuantReLU,
    RefractoryLIF,
    neurons,
    plot,
)
from spikejax.layers import Neuron

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


def kinds() -> Figure:
    """Draw the answers of each kind of neuron to the same current."""
    halving = neurons.dyadic_thresholds(3)
    made = {
        "IF": IF(),
        "LIF, tau=4": LIF(4.0, **INPUT),
        "LIF, hard reset": LIF(4.0, v_reset=0.0, **INPUT),
        "LI, tau=4": LI(4.0),
        "four thresholds": MultiThreshold(4, **INPUT),
        "halving thresholds": MultiThreshold(
            halving, neurons.cascade, tau=np.inf, v_start=1 / 8, **INPUT
        ),
        "four plain neurons": MultiThreshold(4, neurons.independent, **INPUT),
        "I-LIF, D=4": ILIF(4),
        "signed": Neuron(neurons.parallel, NeuronParams(0.5, (0.5, -0.5), (0.5, -0.5))),
        "ALIF": ALIF(4.0, tau_adaptation=8.0, strength=4.0, **INPUT),
        "CubaLIF": CubaLIF(4.0, tau_synapse=4.0, **INPUT),
        "RefractoryLIF": RefractoryLIF(2, 4.0, **INPUT),
    }
    current = np.concatenate([CURRENT[:22], np.repeat([-1.2, 0.6], [5, 7])])
    steps = np.arange(1, len(current) + 1)
    figure = Figure(figsize=(10, 7), layout="constrained")
    grid = figure.subplots(4, 3, sharex=True, sharey=True)
    for axes, (name, layer) in zip(grid.flat, made.items(), strict=True):
        answer = layer(jax.numpy.asarray(current[None, :, None], np.float32))
        axes.step(steps, current, where="mid", color=plot.GREY, lw=1.2)
        axes.bar(steps, np.ravel(answer), width=0.7, color=plot.COLOURS[0])
        axes.set_title(name, loc="left")
        plot.frame(axes, grid=False)
    for axes in grid[-1]:
        axes.set_xlabel("time step")
    return figure


# Of docs/results.md: minutes of one core for an epoch, and test accuracy in % after
# each, computed as in training, with bfloat16 operands.
EPOCHS = {
    "four thresholds, T=1": (
        2.0,
        (68.1, 71.3, 74.4, 80.4, 77.8, 78.2, 84.5, 86.1, 88.4, 90.5, 91.6, 91.7),
    ),
    "one threshold, T=4": (
        7.75,
        (50.8, 62.1, 68.4, 60.2, 71.9, 67.2, 78.8, 81.5, 84.7, 88.0, 89.3, 89.9),
    ),
}


def cifar10() -> Figure:
    """Accuracy against minutes of training, of two networks of twelve epochs."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, (minutes, values)), colour in zip(
        EPOCHS.items(), (plot.ORANGE, plot.BLUE), strict=True
    ):
        x = minutes * np.arange(1, len(values) + 1)
        axes.plot(x, values, "o-", color=colour, ms=4.5, lw=1.8)
        where = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(name, (x[-1], values[-1]), color=colour, **where)
    axes.set_xlim(0, 132)
    axes.set_xticks(range(0, 121, 20))
    axes.set_xlabel("minutes of training on one core")
    axes.set_ylabel("CIFAR-10, test accuracy in %")
    plot.frame(axes)
    return figure


if __name__ == "__main__":
    for draw in (staircase, response, membrane, raster, kinds, cifar10):
        path = HERE / f"{draw.__name__}.png"
        draw().savefig(path, dpi=130, metadata={"Software": None})
        print(f"{path} {path.stat().st_size / 1000:.0f} kB")
