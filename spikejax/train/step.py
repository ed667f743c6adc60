"""One training step and one evaluation step, as pure functions of a plain dict.

The state is a dict of arrays: step, params, rest (batch statistics), opt, key and, if
asked for, ema. ``spikejax.train.loop`` repeats the steps.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from spikejax.train.recipe import TrainConfig

Encode = Callable[[jax.Array, jax.Array], jax.Array]  # (images, rng) -> xs [B, T, ...]
Loss = Callable[[jax.Array, jax.Array], jax.Array]  # (logits, labels) -> [B]


def _as_they_lie(params: Any) -> Any:
    return params


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
        loss, encode: see ``spikejax.train.fit``.
        optimizer: see ``spikejax.train.recipe.make_optimizer``.
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
