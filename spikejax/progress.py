"""Progress of a run: metrics.jsonl, TensorBoard files, a bar or plain lines."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class NonFinite(ValueError):
    """The loss or a gradient is no longer a finite number."""


def check_finite(step: int, loss: float, gradient_norms: Mapping[str, float]) -> None:
    """Raises NonFinite, naming the step and the first gradients that are not finite."""
    bad = [path for path, norm in gradient_norms.items() if not math.isfinite(norm)]
    if bad or not math.isfinite(loss):
        raise NonFinite(
            f"train: the loss became {loss} at step {step}; first non-finite "
            f"gradients: {', '.join(bad[:3]) or 'none'}. "
            "Lower --learning-rate or set --clip."
        )


class Progress:
    def __init__(self, workdir, total_steps, *, start: int = 0):
        self.path = Path(workdir) / "metrics.jsonl"
        self.total, self.start = total_steps, start
        self.said = 0.0

    def __enter__(self):
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            keep = [x for x in lines if json.loads(x)["step"] <= self.start]
            self.path.write_text("".join(x + "\n" for x in keep))
        self.file = self.path.open("a")
        self.began = time.monotonic()
        return self

    def __exit__(self, *_):
        self.file.close()

    def train(self, step: int, metrics: dict[str, float]) -> None:
        self._write(step, metrics)
        now = time.monotonic()
        if now - self.said > 10:
            rate = (step - self.start) / max(now - self.began, 1e-9)
            print(f"step {step}/{self.total} loss {metrics['loss']:.3f} {rate:.2f}/s", flush=True)
            self.said = now

    def evaluate(self, step: int, metrics: dict[str, float]) -> None:
        self._write(step, {f"eval_{k}" if k != "seconds" else k: v for k, v in metrics.items()})
        print(step, metrics, flush=True)

    def _write(self, step, metrics):
        self.file.write(json.dumps({"step": step} | metrics) + "\n")
        self.file.flush()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(title, columns)
    for row in rows:
        print(*row)
