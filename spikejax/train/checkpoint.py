"""Checkpoints of a run: Orbax saves them in the background, checksums guard them.

Orbax restores a flipped byte silently, and prints pages of tracebacks from other
threads when a file is truncated. Each checkpoint is therefore verified before it is
read; if a file has changed, the previous checkpoint is used.
"""

import math
import shutil
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
from orbax.checkpoint import v1 as ocp

from spikejax.train import processes
from spikejax.train.checksum import (
    SUMS,
    by_path,
    differences,
    find_corruption,
    signatures,
    write_checksums,
)


class CheckpointWarning(UserWarning):
    """A checkpoint, or a part of it, that could not be used."""


class DataIterator(Protocol):
    """A data iterator with a position; Grain's iterators have these methods."""

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


class Checkpoints:
    """The checkpoints in a folder: the best one by metric and the newest few.

    Corrupted checkpoints are kept in the folder, as `corrupt-STEP-TIME`.

    Args:
        directory: folder of the checkpoints, created if missing.
        keep: how many of the newest to keep, >= 2: a kill can leave one unfinished.

    Raises:
        ValueError: all checkpoints are corrupted.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2):
        self.directory = Path(directory).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        # One process reads: the disk is shared, and the others would read it all again.
        # They wait for what it found, and with that for the folder to be in order.
        found = self._find_intact() if processes.is_primary() else None
        self._intact, error = processes.all_gather(found)[0]
        if error:
            raise ValueError(f"Checkpoints: {error}")
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["metric"],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        kept: Any = policies.AnyPreservationPolicy([policies.LatestN(keep), best])
        # It reads the metrics of all checkpoints, and would raise on a corrupted one.
        self._manager = ocp.training.Checkpointer(
            str(self.directory),
            preservation_policy=kept,
            cleanup_tmp_directories=True,  # of saves that a kill interrupted
        )
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] = self._thread.submit(lambda: None)

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint on the disk, oldest first."""
        return _steps(self.directory)

    def save(
        self,
        step: int,
        state: dict[str, Any],
        data: DataIterator,
        *,
        metric: float | None = None,
        clock: Mapping[str, float] | None = None,
    ) -> None:
        """Save in the background; the state may be donated on return.

        Args:
            step: number of steps done, >= 1 and above that of every checkpoint.
            state: nested dict of `jax.Array`, typed random keys among them.
            data: its position is saved with the state.
            metric: higher is better; None or NaN is never the best.
            clock: numbers that `restore` returns.
        """
        notes = {
            "leaves": signatures(state),
            "data": processes.all_gather(data.get_state()),
            "clock": dict(clock or {}),
        }
        known = metric is not None and not math.isnan(metric)
        self._saving.result()
        saving: Any = self._manager.save_checkpointables_async(
            step,
            {"state": by_path(state)},
            force=True,  # by default Orbax skips a save while another is in progress
            metrics={"metric": metric} if known else None,
            custom_metadata=notes,
        )
        self._saving = self._thread.submit(self._seal, saving, step)

    def _seal(self, saving: ocp.AsyncResponse[bool], step: int) -> None:
        """Write the checksums once all processes have written their files."""
        saving.result()
        if processes.is_primary():
            write_checksums(self.directory / str(step))

    def restore(
        self, abstract_state: dict[str, Any], data: DataIterator
    ) -> tuple[int, dict[str, Any], dict[str, float]] | None:
        """Read the newest checkpoint there was, and move the data iterator there.

        Args:
            abstract_state: tree of the state, of `jax.ShapeDtypeStruct` with a sharding
                or of arrays. The sharding need not be the one that was saved.
            data: set to the position saved with the state.

        Returns:
            (step, state, clock) as saved, or None if there is no checkpoint yet.

        Raises:
            ValueError: the checkpoint has other leaves.
        """
        if not (step := self._intact):
            return None
        notes: Any = self._manager.checkpointables_metadata(step).custom_metadata
        # Orbax would cast another dtype silently, and call another shape a KeyError.
        if different := differences(notes["leaves"], signatures(abstract_state)):
            raise ValueError(
                f"Checkpoints.restore: expected the state of checkpoint {step} in "
                f"{self.directory}, got another one: {different}. Take the settings "
                "that it was saved with, or another folder."
            )
        targets = by_path(abstract_state)
        found = self._manager.load_checkpointables(step, {"state": targets})["state"]
        leaves = [found[path] for path in targets]
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
        positions, (index, count) = notes["data"], processes.shard()
        # One that all had in common fits any number of processes.
        if len(positions) == count or positions.count(positions[0]) == len(positions):
            data.set_state(positions[index % len(positions)])
        else:
            warnings.warn(
                f"checkpoint {step} in {self.directory} is of {len(positions)} "
                f"processes with positions of their own, and now there are {count}: "
                "the order of the data starts again",
                CheckpointWarning,
                stacklevel=3,
            )
        return step, state, notes["clock"]

    def close(self) -> None:
        """Wait for the last save, and raise what it raised."""
        try:
            self._saving.result()
        finally:
            self._thread.shutdown()
            self._manager.close()

    def _find_intact(self) -> tuple[int, str]:
        """Return the newest intact step or 0, and an error; put the folder in order."""
        steps = self.steps
        if steps and not (self.directory / str(steps[-1]) / SUMS).exists():
            # A kill came between the save and its checksums.
            shutil.rmtree(self.directory / str(steps.pop()))
        reasons = {step: find_corruption(self.directory / str(step)) for step in steps}
        corrupt = [step for step in reversed(steps) if reasons[step]]
        intact = max(set(steps) - set(corrupt), default=0)
        if corrupt and not intact:
            found = "; ".join(f"{step}: {reasons[step]}" for step in corrupt)
            return 0, (
                f"expected an intact checkpoint in {self.directory}, got only "
                f"corrupted ones ({found}). Put a copy of one back, or delete the "
                "folder to start from the first step."
            )
        for step in corrupt:
            path = self.directory / str(step)
            if step < intact:
                shutil.rmtree(path)  # a kill may have come while Orbax removed it
                continue
            # Renamed, so that the step can be saved again.
            kept = path.with_name(f"corrupt-{step}-{time.strftime('%Y%m%d-%H%M%S')}")
            path.rename(kept)
            warnings.warn(
                f"checkpoint {step} in {self.directory} is corrupted ({reasons[step]}):"
                f" resuming from checkpoint {intact}; it is now {kept.name}",
                CheckpointWarning,
                stacklevel=3,
            )
        return intact, ""


def has_checkpoint(directory: Path) -> bool:
    """Tell if a run with this folder of checkpoints resumes from one of them."""
    return any((directory / str(step) / SUMS).exists() for step in _steps(directory))


def read_newest(directory: Path) -> dict[str, jax.Array]:
    """Return the state of the newest intact checkpoint by path, or {} without one.

    Reads the folder of another run, which may be in progress, and changes nothing.

    Args:
        directory: folder of the checkpoints of a run.
    """
    folders = [directory.absolute() / str(step) for step in _steps(directory)]
    folder = next((f for f in reversed(folders) if not find_corruption(f)), None)
    if folder is None:
        return {}
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    saved: Any = ocp.checkpointables_metadata(str(folder)).metadata
    targets = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
        for path, leaf in saved["state"].items()
    }
    return ocp.load_checkpointables(str(folder), {"state": targets})["state"]


def _steps(directory: Path) -> list[int]:
    paths = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(path.name) for path in paths if path.name.isdecimal())
