"""A converted network step by step: its answer, spikes and errors after every step.

One run gives all T. A step is compiled once, and only membranes are kept between steps,
so memory does not grow with T.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spikejax.conversion.spiking import Replaced, Seen, quantised
from spikejax.memory import Membrane, evaluation_copy, keep_membranes
from spikejax.nn.quant import ScaledIF

Batch = Mapping[str, np.ndarray]
Answer = tuple[jax.Array, jax.Array, dict[str, Seen]]  # logits, spikes, activations


class Streamed(NamedTuple):
    """Answers after t = 1..T steps.

    logits: [T, B, K] in float32, the mean over the steps so far. spikes: [T, B], the
    spikes of all neurons so far.
    """

    logits: jax.Array
    spikes: jax.Array


@partial(jax.jit, static_argnums=(0, 1))
def _step(
    graphdef: nnx.GraphDef,
    watched: bool,
    membranes: nnx.State,
    rest: nnx.State,
    xs: jax.Array,
) -> tuple[nnx.State, Answer]:
    """Return membranes, and logits [B, K], spikes [B], activations if watched."""
    model = nnx.merge(graphdef, membranes, rest)
    ys, seen = model.observe(xs)
    spikes = jnp.zeros(len(xs))
    parts = zip(model.names, model.sites, model.repeats, strict=True)
    for name, neuron, repeats in parts:
        y = seen[name].y.astype(jnp.float32)
        count = neuron.count(y * neuron.levels / _top(neuron, y, repeats))
        # In a scan over layers the batch is the second axis.
        spikes = spikes + count.sum([k for k in range(y.ndim) if k != repeats])
    # Sums over time need more digits than bfloat16 has.
    logits = ys[:, 0].astype(jnp.float32)
    return nnx.state(model, Membrane), (logits, spikes, seen if watched else {})


def _top(neuron: ScaledIF, y: jax.Array, repeats: int) -> jax.Array:
    """Return v_threshold, one per layer of a scan and channel, to divide y by."""
    top = neuron.v_threshold
    layers, channels = top.shape[:repeats], top.shape[repeats:]
    return top.reshape(layers + (1,) * (y.ndim - top.ndim) + channels)


def _steps(
    who: str, model: Replaced, xs: jax.Array, time_steps: int, *, watched: bool = False
) -> Iterator[Answer]:
    """Yield (logits, spikes, activations) of each step on the same input."""
    spiking = isinstance(model, Replaced) and isinstance(model.sites[0], ScaledIF)
    if not spiking or time_steps < 1 or xs.shape[1:2] != (1,):
        raise ValueError(
            f"{who}: expected convert(...).model, input [B, 1, ...] that is shown at "
            f"every step, and at least 1 time step, got {type(model).__name__}, shape "
            f"{xs.shape} and {time_steps}. For images, add the axis: images[:, None]."
        )
    model = evaluation_copy(who, model)
    graphdef, membranes, rest = nnx.split(keep_membranes(model, xs), Membrane, ...)
    for _ in range(time_steps):
        membranes, seen = _step(graphdef, watched, membranes, rest, xs)
        yield seen


def stream(model: Replaced, xs: jax.Array, time_steps: int) -> Streamed:
    """Return the answers of a converted network after each of 1..T steps.

    Args:
        model: from ``convert``; not modified.
        xs: input [B, 1, ...], shown at every step.
        time_steps: T.

    Raises:
        ValueError: the model is not from ``convert``, or xs has no axis of time.
    """
    run = _steps("stream", model, xs, time_steps)
    logits, spikes, _ = zip(*run, strict=True)
    steps = jnp.arange(1, time_steps + 1)[:, None, None]
    return Streamed(jnp.stack(logits).cumsum(0) / steps, jnp.stack(spikes).cumsum(0))


class Exit(NamedTuple):
    """Classes [B] that a network answers, and steps [B] after which it does."""

    classes: jax.Array
    steps: jax.Array


def early_exit(logits: jax.Array, confidence: float) -> Exit:
    """Stop each image at the first step with a probability above a confidence.

    p_t = softmax(mean of the logits up to t);  stop where max p_t > confidence, or at T

    Args:
        logits: [T, B, K] from ``stream``.
        confidence: 0 to 1; 1 never stops early.

    Raises:
        ValueError: the confidence is out of its range.

    Reference: Dynamic Confidence, Li et al. 2023, arXiv:2303.10276.
    """
    if not 0 <= confidence <= 1:
        raise ValueError(
            f"early_exit: expected a confidence of 0 to 1, got {confidence}."
        )
    sure = jax.nn.softmax(logits).max(-1) > confidence
    last = sure.at[-1].set(True).argmax(0)  # the last step answers in any case
    classes = jnp.take_along_axis(logits.argmax(-1), last[None], 0)[0]
    return Exit(classes, last + 1)


class BySteps(NamedTuple):
    """Accuracy and cost of a converted network after t = 1..T steps.

    accuracy: [T], 0 to 1. spikes: [T], of all neurons, per image. exit_accuracy,
    exit_steps: accuracy and mean number of steps with early exits.
    """

    accuracy: np.ndarray
    spikes: np.ndarray
    exit_accuracy: float
    exit_steps: float


def evaluate_steps(
    model: Replaced,
    batches: Iterable[Batch],
    encode: Callable[[jax.Array, jax.Array], jax.Array],
    time_steps: int,
    confidence: float = 1.0,
) -> BySteps:
    """Return accuracy and spikes of a converted network at every T.

    Args:
        model: from ``convert``.
        batches: host batches {"image": [B, ...], "label": [B]}.
        encode: (images, rng) -> xs [B, 1, ...].
        time_steps: the largest T.
        confidence: of the early exits, 0 to 1; 1 never stops early.

    Raises:
        ValueError: as ``stream``.
    """
    rows = []
    for batch in batches:
        xs = encode(jnp.asarray(batch["image"]), jax.random.key(0))
        labels = jnp.asarray(batch["label"])
        run = stream(model, xs, time_steps)
        classes, steps = early_exit(run.logits, confidence)
        right = run.logits.argmax(-1) == labels
        row = right, run.spikes, classes == labels, steps, jnp.ones(len(labels))
        # Float32 is exact up to 16 million spikes only.
        rows.append([np.asarray(v, np.float64).sum(-1) for v in row])
    *sums, count = (np.sum(column, 0) for column in zip(*rows, strict=True))
    accuracy, spikes, exits, steps = (total / count for total in sums)
    return BySteps(accuracy, spikes, float(exits), float(steps))


def confidence_front(
    logits: jax.Array, labels: jax.Array
) -> list[tuple[float, float, float]]:
    """Return the confidences worth having, fast to slow.

    No one is both less accurate and slower than another. Choose on images that are not
    the test images.

    Args:
        logits: [T, B, K] from ``stream``.
        labels: [B].

    Returns:
        rows of (confidence, in hundredths from 0 to 1, accuracy, mean steps).
    """
    rows = []
    for confidence in np.linspace(0, 1, 101):
        classes, steps = early_exit(logits, confidence)
        accuracy = float((classes == labels).mean())
        rows.append((float(confidence), accuracy, float(steps.mean())))
    front = []
    # Of equally fast ones the most accurate comes first, and hides the others.
    for row in sorted(rows, key=lambda row: (row[2], -row[1])):
        if not front or row[1] > front[-1][1]:
            front.append(row)
    return front


class Agreement(NamedTuple):
    """Distance of the rates of one layer from the ANN, as parts of v_threshold.

    error: mean |rate - ANN activation|. The parts look at the layer's own mean input z:
    clipping |clip(z) - relu(z)|, quantisation |expected - clip(z)| and unevenness
    |rate - expected|, where expected is the rate at constant input z. occasional: part
    of the spikes that come from neurons whose ANN activation is 0.
    """

    path: str
    error: float
    clipping: float
    quantisation: float
    unevenness: float
    occasional: float


def agreement(
    ann: nnx.Module, snn: Replaced, xs: jax.Array, time_steps: int
) -> list[Agreement]:
    """Compare the layers of a converted network with those that they came from.

    Args:
        ann: network of QuantReLU.
        snn: ``convert(ann, xs).model``.
        xs: input [B, 1, ...].
        time_steps: T.

    Returns:
        one row per activation.

    Raises:
        ValueError: the networks have different activations.

    Reference: the three errors, Bu et al. 2023, arXiv:2303.04347.
    """
    _, activations = quantised("agreement", ann, xs).observe(xs)
    run = _steps("agreement", snn, xs, time_steps, watched=True)
    total = reduce(partial(jax.tree.map, jnp.add), (seen for *_, seen in run))
    if set(activations) != set(total):
        raise ValueError(
            "agreement: expected a network and its conversion, got activations at "
            f"{sorted(activations)} and {sorted(total)}. Of a network with norms, give "
            "fold_norms(ann, xs)."
        )
    rows = []
    for path, neuron, repeats in zip(snn.names, snn.sites, snn.repeats, strict=True):
        z, rate = total[path].x / time_steps, total[path].y / time_steps
        top = _top(neuron, z, repeats)
        levels = time_steps * neuron.levels
        lowest = -jnp.inf if neuron.is_signed else 0
        parts = _errors(z, rate, activations[path].y, top, levels, lowest)
        rows.append(Agreement(path, *map(float, parts)))
    return rows


def _errors(
    z: jax.Array,
    rate: jax.Array,
    activation: jax.Array,
    top: jax.Array,
    levels: int,
    lowest: float,
) -> list[jax.Array]:
    least = max(lowest, -levels)
    clipped = jnp.clip(z, least * top / levels, top)
    # The rate in closed form, see ScaledIF.
    expected = jnp.clip(jnp.floor(z * levels / top + 0.5), least, levels) * top / levels
    pairs = [
        (rate, activation),
        (clipped, jnp.maximum(z, lowest)),
        (expected, clipped),
        (rate, expected),
    ]
    # A silent layer has no spikes, occasional or not.
    size = abs(rate)
    occasional = (size * (activation == 0)).sum() / jnp.maximum(size.sum(), 1e-9)
    return [(jnp.abs(a - b) / top).mean() for a, b in pairs] + [occasional]
