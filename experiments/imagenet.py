"""Train on ImageNet, on one device or a pod: ResNets with multi-threshold neurons.

    python -m experiments.imagenet mt-resnet34 --data-dir DIR --workdir runs/mt34
    python -m experiments.imagenet lif-resnet34 --data tiny_imagenet --data-dir DIR
        --image-size 64 --workdir runs/lif34
    python -m experiments.imagenet plan --topology v5e:16x16 --batch-size 4096

Recipes: mt-resnet34 (the default; PLIF with 4 thresholds, one time step), lif-resnet34
(4 time steps), relu-resnet34 (does not spike), mt-resnet18, mt-resnet50, mt-resnet101.
Flags change them: lif-resnet34 --time-steps 1. With plan, or plan and a recipe, nothing
is trained: the step is compiled for a slice of a TPU, which need not be there
(docs/tpu.md); --compare adds the ReLU twin and LIF at 4 time steps. That takes minutes:
four for a ResNet-34 at one time step on two idle cores.

The residual is MS: nothing follows the sum, so that what one time step has no time to
say in spikes still goes through the shortcuts, while convolutions see spikes only. With
SEW (--residual sew) the sums of spikes, which grow with depth, enter them. Recipe and
residual are our choice; MT-SNN's (arXiv:2303.11127), which reports 72.17 % for PLIF
ResNet-34 in one step, are not known to us. None has been run to its end on ImageNet
yet; docs/results.md has ten classes of Tiny-ImageNet.
"""

import dataclasses
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import jax

from spikejax.data import images
from spikejax.experiment import Experiment, main, make_encode, make_loss
from spikejax.experiment.build import NeuronName, build_model
from spikejax.experiment.cli import fail, parse, reported
from spikejax.tpu.chips import find_slice, tpu_devices
from spikejax.tpu.plan import (
    Plan,
    batch_that_fits,
    plan_training,
    rows,
    verdict,
)
from spikejax.train import TrainConfig
from spikejax.train.progress import table

TRAIN_IMAGES, CLASSES = 1_281_167, 1000


@dataclasses.dataclass(frozen=True)
class ImageNet(Experiment):
    """What to train on photographs, and how."""

    workdir: Path = Path("runs/imagenet")
    """Folder of this run; the same command on the same folder goes on."""
    data: str = "imagenet2012"
    """Image set: imagenet2012, tiny_imagenet, folder, fake, or any of TFDS."""
    image_size: int | None = 224
    """Height and width that the network sees; 64 suits Tiny-ImageNet."""
    model: str = "resnet34"
    """Network: resnet34, resnet50, resnet101, resnet18-imagenet, or a key of MODELS."""
    neuron: NeuronName = "mt-parallel"
    """Activation; relu trains the network that does not spike."""
    augment: Literal["inception", "none"] = "inception"
    """Random part of a photograph, and its mirror image; none takes the middle."""
    label_smoothing: float = 0.1
    """Probability that is spread over all classes, 0 <= p < 1."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Numbers of the computation; parameters, statistics and membranes are float32."""
    train: TrainConfig = TrainConfig(
        epochs=90.0,
        batch_size=1024,
        learning_rate=0.1,
        learning_rate_batch=256,
        warmup=5 / 90,
        weight_decay=1e-4,
    )
    """The recipe."""


DEFAULT = ImageNet()
RECIPES = {
    "mt-resnet34": DEFAULT,
    "lif-resnet34": ImageNet(neuron="lif", time_steps=4),
    "relu-resnet34": ImageNet(neuron="relu"),
    "mt-resnet18": ImageNet(model="resnet18-imagenet"),
    "mt-resnet50": ImageNet(model="resnet50"),
    "mt-resnet101": ImageNet(model="resnet101"),
}


