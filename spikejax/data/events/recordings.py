"""Recordings of event cameras from files, in one structured form.

AEDAT 2 (DVS128), AEDAT 4, Prophesee EVT 2 and DAT, the .bin of N-MNIST, npz, and the
.npy that Tonic makes of DVS128 Gesture. A damaged file is a ValueError of one line.
"""

import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spikejax.data.events.aedat4 import Damaged, Events, read_aedat4

# x to the right, y downwards, t in microseconds, p True where it became brighter: the
# same as tonic.io.events_struct.
EVENTS = np.dtype([("x", np.int16), ("y", np.int16), ("t", np.int64), ("p", np.bool_)])

Size = tuple[int, int]  # (height, width) in pixels


class Recording(NamedTuple):
    """Events in the order of their times, and the camera's size if the file says it."""

    events: np.ndarray
    size: Size | None


def read(path: str | os.PathLike[str]) -> Recording:
    """The recording in a file, of the format that its suffix says.

    Args:
        path: a file .aedat (AEDAT 2 of a DVS128, or AEDAT 4), .aedat4, .raw (EVT 2),
            .dat, .bin (N-MNIST), .npz (arrays x, y, p and t, or dt since the event
            before; height and width are optional) or .npy (Tonic's DVS128 Gesture).

    Returns:
        At least one event, as an array of dtype EVENTS with the file's own times.

    Raises:
        ValueError: another format, or a file that is truncated, empty, unsorted, or has
            events outside of its camera.
    """
    path = Path(path)
    if not is_recording(path):
        raise ValueError(
            f"recording: expected a file {', '.join(READERS)}, got {path}. "
            "Convert it to npz: np.savez(path, x=x, y=y, t=t, p=p)."
        )
    if not path.is_file():
        raise ValueError(f"recording: expected a file, got none at {path}.")
    data = path.read_bytes()
    try:
        if not data:
            raise Damaged("expected events, got an empty file")
        return checked(*READERS[path.suffix.lower()](data))
    except ImportError:  # lz4 or zstandard, of the extra events
        raise
    except Exception as error:  # of many kinds: struct, zip, XML, memory
        reason = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, Damaged):
            reason = f"expected whole data, got damaged data ({reason[:160]})"
        raise ValueError(
            f"{path}: {reason}. Mend it, copy it again, or leave it out."
        ) from error


def is_recording(path: Path) -> bool:
    """Whether the name ends as one of the formats that can be read."""
    return path.suffix.lower() in READERS


def extent(events: np.ndarray) -> Size:
    """(height, width) of the smallest camera that could have seen these events."""
    return int(events["y"].max(initial=0)) + 1, int(events["x"].max(initial=0)) + 1


def checked(x, y, t, p, size: Size | None = None) -> Recording:
    """The columns [N] of N >= 1 events as a recording, once they are known to be sound.

    Raises:
        ValueError: no events, times that fall, or pixels outside of the size.
    """
    if not len(x) == len(y) == len(t) == len(p):
        lengths = f"{len(x)}, {len(y)}, {len(t)} and {len(p)}"
        raise Damaged(f"expected x, y, t and p of one length, got {lengths}")
    if not len(t):
        raise Damaged("expected events, got an empty recording")
    t = np.asarray(t).astype(np.int64)
    late = np.flatnonzero(t[1:] < t[:-1])
    if len(late):
        n = int(late[0])
        raise Damaged(
            f"expected times that do not fall, got {t[n]} and then {t[n + 1]} us at "
            f"event {n + 1}: it is unsorted, or its clock ran over"
        )
    height, width = size or (2**15, 2**15)
    outside = np.flatnonzero((x < 0) | (x >= width) | (y < 0) | (y >= height))
    if len(outside):
        n = int(outside[0])
        raise Damaged(
            f"expected pixels of a camera {width}x{height}, got x={x[n]}, y={y[n]} at "
            f"event {n}, out of range"
        )
    events = np.empty(len(t), EVENTS)
    events["x"], events["y"], events["t"], events["p"] = x, y, t, p
    return Recording(events, size)


