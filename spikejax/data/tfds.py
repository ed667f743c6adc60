"""Splits of prepared TFDS sets.

Reading needs no TensorFlow; preparing a TFDS set does: see experiments/prepare.py.
"""

import contextlib
import difflib
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from spikejax.data.split import EncodedImages, Record

OWN = ("digits", "fake", "tiny_imagenet", "folder")  # sets that are not TFDS's
NAME = re.compile(r"\w+(/[\w.+-]+)?")
CATALOG = "https://www.tensorflow.org/datasets/catalog"
VERSION = re.compile(r"\d+\.\d+\.\d+")


class TfdsRecords:
    """One split of a prepared TFDS image set; images are left encoded.

    Args:
        builder: a read-only TFDS builder with features 'image' and 'label'.
        split: name of the split.
    """

    def __init__(self, builder: Any, split: str):
        import tensorflow_datasets as tfds

        self.name = f"{builder.info.full_name}, split {split!r}"
        # Decoding is done elsewhere: TFDS would go through every feature, and slower.
        self._source = builder.as_data_source(
            split, decoders={"image": tfds.decode.SkipDecoding()}
        )

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Sequence[int]) -> list[Record]:
        """The records at these indices."""
        try:
            found = self._source.__getitems__(list(indices))
        except RuntimeError as error:  # array_record's checksums
            raise ValueError(
                f"{self.name}: expected readable array_record files, got a damaged "
                f"one: {error}. Delete the set's folder and prepare it again."
            ) from error
        return [
            Record(record["image"], int(record["label"]), f"index {index}")
            for record, index in zip(found, indices, strict=True)
        ]


def tfds_split(name: str, builder: Any, split: str) -> EncodedImages:
    """A split of a prepared set, whose files are whole."""
    check_files(name, builder, split)
    records = TfdsRecords(builder, split)
    features = builder.info.features
    shape, num_classes = features["image"].shape, features["label"].num_classes
    return EncodedImages(records.name, records, shape, num_classes)


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
        close = difflib.get_close_matches(name, [*known, *OWN], n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"See {CATALOG}"
        raise ValueError(
            f"data: expected {', '.join(OWN)} or a TFDS set, got {name!r}. {hint}"
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
    if image.np_dtype != np.uint8:
        raise ValueError(
            f"{name}: expected uint8 images, got {np.dtype(image.np_dtype).name}. "
            "Take another set."
        )


def _prepare_command(name: str, data_dir: str | os.PathLike[str] | None) -> str:
    where = f" --data-dir {os.fspath(data_dir)}" if data_dir else ""
    return f"python -m experiments.prepare {name}{where}"
