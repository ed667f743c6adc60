"""The training loop: a run that is killed resumes, and ends with the same bits."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from spikejax.layers import neuron_layers
from spikejax.losses import mean_over_time
from spikejax.memory import has_held
from spikejax.nn.cpu import compiler_options
from spikejax.train import processes, sharding
from spikejax.train.checkpoint import Checkpoints
from spikejax.train.checksum import by_path, parameters_sha256
from spikejax.train.progress import Progress, check_finite, tracing
from spikejax.train.recipe import MOST_STEPS, TrainConfig, make_optimizer
from spikejax.train.step import (
    Encode,
    EvalStep,
    Loss,
    Readout,
    State,
    TrainStep,
    initial_state,
    make_eval_step,
    make_predict,
    make_train_step,
)
from spikejax.train.workdir import check, check_path, locked, write

HostBatch = dict[str, np.ndarray]  # image [B, ...], label [B], maybe length [B]
ARRAYS = "image", "label", "length"
# Metrics that are not yet read, and the images that they are of, by step.
Pending = dict[int, tuple[dict[str, Any], np.ndarray]]


def evaluate(
    eval_step: EvalStep,
    state: State,
    batches: Iterable[HostBatch],
    batch_size: int,
    mesh: Mesh,
    is_stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Return mean loss and accuracy over all examples, each counted exactly once.

    Returns {} where is_stopped, which is called before each batch, is true.

    Args:
        eval_step: jitted (state, batch) -> sums.
        state: sharded on the mesh.
        batches: of this process, at least one; every process has the same number of
            them, the last of which may be smaller, and even empty.
        batch_size: of this process, to which the last batch is padded.
        mesh: of the devices of all processes.
        is_stopped: the same in all processes.

    Raises:
        ValueError: a batch is larger.
    """

    def padded(values: np.ndarray) -> np.ndarray:  # the step is compiled for one shape
        missing = batch_size - len(values)
        return np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1))

    sums = []
    for batch in batches:
        if is_stopped():
            return {}
        if (size := len(batch["label"])) > batch_size:
            raise ValueError(
                f"evaluate: expected batches of up to {batch_size} images, as in "
                f"training, got one of {size}. Make them as small."
            )
        batch = batch | {"weight": np.ones(size, np.float32)}
        names = [name for name in (*ARRAYS, "weight") if name in batch]
        whole = {name: padded(batch[name]) for name in names}
        sums.append(eval_step(state, sharding.shard_batch(whole, mesh)))
    total = {name: sum(float(s[name]) for s in sums) for name in sums[0]}
    examples = total.pop("examples")
    return {name: value / examples for name, value in total.items()}


class Fitted(NamedTuple):
    """The result of ``fit``: the model in evaluation mode, on one local device.

    metrics: accuracy (0..1), loss, steps, seconds, images_per_second, parameters and
    parameters_sha256. finished: False after SIGTERM.
    """

    model: nnx.Module
    metrics: dict[str, Any]
    finished: bool


