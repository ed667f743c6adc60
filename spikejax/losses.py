"""Losses of logits over time: (logits [B, T, K], labels [B]) -> loss [B].

Labels are class numbers in 0..K-1; the loss of another label is nan. The caller takes
the mean over the batch.
"""

import jax
import jax.numpy as jnp
import optax


def _check(who, logits, labels):
    if logits.ndim != 3 or labels.shape != logits.shape[:1]:
        hint = "Labels are class numbers, one an example."
        if logits.ndim == 2:
            hint = "Logits without time: add the axis, logits[:, None]."
        raise ValueError(
            f"{who}: expected logits [B, T, K] and labels [B], got {logits.shape} and "
            f"{labels.shape}. {hint}"
        )


def _one_hot(labels, classes):
    """Rows of a label that is no class are nan, as nothing can be raised here."""
    known = (labels >= 0) & (labels < classes)
    return jnp.where(known[:, None], jax.nn.one_hot(labels, classes), jnp.nan)


def _targets(labels, classes, label_smoothing):
    targets = _one_hot(labels, classes)
    return targets * (1 - label_smoothing) + label_smoothing / classes


def rate_cross_entropy(
    logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0
) -> jax.Array:
    """Cross-entropy of the time mean: CE(1/T sum_t o_t, y)."""
    _check("rate_cross_entropy", logits, labels)
    mean = logits.astype(jnp.float32).mean(1)
    targets = _targets(labels, logits.shape[-1], label_smoothing)
    return optax.softmax_cross_entropy(mean, targets)


def tet(
    logits: jax.Array,
    labels: jax.Array,
    *,
    label_smoothing: float = 0.0,
    weight: float = 1e-3,
    target: float = 1.0,
) -> jax.Array:
    """Temporal efficient training: every step must classify.

    (1 - weight) 1/T sum_t CE(o_t, y) + weight mean((o - target)^2)

    Args:
        weight: of the regularisation, in [0, 1].
        target: where the logits are drawn to, the threshold.

    Reference: Deng et al. 2022, arXiv:2202.11946.
    """
    _check("tet", logits, labels)
    logits = logits.astype(jnp.float32)
    targets = _targets(labels, logits.shape[-1], label_smoothing)
    entropy = optax.softmax_cross_entropy(logits, targets[:, None]).mean(1)
    distance = jnp.square(logits - target).mean((1, 2))
    return (1 - weight) * entropy + weight * distance


def mse_of_counts(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Squared distance of the rate from one-hot: sum_k (1/T sum_t o_tk - [k = y])^2.

    Reference: Fang et al. 2021, arXiv:2007.05785 (there the mean over k).
    """
    _check("mse_of_counts", logits, labels)
    rate = logits.astype(jnp.float32).mean(1)
    return jnp.square(rate - _one_hot(labels, logits.shape[-1])).sum(-1)
