"""Train a spiking network on CIFAR-10.

    python -m experiments.cifar10 --workdir runs/mt

The full recipe, for a GPU or TPU, in place of the short default that suits a CPU:

    python -m experiments.cifar10 --model resnet19 --epochs 300 --augment autoaugment

Results with their commands stand in docs/results.md. The recipe is our choice.
"""

from pathlib import Path

from spikejax.experiment import Experiment, main
from spikejax.flags import parse, reported
from spikejax.step import TrainConfig

DEFAULT = Experiment(
    workdir=Path("runs/cifar10"),
    data="cifar10",
    model="resnet20",
    augment="crop-flip",
    train=TrainConfig(epochs=10.0, batch_size=128, learning_rate=0.1, warmup=0.1),
)

if __name__ == "__main__":
    reported(main, parse(DEFAULT, __doc__))
