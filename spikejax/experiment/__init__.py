"""Experiments on images, from command line to result.json: what the scripts share."""

from spikejax.experiment.config import (
    Experiment,
    Input,
    NeuronName,
    main,
    make_augment,
    make_crops,
    make_encode,
    make_loss,
    read,
    report,
    run,
    train,
)

__all__ = [
    "Experiment",
    "Input",
    "NeuronName",
    "main",
    "make_augment",
    "make_crops",
    "make_encode",
    "make_loss",
    "read",
    "report",
    "run",
    "train",
]