def fit(
    config: TrainConfig,
    model: nnx.Module,
    loss: Loss,
    train_data: Iterator[HostBatch],
    eval_data: Iterable[HostBatch],
    *,
    encode: Encode,
    steps_per_epoch: int,
    workdir: str | Path,
    optimizer: optax.GradientTransformation | None = None,
    readout: Readout = mean_over_time,
    mesh: Mesh | None = None,
    profile: bool = False,
) -> Fitted:
    """Train a model, with checkpoints in ``workdir`` from which the same call resumes.

    A killed run resumes from its last checkpoint and ends with the same bits. SIGTERM,
    SIGHUP and a first Ctrl-C save, leave an evaluation to the next start, and return
    with finished=False; sent to one of many processes, they end all at the same step.

    Args:
        config: the recipe.
        model: takes xs [B, T, ...], returns logits [B, T, K]. ``fit`` owns it: keep no
            other reference, or its parameters take memory twice.
        loss: (logits, labels) -> [B], with lengths= of batches that have a length;
            costs of ``Penalised`` layers are added to it.
        train_data: endless Grain iterator of host batches {"image": [B, ...], "label":
            [B] or [B, K]}, this process's part of config.batch_size; its position is
            part of the checkpoint. "length", int32 [B], may say how many steps count.
        eval_data: the evaluation set in such batches, see ``evaluate``.
        encode: (images, rng) -> xs, runs on the device.
        steps_per_epoch: training steps per epoch.
        workdir: where metrics.jsonl, tensorboard/ and checkpoints/ go.
        optimizer: of Optax, in place of the recipe's, its rate, decay and clipping.
        readout: (logits, lengths or None) -> [B, K], whose largest is the answer.
        mesh: by default of all devices, each with a copy of the parameters.
        profile: write a trace of some steps to ``workdir``/profile.

    Raises:
        ValueError: data, batch size or checkpoint do not fit this run, the folder is
            of another one, or the loss or a gradient is not finite.
    """
    mesh, workdir = mesh or sharding.data_mesh(), Path(workdir).absolute()
    sharding.check_batch_size(config.batch_size, mesh)
    _check(model, train_data, eval_data, workdir)
    steps = _steps(config, steps_per_epoch)
    settings = _settings(config, steps, model, loss)
    processes.agree(dataclasses.asdict(config) | settings | mesh.shape)
    optimizer = optimizer or make_optimizer(config, steps)
    state = sharding.place_state(initial_state(model, optimizer, config), mesh)
    graphdef, eval_graphdef = graphs(model)
    del model  # it holds all parameters on one device
    parts = graphdef, loss, encode, optimizer, state, mesh, readout
    train_step = jit_train_step(config, *parts)
    eval_step = _jit_eval_step(eval_graphdef, loss, encode, mesh, readout)
    size = config.batch_size // jax.process_count()
    score = partial(evaluate, eval_step, batches=eval_data, batch_size=size, mesh=mesh)
    run = _Run(config, steps_per_epoch, train_step, score, mesh, workdir, settings)
    return _fitted(eval_graphdef, steps, *_train(run, state, train_data, profile))


def _steps(config: TrainConfig, steps_per_epoch: int) -> int:
    steps = config.steps or max(1, round(config.epochs * steps_per_epoch))
    if steps > MOST_STEPS:
        raise ValueError(f"epochs: expected at most {MOST_STEPS} steps, got {steps}.")
    return steps


def _settings(
    config: TrainConfig, steps: int, model: nnx.Module, loss: Loss
) -> dict[str, Any]:
    """Return what tells this training from another whose parameters are alike."""
    function = getattr(loss, "func", loss)  # of a partial
    name = getattr(function, "__qualname__", type(function).__name__)
    settings = dataclasses.asdict(config) | {"steps": steps, "loss": name}
    for name in ("epochs", "evaluate_every", "save_every"):
        del settings[name]
    for path, layer in neuron_layers(model).items():
        count = len(getattr(layer.params, "thresholds", ()))
        settings[f"model/{path}"] = f"{type(layer).__name__} of {count}"
        # Arrays and learned values are in the checkpoint, plain numbers nowhere else;
        # a surrogate has no name that stays.
        values = layer.params._asdict() | {"v_start": layer.v_start}
        values |= layer.options._replace(surrogate=None)._asdict()
        for name, value in values.items():
            if isinstance(value, float | bool | tuple):
                fixed = list(value) if isinstance(value, tuple) else value
                settings[f"model/{path}/{name}"] = fixed
    return settings


def graphs(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.GraphDef]:
    """Return the model without its arrays, in training and in evaluation mode.

    Does not modify the model.
    """
    copy = nnx.merge(*nnx.split(model))  # shares the arrays, but not the modes
    copy.eval()
    evaluation = nnx.graphdef(copy)
    copy.train()
    return nnx.graphdef(copy), evaluation


