"""Sets of event recordings, by name or by folder, as frames that are kept on the disk.

The frames go through ``images.train_batches`` and ``eval_batches`` like images, with an
axis more: a batch is {"image": [B, T, H, W, C], "label": [B]}.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spikejax import cache
from spikejax.data.events import frames, recordings
from spikejax.data.events.listing import Listing, find
from spikejax.data.events.recordings import Size
from spikejax.data.split import ArrayImages

KINDS: dict[str, frames.ToFrames] = {
    "number": frames.by_number,
    "duration": frames.by_duration,
    "voxel": frames.voxel_grid,
    "surface": frames.time_surface,
}
VERSION = 1  # of what is kept; a change of the frames makes a new number


@dataclasses.dataclass(frozen=True)
class Framing:
    """How events become frames."""

    time_steps: int
    """T, frames of a recording."""
    kind: str = "number"
    """A key of KINDS."""
    side: int | None = None
    """Height and width of the frames; None is the camera's."""
    window: int = 100_000
    """Microseconds of a sample, where the recordings are cut into samples."""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(
                f"frames: expected one of {', '.join(KINDS)}, got {self.kind!r}."
            )
        if self.time_steps < 1 or self.window < self.time_steps:
            raise ValueError(
                f"frames: expected at least 1 time step and 1 us each, got "
                f"{self.time_steps} in {self.window} us."
            )


@dataclasses.dataclass(frozen=True)
class EventSet:
    """A labelled set of frames of events: two splits, and what a model has to know.

    shape is (H, W, C) of one frame; split says which recordings are the test split;
    sensor is (height, width) of the camera.
    """

    name: str
    train: ArrayImages
    test: ArrayImages
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    split: str
    sensor: Size

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)


