"""Several processes, one a machine: how they join, agree, and leave when one dies.

JAX runs the same program in each of them. One process needs none of this.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

LOST = (jax.errors.JaxRuntimeError, TimeoutError)  # of collectives and of Orbax
GO_ON = "The same command on all of them goes on from the last checkpoint."


@dataclass(frozen=True)
class Processes:
    """How the processes of a run find each other."""

    coordinator_address: str | None = None
    """HOST:PORT of process 0, or auto in Slurm; processes of a TPU pod need none."""
    num_processes: int | None = None
    """Number of processes, where the address is not auto."""
    process_id: int | None = None
    """Which of them this is: 0, 1, ..."""
    heartbeat: int = 20
    """Seconds of silence after which a process counts as dead, and the others leave."""

    def __post_init__(self):
        where, count, index = (
            self.coordinator_address,
            self.num_processes,
            self.process_id,
        )
        if where in (None, "auto"):
            if (count, index) != (None, None):
                raise ValueError(
                    "coordinator_address: expected HOST:PORT beside --num-processes "
                    f"and --process-id, got {where}."
                )
        elif not where.rpartition(":")[0] or not where.rpartition(":")[2].isdecimal():
            raise ValueError(
                f"coordinator_address: expected HOST:PORT or auto, got {where!r}."
            )
        elif count is None or index is None:
            raise ValueError(
                "coordinator_address: expected --num-processes and --process-id "
                f"beside {where}, got {count} and {index}."
            )
        elif not 0 <= index < count:
            raise ValueError(
                f"process_id: expected 0 <= process_id < num_processes, got {index} "
                f"of {count}."
            )
        if self.heartbeat < 1:
            raise ValueError(
                f"heartbeat: expected at least 1 second, got {self.heartbeat}."
            )


@contextlib.contextmanager
def joined(flags: Processes) -> Iterator[None]:
    """Joins the other processes; to be entered before any other use of JAX.

    Where there are several, an error inside ends this one at once with a line on
    stderr: at a normal exit it would wait for the others, and they for it.
    """
    _join(flags)
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, LOST):
            time.sleep(2)  # JAX may be about to abort, and the line is to be the last
        elif not isinstance(error, ValueError | OSError):
            traceback.print_exc()
        _leave(_message(error))


def _join(flags: Processes) -> None:
    asked = flags.coordinator_address is not None
    if jax.distributed.is_initialized() or not (asked or _on_tpu()):
        return
    where: dict[str, Any] = {}
    if flags.num_processes is not None:
        where = {
            "coordinator_address": flags.coordinator_address,
            "num_processes": flags.num_processes,
            "process_id": flags.process_id,
        }
    _speak_before_abort(flags)
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=flags.heartbeat, **where)
    except (RuntimeError, ValueError, OSError) as error:
        if not asked and jax.process_count() == 1:  # a TPU that is no pod
            return
        raise ValueError(
            f"processes: could not join at {flags.coordinator_address}: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _on_tpu() -> bool:
    """Whether JAX found a TPU, which may be a part of a pod, when it was imported."""
    allowed = "tpu" in os.environ.get("JAX_PLATFORMS", "tpu")
    return allowed and os.environ.get("TPU_ML_PLATFORM") == "JAX"


def of_all(value: int) -> list[int]:
    """The value of every process, in their order."""
    if jax.process_count() == 1:
        return [value]
    return multihost_utils.process_allgather(np.int32(value)).tolist()


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def shard() -> tuple[int, int]:
    """(index of this process, number of processes)."""
    return jax.process_index(), jax.process_count()


class Terminated:
    """Notes SIGTERM instead of dying of it, inside of a with statement.

    With several processes JAX notes it, and makes out a step that all can end with.
    """

    now = False

    def __enter__(self) -> "Terminated":
        alone = jax.process_count() == 1
        self.main = alone and threading.current_thread() is threading.main_thread()
        if self.main:
            self.previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def at(self, step: int) -> bool:
        """Whether the run is to end with this step; the same on all processes."""
        if jax.process_count() == 1:
            return self.now
        return multihost_utils.reached_preemption_sync_point(step)

    def _note(self, *_: object) -> None:
        self.now = True

    def __exit__(self, *_: object) -> None:
        if self.main:
            signal.signal(signal.SIGTERM, self.previous)


def _message(error: Exception) -> str:
    said = (str(error).splitlines() or [""])[0]
    if isinstance(error, LOST):
        return f"JAX failed, as when another process dies ({said[:200]}). {GO_ON}"
    known = isinstance(error, ValueError | OSError)
    return " ".join(str(error).split()) if known else f"{type(error).__name__}: {said}"


_leaving = threading.Lock()


def _leave(message: str) -> NoReturn:
    """One line on stderr, and the end of this process whatever its threads wait for."""
    if not _leaving.acquire(blocking=False):
        threading.Event().wait()  # another thread is about to end the process
    index, count = shard()
    print(f"process {index} of {count}: {message}", file=sys.stderr, flush=True)
    if index == 0:
        time.sleep(1)  # its end aborts the others, who may be about to say the same
    os._exit(1)


def _speak_before_abort(flags: Processes) -> None:
    """Ends the pages that JAX writes about a dead process with a line that is clear.

    JAX aborts in a thread of its own, with no exception and where Python's handlers of
    signals are not heard. JAX 0.7 may end the process with its own line instead.
    """
    name = f"process {flags.process_id}: " if flags.process_id is not None else ""
    line = f"{name}another process died or was not reached in time. {GO_ON}\n"

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(_):
        if _leaving.acquire(blocking=False):
            os.write(2, line.encode())
            os._exit(1)
        threading.Event().wait()

    _kept.append(handler)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)


_kept: list[Any] = []  # C holds no reference to its handler
