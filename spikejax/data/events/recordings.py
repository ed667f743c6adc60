"""Recordings of event cameras from files, in one structured form.

AEDAT 2 (DVS128), AEDAT 4, Prophesee EVT 2 and DAT, the .bin of N-MNIST, npz, and the
.npy that Tonic makes of DVS128 Gesture. A corrupted file is a ValueError of one line.
"""

import io
import lzma
import os
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# x to the right, y downwards, t in microseconds, p True where the pixel became
# brighter: the same as tonic.io.events_struct.
EVENTS = np.dtype([("x", np.int16), ("y", np.int16), ("t", np.int64), ("p", np.bool_)])

Size = tuple[int, int]  # (height, width) in pixels
Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # x, y, t and p

# Bounds of the sizes that a file can ask for. Sensors have up to 1280x960 pixels, and
# EVT has 11 bits per axis; 2**40 microseconds are 12 days.
SIDE = 2048
LONGEST = 2**40
UNPACKED = 2**26  # bytes

# Formats that are not read, by the start of their files, and what converts them.
PROPHESEE = "metavision_file_to_dat of Prophesee's OpenEB makes a .dat of it"
OTHERS = {
    rb"(%[^\n]*\n)*?% (evt 3|format EVT3)": ("EVT 3.0", PROPHESEE),
    rb"(%[^\n]*\n)*?% (evt 2\.1|format EVT21)": ("EVT 2.1", PROPHESEE),
    rb"#!AER-DAT3": ("AEDAT 3", "load_aedat_v3 of SpikingJelly reads it"),
    rb"#!AER-DAT1": ("AEDAT 1", "jAER reads it"),
}

# What struct, numpy, zipfile, XML and LZ4 (RuntimeError) raise on damaged bytes, found
# by fuzzing: 2,500 inputs per format raised nothing else.
DAMAGE = (ArithmeticError, EOFError, LookupError, MemoryError, OSError, RuntimeError)
DAMAGE += (SyntaxError, TypeError, ValueError, lzma.LZMAError, struct.error)
DAMAGE += (tokenize.TokenError, zipfile.BadZipFile, zlib.error)


class CorruptRecording(ValueError):
    """Bytes that are not events of a format: expected what, got what."""


class OtherFormat(CorruptRecording):
    """A whole file of a format that is not read, and what converts it."""


class Recording(NamedTuple):
    """Events in the order of time, and the camera's size if the file says it."""

    events: np.ndarray
    size: Size | None


def read(path: str | os.PathLike[str]) -> Recording:
    """Read the recording in a file, whose suffix names the format.

    Args:
        path: a file .aedat (AEDAT 2 of a DVS128, or AEDAT 4), .aedat4, .raw (EVT 2),
            .dat, .bin (N-MNIST), .npz (arrays x, y, p and t, or dt since the previous
            event; height and width are optional) or .npy (Tonic's DVS128 Gesture).

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
    # NaN and numbers too large for an integer raise here, in place of a warning.
    with naming(path, "whole data"), np.errstate(invalid="raise", over="raise"):
        data = path.read_bytes()
        for start, (name, how) in OTHERS.items():
            if re.match(start, data):
                raise OtherFormat(
                    f"expected a format that is read here, got {name}. {how}"
                )
        return READERS[path.suffix.lower()](data)


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
        if isinstance(error, OtherFormat):
            hint = "Or make an npz of its events"
        raise ValueError(
            f"{path}: {reason}. {hint}: np.savez(path, x=x, y=y, t=t, p=p)."
        ) from error


def is_recording(path: Path) -> bool:
    """Return True if the suffix is that of a format that can be read."""
    return path.suffix.lower() in READERS


def extent(events: np.ndarray) -> Size:
    """Return (height, width) of the smallest camera that has all these events."""
    return int(events["y"].max(initial=0)) + 1, int(events["x"].max(initial=0)) + 1


def from_columns(
    x: np.ndarray, y: np.ndarray, t: np.ndarray, p: np.ndarray, size: Size | None = None
) -> Recording:
    """Return columns of events as a recording, after checking them.

    Args:
        x, y: columns and rows of the pixels, integers [N] with N >= 1.
        t: times in microseconds, which must not fall, over less than 12 days.
        p: polarities, 1 for brighter and 0 or -1 for darker.
        size: (height, width) of the camera, if known.

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
    # stack refuses columns of different lengths, which an assignment would broadcast.
    x, y, t, p = np.stack(given, dtype=np.int64, casting="same_kind")
    height, width = size or (SIDE, SIDE)
    if not (0 < height <= SIDE and 0 < width <= SIDE):
        raise CorruptRecording(
            f"expected a camera of up to {SIDE}x{SIDE} pixels, got {width}x{height}"
        )
    # Compared, as differences of damaged times can overflow.
    wrong = np.append(False, t[1:] < t[:-1])[: len(t)] | (t > t[:1] + LONGEST)
    wrong |= (x < 0) | (x >= width) | (y < 0) | (y >= height) | (p < -1) | (p > 1)
    if wrong.any() or not len(t):
        got, n = "no events", int(wrong.argmax()) if len(t) else 0
        if len(t):
            got = f"event {n} with x={x[n]}, y={y[n]}, t={t[n]}, p={p[n]}"
            got += f" after t={t[n - 1]}" if n else ""
        raise CorruptRecording(
            "expected events in the order of time, over less than 12 days, with "
            f"polarities -1, 0 or 1 and inside a camera {width}x{height}, got {got}"
        )
    events = np.empty(len(t), EVENTS)
    events["x"], events["y"], events["t"], events["p"] = x, y, t, p > 0
    return Recording(events, size)


