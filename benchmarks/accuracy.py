"""Time to accuracy on CIFAR-10: SpikingJelly's LIF at T=4, our neurons at T=1.

    python -m benchmarks.accuracy --workdir runs/accuracy --data-dir TFDS_FOLDER \\
        --peers .venv-peers/bin/python --epochs 4 --target 0.6 0.65 0.7

The network is that of the workload ``step`` (three convolutions). Weights, order of the
images, augmentation and recipe are the same: batches of 128, SGD with Nesterov momentum
0.9, a learning rate of 0.1 that rises and then falls along a cosine, weight decay 5e-4
on kernels, crop and flip. Several thresholds are half a standard deviation of their
input apart, as in our experiments; a single one is at one.

Each library trains in a process of its own, one after the other. Seconds are those of
training steps, the first of which compiles; making batches and evaluation do not count.
An accuracy is reached at the first evaluation that shows it. On a machine that does
other work besides, steps x median step is the better figure. Prints a table a target,
writes a line of JSON for each evaluation to LIBRARY-MODE.jsonl, and accuracy.png; what
was trained before with the same recipe stays in both.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import turns
from benchmarks.trainer import Recipe
from benchmarks.versus import GET
from benchmarks.workloads import WORKLOADS, Run
from spikejax.data import images
from spikejax.experiment.cli import parse, run_cli
from spikejax.plot import BLUE, GREY, ORANGE, PINK, SKY, Picture, frame
from spikejax.train.progress import table
from spikejax.train.recipe import Ranges, check_settings

DATA = "cifar10"
SIZES = dataclasses.replace(WORKLOADS["step"].sizes, batch_size=128)
MODES = ("compiled", "multi-step", "step by step")
OURS = Run("spikejax", "multi-threshold", 1), Run("spikejax", "LIF", 4)
TRIALS = 5  # steps that show which mode is fastest


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Settings of the trainings."""

    workdir: Path = Path("runs/accuracy")
    """Folder for what is measured, and for the images (180 MB)."""
    data_dir: Path | None = None
    """TFDS's folder; its default place if not given."""
    peers: Path = Path(".venv-peers/bin/python")
    """Interpreter that has SpikingJelly."""
    epochs: float = 4.0
    """Passes over the training images."""
    target: tuple[float, ...] = (0.6, 0.65, 0.7)
    """Test accuracies, in 0..1."""
    theirs: Literal["fastest", "compiled", "multi-step", "step by step"] = "fastest"
    """SpikingJelly's mode; "fastest" takes a few steps of each to find out."""
    train: Literal["both", "theirs", "ours"] = "both"
    """Whom to train now."""
    with_lif: bool = False
    """Train our LIF at T=4 too."""
    evaluate_every: float = 0.25
    """Epochs between evaluations."""
    test_images: int = 10_000
    """Number of test images to evaluate, the first ones."""
    threads: int = 0
    """Processors for each library; 0 takes all."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Where every library computes."""
    seed: int = 0
    """Seed of the order of the images and of their augmentation."""

    def __post_init__(self):
        ranges: Ranges = {
            "epochs": ("more than 0", lambda n: n > 0),
            "target": (
                "accuracies, more than 0 and at most 1",
                lambda target: target and all(0 < a <= 1 for a in target),
            ),
            "evaluate_every": ("more than 0 epochs", lambda n: n > 0),
            "test_images": ("at least 1", lambda n: n >= 1),
            "threads": (
                f"0 (all) to {turns.processors()}, the processors here",
                lambda n: 0 <= n <= turns.processors(),
            ),
            "seed": ("0 or more", lambda n: n >= 0),
        }
        check_settings(self, ranges)


def write_images(path: Path, data_dir: Path | None) -> int:
    """All images as arrays, for an interpreter without TFDS; how many train."""
    found = images.load(DATA, data_dir)
    arrays: dict[str, Any] = {"mean": found.mean, "std": found.std}
    for name, source in (("train", found.train), ("test", found.test)):
        split: Any = source.cached()
        arrays |= {name: split.values, f"{name}_labels": split.labels}
    np.savez(path, **arrays)
    return len(arrays["train"])


def fastest(given: Accuracy, env: dict[str, str], threads: int) -> str:
    """SpikingJelly's mode with the shortest step, all of them taking turns."""
    runs = [Run("SpikingJelly", mode, 4) for mode in MODES]
    peers = given.peers.absolute()

    def start(run):
        command = turns.command(run, SIZES, peers, threads)
        log = given.workdir / f"trial-{run.mode.replace(' ', '-')}.log"
        return turns.Worker(command, log, env)

    rows = turns.take_turns(runs, start, TRIALS, lambda line: None)
    ran = [row for row in rows if "median_ms" in row]
    if not ran:
        return "multi-step"  # which says what is wrong
    medians = ", ".join(f"{row['mode']} {row['median_ms']:,.0f} ms" for row in ran)
    best = min(ran, key=lambda row: row["median_ms"])["mode"]
    print(f"SpikingJelly's modes: {medians}. Trained is {best}.", flush=True)
    return best


