"""Train General SNN, or any other network, on Tiny-ImageNet: 64x64, 200 classes.

    python -m experiments.tinyimagenet --workdir runs/tiny --data-dir DIR

DIR holds tiny-imagenet-200.zip as it is distributed. The recipe is that of General SNN
on CIFAR, as far as it is known; what its authors did on this set is not. It has not
been run to its end yet; docs/results.md has ten classes, six epochs and a quarter of
the width.
"""

from pathlib import Path

from spikejax.experiment import Experiment, main
from spikejax.experiment.cli import parse, reported
from spikejax.train import TrainConfig

DEFAULT = Experiment(
    workdir=Path("runs/tinyimagenet"),
    data="tiny_imagenet",
    model="general-cnn",
    neuron="lif",
    augment="crop-flip",
    label_smoothing=0.1,
    train=TrainConfig(
        epochs=300.0,
        batch_size=128,
        learning_rate=0.05,
        warmup=0.01,
        weight_decay=2e-5,
        clip=20.0,
    ),
)

if __name__ == "__main__":
    reported(main, parse(DEFAULT, __doc__))
