"""The demo: several thresholds against one, on 8x8 handwritten digits.

    python -m experiments.digits --workdir runs/digits

Trains five networks that differ in their neurons alone, prints a table of accuracy,
time, spikes and energy, and writes it as summary.json and digits.png. With --neuron it
trains that one. A minute on two CPU cores; results in docs/results.md.
"""

import sys
from pathlib import Path
from typing import Any

from spikejax.encode import normalised
from spikejax.experiment import (
    Experiment,
    MultiThresholdOptions,
    main,
    open_images,
    run,
)
from spikejax.experiment.cli import checked, flatten, override, parse, run_cli
from spikejax.train import TrainConfig, processes, workdir
from spikejax.train.progress import table

DEFAULT = Experiment(
    workdir=Path("runs/digits"),
    activation=MultiThresholdOptions("mt-parallel", num_thresholds=4),
    train=TrainConfig(epochs=30.0, batch_size=48, warmup=0.1, evaluate_every=10.0),
)


NETWORKS: dict[str, dict[str, Any]] = {
    "LIF, T=1": {"neuron": "lif"},
    "multi-threshold parallel, T=1": {"neuron": "mt-parallel"},
    "multi-threshold cascade, T=1": {"neuron": "mt-cascade"},
    "LIF, T=4": {"neuron": "lif", "time_steps": 4},
    "ReLU (does not spike)": {"neuron": "relu"},
}


def compare(digits: Experiment) -> None:
    """Train the five networks in folders of their own; print and write the table."""
    if digits.time_steps != 1:
        raise ValueError(
            f"time_steps: expected one --neuron with it, got {digits.time_steps} for "
            "all five networks, which have their own."
        )
    rows = []
    with processes.distributed(digits.processes, flatten(digits)):
        task = open_images(digits)
        data = task.data
        for name, flags in NETWORKS.items():
            if processes.is_primary():
                print(f"{len(rows) + 1}/{len(NETWORKS)}  {name}")
            folder = f"{flags['neuron']}-t{flags.get('time_steps', 1)}"
            flags = flags | {"workdir": digits.workdir / folder}
            experiment = checked(override(digits, flags))
            encode = normalised(data.mean, data.std, experiment.time_steps)
            result = run(experiment, task._replace(encode=encode))
            if result is None:  # stopped by SIGTERM
                return
            row = {"name": name, "neuron": flags["neuron"]}
            row["num_thresholds"] = experiment.activation.num_thresholds
            rows.append(row | {"time_steps": experiment.time_steps} | result)
    if processes.is_primary():
        title = f"{flatten(digits)['data']}, {len(data.test):,} test images"
        show(title, rows, digits.workdir)


def show(title: str, rows: list[dict[str, Any]], folder: Path) -> None:
    """Print the table, and write it as summary.json and digits.png."""
    from spikejax import plot

    workdir.write(folder / "summary.json", rows)
    table(
        title,
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
    plot.comparison(rows).savefig(folder / "digits.png", dpi=150)
    print(f"Written: {folder}/summary.json, {folder}/digits.png")


def command() -> None:
    """Compare all, or train the one that --neuron names."""
    one = any(word.split("=")[0] == "--neuron" for word in sys.argv)
    run_cli(main if one else compare, parse(DEFAULT, __doc__))


if __name__ == "__main__":
    command()