def columns(arrays: Mapping[str, np.ndarray], part: slice = slice(None)) -> Columns:
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
        return x, y, arrays["t"][part], p
    return x, y, np.cumsum(arrays["dt"][part], dtype=np.int64), p


def _split(
    data: bytes, header: bytes, words: npt.DTypeLike, expected: str
) -> tuple[str, np.ndarray]:
    """Return the header, which a pattern matches, and the words after it."""
    match = re.match(header, data)
    if match is None:
        raise CorruptRecording(f"expected {expected}, got one with {data[:60]!r}")
    # A rest that is not a whole number of words is a ValueError of numpy: truncated.
    return match[0].decode("latin-1"), np.frombuffer(data, words, offset=match.end())


def _read_aedat(data: bytes) -> Recording:
    """Read AEDAT 4, or AEDAT 2.0 of a DVS128: big-endian address and microseconds."""
    if data.startswith(b"#!AER-DAT4"):
        return _read_aedat4(data)
    # Tonic 1.7's read_dvs_128 fails on every file: it unpacks two of three values.
    # No address of this camera begins with a "#": its first byte is 0.
    header = rb"#!AER-DAT2\.0[^\n]*\n(?:#[^\n]*\n)*(?!#)"
    pairs = [("address", ">u4"), ("t", ">u4")]
    _, words = _split(data, header, pairs, "a header #!AER-DAT2.0 or #!AER-DAT4.0")
    # Words with bit 15 are marks of a synchronisation cable.
    words = words[words["address"] & 0x8000 == 0]
    address = words["address"].astype(np.int64)
    if len(longer := address[address >> 15 != 0]):
        raise OtherFormat(
            f"expected AEDAT 2 of a DVS128, got the address {longer[0]:#x}: damage, or "
            "another camera, such as a DAVIS. jAER reads it"
        )
    # Both axes of the chip run against those of the picture, and bit 0 is 0 for ON.
    x, y = 127 - (address >> 1 & 127), 127 - (address >> 8)
    return from_columns(x, y, words["t"], 1 - (address & 1), (128, 128))


def _read_evt2(data: bytes) -> Recording:
    """Read EVT 2: 32 bits with 4 bits of kind, then 6 low bits of the time, x and y."""
    # Data can begin with a "%" too. The header ends with "% end" in newer files. Else
    # the fourth byte of a line decides: it is printable, 0x20 to 0x7e, and no word of
    # EVT 2 ends so, as its kind would be 2 to 7.
    header = rb"(?=(?:%[^\n]*\n)*?% (?:evt |format EVT)2(?:\.0)?[;\s])"
    header += rb"(?:%(?! end\r?\n)[^\n]{2}[ -~][^\n]*\n)*(?:% end\r?\n)?"
    lines, words = _split(data, header, "<u4", "a header with '% evt 2.0'")
    kind = words >> 28
    # 0, 1: OFF and ON; 8: high bits of the time; 10, 14, 15: triggers and the camera's
    # own messages. Any other kind is damage, or EVT 3 under a wrong header.
    unknown = np.flatnonzero(~np.isin(kind, (0, 1, 8, 10, 14, 15)))
    if len(unknown):
        n = unknown[0]
        raise CorruptRecording(f"expected EVT 2.0, got the kind {kind[n]} at word {n}")
    words = words.astype(np.int64)
    highs, changes = np.flatnonzero(kind == 8), np.flatnonzero(kind <= 1)
    which = np.searchsorted(highs, changes) - 1
    # The time of events before the first high bits is unknown: they are skipped.
    which, changes = which[which >= 0], changes[which >= 0]
    seen = words[changes]
    t = (words[highs[which]] & 0x0FFFFFFF) << 6 | seen >> 22 & 63
    x, y = seen >> 11 & 2047, seen & 2047
    return from_columns(x, y, t, kind[changes], _size_in_header(lines))


