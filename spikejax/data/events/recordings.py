"""Recordings of event cameras from files, in one structured form.

A corrupted file is a ValueError of one line. docs/events.md lists the formats.
"""

import os
import tokenize
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from spikejax.data import split
from spikejax.data.events import aedat, prophesee, tables
from spikejax.data.events.columns import (
    Columns,
    CorruptRecording,
    OtherFormat,
    Recording,
    Size,
    Unsorted,
    from_columns,
)

# What struct, numpy, zipfile, XML and LZ4 (RuntimeError) raise on damaged bytes, found
# by fuzzing: 2,500 inputs per format raised nothing else.
DAMAGE = (*split.DAMAGE, ArithmeticError, MemoryError, SyntaxError, TypeError)
DAMAGE += (tokenize.TokenError,)

READERS: dict[str, Callable[[bytes], Columns]] = {
    ".aedat": aedat.read_aedat,
    ".aedat4": aedat.read_aedat4,
    ".raw": prophesee.read_raw,
    ".dat": prophesee.read_dat,
    ".bin": tables.read_nmnist,
    ".npz": tables.read_npz,
    ".npy": tables.read_gesture,
    ".txt": tables.read_text,
    ".csv": tables.read_text,
    ".h5": tables.read_hdf5,
    ".hdf5": tables.read_hdf5,
}


def read(path: str | os.PathLike[str], *, sort: bool = False) -> Recording:
    """Read the recording in a file, whose suffix names the format.

    Args:
        path: a file .aedat (AEDAT 2 of a DVS128, a DAVIS or v2e, 3.1, 4), .aedat4, .raw
            (EVT 2.0, 2.1, 3.0), .dat, .bin (N-MNIST; N-Caltech101 where the name begins
            with image_), .npz (arrays x, y, p and t, or dt since the previous event;
            height and width are optional), .npy (Tonic's DVS128 Gesture), .txt or .csv
            (t x y p), .h5 or .hdf5 (Prophesee's, and DSEC's).
        sort: put the events in the order of time; else other files are refused.

    Returns:
        At least one event, as an array of dtype EVENTS with the file's own times.

    Raises:
        ValueError: another format, or a file that is missing, truncated, empty or
            unsorted, or has events outside its camera.
    """
    path = Path(path)
    if not is_recording(path):
        raise ValueError(
            f"recording: expected a file {', '.join(READERS)}, got {path}. "
            "Convert it to npz: np.savez(path, x=x, y=y, t=t, p=p)."
        )
    reader = READERS[path.suffix.lower()]
    # Both sets share a layout, which does not say the size.
    if path.match("image_*.bin"):
        reader = tables.read_ncaltech101
    # NaN and numbers too large for an integer raise here, in place of a warning.
    with naming(path, "whole data"), np.errstate(invalid="raise", over="raise"):
        return from_columns(*reader(path.read_bytes()), sort=sort)


@contextmanager
def naming(path: Path, expected: str) -> Iterator[None]:
    """Turn what damaged bytes raise into a ValueError of one line with the path."""
    try:
        yield
    except DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, CorruptRecording):
            reason = f"expected {expected}, got damaged data ({reason[:160]})"
        hint = "Copy it again, leave it out, or convert another format to npz"
        if isinstance(error, FileNotFoundError):
            reason, hint = "expected a file, got none", "Check its path, or make an npz"
        if isinstance(error, Unsorted):
            hint = "If its camera wrote it so, read it with sort=True (--sort); else "
            hint += "copy it again, or sort it and make an npz"
        if isinstance(error, OtherFormat):
            hint = "Or make an npz of its events"
        raise ValueError(
            f"{path}: {reason}. {hint}: np.savez(path, x=x, y=y, t=t, p=p)."
        ) from error


def is_recording(path: Path) -> bool:
    """Return True if the suffix is that of a format that can be read.

    README.txt and LICENSE.txt are none.
    """
    is_text_about_it = path.stem.lower() in ("readme", "license")
    return path.suffix.lower() in READERS and not is_text_about_it


def extent(events: np.ndarray) -> Size:
    """Return (height, width) of the smallest camera that has all these events."""
    return int(events["y"].max(initial=0)) + 1, int(events["x"].max(initial=0)) + 1
