"""An experiment on images, from flags to result.json: what the scripts share.

A script names its models and its recipe; ``run`` does the rest and may be called from a
notebook with the same ``Experiment``.
"""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax
import jax
import jax.numpy as jnp
from flax import nnx

import spikejax
from spikejax import cache, encode, energy, losses
from spikejax.data import augment, images
from spikejax.data.augment import center_crop, inception_crop
from spikejax.experiment.build import NeuronName, build_model
from spikejax.train import processes, sharding
from spikejax.train import workdir as folder
from spikejax.train.loop import Fitted, fit
from spikejax.train.processes import Processes
from spikejax.train.recipe import TrainConfig, check_settings

ENERGY_IMAGES = 256  # test images over which spikes and energy are measured, if
ENERGY_VALUES = 2**24  # they are small; of large ones as many as have so many numbers

# Where a run runs, reads and writes: it may go on with others.
PLACES = ("workdir", "data_dir", "workers", "stream", "remat", "fsdp") + (
    "profile",
    "processes",
)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What to train on what, and how."""

    workdir: Path
    """Folder of this run; the same command on the same folder goes on."""
    data: str = "digits"
    """Image set: digits, fake (made up), or any prepared TFDS set, such as cifar10."""
    data_dir: Path | None = None
    """Folder of the TFDS sets; TFDS's own default if not given."""
    model: str = "convnet"
    """Network: a key of MODELS, such as convnet, vgg11, resnet19 or vggsnn."""
    residual: Literal["plain", "sew", "ms"] = "ms"
    """Residual of the resnets: where their neurons stand (spikejax.models.resnet)."""
    pool: Literal["max", "avg"] = "max"
    """Pooling of convnet and vgg; the maximum of spikes is their OR."""
    width: float = 1.0
    """Factor on the channels of the resnets, general-cnn and general-lstm."""
    binarise: Literal["bernoulli", "straight-through"] = "bernoulli"
    """How general-cnn and general-lstm make spikes of the input of a layer."""
    neuron: NeuronName = "mt-parallel"
    """Activation; relu trains the network that does not spike."""
    num_thresholds: int = 4
    """Thresholds of a multi-threshold neuron."""
    time_steps: int = 1
    """Steps for which the network sees an image."""
    loss: Literal["rate", "tet"] = "rate"
    """Cross-entropy of the mean over time, or at every step (TET)."""
    label_smoothing: float = 0.0
    """Probability that is spread over all classes, 0 <= p < 1."""
    image_size: int | None = None
    """Photographs: height and width that the network sees; their own if not given."""
    augment: Literal["none", "crop-flip", "autoaugment", "inception"] = "none"
    """Of the training images; autoaugment adds crop, flip and Cutout; inception takes a
    random part of a photograph, and its mirror image."""
    workers: int = 0
    """Processes that prepare batches beside this one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers of the computation; parameters, statistics and membranes are float32."""
    remat: Literal["none", "blocks"] = "none"
    """Keep the inputs of the blocks of a resnet alone for the gradient: less memory."""
    fsdp: int = 1
    """Devices that share one copy of the parameters; 1 gives each its own."""
    profile: bool = False
    """Write a trace of five steps to WORKDIR/profile, for TensorBoard's XProf."""
    processes: Processes = Processes()
    """Where a run has several processes, one a machine."""
    train: TrainConfig = TrainConfig()
    """The recipe."""

    def __post_init__(self):
        for name in ("workdir", "data_dir"):
            if isinstance(folder_name := getattr(self, name), str):
                object.__setattr__(self, name, Path(folder_name))
        check_settings(self)
        if self.time_steps < 1:
            raise ValueError(f"time_steps: expected at least 1, got {self.time_steps}.")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size: expected at least 1, got {self.image_size}.")
        if self.augment == "inception" and self.image_size is None:
            raise ValueError(
                "image_size: expected a number with --augment inception, got none. "
                "Take 224, or 64 for Tiny-ImageNet."
            )
        if self.num_thresholds < 1:
            raise ValueError(
                f"num_thresholds: expected at least 1, got {self.num_thresholds}."
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                "label_smoothing: expected a probability, 0 <= p < 1, got "
                f"{self.label_smoothing}."
            )
        if self.neuron == "relu" and self.time_steps > 1:
            raise ValueError(
                f"time_steps: expected 1 for --neuron relu, which has no state, got "
                f"{self.time_steps}."
            )


def make_encode(experiment: Experiment, image_set: images.ImageSet) -> Callable:
    """(uint8 images, rng) -> xs [B, T, H, W, C]: normalised, the same every step."""
    mean, std = jnp.array(image_set.mean), jnp.array(image_set.std)

    def normalise(raw, rng):
        return encode.direct((raw / 255.0 - mean) / std, experiment.time_steps)

    return normalise


def make_loss(experiment: Experiment) -> Callable:
    """The loss that the flags name."""
    loss = losses.tet if experiment.loss == "tet" else losses.rate_cross_entropy
    return partial(loss, label_smoothing=experiment.label_smoothing)


def make_augment(experiment: Experiment) -> Callable | None:
    """The augmentation that the flags name."""
    crop_flip = (augment.random_crop(4), augment.random_flip())
    return {
        "none": None,
        "crop-flip": augment.compose(*crop_flip),
        "autoaugment": augment.compose(
            *crop_flip, augment.autoaugment_cifar(), augment.cutout(16)
        ),
        "inception": augment.random_flip(),
    }[experiment.augment]


