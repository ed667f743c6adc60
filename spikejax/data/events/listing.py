"""The files of a set of event recordings, with their labels, and how they divide."""

import os
from pathlib import Path
from typing import NamedTuple

from spikejax.data.events import recordings


class Listing(NamedTuple):
    """The files of a set with their labels, and how they divide."""

    name: str
    train: list[tuple[Path, int]]
    test: list[tuple[Path, int]]
    class_names: tuple[str, ...]
    split: str
    cut: bool = False  # into windows, and in both splits


# name: (folder in data_dir, Tonic's class)
NAMED = {
    "cifar10-dvs": ("CIFAR10DVS", "CIFAR10DVS(save_to={!r})"),
    "nmnist": ("NMNIST", "NMNIST(save_to={!r}, train=True)"),
    "dvs128-gesture": ("DVSGesture", "DVSGesture(save_to={!r}, train=True)"),
}


def find(name: str, data_dir: str | os.PathLike[str] | None) -> Listing:
    """The listing of a set by name, in Tonic's folders, or of the folder at a path.

    Raises:
        ValueError: there is none, or nothing to train or to test on.
    """
    if name not in NAMED:
        return _folder(name, Path(name))
    folder, make = NAMED[name]
    root = Path(data_dir or "data")
    if not (root / folder).is_dir():
        command = f"tonic.datasets.{make.format(str(root))}"
        raise ValueError(
            f"{name}: expected the folder {root / folder}, got none there. Give "
            f"--data-dir, or download it in Python: import tonic; {command}"
            + (", and again with train=False." if "train" in make else ".")
        )
    if name != "dvs128-gesture":
        return _folder(name, root / folder)
    train, test = (
        [(p, int(p.stem)) for p in sorted(root.glob(f"{folder}/{part}/*/*.npy"))]
        for part in ("ibmGestureTrain", "ibmGestureTest")
    )
    _check_listing(name, root / folder, train, test)
    return Listing(
        name, train, test, GESTURES, "users 24 to 29, as its authors gave it"
    )


GESTURES = (
    *("hand clapping", "right hand wave", "left hand wave", "right arm clockwise"),
    *("right arm counter-clockwise", "left arm clockwise"),
    *("left arm counter-clockwise", "arm roll", "air drums", "air guitar", "other"),
)


def _folder(name: str, path: Path) -> Listing:
    """The listing of a folder of recordings, by how they lie there."""
    if not path.is_dir():
        raise ValueError(
            f"data: expected {', '.join(NAMED)} or a folder of recordings, got "
            f"{name!r}."
        )
    inside = {p.name.lower(): p for p in sorted(path.iterdir())}
    if {"train.npz", "test.npz"} <= set(inside):
        train, test = ([(inside[f"{part}.npz"], -1)] for part in ("train", "test"))
        return Listing(name, train, test, (), "test.npz, as given")
    if {"train", "test"} <= set(inside):
        classes, train = _classes(inside["train"])
        others, test = _classes(inside["test"])
        if classes != others:
            raise ValueError(
                f"{name}: expected the same classes in {inside['train']} and "
                f"{inside['test']}, got {classes} and {others}."
            )
        _check_listing(name, path, train, test)
        return Listing(name, train, test, classes, f"{inside['test'].name}, as given")
    classes, files = _classes(path)
    if classes:
        train, test = [], []
        for label in range(len(classes)):
            of_class = [entry for entry in files if entry[1] == label]
            held_out = -(-len(of_class) // 10)
            train += of_class[:-held_out]
            test += of_class[-held_out:]
        _check_listing(name, path, train, test)
        split = "the last tenth of each class, in the order of the names"
        return Listing(name, train, test, classes, split)
    files = [p for p in inside.values() if recordings.is_recording(p)]
    entries = [(p, label) for label, p in enumerate(files)]
    _check_listing(name, path, entries, entries)
    classes = tuple(p.stem for p in files)
    split = "the last fifth of each recording"
    return Listing(name, entries, entries, classes, split, cut=True)


def _classes(path: Path) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """Names of the folders with recordings in them, and (file, label) in order."""
    found = {}
    for folder in sorted(p for p in path.iterdir() if p.is_dir()):
        inside = [p for p in folder.iterdir() if not p.name.startswith(".")]
        if any(p.is_file() for p in inside):
            files = filter(recordings.is_recording, inside)
            found[folder.name] = sorted(files, key=_natural)
    empty = [name for name, files in found.items() if not files]
    if len(empty) == len(found):
        return (), []
    if empty:
        raise ValueError(
            f"data: expected files {', '.join(recordings.READERS)} in every folder of "
            f"{path}, got none in {', '.join(empty)}. Move it elsewhere."
        )
    entries = [(p, k) for k, files in enumerate(found.values()) for p in files]
    return tuple(found), entries


def _natural(path: Path) -> tuple[int, str]:
    """Puts cifar10_airplane_9 before cifar10_airplane_10."""
    digits = "".join(c if c.isdigit() else " " for c in path.stem).split()
    return int(digits[-1]) if digits else -1, path.name


def _check_listing(name, path, train, test) -> None:
    if not train or not test:
        raise ValueError(
            f"{name}: expected files {', '.join(recordings.READERS)} to train and to "
            f"test on in {path}, got {len(train)} and {len(test)}. docs/events.md "
            "shows how they may lie. A class needs two recordings."
        )
    labels = {label for _, label in train}
    if len(labels) == 1 and labels != {-1}:  # -1: the labels are in the file
        raise ValueError(
            f"{name}: expected at least 2 classes in {path}, got one. Each has a "
            "folder of its own."
        )
