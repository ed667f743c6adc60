"""Growth of a training step with time steps, batch and width.

    python -m benchmarks.growth --workdir runs/growth

Steps of ``spikejax.train.step`` over the three convolutions of ``make bench``, images
of 32x32x3. All sizes take turns, so that a change of the machine's speed falls on all;
each step is synchronised, and follows one of its own that does not count. CPU time is
that of all threads, and suffers less from other work.

"unit" is the time for one image, one time step and one multiply-accumulate of the
convolutions, to that of the smallest size: at most 1 is growth in proportion, or
better. Slopes are of log time against log size. Peak memory is the compiler's figure.
Prints tables, writes growth.json and growth.png; there a grey line starts from the
smallest size and grows as the operations do.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sides.ours import prepare
from benchmarks.turns import in_turns
from benchmarks.workloads import STRIDES, Sizes
from spikejax.experiment.cli import parse, run_cli
from spikejax.plot import BLUE, GREY, ORANGE, Picture, frame
from spikejax.train import workdir as folder
from spikejax.train.progress import table
from spikejax.train.recipe import check_settings


@dataclasses.dataclass(frozen=True)
class Growth:
    """Settings of the measurement."""

    workdir: Path = Path("runs/growth")
    """Folder for growth.json and growth.png."""
    repeats: int = 9
    """Timed steps of each size, each after one that is not."""

    def __post_init__(self):
        check_settings(self, {"repeats": ("at least 1", lambda n: n >= 1)})


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A quantity that grows, with all else in ``title``."""

    title: str
    mode: str
    """The neurons; see ``benchmarks.sides.ours``."""
    sizes: dict[float, Sizes]


def convolutions(batch_size: int, time_steps: int, width: float) -> Sizes:
    """Three of 64, 128 and 256 channels, times ``width``."""
    channels = tuple(round(width * full) for full in (64, 128, 256))
    return Sizes("convolutions", batch_size, time_steps, 32, channels)


SWEEPS = {
    "time steps": Sweep(
        "LIF, batch 4, width 1/4",
        "LIF",
        {t: convolutions(4, t, 1 / 4) for t in (1, 2, 4, 8, 16, 32, 64)},
    ),
    "batch": Sweep(
        "multi-threshold, T=1, width 1/4",
        "multi-threshold",
        {n: convolutions(n, 1, 1 / 4) for n in (8, 16, 32, 64, 128, 256)},
    ),
    "width": Sweep(
        "multi-threshold, T=1, batch 16",
        "multi-threshold",
        {w: convolutions(16, 1, w) for w in (1 / 4, 1 / 2, 1, 2)},
    ),
}


def operations(sizes: Sizes) -> int:
    """Multiply-accumulates of the convolutions in a forward pass over the batch."""
    count, side = 0, sizes.side
    pairs = zip((3, *sizes.channels), sizes.channels, STRIDES, strict=False)
    for inputs, outputs, stride in pairs:
        side //= stride
        count += 9 * inputs * outputs * side**2
    return count * sizes.batch_size * sizes.time_steps


def slope(rows: list[dict[str, Any]], what: str) -> float:
    """Return the exponent p of what = c size^p that fits best, in logarithms."""
    size, value = np.log([(row["size"], row[what]) for row in rows]).T
    return float(np.polyfit(size, value, 1)[0])


def measure(growth: Growth) -> list[dict[str, Any]]:
    """Return a row for each size of each sweep."""
    rows, steps = {}, {}
    for name, sweep in SWEEPS.items():
        print(f"{name}: {len(sweep.sizes)} steps to compile", flush=True)
        for size, sizes in sweep.sizes.items():
            made = prepare(sizes, sweep.mode)
            steps[name, size] = made.step
            rows[name, size] = {
                "grows": name,
                "title": sweep.title,
                "size": size,
                "sizes": dataclasses.asdict(sizes),
                "operations": operations(sizes),
                "compile_s": made.compile_s,
                "peak_mib": made.compiled_mib,
                "versions": made.versions,
                "device": made.device,
            }
    for key, times in in_turns(steps, growth.repeats).items():
        rows[key] |= times
    for (name, _), row in rows.items():
        first = rows[name, min(SWEEPS[name].sizes)]
        for unit, what in (("unit", "median_ms"), ("cpu_unit", "cpu_ms")):
            row[unit] = row[what] / first[what]
            row[unit] *= first["operations"] / row["operations"]
    return list(rows.values())


def show(name: str, rows: list[dict[str, Any]]) -> None:
    """Prints the table of one sweep, and its slopes."""
    table(
        f"{name.capitalize()}: {rows[0]['title']}",
        [name, "median ms", "CPU ms", "unit", "CPU unit", "peak MiB"],
        [
            [
                f"{row['size']:g}",
                f"{row['median_ms']:.1f}",
                f"{row['cpu_ms']:.1f}",
                f"{row['unit']:.2f}",
                f"{row['cpu_unit']:.2f}",
                f"{row['peak_mib']:.0f}",
            ]
            for row in rows
        ],
    )
    print(
        f"Slopes: time {slope(rows, 'median_ms'):.2f}, CPU time "
        f"{slope(rows, 'cpu_ms'):.2f}, operations {slope(rows, 'operations'):.2f}, "
        f"peak memory {slope(rows, 'peak_mib'):.2f}"
    )


def draw(rows: list[dict[str, Any]]) -> Picture:
    """Milliseconds against size, a panel a sweep."""
    names = list(dict.fromkeys(row["grows"] for row in rows))
    figure = Picture(figsize=(3.6 * len(names), 3.6), layout="constrained")
    for name, axes in zip(names, figure.subplots(1, len(names)), strict=True):
        some = [row for row in rows if row["grows"] == name]
        size = [row["size"] for row in some]
        median = [row["median_ms"] for row in some]
        low, high = np.transpose([row["quartiles_ms"] for row in some])
        share = [row["operations"] / some[0]["operations"] for row in some]
        in_proportion = [median[0] * part for part in share]
        axes.plot(size, in_proportion, color=GREY, lw=1.4, label="as operations grow")
        cpu = [row["cpu_ms"] for row in some]
        axes.plot(size, cpu, "s--", color=ORANGE, ms=4, lw=1.4, label="CPU time")
        axes.fill_between(size, low, high, color=BLUE, alpha=0.25, lw=0)
        axes.plot(size, median, "o-", color=BLUE, ms=4.5, lw=1.8, label="step")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=10)
        axes.set_xticks(size, [f"{value:g}" for value in size])
        axes.set_xlabel(name)
        slopes = f"slope {slope(some, 'median_ms'):.2f}"
        of_operations = f"operations' {slope(some, 'operations'):.2f}"
        axes.set_title(
            f"{some[0]['title']}\n{slopes}, {of_operations}", loc="left", fontsize=9
        )
        frame(axes)
    first = figure.axes[0]
    first.set_ylabel("milliseconds a training step")
    first.legend(frameon=False, fontsize=9)
    return figure


def main(growth: Growth) -> None:
    """Measure, print the tables, write growth.json and growth.png."""
    rows = measure(growth)
    path = growth.workdir / "growth.json"
    folder.write(path, rows)
    for name in SWEEPS:
        show(name, [row for row in rows if row["grows"] == name])
    draw(rows).savefig(path.with_suffix(".png"), dpi=150)
    print(f"Written: {path} and growth.png")


if __name__ == "__main__":
    run_cli(main, parse(Growth(), __doc__))
