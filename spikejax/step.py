"""One training step and one evaluation step, as pure functions of a plain dict.

The state is a dict of arrays: step, params, rest (batch statistics), opt, key and, if
asked for, ema. ``spikejax.train`` repeats the steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

Encode = Callable[[jax.Array, jax.Array], jax.Array]  # (images, rng) -> xs [B, T, ...]
Loss = Callable[[jax.Array, jax.Array], jax.Array]  # (logits, labels) -> [B]


def _as_they_lie(params: Any) -> Any:
    return params


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


def initial_state(
    model: nnx.Module, optimizer: optax.GradientTransformation, config: TrainConfig
) -> dict[str, Any]:
    """The state before the first step, as a plain dict of arrays."""
    _, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
    state = {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "rest": rest,
        "opt": optimizer.init(params),
        "key": jax.random.key(config.seed),
    }
    return state | ({"ema": params} if config.ema else {})


def make_train_step(
    graphdef: nnx.GraphDef,
    loss: Loss,
    encode: Encode,
    optimizer: optax.GradientTransformation,
    ema: float = 0.0,
    *,
    norm_groups: int = 1,
    gather: Callable[[Any], Any] = _as_they_lie,
) -> Callable:
    """The pure step (state, batch) -> (state, metrics), to be jitted.

    Metrics are the mean loss and accuracy, and the norm of the gradient of each leaf.

    Args:
        graphdef: of the model, in training mode.
        loss, encode, optimizer: see ``spikejax.train.fit`` and ``make_optimizer``.
        ema: decay of the moving average of the parameters, 0 keeps none.
        norm_groups: parts of the batch with batch statistics of their own, of which the
            state keeps the mean. As many as devices, and the forward pass needs no
            word between them; 1 is what one device would do, whatever their number.
        gather: parameters as they lie to parameters as the model takes them.
    """

    def train_step(state, batch):
        xs = encode(batch["image"], jax.random.fold_in(state["key"], state["step"]))

        def objective(params):
            params = gather(params)

            def forward(xs):
                model = nnx.merge(graphdef, params, state["rest"])
                logits = model(xs)
                return logits, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))

            logits, rest = _in_groups(forward, xs, norm_groups)
            return loss(logits, batch["label"]).mean(), (logits, rest)

        (value, (logits, rest)), gradients = jax.value_and_grad(
            objective, has_aux=True
        )(state["params"])
        updates, opt = optimizer.update(gradients, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = {"params": params, "rest": rest, "opt": opt, "key": state["key"]}
        if ema:
            new["ema"] = optax.incremental_update(params, state["ema"], 1 - ema)
        metrics = {
            "loss": value,
            "accuracy": _correct(logits, batch["label"]).mean(),
            "gradient_norms": jax.tree.map(jnp.linalg.norm, gradients),
        }
        return new | {"step": state["step"] + 1}, metrics

    return train_step


CPU_OPTIONS = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_disable_hlo_passes": "cse_barrier_expander",
}


@cache
def compiler_options(platform: str) -> dict[str, Any]:
    """For ``jax.jit(step, compiler_options=...)`` of a training step on a platform.

    On "cpu": the order of operations that takes the least memory, instead of the one
    that keeps most cores busy, and barriers that stay, without which ``jax.checkpoint``
    is undone. Two fifths of the memory, and no more time (docs/results.md).
    """
    if platform != "cpu":
        return {}
    return {name: o for name, o in CPU_OPTIONS.items() if _accepted({name: o})}


def _accepted(options):
    """Whether this XLA has such options: their names are not promised to stay."""
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _in_groups(forward, xs, groups):
    """(logits, rest) of the groups, one after the other in the batch."""
    if groups == 1:
        return forward(xs)
    logits, rest = jax.vmap(forward)(xs.reshape(groups, -1, *xs.shape[1:]))
    return logits.reshape(-1, *logits.shape[2:]), jax.tree.map(_mean, rest)


def _mean(leaf):
    floats = jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.mean(0) if floats else leaf[0]  # counts and keys are the same in all


def make_predict(
    graphdef: nnx.GraphDef,
    encode: Encode,
    gather: Callable[[Any], Any] = _as_they_lie,
) -> Callable:
    """(state, images) -> logits [B, T, K], by the averaged parameters where kept."""

    def predict(state, images):
        params = gather(state.get("ema", state["params"]))
        model = nnx.merge(graphdef, params, state["rest"])
        return model(encode(images, state["key"]))

    return predict


def make_eval_step(predict: Callable, loss: Loss) -> Callable:
    """The pure step (state, batch) -> sums of loss and accuracy, to be jitted.

    Examples with weight 0, which fill up the last batch, do not count; "examples" is
    the number of the others.
    """

    def eval_step(state, batch):
        logits, weight = predict(state, batch["image"]), batch["weight"]
        return {
            "loss": (loss(logits, batch["label"]) * weight).sum(),
            "accuracy": (_correct(logits, batch["label"]) * weight).sum(),
            "examples": weight.sum(),
        }

    return eval_step


def _correct(logits, labels):
    return (logits.mean(1).argmax(-1) == labels).astype(jnp.float32)
