"""Noise Adaptor: a quantised network trained with noise, run as a spiking one.

    python -m experiments.convert --workdir runs/convert
    python -m experiments.convert --workdir runs/convert --sweep
    python -m experiments.convert --workdir runs/c10 --data cifar10 --model resnet20
        --epochs 30 --batch-size 128 --quant-epochs 30

Trains a ReLU network, then the same network with activations of --bits and --noise,
converts it, and evaluates it at 1 to --max-steps time steps. With --sweep it compares
2 and 3 bits, each without and with noise, conversion without training, and several
thresholds in one step. Writes summary.json and convert.png. The same command on the
same folder goes on where it stopped.
"""

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from spikejax.convert import calibrate, convert, least_error, percentile
from spikejax.data import images
from spikejax.experiment import (
    Experiment,
    build_model,
    make_augment,
    make_encode,
    make_loss,
    parse,
    reported,
)
from spikejax.models import vgg
from spikejax.progress import table
from spikejax.quant import QuantReLU
from spikejax.step import TrainConfig
from spikejax.stream import evaluate_steps
from spikejax.train import fit

SHOWN = (1, 2, 4, 8, 16, 32)  # time steps of the table
CALIBRATION_IMAGES = 256
POOLS = {"avg": vgg.avg_pool, "max": vgg.max_pool}


@dataclasses.dataclass(frozen=True)
class Conversion(Experiment):
    """From a ReLU network to a spiking one."""

    neuron: Literal["relu"] = "relu"
    """Activation of the network that is trained first."""
    num_thresholds: int = 1
    """Thresholds of the spiking neurons: N do in T / N steps what one does in T."""
    bits: int = 2
    """Of the quantised activations, 1 to 8."""
    noise: float = 1.0
    """Amplitude of the noise in training; 0 is the baseline."""
    quant_epochs: float = 20.0
    """Passes over the training images with quantised activations."""
    quant_learning_rate: float = 0.03
    """At its peak, with quantised activations."""
    max_steps: int = 32
    """Largest number of time steps that is evaluated."""
    sweep: bool = False
    """Compare bits, noise and thresholds instead of running one setting."""
    pool: Literal["avg", "max"] = "avg"
    """Pooling of VGG and convnet; of spikes the maximum is their OR, which is more."""

    def __post_init__(self):
        super().__post_init__()
        QuantReLU(self.bits, noise=self.noise, rngs=nnx.Rngs(0))  # checks them
        if self.max_steps < 1:
            raise ValueError(f"max_steps: expected at least 1, got {self.max_steps}.")


DEFAULT = Conversion(
    workdir=Path("runs/convert"),
    train=TrainConfig(epochs=30.0, batch_size=50, warmup=0.1, evaluate_every=10.0),
)


