"""Train a spiking network on recordings of an event camera, and run it on a stream.

    python -m experiments.dvs_cifar10 --workdir runs/dvs --data-dir DIR

DIR holds what tonic.datasets.CIFAR10DVS(save_to=DIR) makes. --data nmnist, ncaltech101
and dvs128-gesture are Tonic's sets too; --data FOLDER takes your own recordings
(docs/events.md). The same command with --stream FILE, once it has trained, feeds the
recording to the network frame by frame and says how long each step took.

The networks are those of TET (vggsnn), PLIF (plifnet with --neuron plif --pool max) and
any resnet; the recipe is our choice. It has not been run on CIFAR10-DVS yet.
docs/results.md has results on other sets, with their commands.
"""

import dataclasses
import json
import time
from collections import Counter, deque
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spikejax import encode
from spikejax.data import images
from spikejax.data.augment import Augment, compose
from spikejax.data.events import EventSet, Framing, frames, recordings
from spikejax.data.events import load as load_events
from spikejax.experiment import (
    Experiment,
    Inputs,
    ResNetOptions,
    SingleOptions,
    Task,
    VGGOptions,
    report,
    train,
)
from spikejax.experiment.cli import cache_folder, flatten, parse, run_cli
from spikejax.memory import stepper
from spikejax.train import TrainConfig, processes
from spikejax.train.progress import table
from spikejax.train.recipe import Ranges, check_settings


@dataclasses.dataclass(frozen=True)
class Events(Inputs):
    """A set of recordings; its frames are the time steps."""

    data: str = "cifar10-dvs"
    """Event set: cifar10-dvs, nmnist, dvs128-gesture, ncaltech101, or a folder."""
    data_dir: Path | None = None
    """Folder of the named sets: Tonic's save_to."""
    augment: Literal["none", "roll", "flip-roll"] = "flip-roll"
    """Shift by up to a tenth of the frame; flip mirrors half of the recordings."""
    drop: float = 0.0
    """Largest part of the events of a recording that is dropped in training."""
    noise: float = 0.0
    """Events added in training per pixel, frame and polarity, on average."""
    frames: Literal["number", "duration", "voxel", "surface"] = "number"
    """Frames of equal counts of events, of equal duration, voxels or time surfaces."""
    side: int | None = 48
    """Height and width of the frames; None takes those of the camera."""
    window_ms: float | None = None
    """Milliseconds of a sample, into which recordings are cut; by default they are
    whole, and those of which a class has one are cut into 100 ms."""
    sort: bool = False
    """Put events in the order of time, in files that have them in another."""
    stream: Path | None = None
    """Recording to run the trained network on, step by step."""

    def __post_init__(self):
        ranges: Ranges = {
            "drop": ("0 <= p < 1", lambda p: 0 <= p < 1),
            "noise": ("0 to 100", lambda n: 0 <= n <= 100),
            "side": ("1 to 10000", lambda n: 1 <= n <= 10000),
            "window_ms": ("0.001 to 1e9", lambda ms: 1e-3 <= ms <= 1e9),
        }
        check_settings(self, ranges)
        if self.stream and self.frames != "duration":
            raise ValueError(
                "stream: expected a network of --frames duration, as a stream has no "
                f"end after which to count events, got {self.frames}. Train one."
            )


DEFAULT = Experiment(
    workdir=Path("runs/dvs_cifar10"),
    inputs=Events("cifar10-dvs", augment="flip-roll"),
    network=VGGOptions("vggsnn", pool="avg"),
    activation=SingleOptions("lif"),
    time_steps=10,
    loss="tet",
    train=TrainConfig(
        epochs=100.0,
        batch_size=64,
        optimizer="adamw",
        learning_rate=1e-3,
        weight_decay=0.01,
    ),
)
OPTIONS = (ResNetOptions(),)  # if --model is one: those for CIFAR do not pool


def load(inputs: Events, time_steps: int) -> EventSet:
    """Return the event set of the flags; its frames are kept in the cache folder."""
    window = round(inputs.window_ms * 1000) if inputs.window_ms else None
    framing = Framing(time_steps, inputs.frames, inputs.side, window, inputs.sort)
    return load_events(inputs.data, framing, inputs.data_dir, cache_dir=cache_folder())