def jit_train_step(
    config: TrainConfig,
    graphdef: nnx.GraphDef,
    loss: Loss,
    encode: Encode,
    optimizer: optax.GradientTransformation,
    state: State,
    mesh: Mesh,
    readout: Readout = mean_over_time,
) -> TrainStep:
    """Return the training step of ``fit``, jitted; it donates the state.

    Args:
        config, loss, encode, mesh, readout: as in ``fit``.
        graphdef: of the model, in training mode.
        optimizer: of the recipe.
        state: sharded on the mesh, or abstract.
    """
    step = make_train_step(
        *(graphdef, loss, encode, optimizer, config.ema),
        readout=readout,
        norm_groups=config.norm_groups,
        gather=sharding.replicate(mesh),
    )
    # Without out_shardings XLA is free to return replicated kernels, for which the next
    # call would compile again.
    out = sharding.state_shardings(state, mesh), sharding.replicated(mesh)
    return _jit(mesh)(step, donate_argnums=0, out_shardings=out)


def _jit_eval_step(
    graphdef: nnx.GraphDef, loss: Loss, encode: Encode, mesh: Mesh, readout: Readout
) -> EvalStep:
    predict = make_predict(graphdef, encode, sharding.replicate(mesh))
    step = make_eval_step(predict, loss, readout)
    return _jit(mesh)(step, out_shardings=sharding.replicated(mesh))


def _jit(mesh: Mesh) -> Callable[..., Any]:
    options = compiler_options(mesh.devices.flat[0].platform)
    return partial(jax.jit, compiler_options=options)


class _Run(NamedTuple):
    """Settings and compiled functions of a run; its loop changes none of them."""

    config: TrainConfig
    steps_per_epoch: int
    train_step: TrainStep
    score: Callable[..., dict[str, float]]
    mesh: Mesh
    workdir: Path
    settings: dict[str, Any]

    @property
    def steps(self) -> int:
        return self.settings["steps"]


def _train(
    run: _Run, state: State, train_data: Any, profile: bool
) -> tuple[State, dict[str, Any], bool]:
    """Train from the newest checkpoint to the last step, or until it is stopped."""
    config, workdir = run.config, run.workdir
    every = max(1, round(config.evaluate_every * run.steps_per_epoch))
    with ExitStack() as stack:
        stop = stack.enter_context(processes.Terminated())
        stack.enter_context(locked(workdir))
        checkpoints = stack.enter_context(closing(Checkpoints(workdir / "checkpoints")))
        trace = stack.enter_context(tracing(workdir / "profile" if profile else None))
        if restored := checkpoints.restore(state, train_data):
            older = dataclasses.asdict(TrainConfig())
            check(workdir, run.settings, older, "fit.json")
        write(workdir / "fit.json", run.settings)
        start, state, saved = restored or (0, state, {})
        is_due = saved.pop("is_due", False)  # a signal broke off its evaluation
        clock = _Clock(config.batch_size, **saved)
        score = partial(run.score, is_stopped=lambda: stop.now)
        scores = score(state) if start >= run.steps or is_due else {}
        progress = Progress(workdir, run.steps, start, config.batch_size)
        stack.enter_context(progress)
        if is_due and scores:
            progress.evaluate(start, scores | saved)
        last = start if is_due and not scores else run.steps  # broken off again
        pending: Pending = {}
        for step in range(start + 1, last + 1):
            host_batch = _checked(next(train_data, {}), config.batch_size)
            flagged = host_batch | stop.flag(len(host_batch["label"]))
            batch = sharding.shard_batch(flagged, run.mesh)
            trace(step - start, state)
            state, metrics = run.train_step(state, batch)
            # The metrics of a step are read while the next one runs: reading its own
            # would leave the device idle between two steps.
            _report(progress, stop, pending)
            metrics["epoch"] = step / run.steps_per_epoch
            pending[step] = metrics, host_batch["image"]
            clock.tick()
            evaluates = step % every == 0 or step == run.steps
            if not (evaluates or stop.now or step % config.save_every == 0):
                continue
            # Nothing is saved before its loss and gradients are known to be finite.
            _report(progress, stop, pending)
            found = score(state) if evaluates else {}
            scores, saved = found or scores, clock.pause()
            if found:
                progress.evaluate(step, scores | saved)
            metric = found.get("accuracy")
            notes = saved | {"is_due": evaluates and not found}
            checkpoints.save(step, state, train_data, metric=metric, clock=notes)
            if stop.now:
                break
    # Read last: a signal may come while the checkpoint is being saved.
    return state, scores | saved, stop.now