def make_crops(experiment: Experiment) -> tuple[Any, Any]:
    """What is cut out of photographs (to train on, to evaluate on), or None."""
    size = experiment.image_size
    if size is None:
        return None, None
    middle = center_crop(size)
    return inception_crop(size) if experiment.augment == "inception" else middle, middle


class Input(NamedTuple):
    """How data become the input of a network; each is called with the experiment.

    load: to a set, as images.load returns it. encode: and the set, to (raw, rng) -> xs
    [B, T, ...]. augment: to an augmentation of host batches, or None. crops: to the
    crops of training and evaluation, or None.
    """

    load: Callable[[Any], Any]
    encode: Callable[[Any, Any], Callable]
    augment: Callable[[Any], Callable | None]
    crops: Callable[[Any], tuple[Any, Any]] = lambda experiment: (None, None)


IMAGES = Input(
    lambda e: images.load(e.data, e.data_dir), make_encode, make_augment, make_crops
)


def train(
    experiment: Experiment,
    model: nnx.Module | None = None,
    source: Input = IMAGES,
    **more,
) -> Fitted:
    """Train the network of the flags in its folder, or go on where it stopped there.

    Args:
        experiment: the flags.
        model: trained instead of the one that the flags name.
        source: how the data come to the network.
        more: what else tells this run from another, as JSON has it.
    """
    with processes.distributed(experiment.processes):
        return _train(experiment, model, source, _settings(experiment) | more)


def _train(experiment, model, source, settings):
    folder.check(experiment.workdir, settings, _settings(Experiment(Path())))
    cache.keep_programs()
    recipe, shard = experiment.train, processes.shard()
    mesh = sharding.data_mesh(fsdp=experiment.fsdp)
    sharding.check_batch_size(recipe.batch_size, mesh)
    image_set, (crop, middle) = source.load(experiment), source.crops(experiment)
    train_data = images.train_batches(
        image_set.train,
        recipe.batch_size // shard[1],
        seed=recipe.seed,
        crop=crop,
        augment=source.augment(experiment),
        workers=experiment.workers,
        shard=shard,
    )
    eval_data = images.eval_batches(
        image_set.test, recipe.batch_size // shard[1], crop=middle, shard=shard
    )
    return fit(
        recipe,
        # Held by nothing else, so that its whole parameters can go.
        build_model(experiment, image_set) if model is None else model,
        make_loss(experiment),
        train_data,
        eval_data,
        encode=source.encode(experiment, image_set),
        steps_per_epoch=max(1, len(image_set.train) // recipe.batch_size),
        workdir=folder.claim(experiment.workdir, settings),
        mesh=mesh,
        profile=experiment.profile,
    )


def run(experiment: Experiment, source: Input = IMAGES) -> dict[str, Any] | None:
    """Train and evaluate; writes config.json, result.json and what ``fit`` writes.

    Args:
        experiment: the flags.
        source: how the data come to the network.

    Returns:
        the content of result.json, or None where SIGTERM stopped the run.
    """
    fitted = train(experiment, source=source)
    if not fitted.finished:
        steps = fitted.metrics["steps"]
        if processes.is_primary():
            print(
                f"Stopped at step {steps}, saved. The same command goes on from there."
            )
        return None
    return report(experiment, fitted, source)


def report(
    experiment: Experiment, fitted: Fitted, source: Input = IMAGES, **more
) -> dict[str, Any]:
    """Measure spikes and energy of what ``train`` returned; write result.json."""
    image_set = source.load(experiment)
    _, middle = source.crops(experiment)
    most = ENERGY_VALUES // image_set.test.take([0], middle)["image"].size
    count = min(ENERGY_IMAGES, len(image_set.test), most)
    sample = image_set.test.take(range(count), middle)["image"]
    xs = source.encode(experiment, image_set)(jnp.asarray(sample), jax.random.key(0))
    spent = energy.measure(fitted.model, xs)
    result = fitted.metrics | {
        "spikes_per_image": spent.spikes_per_image,
        "energy_nj": spent.energy_nj,
        "mac_nj": spent.mac_nj,
        "ann_energy_nj": spent.ann_energy_nj,
        "seed": experiment.train.seed,
        "versions": {
            "spikejax": spikejax.__version__,
            "jax": jax.__version__,
            "flax": flax.__version__,
        },
        "device": jax.devices()[0].device_kind,
    }
    folder.write(experiment.workdir / "result.json", result | more)
    return result | more


def read(workdir: Path | str, data_dir: Path | None = None) -> Experiment:
    """The experiment that a folder holds; ``train`` of it gives its trained model."""
    workdir = Path(workdir)
    path = workdir / "config.json"
    if not path.exists():
        raise ValueError(
            f"read: expected a folder with the config.json of a run, got {workdir}."
        )
    there = json.loads(path.read_text())

    def known(kind):
        return {
            f.name: there[f.name] for f in dataclasses.fields(kind) if f.name in there
        }

    recipe = TrainConfig(**known(TrainConfig))
    return Experiment(workdir, data_dir=data_dir, train=recipe, **known(Experiment))


def _settings(experiment: Experiment) -> dict[str, Any]:
    """What makes this run."""
    settings = dataclasses.asdict(experiment)
    for name in PLACES:
        settings.pop(name, None)
    return settings | settings.pop("train")


def main(experiment: Experiment, source: Input = IMAGES) -> None:
    """Run one experiment and print one line of result."""
    if (result := run(experiment, source)) and processes.is_primary():
        print(
            f"accuracy {result['accuracy']:.2%}, {result['seconds']:.0f} s, "
            f"{result['spikes_per_image']:,.0f} spikes and "
            f"{result['energy_nj']:,.0f} nJ an image"
        )
