"""Image sets that are plain files: Tiny-ImageNet's zip, and folders of JPEGs."""

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spikejax.data.split import EncodedImages, Record

TINY = "tiny-imagenet-200.zip"
TINY_ADDRESS = f"http://cs231n.stanford.edu/{TINY}"
SUFFIXES = (".jpeg", ".jpg", ".png")
HELD_OUT = ("val", "validation", "test")  # the first that is there


class FileSet(NamedTuple):
    """Two splits and the names of the classes."""

    train: EncodedImages
    test: EncodedImages
    class_names: tuple[str, ...]


class FileRecords:
    """Labelled image files in a folder, or in a zip, which stays one.

    Args:
        root: the folder or the zip.
        names: of the files, from root.
        labels: of the files.
    """

    def __init__(self, root: Path, names: Sequence[str], labels: Sequence[int]):
        self.root = root
        # An array of bytes: ImageNet's 1.3 million names are sent to every worker.
        self.names = np.array([os.fsencode(name) for name in names])
        self.labels = np.array(labels, np.int32)
        self._zip: zipfile.ZipFile | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_zip": None}  # each process opens its own

    def read(self, indices: Sequence[int]) -> list[Record]:
        """The records at these indices."""
        return [self._record(index) for index in indices]

    def _record(self, index: int) -> Record:
        name = os.fsdecode(self.names[index])
        place = f"{name} in {self.root}"
        try:
            if self.root.is_dir():
                encoded = (self.root / name).read_bytes()
            else:
                self._zip = self._zip or open_zip(self.root)
                encoded = self._zip.read(name)
        except (OSError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(
                f"data: expected a readable file {place}, got: {error}. Copy it again."
            ) from error
        return Record(encoded, int(self.labels[index]), place)


def open_zip(path: Path) -> zipfile.ZipFile:
    """The zip; ValueError where it is none, or not whole."""
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"data: expected a whole zip in {path}, got: {error}. Copy it again."
        ) from error


def tiny_imagenet(data_dir: str | os.PathLike[str] | None) -> FileSet:
    """Tiny-ImageNet (200 classes, 64x64) from its own zip, which stays one.

    Args:
        data_dir: folder of tiny-imagenet-200.zip; without it, any one zip there of
            this layout is taken, and its classes are the set's.
    """
    path = _tiny_zip(data_dir)
    with open_zip(path) as archive:
        members = archive.namelist()
        root = next((m[:-9] for m in members if m.endswith("wnids.txt")), None)
        wanted = ("wnids.txt", "words.txt", "val/val_annotations.txt")
        if root is None or not {root + name for name in wanted} <= set(members):
            raise ValueError(
                f"tiny_imagenet: expected {', '.join(wanted)} in {path}, got a zip of "
                f"another layout. Download {TINY_ADDRESS}"
            )
        wnids, words, annotations = (_lines(archive, root + name) for name in wanted)
    classes = sorted(line[0] for line in wnids)
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    # train/<wnid>/images/*.JPEG, and val/images/*.JPEG
    images = [m for m in members if m.startswith(root) and m.endswith(".JPEG")]
    train = [m for m in images if m.startswith(f"{root}train/")]
    held_out = {f"{root}val/images/{line[0]}": line[1] for line in annotations}
    test = [m for m in images if m in held_out]
    depth = root.count("/") + 1
    wnids_of = {m: m.split("/")[depth] for m in train} | held_out
    for member in (*train, *held_out):
        if wnids_of[member] not in label_of:
            raise ValueError(
                f"tiny_imagenet: expected one of the classes of wnids.txt, got "
                f"{wnids_of[member]} for {member} in {path}. Copy the zip again."
            )
    if not train or len(test) != len(held_out):
        raise ValueError(
            f"tiny_imagenet: expected images to train on and {len(held_out)} to test "
            f"on in {path}, got {len(train)} and {len(test)}. Copy the zip again."
        )
    names = dict((line[0], line[-1]) for line in words)
    splits = {
        split: EncodedImages(
            f"tiny_imagenet, {split}",
            FileRecords(path, members, [label_of[wnids_of[m]] for m in members]),
            (64, 64, 3),
            len(classes),
        )
        for split, members in (("train", train), ("test", test))
    }
    class_names = tuple(names.get(w, w).split(",")[0] for w in classes)
    return FileSet(class_names=class_names, **splits)


def image_folder(data_dir: str | os.PathLike[str] | None) -> FileSet:
    """Photographs of any size in folders: train/<class>/*.JPEG, val/<class>/*.JPEG.

    The layout of ImageNet once unpacked, and of TFDS's ImageFolder, which needs
    TensorFlow. Files that end in .jpeg, .jpg or .png count; instead of val the folder
    may be named validation or test.

    Args:
        data_dir: the folder of train and val.
    """
    if data_dir is None:
        raise ValueError(
            "folder: expected --data-dir, the folder of train/CLASS/*.JPEG and "
            "val/CLASS/*.JPEG, got none."
        )
    root = Path(data_dir).expanduser()
    held_out = next((name for name in HELD_OUT if (root / name).is_dir()), HELD_OUT[0])
    found = {split: _classes(root, split) for split in ("train", held_out)}
    classes = tuple(sorted(found["train"]))
    splits = {}
    for split, by_class in found.items():
        unknown = sorted(set(by_class) - set(classes))
        if unknown:
            raise ValueError(
                f"folder: expected the classes of {root / 'train'}, got also "
                f"{unknown[0]} in {root / split}. Move it away."
            )
        pairs = [(n, k) for k, c in enumerate(classes) for n in by_class.get(c, ())]
        if not pairs:
            raise ValueError(
                f"folder: expected images in {root / split}/CLASS, got none. They end "
                f"in {', '.join(SUFFIXES)}."
            )
        records = FileRecords(root, *zip(*pairs, strict=True))
        splits[split] = EncodedImages(
            f"folder, {split}", records, (None, None, 3), len(classes)
        )
    return FileSet(splits["train"], splits[held_out], classes)


def _tiny_zip(data_dir: str | os.PathLike[str] | None) -> Path:
    if data_dir is None:
        raise ValueError(
            f"tiny_imagenet: expected --data-dir, the folder of {TINY}, got none. "
            f"Download {TINY_ADDRESS}"
        )
    folder = Path(data_dir).expanduser()
    zips = sorted(folder.glob("*.zip"))
    if folder / TINY in zips:
        return folder / TINY
    if len(zips) != 1:
        raise ValueError(
            f"tiny_imagenet: expected {TINY} in {folder}, got "
            f"{', '.join(path.name for path in zips) or 'no zip'}. "
            f"Download {TINY_ADDRESS}"
        )
    return zips[0]


def _lines(archive: zipfile.ZipFile, name: str) -> list[list[str]]:
    """The columns of each line."""
    text = archive.read(name).decode()
    return [line.split("\t") for line in text.splitlines() if line]


def _classes(root: Path, split: str) -> dict[str, list[str]]:
    """The names of the image files of each class, from root."""
    if not (root / split).is_dir():
        raise ValueError(
            f"folder: expected the folder {root / split}, got none. Images are looked "
            "for in train/CLASS and val/CLASS."
        )
    found = {}
    with os.scandir(root / split) as classes:
        for entry in classes:
            if entry.is_dir():
                names = [n for n in os.listdir(entry) if n.lower().endswith(SUFFIXES)]
                found[entry.name] = [f"{split}/{entry.name}/{n}" for n in sorted(names)]
    return found
