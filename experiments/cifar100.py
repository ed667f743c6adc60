"""Train a spiking network on CIFAR-100.

    python -m experiments.cifar100 --workdir runs/mt100

The default is the full recipe, for a GPU or TPU: ResNet-18, 300 epochs, AutoAugment
and Cutout. It is our choice, and has not been run to its end yet. General SNN with its
authors' recipe, as far as it is known (docs/general.md); lstm in place of cnn is their
recurrent network:

    python -m experiments.cifar100 --model general-cnn --neuron lif
        --learning-rate 0.05 --warmup 0.01 --weight-decay 2e-5 --clip 20
        --label-smoothing 0.1 --workdir runs/general100
"""

from pathlib import Path

from spikejax.experiment import Experiment, Images, ResNetOptions, main
from spikejax.experiment.cli import parse, run_cli
from spikejax.train import TrainConfig

DEFAULT = Experiment(
    workdir=Path("runs/cifar100"),
    inputs=Images("cifar100", augment="autoaugment"),
    network=ResNetOptions("resnet18"),
    train=TrainConfig(epochs=300.0, batch_size=128, learning_rate=0.1, warmup=0.02),
)

if __name__ == "__main__":
    run_cli(main, parse(DEFAULT, __doc__))
