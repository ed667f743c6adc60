"""The recipe of a training: its settings, and the optimizer that they make."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jax
import optax

# What a setting may be: a description, and the test of it.
Ranges = Mapping[str, tuple[str, Callable[[Any], bool]]]


def check_settings(settings: Any, ranges: Ranges | None = None) -> None:
    """Check the choices and the ranges of a dataclass of settings.

    Flags are checked when they are parsed; this is for settings made in Python, where a
    misspelled choice would otherwise train something else.

    Args:
        settings: instance of a dataclass; a field annotated as a `Literal` is to be one
            of the choices.
        ranges: {field: (expected, test of the value)}; None is not tested. Every float
            is to be finite.

    Raises:
        ValueError: a field has another value.
    """
    ranges = dict(ranges or {})
    for name, hint in get_type_hints(type(settings)).items():
        if get_origin(hint) is Literal:
            choices = get_args(hint)
            ranges[name] = f"one of {', '.join(choices)}", choices.__contains__
    for name, value in vars(settings).items():
        expected, is_good = ranges.get(name, ("", lambda _: True))
        if isinstance(value, float) and not math.isfinite(value):
            expected, is_good = "a finite number", math.isfinite
        if value is not None and not is_good(value):
            raise ValueError(f"{name}: expected {expected}, got {value!r}.")


MOST_STEPS = 2**31 - 1  # the step is an int32

_RANGES: Ranges = {
    "epochs": ("more than 0, at most a million", lambda x: 0 < x <= 1e6),
    "steps": (f"1 to {MOST_STEPS}", lambda x: 1 <= x <= MOST_STEPS),
    "seed": ("0 to 2**32 - 1", lambda x: 0 <= x < 2**32),
    "batch_size": ("at least 1", lambda x: x >= 1),
    "learning_rate": ("more than 0", lambda x: x > 0),
    "learning_rate_batch": ("at least 1 image", lambda x: x >= 1),
    "warmup": ("a part of the training, 0 <= warmup < 1", lambda x: 0 <= x < 1),
    "weight_decay": ("0 or more", lambda x: x >= 0),
    "clip": ("0 (off) or more", lambda x: x >= 0),
    "ema": ("0 (off) <= ema < 1", lambda x: 0 <= x < 1),
    "evaluate_every": ("more than 0 epochs", lambda x: x > 0),
    "save_every": ("at least 1 step", lambda x: x >= 1),
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training."""

    epochs: float = 10.0
    """Passes over the training images, in whole batches each."""
    steps: int | None = None
    """Training steps, instead of epochs."""
    batch_size: int = 128
    """Images per step, over all devices."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and their augmentation."""
    optimizer: Literal["sgd", "adamw", "lamb"] = "sgd"
    """sgd has Nesterov momentum 0.9 and L2 decay, adamw decoupled decay; lamb, for
    large batches, is adamw with steps in proportion to the norm of each parameter."""
    learning_rate: float = 0.1
    """Peak learning rate, decayed to zero on a cosine."""
    learning_rate_batch: int | None = None
    """Reference batch size; the learning rate scales linearly with batch_size."""
    warmup: float = 0.05
    """Part of the training, in 0..1, in which the learning rate rises."""
    weight_decay: float = 5e-4
    """Decay of the parameters named kernel; biases, norms and neurons have none."""
    clip: float = 0.0
    """Largest norm of the gradient; 0 clips nothing."""
    ema: float = 0.0
    """Decay of a moving average of the parameters, used in evaluation; 0 keeps none."""
    norm_groups: int = 1
    """Parts of the batch that are normalised separately; 1 takes the whole."""
    evaluate_every: float = 1.0
    """Epochs between evaluations; each saves a checkpoint too."""
    save_every: int = 1000
    """Steps between checkpoints."""

    def __post_init__(self):
        size = self.batch_size
        groups = "a divisor of the batch size", lambda n: n >= 1 and size % n == 0
        check_settings(self, {**_RANGES, "norm_groups": groups})


def make_optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """Return the optimizer with clipping, decay of kernels, warm-up and cosine decay.

    rate(k) = peak * 0.5 * (1 + cos(pi * (k - warmup) / (steps - warmup))) after warm-up

    Args:
        config: the recipe.
        steps: of the whole training.

    Reference: the rate in proportion to the batch, Goyal et al. 2017, arXiv:1706.02677;
    LAMB, You et al. 2019, arXiv:1904.00962.
    """
    warmup = int(config.warmup * steps)
    reference = config.learning_rate_batch or config.batch_size
    peak = config.learning_rate * (config.batch_size / reference)
    start = peak / max(1, warmup)  # never zero, as a step of 0 is lost
    schedule = optax.warmup_cosine_decay_schedule(start, peak, warmup, steps)

    def is_kernel(params: Any) -> Any:
        # By name: stacked layers have biases, leaks and thresholds of several axes.
        def named(path: tuple[Any, ...], _: jax.Array) -> bool:
            return jax.tree_util.keystr(path[-1:], simple=True) == "kernel"

        return jax.tree_util.tree_map_with_path(named, params)

    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    if config.optimizer != "sgd":
        make = optax.adamw if config.optimizer == "adamw" else optax.lamb
        decay = config.weight_decay
        return optax.chain(clip, make(schedule, weight_decay=decay, mask=is_kernel))
    # Added to the gradient before the momentum: L2, as in PyTorch's SGD.
    decay = optax.add_decayed_weights(config.weight_decay, mask=is_kernel)
    return optax.chain(clip, decay, optax.sgd(schedule, momentum=0.9, nesterov=True))
