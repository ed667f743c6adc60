"""Splits of labelled sets by index: in memory, or decoded when they are read."""

import dataclasses
import functools
import io
import lzma
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from spikejax.data.augment import Crop, to_image, to_pixels

# "image" [B, ...] and "label" int32 [B]; of sequences "length" int32 [B] too.
Batch = dict[str, np.ndarray]
Indices = Sequence[int] | np.ndarray
Rngs = Sequence[np.random.Generator]
Folder = str | os.PathLike[str] | None
Shape = tuple[int | None, ...]  # None: images have different heights and widths
Splits = tuple["Source", "Source", tuple[str, ...]]  # train, test, names of classes

# A split up to this size is decoded once: CIFAR-10 takes 150 MB, Tiny-ImageNet's
# 1.2 GB would be a copy per worker.
IN_MEMORY_BYTES = 400 * 2**20
# Pillow decodes without holding the interpreter's lock.
THREADS = min(16, os.cpu_count() or 1)
# From damaged files: RuntimeError is array_record's for a checksum that is wrong.
DAMAGE = (EOFError, LookupError, OSError, RuntimeError, ValueError)
DAMAGE += (lzma.LZMAError, struct.error, zipfile.BadZipFile, zlib.error)
# Those that TensorFlow decodes, so that sets of TFDS may have them. Others that Pillow
# opens run a program (EPS) or hold numbers beyond 0 to 255 (TIFF).
FORMATS = ("JPEG", "PNG", "GIF", "BMP")
MAX_PIXELS = 2**26  # 200 MB decoded, which a few kB of PNG can ask for
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names by the number of channels