def _words(data: bytes, start: int, dtype: Any) -> np.ndarray:
    """The rest of the file as whole words of that type."""
    dtype = np.dtype(dtype)
    rest = len(data) - start
    if rest % dtype.itemsize:
        raise Damaged(
            f"expected events of {dtype.itemsize} bytes each, got {rest} bytes after "
            f"the header, {rest % dtype.itemsize} too many: it is truncated"
        )
    return np.frombuffer(data, dtype, offset=start)


def _header(data: bytes, mark: bytes) -> tuple[str, int]:
    """The lines at the start that begin with that mark, and where they end."""
    end = 0
    while data[end : end + 1] == mark:
        newline = data.find(b"\n", end)
        if newline < 0:
            raise Damaged("expected a header of lines, got one without an end")
        end = newline + 1
    return data[:end].decode("latin-1"), end


def _read_aedat(data: bytes) -> Events:
    """AEDAT 2.0 of a DVS128, as jAER writes it, or AEDAT 4."""
    version = re.match(rb"#!AER-DAT(\d+\.\d+)", data)
    if version is None or version[1] not in (b"2.0", b"4.0"):
        found = f"version {version[1].decode()}" if version else "no such first line"
        raise Damaged(f"expected the first line #!AER-DAT2.0 or 4.0, got {found}")
    return _read_aedat2(data) if version[1] == b"2.0" else read_aedat4(data)


def _read_aedat2(data: bytes) -> Events:
    """Big-endian pairs of 32 bits, address and microseconds."""
    header, start = _header(data, b"#")
    chip = re.search(r"AEChip: *(\S+)", header)
    if chip and not chip[1].endswith("DVS128"):
        raise Damaged(f"expected a recording of a DVS128, got one of {chip[1]}")
    words = _words(data, start, [("address", ">u4"), ("t", ">u4")])
    address = words["address"].astype(np.int64)
    if (address >> 16).any():
        bad = int(address[np.flatnonzero(address >> 16)[0]])
        raise Damaged(
            f"expected DVS128 addresses of 16 bits, got {bad:#x}, out of range"
        )
    seen = address & 0x8000 == 0  # the others are marks from a synchronisation cable
    address, t = address[seen], words["t"][seen]
    # Both axes of the chip run against those of the picture.
    x, y = 127 - (address >> 1 & 127), 127 - (address >> 8 & 127)
    return Events(x, y, t, address & 1, (128, 128))


def _read_evt2(data: bytes) -> Events:
    """Words of 32 bits: kind in 4 bits, then low 6 bits of the time, x and y; or high
    28 bits of the time."""
    header, start = _header(data, b"%")
    version = re.search(r"% (?:evt |format EVT)(\d\S*)", header)
    if version is None or re.fullmatch(r"2(\.0)?(;.*)?", version[1]) is None:
        found = f"EVT {version[1]}" if version else "no line that says so"
        raise Damaged(f"expected a header with '% evt 2.0', got {found}")
    words = _words(data, start, "<u4")
    kind = words >> 28
    unknown = np.flatnonzero(~np.isin(kind, (0, 1, 8, 10, 14, 15)))
    if len(unknown):
        raise Damaged(
            f"expected words of EVT 2.0, got the kind {kind[unknown[0]]} at word "
            f"{unknown[0]}"
        )
    highs = np.flatnonzero(kind == 8)
    changes = np.flatnonzero(kind <= 1)
    first = highs[0] if len(highs) else len(words)
    changes = changes[changes > first]  # no time is known before
    which = np.searchsorted(highs, changes) - 1
    high = (words[highs] & 0x0FFFFFFF).astype(np.int64)[which]
    seen = words[changes].astype(np.int64)
    t = high << 6 | seen >> 22 & 63
    return Events(
        seen >> 11 & 2047, seen & 2047, t, kind[changes], _size_in_header(header)
    )