def _report(progress: Progress, stop: processes.Terminated, pending: Pending) -> None:
    """Check and log the metrics of pending steps."""
    while pending:
        step, (metrics, images) = pending.popitem()
        metrics = jax.device_get(metrics)
        norms = by_path(metrics.pop("gradient_norms"))
        check_finite(step, float(metrics["loss"]), norms, images)
        stop.read(metrics)
        metrics["gradient_norm"] = math.hypot(*norms.values())
        progress.train(step, {name: float(value) for name, value in metrics.items()})


def _fitted(
    graphdef: nnx.GraphDef,
    steps: int,
    state: State,
    metrics: dict[str, Any],
    stopped: bool,
) -> Fitted:
    params, rest = state.get("ema", state["params"]), state["rest"]
    params, rest = sharding.to_local_device((params, rest))
    metrics = metrics | {
        "steps": int(state["step"]),
        "parameters": sum(p.size for p in jax.tree.leaves(params)),
        "parameters_sha256": parameters_sha256(params),
    }
    finished = metrics["steps"] == steps and not stopped
    return Fitted(nnx.merge(graphdef, params, rest), metrics, finished)


def _check(
    model: nnx.Module, train_data: Any, eval_data: Iterable[HostBatch], workdir: Path
) -> None:
    if has_held(model):
        raise ValueError(
            "fit: expected a model whose neurons start from rest, got one that keeps "
            "its membranes. Call drop_membranes(model) first."
        )
    if not (hasattr(train_data, "__next__") and hasattr(train_data, "get_state")):
        raise ValueError(
            "fit: expected an iterator of Grain, as iter(dataset) gives, got "
            f"{type(train_data).__name__}. docs/model.md makes one of arrays."
        )
    if hasattr(eval_data, "__next__") or eval_data == []:
        got = "none" if eval_data == [] else "an iterator, which ends"
        raise ValueError(
            "fit: expected evaluation batches that can be read again and again, got "
            f"{got}. Give the dataset or a list, not iter(dataset)."
        )
    check_path(workdir)


def _checked(batch: Any, batch_size: int) -> HostBatch:
    """Return the arrays of a host batch, of the size that the step is made for."""
    names = sorted(batch) if isinstance(batch, dict) else [type(batch).__name__]
    size = len(batch["label"]) if {"image", "label"} <= set(names) else None
    if size != (expected := batch_size // jax.process_count()):
        got = f"one of {size}" if size is not None else ", ".join(names) or "no more"
        raise ValueError(
            f"fit: expected endless batches of {expected} images and labels, got {got}."
            " Repeat a dataset of Grain with .repeat(), and drop the incomplete batch "
            "of an epoch."
        )
    return {name: batch[name] for name in ARRAYS if name in batch}


class _Clock:
    """Elapsed seconds and training rate of a run, over all the times it was resumed."""

    def __init__(
        self, batch_size: int, seconds: float = 0.0, images_per_second: float = 0.0
    ):
        self._began, self._rate = time.perf_counter() - seconds, images_per_second
        self._batch_size, self._last = batch_size, None
        self._seconds, self._steps = 0.0, 0

    def tick(self) -> None:
        now = time.perf_counter()
        if self._last is not None:  # the first step compiles, and does not count
            self._seconds += now - self._last
            self._steps += 1
        self._last = now

    def pause(self) -> dict[str, float]:
        """Return what a checkpoint saves and the constructor takes."""
        self._last = None  # evaluations and saves do not count
        if self._steps:
            self._rate = self._batch_size * self._steps / self._seconds
        elapsed = time.perf_counter() - self._began
        return {"seconds": elapsed, "images_per_second": self._rate}
