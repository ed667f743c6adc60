"""One split of an image set, by index: decoded in memory, or as its files hold it."""

import dataclasses
import functools
import io
import math
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from spikejax.data.crop import Crop

IN_MEMORY_BYTES = 400 * 2**20  # a split up to this size is decoded once, into RAM
THREADS = min(16, os.cpu_count() or 1)  # Pillow decodes without the interpreter's lock
MODES = {1: "L", 3: "RGB", 4: "RGBA"}

Rngs = Sequence[np.random.Generator]


@dataclasses.dataclass(frozen=True)
class ArrayImages:
    """Labelled images in memory: images uint8 [N, H, W, C], labels int32 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": int(self.labels[index])}


class Record(NamedTuple):
    """One image as its file holds it, its label, and where it is, for an error."""

    encoded: bytes
    label: int
    place: str


class Records(Protocol):
    """A split as its files hold it, by index; can be pickled for Grain's workers."""

    def __len__(self) -> int:
        """Number of the records."""
        ...

    def read(self, indices: Sequence[int]) -> list[Record]:
        """The records at these indices."""
        ...


class EncodedImages:
    """One split of an image set, decoded when it is read.

    Args:
        name: of set and split, for errors.
        records: the encoded images and their labels.
        shape: [H, W, C]; H and W are None where images have sizes of their own.
        num_classes: labels are from 0 to num_classes - 1.
    """

    def __init__(
        self,
        name: str,
        records: Records,
        shape: tuple[int | None, int | None, int],
        num_classes: int,
    ):
        self.name, self.records = name, records
        self.shape, self.num_classes = shape, num_classes

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.examples([index])[0]

    @property
    def varies(self) -> bool:
        """Whether images have sizes of their own, so that a batch needs a crop."""
        return None in self.shape

    @property
    def fits(self) -> bool:
        """Whether the decoded split is small enough to stay in memory."""
        size = math.prod(side or 0 for side in self.shape)
        return not self.varies and len(self) * size <= IN_MEMORY_BYTES

    @functools.cached_property
    def in_memory(self) -> ArrayImages:
        """The whole split, decoded."""
        height, width, channels = (side or 0 for side in self.shape)
        images = np.empty((len(self), height, width, channels), np.uint8)
        labels = np.empty(len(self), np.int32)
        for start in range(0, len(self), 1000):
            rows = range(start, min(start + 1000, len(self)))
            for row, example in zip(rows, self.examples(rows), strict=True):
                images[row], labels[row] = example["image"], example["label"]
        return ArrayImages(images, labels)

    def examples(
        self,
        indices: Sequence[int] | np.ndarray,
        crop: Crop | None = None,
        rngs: Rngs = (),
    ) -> list[dict[str, Any]]:
        """The examples at these indices, each checked.

        Args:
            indices: of the examples.
            crop: applied to each image; needed where sizes vary.
            rngs: one for each index, if there is a crop.
        """
        records = self.records.read([int(i) for i in indices])

        def decode(rows: range) -> list[dict[str, Any]]:
            return [
                {
                    "image": self._image(records[i], crop, rngs[i] if crop else None),
                    "label": self._label(records[i]),
                }
                for i in rows
            ]

        each = -(-len(records) // THREADS)
        parts = [
            range(len(records))[i : i + each] for i in range(0, len(records), each)
        ]
        with ThreadPoolExecutor(THREADS) as pool:
            return [example for part in pool.map(decode, parts) for example in part]

    def _image(self, record: Record, crop: Crop | None, rng: Any) -> np.ndarray:
        mode = MODES[self.shape[-1]]
        try:
            image = Image.open(io.BytesIO(record.encoded))
            if crop:
                # A JPEG is left to the crop, which may decode it smaller.
                image = image if image.format == "JPEG" else image.convert(mode)
                image = crop(image, rng)
            pixels = np.asarray(image.convert(mode))
        except Image.UnidentifiedImageError as error:
            raise self._unreadable(record, "no image that Pillow knows") from error
        except (OSError, SyntaxError, ValueError, struct.error) as error:  # Pillow's
            raise self._unreadable(record, str(error)) from error
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        if crop is None and not self.varies and pixels.shape != self.shape:
            raise ValueError(
                f"{self.name}: expected images of one shape {self.shape}, got "
                f"{pixels.shape} at {record.place}. Such a set needs a crop."
            )
        return pixels

    def _unreadable(self, record: Record, reason: str) -> ValueError:
        return ValueError(
            f"{self.name}: expected a readable image at {record.place}, got: {reason}. "
            "Copy it there again, or take it out of the set."
        )

    def _label(self, record: Record) -> int:
        if not 0 <= record.label < self.num_classes:
            raise ValueError(
                f"{self.name}: expected labels from 0 to {self.num_classes - 1}, got "
                f"{record.label} at {record.place}. Leave out examples without a label."
            )
        return int(record.label)


Source = ArrayImages | EncodedImages | Sequence[dict[str, Any]]


def take(
    source: Source,
    indices: Sequence[int] | np.ndarray,
    crop: Crop | None = None,
    rngs: Rngs = (),
) -> dict[str, np.ndarray]:
    """The examples at these indices as one batch.

    Args:
        source: the examples, by index.
        indices: of the examples, in any number but 0.
        crop: applied to each image; needed where sizes vary.
        rngs: of the crop, one for each index; by default seeded with the index.
    """
    if crop and not rngs:
        rngs = [np.random.default_rng(int(i)) for i in indices]
    if isinstance(source, EncodedImages):
        examples = source.examples(indices, crop, rngs)
    elif isinstance(source, ArrayImages) and crop is None:
        return {"image": source.images[indices], "label": source.labels[indices]}
    else:
        examples = [source[int(i)] for i in indices]
        if crop:
            examples = [
                {**example, "image": _cropped(example["image"], crop, rng)}
                for example, rng in zip(examples, rngs, strict=True)
            ]
    shapes = {example["image"].shape for example in examples}
    if len(shapes) > 1:
        raise ValueError(
            f"take: expected images of one shape, got {sorted(shapes)}. "
            "Give a crop, such as center_crop(224)."
        )
    return {
        "image": np.stack([example["image"] for example in examples]),
        "label": np.array([example["label"] for example in examples], np.int32),
    }


def _cropped(image: np.ndarray, crop: Crop, rng: np.random.Generator) -> np.ndarray:
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    part = np.asarray(crop(picture, rng))
    return part.reshape(*part.shape[:2], -1)
