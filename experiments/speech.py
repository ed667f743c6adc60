"""Train a spiking network on speech, or on other sequences of vectors.

    python -m experiments.prepare spoken_digit
    python -m experiments.speech --workdir runs/speech
    python -m experiments.speech --workdir runs/jackson --hold-out jackson --recurrent
    python -m experiments.speech --workdir runs/shd --data shd --data-dir DIR

spoken-digit are ten digits by six speakers as log-mel frames; --hold-out tests on one
speaker. shd and ssc are spikes of a cochlea model: DIR has their files .h5. mnist-1d
needs the package of that name. Sequences have their own lengths: what pads a batch
counts in no loss, accuracy or energy. A few minutes of a CPU core; docs/results.md has
results, docs/sequences.md explains lengths.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from spikejax.data import sequences, speech
from spikejax.data.sequences import SequenceSet
from spikejax.encode import currents
from spikejax.experiment import (
    Experiment,
    Inputs,
    SequenceOptions,
    SingleOptions,
    Task,
    report,
    train,
)
from spikejax.experiment.cli import flatten, parse, run_cli
from spikejax.train import TrainConfig, processes
from spikejax.train.progress import table
from spikejax.train.recipe import Ranges, check_settings


@dataclasses.dataclass(frozen=True)
class Speech(Inputs):
    """A set of sequences."""

    over = "sequences"

    data: Literal["spoken-digit", "shd", "ssc", "mnist-1d"] = "spoken-digit"
    """Set: spoken-digit of TFDS, shd and ssc as h5 files, or mnist-1d."""
    data_dir: Path | None = None
    """Folder of TFDS's sets, or of the h5 files."""
    hold_out: str | None = None
    """Speaker of spoken-digit to test on, such as jackson; by default speakers are
    mixed, and recordings 0 to 4 of each are the test split."""
    coding: Literal["current", "delta"] = "current"
    """Input of spoken-digit: log-mel frames, or spikes where they change."""
    step_ms: float = 16.0
    """Milliseconds of a time step."""
    validation: bool = False
    """Test on a part of the train split, to choose flags by."""

    def __post_init__(self):
        ranges: Ranges = {"step_ms": ("0.125 to 1000", lambda ms: 0.125 <= ms <= 1000)}
        check_settings(self, ranges)
        other, digits = self.data != "spoken-digit", self.data == "mnist-1d"
        for name, default, useless in (
            ("hold_out", None, other),
            ("coding", "current", other),
            ("step_ms", 16.0, digits),
            ("data_dir", None, digits),
        ):
            if useless and (value := getattr(self, name)) != default:
                raise ValueError(
                    f"{name}: expected no such flag for --data {self.data}, got "
                    f"{value}. Leave it out."
                )


DEFAULT = Experiment(
    workdir=Path("runs/speech"),
    inputs=Speech(),
    network=SequenceOptions(),
    activation=SingleOptions("lif"),
    time_steps=48,
    train=TrainConfig(
        epochs=30.0,
        batch_size=64,
        optimizer="adamw",
        learning_rate=5e-3,
        weight_decay=0.01,
        clip=1.0,
        evaluate_every=5.0,
    ),
)


def load(inputs: Speech, time_steps: int) -> SequenceSet:
    """Return the set of the flags, padded to so many steps."""
    part = {"validation": inputs.validation}
    if inputs.data == "mnist-1d":
        return sequences.mnist_1d(time_steps, **part)
    options = inputs.data_dir, time_steps
    if inputs.data != "spoken-digit":
        return sequences.heidelberg(
            inputs.data, *options, step_ms=inputs.step_ms, **part
        )
    return speech.spoken_digit(
        *options,
        step_ms=inputs.step_ms,
        threshold=speech.DELTA if inputs.coding == "delta" else None,
        hold_out=inputs.hold_out,
        **part,
    )


def main(experiment: Experiment) -> None:
    """Train and report."""
    inputs = experiment.inputs
    assert isinstance(inputs, Speech)
    with processes.distributed(experiment.processes, flatten(experiment)):
        task = Task(load(inputs, experiment.time_steps), currents)
        fitted = train(experiment, task)
        if not fitted.finished:
            return
        result = report(experiment, fitted, task, split=task.data.split)
    if processes.is_primary():
        table(
            f"Test split: {result['split']}",
            ["accuracy", "parameters", "seconds", "spikes", "energy, nJ"],
            [
                [
                    f"{result['accuracy']:.2%} of {len(task.data.test)}",
                    f"{result['parameters']:,}",
                    f"{result['seconds']:.0f}",
                    f"{result['spikes_per_image']:,.0f}",
                    f"{result['energy_nj']:,.1f}",
                ]
            ],
        )


if __name__ == "__main__":
    run_cli(main, parse(DEFAULT, __doc__))
