"""Convert a ReLU network, then train it on as a spiking one, for few time steps.

    python -m experiments.hybrid runs/relu --workdir runs/hybrid --time-steps 2

The first word is the folder of a run of ours with --neuron relu. Its thresholds are
found on training images; then weights and thresholds are trained with surrogate
gradients, with the data, batch size and loss of that run. Writes result.json. Rerun the
same command to resume.

Reference: Rathi et al. 2020, arXiv:2005.01807, who convert and then train.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from spikejax import energy
from spikejax.conversion import calibrate, convert, least_error
from spikejax.conversion.steps import evaluate_steps
from spikejax.data import images
from spikejax.experiment import (
    MultiThresholdOptions,
    SingleOptions,
    open_images,
    read_relu,
    train,
)
from spikejax.experiment.build import THRESHOLDS
from spikejax.experiment.cli import Positional, parse, run_cli
from spikejax.train import workdir
from spikejax.train.recipe import Ranges, check_settings

SAMPLE = 256  # training images that thresholds are found on
ENERGY_IMAGES = 32


@dataclasses.dataclass(frozen=True)
class Hybrid:
    """A ReLU network, and the spiking one that starts from it."""

    relu: Positional[str] = ""
    """Folder of a run with --neuron relu."""
    workdir: Path = Path("runs/hybrid")
    """Folder of the spiking network."""
    num_thresholds: int = 4
    """Thresholds of the spiking neurons."""
    time_steps: int = 1
    """Number of time steps T."""
    epochs: float = 3.0
    """Passes over the training images, in whole batches each."""
    learning_rate: float = 0.05
    """Peak learning rate."""
    data_dir: Path | None = None
    """Folder of the data; TFDS's own folder by default."""

    def __post_init__(self):
        ranges: Ranges = {
            "num_thresholds": THRESHOLDS,
            "time_steps": ("1 to 10000", lambda n: 1 <= n <= 10000),
            "epochs": ("more than 0", lambda x: x > 0),
            "learning_rate": ("more than 0", lambda x: x > 0),
        }
        check_settings(self, ranges)


DEFAULT = Hybrid()


def run(flags: Hybrid) -> dict[str, Any] | None:
    """Convert and train; write result.json.

    Returns:
        its content, or None if SIGTERM stopped the run.
    """
    if not flags.relu:
        raise ValueError("relu: expected the folder of a ReLU run, got none.")
    relu, steps = read_relu(flags.relu, flags.data_dir), flags.time_steps
    count = flags.num_thresholds
    several = MultiThresholdOptions(num_thresholds=count)
    experiment = dataclasses.replace(
        relu,
        workdir=flags.workdir,
        activation=several if count > 1 else SingleOptions("if"),
        time_steps=steps,
        train=dataclasses.replace(
            relu.train,
            epochs=flags.epochs,
            steps=None,
            learning_rate=flags.learning_rate,
        ),
    )
    start, task = open_images(relu), open_images(experiment)
    crop = task.crops[1]
    raw = images.sample(task.data.train, SAMPLE, crop)
    sample = start.encode(jnp.asarray(raw["image"]), jax.random.key(0))
    trained = train(relu, start)
    if not trained.finished:
        return None

    def rule(x: jax.Array, levels: int) -> jax.Array:
        return least_error(x, count * steps)

    ann = calibrate(trained.model, sample, rule=rule).model
    snn, _ = convert(ann, sample, count)
    batches = images.eval_batches(task.data.test, relu.train.batch_size, crop=crop)
    before = float(evaluate_steps(snn, batches, start.encode, steps).accuracy[-1])
    print(f"ReLU {trained.metrics['accuracy']:.2%}, converted {before:.2%}")
    fitted = train(experiment, task, model=snn, start=dataclasses.asdict(relu.train))
    if not fitted.finished:
        return None
    xs = jnp.repeat(sample[:ENERGY_IMAGES], steps, axis=1)
    spent = energy.measure(fitted.model, xs)
    result = fitted.metrics | {
        "relu_accuracy": trained.metrics["accuracy"],
        "converted_accuracy": before,
        "spikes_per_image": spent.spikes_per_image,
        "energy_nj": spent.energy_nj,
        "mac_nj": spent.mac_nj,
    }
    workdir.write(flags.workdir / "result.json", result)
    return result


def main(flags: Hybrid) -> None:
    """Convert, train, and print one line of result."""
    if result := run(flags):
        print(
            f"accuracy {result['accuracy']:.2%}, {result['spikes_per_image']:,.0f} "
            f"spikes and {result['energy_nj']:,.0f} nJ per image"
        )


if __name__ == "__main__":
    run_cli(main, parse(DEFAULT, __doc__))