def _read_dat(data: bytes) -> Recording:
    """Read DAT 2: pairs of 32 bits, microseconds and polarity, y and x."""
    # Lines, then the kind of the events (0 or 12: changes of pixels) and their 8 bytes.
    header = rb"(?!(?:%[^\n]*\n)*?% Version (?!2\s))(?:%[^\n]*\n)*[\x00\x0c]\x08"
    words = [("t", "<u4"), ("pixel", "<u4")]
    expected = "a DAT file of version 2 and kind 0 or 12"
    lines, words = _split(data, header, words, expected)
    pixel = words["pixel"].astype(np.int64)
    x, y = pixel & 0x3FFF, pixel >> 14 & 0x3FFF
    return from_columns(x, y, words["t"], pixel >> 28 & 1, _size_in_header(lines))


def _size_in_header(lines: str) -> Size | None:
    """Return (height, width) if the lines of a Prophesee file have them."""
    if found := re.search(r"% geometry (\d+)x(\d+)", lines):
        return int(found[2]), int(found[1])
    height = re.search(r"height[= ](\d+)", lines, re.IGNORECASE)
    width = re.search(r"width[= ](\d+)", lines, re.IGNORECASE)
    return (int(height[1]), int(width[1])) if height and width else None


def _read_nmnist(data: bytes) -> Recording:
    """Read 40 bits per event: x, y, polarity, and 23 bits of microseconds."""
    rows = np.frombuffer(data, (np.uint8, 5)).astype(np.int64)
    x, y, first, second, third = rows.T
    overflow = y == 240  # not an event: the clock started again
    t = ((first & 127) << 16 | second << 8 | third) + np.cumsum(overflow) * 2**13
    x, y, t, p = np.stack([x, y, t, first >> 7])[:, ~overflow]
    return from_columns(x, y, t, p, (34, 34))


