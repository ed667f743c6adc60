"""Train a spiking network on CIFAR-10.

    python -m experiments.cifar10 --workdir runs/mt

From scratch to 92.2 % in 1.6 hours of two CPU cores; --neuron lif and relu are its
twins:

    python -m experiments.cifar10 --model whitened --surrogate rectangle
        --epochs 24 --batch-size 256 --learning-rate 0.7 --warmup 0.2
        --label-smoothing 0.2 --augment reflect-flip --workdir runs/fast

A spiking transformer of 1.6 million parameters, with the same filters and augmentation:

    python -m experiments.cifar10 --model transformer-small --neuron i-lif
        --surrogate rectangle --augment reflect-flip --epochs 20 --batch-size 128
        --optimizer adamw --learning-rate 2e-3 --weight-decay 0.05 --warmup 0.1
        --label-smoothing 0.1 --workdir runs/transformer

The full recipe, for a GPU or TPU, in place of the short default that suits a CPU:

    python -m experiments.cifar10 --model resnet19 --epochs 300 --augment autoaugment

General SNN with its authors' recipe, as far as it is known (docs/general.md); lstm in
place of cnn is their recurrent network, and --width 0.25 one for a CPU:

    python -m experiments.cifar10 --model general-cnn --neuron lif --epochs 300
        --learning-rate 0.05 --warmup 0.01 --weight-decay 2e-5 --clip 20
        --label-smoothing 0.1 --augment autoaugment --workdir runs/general

docs/results.md has the results, with their commands. The other recipes are our choice.
"""

from pathlib import Path

from spikejax.experiment import Experiment, Images, ResNetOptions, main
from spikejax.experiment.cli import parse, run_cli
from spikejax.train import TrainConfig

DEFAULT = Experiment(
    workdir=Path("runs/cifar10"),
    inputs=Images("cifar10", augment="crop-flip"),
    network=ResNetOptions("resnet20"),
    train=TrainConfig(epochs=10.0, batch_size=128, learning_rate=0.1, warmup=0.1),
)

if __name__ == "__main__":
    run_cli(main, parse(DEFAULT, __doc__))
