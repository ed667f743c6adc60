"""Columns of events as they come from a file, checked and joined in one array."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# x to the right, y downwards, t in microseconds, p True where the pixel became
# brighter: the same as tonic.io.events_struct.
EVENTS = np.dtype([("x", np.int16), ("y", np.int16), ("t", np.int64), ("p", np.bool_)])

Size = tuple[int, int]  # (height, width) in pixels

# Bounds of the sizes that a file can ask for. Sensors have up to 1280x960 pixels, and
# EVT has 11 bits per axis; 2**40 microseconds are 12 days.
SIDE = 2048
LONGEST = 2**40
UNPACKED = 2**26  # bytes


class CorruptRecording(ValueError):
    """Bytes that are not events of a format: expected what, got what."""


class OtherFormat(CorruptRecording):
    """A whole file of a format that is not read, and what converts it."""


class Unsorted(CorruptRecording):
    """Events that are whole, and not in the order of time."""


class Recording(NamedTuple):
    """Events in the order of time, and the camera's size if the file says it."""

    events: np.ndarray
    size: Size | None


class Columns(NamedTuple):
    """Columns of the events in a file, not checked, and the camera's size."""

    x: np.ndarray
    y: np.ndarray
    t: np.ndarray
    p: np.ndarray
    size: Size | None = None


def from_columns(
    x: np.ndarray,
    y: np.ndarray,
    t: np.ndarray,
    p: np.ndarray,
    size: Size | None = None,
    *,
    sort: bool = False,
) -> Recording:
    """Return columns of events as a recording, after checking them.

    Args:
        x, y: columns and rows of the pixels, integers [N] with N >= 1.
        t: times in microseconds, which must not fall, over less than 12 days.
        p: polarities, 1 for brighter and 0 or -1 for darker.
        size: (height, width) of the camera, if known.
        sort: put events in the order of time; those of one time keep their order.

    Raises:
        ValueError: no events, columns that are not integers, times that fall, pixels
            outside the size, or other polarities.
    """
    given = [np.asarray(column) for column in (x, y, t, p)]
    if any(column.dtype.kind not in "iub" for column in given):
        raise CorruptRecording(
            "expected integers x, y and p, and t in microseconds, got "
            + ", ".join(str(column.dtype) for column in given)
        )
    if len({column.shape for column in given}) > 1:  # an assignment would broadcast
        raise CorruptRecording(
            "expected as many x as y, t and p, got "
            + ", ".join(str(column.size) for column in given)
        )
    stacked = np.stack(given, dtype=np.int64, casting="same_kind")
    if sort:
        stacked = stacked[:, stacked[2].argsort(kind="stable")]
    x, y, t, p = stacked
    height, width = size or (SIDE, SIDE)
    if not (0 < height <= SIDE and 0 < width <= SIDE):
        raise CorruptRecording(
            f"expected a camera of up to {SIDE}x{SIDE} pixels, got {width}x{height}"
        )
    _check(x, y, t, p, height, width)
    events = np.empty(len(t), EVENTS)
    events["x"], events["y"], events["t"], events["p"] = x, y, t, p > 0
    return Recording(events, size)


def _check(
    x: np.ndarray, y: np.ndarray, t: np.ndarray, p: np.ndarray, height: int, width: int
) -> None:
    """Raise a ValueError for the first event that is not possible, and say why."""
    # Compared, as differences of damaged times can overflow.
    order = "in the order of time"
    outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
    wrong = {
        f"inside a camera {width}x{height}": outside,
        "with polarities -1, 0 or 1": (p < -1) | (p > 1),
        "over less than 12 days": t > t[:1] + LONGEST,
        order: np.append(False, t[1:] < t[:-1])[: len(t)],
    }
    if not len(t):
        raise CorruptRecording("expected at least one event, got no events")
    for what, at in wrong.items():  # sorting does not fix damage, so order comes last
        if at.any():
            n = int(at.argmax())
            got = f"event {n} with x={x[n]}, y={y[n]}, t={t[n]}, p={p[n]}"
            got += f" after t={t[n - 1]}" if n else ""
            kind = Unsorted if what == order else CorruptRecording
            raise kind(f"expected events {what}, got {got}")


def named_columns(
    arrays: Mapping[str, np.ndarray], part: slice = slice(None)
) -> Columns:
    """Return the columns x, y, p and t, or the sum of dt, of a part of named arrays.

    Raises:
        ValueError: one of them is missing.
    """
    times = {"t", "dt"} & set(arrays)
    if not times or not set("xyp") <= set(arrays):
        got = ", ".join(sorted(arrays))[:160]
        raise CorruptRecording(f"expected arrays x, y, p, and t or dt, got {got}")
    x, y, p = (arrays[name][part] for name in "xyp")
    if "t" in times:
        return Columns(x, y, arrays["t"][part], p)
    return Columns(x, y, np.cumsum(arrays["dt"][part], dtype=np.int64), p)


def split(
    data: bytes, header: bytes, words: npt.DTypeLike, expected: str
) -> tuple[str, np.ndarray]:
    """Return the header, which a pattern matches, and the words after it.

    Raises:
        ValueError: another header, or a rest that is not a whole number of words.
    """
    match = re.match(header, data)
    if match is None:
        raise CorruptRecording(f"expected {expected}, got one with {data[:60]!r}")
    # A rest that is not a whole number of words is a ValueError of numpy: truncated.
    return match[0].decode("latin-1"), np.frombuffer(data, words, offset=match.end())


def check_unpacked(size: int, data: bytes) -> None:
    """Check that data takes no more bytes unpacked than events of its length can.

    Raises:
        ValueError: it takes more.
    """
    # Events shrink to a tenth; repeated bytes to a thousandth.
    most = UNPACKED + 32 * len(data)
    if size > most:
        raise CorruptRecording(f"expected up to {most} bytes unpacked, got {size}")
