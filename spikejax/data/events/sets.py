"""Sets of event recordings, by name or by folder, as frames that are cached on disk.

The frames go through ``images.train_batches`` and ``eval_batches`` like images, with
one more axis: a batch is {"image": [B, T, H, W, C], "label": [B]}.
"""

import dataclasses
import hashlib
import json
import operator
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spikejax.data.events import frames, recordings, tables
from spikejax.data.events.columns import (
    CorruptRecording,
    Size,
    from_columns,
    named_columns,
)
from spikejax.data.sequences import SequenceSet
from spikejax.data.split import Arrays, Folder

KINDS: dict[str, frames.ToFrames] = {
    "number": frames.by_number,
    "duration": frames.by_duration,
    "voxel": frames.voxel_grid,
    "surface": frames.time_surface,
}
PARTS = ("train", "test")
WINDOW = 100_000  # microseconds of a sample, where a class has one recording
VERSION = 3  # part of the cached folder's name: a change of the frames needs a new one

# name: (folder in data_dir, call of tonic.datasets that downloads it)
NAMED = {
    "cifar10-dvs": ("CIFAR10DVS", "CIFAR10DVS(save_to={!r})"),
    "nmnist": ("NMNIST", "NMNIST(save_to={!r}, train=True), and with train=False"),
    "dvs128-gesture": ("DVSGesture", "DVSGesture(save_to={!r}), and with train=False"),
    "ncaltech101": ("NCALTECH101/Caltech101", "NCALTECH101(save_to={!r})"),
}
# Lists of recordings in the archive of DVS128 Gesture, each of which holds many.
TRIALS = ("trials_to_train.txt", "trials_to_test.txt")
LABELS = "_labels.csv"
GESTURES = (
    *("hand clapping", "right hand wave", "left hand wave", "right arm clockwise"),
    *("right arm counter-clockwise", "left arm clockwise"),
    *("left arm counter-clockwise", "arm roll", "air drums", "air guitar", "other"),
)

Files = list[tuple[Path, int]]  # (file, label); -1: the file holds many recordings


@dataclasses.dataclass(frozen=True)
class Framing:
    """Conversion of recordings to frames."""

    time_steps: int  # T, frames per recording
    kind: str = "number"  # a key of KINDS
    side: int | None = None  # height and width of the frames; None is the camera's
    # Microseconds of a sample; None takes recordings whole, and cuts them after WINDOW
    # where a class has one alone.
    window: int | None = None
    sort: bool = False  # put the events of a recording in the order of time

    def __post_init__(self):
        most = self.window or WINDOW
        if self.kind not in KINDS or not 1 <= self.time_steps <= most:
            raise ValueError(
                f"frames: expected one of {', '.join(KINDS)} and 1 to {most} "
                f"time steps, got {self.kind!r} and {self.time_steps}."
            )


@dataclasses.dataclass(frozen=True)
class EventSet(SequenceSet):
    """A labelled set of frames of events.

    sensor: (height, width) of the camera.
    window: microseconds of a sample; None if samples are whole recordings.
    """

    sensor: Size
    window: int | None


def load(
    name: str, framing: Framing, data_dir: Folder = None, *, cache_dir: str | Path
) -> EventSet:
    """Return the event set of that name or in that folder, framed once and cached.

    Args:
        name: "cifar10-dvs", "nmnist", "dvs128-gesture" or "ncaltech101", in the folders
            that Tonic makes; or a path, which holds one of: train.npz and test.npz with
            many recordings each (x, y, p, t or dt, offsets, labels); Train and Test
            with a folder per class; a folder per class; one recording per class; the
            archive of DVS128 Gesture.
        framing: conversion of events to frames.
        data_dir: folder of the named sets; Tonic's save_to.
        cache_dir: folder where frames are cached; it can be deleted.

    Returns:
        The set. If the split is not given, the last tenth of each class by name is the
        test split, or the last fifth of each recording: our choice.

    Raises:
        ValueError: no such set, a split without recordings of a class, recordings of
            different cameras, or a corrupted file.
    """
    listing = _find(name, data_dir)
    folder = Path(cache_dir) / _fingerprint(listing, framing)
    if not folder.is_dir():
        _build(name, listing, framing, folder)
    info = _info(folder)
    train, test = (_open(folder, part, info) for part in PARTS)
    most = max(info["train"] + info["test"])
    names = listing.class_names or tuple(map(str, range(most + 1)))
    sensor, window = tuple(info["sensor"]), _window(listing, framing)
    return EventSet(train, test, names, listing.split, sensor, window)


