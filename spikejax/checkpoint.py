"""Checkpoints of a run: saved beside the training, verified when read back.

Orbax writes them. It reads a flipped byte without a word, so every leaf carries a
checksum, and a damaged checkpoint gives way to the one before.
"""

import contextlib
import json
import logging
import math
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import tensorstore
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from spikejax.checksum import (
    Damaged,
    by_path,
    checksums,
    difference,
    key_data,
    key_like,
    parameters_sha256,
    seal,
    signature,
    unseal,
)

Record = dict[str, Any]  # what is noted beside a checkpoint
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder being written

__all__ = ["CheckpointWarning", "Checkpoints", "checksums", "parameters_sha256"]


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over."""


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
                self._metrics[step] = self._record(step)["metric"]
        if jax.process_index() == 0:
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
        wait: bool = False,
    ) -> None:
        """Saves in the background; the state may be donated on return.

        The step restored or saved last is not saved again.

        Args:
            step: number of steps done, above that of every checkpoint there is.
            state: nested dict of `jax.Array`, typed random keys among them.
            data_iterator: its position is saved with the state.
            metric: higher is better; None or NaN never is the best.
            wait: return only when the checkpoint is on the disk.
        """
        if step != self._newest:
            self._check_step(step)
            metric = None if metric is None else float(metric)
            leaves = {path: key_data(leaf) for path, leaf in _arrays(state).items()}
            position = json.dumps(seal(data_iterator.get_state()))
            self._finish()
            self._saving = ocp.save_checkpointables_async(
                str(self.directory / str(step)),
                {"state": leaves, "data": _Text(position)},
                custom_metadata=seal(self._new_record(step, state, metric)),
            )
            self._metrics[step] = metric
            self._newest = step
        if wait:
            self._finish()

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
        damaged: dict[int, str] = {}
        for step in reversed(self.steps):
            try:
                record = self._record(step)
                self._check_configuration(record, targets)
                leaves = self._load(record, targets, data_iterator)
            except Damaged as error:
                damaged[step] = str(error)
                continue
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
            if step != best and jax.process_index() == 0:
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

    def _record(self, step: int) -> Record:
        """What was noted beside the checkpoint, once it is known to be unharmed."""
        # Orbax would open the arrays too, and those may be damaged.
        with _reading():
            text = (self.directory / str(step) / "_CHECKPOINT_METADATA").read_text()
            return unseal(json.loads(text)["custom_metadata"])

    def _check_configuration(self, record: Record, targets: dict[str, Any]) -> None:
        """Raises when the state has other leaves, or the run other processes."""
        here = {path: signature(leaf) for path, leaf in targets.items()}
        if here != record["leaves"]:
            different = difference(record["leaves"], here)
            raise self._other(record, f"of the state, {different}")
        if record["processes"] != jax.process_count():
            counts = f"{record['processes']} there and {jax.process_count()} here"
            raise self._other(record, f"the number of processes is {counts}")

    def _load(
        self, record: Record, targets: dict[str, Any], data_iterator: DataIterator
    ) -> list[jax.Array]:
        """The leaves, compared with their checksums; then moves data_iterator."""
        folder = self.directory / str(record["step"])
        abstract = {path: _abstract_data(leaf) for path, leaf in targets.items()}
        with _reading():
            position = unseal(json.loads((folder / "data" / _file_name()).read_text()))
            _probe(folder / "state", list(targets))
            checkpoint = ocp.load_checkpointables(str(folder), {"state": abstract})
        loaded = checkpoint["state"]
        found = checksums(loaded)
        wrong = [path for path in found if found[path] != record["checksums"][path]]
        if wrong:
            raise Damaged(f"{wrong[0]} has a wrong checksum")
        try:
            data_iterator.set_state(position)
        except Exception as error:
            what = f"its data iterator does not fit ({_cause(error)})"
            raise self._other(record, what) from error
        return [key_like(leaf, loaded[path]) for path, leaf in targets.items()]

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
        if jax.process_index() == 0:
            for bad, path in kept.items():
                (self.directory / str(bad)).rename(path)
        multihost_utils.sync_global_devices("damaged checkpoints are renamed")
        for bad, path in kept.items():
            warnings.warn(
                f"checkpoint {bad} in {self.directory} is damaged ({damaged[bad]}): "
                f"going on from checkpoint {step}; the damaged one is now {path.name}",
                CheckpointWarning,
                stacklevel=3,
            )


@dataclass(frozen=True)
class _Text:
    """A text as Orbax takes it, which lets it write itself."""

    text: str

    async def save(self, directory: Any) -> Any:
        async def write() -> None:
            (await directory.await_creation() / _file_name()).write_text(self.text)

        return write()

    async def load(self, directory: Any) -> Any:
        raise NotImplementedError


def _file_name() -> str:
    return f"process_{jax.process_index()}-of-{jax.process_count()}.json"


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


def _abstract_data(leaf: Any) -> jax.ShapeDtypeStruct:
    data = jax.eval_shape(key_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def _cause(error: BaseException) -> str:
    """The first line of the error at the bottom of a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).splitlines() or [""]
    name = "" if isinstance(error, Damaged) else f"{type(error).__name__}: "
    return f"{name}{lines[0][:160]}"


def _probe(folder: Path, paths: list[str]) -> None:
    """Reads the leaves one after the other.

    Orbax reads them all at once, and when one fails the others write pages of errors.
    """
    for file in [folder / "_METADATA", *folder.glob("array_metadatas/*")]:
        json.loads(file.read_text())
    for path in paths:
        store = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{path}/"}
        try:
            array = tensorstore.open({"driver": "zarr3", "kvstore": store}).result()
            array.read().result()
        except Exception:
            raise Damaged(f"{path} cannot be read") from None


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Keeps Orbax's log of a damaged checkpoint off the terminal; raises Damaged."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        raise Damaged(_cause(error)) from error
    finally:
        logger.setLevel(level)
