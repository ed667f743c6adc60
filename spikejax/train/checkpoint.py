"""Checkpoints of a run: Orbax saves them in the background, a checksum guards them.

Orbax restores a corrupted file silently, or prints pages of tracebacks from other
threads. Each checkpoint is therefore verified before it is read; if a file has changed,
the previous checkpoint is used.
"""

import functools
import json
import math
import shutil
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
from orbax.checkpoint import v1 as ocp

from spikejax.train import processes
from spikejax.train.checksum import (
    SUMS,
    by_path,
    find_corruption,
    first_difference,
    key_data,
    key_like,
    signatures,
    write_checksums,
)

policies = ocp.training.preservation_policies


class CheckpointWarning(UserWarning):
    """A checkpoint, or a part of it, that could not be used."""


class DataIterator(Protocol):
    """A data iterator with a position; Grain's iterators have these methods."""

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


class Restored(NamedTuple):
    """A checkpoint that was read: its step, the state, and the saved clock."""

    step: int
    state: dict[str, Any]
    clock: dict[str, float]


@dataclass
class _Notes:
    """JSON beside the arrays, as a checkpointable that saves itself for Orbax."""

    content: dict[str, Any] = field(default_factory=dict)

    async def save(self, directory: ocp.path.PathAwaitingCreation) -> Any:
        # Orbax awaits `write` in the background, with the arrays.
        async def write() -> None:
            path = await directory.await_creation() / "notes.json"
            if processes.is_primary():
                path.write_text(json.dumps(self.content, indent=1))

        return write()

    async def load(self, directory: ocp.path.Path) -> Any:
        async def read() -> None:
            self.content = json.loads((directory / "notes.json").read_text())

        return read()


@dataclass
class _Best:
    """A preservation policy: keeps the step with the largest metric, the last of ties.

    Orbax's own BestN reads the metrics of all steps when its Checkpointer is made, and
    raises if one of the files is corrupted, before a checkpoint can be verified.
    """

    metrics: dict[int, float]

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: policies.PreservationContext
    ) -> list[bool]:
        known = [c.step for c in checkpoints if c.step in self.metrics]
        best = max(known, key=lambda step: (self.metrics[step], step), default=None)
        return [c.step == best for c in checkpoints]


