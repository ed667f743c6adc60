"""Several processes, one per machine: how they join, agree, and stop together.

JAX runs the same program in each of them. One process needs none of this.
"""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from spikejax.train.recipe import Ranges, check_settings
from spikejax.train.rendezvous import meet

# JAX's collectives and Orbax's barriers raise these when a peer has died.
PEER_ERRORS = (jax.errors.JaxRuntimeError, TimeoutError)
# Some of them come as a ValueError that starts with the name of a status.
PEER_STATUS = re.compile(
    "(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|CANCELLED):"
)
RESUME = "The same command on all of them resumes from the last checkpoint."
# Settings that may differ between the processes of one run.
LOCAL = {"coordinator_address", "process_id", "data_dir", "workers", "heartbeat"}


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
    join_timeout: int = 60
    """Seconds to wait at the start for processes that have not joined; no effect with
    auto."""

    def __post_init__(self):
        where, count = self.coordinator_address, self.num_processes or 0
        missing = (self.num_processes, self.process_id).count(None)
        # Without this JAX would try to reach half an address for five minutes.
        explicit = re.fullmatch(r".+:\d+", where or "") and missing == 0
        if not explicit and not (where in (None, "auto") and missing == 2):
            raise ValueError(
                "coordinator_address: expected HOST:PORT with --num-processes and "
                f"--process-id, or auto without them, got {where}, "
                f"{self.num_processes} and {self.process_id}."
            )
        port = int((where or "").rpartition(":")[2]) if explicit else 1
        ranges: Ranges = {
            "coordinator_address": ("a port up to 65535", lambda _: 0 < port < 2**16),
            "num_processes": ("at least 1", lambda n: n >= 1),
            "process_id": (f"0 to {count - 1}", lambda i: 0 <= i < count),
            "heartbeat": ("1 to 3600 seconds", lambda s: 1 <= s <= 3600),
            "join_timeout": ("1 to 86400 seconds", lambda s: 1 <= s <= 86400),
        }
        check_settings(self, ranges)


@contextlib.contextmanager
def distributed(
    flags: Processes, settings: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Join the other processes; to be entered before any other use of JAX.

    If there are several, an exception inside ends this process with exit code 1 and one
    line on stderr. When a peer dies, JAX may abort this process first, with a message
    of its own.

    Args:
        flags: how to find the others; by default there are none.
        settings: of this process, on which all have to `agree`.
    """
    if flags.coordinator_address is None:
        yield
        return
    auto = flags.coordinator_address == "auto"
    address = None if auto else flags.coordinator_address
    try:
        if not jax.distributed.is_initialized():  # else by an earlier run of the script
            count, index = flags.num_processes, flags.process_id
            if address and count is not None and index is not None:
                meet(address, count, index, flags.join_timeout)
            _initialize(address, count, index, flags.heartbeat)
        # JAX has installed a handler that a signal would be lost in. One that comes
        # before the training stops it after its first step, in all processes.
        with Terminated():
            agree(settings or {})
            yield
    except SystemExit as error:  # of a signal while joining
        _exit_now(error.code if isinstance(error.code, int) else bool(error.code))
    except (Exception, KeyboardInterrupt) as error:  # the peers wait for this process
        message = " ".join(str(error).split())
        if _is_of_peer(error):
            reason = f"as when another process dies ({message[:200]})"
            message = f"JAX failed, {reason}. {RESUME}"
        elif isinstance(error, KeyboardInterrupt):
            message = f"interrupted. {RESUME}"
        elif not isinstance(error, ValueError | OSError):
            traceback.print_exc()
            message = f"{type(error).__name__}: {message[:200]}"
        joined = jax.distributed.is_initialized()
        index = jax.process_index() if joined else flags.process_id
        who = "" if index is None else f"process {index}: "
        print(f"{who}{message}", file=sys.stderr)
        _exit_now(1)


def _is_of_peer(error: BaseException) -> bool:
    """Return True for an error as those after the death of another process."""
    is_status = isinstance(error, ValueError) and PEER_STATUS.match(str(error))
    return isinstance(error, PEER_ERRORS) or bool(is_status)


def _exit_now(code: int) -> NoReturn:
    for worker in multiprocessing.active_children():  # Grain's would live on
        worker.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    # sys.exit would run JAX's shutdown barrier, which waits for the peers, which wait
    # for this process in a collective.
    os._exit(code)


def _initialize(
    address: str | None, count: int | None, index: int | None, heartbeat: int
) -> None:
    """Connect JAX; without an address it asks Slurm, or the metadata of a TPU."""
    try:
        jax.distributed.initialize(
            address, count, index, heartbeat_timeout_seconds=heartbeat
        )
    except ValueError as error:
        if address:
            raise
        raise ValueError(
            "coordinator_address: expected Slurm or a TPU pod, where auto finds the "
            "processes, got neither. Take HOST:PORT, --num-processes and --process-id."
        ) from error


def agree(settings: Mapping[str, Any]) -> None:
    """Check that all processes have the same settings, but for those in `LOCAL`.

    Raises:
        ValueError: one of them differs, or has more devices than another.
    """
    counts = Counter(device.process_index for device in jax.devices())
    for index, count in counts.items():
        if count != counts[0]:
            raise ValueError(
                f"devices: expected as many in every process, got {counts[0]} in "
                f"process 0 and {count} in process {index}. Start all alike."
            )
    shared = {k: str(v) for k, v in settings.items() if k not in LOCAL}
    every = all_gather(shared)
    for index, other in enumerate(every):
        for name in every[0] | other:
            first, here = every[0].get(name), other.get(name)
            if first != here:
                raise ValueError(
                    f"{name}: expected the same in all processes, got {first} in "
                    f"process 0 and {here} in process {index}. Start all alike."
                )


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
    """A context in which SIGTERM, SIGHUP and Ctrl-C are recorded instead of obeyed.

    A second Ctrl-C interrupts. A context inside of another knows what that recorded.

    With several processes the signal may reach only one. `flag` therefore goes into
    each batch, the training step reduces it over all of them, and all stop at the same
    step. (JAX's own preemption service does the same, but Orbax calls it for an older
    step from another thread, and then the processes can miss the step agreed on.)
    """

    requested = agreed = False

    def __enter__(self) -> "Terminated":
        self._previous = {}
        # Python delivers signals to the main thread only. JAX's preemption service has
        # installed a C handler of its own; this one replaces it.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                handler = signal.getsignal(number)
                outer = getattr(handler, "__self__", None)
                if isinstance(outer, Terminated):
                    self.requested |= outer.requested
                # Ignored under nohup, or in the background: then it stays ignored.
                if handler is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
            outer = getattr(handler, "__self__", None)
            if isinstance(outer, Terminated):  # what comes next stops too
                outer.requested |= self.requested

    def _record(self, number: int, _: object) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

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