def arrays_in(data: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of an npz, if they are no larger than its events can be."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        _check_unpacked(sum(part.file_size for part in file.infolist()), data)
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


def _check_unpacked(size: int, data: bytes) -> None:
    # Events shrink to a tenth; repeated bytes to a thousandth.
    most = UNPACKED + 32 * len(data)
    if size > most:
        raise CorruptRecording(f"expected up to {most} bytes unpacked, got {size}")


def _read_npz(data: bytes) -> Recording:
    arrays, size = arrays_in(data), None
    if {"height", "width"} <= set(arrays):
        size = int(arrays["height"]), int(arrays["width"])
    return from_columns(*columns(arrays), size)


def _read_gesture(data: bytes) -> Recording:
    """Read rows x, y, p, and t in milliseconds."""
    rows = np.load(io.BytesIO(data), allow_pickle=False)
    if rows.ndim != 2 or rows.shape[1] != 4 or rows.dtype.kind not in "iuf":
        raise CorruptRecording(
            "expected rows x, y, p, t of DVS128 Gesture as Tonic stores it, got "
            f"{str(rows.dtype)[:80]} {rows.shape}"
        )
    # Times become integers after the multiplication, as in Tonic: they have fractions.
    x, y, p, t = (rows * (1, 1, 1, 1000)).astype(np.int64).T
    return from_columns(x, y, t, p, (128, 128))


# AEDAT 4: packets of flatbuffers. Read here, as a damaged file makes the package aedat,
# which Tonic calls, end the whole process.

_PACKED = [("t", "<i8"), ("x", "<i2"), ("y", "<i2"), ("p", "u1"), ("padding", "V3")]


def _read_aedat4(data: bytes) -> Recording:
    """Read the events of the stream of events in the file."""
    line, _ = _split(data, rb"#!AER-DAT4\.0\r\n", np.uint8, "a header #!AER-DAT4.0")
    header = _Table(data[len(line) :])
    compression, end = header.number(0, "<i4"), header.number(1, "<i8")
    if end <= 0:  # the recorder was stopped before it wrote the table at the end
        end = len(data)
    stream, size = _event_stream(header.vector(2, np.uint8).tobytes().decode())
    position, packets, unpacked = len(line) + header.size, [np.empty(0, _PACKED)], 0
    while position < end:
        # frombuffer refuses a packet that is longer than the rest of the file.
        number, length = np.frombuffer(data, "<u4", 2, position).tolist()
        packet = np.frombuffer(data, np.uint8, length, position + 8)
        position += 8 + length
        if number == stream:
            table = _Table(_decompress(packet.tobytes(), compression))
            packets.append(table.vector(0, _PACKED))
            unpacked += len(table.data)
            _check_unpacked(unpacked, data)
    e = np.concatenate(packets)
    return from_columns(e["x"], e["y"], e["t"], e["p"], size)


def _event_stream(xml: str) -> tuple[int, Size]:
    """Return number and camera size of the stream of events in the header."""
    from xml.etree import ElementTree

    nodes = ElementTree.fromstring(xml).iterfind("node[@name='outInfo']/node")
    kind = "attr[@key='typeIdentifier']"
    streams = [node for node in nodes if node.findtext(kind) == "EVTS"]
    if len(streams) != 1:
        names = ", ".join(node.attrib["name"] for node in streams)
        raise OtherFormat(
            f"expected one stream of events, got {len(streams)} ({names or 'none'}). "
            "The package aedat reads each: its packets have a stream_id"
        )
    path = "node[@name='info']/attr[@key='size{}']"
    height, width = (int(streams[0].findtext(path.format(axis)) or "") for axis in "YX")
    return int(streams[0].attrib["name"]), (height, width)


def _decompress(packet: bytes, compression: int) -> bytes:
    """Return the packet before compression by 1, 2: LZ4 or 3, 4: Zstandard."""
    if compression in (1, 2):
        import lz4.frame

        unpacker = lz4.frame.LZ4FrameDecompressor()
        unpacked = unpacker.decompress(packet, UNPACKED)
        if not unpacker.eof:
            got = "a part, or more"
            raise CorruptRecording(f"expected LZ4 of up to {UNPACKED} bytes, got {got}")
        return unpacked
    if compression in (3, 4):
        import zstandard

        try:
            # Not decompress: packets do not say how long they were.
            return zstandard.ZstdDecompressor().stream_reader(packet).read(UNPACKED)
        except zstandard.ZstdError as error:
            raise CorruptRecording(f"expected Zstandard, got: {error}") from error
    return packet  # of an unknown compression: not a table


class _Table:
    """Root table of a flatbuffer that begins with its length."""

    def __init__(self, data: bytes):
        self.data = data
        self.size = 4 + self._scalar("<u4", 0)
        self.start = 4 + self._scalar("<u4", 4)
        self.fields = self.start - self._scalar("<i4", self.start)

    def number(self, field: int, kind: str) -> int:
        """Return the number in a field, 0 if the field is left out."""
        at = self._place(field)
        return self._scalar(kind, at) if at else 0

    def vector(self, field: int, dtype: npt.DTypeLike) -> np.ndarray:
        """Return the array in a field, empty if the field is left out."""
        at = self._place(field)
        if not at:
            return np.empty(0, dtype)
        at += self._scalar("<u4", at)
        return np.frombuffer(self.data, dtype, self._scalar("<u4", at), at + 4)

    def _place(self, field: int) -> int:
        entry = 4 + 2 * field
        if entry >= self._scalar("<u2", self.fields):
            return 0
        offset = self._scalar("<u2", self.fields + entry)
        return self.start + offset if offset else 0

    def _scalar(self, kind: str, at: int) -> int:
        # frombuffer, unlike struct, refuses offsets below 0.
        return int(np.frombuffer(self.data, kind, 1, at)[0])


READERS: dict[str, Callable[[bytes], Recording]] = {
    ".aedat": _read_aedat,
    ".aedat4": _read_aedat4,
    ".raw": _read_evt2,
    ".dat": _read_dat,
    ".bin": _read_nmnist,
    ".npz": _read_npz,
    ".npy": _read_gesture,
}
