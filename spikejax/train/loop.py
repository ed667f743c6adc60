"""Training: the loop around the step, which can be killed and goes on bit for bit.

``fit`` is handed a model, a loss and data; it names none of them.
"""

import contextlib
import glob
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from spikejax.nn.cpu import compiler_options
from spikejax.train import processes, sharding
from spikejax.train.checkpoint import Checkpoints
from spikejax.train.checksum import by_path, parameters_sha256
from spikejax.train.progress import Progress, Trace, check_finite, read_metrics
from spikejax.train.recipe import TrainConfig, make_optimizer
from spikejax.train.step import (
    Encode,
    Loss,
    initial_state,
    make_eval_step,
    make_predict,
    make_train_step,
)


def evaluate(
    eval_step: Callable, state: Any, batches: Iterable, batch_size: int, mesh: Any
) -> dict[str, float]:
    """Mean loss and accuracy over all examples of ``batches``, each exactly once.

    Args:
        eval_step: jitted (state, batch) -> sums.
        state: where it lies on the mesh.
        batches: of this process; every process has the same number of them, the last
            of which may be smaller, and even empty.
        batch_size: of this process, to which the last is filled up.
        mesh: of the devices of all processes.
    """
    sums = []
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
    if not sums:
        raise ValueError("evaluate: expected at least one example, got no batches.")
    total = {name: sum(float(s[name]) for s in sums) for name in sums[0]}
    examples = total.pop("examples")
    return {name: value / examples for name, value in total.items()}


