"""Train a spiking network on recordings of an event camera, and run it on a stream.

    python -m experiments.dvs_cifar10 --workdir runs/dvs --data-dir DIR

DIR holds what tonic.datasets.CIFAR10DVS(save_to=DIR) makes. --data nmnist and
dvs128-gesture are Tonic's sets too; --data FOLDER takes your own recordings
(docs/events.md). The same command with --stream FILE, once it has trained, feeds the
recording to the network frame by frame and says how long each step took.

The networks are those of TET (vggsnn), PLIF (plifnet with --neuron plif --pool max) and
any resnet; the recipe is our choice. On CIFAR10-DVS it has not been run yet. Results
with their commands stand in docs/results.md.
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

from spikejax import cache
from spikejax.data import images
from spikejax.data.augment import compose
from spikejax.data.events import frames, recordings
from spikejax.data.events import sets as events
from spikejax.experiment import Experiment, Input, NeuronName, report, train
from spikejax.experiment.cli import parse, reported
from spikejax.nn.memory import stepper
from spikejax.train import TrainConfig
from spikejax.train.progress import table


@dataclasses.dataclass(frozen=True)
class Events(Experiment):
    """What to train on which recordings, and how."""

    data: str = "cifar10-dvs"
    """Event set: cifar10-dvs, nmnist, dvs128-gesture, or a folder of recordings."""
    data_dir: Path | None = None
    """Folder of the named sets: Tonic's save_to."""
    model: str = "vggsnn"
    """Network: a key of MODELS, such as vggsnn, plifnet, convnet or resnet19."""
    pool: Literal["max", "avg"] = "avg"
    """Pooling of all networks but the resnets."""
    neuron: NeuronName = "lif"
    """Activation; relu trains the network that does not spike."""
    time_steps: int = 10
    """Frames of a recording."""
    loss: Literal["rate", "tet"] = "tet"
    """Cross-entropy of the mean over time, or at every step (TET)."""
    augment: Literal["none", "roll", "flip-roll"] = "flip-roll"
    """Shift by up to a tenth of the frame; flip mirrors half of the recordings."""
    drop: float = 0.0
    """Largest part of the events of a recording that is lost in training."""
    noise: float = 0.0
    """Events added in training for each pixel, frame and polarity, on average."""
    frames: Literal["number", "duration", "voxel", "surface"] = "number"
    """Frames of as many events, of the same duration, voxel grid or time surface."""
    side: int | None = 48
    """Height and width of the frames; None is the camera's."""
    window_ms: float = 100.0
    """Length of a sample, where long recordings are cut."""
    stream: Path | None = None
    """A recording to run the trained network on, step by step."""

    def __post_init__(self):
        super().__post_init__()
        _framing(self)
        if self.image_size is not None:
            raise ValueError(
                "image_size: expected none for events, whose frames have --side, got "
                f"{self.image_size}."
            )
        if self.stream and self.frames != "duration":
            raise ValueError(
                f"stream: expected a network of --frames duration, which go on as time "
                f"does, got {self.frames}. Train one."
            )


def _framing(experiment: Events) -> events.Framing:
    window = round(experiment.window_ms * 1000)
    return events.Framing(
        experiment.time_steps, experiment.frames, experiment.side, window
    )


def load(experiment: Events) -> events.EventSet:
    """The event set that the flags name."""
    return events.load(
        experiment.data,
        _framing(experiment),
        experiment.data_dir,
        cache_dir=cache.folder(),
    )


def make_encode(experiment: Events, event_set: events.EventSet):
    """(frames [B, T, H, W, C], rng) -> xs: the counts themselves."""
    return lambda raw, rng: raw.astype(jnp.float32)