@dataclasses.dataclass(frozen=True)
class Planned(ImageNet):
    """What the training step takes on a slice of a TPU."""

    topology: str = "v5e:16x16"
    """Chip (v4, v5e, v5p or v6e) and shape of the slice."""
    compare: bool = False
    """Plan the ReLU twin and LIF at 4 time steps beside it."""
    train: TrainConfig = dataclasses.replace(ImageNet.train, batch_size=4096)
    """The recipe."""


def made_plan(flags: Planned, **changes: Any) -> Plan:
    """The plan of the flags, with some of them changed."""
    flags = dataclasses.replace(flags, **changes)
    if (size := flags.image_size) is None:
        raise ValueError("image_size: expected a number to plan with, got None.")
    mean, std = images.PHOTOGRAPHS
    image_set: Any = SimpleNamespace(
        num_classes=CLASSES, shape=(None, None, 3), mean=mean, std=std
    )
    return plan_training(
        flags.train,
        partial(build_model, flags, image_set, platform="tpu"),
        make_loss(flags),
        make_encode(flags, image_set),
        find_slice(flags.topology),
        image_shape=(size, size, 3),
        train_images=flags.train.epochs * TRAIN_IMAGES,
        fsdp=flags.fsdp,
    )


def plan(flags: Planned) -> None:
    """Compile for the slice and print what a chip needs, and what would fit."""
    where = find_slice(flags.topology)
    jax.config.update("jax_platforms", "cpu")  # the chips need not be there
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot be read back
    tpu_devices(where)  # is the compiler there?
    networks: dict[str, dict[str, Any]] = {f"{flags.neuron}, T={flags.time_steps}": {}}
    if flags.compare:
        networks["relu, T=1"] = {"neuron": "relu", "time_steps": 1}
        networks["lif, T=4"] = {"neuron": "lif", "time_steps": 4}
    plans = {}
    for name, changes in networks.items():
        print(f"Compiling {flags.model}, {name}, for {flags.topology} ...", flush=True)
        plans[name] = made_plan(flags, **changes)
    head = f"{flags.model} on {flags.topology}, {flags.train.batch_size} images a step"
    table(f"{head}: each chip", ["", *plans], rows(plans))
    for name, found in plans.items():
        print(f"{name}: {verdict(found)}")
        if not found.fits:
            for change, attempt in attempts(flags, found, networks[name]).items():
                print(f"  with {change} it {verdict(attempt())}", flush=True)


def attempts(flags: Planned, found: Plan, changes: dict[str, Any]):
    """What to try where a plan does not fit: {flags that make the change: its plan}.

    Sharding the parameters is left out where what it spares is not enough.
    """
    chips, fewer = found.target.chips, batch_that_fits(found)
    spared = (found.parameters + found.optimizer) * (1 - 1 / chips)
    tried: dict[str, dict[str, Any]] = {}
    if flags.remat != "blocks":
        tried["--remat blocks"] = {"remat": "blocks"}
    if flags.fsdp == 1 and found.peak - spared <= found.target.chip.hbm:
        tried[f"--fsdp {chips}"] = {"fsdp": chips}
    if fewer:
        train = dataclasses.replace(flags.train, batch_size=fewer)
        tried[f"--batch-size {fewer}"] = {"train": train}
    return {
        name: partial(made_plan, flags, **(changes | more))
        for name, more in tried.items()
    }


def command() -> None:
    """The recipe that the command line names, trained or planned, with its flags."""
    words = []
    while len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        words.append(sys.argv.pop(1))
    planned = words[:1] == ["plan"]
    name = " ".join(words[planned:]) or "mt-resnet34"
    if name not in RECIPES:
        fail(f"recipe: expected plan or one of {', '.join(RECIPES)}, got {name!r}.")
    recipe = RECIPES[name]
    if planned:
        given: Any = vars(recipe) | {"train": Planned.train}
        reported(plan, parse(Planned(**given), __doc__))
    else:
        reported(main, parse(recipe, __doc__))


if __name__ == "__main__":
    command()
