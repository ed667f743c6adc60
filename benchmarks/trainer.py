"""A library that trains, on images in arrays.

    python -m benchmarks.trainer SIDE MODE TIME_STEPS SIZES RECIPE IMAGES

Started by ``benchmarks.accuracy``. Answers are lines of JSON on stdout: one when the
network is ready, then, for each line of stdin, what the next evaluation shows. Imports
nothing but numpy and the library's own side, so the interpreter needs no other.
"""

import dataclasses
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import worker
from benchmarks.workloads import Sizes

PAD = 4  # black pixels on each side, before the crop
EVALUATED = 250  # images at a time


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Recipe of every library. Decay is L2, on kernels alone."""

    steps: int
    evaluate_every: int
    """Steps."""
    test_images: int
    seed: int
    learning_rate: float = 0.1
    warmup: float = 0.05
    """Part of the steps in which the learning rate rises."""
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def rate(self, step: int) -> float:
        """Return the learning rates of steps 0, 1, ..."""
        rising = int(self.warmup * self.steps)
        if step < rising:
            first = self.learning_rate / rising
            return first + (self.learning_rate - first) * step / rising
        part = min(1, (step - rising) / (self.steps - rising))
        return self.learning_rate * (1 + np.cos(np.pi * part)) / 2


def batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless batches, cropped and flipped: uint8 [B, H, W, C] and labels [B].

    Each epoch is a new order; what is left of it after the last full batch is not used.
    """
    rng = np.random.default_rng(seed)
    height, width = images.shape[1:3]
    around = ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0))
    each = np.arange(batch_size)
    while True:
        order = rng.permutation(len(images))
        for first in range(0, len(images) - batch_size + 1, batch_size):
            chosen = order[first : first + batch_size]
            padded = np.pad(images[chosen], around)
            windows = np.lib.stride_tricks.sliding_window_view(
                padded, (height, width), (1, 2)
            )
            y, x = rng.integers(0, 2 * PAD + 1, (2, batch_size))
            out = windows[each, y, x].transpose(0, 2, 3, 1)  # from [B, C, H, W]
            flipped = rng.random(batch_size) < 0.5
            out[flipped] = out[flipped, :, ::-1]
            yield out, labels[chosen]


def main(
    side: str, mode: str, time_steps: str, sizes: str, recipe: str, images: str
) -> None:
    """Train one library to the next evaluation for each line of stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints is no answer

    def say(answer):
        print(json.dumps(answer), file=answers, flush=True)

    with worker.errors_said(say):
        worker.use_processors(int(os.environ["OMP_NUM_THREADS"]))
        for answer in trained(side, mode, int(time_steps), sizes, recipe, Path(images)):
            say(answer)
            sys.stdin.readline()


def trained(
    side: str, mode: str, time_steps: int, sizes: str, recipe: str, images: Path
) -> Iterator[dict[str, Any]]:
    """Yield an empty answer when ready, then the figures of each evaluation."""
    fields = json.loads(sizes) | {"time_steps": time_steps}
    fields["channels"] = tuple(fields["channels"])
    given, how = Sizes(**fields), Recipe(**json.loads(recipe))
    data = np.load(images)
    mean, std = (data[name].astype(np.float32) for name in ("mean", "std"))
    module = importlib.import_module(f"benchmarks.sides.{side}")
    step, answer = module.train(given, mode, how)

    def scaled(pixels: np.ndarray) -> np.ndarray:
        return (pixels.astype(np.float32) / 255 - mean) / std

    test = scaled(data["test"][: how.test_images])
    labels = data["test_labels"][: how.test_images]
    stream = batches(data["train"], data["train_labels"], given.batch_size, how.seed)
    seconds, cpu_seconds, times, loss = 0.0, 0.0, [], []
    yield {}
    for count in range(1, how.steps + 1):
        pixels, classes = next(stream)
        xs, classes = scaled(pixels), np.int64(classes)
        cpu, wall = time.process_time(), time.perf_counter()
        loss.append(step(xs, classes))
        times.append(time.perf_counter() - wall)
        seconds += times[-1]
        cpu_seconds += time.process_time() - cpu
        if not np.isfinite(loss[-1]):
            raise FloatingPointError(f"the loss became {loss[-1]} at step {count}")
        if count % how.evaluate_every and count < how.steps:
            continue
        yield {
            "step": count,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "first_step_s": times[0],
            "median_ms": 1000 * float(np.median(times)),
            "loss": float(np.mean(loss)),
            "accuracy": correct(answer, test, labels),
        }
        loss = []


def correct(answer: Callable, images: np.ndarray, labels: np.ndarray) -> float:
    """Return the part of the images whose largest logit is that of their label.

    All batches have one size, so there is one program: the last is filled up.
    """
    size, right = min(EVALUATED, len(images)), 0
    for first in range(0, len(images), size):
        xs, truth = images[first : first + size], labels[first : first + size]
        missing = ((0, size - len(xs)), (0, 0), (0, 0), (0, 0))
        logits = answer(np.pad(xs, missing))[: len(xs)]
        right += int((logits.argmax(-1) == truth).sum())
    return right / len(images)


if __name__ == "__main__":
    main(*sys.argv[1:])
