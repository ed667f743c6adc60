"""Training: the loop around the step, which can be killed and goes on bit for bit.

``fit`` is handed a model, a loss and data; it names none of them.
"""

import contextlib
import glob
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from spikejax import sharding
from spikejax.checkpoint import Checkpoints
from spikejax.checksum import by_path, parameters_sha256
from spikejax.progress import Progress, check_finite, read_metrics
from spikejax.step import (
    Encode,
    Loss,
    TrainConfig,
    initial_state,
    make_eval_step,
    make_optimizer,
    make_predict,
    make_train_step,
)


def evaluate(
    eval_step: Callable, state: Any, batches: Iterable, batch_size: int, mesh: Any
) -> dict[str, float]:
    """Mean loss and accuracy over all examples of ``batches``, each exactly once."""
    sums, count = [], 0
    for batch in batches:
        size = len(batch["label"])
        weight = np.ones(size, np.float32)
        batch = {"image": batch["image"], "label": batch["label"], "weight": weight}
        if size < batch_size:
            batch = {
                name: np.concatenate(
                    [a, np.zeros((batch_size - size, *a.shape[1:]), a.dtype)]
                )
                for name, a in batch.items()
            }
        sums.append(eval_step(state, sharding.place_batch(batch, mesh)))
        count += size
    if not count:
        raise ValueError("evaluate: expected at least one example, got no batches.")
    return {k: float(sum(float(s[k]) for s in sums)) / count for k in sums[0]}


class Fitted(NamedTuple):
    """What ``fit`` returns.

    model: trained, in evaluation mode. metrics: accuracy (0..1), loss, steps, seconds,
    images_per_second, parameters, parameters_sha256. finished: False after SIGTERM.
    """

    model: nnx.Module
    metrics: dict[str, Any]
    finished: bool


def fit(
    config: TrainConfig,
    model: nnx.Module,
    loss: Loss,
    train_data: Iterator,
    eval_data: Iterable,
    *,
    encode: Encode,
    steps_per_epoch: int,
    workdir: str | Path,
    settings: dict[str, Any] | None = None,
) -> Fitted:
    """Train a model, with checkpoints in ``workdir`` from which the same call goes on.

    A run that was killed resumes from its last checkpoint and ends with the same bits.
    SIGTERM saves and returns with finished=False.

    Args:
        config: how to train.
        model: takes xs [B, T, ...], returns logits [B, T, K].
        loss: (logits, labels [B]) -> [B].
        train_data: endless Grain iterator of host batches {"image": [B, ...],
            "label": [B]}; its position is part of the checkpoint.
        eval_data: the evaluation set in such batches; the last may be smaller.
        encode: (images, rng) -> xs, runs on the device.
        steps_per_epoch: training steps that make an epoch.
        workdir: where metrics.jsonl, tensorboard/ and checkpoints/ go.
        settings: what else tells this run from another, kept in the checkpoint.
    """
    mesh = sharding.data_mesh()
    sharding.check_batch_size(config.batch_size, mesh)
    _check_folder(Path(workdir).absolute())
    steps = config.steps or max(1, round(config.epochs * steps_per_epoch))
    optimizer = make_optimizer(config, steps)
    model.eval()
    eval_graph = nnx.graphdef(model)
    model.train()
    train_graph = nnx.graphdef(model)
    state = sharding.place_state(initial_state(model, optimizer, config), mesh)
    everywhere = sharding.replicated(mesh)
    train_step = jax.jit(
        make_train_step(train_graph, loss, encode, optimizer, config.ema),
        donate_argnums=0,
        out_shardings=(everywhere, everywhere),
    )
    predict = make_predict(eval_graph, encode)
    eval_step = jax.jit(make_eval_step(predict, loss))
    run = _Run(config, steps, steps_per_epoch, train_step, predict, eval_step)
    checkpoints = Checkpoints(
        Path(workdir) / "checkpoints", config=asdict(config) | (settings or {})
    )
    with _Terminated() as run.terminated, contextlib.closing(checkpoints):
        state, finished = run.loop(state, train_data, eval_data, checkpoints, workdir)
    params = state.get("ema", state["params"])
    run.metrics["steps"] = int(state["step"])
    run.metrics["parameters"] = sum(p.size for p in jax.tree.leaves(params))
    run.metrics["parameters_sha256"] = parameters_sha256(params)
    return Fitted(nnx.merge(eval_graph, params, state["rest"]), run.metrics, finished)


