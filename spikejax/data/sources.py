"""Labelled images by index: arrays in memory, and splits of prepared TFDS sets.

Reading needs no TensorFlow; preparing a TFDS set does: see experiments/prepare.py.
"""

import contextlib
import dataclasses
import difflib
import functools
import io
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

IN_MEMORY_BYTES = 400 * 2**20  # a split up to this size is decoded once, into RAM
NAME = re.compile(r"\w+(/[\w.+-]+)?")
CATALOG = "https://www.tensorflow.org/datasets/catalog"
VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclasses.dataclass(frozen=True)
class ArrayImages:
    """Labelled images in memory: images uint8 [N, H, W, C], labels int32 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": int(self.labels[index])}


class TfdsImages:
    """One split of a prepared TFDS image set, decoded when it is read.

    Args:
        builder: a read-only TFDS builder with features 'image' and 'label'.
        split: name of the split.
    """

    def __init__(self, builder: Any, split: str):
        import tensorflow_datasets as tfds

        features = builder.info.features
        self.name = f"{builder.info.full_name}, split {split!r}"
        self.shape: tuple[int, int, int] = features["image"].shape
        self.num_classes: int = features["label"].num_classes
        # Decoding is done here: TFDS would go through every feature, and slower.
        self._records = builder.as_data_source(
            split, decoders={"image": tfds.decode.SkipDecoding()}
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.examples([index])[0]

    @property
    def fits(self) -> bool:
        """Whether the decoded split is small enough to stay in memory."""
        return len(self) * int(np.prod(self.shape)) <= IN_MEMORY_BYTES

    @functools.cached_property
    def in_memory(self) -> ArrayImages:
        """The whole split, decoded by a pool of threads."""
        images = np.empty((len(self), *self.shape), np.uint8)
        labels = np.empty(len(self), np.int32)

        def fill(start: int) -> None:
            rows = range(start, min(start + 1000, len(self)))
            for row, example in zip(rows, self.examples(rows), strict=True):
                images[row], labels[row] = example["image"], example["label"]

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(fill, range(0, len(self), 1000)))
        return ArrayImages(images, labels)

    def examples(self, indices: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """The examples at these indices, each checked."""
        try:
            records = self._records.__getitems__([int(i) for i in indices])
        except RuntimeError as error:  # array_record's checksums
            raise ValueError(
                f"{self.name}: expected readable array_record files, got a damaged "
                f"one: {error}. Delete the set's folder and prepare it again."
            ) from error
        return [
            {
                "image": self._image(record["image"], index),
                "label": self._label(record["label"], index),
            }
            for record, index in zip(records, indices, strict=True)
        ]

    def _image(self, encoded: bytes, index: int) -> np.ndarray:
        mode = {1: "L", 3: "RGB", 4: "RGBA"}[self.shape[-1]]
        image = np.asarray(Image.open(io.BytesIO(encoded)).convert(mode))
        image = image.reshape(*image.shape[:2], -1)
        if image.shape != self.shape:
            raise ValueError(
                f"{self.name}: expected images of one shape {self.shape}, got "
                f"{image.shape} at index {index}. Such a set needs a resize first."
            )
        return image

    def _label(self, label: int, index: int) -> int:
        if not 0 <= label < self.num_classes:
            raise ValueError(
                f"{self.name}: expected labels from 0 to {self.num_classes - 1}, got "
                f"{label} at index {index}. Leave out examples without a label."
            )
        return int(label)


Source = ArrayImages | TfdsImages | Sequence[dict[str, Any]]


def prepared_builder(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    """The read-only TFDS builder of a prepared set, whole and with images and labels.

    Nothing is downloaded and no set's own code is run: TFDS would try the download
    for minutes where there is no network, and many sets' code needs TensorFlow.
    """
    import tensorflow_datasets as tfds

    folder = _folder(name, data_dir)
    try:
        builder: Any = tfds.builder_from_directory(folder)
    except Exception as error:  # of many kinds: JSON, protobuf, missing files
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ValueError(
            f"{name}: expected a readable dataset_info.json and features.json in "
            f"{folder}, got: {reason}. Delete the folder and prepare it again."
        ) from error
    _check_features(name, builder.info.features)
    if builder.info.file_format.value != "array_record":
        raise ValueError(
            f"{name}: expected array_record files, got {builder.info.file_format.value}"
            f" in {folder}. Move the folder away, then run: "
            f"{_prepare_command(name, data_dir)}"
        )
    return builder


def check_files(name: str, builder: Any, split: str) -> None:
    """Raises ValueError for a file of the split that is missing or not whole."""
    from array_record.python.array_record_module import ArrayRecordReader

    info = builder.info.splits[split]
    for path, expected in zip(info.filepaths, info.shard_lengths, strict=True):
        if not path.exists():
            raise ValueError(
                f"{name}: expected the file {path}, got none there. "
                "Copy it there, or delete the folder and prepare the set again."
            )
        reader = ArrayRecordReader(os.fspath(path))
        count = reader.num_records()  # 0 if the index at the end is cut off
        with contextlib.suppress(RuntimeError):  # of a file that is not whole
            reader.close()
        if count != expected:
            raise ValueError(
                f"{name}: expected {expected} examples in {path}, got {count}: the "
                "file is truncated. Copy it again, or delete the folder and prepare "
                "the set again."
            )


def check_name(name: str) -> None:
    """Raises ValueError, with the closest names, for a set that TFDS does not know."""
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    if name.split("/")[0] not in known:
        close = difflib.get_close_matches(name, [*known, "digits", "fake"], n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"See {CATALOG}"
        raise ValueError(
            f"data: expected digits, fake or a TFDS set, got {name!r}. {hint}"
        )


def _folder(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    """The newest version's folder of a prepared set."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import constants

    if not NAME.fullmatch(name):
        check_name(name)
    root = tfds.core.Path(data_dir or constants.DATA_DIR).expanduser()
    found = [info.parent for info in (root / name).glob("*/dataset_info.json")]
    if not found:  # sets of several configurations have one more level
        found = [info.parent for info in (root / name).glob("*/*/dataset_info.json")]
    found = [folder for folder in found if VERSION.fullmatch(folder.name)]
    if not found:
        check_name(name)
        raise ValueError(
            f"{name}: expected a prepared set in {root}, got none. "
            f"Run: {_prepare_command(name, data_dir)}"
        )
    configurations = sorted({folder.parent.name for folder in found})
    if len(configurations) > 1:
        raise ValueError(
            f"{name}: expected one configuration, got {', '.join(configurations)}. "
            f"Name one: {name}/{configurations[0]}"
        )
    return max(found, key=lambda folder: [int(n) for n in folder.name.split(".")])


def _check_features(name: str, features: Any) -> None:
    import tensorflow_datasets as tfds

    wanted = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
    for key, kind in wanted.items():
        if key not in features or not isinstance(features[key], kind):
            raise ValueError(
                f"{name}: expected the features image and label of an image "
                f"classification set, got {', '.join(sorted(features))}. "
                "Take another set."
            )
    image = features["image"]
    if None in image.shape:
        raise ValueError(
            f"{name}: expected images of one shape, got {image.shape}, where None "
            "varies. Such a set needs a resize first, which is not supported yet."
        )
    if image.np_dtype != np.uint8:
        raise ValueError(
            f"{name}: expected uint8 images, got {np.dtype(image.np_dtype).name}. "
            "Take another set."
        )


def _prepare_command(name: str, data_dir: str | os.PathLike[str] | None) -> str:
    where = f" --data-dir {os.fspath(data_dir)}" if data_dir else ""
    return f"python -m experiments.prepare {name}{where}"
