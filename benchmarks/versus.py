"""spikejax against SpikingJelly, snnTorch and Spyx, side by side in one run.

    python -m benchmarks.versus --workdir runs/bench --peers .venv-peers/bin/python

``make bench`` installs the other libraries in .venv-peers and runs it; those that are
not there are left out, with a line that says so. ``benchmarks/workloads.py`` says what
is computed. Ratios are medians over turns, in which each library takes one synchronised
step; brackets hold quartiles. "first s" is the first call and what it compiled, "loss"
that of the first step, the same for networks that compute the same. Peak memory is the
kernel's figure; "by XLA" is the compiler's, without what convolutions take besides.

A quiet machine is needed: threads that wait for one another by spinning, as PyTorch's
do, suffer most from other work. Prints tables, writes bench.json and bench.png; rows of
workloads that were not measured again stay in both.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from benchmarks import turns
from benchmarks.workloads import WORKLOADS, Workload
from spikejax.experiment.cli import parse, run_cli
from spikejax.plot import BLUE, COLOURS, GREY, Picture
from spikejax.train import workdir as folder
from spikejax.train.progress import table
from spikejax.train.recipe import Ranges, check_settings

GET = "`make bench` installs it in .venv-peers; --peers PATH is another interpreter."


@dataclasses.dataclass(frozen=True)
class Versus:
    """Settings of the comparison."""

    workdir: Path = Path("runs/bench")
    """Folder for bench.json, bench.png and what the workers print."""
    peers: Path = Path(".venv-peers/bin/python")
    """Interpreter that has the other libraries."""
    workload: Literal[
        "all",
        "step",
        "linear",
        "spikingjelly",
        "resnet18",
        "whitened",
        "latency",
        "stream",
    ] = "all"
    """One comparison, or all of them."""
    repeats: int | None = None
    """Timed steps of each network, after two that are not; by default, more where a
    step is short."""
    threads: int = 0
    """Processors for each library; 0 takes all."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Where every library computes."""
    neurons: int = 512
    """Width of the workload linear."""

    def __post_init__(self):
        ranges: Ranges = {
            "repeats": ("at least 1", lambda n: n >= 1),
            "threads": (
                f"0 (all) to {turns.processors()}, the processors here",
                lambda n: 0 <= n <= turns.processors(),
            ),
            "neurons": ("at least 1", lambda n: n >= 1),
        }
        check_settings(self, ranges)


def measure(name: str, workload: Workload, given: Versus) -> list[dict[str, Any]]:
    """Return the rows of one workload."""
    threads = given.threads or turns.processors()
    env = turns.environment(threads, given.device)
    logs = given.workdir / "logs"
    logs.mkdir(parents=True, exist_ok=True)

    def start(run, env=env):
        if run.library != "spikejax" and not peers.exists():
            raise turns.Missing(str(given.peers))
        log = logs / f"{name}-{run.label.replace(' ', '-').replace(',', '')}.log"
        command = turns.command(run, workload.sizes, peers, threads)
        return turns.Worker(command, log, env)

    peers = given.peers.absolute()
    repeats = given.repeats or workload.repeats
    rows = turns.take_turns(
        workload.runs, start, repeats, lambda line: print(f"{name}: {line}", flush=True)
    )
    if workload.peak:
        print(f"{name}: peak memory", flush=True)
        gives_back = env | turns.GIVES_BACK
        turns.add_peaks(rows, workload.runs, lambda run: start(run, gives_back))
    turns.compare(workload, rows)
    shared = {"workload": name, "title": workload.title, "threads": threads}
    return [shared | row for row in rows]


