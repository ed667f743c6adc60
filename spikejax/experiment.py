"""An experiment on images, from flags to result.json: what the scripts share.

A script names its models and its recipe; ``run`` does the rest and may be called from a
notebook with the same ``Experiment``.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import flax
import jax
import jax.numpy as jnp
from flax import nnx

import spikejax
from spikejax import encode, energy, losses, neurons, sharding
from spikejax.data import augment, images
from spikejax.layers import IF, LIF, PLIF, MultiThreshold
from spikejax.models import resnet, vgg
from spikejax.norm import td_batch_norm
from spikejax.step import TrainConfig
from spikejax.train import Fitted, fit

ENERGY_IMAGES = 256  # test images over which spikes and energy are measured

NeuronName = Literal["lif", "plif", "if", "mt-parallel", "mt-cascade", "relu"]


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
    """Network: convnet, vgg11, vgg16, resnet18, resnet19 or resnet20."""
    residual: Literal["plain", "sew", "ms"] = "ms"
    """Residual of the resnets: where their neurons stand (spikejax.models.resnet)."""
    pool: Literal["max", "avg"] = "max"
    """Pooling of convnet and vgg; the maximum of spikes is their OR."""
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
    augment: Literal["none", "crop-flip", "autoaugment"] = "none"
    """Augmentation of the training images; autoaugment adds crop, flip and Cutout."""
    workers: int = 0
    """Processes that prepare batches beside this one."""
    train: TrainConfig = TrainConfig()
    """The recipe."""

    def __post_init__(self):
        if self.time_steps < 1:
            raise ValueError(f"time_steps: expected at least 1, got {self.time_steps}.")
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


def spacing(experiment: Experiment) -> float:
    """Threshold, or distance of thresholds, in standard deviations of the input.

    Our choice: one threshold at 1; N > 1 thresholds at 1/2 each.
    """
    several = experiment.neuron.startswith("mt-") and experiment.num_thresholds > 1
    return 0.5 if several else 1.0


def neuron_factory(experiment: Experiment) -> Callable[[], Callable]:
    """The activation that the flags name, as models take it.

    Spiking neurons: soft reset, threshold 1, input not scaled by the leak, ATan.
    """
    options: dict[str, Any] = {"decay_input": False, "detach_reset": True}
    several = partial(MultiThreshold, experiment.num_thresholds, **options)
    return {
        "lif": partial(LIF, **options),
        "plif": partial(PLIF, **options),
        "if": partial(IF, detach_reset=True),
        "mt-parallel": partial(several, neurons.parallel, learn_tau=True),
        "mt-cascade": partial(several, neurons.cascade, learn_tau=True),
        "relu": lambda: nnx.relu,
    }[experiment.neuron]


MODELS: dict[str, Callable] = {
    "convnet": partial(vgg.VGG, (16, vgg.POOL, 32, 32)),
    "vgg11": vgg.vgg11,
    "vgg16": vgg.vgg16,
    "resnet18": resnet.cifar_resnet18,
    "resnet19": resnet.resnet19,
    "resnet20": resnet.resnet20,
}


def build_model(experiment: Experiment, image_set: images.ImageSet) -> nnx.Module:
    """The network that the flags name, with initial weights from the seed."""
    if experiment.model not in MODELS:
        raise ValueError(
            f"model: expected one of {', '.join(MODELS)}, got {experiment.model!r}."
        )
    norm = partial(td_batch_norm, v_threshold=1 / spacing(experiment))
    if experiment.model.startswith("resnet"):
        residuals = {"plain": resnet.plain, "sew": resnet.sew, "ms": resnet.ms}
        options = {"residual": residuals[experiment.residual]}
    else:
        pools = {"max": vgg.max_pool, "avg": vgg.avg_pool}
        options = {"pool": pools[experiment.pool]}

    def make():
        return MODELS[experiment.model](
            num_classes=image_set.num_classes,
            neuron=neuron_factory(experiment),
            norm=norm,
            in_channels=image_set.shape[-1],
            rngs=nnx.Rngs(experiment.train.seed),
            **options,
        )

    graphdef, _ = nnx.split(nnx.eval_shape(make))
    weights = jax.jit(lambda: nnx.to_pure_dict(nnx.state(make())))()
    return nnx.merge(graphdef, weights)


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
    }[experiment.augment]


def train(experiment: Experiment, model: nnx.Module | None = None, **more) -> Fitted:
    """Train the network of the flags in its folder, or go on where it stopped there.

    Args:
        experiment: the flags.
        model: trained instead of the one that the flags name.
        more: what else tells this run from another, as JSON has it.
    """
    settings = _settings(experiment) | more
    _check_workdir(experiment.workdir, settings)
    image_set = images.load(experiment.data, experiment.data_dir)
    sharding.check_batch_size(experiment.train.batch_size, sharding.data_mesh())
    train_data = images.train_batches(
        image_set.train,
        experiment.train.batch_size,
        seed=experiment.train.seed,
        augment=make_augment(experiment),
        workers=experiment.workers,
    )
    eval_data = images.eval_batches(image_set.test, experiment.train.batch_size)
    model = build_model(experiment, image_set) if model is None else model
    experiment.workdir.mkdir(parents=True, exist_ok=True)
    _write(experiment.workdir / "config.json", settings)
    return fit(
        experiment.train,
        model,
        make_loss(experiment),
        train_data,
        eval_data,
        encode=make_encode(experiment, image_set),
        steps_per_epoch=max(1, len(image_set.train) // experiment.train.batch_size),
        workdir=experiment.workdir,
        settings=settings,
    )


def run(experiment: Experiment) -> dict[str, Any] | None:
    """Train and evaluate; writes config.json, result.json and what ``fit`` writes.

    Returns:
        the content of result.json, or None where SIGTERM stopped the run.
    """
    fitted = train(experiment)
    if not fitted.finished:
        steps = fitted.metrics["steps"]
        print(f"Stopped at step {steps}, saved. The same command goes on from there.")
        return None
    image_set = images.load(experiment.data, experiment.data_dir)
    count = min(ENERGY_IMAGES, len(image_set.test))
    sample = images.take(image_set.test, range(count))["image"]
    xs = make_encode(experiment, image_set)(jnp.asarray(sample), jax.random.key(0))
    report = energy.measure(fitted.model, xs)
    result = fitted.metrics | {
        "spikes_per_image": report.spikes_per_image,
        "energy_nj": report.energy_nj,
        "ann_energy_nj": report.ann_energy_nj,
        "seed": experiment.train.seed,
        "versions": {
            "spikejax": spikejax.__version__,
            "jax": jax.__version__,
            "flax": flax.__version__,
        },
        "device": jax.devices()[0].device_kind,
    }
    _write(experiment.workdir / "result.json", result)
    return result


def read(workdir: Path, data_dir: Path | None = None) -> Experiment:
    """The experiment that a folder holds; ``train`` of it gives its trained model."""
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


def _write(path: Path, content: dict[str, Any]) -> None:
    """The file is whole or as it was, even when the process is killed."""
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(json.dumps(content, indent=2))
    os.replace(beside, path)


def _settings(experiment: Experiment) -> dict[str, Any]:
    """What makes this run: all flags but where it reads and writes."""
    settings = dataclasses.asdict(experiment)
    for name in ("workdir", "data_dir", "workers"):
        del settings[name]
    return settings | settings.pop("train")


def _check_workdir(workdir: Path, settings: dict[str, Any]) -> None:
    """ValueError where the folder holds another run."""
    path = workdir / "config.json"
    if not path.exists():
        return
    there = json.loads(path.read_text())
    differ = [k for k in settings if settings[k] != there.get(k)]
    if differ:
        name = differ[0]
        raise ValueError(
            f"workdir: expected a new folder or one of this run, got {workdir}, which "
            f"holds another: {name} is {there.get(name)!r} there and "
            f"{settings[name]!r} here. Take another --workdir, or delete it."
        )


def main(experiment: Experiment) -> None:
    """Run one experiment and print one line of result."""
    if result := run(experiment):
        print(
            f"accuracy {result['accuracy']:.2%}, {result['seconds']:.0f} s, "
            f"{result['spikes_per_image']:,.0f} spikes and "
            f"{result['energy_nj']:,.0f} nJ an image"
        )