def make_augment(experiment: Events):
    """The augmentation that the flags name."""
    steps = []
    if experiment.augment == "flip-roll":
        steps.append(frames.flip())
    if experiment.augment != "none":
        side = experiment.side or min(load(experiment).sensor)
        steps.append(frames.roll(side // 10))
    if experiment.drop:
        steps.append(frames.drop(experiment.drop))
    if experiment.noise:
        steps.append(frames.noise(experiment.noise))
    return compose(*steps) if steps else None


EVENTS = Input(load, make_encode, make_augment)


def by_class(model: nnx.Module, event_set: events.EventSet, encode, batch_size: int):
    """Accuracy of each class of the test split, 0 to 1."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def answer(raw):
        xs = encode(raw, jax.random.key(0))
        return nnx.merge(graphdef, state)(xs).mean(1).argmax(-1)

    right, count = np.zeros((2, event_set.num_classes))
    for batch in images.eval_batches(event_set.test, batch_size):
        answers = np.asarray(answer(batch["image"]))
        np.add.at(right, batch["label"], answers == batch["label"])
        np.add.at(count, batch["label"], 1)
    rows = zip(event_set.class_names, right, count, strict=True)
    return {name: float(r / c) for name, r, c in rows if c}


def _duration(experiment):
    """Of a frame, in microseconds."""
    return round(experiment.window_ms * 1000) // experiment.time_steps


def read_stream(
    experiment: Events, recording: Path, event_set: events.EventSet
) -> np.ndarray:
    """Events of a recording by a camera as in training, and long enough."""
    duration = _duration(experiment)
    seen, size = recordings.read(recording)
    if size not in (None, event_set.sensor):
        raise ValueError(
            f"stream: expected a recording of a camera {event_set.sensor}, as in "
            f"training, got {recording} of {size}."
        )
    if np.ptp(seen["t"]) + 1 < duration:
        raise ValueError(
            f"stream: expected a recording of at least {duration} us, got {recording} "
            f"of {np.ptp(seen['t'])} us."
        )
    return seen


def run_stream(
    experiment: Events, seen: np.ndarray, model: nnx.Module, event_set: events.EventSet
):
    """Feed a recording to the network in frames as long as those of its training.

    The class after each step is that of the mean logits of the last T steps. Writes
    stream.jsonl and prints the latency.
    """
    duration = _duration(experiment)
    height, width, _ = event_set.shape
    seen = frames.resized(seen, event_set.sensor, (height, width))
    counts = (
        frames.by_number(part, (height, width), 1)[0]
        for part in frames.windows(seen, duration)
    )
    last: deque[np.ndarray] = deque(maxlen=experiment.time_steps)
    lines = []
    encode = make_encode(experiment, event_set)
    xs = encode(jnp.zeros((1, 1, *event_set.shape), jnp.uint8), jax.random.key(0))
    state, advance = stepper(model, xs)
    jax.block_until_ready(advance(state, xs))  # compiles before the first frame
    for step, frame in enumerate(counts):
        began = time.perf_counter()
        xs = encode(jnp.asarray(frame)[None, None], jax.random.key(0))
        state, logits = advance(state, xs)
        last.append(np.asarray(logits[0, 0]))
        seconds = time.perf_counter() - began
        name = event_set.class_names[int(np.mean(last, 0).argmax())]
        end = (step + 1) * duration / 1e6
        lines.append({"seconds": end, "class": name, "latency_ms": 1e3 * seconds})
    path = experiment.workdir / "stream.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    latency = np.array([line["latency_ms"] for line in lines])
    middle, most = np.percentile(latency, [50, 99])
    common = Counter(line["class"] for line in lines).most_common(3)
    names = ", ".join(f"{name} {n / len(lines):.1%}" for name, n in common)
    print(f"{len(lines)} steps of {duration / 1e3:g} ms: {names}")
    print(f"latency: median {middle:.2f} ms, 99 % below {most:.2f} ms; see {path}")


def main(experiment: Events) -> None:
    """Train and report; then the stream, if there is one."""
    event_set = load(experiment)
    if experiment.stream:  # first, as training takes long
        seen = read_stream(experiment, experiment.stream, event_set)
    fitted = train(experiment, source=EVENTS)
    if not fitted.finished:
        print("Stopped, saved. The same command goes on from there.")
        return
    encode = make_encode(experiment, event_set)
    size = experiment.train.batch_size
    classes = by_class(fitted.model, event_set, encode, size)
    result = report(
        experiment,
        fitted,
        EVENTS,
        split=event_set.split,
        sensor=event_set.sensor,
        accuracy_by_class=classes,
    )
    rows = [[name, f"{accuracy:.2%}"] for name, accuracy in classes.items()]
    print(f"test split: {event_set.split}")
    table("Test split", ["class", "accuracy"], rows)
    print(
        f"accuracy {result['accuracy']:.2%} of {len(event_set.test)} recordings, "
        f"{result['seconds']:.0f} s, {result['spikes_per_image']:,.0f} spikes and "
        f"{result['energy_nj']:,.0f} nJ each"
    )
    if experiment.stream:
        run_stream(experiment, seen, fitted.model, event_set)


DEFAULT = Events(
    workdir=Path("runs/dvs_cifar10"),
    train=TrainConfig(
        epochs=100.0,
        batch_size=64,
        optimizer="adamw",
        learning_rate=1e-3,
        weight_decay=0.01,
    ),
)

if __name__ == "__main__":
    reported(main, parse(DEFAULT, __doc__))
