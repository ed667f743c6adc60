"""Sets of sequences [T, F] of different lengths: SHD, SSC, MNIST-1D, or yours.

A batch is {"image": [B, T, F], "label": int32 [B], "length": int32 [B]}: a sequence is
padded with zeros behind its end, and cut where it is longer than T.
"""

import dataclasses
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from spikejax.data.split import Arrays, Folder

ADDRESS = "https://zenkelab.org/datasets"
UNITS = 700  # of the cochlea of SHD and SSC


@dataclasses.dataclass(frozen=True)
class SequenceSet:
    """A labelled set of sequences: two splits, and what a model needs.

    split says in words what is tested. mean and std are those of the features before
    they were normalised, None where they are not.
    """

    train: Arrays
    test: Arrays
    class_names: tuple[str, ...]
    split: str
    mean: tuple[float, ...] | None = dataclasses.field(default=None, kw_only=True)
    std: tuple[float, ...] | None = dataclasses.field(default=None, kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one step: (F,), or (H, W, C) of frames."""
        return self.train.shape[1:]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def pad(
    sequences: Sequence[np.ndarray], labels: Sequence[int] | np.ndarray, time_steps: int
) -> Arrays:
    """Return sequences as one array with their lengths.

    Args:
        sequences: [L, F] each, L >= 1; steps from time_steps on are cut off.
        labels: their classes.
        time_steps: T >= 1.

    Raises:
        ValueError: there is none, an empty one, or they differ in features or type.
    """
    shapes = sorted({(x.shape[1:], x.dtype.name) for x in sequences})
    if len(shapes) != 1 or not all(map(len, sequences)) or time_steps < 1:
        raise ValueError(
            "pad: expected sequences [L, F] of one F and type, L >= 1, and "
            f"time_steps >= 1, got {len(sequences)} of {shapes} and {time_steps}."
        )
    shape = (len(sequences), time_steps, *sequences[0].shape[1:])
    values = np.zeros(shape, sequences[0].dtype)
    for row, x in zip(values, sequences, strict=True):
        row[: len(x)] = x[:time_steps]
    lengths = np.minimum(list(map(len, sequences)), time_steps).astype(np.int32)
    return Arrays(values, np.asarray(labels, np.int32), lengths)


def heidelberg(
    name: str,
    data_dir: Folder,
    time_steps: int,
    *,
    step_ms: float = 10.0,
    units: int = 5,
    validation: bool = False,
) -> SequenceSet:
    """Return SHD or SSC, spikes of a model of the cochlea, as counts [T, 700 / units].

    Args:
        name: "shd" (spoken digits, the test split has speakers of its own) or "ssc"
            (Speech Commands).
        data_dir: folder of NAME_train.h5, NAME_test.h5 and, of SSC, ssc_valid.h5.
        time_steps: T; later spikes are cut off.
        step_ms: milliseconds per step.
        units: neighbouring units that are counted together.
        validation: test on ssc_valid.h5, or on the last tenth of SHD's train split.

    Raises:
        ValueError: a file is missing, or of another layout.

    Reference: Cramer et al. 2020, arXiv:1910.07407.
    """

    def read(part: str) -> tuple[Arrays, tuple[str, ...]]:
        path = Path(data_dir or ".").expanduser() / f"{name}_{part}.h5"
        return _counts(path, time_steps, step_ms, units)

    train, names = read("train")
    if validation and name == "shd":
        parts, split = _last_tenth(train), "the last tenth of shd_train.h5"
        return SequenceSet(*parts, names, split)
    held_out = "valid" if validation else "test"
    return SequenceSet(train, read(held_out)[0], names, f"{name}_{held_out}.h5")


def _counts(
    path: Path, time_steps: int, step_ms: float, units: int
) -> tuple[Arrays, tuple[str, ...]]:
    counts, size = [], -(-UNITS // units)
    try:
        import h5py

        with h5py.File(path) as opened:
            file: Any = opened
            labels = np.asarray(file["labels"])
            names = [bytes(key).decode() for key in file["extra"].get("keys", ())]
            times, places = file["spikes/times"], file["spikes/units"]
            for when, where in zip(times, places, strict=True):
                # In float16, a product with 1000 would be off by steps.
                step = (when.astype(np.float64) * 1000 / step_ms).astype(int)
                if len(where) and not 0 <= where.min() <= where.max() < UNITS:
                    raise ValueError(f"unit {where.max()} of {UNITS}")
                at = step * size + where.astype(int) // units
                found = np.bincount(at, minlength=(step.max(initial=0) + 1) * size)
                counts.append(np.minimum(found, 255).astype(np.uint8))
    except ImportError as error:
        message = f"{path.stem}: expected the package h5py, got none. pip install h5py"
        raise ValueError(message) from error
    except (OSError, KeyError, ValueError) as error:
        got = " ".join(str(error).split())[:200] if path.exists() else "no such file"
        raise ValueError(
            f"{path.stem}: expected {path} with labels, spikes/times, spikes/units and "
            f"extra, got: {got}. Give --data-dir, and download it: {ADDRESS}"
        ) from error
    names = names or [str(k) for k in range(int(labels.max()) + 1)]
    rows = [row.reshape(-1, size) for row in counts]
    return pad(rows, labels, time_steps), tuple(names)


def mnist_1d(time_steps: int = 40, *, validation: bool = False) -> SequenceSet:
    """Return MNIST-1D: 4,000 and 1,000 made-up digits of 40 values, [T, 1].

    Args:
        time_steps: T.
        validation: test on the last tenth of the train split.

    Raises:
        ValueError: the package mnist1d, which makes them, is not installed.

    Reference: Greydanus and Kobak 2020, arXiv:2011.14439.
    """
    try:
        package: Any = import_module("mnist1d.data")
    except ImportError as error:
        raise ValueError(
            "mnist-1d: expected the package mnist1d, got none. pip install mnist1d"
        ) from error
    made = package.make_dataset(package.get_dataset_args())
    train, test = (
        pad(
            made[f"x{part}"].astype(np.float32)[..., None], made[f"y{part}"], time_steps
        )
        for part in ("", "_test")
    )
    split = "the 1,000 test examples"
    if validation:
        (train, test), split = _last_tenth(train), "the last tenth of the train split"
    return SequenceSet(train, test, tuple("0123456789"), split)


def _last_tenth(train: Arrays) -> tuple[Arrays, Arrays]:
    cut, parts = len(train) * 9 // 10, vars(train).values()
    return Arrays(*(part[:cut] for part in parts)), Arrays(*(p[cut:] for p in parts))
