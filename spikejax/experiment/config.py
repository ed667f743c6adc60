"""An experiment from its flags to result.json: the parts that the scripts share.

A script names data, a network and a recipe; ``run`` does the rest. A notebook may call
it with the same ``Experiment``.
"""

import dataclasses
import json
import zlib
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import flax
import jax
import jax.numpy as jnp
from flax import nnx

import spikejax
from spikejax import energy, losses
from spikejax.data import augment as augmentations
from spikejax.data import images
from spikejax.data.augment import Augment, Crop
from spikejax.data.events import EventSet
from spikejax.data.images import ImageSet
from spikejax.data.sequences import SequenceSet
from spikejax.encode import normalised
from spikejax.experiment import trained
from spikejax.experiment.build import (
    READOUTS,
    ActivationOptions,
    BaselineOptions,
    MultiThresholdOptions,
    NetworkOptions,
    SequenceOptions,
    VGGOptions,
    build_model,
)
from spikejax.experiment.cli import (
    cache_programs,
    checked,
    flag_name,
    flatten,
    override,
)
from spikejax.experiment.start import start_from
from spikejax.experiment.trained import Card
from spikejax.train import processes, sharding, workdir
from spikejax.train.checkpoint import has_checkpoint
from spikejax.train.loop import Fitted, fit
from spikejax.train.processes import Processes
from spikejax.train.recipe import Ranges, TrainConfig, check_settings
from spikejax.train.step import Encode, Loss, Readout

ENERGY_IMAGES = 256  # test images over which spikes and energy are measured
ENERGY_VALUES = 2**24  # or as many large ones as have so many numbers together
SIZE: Ranges = {"image_size": ("1 to 10000", lambda n: 1 <= n <= 10000)}