def load(
    name: str,
    framing: Framing,
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> EventSet:
    """The event set of that name or in that folder, framed once and kept.

    Args:
        name: "cifar10-dvs", "nmnist" or "dvs128-gesture", in the folders that Tonic
            makes; or a path, which holds one of: train.npz and test.npz of many
            recordings each (x, y, p, t or dt, offsets, labels); Train and Test with a
            folder for each class; a folder for each class; one recording for each
            class.
        framing: how events become frames.
        data_dir: where the named sets are; Tonic's save_to.
        cache_dir: where frames are kept; None is spikejax in $XDG_CACHE_HOME.

    Returns:
        The set. Where the split is not given, the last tenth of each class by name is
        the test split, or the last fifth of each recording: our choice.
    """
    listing = find(name, data_dir)
    kept = Path(cache_dir or cache.folder()) / _fingerprint(listing, framing)
    if not kept.is_dir():
        _keep(listing, framing, kept)
    info = json.loads((kept / "info.json").read_text())
    train, test = (_kept(kept / part, info) for part in ("train", "test"))
    height, width, channels = info["shape"][1:]
    return EventSet(
        name,
        train,
        test,
        (height, width, channels),
        tuple(info["class_names"]),
        listing.split,
        tuple(info["sensor"]),
    )


def _samples(listing: Listing, part: str, framing: Framing) -> Iterator:
    """(events, label, size or None, span or None) of each sample of a split."""
    for path, label in getattr(listing, part):
        if label < 0:
            yield from _packed(path)
            continue
        events, size = recordings.read(path)
        if not listing.cut:
            yield events, label, size, None
            continue
        cuts = list(frames.windows(events, framing.window))
        trained = -(-len(cuts) * 4 // 5)
        start = int(events["t"][0])
        for k, window in enumerate(cuts):
            if (k < trained) == (part == "train"):
                since = start + k * framing.window
                yield window, label, size, (since, since + framing.window)


def _packed(path: Path) -> Iterator:
    """The recordings of a file that holds many, one after the other."""
    with np.load(path, allow_pickle=False) as arrays:
        missing = {"x", "y", "p", "offsets", "labels"} - set(arrays.files)
        if missing or not {"t", "dt"} & set(arrays.files):
            raise ValueError(
                f"{path}: expected arrays x, y, p, t or dt, offsets and labels, got "
                f"{', '.join(arrays.files)}."
            )
        columns = {name: arrays[name] for name in arrays.files}
    offsets = columns["offsets"].astype(np.int64)
    if (np.diff(offsets) < 0).any() or len(offsets) != len(columns["labels"]) + 1:
        raise ValueError(
            f"{path}: expected offsets that rise, one more than labels, got "
            f"{len(offsets)} and {len(columns['labels'])} labels."
        )
    for n, label in enumerate(columns["labels"].tolist()):
        x, y, p, t = (
            columns[k][offsets[n] : offsets[n + 1]]
            for k in ("x", "y", "p", "t" if "t" in columns else "dt")
        )
        t = t if "t" in columns else np.cumsum(t, dtype=np.int64)
        try:
            recording = recordings.checked(x, y, t, p)
        except ValueError as error:
            raise ValueError(f"{path}, recording {n}: {error}.") from error
        yield recording.events, label, None, None


def _sensor(listing: Listing, framing: Framing) -> Size:
    """The camera's size: what a file says, else what all events need."""
    height = width = 0
    for part in ("train", "test"):
        for events, _, size, _ in _samples(listing, part, framing):
            if size:
                return size
            needed = recordings.extent(events)
            height, width = max(height, needed[0]), max(width, needed[1])
    return height, width


def _fingerprint(listing: Listing, framing: Framing) -> str:
    """Name of the folder of the frames: other files or settings, another name."""
    files = sorted({path for path, _ in listing.train + listing.test})
    stats = [(str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    told = [VERSION, listing.split, dataclasses.asdict(framing), stats]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:20]


def _keep(listing: Listing, framing: Framing, kept: Path) -> None:
    """Frames the set into a folder, which is there whole or not at all."""
    sensor = _sensor(listing, framing)
    kept.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=kept.name, dir=kept.parent))
    try:
        info, most = {}, 0
        for part in ("train", "test"):
            labels = []
            with open(beside / f"{part}.frames", "wb") as file:
                for events, label, size, span in _samples(listing, part, framing):
                    _check_sizes(listing.name, sensor, size)
                    sample = _frame(events, sensor, framing, span)
                    info = {"shape": sample.shape, "dtype": sample.dtype.name}
                    file.write(sample.tobytes())
                    labels.append(label)
            np.save(beside / f"{part}.labels.npy", np.array(labels, np.int32))
            if not labels:
                raise ValueError(
                    f"{listing.name}: expected recordings of every class for both "
                    f"splits, got none for {part}. Give the folder above the classes, "
                    "with more or longer recordings of each."
                )
            most = max([most, *labels])
        names = [str(name) for name in listing.class_names or range(most + 1)]
        info |= {"sensor": sensor, "class_names": names}
        (beside / "info.json").write_text(json.dumps(info))
        if not kept.is_dir():  # another process may have been quicker
            beside.rename(kept)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _frame(events, sensor, framing, span) -> np.ndarray:
    to = (framing.side, framing.side) if framing.side else sensor
    events = frames.resized(events, sensor, to)
    if framing.kind == "duration":
        return frames.by_duration(events, to, framing.time_steps, span=span)
    return KINDS[framing.kind](events, to, framing.time_steps)


def _check_sizes(name: str, sensor: Size, size: Size | None) -> None:
    if size not in (None, sensor):
        raise ValueError(
            f"{name}: expected recordings of one camera, got (height, width) {sensor} "
            f"and {size}. Give each camera a folder of its own."
        )


def _kept(path: Path, info: dict) -> ArrayImages:
    """A split that was framed, read from the disk as it is needed."""
    labels = np.load(path.with_suffix(".labels.npy"))
    shape = (len(labels), *info["shape"])
    kept = np.memmap(path.with_suffix(".frames"), info["dtype"], "r", shape=shape)
    return ArrayImages(kept, labels)
