"""Train a spiking network on CIFAR-10.

    python -m experiments.cifar10 --workdir runs/mt

Recipes, which flags change, as in mt-whitened --seed 1:

- mt-resnet20 (the default): MS-ResNet-20 with 4 thresholds, ten epochs, for a CPU.
- mt-whitened: from scratch to 92.5 % in an hour or two of two CPU cores; its twins
  lif-whitened (one threshold) and relu-whitened (does not spike).
- mt-transformer: 1.6 million parameters, with the same filters and augmentation.
- mt-resnet19: 300 epochs with AutoAugment, for a GPU or TPU.
- general-cnn: General SNN with its authors' recipe, as far as it is known
  (docs/general.md); --model general-lstm is their recurrent network, and --width 0.25
  one for a CPU.

docs/results.md has the results, with their commands. The other recipes are our choice.
"""

from pathlib import Path
from typing import Any

from spikejax.experiment import Experiment, Images, ResNetOptions, main
from spikejax.experiment.cli import override, parse, run_cli, take_recipe
from spikejax.train import TrainConfig

DEFAULT = Experiment(
    workdir=Path("runs/cifar10"),
    inputs=Images("cifar10", augment="crop-flip"),
    network=ResNetOptions("resnet20"),
    train=TrainConfig(epochs=10.0, batch_size=128, learning_rate=0.1, warmup=0.1),
)

_WHITENED: dict[str, Any] = {
    "model": "whitened",
    "epochs": 24.0,
    "batch_size": 256,
    "learning_rate": 0.7,
    "warmup": 0.2,
    "label_smoothing": 0.2,
    "augment": "reflect-flip",
}
RECIPES: dict[str, dict[str, Any]] = {
    "mt-resnet20": {},
    "mt-whitened": _WHITENED | {"surrogate": "rectangle"},
    "lif-whitened": _WHITENED | {"neuron": "lif", "surrogate": "rectangle"},
    "relu-whitened": _WHITENED | {"neuron": "relu"},
    "mt-transformer": {
        "model": "transformer-small",
        "surrogate": "rectangle",
        "augment": "reflect-flip",
        "epochs": 20.0,
        "batch_size": 128,
        "optimizer": "adamw",
        "learning_rate": 2e-3,
        "weight_decay": 0.05,
        "warmup": 0.1,
        "label_smoothing": 0.1,
    },
    "mt-resnet19": {"model": "resnet19", "epochs": 300.0, "augment": "autoaugment"},
    "general-cnn": {
        "model": "general-cnn",
        "neuron": "lif",
        "epochs": 300.0,
        "learning_rate": 0.05,
        "warmup": 0.01,
        "weight_decay": 2e-5,
        "clip": 20.0,
        "label_smoothing": 0.1,
        "augment": "autoaugment",
    },
}


def command() -> None:
    """Train the recipe that the command line names, with its flags."""
    _, changes = take_recipe(RECIPES)
    run_cli(main, parse(override(DEFAULT, changes), __doc__, usage="[RECIPE] "))


if __name__ == "__main__":
    command()