class Listing(NamedTuple):
    """The files of a set with their labels, and their split."""

    train: Files
    test: Files
    class_names: tuple[str, ...]  # empty: the labels are in the files
    split: str
    cut: bool = False  # both splits have windows of the same recordings


def _find(name: str, data_dir: Folder) -> Listing:
    """Return the files of a set by name, in Tonic's folders, or of a folder."""
    path, hint = Path(name), "docs/events.md shows the layouts of a folder"
    if name in NAMED:
        root = Path(data_dir or "data")
        path, call = root / NAMED[name][0], NAMED[name][1].format(str(root))
        hint = f"Give --data-dir, or run in Python: import tonic; tonic.datasets.{call}"
    listing = _gesture(path) if name == "dvs128-gesture" else _folder(path)
    names, known = listing.class_names, {label for _, label in listing.train}
    known &= {label for _, label in listing.test}
    missing = [each for label, each in enumerate(names) if not known & {label, -1}]
    if not known and not path.exists():
        raise ValueError(
            f"{name}: expected {', '.join(NAMED)} or a folder of recordings, got no "
            f"folder {path}. {hint}."
        )
    if missing or not known or len(names) == 1:
        raise ValueError(
            f"{name}: expected recordings ({', '.join(recordings.READERS)}) of at "
            f"least 2 classes to train and to test on, got {len(listing.train)} and "
            f"{len(listing.test)} in {path}. "
            f"Classes: {', '.join(names) or 'none'}; not in both splits: "
            f"{', '.join(missing) or 'none'}. {hint}."
        )
    return listing


def _gesture(path: Path) -> Listing:
    """Return the listing of DVS128 Gesture, of Tonic or from its archive."""
    # The archive's own folder is DvsGesture, which can be the same as DVSGesture.
    for folder in (path, path.with_name("DvsGesture")):
        if (folder / TRIALS[0]).is_file():
            return _folder(folder)
    train, test = (
        [(p, int(p.stem)) for p in sorted(path.glob(f"{part}/*/*.npy"))]
        for part in ("ibmGestureTrain", "ibmGestureTest")
    )
    return Listing(train, test, GESTURES, "users 24 to 29, as its authors gave it")


