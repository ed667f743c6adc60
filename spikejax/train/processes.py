"""Several processes, one per machine: how they join, agree, and stop together.

JAX runs the same program in each of them. One process needs none of this.
"""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# JAX's collectives and Orbax's barriers raise these when a peer has died.
PEER_ERRORS = (jax.errors.JaxRuntimeError, TimeoutError)
RESUME = "The same command on all of them resumes from the last checkpoint."


@dataclass(frozen=True)
class Processes:
    """Settings by which the processes of a run find each other."""

    coordinator_address: str | None = None
    """HOST:PORT of process 0, or auto in Slurm and on a TPU pod."""
    num_processes: int | None = None
    """Number of processes, if the address is not auto."""
    process_id: int | None = None
    """Index of this process: 0, 1, ..."""
    heartbeat: int = 20
    """Seconds of silence after which a process counts as dead and the others stop."""

    def __post_init__(self):
        where = self.coordinator_address
        missing = (self.num_processes, self.process_id).count(None)
        # Without this JAX would try to reach half an address for five minutes.
        explicit = re.fullmatch(r".+:\d+", where or "") and missing == 0
        if not explicit and not (where in (None, "auto") and missing == 2):
            raise ValueError(
                "coordinator_address: expected HOST:PORT with --num-processes and "
                f"--process-id, or auto without them, got {where}, "
                f"{self.num_processes} and {self.process_id}."
            )


@contextlib.contextmanager
def distributed(flags: Processes) -> Iterator[None]:
    """Join the other processes; to be entered before any other use of JAX.

    If there are several, an exception inside ends this process with exit code 1 and one
    line on stderr. When a peer dies, JAX may abort this process first, with a message
    of its own.

    Args:
        flags: how to find the others; by default there are none.
    """
    if flags.coordinator_address is None:
        yield
        return
    auto = flags.coordinator_address == "auto"  # JAX asks Slurm, or the TPU's metadata
    address = None if auto else flags.coordinator_address
    try:
        if not jax.distributed.is_initialized():  # else by an earlier run of the script
            jax.distributed.initialize(
                *(address, flags.num_processes, flags.process_id),
                heartbeat_timeout_seconds=flags.heartbeat,
            )
        yield
    except Exception as error:  # anything: the peers wait for this process
        message = " ".join(str(error).split())
        if isinstance(error, PEER_ERRORS):
            reason = f"as when another process dies ({message[:200]})"
            message = f"JAX failed, {reason}. {RESUME}"
        elif not isinstance(error, ValueError | OSError):
            traceback.print_exc()
            message = f"{type(error).__name__}: {message[:200]}"
        joined = jax.distributed.is_initialized()
        index = jax.process_index() if joined else flags.process_id
        print(f"process {index}: {message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # sys.exit would run JAX's shutdown barrier, which waits for the peers, which
        # wait for this process in a collective.
        os._exit(1)


def all_gather(value: Any) -> list[Any]:
    """Return the value, anything that JSON can hold, of every process in order."""
    if jax.process_count() == 1:
        return [value]
    raw = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = multihost_utils.process_allgather(np.int32(raw.size)).max()
    padded = np.pad(raw, (0, size - raw.size), constant_values=ord(" "))
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row.tobytes()) for row in rows]


def is_primary() -> bool:
    """Return True in the one process that prints and writes."""
    return jax.process_index() == 0


def shard() -> tuple[int, int]:
    """Return the index of this process and the number of processes."""
    return jax.process_index(), jax.process_count()


class Terminated:
    """A context in which SIGTERM is recorded instead of ending the process.

    With several processes the signal may reach only one. `flag` therefore goes into
    each batch, the training step reduces it over all of them, and all stop at the same
    step. (JAX's own preemption service does the same, but Orbax calls it for an older
    step from another thread, and then the processes can miss the step agreed on.)
    """

    requested = agreed = False

    def __enter__(self) -> "Terminated":
        # Python delivers signals to the main thread only. JAX's preemption service has
        # installed a C handler of its own; this one replaces it.
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._previous = signal.signal(signal.SIGTERM, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._previous)

    def _record(self, *_: object) -> None:
        self.requested = True

    def flag(self, size: int) -> dict[str, np.ndarray]:
        """Return {"stop": [size]} for the batch, or {} for a single process."""
        single = jax.process_count() == 1
        return {} if single else {"stop": np.full(size, self.requested)}

    def read(self, metrics: dict[str, Any]) -> None:
        """Remove what the step made of the flag from its metrics."""
        self.agreed |= bool(metrics.pop("stop", False))

    @property
    def now(self) -> bool:
        """Return True if the run is to end now; the same in all processes."""
        return self.requested if jax.process_count() == 1 else self.agreed