def _read_dat(data: bytes) -> Events:
    """Pairs of 32 bits: microseconds, and y << 14 | x with the polarity on top."""
    header, start = _header(data, b"%")
    version = re.search(r"% Version (\d+)", header)
    if version and version[1] != "2":
        raise Damaged(f"expected a DAT file of version 2, got {version[1]}")
    if len(data) < start + 2:
        raise Damaged("expected the kind of events after the header, got the end")
    kind, itemsize = data[start], data[start + 1]
    if kind not in (0, 12) or itemsize != 8:
        raise Damaged(
            f"expected changes of pixels (kind 0 or 12) of 8 bytes, got kind {kind} of "
            f"{itemsize} bytes"
        )
    words = _words(data, start + 2, [("t", "<u4"), ("pixel", "<u4")])
    pixel = words["pixel"].astype(np.int64)
    x, y = pixel & 0x3FFF, pixel >> 14 & 0x3FFF
    return Events(x, y, words["t"], pixel >> 28 & 1, _size_in_header(header))


def _size_in_header(header: str) -> Size | None:
    """(height, width) where the lines of a Prophesee file say them."""
    if found := re.search(r"% geometry (\d+)x(\d+)", header):
        return int(found[2]), int(found[1])
    height = re.search(r"height[= ](\d+)", header, re.IGNORECASE)
    width = re.search(r"width[= ](\d+)", header, re.IGNORECASE)
    return (int(height[1]), int(width[1])) if height and width else None


def _read_nmnist(data: bytes) -> Events:
    """40 bits: x, y, polarity, and 23 bits of microseconds."""
    rows = _words(data, 0, (np.uint8, 5)).astype(np.int64)
    x, y, first, second, third = rows.T
    t = (first & 127) << 16 | second << 8 | third
    runs_over = y == 240  # no event: the clock began again
    t = t + np.cumsum(runs_over) * 2**13
    seen = ~runs_over
    return Events(x[seen], y[seen], t[seen], first[seen] >> 7, (34, 34))


def _read_npz(data: bytes) -> Events:
    """Arrays x, y, p and t, or dt; height and width if they are there."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        names = set(arrays.files)
        if not {"x", "y", "p"} <= names or not names & {"t", "dt"}:
            raise Damaged(
                "expected arrays x, y, p and t (or dt, since the event before), got "
                f"{', '.join(sorted(names)) or 'none'}"
            )
        time = "t" if "t" in names else "dt"
        columns = [_column(arrays[name], name) for name in ("x", "y", time, "p")]
        size = None
        if {"height", "width"} <= names:
            size = int(arrays["height"]), int(arrays["width"])
    x, y, t, p = columns
    return Events(x, y, np.cumsum(t) if time == "dt" else t, p, size)


def _column(values: np.ndarray, name: str) -> np.ndarray:
    """A row of whole numbers, as int64; a p may be of booleans, or of -1 and 1."""
    if values.ndim != 1 or values.dtype.kind not in "iub":
        raise Damaged(
            f"expected {name} as a row of whole numbers (t in microseconds), got "
            f"{values.dtype} of shape {values.shape}"
        )
    return values > 0 if name == "p" else values.astype(np.int64)


def _read_gesture(data: bytes) -> Events:
    """Rows x, y, p, and t in milliseconds."""
    rows = np.load(io.BytesIO(data), allow_pickle=False)
    if rows.ndim != 2 or rows.shape[1] != 4:
        raise Damaged(f"expected rows of x, y, p and t, got shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise Damaged("expected whole numbers, got some that are not finite")
    x, y, p, t = rows.T.astype(np.int64)
    return Events(x, y, t * 1000, p > 0, (128, 128))


READERS: dict[str, Callable[[bytes], Events]] = {
    ".aedat": _read_aedat,
    ".aedat4": read_aedat4,
    ".raw": _read_evt2,
    ".dat": _read_dat,
    ".bin": _read_nmnist,
    ".npz": _read_npz,
    ".npy": _read_gesture,
}