class _Run:
    """The loop of ``fit``: steps, evaluations, checkpoints, and the clock."""

    classes = 0  # logits of the model, once it has seen a batch
    terminated: "_Terminated"

    def __init__(self, config, steps, steps_per_epoch, train_step, predict, eval_step):
        self.config, self.steps, self.steps_per_epoch = config, steps, steps_per_epoch
        self.train_step, self.predict = train_step, predict
        self.eval_step, self.mesh = eval_step, sharding.data_mesh()
        self.evaluate_every = max(1, round(config.evaluate_every * steps_per_epoch))
        self.metrics: dict[str, Any] = {}

    def loop(self, state, train_data, eval_data, checkpoints, workdir):
        """Train from the newest checkpoint to the end; returns (state, finished)."""
        restored = checkpoints.restore(jax.tree.map(_abstract, state), train_data)
        start, state = restored or (0, state)
        before, rate = _clock_before(workdir, start)
        seconds = before
        began, late = time.perf_counter(), None
        clock = _Clock()
        with Progress(
            workdir, self.steps, start=start, batch_size=self.config.batch_size
        ) as progress:
            for step in range(start + 1, self.steps + 1):
                batch = next(train_data)
                self._check_labels(state, batch["image"], batch["label"])
                batch = sharding.place_batch(batch, self.mesh)
                state, metrics = self.train_step(state, batch)
                if late:
                    self._report(progress, *late)
                late = step, metrics
                clock.tick()
                evaluates = step % self.evaluate_every == 0 or step == self.steps
                saves = evaluates or step % self.config.save_every == 0
                if not (saves or self.terminated.now):
                    continue
                self._report(progress, *late)
                late = None
                clock.stop()
                accuracy = None
                if evaluates:
                    scores = self._evaluate(state, eval_data)
                    rate = clock.rate() * self.config.batch_size or rate
                    seconds = before + time.perf_counter() - began
                    scores |= {"images_per_second": rate, "seconds": seconds}
                    progress.evaluate(step, scores)
                    accuracy = scores["accuracy"]
                checkpoints.save(step, state, train_data, metric=accuracy)
                if self.terminated.now:
                    break
            if start >= self.steps:  # resumed at the very end
                self._evaluate(state, eval_data)
        self.metrics |= {"images_per_second": rate, "seconds": seconds}
        return state, int(state["step"]) == self.steps

    def _report(self, progress, step, metrics):
        """Log the metrics of a step, and stop the run where they are not finite."""
        metrics = jax.device_get(metrics)
        norms = by_path(metrics.pop("gradient_norms"))
        check_finite(step, float(metrics["loss"]), norms)
        metrics["gradient_norm"] = math.hypot(*norms.values())
        metrics["epoch"] = step / self.steps_per_epoch
        progress.train(step, {name: float(value) for name, value in metrics.items()})

    def _check_labels(self, state, images, labels):
        """ValueError where a label is no class of the model."""
        if not self.classes:
            self.classes = jax.eval_shape(self.predict, state, images).shape[-1]
        last = self.classes - 1
        if labels.min() < 0 or labels.max() > last:
            bad = labels[(labels < 0) | (labels > last)][0]
            raise ValueError(
                f"fit: expected labels from 0 to {last}, as the model has {last + 1} "
                f"logits, got {bad}. Give the model a logit a class."
            )

    def _evaluate(self, state, eval_data):
        size = self.config.batch_size
        self.metrics = evaluate(self.eval_step, state, eval_data, size, self.mesh)
        return self.metrics


def _check_folder(path):
    """ValueError where Orbax would write checkpoints that cannot be read back."""
    if glob.has_magic(str(path)):
        raise ValueError(
            f"workdir: expected a path without *, ? and [, which Orbax takes for a "
            f"pattern, got {path}. Take another --workdir."
        )


def _abstract(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _clock_before(workdir, start):
    """Seconds and images a second of the processes before, up to the checkpoint."""
    seconds, rate = 0.0, 0.0
    for entry in read_metrics(workdir, start):
        seconds = entry.get("seconds", seconds)
        rate = entry.get("eval_images_per_second", rate)
    return seconds, rate


class _Clock:
    """Steps a second, without the first step (it compiles) and without evaluations."""

    def __init__(self):
        self.last, self.seconds, self.steps = None, 0.0, 0

    def tick(self):
        now = time.perf_counter()
        if self.last is not None:
            self.seconds += now - self.last
            self.steps += 1
        self.last = now

    def stop(self):
        self.last = None

    def rate(self):
        return self.steps / self.seconds if self.seconds else 0.0


class _Terminated:
    """Notes SIGTERM instead of dying of it, inside of a with statement."""

    now = False

    def __enter__(self):
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, *_):
        self.now = True

    def __exit__(self, *_):
        if self.main:
            signal.signal(signal.SIGTERM, self.previous)
