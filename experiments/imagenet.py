"""Train on ImageNet, on one device or a pod: ResNets with multi-threshold neurons.

    python -m experiments.imagenet mt-resnet34 --data-dir DIR --workdir runs/mt34
    python -m experiments.imagenet lif-resnet34 --data tiny_imagenet --data-dir DIR
        --image-size 64 --workdir runs/lif34
    python -m experiments.imagenet plan --topology v5e:16x16 --batch-size 4096

Recipes: mt-resnet34 (the default; 4 thresholds, one time step), lif-resnet34
(4 time steps), relu-resnet34 (does not spike), mt-resnet18, mt-resnet50, mt-resnet101,
e-spikeformer-19m (a spiking transformer with 4 thresholds, one time step).
Flags change them: lif-resnet34 --time-steps 1. With plan before the recipe and its
flags, of which those of the data do not exist then, nothing is trained: the step is
compiled for a slice of a TPU, which need not be there (docs/tpu.md); --compare adds the
ReLU twin and LIF at 4 time steps. That takes minutes: four for a ResNet-34 at one time
step on two idle cores.

The residual is MS: nothing follows the sum, so the shortcuts carry real values, of
which one time step of spikes could carry little, and convolutions see spikes only. With
SEW (--residual sew) they see sums of spikes, which grow with depth. Recipe and residual
are our choice; those of MT-SNN (arXiv:2303.11127), which reports 72.17 % for PLIF
ResNet-34 in one step, are not known to us. No recipe has been run to its end on
ImageNet yet; docs/results.md has ten classes of Tiny-ImageNet.

e-spikeformer-19m has the network, neurons and optimizer of its authors, who report
79.8 % (arXiv:2411.16061): LAMB, 6e-4 per 256 images, 200 epochs, 5 of warm-up, batches
of 2048. Ours are the spacing of the thresholds, 0.5 in place of 1, and the
augmentation, which lacks their RandAugment and random erasing.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax

from spikejax.data.images import PHOTOGRAPHS
from spikejax.encode import normalised
from spikejax.experiment import (
    Experiment,
    Images,
    ImageSize,
    MultiThresholdOptions,
    ResNetOptions,
    main,
)
from spikejax.experiment.build import build_model
from spikejax.experiment.cli import (
    checked,
    flatten,
    override,
    parse,
    run_cli,
    take_recipe,
)
from spikejax.experiment.config import make_loss
from spikejax.tpu.chips import find_slice, tpu_devices
from spikejax.tpu.plan import Plan, batch_that_fits, plan_training, rows, verdict
from spikejax.train import TrainConfig
from spikejax.train.progress import table

TRAIN_IMAGES, CLASSES = 1_281_167, 1000

DEFAULT = Experiment(
    workdir=Path("runs/imagenet"),
    inputs=Images("imagenet2012", augment="inception", image_size=224),
    network=ResNetOptions("resnet34", dtype="bfloat16"),
    activation=MultiThresholdOptions("mt-parallel", num_thresholds=4),
    label_smoothing=0.1,
    train=TrainConfig(
        epochs=90.0,
        batch_size=1024,
        learning_rate=0.1,
        learning_rate_batch=256,
        warmup=5 / 90,
        weight_decay=1e-4,
    ),
)
RECIPES: dict[str, dict[str, Any]] = {
    "mt-resnet34": {},
    "lif-resnet34": {"neuron": "lif", "time_steps": 4},
    "relu-resnet34": {"neuron": "relu"},
    "mt-resnet18": {"model": "resnet18-imagenet"},
    "mt-resnet50": {"model": "resnet50"},
    "mt-resnet101": {"model": "resnet101"},
    "e-spikeformer-19m": {
        "model": "e-spikeformer-19m",
        "neuron": "i-lif",
        "surrogate": "rectangle",
        "optimizer": "lamb",
        "learning_rate": 6e-4,
        "epochs": 200.0,
        "batch_size": 2048,
        "warmup": 5 / 200,
        "weight_decay": 0.05,
    },
}


@dataclasses.dataclass(frozen=True)
class Planned:
    """The cost of a training step on a slice of a TPU."""

    experiment: Experiment = dataclasses.replace(
        override(DEFAULT, {"batch_size": 4096}), inputs=ImageSize()
    )
    """The run that is planned."""
    topology: str = "v5e:16x16"
    """Chip (v4, v5e, v5p or v6e) and shape of the slice."""
    compare: bool = False
    """Plan the ReLU twin and LIF at 4 time steps beside it."""


def made_plan(flags: Planned, **changes: Any) -> Plan:
    """Return the plan of the flags, with some of them changed."""
    experiment = checked(override(flags.experiment, changes))
    size, recipe = cast(ImageSize, experiment.inputs).image_size, experiment.train
    images = recipe.epochs * TRAIN_IMAGES
    if recipe.steps is not None:
        images = recipe.steps * recipe.batch_size
    model = partial(
        build_model,
        experiment.network,
        experiment.activation,
        num_classes=CLASSES,
        in_channels=3,
        seed=recipe.seed,
        platform="tpu",
    )
    return plan_training(
        recipe,
        model,
        make_loss(experiment),
        normalised(*PHOTOGRAPHS, experiment.time_steps),
        find_slice(flags.topology),
        image_shape=(size, size, 3),
        train_images=images,
        fsdp=experiment.fsdp,
    )


def plan(flags: Planned) -> None:
    """Compile for the slice; print what a chip needs, and what would fit."""
    target, experiment = find_slice(flags.topology), flags.experiment
    jax.config.update("jax_platforms", "cpu")  # the chips need not be there
    # JAX cannot read an executable for another platform back.
    jax.config.update("jax_enable_compilation_cache", False)
    tpu_devices(target)  # raises if the compiler is missing
    name = f"{experiment.activation.neuron}, T={experiment.time_steps}"
    networks: dict[str, dict[str, Any]] = {name: {}}
    if flags.compare:
        networks["relu, T=1"] = {"neuron": "relu", "time_steps": 1, "loss": "rate"}
        networks["lif, T=4"] = {"neuron": "lif", "time_steps": 4}
    plans, model = {}, experiment.network.model
    for name, changes in networks.items():
        print(f"Compiling {model}, {name}, for {flags.topology} ...", flush=True)
        plans[name] = made_plan(flags, **changes)
    size = experiment.train.batch_size
    head = f"{model} on {flags.topology}, {size} images per step: each chip"
    table(head, ["", *plans], rows(plans))
    for name, found in plans.items():
        print(f"{name}: {verdict(found)}")
        if not found.fits:
            for change, attempt in attempts(flags, found, networks[name]).items():
                print(f"  with {change} it {verdict(attempt())}", flush=True)


def attempts(
    flags: Planned, found: Plan, changes: dict[str, Any]
) -> dict[str, Callable[[], Plan]]:
    """Return {flags that could make a plan fit: the function that plans with them}.

    Sharding the parameters is left out if the memory that it saves is not enough.
    """
    chips, fewer = found.target.chips, batch_that_fits(found)
    saved = (found.parameters + found.optimizer) * (1 - 1 / chips)
    now, tried = flatten(flags.experiment), {}
    if now.get("remat") == "none":
        tried["--remat blocks"] = {"remat": "blocks"}
    if now["fsdp"] == 1 and found.peak - saved <= found.target.chip.hbm:
        tried[f"--fsdp {chips}"] = {"fsdp": chips}
    if fewer:
        tried[f"--batch-size {fewer}"] = {"batch_size": fewer}
    return {
        name: partial(made_plan, flags, **(changes | more))
        for name, more in tried.items()
    }


def command() -> None:
    """Train or plan the recipe that the command line names, with its flags."""
    name, changes = take_recipe(RECIPES, "plan")
    usage = "[plan] [RECIPE] "
    if name == "plan":
        run_cli(plan, parse(override(Planned(), changes), __doc__, usage=usage))
    else:
        run_cli(main, parse(override(DEFAULT, changes), __doc__, usage=usage))


if __name__ == "__main__":
    command()
