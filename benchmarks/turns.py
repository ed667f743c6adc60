"""Workers that take turns: one process a run, all alive, one at work at a time.

So a change of the machine's speed falls on all of them, and the threads of no library
disturb another's. After each step there is a pause, in which threads that
wait for more work go to sleep (OpenMP's spin for some milliseconds).

Peak memory is of processes of their own, whose allocator is set to return immediately
what is freed: else PyTorch's peak is up to twice as high, and its steps are faster.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.workloads import Run, Sizes, Workload

ROOT = Path(__file__).resolve().parents[1]
SIDES = {  # library -> file in sides
    "spikejax": "ours",
    "SpikingJelly": "spikingjelly",
    "PyTorch": "pytorch",
    "snnTorch": "snntorch",
    "Spyx": "spyx",
}
UNTIMED = 2
PAUSE_S = 0.05
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Failed(Exception):
    """A worker that ended, with its reason in one line."""


class Missing(Failed):
    """A worker whose library is not installed."""


class Worker:
    """A process with one library's network."""

    def __init__(self, command: Sequence[str], log: Path, env: dict[str, str]):
        self._log = log.open("w")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env=env,
        )
        try:
            self.says = self._answer()
        except Failed:
            self.close()
            raise

    def step(self) -> dict[str, Any]:
        """Return its figures of one step."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended: the answer says why
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _answer(self):
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            lines = Path(self._log.name).read_text(errors="replace").split("\n")
            last = next((x for x in reversed(lines) if x.strip()), "it said nothing")
            raise Failed(f"ended with exit code {code}: {last.strip()}")
        answer = json.loads(line)
        if "missing" in answer:
            raise Missing(answer["missing"])
        if "error" in answer:
            raise Failed(answer["error"])
        return answer


def environment(threads: int, device: str) -> dict[str, str]:
    """Return the variables of a worker: threads, device, no compilation cache."""
    settings = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
    if device == "cpu":
        settings |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    else:  # without one, every library fails
        settings |= {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": visible}
    return os.environ | settings


def command(run: Run, sizes: Sizes, peers: Path, threads: int) -> list[str]:
    """Return the command that starts the worker of a run."""
    python = sys.executable if run.library == "spikejax" else str(peers)
    sizes = dataclasses.replace(sizes, time_steps=run.time_steps)
    fields = json.dumps(dataclasses.asdict(sizes))
    side = SIDES[run.library]
    return [python, "-m", "benchmarks.worker", side, run.mode, fields, str(threads)]


def take_turns(
    runs: Sequence[Run],
    start: Callable[[Run], Worker],
    turns: int,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Return a row per run: the answers of its worker, or the error that ended it.

    Args:
        runs: who takes part.
        start: of a worker.
        turns: timed steps of each, after two that are not.
        say: takes lines of progress.
    """
    rows = [{"library": r.library, "mode": r.mode, "label": r.label} for r in runs]
    answers: list[list[dict]] = [[] for _ in runs]
    say(f"{len(runs)} processes start and compile")
    with contextlib.ExitStack() as stack:
        workers: dict[int, Worker] = {}
        for place, run in enumerate(runs):
            try:
                workers[place] = start(run)
                stack.callback(workers[place].close)
                rows[place] |= workers[place].says
            except Failed as error:
                rows[place] |= _said(error)
        for turn in range(turns + UNTIMED):
            began = time.perf_counter()
            for place, worker in list(workers.items()):
                try:
                    answers[place].append(worker.step())
                except Failed as error:
                    rows[place] |= _said(error)
                    workers.pop(place)
                time.sleep(PAUSE_S)
            if turn == UNTIMED:
                left = (turns - 1) * (time.perf_counter() - began)
                say(f"{len(workers)} networks, {left:.0f} s left")
    for row, said in zip(rows, answers, strict=True):
        if not {"error", "missing"} & set(row):
            row |= _summary(said)
    return rows


def add_peaks(
    rows: list[dict[str, Any]], runs: Sequence[Run], start: Callable[[Run], Worker]
) -> None:
    """Adds the peak memory of the second step to each row that ran, in place."""
    for row, run in zip(rows, runs, strict=True):
        if "steps_ms" not in row:
            continue
        try:
            with contextlib.closing(start(run)) as worker:
                worker.step()
                row["peak_mib"] = worker.step()["peak_mib"]
        except Failed as error:
            row |= _said(error)


def _said(error):
    return {"missing" if isinstance(error, Missing) else "error": str(error)}


def _summary(said: list[dict]) -> dict[str, Any]:
    """Medians of the timed steps; what came before them is the first call."""
    timed = said[UNTIMED:]
    times = [answer["ms"] for answer in timed]
    low, middle, high = quartiles(times)
    return {
        "median_ms": middle,
        "quartiles_ms": [low, high],
        "steps_ms": times,
        "cpu_ms": statistics.median(answer["cpu_ms"] for answer in timed),
        "first_call_s": said[0]["compile_s"] + said[0]["ms"] / 1000,
        "first_loss": said[0]["loss"],
    }


def in_turns(
    steps: Mapping[Any, Callable[[], Any]], repeats: int
) -> dict[Any, dict[str, Any]]:
    """Milliseconds of each step, by the clock and of the processor, turn by turn.

    Args:
        steps: name -> a step that waits for its end.
        repeats: timed steps of each, each after one that is not.
    """
    clock, processor = {name: [] for name in steps}, {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            step()  # or it would pay for the memory that the one before gave back
            began, cpu = time.perf_counter(), time.process_time()
            step()
            processor[name].append(1000 * (time.process_time() - cpu))
            clock[name].append(1000 * (time.perf_counter() - began))
    return {
        name: {
            "median_ms": statistics.median(clock[name]),
            "quartiles_ms": quartiles(clock[name])[::2],
            "steps_ms": clock[name],
            "cpu_ms": statistics.median(processor[name]),
            "cpu_steps_ms": processor[name],
        }
        for name in steps
    }


def processors() -> int:
    """Return the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratio(row: dict, reference: dict) -> tuple[float, float, float]:
    """Return quartiles and median of the ratio within each turn."""
    pairs = zip(row["steps_ms"], reference["steps_ms"], strict=True)
    return quartiles([ours / theirs for ours, theirs in pairs])


def compare(workload: Workload, rows: list[dict]) -> None:
    """Adds the ratio to the fastest run of the library of reference, in place.

    Where it did not run, the first run that did is the reference. A network with
    another number of parameters is no comparison, and becomes an error.
    """
    ran = [row for row in rows if "steps_ms" in row]
    for row in ran:
        if row["parameters"] != ran[0]["parameters"]:
            row["error"] = (
                f"{row['parameters']} parameters, {ran[0]['label']} has "
                f"{ran[0]['parameters']}"
            )
    ran = [row for row in ran if "error" not in row]
    theirs = [row for row in ran if row["library"] == workload.reference]
    fastest = sorted(theirs, key=lambda row: row["median_ms"])
    for row in ran:
        reference = (fastest or ran)[0]
        low, middle, high = ratio(row, reference)
        row |= {"ratio": middle, "ratio_quartiles": [low, high]}
        row["reference"] = reference["label"]