def make_augment(inputs: Events, shape: tuple[int, ...]) -> Augment | None:
    """Return the augmentation of frames of that shape [H, W, C]."""
    steps: list[Augment] = []
    if inputs.augment == "flip-roll":
        steps.append(frames.flip())
    if inputs.augment != "none":
        steps.append(frames.roll(min(shape[:2]) // 10))
    if inputs.drop:
        steps.append(frames.drop(inputs.drop))
    if inputs.noise:
        steps.append(frames.noise(inputs.noise))
    return compose(*steps) if steps else None


def by_class(
    model: nnx.Module, event_set: EventSet, batch_size: int
) -> dict[str, float]:
    """Return the accuracy of each class of the test split, 0 to 1."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def answer(raw: jax.Array) -> jax.Array:
        xs = encode.currents(raw, jax.random.key(0))
        return nnx.merge(graphdef, state)(xs).mean(1).argmax(-1)

    right, count = np.zeros((2, event_set.num_classes))
    for batch in images.eval_batches(event_set.test, batch_size):
        answers = np.asarray(answer(batch["image"]))
        np.add.at(right, batch["label"], answers == batch["label"])
        np.add.at(count, batch["label"], 1)
    rows = zip(event_set.class_names, right, count, strict=True)
    return {name: float(r / c) for name, r, c in rows if c}


def read_stream(
    recording: Path, duration: int, event_set: EventSet, *, sort: bool = False
) -> list[np.ndarray]:
    """Return the events of a recording, which sort puts in the order of time, by frame.

    Raises:
        ValueError: the camera is not that of the training, or the recording is shorter
            than a frame, or has fewer events than frames.
    """
    if not duration:
        raise ValueError(
            "stream: expected a network that was trained on samples of one length, got "
            "one of whole recordings. Train with --window-ms, in another --workdir."
        )
    seen, size = recordings.read(recording, sort=sort)
    # A file that does not name its camera may still have events outside of it.
    least = np.maximum(event_set.sensor, recordings.extent(seen))
    if (size or tuple(least.tolist())) != event_set.sensor:
        raise ValueError(
            f"stream: expected a recording of a camera {event_set.sensor}, as in "
            f"training, got {recording} of {size or least.tolist()}."
        )
    if np.ptp(seen["t"]) + 1 < duration:
        raise ValueError(
            f"stream: expected a recording of at least {duration} us, got {recording} "
            f"of {np.ptp(seen['t'])} us."
        )
    return frames.windows(seen, duration)


def run_stream(
    parts: list[np.ndarray],
    duration: int,
    model: nnx.Module,
    event_set: EventSet,
    time_steps: int,
    path: Path,
) -> None:
    """Feed a recording to the network in frames as long as those of its training.

    The class after each step is that of the mean logits of the last T steps. Writes a
    line per step to ``path`` and prints the latency.
    """
    size = event_set.shape[0], event_set.shape[1]
    resized = (frames.resized(part, event_set.sensor, size) for part in parts)
    counts = (frames.by_number(part, size, 1)[0] for part in resized)
    last: deque[np.ndarray] = deque(maxlen=time_steps)
    lines = []
    xs = jnp.zeros((1, 1, *event_set.shape))
    state, advance = stepper(model, xs)
    jax.block_until_ready(advance(state, xs))  # compiles before the first frame
    for step, frame in enumerate(counts):
        began = time.perf_counter()
        xs = encode.currents(jnp.asarray(frame)[None, None], jax.random.key(0))
        state, logits = advance(state, xs)
        last.append(np.asarray(logits[0, 0]))
        seconds = time.perf_counter() - began
        chances = np.asarray(jax.nn.softmax(np.mean(last, 0)))
        best, end = int(chances.argmax()), (step + 1) * duration / 1e6
        answer = {"class": event_set.class_names[best]}
        answer |= {"probability": float(chances[best]), "latency_ms": 1e3 * seconds}
        lines.append({"seconds": end} | answer)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    latency = np.array([line["latency_ms"] for line in lines])
    middle, most = np.percentile(latency, [50, 99])
    common = Counter(line["class"] for line in lines).most_common(3)
    names = ", ".join(f"{name} {n / len(lines):.1%}" for name, n in common)
    print(f"{len(lines)} steps of {duration / 1e3:g} ms: {names}")
    print(f"latency: median {middle:.2f} ms, 99 % below {most:.2f} ms; see {path}")


def main(experiment: Experiment) -> None:
    """Train and report; then run the stream, if there is one."""
    inputs, steps = experiment.inputs, experiment.time_steps
    assert isinstance(inputs, Events)
    with processes.distributed(experiment.processes, flatten(experiment)):
        if inputs.stream and processes.shard()[1] > 1:
            raise ValueError(
                f"stream: expected one process, got {processes.shard()[1]}. Train "
                "without --stream, then give it to one process on the same --workdir."
            )
        event_set = load(inputs, steps)
        duration = (event_set.window or 0) // steps  # microseconds of a frame
        if inputs.stream:  # read first: training takes long
            parts = read_stream(inputs.stream, duration, event_set, sort=inputs.sort)
        augment = make_augment(inputs, event_set.shape)
        task = Task(event_set, encode.currents, augment)
        fitted = train(experiment, task)
        if not fitted.finished:
            return
        classes = by_class(fitted.model, event_set, experiment.train.batch_size)
        result = report(
            experiment,
            fitted,
            task,
            split=event_set.split,
            sensor=event_set.sensor,
            accuracy_by_class=classes,
        )
    if not processes.is_primary():
        return
    rows = [[name, f"{accuracy:.2%}"] for name, accuracy in classes.items()]
    print(f"test split: {event_set.split}")
    table("Test split", ["class", "accuracy"], rows)
    print(
        f"accuracy {result['accuracy']:.2%} of {len(event_set.test)} recordings, "
        f"{result['seconds']:.0f} s, {result['spikes_per_image']:,.0f} spikes and "
        f"{result['energy_nj']:,.0f} nJ each"
    )
    if inputs.stream:
        path = experiment.workdir / "stream.jsonl"
        run_stream(parts, duration, fitted.model, event_set, steps, path)


if __name__ == "__main__":
    run_cli(main, parse(DEFAULT, __doc__, *OPTIONS))