def train(run: Run, given: Accuracy, recipe: Recipe, env: dict[str, str]) -> None:
    """Trains one network, a line of JSON for each evaluation; says why it cannot."""
    name = run.label.replace(", T=", "-T").replace(" ", "-")
    ours = run.library == "spikejax"
    if not ours and not given.peers.exists():
        print(f"Left out, as there is no {given.peers}: {run.library}. {GET}")
        return
    python = sys.executable if ours else str(given.peers.absolute())
    settings = [json.dumps(dataclasses.asdict(each)) for each in (SIZES, recipe)]
    arrays = str((given.workdir / "images.npz").absolute())
    command = [python, "-m", "benchmarks.trainer", turns.SIDES[run.library]]
    command += [run.mode, str(run.time_steps), *settings, arrays]
    path = given.workdir / f"{name}.jsonl"
    about = dataclasses.asdict(run) | {"label": run.label, "device": given.device}
    about |= {"recipe": dataclasses.asdict(recipe)}
    try:
        print(f"{run.label}: starts, {recipe.steps} steps", flush=True)
        trainer = turns.Worker(command, path.with_suffix(".log"), env)
        try:
            with path.open("w") as file:
                answer = {"step": 0}
                while answer["step"] < recipe.steps:
                    answer = trainer.step()
                    file.write(json.dumps(about | answer) + "\n")
                    file.flush()
                    print(_line(run.label, answer, recipe), flush=True)
        finally:
            trainer.close()
    except turns.Missing as error:
        print(f"Left out, as there is no {error}: {run.library}. {GET}")
    except turns.Failed as error:
        print(f"{run.label}: {error}")


def _line(label, answer, recipe):
    return (
        f"{label}: step {answer['step']} of {recipe.steps}, "
        f"{answer['seconds']:,.0f} s ({answer['cpu_seconds']:,.0f} s of processors), "
        f"{answer['median_ms']:,.0f} ms a step, loss {answer['loss']:.3f}, "
        f"accuracy {answer['accuracy']:.2%}"
    )


def evaluations(given: Accuracy, recipe: Recipe) -> dict[str, list[dict[str, Any]]]:
    """Return the results of all runs in the folder with this recipe, theirs first."""
    wanted, found = (dataclasses.asdict(recipe), given.device), {}
    for path in sorted(given.workdir.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        # Those that were broken off tell nothing of what they did not reach.
        whole = rows and rows[-1]["step"] >= recipe.steps
        if whole and (rows[0]["recipe"], rows[0]["device"]) == wanted:
            found[rows[0]["label"]] = rows
    return dict(sorted(found.items(), key=lambda item: item[1][0]["library"]))


def reached(rows: list[dict[str, Any]], target: float) -> dict[str, float] | None:
    """Steps and seconds to the first evaluation that shows the accuracy."""
    for row in rows:
        if row["accuracy"] >= target:
            quiet = row["step"] * rows[-1]["median_ms"] / 1000
            keys = ("step", "seconds", "cpu_seconds")
            return {key: row[key] for key in keys} | {"quiet_seconds": quiet}
    return None


def show(found: dict[str, list[dict[str, Any]]], target: float) -> None:
    """Prints the table of one target; ratios are to SpikingJelly's fastest run."""
    times = {label: reached(rows, target) for label, rows in found.items()}
    theirs = [t for label, t in times.items() if t and "SpikingJelly" in label]
    reference = min(theirs, key=lambda t: t["quiet_seconds"], default=None)
    columns = ["", "steps", "training s", "CPU s", "steps x median s"]
    cells = []
    for label, t in times.items():
        if t is None:
            best = max(row["accuracy"] for row in found[label])
            cells.append([label, f"not reached: {best:.2%}", "", "", ""])
            continue
        keys = ("seconds", "cpu_seconds", "quiet_seconds")
        ratios = [f" ({t[k] / reference[k]:.2f})" if reference else "" for k in keys]
        shown = [f"{t[k]:,.0f}{r}" for k, r in zip(keys, ratios, strict=True)]
        cells.append([label, f"{t['step']:.0f}", *shown])
    table(f"To {target:.1%}. In brackets: to SpikingJelly's", columns, cells)


def draw(found: dict[str, list[dict[str, Any]]], targets: tuple[float, ...]) -> Picture:
    """Accuracy against seconds of training, ours in blue."""
    figure = Picture(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    frame(axes)
    colours = {OURS[0].label: BLUE, OURS[1].label: SKY}
    others = iter((ORANGE, PINK, GREY))
    for target in targets:
        axes.axhline(100 * target, color=GREY, lw=1, ls=(0, (5, 4)))
    for label, rows in found.items():
        seconds = [row["seconds"] for row in rows]
        values = [100 * row["accuracy"] for row in rows]
        colour = colours.get(label) or next(others)
        axes.plot(seconds, values, "o-", ms=3.5, lw=1.8, color=colour, label=label)
    axes.set_xlim(0)
    axes.set_xlabel("seconds of training steps")
    axes.set_ylabel("test accuracy, %")
    axes.legend(frameon=False, loc="lower right")
    return figure


def main(given: Accuracy) -> None:
    """Train one after the other, print the tables, write accuracy.png."""
    given.workdir.mkdir(parents=True, exist_ok=True)
    count = write_images(given.workdir / "images.npz", given.data_dir)
    epoch = count // SIZES.batch_size
    recipe = Recipe(
        steps=max(1, round(given.epochs * epoch)),
        evaluate_every=max(1, round(given.evaluate_every * epoch)),
        test_images=given.test_images,
        seed=given.seed,
    )
    threads = given.threads or turns.processors()
    env = turns.environment(threads, given.device)
    if given.train != "ours":
        mode = given.theirs
        if mode == "fastest":
            mode = fastest(given, env, threads) if given.peers.exists() else MODES[1]
        train(Run("SpikingJelly", mode, 4), given, recipe, env)
    if given.train != "theirs":
        for run in OURS[: 1 + given.with_lif]:
            train(run, given, recipe, env)
    found = evaluations(given, recipe)
    print(f"Test images: the first {given.test_images:,}, or all there are.")
    for target in given.target:
        show(found, target)
    if found:
        draw(found, given.target).savefig(given.workdir / "accuracy.png", dpi=150)
        print(f"Written: {given.workdir / 'accuracy.png'} and *.jsonl")


if __name__ == "__main__":
    run_cli(main, parse(Accuracy(), __doc__))