def show(workload: Workload, rows: list[dict[str, Any]]) -> None:
    """Prints the table of one workload, and what is missing in it."""
    ran = [row for row in rows if "ratio" in row]
    if ran:
        columns = ["", "median ms", "CPU ms", "ratio", "first s", "loss"]
        columns += ["peak MiB", "by XLA"] if workload.peak else []
        title = f"{workload.title}. Ratio: to {ran[0]['reference']}"
        table(title, columns, [_cells(row)[: len(columns)] for row in ran])
    for label, other in workload.pairs:
        found = {row["label"]: row for row in ran}
        if label in found and other in found:
            low, middle, high = turns.ratio(found[label], found[other])
            print(f"{label} to {other}: {middle:.2f} ({low:.2f} to {high:.2f})")
    for row in rows:
        if "error" in row:
            print(f"{row['label']}: {row['error']}")
    missing = {row["library"]: row["missing"] for row in rows if "missing" in row}
    for what in dict.fromkeys(missing.values()):
        names = ", ".join(name for name, lacks in missing.items() if lacks == what)
        print(f"Left out, as there is no {what}: {names}. {GET}")


def _cells(row):
    low, high = row["ratio_quartiles"]
    return [
        row["label"],
        _digits(row["median_ms"]),
        _digits(row["cpu_ms"]),
        f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})",
        f"{row['first_call_s']:.1f}",
        f"{row['first_loss']:.6g}",
        _whole(row.get("peak_mib")),
        _whole(row["compiled_mib"]),
    ]


def _whole(value):
    return "" if value is None else f"{value:,.0f}"


def _digits(value):
    """Three digits, and thousands in full."""
    places = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{places}f}"


def draw(rows: list[dict[str, Any]]) -> Picture:
    """Milliseconds of each run, a panel a workload, ours in blue."""
    names = [name for name in WORKLOADS if _ran(rows, name)]
    heights = [1 + len(_ran(rows, name)) for name in names]
    figure = Picture(figsize=(8, 0.6 + 0.27 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(names), squeeze=False, height_ratios=heights)
    libraries = list(turns.SIDES)
    for name, axes in zip(names, panels[:, 0], strict=True):
        ran = _ran(rows, name)
        values = [row["median_ms"] for row in ran]
        colours = [COLOURS[libraries.index(row["library"])] for row in ran]
        low, high = zip(*(row["quartiles_ms"] for row in ran), strict=True)
        spread = [
            [v - x for v, x in zip(values, low, strict=True)],
            [x - v for v, x in zip(values, high, strict=True)],
        ]
        places = range(len(ran))
        axes.barh(places, values, 0.7, color=colours, xerr=spread, ecolor=GREY)
        for place, (value, end) in enumerate(zip(values, high, strict=True)):
            axes.annotate(
                _digits(value),
                (end, place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        axes.set_xlim(0, 1.12 * max(high))
        axes.set_ylim(len(ran) - 0.4, -0.6)
        axes.set_yticks(places, [row["label"] for row in ran])
        axes.tick_params(axis="y", length=0)
        for label, row in zip(axes.get_yticklabels(), ran, strict=True):
            label.set_color(BLUE if row["library"] == "spikejax" else "black")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_title(ran[0]["title"], loc="left", fontsize=10, weight="bold")
        axes.set_xlabel("milliseconds")
    return figure


def _ran(rows, name):
    return [row for row in rows if row["workload"] == name and "ratio" in row]


def main(given: Versus) -> None:
    """Measure, print the tables, write bench.json and bench.png."""
    path = given.workdir / "bench.json"
    kept = json.loads(path.read_text()) if path.exists() else []
    for name, workload in WORKLOADS.items():
        if given.workload not in ("all", name):
            continue
        if name == "linear":
            sizes = dataclasses.replace(workload.sizes, channels=(given.neurons,))
            title = f"{workload.title}, n={given.neurons}"
            workload = dataclasses.replace(workload, sizes=sizes, title=title)
        rows = measure(name, workload, given)
        show(workload, rows)
        kept = [row for row in kept if row["workload"] != name] + rows
        folder.write(path, kept)
    if any("ratio" in row for row in kept):
        draw(kept).savefig(path.with_suffix(".png"), dpi=150)
    print(f"Written: {path} and bench.png")


if __name__ == "__main__":
    run_cli(main, parse(Versus(), __doc__))
