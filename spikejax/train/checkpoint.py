"""Checkpoints of a run: saved beside the training, verified when read back.

Orbax writes them. It reads a flipped byte without a word, so every leaf carries a
checksum, and a damaged checkpoint gives way to the one before.
"""

import contextlib
import json
import math
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from spikejax.train import processes
from spikejax.train.checksum import (
    Damaged,
    by_path,
    checksums,
    difference,
    key_data,
    key_like,
    seal,
    signature,
)
from spikejax.train.store import Text, cause, read_leaves, read_notes, read_position

Record = dict[str, Any]  # what is noted beside a checkpoint
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder being written


class CheckpointWarning(UserWarning):
    """A checkpoint, or a part of it, could not be used."""


class DataIterator(Protocol):
    """What a data iterator has to offer; Grain's iterators do."""

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class Checkpoints:
    """The checkpoints in a folder: the best one by metric and the last few.

    Call `restore` before the first `save`. Damaged checkpoints that it passes over
    stay in the folder, as `damaged-STEP-TIME`.

    Args:
        directory: folder of the checkpoints, made if it is not there.
        keep: how many of the newest to keep, at least 1; the best comes on top.
        config: settings of the run, as JSON has them; they are saved with every
            checkpoint, to say what differs when another run's does not fit.
    """

    def __init__(
        self, directory: str | Path, *, keep: int = 2, config: Mapping[str, Any]
    ):
        if keep < 1:
            raise ValueError(f"Checkpoints: expected keep >= 1, got {keep}. Give 2.")
        self.directory = Path(directory).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._keep = keep
        self._config = json.loads(json.dumps(config))
        self._newest: int | None = None  # step restored or saved last
        self._saving: Any = None  # Orbax's response to the save on its way
        self._metrics: dict[int, float | None] = {}
        for step in self.steps:
            with contextlib.suppress(Damaged):
                self._metrics[step] = read_notes(self.directory / str(step))["metric"]
        if processes.is_first():
            for path in self.directory.glob(f"*{UNFINISHED}*"):
                shutil.rmtree(path)

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint on the disk, oldest first."""
        names = [path.name for path in self.directory.iterdir()]
        return sorted(int(name) for name in names if name.isdecimal())

    def save(
        self,
        step: int,
        state: dict[str, Any],
        data_iterator: DataIterator,
        *,
        metric: float | None = None,
    ) -> None:
        """Saves in the background; the state may be donated on return.

        The step restored or saved last is not saved again.

        Args:
            step: number of steps done, above that of every checkpoint there is.
            state: nested dict of `jax.Array`, typed random keys among them.
            data_iterator: its position is saved with the state.
            metric: higher is better; None or NaN never is the best.
        """
        if step == self._newest:
            return
        self._check_step(step)
        metric = None if metric is None else float(metric)
        leaves = {path: key_data(leaf) for path, leaf in _arrays(state).items()}
        position = json.dumps(seal(data_iterator.get_state()))
        self._finish()
        self._saving = ocp.save_checkpointables_async(
            str(self.directory / str(step)),
            {"state": leaves, "data": Text(position)},
            custom_metadata=seal(self._new_record(step, state, metric)),
        )
        self._metrics[step] = metric
        self._newest = step

    def restore(
        self, abstract_state: dict[str, Any], data_iterator: DataIterator
    ) -> tuple[int, dict[str, Any]] | None:
        """Reads the newest checkpoint that is whole, and moves data_iterator there.

        Args:
            abstract_state: tree of the state, its leaves `jax.ShapeDtypeStruct` with
                a sharding (or arrays, read for their shape, dtype and sharding).
            data_iterator: set to the position saved with the state.

        Returns:
            (step, state), or None when there is no checkpoint yet.

        Raises:
            ValueError: the checkpoint is of another configuration, or all are damaged.
        """
        targets = _arrays(abstract_state)
        self._check_shared()
        damaged: dict[int, str] = {}
        for step in reversed(self.steps):
            try:
                record, position, leaves = self._read(step, targets)
            except Damaged as error:
                damaged[step] = str(error)
                continue
            self._move(data_iterator, record, position)
            self._set_aside(damaged, step)
            self._newest = step
            return step, jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
        if damaged:
            found = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise ValueError(
                f"Checkpoints.restore: expected a whole checkpoint in {self.directory},"
                f" got only damaged ones ({found}). Put a copy of one back, or delete "
                "the folder to start from the first step."
            )
        return None

    def close(self) -> None:
        """Waits for the last save, and raises what it raised."""
        self._finish()

    def _finish(self) -> None:
        """Waits for the save on its way; then removes what need not be kept."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()
        steps = self.steps
        best = max(steps, key=self._rank, default=None)
        for step in steps[: -self._keep]:
            if step != best and processes.is_first():
                # Half removed, it must not be taken for a checkpoint.
                path = self.directory / str(step)
                shutil.rmtree(path.rename(f"{path}{UNFINISHED}"))

    def _rank(self, step: int) -> tuple[float, int]:
        metric = self._metrics.get(step)
        return -math.inf if metric is None or math.isnan(metric) else metric, step

    def _check_step(self, step: int) -> None:
        last = max(self.steps, default=-1) if self._newest is None else self._newest
        if step <= last:
            raise ValueError(
                f"Checkpoints.save: expected a step after {last}, the newest in "
                f"{self.directory}, got {step}. Restore first, or give another folder."
            )

    def _new_record(self, step: int, state: Any, metric: float | None) -> Record:
        return {
            "step": step,
            "config": self._config,
            "metric": metric,
            "processes": jax.process_count(),
            "leaves": {path: signature(leaf) for path, leaf in by_path(state).items()},
            "checksums": checksums(state),
        }

    def _check_shared(self) -> None:
        newest = processes.of_all(max(self.steps, default=-1))
        if len(set(newest)) > 1:
            raise ValueError(
                f"Checkpoints.restore: expected a folder that all processes share, got "
                f"{self.directory}, in which their newest steps are {newest}. Give one "
                "on a disk that all of them see."
            )

    def _check_configuration(self, record: Record, targets: dict[str, Any]) -> None:
        """Raises when the state has other leaves."""
        here = {path: signature(leaf) for path, leaf in targets.items()}
        if here != record["leaves"]:
            different = difference(record["leaves"], here)
            raise self._other(record, f"of the state, {different}")

    def _read(self, step: int, targets: dict[str, Any]) -> tuple[Record, Any, list]:
        """Notes, position of the data and leaves; Damaged if so for any process."""
        found = self._read_here(self.directory / str(step), targets)
        failed = isinstance(found, Damaged)
        if any(processes.of_all(failed)):
            raise found if failed else Damaged("another process cannot read it")
        record, position, loaded = found
        sums = checksums(loaded)
        wrong = [path for path in sums if sums[path] != record["checksums"][path]]
        if wrong:
            raise Damaged(f"{wrong[0]} has a wrong checksum")
        leaves = [key_like(leaf, loaded[path]) for path, leaf in targets.items()]
        return record, position, leaves

    def _read_here(self, folder: Path, targets: dict[str, Any]) -> Any:
        """What this process needs, or the damage, without a word with the others."""
        try:
            record = read_notes(folder)
            self._check_configuration(record, targets)
            position = read_position(folder, record["processes"])
            return record, position, read_leaves(folder, targets)
        except Damaged as error:
            return error

    def _move(self, data_iterator: DataIterator, record: Record, position: Any) -> None:
        """Moves the iterator, or says that its order starts anew."""
        if position is None:
            if processes.is_first():
                warnings.warn(
                    f"checkpoint {record['step']} in {self.directory} is of "
                    f"{record['processes']} processes with positions of their own, and "
                    "now there are others: the order of the data starts anew",
                    CheckpointWarning,
                    stacklevel=4,
                )
            return
        try:
            data_iterator.set_state(position)
        except Exception as error:
            what = f"its data iterator does not fit ({cause(error)})"
            raise self._other(record, what) from error

    def _other(self, record: Record, what: str) -> ValueError:
        settings = ""
        if record["config"] != self._config:
            different = difference(record["config"], self._config)
            settings = f"; of the settings, {different}"
        path = self.directory / str(record["step"])
        return ValueError(
            f"Checkpoints.restore: {path} was saved by another configuration: {what}"
            f"{settings}. Give the settings that it was saved with, or another folder."
        )

    def _set_aside(self, damaged: dict[int, str], step: int) -> None:
        """Renames damaged checkpoints, so that their steps can be saved again."""
        if not damaged:
            return
        now = time.strftime("%Y%m%d-%H%M%S")
        kept = {bad: self.directory / f"damaged-{bad}-{now}" for bad in damaged}
        multihost_utils.sync_global_devices("every process has read")
        if processes.is_first():
            for bad, path in kept.items():
                (self.directory / str(bad)).rename(path)
        multihost_utils.sync_global_devices("damaged checkpoints are renamed")
        for bad, path in kept.items() if processes.is_first() else ():
            warnings.warn(
                f"checkpoint {bad} in {self.directory} is damaged ({damaged[bad]}): "
                f"going on from checkpoint {step}; the damaged one is now {path.name}",
                CheckpointWarning,
                stacklevel=3,
            )


def _arrays(state: Any) -> dict[str, Any]:
    """The leaves by path, once each is known to be an array with a place."""
    leaves = by_path(state)
    for path, leaf in leaves.items():
        if getattr(leaf, "sharding", None) is None:
            raise ValueError(
                f"Checkpoints: expected an array or struct with a sharding in {path}, "
                f"got {leaf!r}. Place it: jax.device_put(leaf, sharding)."
            )
    return leaves
