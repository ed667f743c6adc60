"""Prepared TFDS sets of images and of audio, read without TensorFlow.

Preparing a TFDS set needs TensorFlow: see experiments/prepare.py.
"""

import difflib
import json
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from spikejax.data.split import DAMAGE, EncodedImages, Folder, Record, Splits

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder

OWN = ("digits", "fake", "tiny_imagenet", "folder")  # sets of data/images.py
NAME = re.compile(r"\w+(/[\w.+-]+)?")
CATALOG = "https://www.tensorflow.org/datasets/catalog"
PREPARE = "python -m experiments.prepare"


def _read(source: Any, indices: Sequence[int]) -> list[Record]:
    # One call for all of them: 12,600 records/s of CIFAR-10 instead of 5,700.
    found = zip(source.__getitems__(list(indices)), indices, strict=True)
    return [Record(r["image"], int(r["label"]), f"index {index}") for r, index in found]


def prepared_set(name: str, data_dir: Folder) -> Splits:
    """Return the splits of a prepared set; nothing is downloaded or prepared.

    Args:
        name: such as cifar10 or mnist_corrupted/fog.
        data_dir: TFDS's folder; None is TFDS's default.

    Raises:
        ValueError: the set is unknown, not prepared, damaged or of another kind.
    """
    import tensorflow_datasets as tfds
    from google.protobuf import json_format

    folder = _folder(name, data_dir)
    try:
        # tfds.builder would run the set's own code, which often needs TensorFlow.
        builder = tfds.builder_from_directory(folder)
    # These are raised when the two files are cut or changed at any of their bytes.
    except (OSError, ValueError, ImportError, json_format.Error) as error:
        raise ValueError(
            f"{name}: expected a readable dataset_info.json and features.json in "
            f"{folder}, got: {' '.join(str(error).split())[:200]}. Delete the folder "
            "and prepare the set again."
        ) from error
    info: Any = builder.info  # TFDS types features and splits as too many kinds
    features, files = info.features, info.file_format.value
    image, label = (dict(features.items()).get(key) for key in ("image", "label"))
    fits = isinstance(image, tfds.features.Image) and image.np_dtype == np.uint8
    fits = fits and isinstance(label, tfds.features.ClassLabel)
    splits = [s for s in ("train", "test", "validation") if s in info.splits]
    if not fits or files != "array_record" or splits[:1] != ["train"] or not splits[1:]:
        raise ValueError(
            f"{name}: expected array_record files with the features image (uint8) and "
            "label of a classification set, and splits train and test or validation, "
            f"got {files}, {' '.join(str(features).split())}, splits "
            f"{', '.join(info.splits)}. Take another set, or move {folder} "
            f"away and run: {PREPARE} {name}"
        )
    train, test, *more = (_split(name, builder, split) for split in splits)
    # ImageNet's test labels are withheld (-1): its validation split is used instead.
    if more and test.records([0])[0].label < 0:
        test = more[0]
    return train, test, tuple(features["label"].names)


def _split(name: str, builder: "DatasetBuilder", split: str) -> EncodedImages:
    import grain
    import tensorflow_datasets as tfds

    info: Any = builder.info
    shards = info.splits[split]
    for path, expected in zip(shards.filepaths, shards.shard_lengths, strict=True):
        try:
            reader: Any = grain.sources.ArrayRecordDataSource([os.fspath(path)])
            count = len(reader)
        except RuntimeError:  # no such file, or its index at the end is missing
            count = 0
        # TFDS itself would return empty records from a file without an index.
        if count != expected:
            raise ValueError(
                f"{name}: expected {expected} examples in {path}, got {count}: the "
                "file is missing or truncated. Copy it again, or delete the folder "
                "and prepare the set again."
            )
    make: Any = builder.as_data_source  # a decorator hides its signature
    # Left encoded: TFDS would decode the images one after the other.
    source = make(split, decoders={"image": tfds.decode.SkipDecoding()})
    title, features = f"{info.full_name}, split {split!r}", info.features
    shape, classes = features["image"].shape, features["label"].num_classes
    return EncodedImages(title, len(source), partial(_read, source), shape, classes)


class Audio(NamedTuple):
    """Recording of a set: the name of its file, int16 samples [N], and its class."""

    filename: str
    audio: np.ndarray
    label: int


def audio_examples(name: str, data_dir: Folder) -> list[Audio]:
    """Return the recordings of the train split of a prepared set.

    Args:
        name: such as spoken_digit, with the features audio, audio/filename and label.
        data_dir: TFDS's folder; None is TFDS's default.

    Raises:
        ValueError: the set is unknown, not prepared, or damaged.
    """
    import grain
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    folder, found = _folder(name, data_dir), []
    # TFDS's own feature of audio needs TensorFlow, even to be read.
    parse: Any = getattr(tf_example_pb2, "Example")  # noqa: B009, made when imported
    try:
        info = json.loads((folder / "dataset_info.json").read_text("utf-8"))
        (train,) = (split for split in info["splits"] if split["name"] == "train")
        count = sum(map(int, train["shardLengths"]))
        paths = sorted(map(os.fspath, folder.glob(f"{name}-train.array_record-*")))
        source: Any = grain.sources.ArrayRecordDataSource(paths)
        for record in source.__getitems__(list(range(count))):
            fields = parse.FromString(record).features.feature
            audio = np.array(fields["audio"].int64_list.value, np.int16)
            filename = fields["audio/filename"].bytes_list.value[0].decode()
            found.append(Audio(filename, audio, fields["label"].int64_list.value[0]))
    except (*DAMAGE, OverflowError, DecodeError) as error:
        raise ValueError(
            f"{name}: expected recordings of 16 bits in array_record files in {folder},"
            f" got: {' '.join(str(error).split())[:200]}. Delete the folder and prepare"
            f" the set again: {PREPARE} {name}"
        ) from error
    return found


def check_name(name: str) -> None:
    """Raise ValueError, with the closest names, for a set that TFDS does not know."""
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    if name.split("/")[0] not in known:
        close = difflib.get_close_matches(name, [*known, *OWN], n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"See {CATALOG}"
        if name and Path(name).is_dir():
            hint = f"For the images in that folder: {name}/"
        raise ValueError(
            f"data: expected {', '.join(OWN)} or a TFDS set, got {name!r}. {hint}"
        )


def _folder(name: str, data_dir: Folder) -> Path:
    """Return the folder of the newest version of a prepared set."""
    if not NAME.fullmatch(name):  # a path such as ../mnist, which no set is called
        check_name(name)
    # Found by its files: TFDS itself would try to download for minutes.
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")  # as TFDS does
    root = Path(data_dir or default).expanduser()
    found: dict[str, list[Path]] = {}  # configuration, or the set itself -> versions
    for info in (root / name).glob("**/dataset_info.json"):
        # An interrupted preparation leaves a folder incomplete.<random>_<version>.
        if info.parent.name.replace(".", "").isdigit():
            found.setdefault(info.parent.parent.name, []).append(info.parent)
    hint = f"Name one: {name}/{min(found, default='')}"
    if not found:
        check_name(name)
        where = f" --data-dir {os.fspath(data_dir)}" if data_dir else ""
        hint = f"Run: {PREPARE} {name}{where}"
    if len(found) != 1:
        raise ValueError(
            f"{name}: expected one prepared set in {root}, got "
            f"{', '.join(sorted(found)) or 'none'}. {hint}"
        )
    (versions,) = found.values()
    # By number: 10.0.0 is newer than 9.0.0.
    return max(versions, key=lambda path: [int(n) for n in path.name.split(".")])
