"""General SNN beside its relatives: accuracy, spikes and energy of one architecture.

    python -m experiments.general --workdir runs/general

Trains five networks that differ in their spiking layer alone, at a quarter of the
width: General SNN with the authors' Bernoulli input, with straight-through gradients,
and with our multi-threshold neurons; the same network with ReLU for its neurons; and
an LIF network without windows, at four time steps. With --network it trains that one.
Prints a table and writes summary.json. Rerun the same command to resume. The recipe is
that of docs/general.md, but for 4 epochs in place of 300, a longer warm-up, gradients
clipped at norm 1, and crop and flip alone. docs/results.md has the results.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from spikejax.encode import normalised
from spikejax.experiment import (
    Experiment,
    GeneralOptions,
    Images,
    SingleOptions,
    open_images,
    run,
)
from spikejax.experiment.cli import checked, flatten, override, parse, run_cli
from spikejax.train import TrainConfig, processes, workdir
from spikejax.train.progress import table

NETWORKS: dict[str, dict[str, Any]] = {
    "bernoulli": {},
    "straight-through": {"binarise": "straight-through"},
    "multi-threshold": {"binarise": "straight-through", "neuron": "mt-parallel"},
    "relu": {"neuron": "relu"},
    "lif-t4": {
        "model": "general-plain",
        "binarise": "straight-through",
        "time_steps": 4,
    },
}

SHARED = Experiment(
    workdir=Path("runs/general"),
    inputs=Images("cifar10", augment="crop-flip"),
    network=GeneralOptions("general-cnn", width=0.25),
    activation=SingleOptions("lif"),
    label_smoothing=0.1,
    train=TrainConfig(
        epochs=4.0,
        batch_size=128,
        learning_rate=0.05,
        warmup=0.25,
        weight_decay=2e-5,
        clip=1.0,  # our choice: so short a warm-up diverged with the recipe's 20
    ),
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Comparison of all five networks, or one of them."""

    experiment: Experiment = SHARED
    """The flags that the networks share."""
    network: Literal[
        "all", "bernoulli", "straight-through", "multi-threshold", "relu", "lif-t4"
    ] = "all"
    """Network to train; all trains each in turn and compares them."""

    def __post_init__(self):
        flags, shared = flatten(self.experiment), flatten(SHARED)
        own = {"binarise", "neuron", "num_thresholds", "time_steps"}
        if flags["model"] not in ("general-cnn", "general-lstm"):
            raise ValueError(
                f"model: expected general-cnn or general-lstm, got {flags['model']}."
            )
        for name in sorted(own.union(*(NETWORKS[each] for each in self.names))):
            if flags.get(name) != shared.get(name):
                raise ValueError(
                    f"{name}: expected no such flag, as --network {self.network} sets "
                    f"it, got {flags.get(name)}."
                )

    @property
    def names(self) -> list[str]:
        """Names of the networks to train."""
        return list(NETWORKS) if self.network == "all" else [self.network]


DEFAULT = Comparison()


def compare(comparison: Comparison) -> list[dict[str, Any]]:
    """Train each network in a folder of its own; return one row of results for each."""
    rows, shared = [], comparison.experiment
    task = open_images(shared)
    data = task.data
    for name in (names := comparison.names):
        if processes.is_primary():
            print(f"{len(rows) + 1}/{len(names)}  {name}")
        flags = {"workdir": shared.workdir / name} | NETWORKS[name]
        experiment = checked(override(shared, flags))
        encode = normalised(data.mean, data.std, experiment.time_steps)
        result = run(experiment, task._replace(encode=encode))
        if result is None:  # stopped by SIGTERM
            return []
        rows.append({"name": name} | NETWORKS[name] | result)
    return rows


def show(comparison: Comparison) -> None:
    """Compare, print the table, and write it as summary.json."""
    with processes.distributed(comparison.experiment.processes, flatten(comparison)):
        rows = compare(comparison)
    if not rows or not processes.is_primary():
        return
    folder = comparison.experiment.workdir
    workdir.write(folder / "summary.json", rows)
    table(
        "One architecture; energy in nJ per image: real-valued inputs cost MACs",
        ["network", "accuracy", "spikes", "ACs", "MACs", "energy", "dense"],
        [
            [
                row["name"],
                f"{row['accuracy']:.2%}",
                f"{row['spikes_per_image']:,.0f}",
                f"{row['energy_nj'] - row['mac_nj']:,.0f}",
                f"{row['mac_nj']:,.0f}",
                f"{row['energy_nj']:,.0f}",
                f"{row['ann_energy_nj']:,.0f}",
            ]
            for row in rows
        ],
    )
    print(f"Written: {folder}/summary.json")


if __name__ == "__main__":
    run_cli(show, parse(DEFAULT, __doc__))
