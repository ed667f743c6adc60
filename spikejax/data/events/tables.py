"""Recordings as tables: npz, npy, the .bin of N-MNIST, text, and HDF5."""

import contextlib
import importlib
import io
import math
import re
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np

from spikejax.data.events.columns import (
    Columns,
    CorruptRecording,
    OtherFormat,
    check_unpacked,
    named_columns,
)

if TYPE_CHECKING:
    import h5py

# Names of columns of text, up to a "_": timestamp_us is a timestamp.
NAMES = {"x": "x", "y": "y", "p": "p", "pol": "p", "polarity": "p"}
NAMES |= dict.fromkeys(("t", "ts", "time", "timestamp"), "t")

# HDF5's numbers of filters, and where they come from.
PLUGINS = {
    32001: "Blosc, which pip install hdf5plugin brings",
    36559: "ECF, Prophesee's hdf5_ecf, whose folder belongs in HDF5_PLUGIN_PATH",
}


def arrays_in(data: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of an npz, if they are no larger than its events can be."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        check_unpacked(sum(part.file_size for part in file.infolist()), data)
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


def read_npz(data: bytes) -> Columns:
    """Read arrays x, y, p, and t or dt, with the camera's height and width if given."""
    arrays, size = arrays_in(data), None
    if {"height", "width"} <= set(arrays):
        size = int(arrays["height"]), int(arrays["width"])
    return named_columns(arrays)._replace(size=size)


def read_gesture(data: bytes) -> Columns:
    """Read rows x, y, p, and t in milliseconds, as Tonic stores DVS128 Gesture.

    Raises:
        ValueError: another array.
    """
    rows = np.load(io.BytesIO(data), allow_pickle=False)
    if rows.ndim != 2 or rows.shape[1] != 4 or rows.dtype.kind not in "iuf":
        raise CorruptRecording(
            "expected rows x, y, p, t of DVS128 Gesture as Tonic stores it, got "
            f"{str(rows.dtype)[:80]} {rows.shape}"
        )
    # Times become integers after the multiplication, as in Tonic: they have fractions.
    x, y, p, t = (rows * (1, 1, 1, 1000)).astype(np.int64).T
    return Columns(x, y, t, p, (128, 128))


def read_ncaltech101(data: bytes) -> Columns:
    """Read 40 bits per event: x, y, polarity, and 23 bits of microseconds."""
    rows = np.frombuffer(data, (np.uint8, 5)).astype(np.int64)
    x, y, first, second, third = rows.T
    overflow = y == 240  # not an event: the clock started again
    t = ((first & 127) << 16 | second << 8 | third) + np.cumsum(overflow) * 2**13
    x, y, t, p = np.stack([x, y, t, first >> 7])[:, ~overflow]
    return Columns(x, y, t, p)


def read_nmnist(data: bytes) -> Columns:
    """Read the same of N-MNIST, whose recordings are cut to the digit."""
    return read_ncaltech101(data)._replace(size=(34, 34))


def read_text(data: bytes) -> Columns:
    """Read lines t x y p, or columns that the first line names.

    A time with a decimal point is in seconds, a whole number in microseconds. Of the
    RPG's and E2VID's files the first line can be the width and height, of Prophesee's
    it is %geometry, before x, y, p, t.

    Raises:
        ValueError: other columns, or fractions that are not seconds.
    """
    text, size, order, skip = data.decode("ascii"), None, list("txyp"), 0
    for number, line in enumerate(io.StringIO(text)):
        fields = re.split(r"[\s,;]+", line.strip())
        if fields == [""] or fields[0].startswith("#"):
            continue
        if found := re.match(r"%geometry:(\d+)[,x](\d+)", line):
            size, order = (int(found[2]), int(found[1])), list("xypt")
        elif len(fields) == 2:
            size = int(fields[1]), int(fields[0])
        elif re.match(r'["A-Za-z]', line):
            names = (field.strip('"').lower().split("_")[0] for field in fields)
            order = [NAMES.get(name, "") for name in names]
        else:
            break
        skip = number + 1
    else:
        none = np.empty(0, np.int64)
        return Columns(none, none, none, none)
    if not set("txyp") <= set(order) or len(fields) < len(order):
        raise CorruptRecording(
            "expected lines of t, x, y and p, or a first line that names them, got "
            f"{line[:60]!r}"
        )
    separator = next((sign for sign in ",;" if sign in line), None)
    places = [order.index(name) for name in "xytp"]
    # With dtype int, loadtxt would cut off fractions.
    rows = np.loadtxt(
        io.StringIO(text), delimiter=separator, skiprows=skip, usecols=places, ndmin=2
    )
    if re.search("[.eE]", fields[places[2]]):
        rows[:, 2] = np.rint(rows[:, 2] * 1e6)
    if (rows != np.rint(rows)).any():
        raise CorruptRecording("expected whole numbers x, y and p, and t in one unit")
    x, y, t, p = rows.T.astype(np.int64)
    return Columns(x, y, t, p, size)


def read_hdf5(data: bytes) -> Columns:
    """Read CD/events of Prophesee, or events/x, y, p, t, after t_offset, of DSEC.

    Raises:
        ValueError: other data sets, or a filter that is not installed.
    """
    import h5py

    with contextlib.suppress(ImportError):
        importlib.import_module("hdf5plugin")  # its filters are there from then on
    # Attributes stay closed, the camera's size with them: HDF5 never returns from a
    # damaged heap of strings.
    with h5py.File(io.BytesIO(data), "r") as file:
        if "CD/events" in file:
            rows = _dataset(file, "CD/events", data)
            return Columns(rows["x"], rows["y"], rows["t"], rows["p"])
        names = [f"events/{name}" for name in "xytp" if f"events/{name}" in file]
        if len(names) < 4:
            raise CorruptRecording(
                f"expected CD/events, or events/x, y, t and p, got {list(file)[:9]}"
            )
        x, y, t, p = (_dataset(file, name, data) for name in names)
        if "t_offset" in file:
            t = t.astype(np.int64) + int(_dataset(file, "t_offset", data))
        return Columns(x, y, t, p)


def _dataset(file: "h5py.File", name: str, data: bytes) -> np.ndarray:
    import h5py

    item: Any = file[name]
    # Data outside of the file could be any that this process can read.
    inside = isinstance(item, h5py.Dataset) and item.file == file
    if not inside or item.external or item.is_virtual or item.dtype.hasobject:
        raise CorruptRecording(f"expected numbers in the file, got others in {name}")
    made: Any = item.id.get_create_plist()
    for n in range(made.get_nfilters()):
        if not h5py.h5z.filter_avail(number := made.get_filter(n)[0]):
            raise OtherFormat(
                f"expected a filter of HDF5 that is installed, got number {number}: "
                f"{PLUGINS.get(number, 'hdfgroup.org lists it')}"
            )
    # A chunk is read as a whole.
    chunk = math.prod(item.chunks or (0,)) * item.dtype.itemsize
    check_unpacked(max(item.nbytes, chunk), data)
    return item[()]
