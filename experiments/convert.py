"""Noise Adaptor: a quantised network trained with noise, run as a spiking one.

    python -m experiments.convert --workdir runs/convert
    python -m experiments.convert --workdir runs/convert --sweep
    python -m experiments.convert --workdir runs/c10 --data cifar10 --model resnet20
        --epochs 30 --batch-size 128 --quant-epochs 30

Trains a ReLU network, then the same network with activations of --bits and --noise,
converts it, and evaluates it at 1 to --max-steps time steps. With --sweep it compares
2 and 3 bits, each without and with noise, conversion without training, and several
thresholds in one step. Writes summary.json and convert.png. The same command on the
same folder resumes.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax import energy
from spikejax.conversion import calibrate, convert, least_error, percentile
from spikejax.conversion.spiking import Replaced
from spikejax.conversion.steps import (
    agreement,
    confidence_front,
    evaluate_steps,
    stream,
)
from spikejax.data import images
from spikejax.experiment import (
    EfficientNetOptions,
    Experiment,
    Images,
    ReLUOptions,
    ResNetOptions,
    VGGOptions,
    open_images,
    read_relu,
    train,
)
from spikejax.experiment.build import THRESHOLDS
from spikejax.experiment.cli import flatten, override, parse, run_cli
from spikejax.experiment.config import NOT_IDENTITY
from spikejax.nn.quant import QuantReLU
from spikejax.train import TrainConfig, processes, workdir
from spikejax.train.progress import table
from spikejax.train.recipe import Ranges, check_settings

SHOWN = (1, 2, 4, 8, 16, 32)  # time steps of the table
SAMPLE = 256  # training images for calibration and for the confidence of early exits
ENERGY_IMAGES = 32
LOSS = 0.005  # of accuracy, that early exits may cost on the sample


@dataclasses.dataclass(frozen=True)
class Start(Experiment):
    """A ReLU network: --num-thresholds is of the conversion."""

    network: VGGOptions | ResNetOptions | EfficientNetOptions = VGGOptions()
    """Its architecture: layers that are affine, pooling, and ReLUs."""
    activation: ReLUOptions = ReLUOptions()
    """Its activation."""


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A ReLU network, and its conversion to a spiking one."""

    experiment: Start
    """The ReLU network."""
    num_thresholds: int = 1
    """Thresholds of the spiking neurons: N do in T / N steps what one does in T."""
    relu: Path | None = None
    """Folder of a run with --neuron relu to start from, instead of training one."""
    bits: int = 2
    """Bits of the quantised activations, 1 to 8."""
    noise: float = 1.0
    """Amplitude of the noise in training; 0 is the baseline."""
    quant_epochs: float = 20.0
    """Passes over the training images with quantised activations; half of --steps,
    where that is given."""
    quant_learning_rate: float = 0.03
    """Peak learning rate with quantised activations."""
    max_steps: int = 32
    """Largest number of time steps that is evaluated."""
    test_images: int | None = None
    """Evaluate the spiking networks on the first test images only; all by default."""
    sweep: bool = False
    """Compare bits, noise and thresholds instead of running one setting."""

    def __post_init__(self):
        # It checks both. By shape alone: arrays would start JAX, before the processes
        # have joined.
        make = partial(QuantReLU, self.bits, noise=self.noise)
        nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
        ranges: Ranges = {
            "num_thresholds": THRESHOLDS,
            "quant_epochs": ("more than 0", lambda x: x > 0),
            "quant_learning_rate": ("more than 0", lambda x: x > 0),
            "max_steps": ("1 to 10000", lambda n: 1 <= n <= 10000),
            "test_images": ("at least 1", lambda n: n >= 1),
        }
        check_settings(self, ranges)
        if self.experiment.train.steps and self.quant_epochs != type(self).quant_epochs:
            raise ValueError(
                "quant_epochs: expected none with --steps, of which the quantised "
                f"training takes half, got {self.quant_epochs}."
            )


