"""Image sets that are plain files: Tiny-ImageNet's zip, and folders of JPEGs."""

import os
import zipfile
from collections.abc import Sequence
from functools import cache, partial
from glob import glob
from pathlib import Path

import numpy as np

from spikejax.data.split import DAMAGE, EncodedImages, Folder, Read, Record, Splits

TINY = "tiny-imagenet-200.zip"
TINY_ADDRESS = f"http://cs231n.stanford.edu/{TINY}"
SUFFIXES = (".jpeg", ".jpg", ".png")
TEXTS = ("wnids.txt", "words.txt", "val/val_annotations.txt")
MAX_BYTES = 2**24  # of a file in the zip; the longest, words.txt, has 2.6 MB
HELD_OUT = ("val", "validation", "test")  # names of the test split; the first one found

Files = list[tuple[str, str]]  # (name from the root of the set, class)


def file_reader(root: Path, names: Sequence[str], labels: Sequence[int]) -> Read:
    """Return a reader of labelled image files in a folder, or in a zip.

    Args:
        root: the folder, or the zip, which is not unpacked.
        names, labels: of the files; the names are from root.
    """
    # An array of bytes: ImageNet's 1.3 million names are sent to every worker.
    encoded = np.array([os.fsencode(name) for name in names])
    return partial(_read, root, encoded, np.array(labels, np.int32))


# Parsing the directory of a zip takes as long as reading many files. Each process opens
# the zip itself: a file position that processes share would be a race.
_open_zip = cache(zipfile.ZipFile)


def _read(
    root: Path, names: np.ndarray, labels: np.ndarray, indices: Sequence[int]
) -> list[Record]:
    found = [os.fsdecode(names[index]) for index in indices]
    if root.is_dir():
        files = [(root / name).read_bytes() for name in found]
    else:
        files = list(map(_open_zip(root).read, found))
    return list(map(Record, files, labels[indices].tolist(), found))


def tiny_imagenet(data_dir: Folder) -> Splits:
    """Return Tiny-ImageNet (200 classes, 64x64), read from its zip.

    Args:
        data_dir: folder of tiny-imagenet-200.zip; without it, the only zip there is
            read if it has this layout, and its classes are those of the set.

    Raises:
        ValueError: no such zip, or one that is damaged or of another layout.
    """
    folder = Path(data_dir or ".").expanduser()
    zips = sorted(folder.glob("*.zip"))
    path = zips[0] if len(zips) == 1 else folder / TINY
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            if large := [i for i in archive.infolist() if i.file_size > MAX_BYTES]:
                raise ValueError(f"{large[0].filename} has more than {MAX_BYTES} bytes")
            root = next((m[:-9] for m in members if m.endswith("wnids.txt")), "")
            wnids, words, annotations = (
                [line.split("\t") for line in text.decode().splitlines() if line]
                for text in (archive.read(root + name) for name in TEXTS)
            )
            test = [(f"{root}val/images/{line[0]}", line[1]) for line in annotations]
            for name, _ in test:
                archive.getinfo(name)  # a KeyError if the image is not in the zip
    except DAMAGE as error:
        raise ValueError(
            f"tiny_imagenet: expected {TINY} or one zip of its layout, got {path}: "
            f"{' '.join(str(error).split())[:200]}. Give --data-dir, or download "
            f"{TINY_ADDRESS}"
        ) from error
    # train/<wnid>/images/*.JPEG
    start, depth = f"{root}train/", root.count("/") + 1
    images = [m for m in members if m.startswith(start) and m.endswith(".JPEG")]
    train = [(name, name.split("/")[depth]) for name in images]
    # The first of several names: "goldfish, Carassius auratus".
    names = {line[0]: line[-1].split(",")[0] for line in words}
    classes = {wnid: names.get(wnid, wnid) for wnid, *_ in sorted(wnids)}
    files = {"train": train, "test": test}
    return _splits("tiny_imagenet", path, files, classes, 64)


def image_folder(data_dir: Folder) -> Splits:
    """Return photographs of any size in folders: train/CLASS/*.JPEG, val/CLASS/*.JPEG.

    This is the layout of ImageNet once unpacked, and of TFDS's ImageFolder, which needs
    TensorFlow. Files that end in .jpeg, .jpg or .png count.

    Args:
        data_dir: the folder of train and val, which may be named validation or test.

    Raises:
        ValueError: no images for a split, or a class that is in val only.
    """
    root = Path(data_dir or ".").expanduser()
    held_out = next((name for name in HELD_OUT if (root / name).is_dir()), HELD_OUT[0])
    files = {split: _scan(root, split) for split in ("train", held_out)}
    classes = {name: name for name in sorted({name for _, name in files["train"]})}
    return _splits("folder", root, files, classes, None)


def _splits(
    name: str,
    root: Path,
    files: dict[str, Files],
    classes: dict[str, str],
    side: int | None,
) -> Splits:
    label_of = {known: label for label, known in enumerate(classes)}

    def encoded(split: str) -> EncodedImages:
        found, seen = files[split], {each for _, each in files[split]}
        missing = set(classes) - seen if split == "train" else set()
        wrong = [f"the class {each} too" for each in sorted(seen - set(classes))]
        wrong += [f"none of the class {each}" for each in sorted(missing)]
        if wrong or not found:
            raise ValueError(
                f"{name}: expected images ({', '.join(SUFFIXES)}) of the classes of "
                f"train in {root / split}/CLASS, got {'; '.join(wrong[:1]) or 'none'}. "
                "Give --data-dir, or move away what is not of the set."
            )
        labels = [label_of[each] for _, each in found]
        read = file_reader(root, [path for path, _ in found], labels)
        title, count = f"{name}, {split} in {root}", len(classes)
        return EncodedImages(title, len(found), read, (side, side, 3), count)

    train, test = map(encoded, files)
    return train, test, tuple(classes.values())


def _scan(root: Path, split: str) -> Files:
    """Return the image files of a split, sorted by class and name."""
    # glob skips names with a leading dot, which macOS and Jupyter leave in folders.
    found = sorted(name.split(os.sep) for name in glob("*/*", root_dir=root / split))
    found = [each for each in found if each[1].lower().endswith(SUFFIXES)]
    return [(f"{split}/{folder}/{name}", folder) for folder, name in found]
