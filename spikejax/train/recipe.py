"""How a network is trained: the settings, and the optimiser that they make."""

from dataclasses import dataclass
from typing import Literal

import jax
import optax

from spikejax.train.settings import check_settings


@dataclass(frozen=True)
class TrainConfig:
    """How to train."""

    epochs: float = 10.0
    """Passes over the training images."""
    steps: int | None = None
    """Training steps, instead of epochs."""
    batch_size: int = 128
    """Images a step, over all devices."""
    seed: int = 0
    """Of the initial weights, the order of the images and their augmentation."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd has Nesterov momentum 0.9 and L2 decay, adamw decoupled decay."""
    learning_rate: float = 0.1
    """At its peak; it falls along a cosine to zero."""
    learning_rate_batch: int | None = None
    """Images a step for which it holds; it grows in proportion to --batch-size."""
    warmup: float = 0.05
    """Part of the training, in 0..1, in which the learning rate rises."""
    weight_decay: float = 5e-4
    """On kernels alone: not on norms, biases, leaks and thresholds."""
    clip: float = 0.0
    """Largest norm of the gradient; 0 clips nothing."""
    ema: float = 0.0
    """Evaluate a moving average of the parameters with this decay; 0 keeps none."""
    norm_groups: int = 1
    """Parts of the batch that are normalised apart; 1 takes the whole."""
    evaluate_every: float = 1.0
    """Epochs between evaluations; each saves a checkpoint too."""
    save_every: int = 1000
    """Steps between checkpoints."""

    def __post_init__(self):
        check_settings(self)
        bounds = {
            "epochs": self.epochs > 0,
            "steps": self.steps is None or self.steps >= 1,
            "batch_size": self.batch_size >= 1,
            "learning_rate": self.learning_rate > 0,
            "learning_rate_batch": self.learning_rate_batch is None
            or self.learning_rate_batch >= 1,
            "warmup": 0 <= self.warmup < 1,
            "weight_decay": self.weight_decay >= 0,
            "clip": self.clip >= 0,
            "ema": 0 <= self.ema < 1,
            "norm_groups": self.norm_groups >= 1
            and self.batch_size % self.norm_groups == 0,
            "evaluate_every": self.evaluate_every > 0,
            "save_every": self.save_every >= 1,
        }
        for name, good in bounds.items():
            if not good:
                raise ValueError(
                    f"{name}: expected {_RANGES[name]}, got {getattr(self, name)}."
                )


_RANGES = {
    "epochs": "more than 0",
    "steps": "at least 1",
    "batch_size": "at least 1",
    "learning_rate": "more than 0",
    "learning_rate_batch": "at least 1 image",
    "warmup": "a part of the training, 0 <= warmup < 1",
    "weight_decay": "0 or more",
    "clip": "0 (off) or more",
    "ema": "0 (off) <= ema < 1",
    "norm_groups": "a divisor of the batch size",
    "evaluate_every": "more than 0 epochs",
    "save_every": "at least 1 step",
}


def make_optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, weight decay on kernels, SGD or AdamW with warm-up and cosine.

    Reference: the rate in proportion to the batch, Goyal et al. 2017, arXiv:1706.02677.
    """
    warmup = int(config.warmup * steps)
    peak = config.learning_rate
    if config.learning_rate_batch:
        peak *= config.batch_size / config.learning_rate_batch
    schedule = optax.warmup_cosine_decay_schedule(
        peak / max(1, warmup), peak, warmup, steps
    )

    def kernels(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    if config.optimizer == "adamw":
        adamw = optax.adamw(schedule, weight_decay=config.weight_decay, mask=kernels)
        return optax.chain(clip, adamw)
    decay = optax.add_decayed_weights(config.weight_decay, mask=kernels)
    return optax.chain(clip, decay, optax.sgd(schedule, momentum=0.9, nesterov=True))
