"""Time in order, or all of it together: three ways to compute a layer of neurons.

    python -m benchmarks.parallel --workdir runs/parallel

"loop" is the loop of any cell, which computes the states a second time for its backward
pass. "membrane" is the one that ``unroll`` takes for neurons of one membrane. "scan"
computes the gradient of all steps together, by an associative scan of

    d_u[t] = b[t] + a[t] d_u[t+1],  a[t] = (1 - leak) dv'[t]/du[t]

Spikes are equal bit for bit, and gradients up to rounding. Forward, a network whose
spikes are guessed and corrected would need such a scan in each of many passes: "scan"
is one pass of it, with all spikes known.

The ways take turns, each step after one of its own that does not count; ratios are of
CPU time, to "loop". "scratch" is memory beside input, output and their gradients, in
parts of one of them. Prints a table and writes parallel.json.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.turns import in_turns
from spikejax.experiment.cli import parse, run_cli
from spikejax.layers import LIF, MultiThreshold
from spikejax.train import workdir as folder
from spikejax.train.progress import table
from spikejax.train.recipe import Ranges, check_settings
from spikejax.unroll import unroll

NEURONS = {
    "LIF": partial(LIF, decay_input=False),
    "multi-threshold": partial(MultiThreshold, 4, decay_input=False),
}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Settings of the measurement."""

    workdir: Path = Path("runs/parallel")
    """Folder for parallel.json."""
    repeats: int = 9
    """Timed steps of each way, each after one that is not."""
    time_steps: tuple[int, ...] = (32, 128, 512)
    """Each T in turn."""
    widths: tuple[int, ...] = (128, 512)
    """Numbers of neurons."""
    batch_size: int = 16
    """Sequences."""

    def __post_init__(self):
        ranges: Ranges = {
            "repeats": ("at least 1", lambda n: n >= 1),
            "time_steps": (
                "above 4, which unroll writes out",
                lambda t: t and min(t) > 4,
            ),
            "widths": ("at least 1", lambda widths: widths and min(widths) >= 1),
            "batch_size": ("at least 1", lambda n: n >= 1),
        }
        check_settings(self, ranges)


def recurrence(a: jax.Array, b: jax.Array, reverse: bool = False) -> jax.Array:
    """Return h[t] = a[t] h[t-1] + b[t] for all t, which is axis 1."""

    def join(one, other):
        return other[0] * one[0], other[0] * one[1] + other[1]

    return jax.lax.associative_scan(join, (a, b), reverse=reverse, axis=1)[1]


def scanned(step: Any, params: Any) -> Callable:
    """Return xs -> spikes, from rest, whose gradient is an associative scan.

    Args:
        step, params: of a layer with decay_input=False (``Neuron.bind``).
    """
    keep = 1 - params[0].leak

    @jax.custom_vjp
    def run(xs):
        return forward(xs)[0]

    def forward(xs):
        def with_u(_, v, x):
            u = step.charge(params, v, x)
            v, y = step.fire(params, u)
            return v, (y, u)

        return unroll(with_u, None, jnp.zeros_like(xs[:, 0]), xs)[1]

    def backward(us, d_ys):
        (v, _), pull = jax.vjp(partial(step.fire, params), us)
        (kept,), (given,) = (
            pull((jnp.ones_like(v), jnp.zeros_like(d_ys))),
            pull((jnp.zeros_like(v), d_ys)),
        )
        return (recurrence(keep * kept, given, reverse=True),)

    run.defvjp(forward, backward)
    return run


def one_pass(step: Any, params: Any) -> Callable:
    """Return xs -> spikes of membranes without reset, by an associative scan."""
    keep = 1 - params[0].leak

    def run(xs):
        return step.fire(params, recurrence(jnp.full_like(xs, keep), xs))[1]

    return run


def ways(name: str) -> dict[tuple[str, str], Callable]:
    """Return {(way, pass): the function that is timed}."""
    step, params = NEURONS[name]().bind()

    def in_order(cell, xs):
        return unroll(cell, params, jnp.zeros_like(xs[:, 0]), xs)[1]

    def gradient(run, xs, d_ys):
        ys, pull = jax.vjp(run, xs)
        return ys, pull(d_ys)[0]

    # A function has no phases, so this is the loop of any cell.
    loop = partial(in_order, lambda *given: step(*given))
    membrane, scan = partial(in_order, step), scanned(step, params)
    found = {"loop": loop, "membrane": membrane, "scan": scan}
    gradients = {(w, "gradient"): partial(gradient, run) for w, run in found.items()}
    forward = {"loop": loop, "membrane": membrane, "scan": one_pass(step, params)}
    return {**{(w, "forward"): run for w, run in forward.items()}, **gradients}


def measure(given: Benchmark) -> list[dict[str, Any]]:
    """Return a row for each neuron, size, way and pass."""
    shapes = [
        (given.batch_size, steps, width)
        for steps in given.time_steps
        for width in given.widths
    ]
    return [
        row
        for name in NEURONS
        for shape in shapes
        for which in ("forward", "gradient")
        for row in _rows(given, name, shape, which)
    ]


def _rows(given, name, shape, which):
    rng = np.random.default_rng(0)
    arrays = jax.device_put(rng.standard_normal((2, *shape), np.float32))
    arrays = list(arrays)[: 1 if which == "forward" else 2]
    steps, scratch, answers = {}, {}, {}
    for (way, part), function in ways(name).items():
        if part == which:
            compiled = jax.jit(function).lower(*arrays).compile()
            memory: Any = compiled.memory_analysis()
            scratch[way] = memory.temp_size_in_bytes / arrays[0].nbytes
            answers[way] = compiled(*arrays)
            steps[way] = partial(_wait, compiled, arrays)
    if which == "gradient":
        for way in ("membrane", "scan"):
            (ys, d_xs), (expected, d_expected) = answers[way], answers["loop"]
            np.testing.assert_array_equal(ys, expected)
            np.testing.assert_allclose(d_xs, d_expected, 1e-4, 1e-5)
    times = in_turns(steps, given.repeats)
    loop = times["loop"]["cpu_ms"]
    return [
        {
            "neuron": name,
            "shape": shape,
            "pass": which,
            "way": way,
            **row,
            "cpu_ratio": row["cpu_ms"] / loop,
            "scratch_arrays": scratch[way],
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
        }
        for way, row in times.items()
    ]


def _wait(compiled, arrays):
    return jax.block_until_ready(compiled(*arrays))


def main(given: Benchmark) -> None:
    """Measure, print the table, write parallel.json."""
    rows = measure(given)
    path = given.workdir / "parallel.json"
    folder.write(path, rows)
    columns = ["", "[B, T, n]", "pass", "way", "CPU ms", "CPU ratio", "scratch"]
    table("Ratios: to the loop of any cell", columns, [_cells(row) for row in rows])
    print(f"Written: {path}")


def _cells(row):
    names = row["neuron"], str(list(row["shape"])), row["pass"], row["way"]
    figures = row["cpu_ms"], row["cpu_ratio"], row["scratch_arrays"]
    return [*names, *(f"{figure:.2f}" for figure in figures)]


if __name__ == "__main__":
    run_cli(main, parse(Benchmark(), __doc__))