class Conversions:
    """The networks of one data set, one seed and one recipe."""

    def __init__(self, flags: Conversion):
        self.flags = flags
        self.image_set = images.load(flags.data, flags.data_dir)
        self.encode = make_encode(flags, self.image_set)
        self.batch = flags.train.batch_size
        first = range(min(CALIBRATION_IMAGES, len(self.image_set.train)))
        raw = images.take(self.image_set.train, first)["image"]
        self.sample = self.encode(jnp.asarray(raw), None)

    def fit(self, name: str, model: nnx.Module, train: TrainConfig, settings: dict):
        """Train a model in a folder of its own; returns what ``fit`` does."""
        print(name)
        train_data = images.train_batches(
            self.image_set.train,
            self.batch,
            seed=train.seed,
            augment=make_augment(self.flags),
            workers=self.flags.workers,
        )
        fitted = fit(
            train,
            model,
            make_loss(self.flags),
            train_data,
            images.eval_batches(self.image_set.test, self.batch),
            encode=self.encode,
            steps_per_epoch=max(1, len(self.image_set.train) // self.batch),
            workdir=self.flags.workdir / name,
            settings=settings
            | {name: getattr(self.flags, name) for name in ("data", "model", "pool")},
        )
        if not fitted.finished:
            raise SystemExit(0)
        return fitted

    def relu(self):
        """The ReLU network, trained."""
        model = build_model(self.flags, self.image_set)
        if isinstance(model, vgg.VGG):
            model.pool = POOLS[self.flags.pool]
        return self.fit("relu", model, self.flags.train, {})

    def quantised(self, relu: nnx.Module, bits: int, noise: float):
        """The ReLU network with quantised activations, trained on with noise."""
        train = self.flags.train
        rngs = nnx.Rngs(noise=train.seed)
        neuron = partial(QuantReLU, bits, noise=noise, rngs=rngs)
        model = calibrate(relu, self.sample, rule=least_error, neuron=neuron).model
        train = dataclasses.replace(
            train,
            epochs=self.flags.quant_epochs,
            steps=None if train.steps is None else max(1, train.steps // 2),
            learning_rate=self.flags.quant_learning_rate,
        )
        settings = {
            "bits": bits,
            "noise": noise,
            "start": dataclasses.asdict(self.flags.train),
        }
        return self.fit(f"bits{bits}-noise{noise:g}", model, train, settings)

    def row(self, name: str, ann: nnx.Module, accuracy: float, num_thresholds: int):
        """Convert a quantised network and evaluate it at every number of steps."""
        batches = images.eval_batches(self.image_set.test, self.batch)
        snn, swaps = convert(ann, num_thresholds)
        result = evaluate_steps(snn, batches, self.encode, self.flags.max_steps)
        return {
            "name": name,
            "num_thresholds": num_thresholds,
            "seed": self.flags.train.seed,
            "ann_accuracy": accuracy,
            "accuracy": result.accuracy.tolist(),
            "spikes_per_image": result.spikes.tolist(),
            "v_thresholds": {swap.path: swap.v_threshold for swap in swaps},
        }


def rows(flags: Conversion) -> Iterator[dict[str, Any]]:
    """One row for each setting, as it is ready."""
    nets = Conversions(flags)
    relu = nets.relu()
    settings = [(flags.bits, flags.noise)]
    several = flags.num_thresholds
    if flags.sweep:
        settings = [(bits, noise) for bits in (2, 3) for noise in (0.0, flags.noise)]
        fine = partial(QuantReLU, 8)
        free = calibrate(
            relu.model, nets.sample, rule=percentile(99.9), neuron=fine
        ).model
        yield nets.row("no training", free, relu.metrics["accuracy"], several)
    for bits, noise in settings:
        fitted = nets.quantised(relu.model, bits, noise)
        accuracy = fitted.metrics["accuracy"]
        more = {"bits": bits, "noise": noise, "relu_accuracy": relu.metrics["accuracy"]}
        name = f"{bits} bits, noise {noise:g}"
        yield nets.row(name, fitted.model, accuracy, several) | more
        if flags.sweep and noise:
            name = f"{name}, 4 thresholds"
            yield nets.row(name, fitted.model, accuracy, 4) | more


def figure(found: list[dict[str, Any]]):
    """Accuracy against time steps, one line a row."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(7, 4), layout="constrained")
    axes = picture.subplots()
    for row in found:
        steps = range(1, len(row["accuracy"]) + 1)
        style = "--" if row.get("noise") == 0 else "-"
        axes.plot(steps, [100 * a for a in row["accuracy"]], style, label=row["name"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(SHOWN, map(str, SHOWN))
    axes.set_xlabel("time steps")
    axes.set_ylabel("accuracy, %")
    axes.legend(frameon=False)
    axes.grid(color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    return picture


def main(flags: Conversion) -> None:
    """Train, convert, print the table, write summary.json and convert.png."""
    found = list(rows(flags))
    (flags.workdir / "summary.json").write_text(json.dumps(found, indent=2))
    shown = [steps for steps in SHOWN if steps <= flags.max_steps]
    table(
        "Accuracy of the converted network",
        ["network", "quantised", *(f"T={steps}" for steps in shown), "spikes, last T"],
        [
            [
                row["name"],
                f"{row['ann_accuracy']:.2%}",
                *(f"{row['accuracy'][steps - 1]:.2%}" for steps in shown),
                f"{row['spikes_per_image'][shown[-1] - 1]:,.0f}",
            ]
            for row in found
        ],
    )
    figure(found).savefig(flags.workdir / "convert.png", dpi=150)
    print(f"Written: {flags.workdir}/summary.json, {flags.workdir}/convert.png")


if __name__ == "__main__":
    reported(main, parse(DEFAULT, __doc__))