DEFAULT = Conversion(
    Start(
        workdir=Path("runs/convert"),
        inputs=Images("digits"),
        network=VGGOptions("convnet", pool="avg"),
        train=TrainConfig(epochs=30.0, batch_size=48, warmup=0.1, evaluate_every=10.0),
    )
)
OPTIONS = (ResNetOptions(residual="plain"),)  # if --model is a resnet


class Stopped(Exception):
    """The end of a training by SIGTERM, which `train` has reported."""


class Conversions:
    """The networks of one data set, one seed and one recipe."""

    def __init__(self, flags: Conversion):
        self.flags, shared = flags, flags.experiment
        self.workdir = shared.workdir
        self.start = dataclasses.replace(shared, workdir=self.workdir / "relu")
        if flags.relu:
            self.start = started(flags.relu, shared)
        self.task = open_images(self.start)
        raw = images.sample(self.task.data.train, SAMPLE, self.task.crops[1])
        self.sample = self.task.encode(jnp.asarray(raw["image"]), jax.random.key(0))
        self.labels = jnp.asarray(raw["label"])

    def fit(self, experiment: Experiment, model: nnx.Module | None = None, **more):
        """Train a network in a folder of its own, or resume there."""
        if processes.is_primary():
            print(experiment.workdir)
        fitted = train(experiment, self.task, model=model, **more)
        if not fitted.finished:
            raise Stopped
        return fitted

    def quantised(self, relu: nnx.Module, bits: int, noise: float):
        """Train the ReLU network further, with quantised activations and noise."""
        recipe = self.flags.experiment.train
        rngs = nnx.Rngs(noise=recipe.seed)
        neuron = partial(QuantReLU, bits, noise=noise, rngs=rngs)
        model = calibrate(relu, self.sample, rule=least_error, neuron=neuron).model
        experiment = dataclasses.replace(
            self.start,
            workdir=self.workdir / f"bits{bits}-noise{noise:g}",
            train=dataclasses.replace(
                recipe,
                epochs=self.flags.quant_epochs,
                steps=None if recipe.steps is None else max(1, recipe.steps // 2),
                learning_rate=self.flags.quant_learning_rate,
            ),
        )
        before = dataclasses.asdict(self.start.train)
        return self.fit(experiment, model, bits=bits, noise=noise, start=before)

    def row(self, name: str, ann: nnx.Module, accuracy: float, num_thresholds: int):
        """Convert a quantised network and evaluate it at every number of steps."""
        last = max(1, self.flags.max_steps // num_thresholds)
        snn, swaps = convert(ann, self.sample, num_thresholds)
        confidence = self.confidence(snn, last)
        result = evaluate_steps(snn, self.test(), self.task.encode, last, confidence)
        levels = min(last, max(1, round(swaps[0].levels / num_thresholds)))
        layers = agreement(ann, snn, self.sample, levels)
        return {
            "name": name,
            "num_thresholds": num_thresholds,
            "seed": self.flags.experiment.train.seed,
            "ann_accuracy": accuracy,
            "accuracy": result.accuracy.tolist(),
            "spikes_per_image": result.spikes.tolist(),
            "energy_nj": {steps: self.energy(snn, steps) for steps in shown(last)},
            "early_exit": {
                "confidence": confidence,
                "accuracy": result.exit_accuracy,
                "mean_steps": result.exit_steps,
            },
            "agreement_steps": levels,
            "agreement": [layer._asdict() for layer in layers],
            "v_thresholds": {swap.path: swap.v_threshold for swap in swaps},
        }

    def test(self) -> Iterator[dict[str, Any]]:
        """Batches of the test images."""
        test, crop = self.task.data.test, self.task.crops[1]
        left, size = self.flags.test_images or len(test), self.start.train.batch_size
        for batch in images.eval_batches(test, size, crop=crop):
            yield {name: values[:left] for name, values in batch.items()}
            left -= len(batch["label"])
            if left <= 0:
                return

    def confidence(self, snn: Replaced, last: int) -> float:
        """Return the fastest early exit that loses little on training images."""
        logits = stream(snn, self.sample, last).logits
        front = confidence_front(logits, self.labels)
        enough = front[-1][1] - LOSS
        return next(c for c, accuracy, _ in front if accuracy >= enough)

    def energy(self, snn: nnx.Module, steps: int) -> float:
        """Nanojoule an image at a number of time steps."""
        xs = self.sample[:ENERGY_IMAGES]
        xs = jnp.broadcast_to(xs, (len(xs), steps, *xs.shape[2:]))
        return energy.measure(snn, xs).energy_nj


def started(folder: Path, shared: Experiment) -> Experiment:
    """Return the run of a folder, from which another of these flags starts.

    Raises:
        ValueError: it is no ReLU network, or a flag names another one.
    """
    run = read_relu(folder, flatten(shared)["data_dir"])
    recipe = flatten(run.train)
    given, default, saved = map(flatten, (shared, DEFAULT.experiment, run))
    for name, value in given.items():
        if name in recipe or name not in saved or name in NOT_IDENTITY:
            continue
        if value not in (default.get(name), saved[name]):
            raise ValueError(
                f"{name}: expected {saved[name]}, as in the run of --relu, got {value}."
            )
    # Flags of where and how to run are those of this command.
    here = {name: value for name, value in given.items() if name in NOT_IDENTITY}
    return override(run, here | {"workdir": run.workdir})


def shown(last: int) -> list[int]:
    """Return the numbers of time steps that the table shows."""
    return [steps for steps in SHOWN if steps <= last]


def rows(flags: Conversion) -> Iterator[dict[str, Any]]:
    """Yield one row per setting, when it is ready."""
    nets = Conversions(flags)
    relu = nets.fit(nets.start)
    settings = [(flags.bits, flags.noise)]
    if flags.sweep:
        noises = dict.fromkeys((0.0, flags.noise))
        settings = [(bits, noise) for bits in (2, 3) for noise in noises]
        fine = partial(QuantReLU, 8)
        free = calibrate(
            relu.model, nets.sample, rule=percentile(99.9), neuron=fine
        ).model
        yield nets.row(
            "no training", free, relu.metrics["accuracy"], flags.num_thresholds
        )
    for bits, noise in settings:
        fitted = nets.quantised(relu.model, bits, noise)
        accuracy = fitted.metrics["accuracy"]
        more = {"bits": bits, "noise": noise, "relu_accuracy": relu.metrics["accuracy"]}
        name = f"{bits} bits, noise {noise:g}"
        yield nets.row(name, fitted.model, accuracy, flags.num_thresholds) | more
        if flags.sweep and noise:
            name = f"{name}, 4 thresholds"
            yield nets.row(name, fitted.model, accuracy, 4) | more


def figure(found: list[dict[str, Any]]) -> Any:
    """Accuracy against time steps, one line a row."""
    from spikejax import plot

    lines = {row["name"]: row["accuracy"] for row in found}
    return plot.accuracy_by_steps(lines).figure


def main(flags: Conversion) -> None:
    """Train, convert, print the table, write summary.json and convert.png."""
    found, folder = [], flags.experiment.workdir
    with processes.distributed(flags.experiment.processes, flatten(flags)):
        try:
            for row in rows(flags):
                found.append(row)
                workdir.write(folder / "summary.json", found)
        except Stopped:  # an exit inside of `distributed` could abort the others
            return
    steps_shown = shown(flags.max_steps)
    if not processes.is_primary():
        return
    table(
        "Accuracy of the converted network",
        ["network", "quantised", *(f"T={t}" for t in steps_shown), "early exit"],
        [
            [
                row["name"],
                f"{row['ann_accuracy']:.2%}",
                *(
                    f"{row['accuracy'][t - 1]:.2%}" if t <= len(row["accuracy"]) else ""
                    for t in steps_shown
                ),
                "{accuracy:.2%} at {mean_steps:.1f}".format(**row["early_exit"]),
            ]
            for row in found
        ],
    )
    figure(found).savefig(folder / "convert.png", dpi=150)
    print(f"Written: {folder}/summary.json, {folder}/convert.png")


if __name__ == "__main__":
    run_cli(main, parse(DEFAULT, __doc__, *OPTIONS))
