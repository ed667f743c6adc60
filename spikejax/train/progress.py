"""Progress of a run: a bar or plain lines, metrics.jsonl, TensorBoard files, a profile.

Only the primary process of a run writes and prints.
"""

import contextlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from spikejax.train import processes
from spikejax.train.checksum import write_atomically

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 10.0


class NonFinite(ValueError):
    """A loss or a gradient that is no longer a finite number."""


def check_finite(
    step: int, loss: float, gradient_norms: Mapping[str, float], images: np.ndarray
) -> None:
    """Check that the loss of a step and its gradients, by path, are finite.

    Args:
        step: of the training.
        loss: of the step.
        gradient_norms: by path.
        images: this process's part of the batch. If they are not finite, it is the data
            that is at fault, not the learning rate.

    Raises:
        NonFinite: one of them is not.
    """
    bad = [path for path, norm in gradient_norms.items() if not math.isfinite(norm)]
    if math.isfinite(loss) and not bad:
        return
    found = f"the loss became {loss}"
    if math.isfinite(loss):
        found = f"gradients became {gradient_norms[bad[0]]} (loss {loss:.4g})"
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    where = f"; first non-finite gradients: {', '.join(bad[:3])}{more}" if bad else ""
    advice = "Lower the learning rate (--learning-rate) or clip gradients (--clip)."
    if math.isnan(loss):  # as that of an unknown label is
        advice += " Labels have to be 0 to K - 1 for K logits."
    if not all(processes.all_gather(bool(np.isfinite(images).all()))):
        where = ", as the images of its batch are not finite"
        advice = "Remove NaN and infinity from the data."
    raise NonFinite(f"train: {found} at step {step}{where}. {advice}")


class Progress:
    """A display and record of a run's progress, inside of a with statement.

    In a terminal a bar with loss, rate and the time left; elsewhere a line about every
    ten seconds. All metrics go to metrics.jsonl in workdir, and where tensorboardX is
    installed to tensorboard/ too.

    Args:
        workdir: folder of the run.
        total_steps: the last step.
        start: the step from which the run resumes; entries after it are dropped.
        batch_size: images per step, to show images per second.
    """

    def __init__(
        self, workdir: Path, total_steps: int, start: int = 0, batch_size: int = 1
    ):
        self._total, self._batch_size = total_steps, batch_size
        self._recent: deque[tuple[float, int]] = deque(maxlen=200)
        self._next_line = 0.0
        self._bar: Bar | None = None
        self._opened = contextlib.ExitStack()
        self._primary = processes.is_primary()
        if self._primary:
            self._open_files(workdir, start)
            self._console = _console()
            if start:
                more = "" if start < total_steps else "; nothing is left to train"
                self._print(start, f"resumed from {workdir}{more}")
        if self._primary and self._console.is_terminal:
            self._bar = _bar(self._console)
            self._opened.enter_context(self._bar)
            self._bar.add_task("compiling", total=total_steps, completed=start)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a training step; "loss" among them is shown."""
        if not self._primary:
            return
        now = time.monotonic()
        self._recent.append((now, step))
        self._record(step, "train", metrics)
        text = self._describe(step, metrics["loss"])
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, description=text)
        elif now >= self._next_line or step == self._total:
            self._next_line = now + SECONDS_BETWEEN_LINES
            self._print(step, text)

    def evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record and print an evaluation; metrics.jsonl names its metrics eval_*.

        "seconds", which is about the run, keeps its name.
        """
        if not self._primary:
            return
        self._record(step, "eval", metrics)
        values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self._print(step, f"evaluation: {values}")
        self._recent.clear()  # the rate is that of training alone

    def _open_files(self, workdir: Path, start: int) -> None:
        def is_kept(line: str) -> bool:
            try:
                return json.loads(line)["step"] <= start
            except (ValueError, TypeError, KeyError):  # half written when it was killed
                return False

        path = workdir / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        old = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
        write_atomically(path, "".join(f"{line}\n" for line in filter(is_kept, old)))
        self._file = self._opened.enter_context(path.open("a", encoding="utf-8"))
        try:
            # Not its SummaryWriter: the thread of that dies when the disk is full, and
            # the training then waits for it for ever.
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2
        except ImportError:  # it comes with the extra "experiments"
            self._write = lambda step, values: None
            return
        (workdir / "tensorboard").mkdir(exist_ok=True)
        board = EventsWriter(str(workdir / "tensorboard" / "events"))
        self._opened.enter_context(contextlib.closing(board))

        made: Any = vars(event_pb2) | vars(summary_pb2)  # without types
        event, summary, log = (made[n] for n in ("Event", "Summary", "SessionLog"))

        def write(step: int, values: dict[str, float]) -> None:
            pairs = [summary.Value(tag=k, simple_value=v) for k, v in values.items()]
            content = {"wall_time": time.time(), "summary": summary(value=pairs)}
            board.write_event(event(step=step, **content))
            board.flush()

        # TensorBoard drops what an earlier start wrote of these steps.
        board.write_event(event(step=start + 1, session_log=log(status=log.START)))
        self._write = write

    def _record(self, step: int, kind: str, metrics: Mapping[str, float]) -> None:
        entry: dict[str, float | None] = {"step": step}
        self._write(step, {f"{kind}/{name}": v for name, v in metrics.items()})
        for name, value in metrics.items():
            key = f"eval_{name}" if kind == "eval" and name != "seconds" else name
            entry[key] = value if math.isfinite(value) else None  # NaN is not in JSON
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def _describe(self, step: int, loss: float) -> str:
        """Return such as "loss 0.123  3.21 steps/s  411 images/s  0:04:35 left"."""
        (began, first), (now, _) = self._recent[0], self._recent[-1]
        if now == began:
            return f"loss {loss:.3f}"
        rate = (step - first) / (now - began)
        left = timedelta(seconds=round((self._total - step) / rate))
        images = rate * self._batch_size
        return (
            f"loss {loss:.3f}  {rate:.3g} steps/s  {images:.0f} images/s  {left} left"
        )

    def _print(self, step: int, text: str) -> None:
        line = f"step {step}/{self._total}  {text}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def tracing(folder: Path | None) -> Iterator[Callable[[int, Any], None]]:
    """Profile five steps, after three that compile and warm up; nothing without folder.

    TensorBoard's XProf opens the folder: operations, their times and memory. The value
    of the context is called with (step from 1, state) before each step.
    """
    with contextlib.ExitStack() as active:

        def before(step: int, state: dict[str, Any]) -> None:
            if folder and step in (4, 9):
                jax.block_until_ready(state)
                active.close()
            if folder and step == 4:
                active.enter_context(jax.profiler.trace(str(folder)))

        yield before


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, its first column aligned left and the others right."""
    from rich.markup import escape
    from rich.table import Table

    grid = Table(title=escape(title), title_justify="left")
    for column in columns:
        side = "right" if grid.columns else "left"
        grid.add_column(escape(column), justify=side, no_wrap=True)
    for row in rows:
        grid.add_row(*map(escape, row))
    _console().print(grid)


def _console() -> "Console":
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 120  # a log file has no width
    return console


def _bar(console: "Console") -> "Bar":
    from rich import progress

    return progress.Progress(
        progress.BarColumn(bar_width=None),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.description}", markup=False),
        console=console,
        refresh_per_second=4,
        expand=True,
    )