class Fitted(NamedTuple):
    """What ``fit`` returns.

    model: trained, in evaluation mode, whole on one device of this process. metrics:
    accuracy (0..1), loss, steps, seconds, images_per_second, parameters,
    parameters_sha256. finished: False after SIGTERM.
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
    mesh: Mesh | None = None,
    profile: bool = False,
) -> Fitted:
    """Train a model, with checkpoints in ``workdir`` from which the same call goes on.

    A run that was killed resumes from its last checkpoint and ends with the same bits.
    SIGTERM saves and returns with finished=False; sent to one of several processes, it
    ends all of them with the same step.

    Args:
        config: how to train.
        model: takes xs [B, T, ...], returns logits [B, T, K].
        loss: (logits, labels [B]) -> [B].
        train_data: endless Grain iterator of host batches {"image": [B, ...],
            "label": [B]}, this process's part of config.batch_size; the checkpoint
            holds its place.
        eval_data: the evaluation set in such batches, see ``evaluate``.
        encode: (images, rng) -> xs, runs on the device.
        steps_per_epoch: training steps that make an epoch.
        workdir: where metrics.jsonl, tensorboard/ and checkpoints/ go.
        settings: what else tells this run from another, kept in the checkpoint.
        mesh: by default of all devices, each with a copy of the parameters.
        profile: write a trace of some steps to ``workdir``/profile.
    """
    mesh = mesh or sharding.data_mesh()
    sharding.check_batch_size(config.batch_size, mesh)
    _check_folder(Path(workdir).absolute())
    _check_data(train_data)
    steps = config.steps or max(1, round(config.epochs * steps_per_epoch))
    optimizer = make_optimizer(config, steps)
    state = sharding.place_state(initial_state(model, optimizer, config), mesh)
    train_graph, eval_graph = graphs(model)
    del model  # it holds whole parameters on one device
    train_step = jit_train_step(
        config, train_graph, loss, encode, optimizer, state, mesh
    )
    predict = make_predict(eval_graph, encode, sharding.whole(mesh))
    run = _Run(config, steps, steps_per_epoch, train_step, predict, loss, mesh)
    run.profile = Trace(Path(workdir) / "profile" if profile else None)
    notes = asdict(config) | (settings or {})
    checkpoints = Checkpoints(Path(workdir) / "checkpoints", config=notes)
    with (
        processes.Terminated() as run.terminated,
        contextlib.closing(checkpoints),
        contextlib.closing(run.profile),
    ):
        state, finished = run.loop(state, train_data, eval_data, checkpoints, workdir)
    return _fitted(eval_graph, state, run.metrics, finished)


def _fitted(graphdef, state, metrics, finished):
    params, rest = state.get("ema", state["params"]), state["rest"]
    params, rest = sharding.on_this_host((params, rest))
    metrics |= {
        "steps": int(state["step"]),
        "parameters": sum(p.size for p in jax.tree.leaves(params)),
        "parameters_sha256": parameters_sha256(params),
    }
    return Fitted(nnx.merge(graphdef, params, rest), metrics, finished)


def graphs(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.GraphDef]:
    """The model without its arrays, in training and in evaluation mode."""
    model.eval()
    evaluation = nnx.graphdef(model)
    model.train()
    return nnx.graphdef(model), evaluation


def jit_train_step(
    config: TrainConfig,
    graphdef: nnx.GraphDef,
    loss: Loss,
    encode: Encode,
    optimizer: optax.GradientTransformation,
    state: Any,
    mesh: Mesh,
) -> Callable:
    """The training step of ``fit``, jitted for a state, or its shapes, on a mesh."""
    step = make_train_step(
        *(graphdef, loss, encode, optimizer, config.ema),
        norm_groups=config.norm_groups,
        gather=sharding.whole(mesh),
    )
    out = sharding.state_shardings(state, mesh), sharding.replicated(mesh)
    return jax.jit(
        step, donate_argnums=0, out_shardings=out, compiler_options=_options(mesh)
    )


def _options(mesh):
    return compiler_options(mesh.devices.flat[0].platform)


class _Run:
    """The loop of ``fit``: steps, evaluations, checkpoints, and the clock."""

    classes = 0  # logits of the model, once it has seen a batch
    terminated: processes.Terminated
    profile: Trace

    def __init__(self, config, steps, steps_per_epoch, train_step, predict, loss, mesh):
        self.config, self.steps, self.steps_per_epoch = config, steps, steps_per_epoch
        self.train_step, self.predict, self.mesh = train_step, predict, mesh
        self.batch_size = config.batch_size // jax.process_count()  # of this process
        everywhere = sharding.replicated(mesh)
        eval_step = make_eval_step(predict, loss)
        self.eval_step = jax.jit(
            eval_step, out_shardings=everywhere, compiler_options=_options(mesh)
        )
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
                batch = self._checked(state, next(train_data, {}))
                batch = sharding.place_batch(batch, self.mesh)
                self.profile.before(step - start, state)
                state, metrics = self.train_step(state, batch)
                if late:
                    self._report(progress, *late)
                late = step, metrics
                clock.tick()
                evaluates = step % self.evaluate_every == 0 or step == self.steps
                saves = evaluates or step % self.config.save_every == 0
                stops = self.terminated.at(step)
                if not (saves or stops):
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
                if stops or self.terminated.at(step):
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

    def _checked(self, state, batch) -> dict[str, Any]:
        """The batch; ValueError where it is another one than the model can train on."""
        names = list(batch) if isinstance(batch, dict) else [type(batch).__name__]
        if not {"image", "label"} <= set(names):
            raise ValueError(
                "fit: expected batches of image and label without an end, got "
                f"{', '.join(names) or 'no more'}. A dataset of Grain goes on with "
                ".repeat()."
            )
        images, labels = batch["image"], batch["label"]
        if len(labels) != self.batch_size:
            raise ValueError(
                f"fit: expected batches of {self.batch_size}, as TrainConfig.batch_size"
                f" says, got one of {len(labels)}. Drop what is left of an epoch."
            )
        if not self.classes:
            self.classes = jax.eval_shape(self.predict, state, images).shape[-1]
        last = self.classes - 1
        if labels.min() < 0 or labels.max() > last:
            bad = labels[(labels < 0) | (labels > last)][0]
            raise ValueError(
                f"fit: expected labels from 0 to {last}, as the model has {last + 1} "
                f"logits, got {bad}. Give the model a logit a class."
            )
        return batch

    def _evaluate(self, state, eval_data):
        self.metrics = evaluate(
            self.eval_step, state, eval_data, self.batch_size, self.mesh
        )
        return self.metrics


def _check_data(train_data):
    """ValueError unless a checkpoint can hold the place in the data."""
    if not (hasattr(train_data, "__next__") and hasattr(train_data, "get_state")):
        raise ValueError(
            "fit: expected an iterator of Grain, as iter(dataset) gives, got "
            f"{type(train_data).__name__}. docs/model.md makes one of arrays."
        )


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
