"""Train General SNN, or any other network, on Tiny-ImageNet: 64x64, 200 classes.

    python -m experiments.tinyimagenet --workdir runs/tiny --data-dir DIR

DIR holds tiny-imagenet-200.zip as it is distributed. The recipe is that of General SNN
on CIFAR, as far as it is known; its authors' recipe for this set is not. It has not
been run to its end yet; docs/results.md has ten classes, six epochs and a quarter of
the width.
"""

from pathlib import Path

from spikejax.experiment import Experiment, GeneralOptions, Images, SingleOptions, main
from spikejax.experiment.cli import parse, run_cli
from spikejax.train import TrainConfig

DEFAULT = Experiment(
    workdir=Path("runs/tinyimagenet"),
    inputs=Images("tiny_imagenet", augment="crop-flip"),
    network=GeneralOptions("general-cnn"),
    activation=SingleOptions("lif"),
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
    run_cli(main, parse(DEFAULT, __doc__))
