"""The demo: several thresholds against one, on 8x8 handwritten digits.

    python -m experiments.digits --workdir runs/digits

Trains five networks that differ in their neurons alone, prints a table of accuracy,
time, spikes and energy, and writes it as summary.json and digits.png. With --neuron it
trains that one. A minute on two CPU cores; results in docs/results.md.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from spikejax.experiment import Experiment, NeuronName, main, run
from spikejax.experiment.cli import parse, reported
from spikejax.train import TrainConfig
from spikejax.train import workdir as folder
from spikejax.train.progress import table

NETWORKS: dict[str, tuple[NeuronName, int]] = {
    "LIF, T=1": ("lif", 1),
    "multi-threshold parallel, T=1": ("mt-parallel", 1),
    "multi-threshold cascade, T=1": ("mt-cascade", 1),
    "LIF, T=4": ("lif", 4),
    "ReLU (does not spike)": ("relu", 1),
}


@dataclasses.dataclass(frozen=True)
class Digits(Experiment):
    """All five networks, or one."""

    neuron: NeuronName | Literal["all"] = "all"
    """Activation; all trains each in turn and compares them."""

    def __post_init__(self):
        super().__post_init__()
        if self.neuron == "all" and self.time_steps != 1:
            raise ValueError(
                f"time_steps: expected one --neuron with it, got {self.time_steps} for "
                "all five networks, which have their own."
            )


DEFAULT = Digits(
    workdir=Path("runs/digits"),
    train=TrainConfig(epochs=30.0, batch_size=48, warmup=0.1, evaluate_every=10.0),
)


def compare(digits: Digits) -> list[dict[str, Any]]:
    """Train each of the networks in a folder of its own; one row of results each."""
    rows = []
    for name, (neuron, time_steps) in NETWORKS.items():
        print(f"{len(rows) + 1}/{len(NETWORKS)}  {name}")
        fields = {f.name: getattr(digits, f.name) for f in dataclasses.fields(digits)}
        workdir = digits.workdir / f"{neuron}-t{time_steps}"
        fields |= {"workdir": workdir, "neuron": neuron, "time_steps": time_steps}
        result = run(Experiment(**fields))
        if result is None:
            return []
        several = digits.num_thresholds if neuron.startswith("mt-") else 1
        setting = {"name": name, "neuron": neuron, "num_thresholds": several}
        rows.append(setting | {"time_steps": time_steps} | result)
    return rows


def show(rows: list[dict[str, Any]], workdir: Path) -> None:
    """Print the table, and write it as summary.json and digits.png."""
    from spikejax import plot

    folder.write(workdir / "summary.json", rows)
    table(
        "Handwritten digits, 297 test images",
        ["neuron", "accuracy", "seconds", "spikes/image", "nJ/image"],
        [
            [
                row["name"],
                f"{row['accuracy']:.2%}",
                f"{row['seconds']:.1f}",
                f"{row['spikes_per_image']:,.0f}",
                f"{row['energy_nj']:,.0f}",
            ]
            for row in rows
        ],
    )
    plot.comparison(rows).savefig(workdir / "digits.png", dpi=150)
    print(f"Written: {workdir}/summary.json, {workdir}/digits.png")


def demo(digits: Digits) -> None:
    """Compare all, or train the one that was asked for."""
    if digits.neuron != "all":
        main(digits)
    elif rows := compare(digits):
        show(rows, digits.workdir)


if __name__ == "__main__":
    reported(demo, parse(DEFAULT, __doc__))