class Source(Protocol):
    """A split that train_batches and eval_batches can read."""

    @property
    def shape(self) -> Shape: ...  # of an example

    def cached(self) -> "Source": ...  # in memory if it is small enough, else itself

    def __len__(self) -> int: ...

    def take(
        self, indices: Indices, crop: Crop | None = None, rngs: Rngs | None = None
    ) -> Batch:
        """Return the examples at these indices as one batch.

        Args:
            indices: at least one index.
            crop: applied to each image; needed if their sizes differ.
            rngs: random generators of the crop, one per index; by default seeded with
                the index.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A labelled split in memory or in a memory-mapped file.

    Args:
        values: images [N, H, W, C], frames of recordings [N, T, H, W, C], or padded
            sequences [N, T, F].
        labels: integers [N], >= 0.
        lengths: int32 [N], steps of each sequence before the padding, 1 to T.

    Raises:
        ValueError: the labels are not of this kind, or not one per example.
    """

    values: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray | None = None

    def __post_init__(self):
        # Checked here, once: training does not look at the labels of each step.
        kind, count = self.labels.dtype.kind, len(self.values)
        if kind not in "iu" or self.labels.shape != (count,) or (self.labels < 0).any():
            raise ValueError(
                f"Arrays: expected {count} integer labels >= 0, got "
                f"{self.labels.dtype} {self.labels.shape}, the smallest "
                f"{self.labels.min(initial=0)}. Leave out examples without a label."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.values.shape[1:]

    def cached(self) -> "Arrays":
        """Return the split itself."""
        return self

    def __len__(self) -> int:
        return len(self.labels)

    def take(
        self, indices: Indices, crop: Crop | None = None, rngs: Rngs | None = None
    ) -> Batch:
        """Return the examples at these indices as one batch; see Source."""
        values, labels = self.values[indices], self.labels[indices]
        if crop:
            crops = map(crop, map(to_image, values), rngs or _seeded(indices))
            values = np.stack([to_pixels(image) for image in crops])
        batch = {"image": values, "label": labels.astype(np.int32)}
        if self.lengths is not None:
            batch["length"] = self.lengths[indices]
        return batch


class Record(NamedTuple):
    """An encoded image, its label, and the place of it that errors name."""

    encoded: bytes
    label: int
    place: str


# Returns the records at some indices; pickled for Grain's workers.
Read = Callable[[Sequence[int]], list[Record]]


@dataclasses.dataclass(frozen=True)
class EncodedImages:
    """A labelled split whose images are decoded when they are read.

    Args:
        name: name of set and split, for errors.
        count: number of the images.
        read: reader of the encoded images and their labels.
        shape: [H, W, C]; H and W are None if the sizes of the images differ.
        num_classes: labels are in 0 to num_classes - 1.
    """

    name: str
    count: int
    read: Read
    shape: Shape
    num_classes: int

    def __len__(self) -> int:
        return self.count

    def cached(self) -> Source:
        """Return the split decoded, or the split itself if that is too large."""
        size = len(self) * math.prod(side or 2**31 for side in self.shape)
        return self._decoded if size <= IN_MEMORY_BYTES else self

    @functools.cached_property
    def _decoded(self) -> Arrays:
        images = np.empty((len(self), *(side or 0 for side in self.shape)), np.uint8)
        labels = np.empty(len(self), np.int32)
        for start in range(0, len(self), 1000):  # not a second copy of the whole split
            part = slice(start, start + 1000)
            batch = self.take(range(len(self))[part])
            images[part], labels[part] = batch["image"], batch["label"]
        return Arrays(images, labels)

    def take(
        self, indices: Indices, crop: Crop | None = None, rngs: Rngs | None = None
    ) -> Batch:
        """Return the examples at these indices as one batch; see Source.

        Raises:
            ValueError: a file, an image or a label is damaged or not of this set.
        """
        records = self.records(indices)
        rngs = rngs or (_seeded(indices) if crop else ())

        def decode(rows: np.ndarray) -> list[np.ndarray]:
            return [self._decode(records[i], crop, rngs[i : i + 1]) for i in rows]

        # One task per thread: a future per image is overhead for small images.
        parts = np.array_split(np.arange(len(records)), THREADS)
        with ThreadPoolExecutor(THREADS) as pool:
            images = [image for part in pool.map(decode, parts) for image in part]
        labels = np.array([record.label for record in records], np.int32)
        return {"image": np.stack(images), "label": labels}

    def records(self, indices: Indices) -> list[Record]:
        """Return the records at these indices; ValueError if a file is damaged."""
        try:
            return self.read([int(i) for i in indices])
        except DAMAGE as error:
            raise ValueError(
                f"{self.name}: expected readable files, got a damaged one: "
                f"{' '.join(str(error).split())[:200]}. Copy it again, or prepare the "
                "set again."
            ) from error

    def _decode(self, record: Record, crop: Crop | None, rng: Rngs) -> np.ndarray:
        mode = MODES[self.shape[-1] or 3]
        try:
            image = Image.open(io.BytesIO(record.encoded), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"more than {MAX_PIXELS} pixels: {image.size}")
            if image.mode.startswith("I"):  # 16 bits, which convert would clip to white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if crop:
                # A JPEG is left encoded for the crop, which may decode it smaller.
                image = image if image.format == "JPEG" else image.convert(mode)
                image = crop(image, *rng)
            pixels = to_pixels(image.convert(mode))
        # Pillow raises all of these on damaged files, UnidentifiedImageError as well.
        except (*DAMAGE, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{self.name}: expected a readable image ({', '.join(FORMATS)}) at "
                f"{record.place}, got: {str(error).split(' <')[0]}. Copy it again, "
                "or leave it out."
            ) from error
        size = pixels.shape[:2] if None in self.shape or crop else self.shape[:2]
        if pixels.shape[:2] != size or not 0 <= record.label < self.num_classes:
            raise ValueError(
                f"{self.name}: expected images {size} and labels 0 to "
                f"{self.num_classes - 1}, got {pixels.shape[:2]} and {record.label} at "
                f"{record.place}. Give a crop, or leave out what has no label."
            )
        return pixels


def _seeded(indices: Indices) -> list[np.random.Generator]:
    return [np.random.default_rng(int(i)) for i in indices]