class Checkpoints:
    """The checkpoints in a folder: the best one by metric and the newest few.

    Call `restore` before the first `save`. Corrupted checkpoints that it skips are kept
    in the folder, as `corrupt-STEP-TIME`.

    Args:
        directory: folder of the checkpoints, created if missing.
        keep: how many of the newest to keep, >= 2: the newest may be unfinished.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2):
        self.directory = Path(directory).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None
        self._metrics: dict[int, float] = {}

    @functools.cached_property
    def _manager(self) -> ocp.training.Checkpointer:
        # Made after corrupted folders are renamed: it lists the folder only once.
        found = {step: self._read_metric(step) for step in self.steps}
        self._metrics |= {step: m for step, m in found.items() if m is not None}
        keep = policies.LatestN(self._keep), _Best(self._metrics)
        return ocp.training.Checkpointer(
            self.directory,
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,  # of saves that a kill interrupted
        )

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint on the disk, oldest first."""
        names = [path.name for path in self.directory.iterdir()]
        return sorted(int(name) for name in names if name.isdecimal())

    def save(
        self,
        step: int,
        state: dict[str, Any],
        data: DataIterator,
        *,
        metric: float | None = None,
        clock: dict[str, float] | None = None,
    ) -> None:
        """Save in the background; the state may be donated on return.

        Args:
            step: number of steps done, above that of every checkpoint there is.
            state: nested dict of `jax.Array`, typed random keys among them.
            data: its position is saved with the state.
            metric: higher is better; None or NaN is never the best.
            clock: numbers that `restore` returns.
        """
        if metric is not None and not math.isnan(metric):
            self._metrics[step] = float(metric)
        notes = {
            "leaves": signatures(state),
            "data": processes.all_gather(data.get_state()),
            "metric": self._metrics.get(step),
            "clock": clock or {},
        }
        leaves = {path: key_data(leaf) for path, leaf in by_path(state).items()}
        self._finish()
        # The default policy would skip a save while another one is in progress.
        response = self._manager.save_checkpointables_async(
            step, {"state": leaves, "notes": _Notes(notes)}, force=True
        )
        self._saving = self._thread.submit(self._seal, response, step)

    def _seal(self, response: Any, step: int) -> None:
        """Write the checksums once all processes have written their files."""
        response.result()
        if processes.is_primary():
            write_checksums(self.directory / str(step))

    def restore(
        self, abstract_state: dict[str, Any], data: DataIterator
    ) -> Restored | None:
        """Read the newest intact checkpoint, and move the data iterator there.

        Args:
            abstract_state: tree of the state, of `jax.ShapeDtypeStruct` with a sharding
                or of arrays. The sharding need not be the one that was saved.
            data: set to the position saved with the state.

        Returns:
            what was saved, or None if there is no checkpoint yet.

        Raises:
            ValueError: the checkpoint has other leaves, or all are corrupted.
        """
        self._remove_unfinished()
        corrupt: dict[int, str] = {}
        for step in reversed(self.steps):
            if not (reason := self._find_corruption(step)):
                break
            corrupt[step] = reason
        else:
            if corrupt:
                found = "; ".join(f"{step}: {why}" for step, why in corrupt.items())
                raise ValueError(
                    f"Checkpoints.restore: expected an intact checkpoint in "
                    f"{self.directory}, got only corrupted ones ({found}). Put a copy "
                    "of one back, or delete the folder to start from the first step."
                )
            return None
        self._rename(corrupt, step)
        return self._load(step, abstract_state, data)

    def close(self) -> None:
        """Wait for the last save, and raise what it raised."""
        try:
            self._finish()
        finally:
            self._thread.shutdown()
            if "_manager" in vars(self):
                self._manager.close()

    def _finish(self) -> None:
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def _read_metric(self, step: int) -> float | None:
        """Return the metric of a checkpoint, None if it has none or is corrupted."""
        path = self.directory / str(step) / "notes" / "notes.json"
        try:
            return float(json.loads(path.read_text())["metric"])
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _remove_unfinished(self) -> None:
        """Remove the newest checkpoint if a kill came between save and checksums."""
        newest = self.directory / str(max(self.steps, default=-1))
        if processes.is_primary() and newest.exists() and not (newest / SUMS).exists():
            shutil.rmtree(newest)
        processes.all_gather(0)  # all wait for it

    def _find_corruption(self, step: int) -> str:
        """Return what is wrong with a checkpoint; the same on all processes."""
        reason, folder = "", self.directory / str(step)
        # One process reads: the disk is shared, and the others would read it all again.
        if processes.is_primary():
            reason = find_corruption(folder)
        return processes.all_gather(reason)[0]

    def _load(
        self, step: int, abstract_state: dict[str, Any], data: DataIterator
    ) -> Restored:
        notes = _Notes()
        self._manager.load_checkpointables(step, {"notes": notes})
        saved = notes.content
        # Orbax would cast another dtype silently, and call another shape a KeyError.
        if different := first_difference(saved["leaves"], signatures(abstract_state)):
            raise ValueError(
                f"Checkpoints.restore: expected the state of checkpoint {step} in "
                f"{self.directory}, got another one: {different}. Take the settings "
                "that it was saved with, or another folder."
            )
        targets = by_path(abstract_state)
        structs = {path: _struct(leaf) for path, leaf in targets.items()}
        found = self._manager.load_checkpointables(step, {"state": structs})["state"]
        leaves = [key_like(leaf, found[path]) for path, leaf in targets.items()]
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
        self._move(data, saved["data"], step)
        return Restored(step, state, saved["clock"])

    def _move(self, data: DataIterator, positions: list[Any], step: int) -> None:
        """Move the iterator, or warn that its order starts again."""
        index, count = processes.shard()
        if len(positions) == count:
            data.set_state(positions[index])
        elif positions.count(positions[0]) == len(positions):
            data.set_state(positions[0])
        elif processes.is_primary():
            warnings.warn(
                f"checkpoint {step} in {self.directory} is of {len(positions)} "
                f"processes with positions of their own, and now there are {count}: "
                "the order of the data starts again",
                CheckpointWarning,
                stacklevel=4,
            )

    def _rename(self, corrupt: dict[int, str], good: int) -> None:
        """Rename corrupted checkpoints, so that their steps can be saved again."""
        for step, reason in corrupt.items() if processes.is_primary() else ():
            path = self.directory / str(step)
            kept = path.with_name(f"corrupt-{step}-{time.strftime('%Y%m%d-%H%M%S')}")
            path.rename(kept)
            warnings.warn(
                f"checkpoint {step} in {self.directory} is corrupted ({reason}): "
                f"resuming from checkpoint {good}; it is now {kept.name}",
                CheckpointWarning,
                stacklevel=3,
            )
        processes.all_gather(0)  # all wait for the renames


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return shape, dtype and sharding of a leaf; of a random key, of its numbers."""
    data = jax.eval_shape(key_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)
