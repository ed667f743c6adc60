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

from spikejax.losses import mean_over_time
from spikejax.nn.penalty import penalty
from spikejax.train.recipe import TrainConfig

State = dict[str, Any]  # of arrays and of dicts of them
Batch = dict[str, jax.Array]  # image [B, ...], label [B] or [B, K], maybe length [B]
Encode = Callable[[jax.Array, jax.Array], jax.Array]  # (images, rng) -> xs [B, T, ...]
Loss = Callable[..., jax.Array]  # (logits, labels), lengths= of a batch with length
Readout = Callable[[jax.Array, jax.Array | None], jax.Array]  # (logits, lengths)
Gather = Callable[[Any], Any]  # of parameters
Predict = Callable[[State, jax.Array], jax.Array]  # (state, images) -> logits
TrainStep = Callable[[State, Batch], tuple[State, dict[str, Any]]]
EvalStep = Callable[[State, Batch], dict[str, jax.Array]]


def initial_state(
    model: nnx.Module, optimizer: optax.GradientTransformation, config: TrainConfig
) -> State:
    """Return the state before the first step; it shares the arrays of the model."""
    _, params, rest = nnx.split(model, nnx.Param, ...)
    # Plain dicts, and jax.jit instead of nnx.jit: a call takes 0.5 ms instead of 7.8 ms
    # for a model of 95 leaves, and 4 ms instead of 86 ms for one of 711.
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
    state = {
        "step": jnp.zeros((), jnp.int32),
        "key": jax.random.key(config.seed),
        "params": params,
        "rest": rest,
        "opt": optimizer.init(params),
    }
    return state | ({"ema": params} if config.ema else {})


def make_train_step(
    graphdef: nnx.GraphDef,
    loss: Loss,
    encode: Encode,
    optimizer: optax.GradientTransformation,
    ema: float = 0.0,
    *,
    readout: Readout = mean_over_time,
    norm_groups: int = 1,
    gather: Gather = lambda params: params,
) -> TrainStep:
    """Return the pure step (state, batch) -> (state, metrics), to be jitted.

    Metrics are the mean loss, with the costs of ``Penalised`` layers, and accuracy, the
    norm of the gradient of each leaf, and "stop" if the batch has it: whether it is set
    for any example.

    Args:
        graphdef: of the model, in training mode.
        loss, encode, readout: as in ``fit``. optimizer: of the recipe.
        ema: decay of the moving average of the parameters, 0 keeps none.
        norm_groups: parts of the batch with batch statistics and random numbers of
            their own; the state keeps the mean of the statistics. With one group per
            device the forward pass needs no communication; one is the global batch.
        gather: maps sharded to replicated parameters, for their use.
    """

    def train_step(state: State, batch: Batch) -> tuple[State, dict[str, Any]]:
        # By step, for resuming; counted down, as nnx.Rngs(seed) folds it with 0, 1, ...
        xs = encode(batch["image"], jax.random.fold_in(state["key"], ~state["step"]))

        def objective(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            params = gather(params)

            def forward(rest: State, xs: jax.Array) -> tuple[jax.Array, Any]:
                model = nnx.merge(graphdef, params, rest)
                logits = model(xs)
                return logits, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))

            logits, rest = _in_groups(forward, state["rest"], xs, norm_groups)
            value = loss(logits, batch["label"], **_lengths(batch)).mean()
            return value + penalty(nnx.merge(graphdef, params, rest)), (logits, rest)

        both = jax.value_and_grad(objective, has_aux=True)
        (value, (logits, rest)), gradients = both(state["params"])
        updates, opt = optimizer.update(gradients, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = {"step": state["step"] + 1, "params": params, "rest": rest, "opt": opt}
        if ema:
            new["ema"] = optax.incremental_update(params, state["ema"], 1 - ema)
        metrics = {
            "loss": value,
            "accuracy": _correct(logits, batch, readout).mean(),
            "gradient_norms": jax.tree.map(jnp.linalg.norm, gradients),
        }
        if "stop" in batch:
            metrics["stop"] = batch["stop"].any()
        return state | new, metrics

    return train_step


def _in_groups(
    forward: Callable[[State, jax.Array], tuple[jax.Array, Any]],
    rest: State,
    xs: jax.Array,
    groups: int,
) -> tuple[jax.Array, Any]:
    """Return (logits, rest) of consecutive groups of the batch, each by itself."""

    def is_key(leaf: jax.Array) -> bool:
        return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)

    def own_key(leaf: jax.Array, group: jax.Array) -> jax.Array:
        if not is_key(leaf):
            return leaf
        fold = jax.vmap(jax.random.fold_in, (0, None))  # stacked layers have [L] keys
        return fold(leaf.ravel(), group).reshape(leaf.shape)

    def of_group(group: jax.Array, xs: jax.Array) -> tuple[jax.Array, Any]:
        return forward(jax.tree.map(lambda leaf: own_key(leaf, group), rest), xs)

    def joined(before: jax.Array, after: jax.Array) -> jax.Array:
        if is_key(before):
            return before
        floats = jnp.issubdtype(after.dtype, jnp.floating)
        return after.mean(0) if floats else after[0]  # counts are equal in all groups

    if groups == 1:
        return forward(rest, xs)
    parts = xs.reshape(groups, -1, *xs.shape[1:])
    logits, after = jax.vmap(of_group)(jnp.arange(groups), parts)
    return logits.reshape(-1, *logits.shape[2:]), jax.tree.map(joined, rest, after)


def make_predict(
    graphdef: nnx.GraphDef, encode: Encode, gather: Gather = lambda params: params
) -> Predict:
    """Return (state, images) -> logits [B, T, K], with the averaged parameters if kept.

    Args:
        graphdef: of the model, in evaluation mode.
        encode, gather: as in `make_train_step`.
    """

    def predict(state: State, images: jax.Array) -> jax.Array:
        params = gather(state.get("ema", state["params"]))
        model = nnx.merge(graphdef, params, state["rest"])
        return model(encode(images, state["key"]))  # the same noise in each evaluation

    return predict


def make_eval_step(
    predict: Predict, loss: Loss, readout: Readout = mean_over_time
) -> EvalStep:
    """Return the pure step (state, batch) -> sums of loss and accuracy, to be jitted.

    Examples with weight 0, which pad the last batch, do not count; "examples" is the
    number of the others, whose weight is 1.
    """

    def eval_step(state: State, batch: Batch) -> dict[str, jax.Array]:
        logits, counts = predict(state, batch["image"]), batch["weight"] > 0
        scores = {
            "loss": loss(logits, batch["label"], **_lengths(batch)),
            "accuracy": _correct(logits, batch, readout),
            "examples": batch["weight"],
        }
        # Selected, not multiplied: padding may have a loss of NaN, and 0 * NaN is NaN.
        return {name: jnp.where(counts, s, 0).sum() for name, s in scores.items()}

    return eval_step


def _lengths(batch: Batch) -> dict[str, jax.Array]:
    """Return the argument of a loss for sequences of different lengths."""
    return {"lengths": batch["length"]} if "length" in batch else {}


def _correct(logits: jax.Array, batch: Batch, readout: Readout) -> jax.Array:
    labels = batch["label"]
    if labels.ndim == 2:  # of probabilities, as mixup makes them
        labels = labels.argmax(-1)
    answers = readout(logits, batch.get("length")).argmax(-1)
    return (answers == labels).astype(jnp.float32)
