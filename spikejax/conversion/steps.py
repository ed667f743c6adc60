"""A converted network step by step: its answer, spikes and errors after every step.

One run gives all T. A step is compiled once, and only membranes are kept between steps,
so memory does not grow with T.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spikejax.conversion.surgery import Spy, check_answer, check_model, places
from spikejax.layers import Membrane
from spikejax.nn.memory import keep_membranes
from spikejax.nn.quant import QuantReLU, ScaledIF


class Streamed(NamedTuple):
    """Answers after t = 1..T steps.

    logits: [T, B, K], the mean over the steps so far. spikes: [T, B], the spikes of all
    neurons so far.
    """

    logits: jax.Array
    spikes: jax.Array


def _spied(model, kind):
    """Runs the model on x; returns the output and {path: (input, output)} of a kind."""
    found = [place for place in places(model) if isinstance(place.value, kind)]

    def run(x):
        calls: list[tuple] = []
        for place in found:
            place.put(Spy(place.value, place.path, calls.append))
        y = model(x)
        for place in found:
            place.put(place.value)
        return y, {path: (x, y) for path, x, y in calls}

    return run


@partial(jax.jit, static_argnums=(0, 1))
def _step(graphdef, watched, membranes, rest, x):
    """One step: membranes, (logits [B, 1, K], spikes [B], {path: (input, output)}).

    The last is empty unless the layers are watched.
    """
    model = nnx.merge(graphdef, membranes, rest)
    amplitudes = {path: n.unit[...] for path, n in _spiking(model).items()}
    logits, seen = _spied(model, ScaledIF)(x)
    spikes = sum(
        jnp.round(z / amplitudes[path]).reshape(len(z), -1).sum(1)
        for path, (_, z) in seen.items()
    )
    return nnx.state(model, Membrane), (logits, spikes, seen if watched else {})


def _spiking(model) -> dict[str, ScaledIF]:
    return {
        place.path: place.value
        for place in places(model)
        if isinstance(place.value, ScaledIF)
    }


def _steps(who, model, xs, time_steps, *, watched=False):
    """Yields (logits, spikes, seen) of each step on the same input."""
    if time_steps < 1:
        raise ValueError(f"{who}: expected at least 1 time step, got {time_steps}.")
    check_model(who, model)
    if not _spiking(model):
        raise ValueError(
            f"{who}: expected a model from convert, got {type(model).__name__} "
            "without ScaledIF neurons."
        )
    if xs.ndim < 2 or xs.shape[1] != 1 or not xs.shape[0]:
        raise ValueError(
            f"{who}: expected input [B, 1, ...], which is shown at every step, got "
            f"shape {xs.shape}. Add the axis: images[:, None]."
        )
    model = nnx.clone(model)
    model.eval()
    graphdef, membranes, rest = nnx.split(keep_membranes(model, xs), Membrane, ...)
    step = partial(_step, graphdef, watched)
    _, (logits, *_) = jax.eval_shape(step, membranes, rest, xs)
    check_answer(who, logits.shape, xs.shape)
    for _ in range(time_steps):
        membranes, (logits, spikes, seen) = step(membranes, rest, xs)
        yield logits[:, 0], spikes, seen


def stream(model: nnx.Module, xs: jax.Array, time_steps: int) -> Streamed:
    """Answers of a converted network after each of 1..T steps on the same input.

    Args:
        model: from ``convert``; stays as it is.
        xs: input [B, 1, ...], shown at every step.
        time_steps: T.
    """
    logits, spikes = [], []
    for z, count, _ in _steps("stream", model, xs, time_steps):
        logits.append(z if not logits else logits[-1] + z)
        spikes.append(count if not spikes else spikes[-1] + count)
    steps = jnp.arange(1, time_steps + 1)
    return Streamed(jnp.stack(logits) / steps[:, None, None], jnp.stack(spikes))


class Exit(NamedTuple):
    """Classes [B] that a network answered, and steps [B] after which it did."""

    classes: jax.Array
    steps: jax.Array


def early_exit(logits: jax.Array, confidence: float) -> Exit:
    """Each image stops at the first step whose largest probability is above confidence.

    p_t = softmax(mean of the logits up to t);  stop where max p_t > confidence, or at T

    Args:
        logits: [T, B, K] from ``stream``.
        confidence: 0 to 1; 1 never stops early.

    Reference: Dynamic Confidence, Li et al. 2023, arXiv:2303.10276.
    """
    sure = jax.nn.softmax(logits).max(-1) > confidence
    last = sure.at[-1].set(True).argmax(0)
    classes = jnp.take_along_axis(logits.argmax(-1), last[None], 0)[0]
    return Exit(classes, last + 1)


class BySteps(NamedTuple):
    """What a converted network does after t = 1..T steps.

    accuracy: [T], 0 to 1. spikes: [T], of all neurons, per image. exit_accuracy,
    exit_steps: accuracy and mean number of steps with early exits.
    """

    accuracy: np.ndarray
    spikes: np.ndarray
    exit_accuracy: float
    exit_steps: float


def evaluate_steps(
    model: nnx.Module,
    batches: Iterable[Any],
    encode: Callable,
    time_steps: int,
    confidence: float = 1.0,
) -> BySteps:
    """Accuracy and spikes of a converted network at every T up to ``time_steps``.

    Args:
        model: from ``convert``.
        batches: host batches {"image": [B, ...], "label": [B]}.
        encode: (images, rng) -> xs [B, 1, ...].
        time_steps: the largest T.
        confidence: of the early exits, 0 to 1; 1 never stops early.
    """
    correct, spikes, exits, steps, count = 0.0, 0.0, 0.0, 0.0, 0
    for batch in batches:
        xs = encode(jnp.asarray(batch["image"]), jax.random.key(0))
        labels = jnp.asarray(batch["label"])
        run = stream(model, xs, time_steps)
        right = run.logits.argmax(-1) == labels
        correct = correct + np.asarray(right.sum(1), np.float64)
        spikes = spikes + np.asarray(run.spikes.sum(1), np.float64)
        exit = early_exit(run.logits, confidence)
        exits += float((exit.classes == labels).sum())
        steps += float(exit.steps.sum())
        count += len(labels)
    if not count:
        raise ValueError("evaluate_steps: expected at least one image, got none.")
    return BySteps(
        np.asarray(correct) / count,
        np.asarray(spikes) / count,
        exits / count,
        steps / count,
    )


def confidence_front(
    logits: jax.Array, labels: jax.Array, candidates: Iterable[float] | None = None
) -> list[tuple[float, float, float]]:
    """The confidences worth having: (confidence, accuracy, mean steps), fast to slow.

    None is both less accurate and slower than another. Choose on images that are not
    the test images.

    Args:
        logits: [T, B, K] from ``stream``.
        labels: [B].
        candidates: confidences to try, by default 0 to 1 in hundredths.
    """
    rows = []
    for confidence in np.linspace(0, 1, 101) if candidates is None else candidates:
        classes, steps = early_exit(logits, confidence)
        accuracy = float((classes == labels).mean())
        rows.append((float(confidence), accuracy, float(steps.mean())))
    front: list[tuple[float, float, float]] = []
    for row in sorted(rows, key=lambda row: (row[2], -row[1])):
        if not front or row[1] > front[-1][1]:
            front.append(row)
    return front


class Agreement(NamedTuple):
    """How far the rates of one layer are from the ANN, as parts of v_threshold.

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
    ann: nnx.Module, snn: nnx.Module, xs: jax.Array, time_steps: int
) -> list[Agreement]:
    """Compare the layers of a converted network with those that they came from.

    Args:
        ann: network of QuantReLU.
        snn: ``convert(ann).model``.
        xs: input [B, 1, ...].
        time_steps: T.

    Reference: the three errors, Bu et al. 2023, arXiv:2303.04347.
    """
    ann = nnx.clone(ann)
    ann.eval()
    _, activations = _spied(ann, QuantReLU)(xs)
    neurons = _spiking(snn)
    total: Any = None
    for _, _, seen in _steps("agreement", snn, xs, time_steps, watched=True):
        total = jax.tree.map(jnp.add, total, seen) if total else seen
    if set(activations) != set(total):
        raise ValueError(
            "agreement: expected a network and its conversion, got different layers."
        )
    rows = []
    for path, (z, rate) in total.items():
        top = neurons[path].unit[...] * neurons[path].num_thresholds
        levels = time_steps * neurons[path].num_thresholds
        parts = _errors(
            z / time_steps, rate / time_steps, activations[path][1], top, levels
        )
        rows.append(Agreement(path, *map(float, parts)))
    return rows


def _errors(z, rate, activation, top, levels):
    clipped = jnp.clip(z, 0, top)
    expected = jnp.clip(jnp.floor(z * levels / top + 0.5), 0, levels) * top / levels
    pairs = [
        (rate, activation),
        (clipped, nnx.relu(z)),
        (expected, clipped),
        (rate, expected),
    ]
    occasional = (rate * (activation == 0)).sum() / jnp.maximum(rate.sum(), 1e-9)
    return [jnp.abs(a - b).mean() / top for a, b in pairs] + [occasional]
