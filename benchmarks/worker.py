"""One library at work: one step per request.

    python -m benchmarks.worker SIDE MODE SIZES THREADS

Started by ``benchmarks.turns``. Answers are lines of JSON on stdout: one when the
network is ready, then one for each line of stdin. What the library itself prints goes
to stderr. Imports nothing but the standard library and the library's own side, so the
interpreter needs no other.

Peak memory on a CPU is the kernel's: the most that was resident during a step (VmHWM),
less what was resident before the first, plus what the network held then (parameters,
data, state of the optimiser). Code that the step loads counts too, some 10 to 40 MiB.
"""

import contextlib
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def main(side: str, mode: str, sizes: str, threads: str) -> None:
    """Prepare, then answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    use_processors(int(threads))

    def say(answer):
        print(json.dumps(answer), file=answers, flush=True)

    with errors_said(say):
        given = json.loads(sizes)
        prepared = prepare(side, mode, given)
        say(
            {
                "parameters": prepared.parameters,
                "versions": prepared.versions,
                "device": prepared.device,
                "compiled_mib": prepared.compiled_mib,
            }
        )
        before = resident("VmRSS") - prepared.held_bytes / 2**20
        spent = prepared.compile_s  # counts with the first step
        count = 1  # the first step may compile
        for _ in sys.stdin:
            say(timed(prepared, before, count) | {"compile_s": spent})
            spent, count = 0.0, given["in_a_row"]


@contextlib.contextmanager
def errors_said(say: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Turn a missing module, or an error inside, into an answer."""
    try:
        yield
    except ModuleNotFoundError as error:
        say({"missing": error.name})
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        say({"error": f"{type(error).__name__}: {lines[0]}"})


def use_processors(threads: int) -> None:
    """Use as many processors as threads, which is how XLA counts its threads."""
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[:threads])


def prepare(side: str, mode: str, sizes: dict):
    """Return the side's network, after the one heavy import."""
    from benchmarks.workloads import Sizes

    module = importlib.import_module(f"benchmarks.sides.{side}")
    sizes["channels"] = tuple(sizes["channels"])
    return module.prepare(Sizes(**sizes), mode)


def timed(prepared, before: float, count: int) -> dict:
    """Return ms of wall and processor time of a step, peak MiB, and the last loss."""
    if CLEAR.exists():
        CLEAR.write_text("5")  # VmHWM counts from here
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(count):
        loss = prepared.step()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resident("VmHWM") - before
    if prepared.device_peak is not None:
        peak = prepared.device_peak() / 2**20
    ms, cpu_ms = 1000 * wall / count, 1000 * cpu / count
    return {"ms": ms, "cpu_ms": cpu_ms, "peak_mib": peak, "loss": loss}


def resident(name: str) -> float:
    """Return a line of /proc/self/status in MiB; NaN where there is none."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    values = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return float(values[0]) / 1024 if values else float("nan")


if __name__ == "__main__":
    main(*sys.argv[1:])
