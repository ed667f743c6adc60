"""Throughput of the input pipeline: images per second of one core, set by set.

    python -m benchmarks.pipeline --workdir runs/pipeline --cifar10 TFDS_FOLDER \\
        --tiny-imagenet FOLDER_OF_THE_ZIP --photographs ZIP_OF_JPEGS

Batches of 64 as training draws them, 8 bits per channel. The processor time of all
threads of one process is counted, so other work on the machine matters little. Sets
that are not given are skipped. Prints a table and writes pipeline.json.
"""

import dataclasses
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from spikejax.data import augment, images
from spikejax.data.files import file_reader
from spikejax.data.split import EncodedImages, Source
from spikejax.experiment.cli import parse, run_cli
from spikejax.train import workdir as folder
from spikejax.train.progress import table
from spikejax.train.recipe import check_settings

CROP_FLIP = augment.compose(augment.random_crop(4), augment.random_flip())
BATCH_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Sets to measure."""

    workdir: Path = Path("runs/pipeline")
    """Folder for pipeline.json."""
    cifar10: Path | None = None
    """Folder of TFDS's CIFAR-10."""
    tiny_imagenet: Path | None = None
    """Folder of tiny-imagenet-200.zip."""
    photographs: Path | None = None
    """Zip of JPEG files of any size, such as some of ImageNet's."""
    seconds: float = 5.0
    """Processor time per row."""

    def __post_init__(self):
        check_settings(self, {"seconds": ("more than 0", lambda s: s > 0)})


def decoded_whole(crop: augment.Crop) -> augment.Crop:
    """Return the crop of an image that is decoded at full size first."""

    def cropped(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        image.load()
        return crop(image, rng)

    return cropped


def zipped_photographs(path: Path) -> EncodedImages:
    """Return the JPEG files of a zip, all with label 0."""
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.lower().endswith((".jpeg", ".jpg"))]
    read = file_reader(path, names, [0] * len(names))
    return EncodedImages(path.name, len(names), read, (None, None, 3), 1)


def pipelines(given: Pipeline) -> Iterator[tuple[str, images.TrainBatches]]:
    """Yield the name of each row and its batches."""

    def batches(source: Source, **options: Any) -> images.TrainBatches:
        size = min(BATCH_SIZE, len(source))
        return images.train_batches(source, size, seed=0, **options)

    flip = augment.random_flip()
    if given.cifar10:
        train = images.load("cifar10", given.cifar10).train
        yield "CIFAR-10 in memory, crop and flip", batches(train, augment=CROP_FLIP)
        policy = augment.compose(
            CROP_FLIP, augment.autoaugment_cifar(), augment.cutout(16)
        )
        yield "CIFAR-10 in memory, AutoAugment", batches(train, augment=policy)
    if given.tiny_imagenet:
        train: Any = images.load("tiny_imagenet", given.tiny_imagenet).train
        inception = {"crop": augment.inception_crop(64), "augment": flip}
        yield "Tiny-ImageNet in memory, inception 64", batches(train, **inception)
        train = dataclasses.replace(train, shape=(None, None, 3))
        yield "Tiny-ImageNet from its zip, inception 64", batches(train, **inception)
    if given.photographs:
        photographs = zipped_photographs(given.photographs)
        crops = {"center 224": augment.center_crop(224)}
        for size in (224, 64):
            crop = augment.inception_crop(size)
            crops[f"inception {size}"] = crop
            crops[f"inception {size}, decoded whole"] = decoded_whole(crop)
        for name, crop in crops.items():
            yield f"photographs, {name}", batches(photographs, crop=crop, augment=flip)


def measure(given: Pipeline) -> list[dict[str, Any]]:
    """Return one row per pipeline: images per second of processor time."""
    rows = []
    for name, batches in pipelines(given):
        next(batches)  # opens files, starts the thread
        start, wall, count = time.process_time(), time.perf_counter(), 0
        while time.process_time() - start < given.seconds:
            count += len(next(batches)["label"])
        rows.append(
            {
                "workload": name,
                "library": "spikejax",
                "images_per_core_second": count / (time.process_time() - start),
                "images_per_second": count / (time.perf_counter() - wall),
                "images": count,
                "pillow": PIL.__version__,
            }
        )
        batches.close()
    if not rows:
        raise ValueError(
            "pipeline: expected --cifar10, --tiny-imagenet or --photographs, got none."
        )
    return rows


def main(given: Pipeline) -> None:
    """Measure, print the table, write pipeline.json."""
    rows = measure(given)
    path = given.workdir / "pipeline.json"
    folder.write(path, rows)
    table(
        "Input pipeline",
        ["", "images/s of one core"],
        [[row["workload"], f"{row['images_per_core_second']:,.0f}"] for row in rows],
    )
    print(f"Written: {path}")


if __name__ == "__main__":
    run_cli(main, parse(Pipeline(), __doc__))
