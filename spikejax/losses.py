"""Losses of logits over time: (logits [B, T, K], labels) -> loss [B]; readouts [B, K].

Labels are class numbers [B] in 0..K-1, the loss of any other is nan; or probabilities
[B, K], as mixup makes them. The caller takes the mean over the batch. With ``lengths``,
integers [B] in 1..T, the steps from there on are padding, and do not count.
"""

import math

import jax
import jax.numpy as jnp
import optax

from spikejax.layers import check_lengths


def mean_over_time(logits: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """Return the mean over the steps that count: 1/L sum_{t < L} o_t.

    Args:
        logits: [B, T, ...].
        lengths: [B], steps L of each example, 1 to T; None for T. Of none, it is nan.

    Returns:
        [B, ...].

    Raises:
        ValueError: lengths are not B whole numbers.
    """
    if lengths is None:
        return logits.mean(1)
    valid = _valid("mean_over_time", logits, lengths)
    # Selected, not multiplied: 0 * inf is nan.
    return jnp.where(valid, logits, 0).sum(1) / valid.sum(1)


def max_over_time(logits: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """Return the largest of the steps that count: max_{t < L} o_t.

    Arguments, result and errors are those of ``mean_over_time``.
    """
    if lengths is not None:
        logits = jnp.where(_valid("max_over_time", logits, lengths), logits, -jnp.inf)
    return logits.max(1)


def rate_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    lengths: jax.Array | None = None,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Return the cross-entropy of the time mean: CE(1/T sum_t o_t, y).

    Args:
        logits: [B, T, K].
        labels: [B], class numbers, or [B, K], probabilities.
        lengths: [B], steps that count, 1 to T; None for all.
        label_smoothing: probability spread over all classes, in [0, 1).

    Returns:
        the loss of each example, [B].

    Raises:
        ValueError: logits have no time axis, labels are neither of the two, lengths
            are not B whole numbers, or label_smoothing is out of its range.

    Examples:
        >>> logits = jnp.zeros((2, 4, 10))  # [B, T, K]
        >>> print(rate_cross_entropy(logits, jnp.array([3, 7])))  # ln 10
        [2.3025851 2.3025851]
    """
    logits, targets = _checked("rate_cross_entropy", logits, labels, label_smoothing)
    return optax.softmax_cross_entropy(mean_over_time(logits, lengths), targets)


def max_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    lengths: jax.Array | None = None,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Return the cross-entropy of the maximum over time: CE(max_t o_t, y).

    ``fit`` counts the accuracy of it with readout=max_over_time. Arguments, result and
    errors are those of ``rate_cross_entropy``.

    Reference: Cramer et al. 2020, arXiv:1910.07407 (the loss of their readout units).
    """
    logits, targets = _checked("max_cross_entropy", logits, labels, label_smoothing)
    return optax.softmax_cross_entropy(max_over_time(logits, lengths), targets)


def tet(
    logits: jax.Array,
    labels: jax.Array,
    *,
    lengths: jax.Array | None = None,
    label_smoothing: float = 0.0,
    weight: float = 1e-3,
    target: float = 1.0,
) -> jax.Array:
    """Return the loss of temporal efficient training: every step must classify.

    (1 - weight) 1/T sum_t CE(o_t, y) + weight mean((o - target)^2)

    Args:
        weight: weight of the regularisation, in [0, 1].
        target: value that logits are drawn to, the threshold.

    Other arguments and the result are those of ``rate_cross_entropy``.

    Raises:
        ValueError: as there, or the weight is out of its range.

    Reference: Deng et al. 2022, arXiv:2202.11946.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"tet: expected a weight of 0 to 1, got {weight}.")
    logits, targets = _checked("tet", logits, labels, label_smoothing)
    entropy = optax.softmax_cross_entropy(logits, targets[:, None])
    distance = jnp.square(logits - target).mean(2)
    return mean_over_time((1 - weight) * entropy + weight * distance, lengths)


def rate_mse(
    logits: jax.Array, labels: jax.Array, *, lengths: jax.Array | None = None
) -> jax.Array:
    """Return the mean squared error of the rates: mean_k (1/T sum_t o_tk - [k = y])^2.

    The logits are spikes or membranes of the last layer. Arguments, result and errors
    are those of ``rate_cross_entropy``.

    Reference: Fang et al. 2021, arXiv:2007.05785.
    """
    logits, targets = _checked("rate_mse", logits, labels)
    return jnp.square(mean_over_time(logits, lengths) - targets).mean(-1)


def firing_rate(
    spikes: jax.Array, *, lower: float = 0.0, upper: float = math.inf
) -> jax.Array:
    """Return the cost of a layer that fires too little or too much.

    mean_i max(lower - r_i, 0)^2 + max(mean_i r_i - upper, 0)^2,  r_i = 1/T sum_t s_ti

    The lower bound holds for each neuron, so that none is silent; the upper one for the
    mean of the layer. ``nn.penalty.Penalised`` adds it to the loss of a training.

    Args:
        spikes: of one layer, [B, T, ...].
        lower, upper: spikes per neuron and time step, 0 <= lower <= upper.

    Returns:
        the cost of each example, [B].

    Raises:
        ValueError: spikes have no neurons, or the bounds are out of their range.

    Reference: after Zenke and Vogels 2021, doi:10.1162/neco_a_01367, whose bounds are
    numbers of spikes; rates, which do not change with T, are our choice.
    """
    if spikes.ndim < 3 or not 0 <= lower <= upper:
        raise ValueError(
            "firing_rate: expected spikes [B, T, ...] and 0 <= lower <= upper, got "
            f"{spikes.shape}, {lower} and {upper}. They are spikes per neuron and step."
        )
    rates = spikes.astype(jnp.float32).mean(1).reshape(len(spikes), -1)
    few = jnp.square(jax.nn.relu(lower - rates)).mean(-1)
    return few + jnp.square(jax.nn.relu(rates.mean(-1) - upper))


def _valid(who: str, values: jax.Array, lengths: jax.Array) -> jax.Array:
    """Return which steps of values [B, T, ...] are before the end, [B, T, 1, ...]."""
    ends = check_lengths(who, lengths, len(values))
    steps = jnp.arange(values.shape[1]) < ends[:, None]
    return jnp.expand_dims(steps, tuple(range(2, values.ndim)))


def _checked(
    who: str, logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Return the logits in float32 and the targets [B, K]."""
    labels = jnp.asarray(labels)
    whole = jnp.issubdtype(labels.dtype, jnp.integer)
    shape = logits.shape[:1] if whole else (*logits.shape[:1], *logits.shape[2:])
    if logits.ndim != 3 or labels.shape != shape:
        hint = "Labels are class numbers [B], whole ones, or probabilities [B, K]."
        if logits.ndim == 2:
            hint = "Logits without time: add the axis, logits[:, None]."
        raise ValueError(
            f"{who}: expected logits [B, T, K] and labels [B] or [B, K], got "
            f"{logits.shape} and {labels.shape}, {labels.dtype}. {hint}"
        )
    if not 0 <= label_smoothing < 1:
        raise ValueError(
            f"{who}: expected 0 <= label_smoothing < 1, got {label_smoothing}."
        )
    classes = logits.shape[-1]
    targets = labels.astype(jnp.float32)
    if whole:
        # Values cannot raise inside jit, and one_hot gives an unknown label a row of
        # zeros, which would pass for a low loss. nan stops the run.
        known = (labels >= 0) & (labels < classes)
        targets = jnp.where(known[:, None], jax.nn.one_hot(labels, classes), jnp.nan)
    targets = optax.smooth_labels(targets, label_smoothing)
    # In bfloat16 the sum over classes would lose its small terms.
    return logits.astype(jnp.float32), targets