# Flags that say where a run runs, reads and writes. It may be resumed with others.
NOT_IDENTITY = ("workdir", "data_dir", "stream", "workers", "remat", "fsdp", "profile")
NOT_IDENTITY += tuple(field.name for field in dataclasses.fields(Processes))


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Options of a data set; a kind of data adds its own."""

    over = "images"  # or sequences: what the networks are over that take such data


@dataclasses.dataclass(frozen=True)
class Images(Inputs):
    """A set of images."""

    data: str = "digits"
    """Image set: digits, fake (made up), tiny_imagenet, folder, the path of a folder as
    photos/ (with train/CLASS/*.jpg and val/CLASS/*.jpg), or a prepared TFDS set such as
    cifar10."""
    data_dir: Path | None = None
    """Folder of TFDS sets, zip or images; TFDS's own folder by default."""
    augment: Literal[
        "none", "crop-flip", "reflect-flip", "autoaugment", "inception"
    ] = "none"
    """Augmentation in training; reflect-flip pads for its crop with mirror images where
    crop-flip is black; autoaugment adds crop, flip and Cutout; inception takes a random
    part of a photograph, or its mirror image."""
    image_size: int | None = None
    """Height and width to which images are cropped; by default they are not."""

    def __post_init__(self):
        check_settings(self, SIZE)
        if self.augment == "inception" and self.image_size is None:
            raise ValueError(
                "image_size: expected a number with --augment inception, got none. "
                "Take 224, or 64 for Tiny-ImageNet."
            )


@dataclasses.dataclass(frozen=True)
class ImageSize(Inputs):
    """Images of a step that is compiled without a data set."""

    image_size: int = 224
    """Height and width of the images."""

    def __post_init__(self):
        check_settings(self, SIZE)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A network, its data and its recipe."""

    workdir: Path
    """Folder of this run; rerun the same command to resume."""
    inputs: Inputs = Images()
    """The data."""
    network: NetworkOptions = VGGOptions()
    """The network."""
    activation: ActivationOptions = MultiThresholdOptions()
    """Its neurons."""
    time_steps: int = 1
    """Time steps for which the network sees an example."""
    loss: Literal["rate", "tet"] = "rate"
    """Cross-entropy of the mean over time, or the mean of that of every step (TET)."""
    label_smoothing: float = 0.0
    """Probability that is spread over all classes, 0 <= p < 1."""
    from_: str | None = None
    """Folder of a finished or stopped run, or cifar10-mt4 of the package, from whose
    weights the training starts: to train longer, with another recipe or other neurons.
    Layers have to fit; a head of other classes is new."""
    workers: int = 0
    """Processes that prepare batches, beside the main one."""
    fsdp: int = 1
    """Devices over which the parameters are sharded; 1 replicates them."""
    profile: bool = False
    """Write a trace of five steps to WORKDIR/profile, for TensorBoard's XProf."""
    train: TrainConfig = TrainConfig()
    """The recipe."""
    processes: Processes = Processes()
    """The processes of a run on several machines."""

    def __post_init__(self):
        object.__setattr__(self, "workdir", Path(self.workdir))  # of a str in Python
        workdir.check_path(self.workdir.absolute())
        ranges: Ranges = {
            "time_steps": ("1 to 10000", lambda n: 1 <= n <= 10000),
            "label_smoothing": ("0 <= p < 1", lambda p: 0 <= p < 1),
            "workers": ("0 to 1000", lambda n: 0 <= n <= 1000),
            "fsdp": ("at least 1", lambda n: n >= 1),
        }
        check_settings(self, ranges)
        check_settings(self.network)
        check_settings(self.activation)
        relu = self.activation.neuron == "relu"
        general = self.network.model.startswith("general")
        plain = isinstance(self.network, BaselineOptions)
        vectors = plain or isinstance(self.network, SequenceOptions)
        over = "sequences" if vectors else "images"
        if over != self.inputs.over:
            raise ValueError(
                f"model: expected a network over {self.inputs.over}, got "
                f"{self.network.model}, which is over {over}. docs/flags.md lists them."
            )
        if (delays := getattr(self.network, "delays", 0)) >= max(1, self.time_steps):
            raise ValueError(
                f"delays: expected fewer than the {self.time_steps} time steps, got "
                f"{delays}. What is delayed for longer does not arrive."
            )
        once, flags, static = self.time_steps == 1, flatten(self), relu and not vectors
        for name, default, useless, why in (
            # Values that would do nothing, and on which a comparison could rest.
            ("neuron", "relu", plain, "for a network without neurons"),
            ("loss", "rate", flags.get("readout") == "max", "for --readout max"),
            ("norm_groups", 1, vectors, "for a network without norms"),
            ("time_steps", 1, static, "for --neuron relu: it has no state"),
            ("loss", "rate", once, "for one time step, where losses are equal"),
            ("norm_groups", 1, general, "for a General SNN, which has no norms"),
            ("binarise", "bernoulli", relu, "for --neuron relu: it needs no spikes"),
            ("surrogate", "atan", general, "for a General SNN, which has its own"),
        ):
            if useless and (value := flags.get(name, default)) != default:
                flag = f"{flag_name(name)} {default}"  # a recipe may have given it
                raise ValueError(
                    f"{name}: expected {default} {why}, got {value}. Take {flag}."
                )


Data = ImageSet | EventSet | SequenceSet


class Task(NamedTuple):
    """The data of a run, and the way from them to the network."""

    data: Any
    """``Data``, with the splits train and test."""
    encode: Encode
    """(batch of the data, rng) -> xs [B, T, ...], on the device."""
    augment: Augment | None = None
    """Augmentation of batches of training, on the host."""
    crops: tuple[Crop | None, Crop | None] = None, None
    """Crops of the images of training and of evaluation."""


def make_loss(experiment: Experiment) -> Loss:
    """Return the loss of the flags, (logits [B, T, K], labels [B]) -> [B]."""
    loss = losses.tet if experiment.loss == "tet" else losses.rate_cross_entropy
    if make_readout(experiment) is losses.max_over_time:
        loss = losses.max_cross_entropy
    return partial(loss, label_smoothing=experiment.label_smoothing)


def make_readout(experiment: Experiment) -> Readout:
    """Return the readout of the flags, (logits [B, T, K], lengths) -> [B, K]."""
    return READOUTS[getattr(experiment.network, "readout", "mean")]


def make_augment(inputs: Images) -> Augment | None:
    """Return the augmentation of training images, after the crop."""
    flip = augmentations.random_flip()
    crop_flip = augmentations.random_crop(4), flip
    auto = augmentations.autoaugment_cifar(), augmentations.cutout(16)
    return {
        "none": None,
        "crop-flip": augmentations.compose(*crop_flip),
        "reflect-flip": augmentations.compose(
            augmentations.random_crop(4, mirror=True), flip
        ),
        "autoaugment": augmentations.compose(*crop_flip, *auto),
        "inception": flip,
    }[inputs.augment]


def make_crops(inputs: Images) -> tuple[Crop | None, Crop | None]:
    """Return the crops of the images of training and of evaluation, or None."""
    if inputs.image_size is None:
        return None, None
    center = augmentations.center_crop(inputs.image_size)
    if inputs.augment == "inception":
        return augmentations.inception_crop(inputs.image_size), center
    return center, center


def open_images(experiment: Experiment) -> Task:
    """Return the task of the flags, whose inputs are ``Images``."""
    inputs = cast(Images, experiment.inputs)
    image_set = images.load(inputs.data, inputs.data_dir)
    encode = normalised(image_set.mean, image_set.std, experiment.time_steps)
    return Task(image_set, encode, make_augment(inputs), make_crops(inputs))


def train(
    experiment: Experiment, task: Task, *, model: nnx.Module | None = None, **more: Any
) -> Fitted:
    """Train the network of the flags in its folder, or resume there.

    Args:
        experiment: the flags.
        task: the data.
        model: trained instead of the network of the flags.
        more: JSON values that distinguish this run, besides the flags.

    Raises:
        ValueError: the folder holds another run, or the flags do not fit the data.
    """
    # One dictionary is the identity of a run; only workdir.py saves and compares it.
    seen = _seen(task.data)
    settings = identity(experiment) | seen | more
    older = defaults(experiment) | seen
    workdir.check(experiment.workdir, settings, older)
    folder = cache_programs()
    if folder and processes.is_primary():
        print(f"Compiled programs are cached in {folder} for the next run.")
    data, recipe, shard = task.data, experiment.train, processes.shard()
    mesh = sharding.data_mesh(fsdp=experiment.fsdp)
    sharding.check_batch_size(recipe.batch_size, mesh)
    batch_size = recipe.batch_size // shard[1]  # of this process
    crop, eval_crop = task.crops
    train_data = images.train_batches(
        data.train,
        batch_size,
        seed=recipe.seed,
        crop=crop,
        augment=task.augment,
        workers=experiment.workers,
        shard=shard,
    )
    eval_data = images.eval_batches(data.test, batch_size, crop=eval_crop, shard=shard)
    fitted = fit(
        recipe,
        # No name holds the network here, so that ``fit`` can free its parameters.
        _build(experiment, data) if model is None else model,
        make_loss(experiment),
        train_data,
        eval_data,
        encode=task.encode,
        steps_per_epoch=max(1, len(data.train) // recipe.batch_size),
        workdir=workdir.claim(experiment.workdir, settings, older),
        readout=make_readout(experiment),
        mesh=mesh,
        profile=experiment.profile,
    )
    if not fitted.finished and processes.is_primary():
        step = f"step {fitted.metrics['steps']}"
        print(f"Stopped and saved at {step}. Rerun the same command to resume.")
    return fitted


def _seen(data: Data) -> dict[str, Any]:
    """Return what tells data from others; raise a ValueError if processes differ."""
    # Data that were added to or prepared again have another order, and other labels.
    names = "\n".join(data.class_names).encode()
    seen = {"train_examples": len(data.train), "class_names_crc": zlib.crc32(names)}
    # Processes with other numbers of batches would wait for one another forever.
    processes.agree(seen | {"test_examples": len(data.test)})
    return seen


def _build(experiment: Experiment, data: Data) -> nnx.Module:
    side = getattr(experiment.inputs, "image_size", None)
    model = build_model(
        experiment.network,
        experiment.activation,
        num_classes=data.num_classes,
        in_channels=cast(int, data.shape[-1]),
        seed=experiment.train.seed,
        size=(side, side) if side else cast(Any, data.shape[:-1]),
    )
    # Else the checkpoint has the weights, and the source may be gone.
    if experiment.from_ is not None and not has_checkpoint(
        experiment.workdir / "checkpoints"
    ):
        fresh = start_from(model, experiment.from_, data.num_classes)
        if processes.is_primary():
            new = f", a new head ({', '.join(fresh)})" if fresh else ""
            print(f"Starts from the weights of {experiment.from_}{new}.")
    return model


def run(experiment: Experiment, task: Task) -> dict[str, Any] | None:
    """Train and evaluate; write config.json, result.json and what ``fit`` writes.

    Returns:
        the content of result.json, or None if SIGTERM stopped the run.
    """
    fitted = train(experiment, task)
    return report(experiment, fitted, task) if fitted.finished else None


def report(
    experiment: Experiment, fitted: Fitted, task: Task, **more: Any
) -> dict[str, Any]:
    """Measure spikes and energy of what ``train`` returned; write result.json.

    Writes card.json and weights.npz too, which ``spikejax.load`` reads.

    Args:
        experiment, task: as in ``train``.
        fitted: the trained network and its metrics.
        more: further entries of result.json.

    Returns:
        the content of result.json.
    """
    test, crop = task.data.test, task.crops[1]
    # 111 photographs of 224x224x3, but all 256 images of Tiny-ImageNet.
    most = max(1, ENERGY_VALUES // test.take([0], crop)["image"].size)
    sample = images.sample(test, min(ENERGY_IMAGES, most), crop)
    xs = task.encode(jnp.asarray(sample["image"]), jax.random.key(0))
    spent = energy.measure(fitted.model, xs, cast(Any, sample.get("length")))
    result = fitted.metrics | {
        "spikes_per_image": spent.spikes_per_image,
        "energy_nj": spent.energy_nj,
        "mac_nj": spent.mac_nj,
        "ann_energy_nj": spent.ann_energy_nj,
        "seed": experiment.train.seed,
        "versions": {m.__name__: m.__version__ for m in (spikejax, jax, flax)},
        "device": jax.devices()[0].device_kind,
        **more,
    }
    workdir.write(experiment.workdir / "result.json", result)
    if processes.is_primary():
        data, flags = task.data, identity(experiment)
        mean, std = (getattr(data, name, None) for name in ("mean", "std"))
        card = Card(flags, data.class_names, data.shape, mean, std, result)
        trained.save(experiment.workdir, fitted.model, card)
    return result


def read(folder: Path | str, data_dir: Path | None = None) -> Experiment:
    """Return the experiment of a folder; ``train`` of it returns its trained model.

    Args:
        folder: workdir of a run on images.
        data_dir: folder of its data, which config.json does not name.

    Raises:
        ValueError: the folder holds no run, or a corrupted config.json.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ValueError(
            f"read: expected a folder with the config.json of a run, got {folder}. "
            "Give the --workdir of a training."
        )
    try:
        saved = json.loads(path.read_text()) | {"data_dir": data_dir}
        # config.json may have been edited.
        return checked(override(Experiment(Path(folder)), saved))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"read: expected the settings of a run in {path}, got: {error} Fix the "
            "file, or take another folder."
        ) from error


def read_relu(folder: Path | str, data_dir: Path | None = None) -> Experiment:
    """Return the ReLU run of a folder; ``train`` of it returns its network.

    Raises:
        ValueError: there is no run, or it is no ReLU network.
    """
    run = read(folder, data_dir)
    if run.activation.neuron != "relu":
        raise ValueError(
            f"relu: expected a run with --neuron relu, got {folder}, which has "
            f"{run.activation.neuron}."
        )
    return run


def identity(experiment: Experiment) -> dict[str, Any]:
    """Return {flag: value} of the flags that distinguish a run from others."""
    flags = flatten(experiment).items()
    return {name: value for name, value in flags if name not in NOT_IDENTITY}


def defaults(experiment: Experiment) -> dict[str, Any]:
    """Return {flag: default} of those flags, for folders that are older than a flag."""
    found = flatten(Experiment(Path()))
    for name in ("inputs", "network", "activation"):  # those may not fit together
        found |= flatten(type(getattr(experiment, name))())
    return {name: found[name] for name in identity(experiment)}


def main(experiment: Experiment) -> None:
    """Run one experiment on images and print one line of result."""
    with processes.distributed(experiment.processes, flatten(experiment)):
        result = run(experiment, open_images(experiment))
        if result and processes.is_primary():
            print(
                f"accuracy {result['accuracy']:.2%}, {result['seconds']:.0f} s, "
                f"{result['spikes_per_image']:,.0f} spikes and "
                f"{result['energy_nj']:,.0f} nJ per image"
            )
