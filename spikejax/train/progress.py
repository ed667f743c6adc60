"""Progress of a run: a bar or plain lines, metrics.jsonl, TensorBoard files.

Only the first process of a run writes and prints.
"""

import importlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax

SECONDS_BETWEEN_LINES = 10.0


class NonFinite(ValueError):
    """The loss or a gradient is no longer a finite number."""


def check_finite(step: int, loss: float, gradient_norms: Mapping[str, float]) -> None:
    """Raises NonFinite unless the loss and every gradient are finite.

    Args:
        step: number of the training step, for the message.
        loss: its loss.
        gradient_norms: {path of the parameter: norm of its gradient}.
    """
    bad = [path for path, norm in gradient_norms.items() if not math.isfinite(norm)]
    if math.isfinite(loss) and not bad:
        return
    what = f"the loss became {loss}"
    if math.isfinite(loss):
        what = f"gradients became {gradient_norms[bad[0]]} (loss {loss:.4g})"
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    where = f"; first non-finite gradients: {', '.join(bad[:3])}{more}" if bad else ""
    raise NonFinite(
        f"train: {what} at step {step}{where}. Lower the learning rate "
        "(--learning-rate) or clip gradients (--clip)."
    )


def read_metrics(workdir: str | Path, last_step: int) -> Iterator[dict[str, Any]]:
    """The entries of workdir/metrics.jsonl up to last_step.

    A line that a killed run left half written is passed over.
    """
    path = Path(workdir) / "metrics.jsonl"
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["step"] <= last_step:
            yield entry


class Progress:
    """Shows and records the progress of a run, inside of a with statement.

    In a terminal a bar with loss, rate and the time left; elsewhere a line about every
    ten seconds. All metrics go to metrics.jsonl and tensorboard/ in workdir; what a
    run wrote there after the step at which this one starts is dropped.

    Args:
        workdir: folder of the run.
        total_steps: the last step.
        start: the step from which the run goes on, 0 for a new one.
        batch_size: images a step, to show images a second.
    """

    def __init__(
        self,
        workdir: str | Path,
        total_steps: int,
        *,
        start: int = 0,
        batch_size: int | None = None,
    ):
        self._workdir = Path(workdir)
        self._total, self._start = total_steps, start
        self._batch_size = batch_size
        self._is_first = jax.process_index() == 0
        self._bar: Any = None
        self._next_line = 0.0
        self._recent: deque[tuple[float, int]] = deque(maxlen=200)

    def __enter__(self) -> "Progress":
        if self._is_first:
            self._open_files()
            self._console = _console()
            if self._console.is_terminal:
                self._bar = _bar(self._console)
                self._task = self._bar.add_task(
                    "", total=self._total, completed=self._start, text="compiling"
                )
                self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._is_first:
            self._file.close()
            self._board.close()

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of a training step; "loss" among them is shown."""
        now = time.monotonic()
        self._recent.append((now, step))
        self._record(step, "train", metrics, metrics)
        if self._bar is not None:
            text = self._describe(step, metrics)
            self._bar.update(self._task, completed=step, text=text)
        elif self._is_first and (now >= self._next_line or step == self._total):
            self._next_line = now + SECONDS_BETWEEN_LINES
            self._say(f"step {step}/{self._total}  {self._describe(step, metrics)}")

    def evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records and prints an evaluation; metrics.jsonl names its metrics eval_*.

        "seconds", which is about the run, keeps its name.
        """
        names = {name: f"eval_{name}" for name in metrics if name != "seconds"}
        named = {names.get(name, name): value for name, value in metrics.items()}
        self._record(step, "eval", named, metrics)
        values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        if self._is_first:
            self._say(f"step {step}/{self._total}  evaluation: {values}")
        self._recent.clear()  # the rate is that of training alone

    def _open_files(self) -> None:
        path = self._workdir / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [json.dumps(e) for e in read_metrics(self._workdir, self._start)]
        beside = path.with_name("metrics.jsonl.tmp")
        beside.write_text("".join(f"{line}\n" for line in kept), "utf-8")
        os.replace(beside, path)
        self._file = path.open("a", encoding="utf-8")
        self._board = _optional("tensorboardX").SummaryWriter(
            str(self._workdir / "tensorboard"), purge_step=self._start + 1
        )

    def _record(
        self,
        step: int,
        kind: str,
        entry: Mapping[str, float],
        scalars: Mapping[str, float],
    ) -> None:
        if not self._is_first:
            return
        finite = {k: float(v) if math.isfinite(v) else None for k, v in entry.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._board.add_scalar(f"{kind}/{name}", float(value), step)

    def _describe(self, step: int, metrics: Mapping[str, float]) -> str:
        """loss 0.123  3.21 steps/s  411 images/s  0:04:35 left"""
        parts = [f"loss {metrics['loss']:.3f}"]
        (began, first), (now, _) = self._recent[0], self._recent[-1]
        if step > first and now > began:
            rate = (step - first) / (now - began)
            parts.append(f"{rate:.3g} steps/s")
            if self._batch_size is not None:
                parts.append(f"{rate * self._batch_size:.0f} images/s")
            left = timedelta(seconds=round((self._total - step) / rate))
            parts.append(f"{left} left")
        return "  ".join(parts)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class Trace:
    """A profile of five steps, after three that compile and warm up; or nothing.

    TensorBoard's XProf opens the folder: operations, their times and memory.
    """

    def __init__(self, folder: Path | None):
        self._folder, self._runs = folder, False

    def before(self, step: int, state: Any) -> None:
        """Called before each step of this process, counted from 1."""
        if self._folder and step == 4:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._runs = True
        elif self._runs and step == 9:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends the trace, where a run was shorter."""
        if self._runs:
            jax.profiler.stop_trace()
            self._runs = False


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table, its first column to the left and the others to the right."""
    escape = _optional("rich.markup").escape
    grid = _optional("rich.table").Table(title=escape(title), title_justify="left")
    for index, column in enumerate(columns):
        side = "right" if index else "left"
        grid.add_column(escape(column), justify=side, no_wrap=True)
    for row in rows:
        grid.add_row(*map(escape, row))
    _console().print(grid)


def _console() -> Any:
    console = _optional("rich.console").Console()
    if not console.is_terminal:
        console.width = 120  # a log file has no width
    return console


def _bar(console: Any) -> Any:
    rich = _optional("rich.progress")
    return rich.Progress(
        rich.BarColumn(bar_width=None),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[text]}", markup=False),
        console=console,
        refresh_per_second=4,
        expand=True,
    )


def _optional(name: str) -> Any:
    """A module that `pip install spikejax` alone does not bring."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"progress: {error.name} is not installed. Get it: "
            "pip install 'spikejax[experiments]'"
        ) from error