def _folder(path: Path) -> Listing:
    """Return the listing of a folder of recordings, by its layout."""
    inside = {p.name.lower(): p for p in _visible(path)}
    splits = [p.name for p in _visible(path) if p.stem.lower() in PARTS]
    if len({name.lower() for name in splits}) < len(splits):
        raise ValueError(
            f"{path}: expected one spelling of train and of test, got "
            f"{', '.join(splits)}. Join them."
        )
    if set(TRIALS) <= set(inside):
        lists = [inside[name].read_text("utf-8", "replace").split() for name in TRIALS]
        train, test = ([(path / name, -1) for name in names] for names in lists)
        return Listing(train, test, GESTURES, f"{TRIALS[1]}, as given")
    if {"train.npz", "test.npz"} <= set(inside):
        train, test = ([(inside[f"{part}.npz"], -1)] for part in PARTS)
        return Listing(train, test, (), "test.npz, as given")
    if {"train", "test"} <= set(inside):
        train, test = _classes(inside["train"]), _classes(inside["test"])
        split = f"{inside['test'].name}, as given"
    elif train := _classes(path):
        test = {name: files[len(files) * 9 // 10 :] for name, files in train.items()}
        train = {name: files[: len(files) * 9 // 10] for name, files in train.items()}
        split = "the last tenth of each class, in the order of the names"
    else:
        long = list(filter(recordings.is_recording, _visible(path)))
        files = [(p, label) for label, p in enumerate(long)]
        names, split = tuple(p.stem for p in long), "the last fifth of each recording"
        return Listing(files, files, names, split, cut=True)
    names = tuple(sorted(train | test))
    train, test = (
        [(p, names.index(name)) for name, files in part.items() for p in files]
        for part in (train, test)
    )
    return Listing(train, test, names, split)


def _classes(path: Path) -> dict[str, list[Path]]:
    """Return the recordings in each folder that has files, in natural order."""
    inside = {p.name: _visible(p) for p in _visible(path) if p.is_dir()}
    found = {
        name: sorted(filter(recordings.is_recording, files), key=_natural)
        for name, files in inside.items()
        if any(p.is_file() for p in files)
    }
    # A folder with other files only stays in the list, so that it is reported.
    return found if any(found.values()) else {}


def _visible(path: Path) -> list[Path]:
    # macOS leaves ._name beside files on other systems' disks, Jupyter its checkpoints.
    found = sorted(path.iterdir()) if path.is_dir() else []
    return [p for p in found if not p.name.startswith(".")]


def _natural(path: Path) -> tuple[int, str]:
    """Return a key that puts cifar10_airplane_9 before cifar10_airplane_10."""
    digits = "".join(c if c.isdigit() else " " for c in path.stem).split()
    return int(digits[-1]) if digits else -1, path.name


class _Sample(NamedTuple):
    events: np.ndarray
    label: int
    size: Size | None = None  # of the camera
    span: frames.Span | None = None  # of a window


def _window(listing: Listing, framing: Framing) -> int | None:
    return framing.window or (WINDOW if listing.cut else None)


def _samples(listing: Listing, part: str, framing: Framing) -> Iterator[_Sample]:
    """Yield the samples of a split, one recording in memory at a time."""
    window = _window(listing, framing)
    for path, label in getattr(listing, part):
        for whole in _recordings(path, label, framing.sort):
            if window is None:
                yield whole
                continue
            with recordings.naming(path, "windows of events"):
                cuts = frames.windows(whole.events, window)
            # Nothing is to be seen in a window without events, such as in a pause.
            ks = [k for k, cut in enumerate(cuts) if len(cut)]
            if listing.cut:
                trained = -(-len(ks) * 4 // 5)
                ks = ks[:trained] if part == "train" else ks[trained:]
            for k in ks:
                since = int(whole.events["t"][0]) + k * window
                yield whole._replace(events=cuts[k], span=(since, since + window))


def _recordings(path: Path, label: int, sort: bool) -> Iterator[_Sample]:
    """Yield the recordings in a file, one of a label, or many."""
    if label < 0:
        packed = _packed if path.suffix.lower() == ".npz" else _labelled
        yield from packed(path, sort)
    else:
        events, size = recordings.read(path, sort=sort)
        yield _Sample(events, label, size)


def _labelled(path: Path, sort: bool) -> Iterator[_Sample]:
    """Yield the gestures in a recording, which begin and end as a table beside says."""
    events, size = recordings.read(path, sort=sort)
    table = _labels(path)
    with recordings.naming(table, "lines of class, startTime_usec and endTime_usec"):
        _, *lines = table.read_text("ascii").splitlines()
        for line in filter(str.strip, lines):
            label, *span = map(int, line.split(","))
            if not 1 <= label <= len(GESTURES) or len(span) != 2:
                raise CorruptRecording(
                    f"expected a class of 1 to {len(GESTURES)}, a start and an end, "
                    f"got {[label, *span][:9]}"
                )
            start, stop = np.searchsorted(events["t"], span)
            if start < stop:
                yield _Sample(events[start:stop], label - 1, size)


def _labels(path: Path) -> Path:
    return path.with_name(path.stem + LABELS)


def _packed(path: Path, sort: bool) -> Iterator[_Sample]:
    """Yield the recordings of a file that holds many."""
    expected = "arrays x, y, p, t or dt, labels, and offsets, one more than labels"
    with recordings.naming(path, expected):
        arrays = tables.arrays_in(path.read_bytes())
        # A TypeError if they are not integers.
        labels = list(map(operator.index, arrays["labels"]))
        offsets = list(map(operator.index, arrays["offsets"]))
        ends = (offsets[0], offsets[-1], len(arrays["x"]))
        # A network has an output per label: a damaged one would ask for millions.
        if (
            not all(0 <= label < 2**16 for label in labels)
            or ends[0]
            or ends[1] != ends[2]
        ):
            raise CorruptRecording(
                f"expected labels 0 to 65535, and offsets from 0 to {ends[2]}, got "
                f"labels {min(labels)} to {max(labels)}, and {ends[0]} to {ends[1]}"
            )
        parts = map(slice, offsets[:-1], offsets[1:])
        for part, label in zip(parts, labels, strict=True):
            events, _ = from_columns(*named_columns(arrays, part), sort=sort)
            yield _Sample(events, label)


def _fingerprint(listing: Listing, framing: Framing) -> str:
    """Return the name of the cached folder, which depends on files and settings."""
    named = {path for path, _ in listing.train + listing.test}
    files = sorted(named | {path for path in map(_labels, named) if path.is_file()})
    # Sizes and times, not contents: hashing those would read every file at each start.
    stats = [(str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    parts = [[(str(p.absolute()), label) for p, label in part] for part in listing[:2]]
    key = [VERSION, listing.split, dataclasses.asdict(framing), stats, parts]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]


def _build(name: str, listing: Listing, framing: Framing, folder: Path) -> None:
    """Write the frames of a set into a folder, which exists when it is complete."""
    sensor = _sensor(listing, framing)
    folder.parent.mkdir(parents=True, exist_ok=True)
    info: dict[str, Any] = {"sensor": sensor}
    with tempfile.TemporaryDirectory(prefix=folder.name, dir=folder.parent) as made:
        for part in PARTS:
            info[part], sizes = [], {sensor}
            with open(Path(made, f"{part}.frames"), "wb") as file:
                for sample in _samples(listing, part, framing):
                    sizes.add(sample.size or sensor)
                    xs = _frame(sample, sensor, framing)
                    info |= {"shape": xs.shape, "dtype": xs.dtype.name}
                    file.write(xs.tobytes())
                    info[part].append(sample.label)
            if not info[part] or len(sizes) > 1:
                raise ValueError(
                    f"{name}: expected recordings of one camera for both splits, got "
                    f"{len(info[part])} for {part}, of (height, width) {sorted(sizes)}."
                    " Give each camera a folder of its own, or longer recordings."
                )
        if absent := _absent(
            listing.class_names, set(info["train"]), set(info["test"])
        ):
            raise ValueError(
                f"{name}: expected samples of each class to train and to test on, got "
                f"none in one of the splits of {', '.join(absent)}. Take a shorter "
                "window (--window-ms), or more recordings."
            )
        text = json.dumps(info)
        Path(made, "info.json").write_text(f"{_checksum(Path(made), text)}\n{text}")
        # Renamed at the end: an interrupted build leaves nothing, and of two processes
        # that build the same frames the first one wins.
        if not folder.is_dir():
            os.rename(made, folder)


def _absent(names: tuple[str, ...], train: set[int], test: set[int]) -> list[str]:
    """Return the classes that a split lacks; without names, those not trained."""
    if not names:
        return [str(label) for label in sorted(test - train)]
    return [name for label, name in enumerate(names) if label not in train & test]


def _sensor(listing: Listing, framing: Framing) -> Size:
    """Return the camera's size: from a file, or the smallest that has all events."""
    extents = [(0, 0)]
    for part in PARTS:
        for sample in _samples(listing, part, framing):
            if sample.size:
                return sample.size
            extents.append(recordings.extent(sample.events))
    height, width = np.max(extents, 0).tolist()
    return height, width


def _frame(sample: _Sample, sensor: Size, framing: Framing) -> np.ndarray:
    to = (framing.side, framing.side) if framing.side else sensor
    events = frames.resized(sample.events, sensor, to)
    if framing.kind == "duration":
        return frames.by_duration(events, to, framing.time_steps, span=sample.span)
    return KINDS[framing.kind](events, to, framing.time_steps)


def _checksum(folder: Path, text: str) -> str:
    """Return the checksum of the frames in a folder, and of a text."""
    total = zlib.crc32(text.encode())
    for part in PARTS:
        with open(folder / f"{part}.frames", "rb") as file:
            while block := file.read(2**20):
                total = zlib.crc32(block, total)
    return f"{total:08x}"


def _info(folder: Path) -> dict[str, Any]:
    """Return the content of info.json, if the frames are those that were written."""
    path = folder / "info.json"
    found = path.read_text("utf-8", "replace") if path.is_file() else ""
    checksum, _, text = found.partition("\n")
    whole = all((folder / f"{part}.frames").is_file() for part in PARTS)
    if not whole or checksum != _checksum(folder, text):
        raise ValueError(
            f"{folder}: expected cached frames as they were written, got changed or "
            "missing files. Delete the folder; the frames are then made again."
        )
    return json.loads(text)


def _open(folder: Path, part: str, info: dict[str, Any]) -> Arrays:
    """Return a split that was built; its frames are read from disk when drawn."""
    labels = np.array(info[part], np.int32)
    shape = (len(labels), *info["shape"])
    images = np.memmap(folder / f"{part}.frames", info["dtype"], "r", shape=shape)
    return Arrays(images, labels)
