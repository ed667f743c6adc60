"""Cost of layers of neurons: time and traffic against a copy of the same arrays.

    python -m benchmarks.neuron --workdir runs/neuron

The currents are float32 [B, T, 32, 32, 64]; B falls as T grows, so that their number
stays. A layer that goes over memory once reads the currents and writes the spikes. Its
gradient, forward and backward pass together, reads the currents and what comes back to
the spikes, and writes the gradient by the currents. The copies move those arrays and
compute next to nothing: x + 1, and a x + b g. So a ratio of 1 is the limit, 2 is the
time of a second pass over all of them.

The layers take turns; each step is synchronised, and follows one of its own that does
not count, as what others freed costs time. CPU time is that of all threads, and suffers
less from other work. "bytes" is what the compiler counts, to the least: 1 is one pass,
but what one fusion reads several times counts each time, though it comes from memory
once; where time is a loop it is left out, as the compiler counts the loop's body once.
"scratch" is memory beside those arrays, in parts of one of them. Prints two tables and
writes neuron.json.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.sides.ours import NEURONS, OPTIONS
from benchmarks.turns import in_turns, ratio
from spikejax import ALIF, ILIF, CubaLIF, MultiThreshold, RefractoryLIF, neurons
from spikejax.experiment.cli import parse, run_cli
from spikejax.nn.cpu import compiler_options
from spikejax.nn.psn import SlidingPSN
from spikejax.train import workdir as folder
from spikejax.train.progress import table
from spikejax.train.recipe import check_settings

COPY = "copy"
HALVING = neurons.dyadic_thresholds(4)
LAYERS: dict[str, Callable] = {
    **NEURONS,
    "dyadic": partial(MultiThreshold, HALVING, neurons.cascade, **OPTIONS),
    "independent": partial(MultiThreshold, 4, neurons.independent, **OPTIONS),
    "I-LIF": ILIF,
    "adaptive": partial(ALIF, **OPTIONS),
    "synaptic": partial(CubaLIF, **OPTIONS),
    "refractory": partial(RefractoryLIF, **OPTIONS),
    "sliding PSN": SlidingPSN,
}
PASSES = {"forward": 2, "gradient": 3}  # arrays that have to be read or written


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Settings of the measurement."""

    workdir: Path = Path("runs/neuron")
    """Folder for neuron.json."""
    repeats: int = 9
    """Timed steps of each layer, each after one that is not."""
    time_steps: tuple[int, ...] = (1, 4, 8, 16, 64)
    """Each T in turn."""
    maps: int = 128
    """Maps of currents, B times T."""
    side: int = 32
    """Height and width of a map."""
    channels: int = 64
    """Channels of a map."""

    def __post_init__(self):
        sizes = "repeats", "maps", "side", "channels"
        ranges: dict[str, Any] = dict.fromkeys(sizes, ("at least 1", lambda n: n >= 1))
        ranges["time_steps"] = (
            f"divisors of the {self.maps} maps",
            lambda every: every and all(n >= 1 and self.maps % n == 0 for n in every),
        )
        check_settings(self, ranges)


def gradient(layer: Callable, xs: jax.Array, gs: jax.Array) -> jax.Array:
    """Return the gradient by xs of the spikes, whose own gradient is gs."""
    return jax.vjp(layer, xs)[1](gs)[0]


def functions() -> dict[tuple[str, str], Callable]:
    """Return {(layer, pass): the function that is timed}."""
    made: dict[tuple[str, str], Callable] = {
        (COPY, "forward"): lambda xs: xs + 1,
        (COPY, "gradient"): lambda xs, gs: 0.5 * xs + 2 * gs,
    }
    for name, make in LAYERS.items():
        layer = make()
        made[name, "forward"] = layer
        made[name, "gradient"] = lambda xs, gs, f=layer: gradient(f, xs, gs)
    return made


def measure(given: Benchmark) -> list[dict[str, Any]]:
    """Return a row for each layer, pass and T."""
    return [row for steps in given.time_steps for row in _rows(given, steps)]


def _rows(given, time_steps):
    """Return the rows of one T, whose layers take turns."""
    side, maps = (given.side, given.side), given.maps // time_steps
    shape = maps, time_steps, *side, given.channels
    rng = np.random.default_rng(0)
    xs, gs = jax.device_put(rng.standard_normal((2, *shape), np.float32))
    arrays = {"forward": (xs,), "gradient": (xs, gs)}
    options = compiler_options(jax.default_backend())
    steps, facts = {}, {}
    for (name, which), function in functions().items():
        some = arrays[which]
        jitted = jax.jit(function, compiler_options=options)
        compiled = jitted.lower(*some).compile()
        steps[name, which] = _waits(compiled, some)
        cost: Any = compiled.cost_analysis()
        memory: Any = compiled.memory_analysis()
        least = PASSES[which] * xs.nbytes
        loops = " while(" in str(compiled.as_text())
        facts[name, which] = {
            "bytes_to_least": None if loops else cost["bytes accessed"] / least,
            "scratch_arrays": memory.temp_size_in_bytes / xs.nbytes,
        }
    times = in_turns(steps, given.repeats)
    rows = []
    for (name, which), row in times.items():
        copy = times[COPY, which]
        low, middle, high = ratio(row, copy)
        rows.append(
            {
                "layer": name,
                "pass": which,
                "time_steps": time_steps,
                "shape": shape,
                **row,
                "ratio": middle,
                "ratio_quartiles": [low, high],
                "cpu_ratio": row["cpu_ms"] / copy["cpu_ms"],
                **facts[name, which],
                "jax": jax.__version__,
                "device": jax.devices()[0].device_kind,
            }
        )
    return rows


def _waits(compiled, arrays):
    return lambda: jax.block_until_ready(compiled(*arrays))


def main(given: Benchmark) -> None:
    """Measure, print the tables, write neuron.json."""
    rows = measure(given)
    path = given.workdir / "neuron.json"
    folder.write(path, rows)
    for which in PASSES:
        table(
            f"{which.capitalize()} of {given.maps} maps of {given.side}x{given.side}x"
            f"{given.channels}. Ratios: to a copy",
            ["", "T", "ms", "CPU ms", "ratio", "CPU ratio", "bytes", "scratch"],
            [_cells(row) for row in rows if row["pass"] == which],
        )
    print(f"Written: {path}")


def _cells(row):
    low, high = row["ratio_quartiles"]
    return [
        row["layer"],
        str(row["time_steps"]),
        f"{row['median_ms']:.1f}",
        f"{row['cpu_ms']:.1f}",
        f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})",
        f"{row['cpu_ratio']:.2f}",
        "" if row["bytes_to_least"] is None else f"{row['bytes_to_least']:.2f}",
        f"{row['scratch_arrays']:.2f}",
    ]


if __name__ == "__main__":
    run_cli(main, parse(Benchmark(), __doc__))
