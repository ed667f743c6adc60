"""AEDAT 4, the format of iniVation's cameras: packets of flatbuffers, compressed.

Read here, as a damaged file makes the package aedat end the whole process.
"""

import struct
from typing import NamedTuple

import numpy as np


class Damaged(ValueError):
    """What is wrong with a recording: expected what, got what."""


_PACKED = np.dtype(
    {
        "names": ["t", "x", "y", "p"],
        "formats": ["<i8", "<i2", "<i2", "u1"],
        "offsets": [0, 8, 10, 12],
        "itemsize": 16,
    }
)


class Events(NamedTuple):
    """Columns of events, and (height, width) of the camera if the file says it."""

    x: np.ndarray
    y: np.ndarray
    t: np.ndarray
    p: np.ndarray
    size: tuple[int, int] | None = None


def read_aedat4(data: bytes) -> Events:
    """The events of the first stream of events in the file with these bytes.

    Raises:
        Damaged, or what struct, XML or decompression raise.
    """
    start = len(b"#!AER-DAT4.0\r\n")
    if data[:start] != b"#!AER-DAT4.0\r\n":
        raise Damaged("expected the first line #!AER-DAT4.0, got another")
    header = _Table(data[start : start + 4 + _number(data, start, "<I")])
    compression = header.number(0, "<i", 0)
    end = header.number(1, "<q", -1)
    if end < 0:  # the recorder was stopped before it wrote the table at the end
        end = len(data)
    if end > len(data):
        raise Damaged(
            f"expected its table at byte {end}, got {len(data)} bytes: it is truncated"
        )
    stream, size = _event_stream(header.text(2))
    position, packets = start + len(header.data), []
    while position < end:
        stream_id, length = struct.unpack_from("<ii", data, position)
        position += 8
        if length < 0 or position + length > end:
            raise Damaged(
                f"expected a packet of {length} bytes at byte {position}, got "
                f"{end - position}: it is truncated"
            )
        if stream_id == stream:
            packet = _decompress(data[position : position + length], compression)
            packets.append(_Table(packet).structs(0, _PACKED))
        position += length
    events = np.concatenate([np.empty(0, _PACKED), *packets])
    return Events(events["x"], events["y"], events["t"], events["p"] != 0, size)


def _event_stream(xml: str) -> tuple[int, tuple[int, int]]:
    """Number and camera size of the first stream of events that the header lists."""
    from xml.etree import ElementTree

    for node in ElementTree.fromstring(xml).iterfind("node[@name='outInfo']/node"):
        if node.findtext("attr[@key='typeIdentifier']") == "EVTS":
            width, height = (
                int(node.findtext(f"node[@name='info']/attr[@key='{key}']") or "")
                for key in ("sizeX", "sizeY")
            )
            return int(node.attrib["name"]), (height, width)
    raise Damaged("expected a stream of events, got a header without one")


def _decompress(packet: bytes, compression: int) -> bytes:
    """The packet as it was before 1, 2: LZ4 or 3, 4: Zstandard."""
    if compression in (1, 2):
        import lz4.frame

        return lz4.frame.decompress(packet)
    if compression in (3, 4):
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj().decompress(packet)
    if compression:
        raise Damaged(f"expected no compression, LZ4 or Zstandard, got {compression}")
    return packet


def _number(data: bytes, at: int, kind: str) -> int:
    return struct.unpack_from(kind, data, at)[0]


class _Table:
    """The root table of a flatbuffer that begins with its length."""

    def __init__(self, data: bytes):
        self.data = data
        self.start = 4 + _number(data, 4, "<I")
        self.fields = self.start - _number(data, self.start, "<i")
        if self.fields < 0 or 4 + _number(data, 0, "<I") > len(data):
            raise Damaged("expected a whole table, got a part of it: it is truncated")

    def number(self, field: int, kind: str, missing: int) -> int:
        """The field of that number."""
        at = self._place(field)
        return _number(self.data, at, kind) if at else missing

    def text(self, field: int) -> str:
        """The field as text."""
        return self._vector(field, 1).decode()

    def structs(self, field: int, dtype: np.dtype) -> np.ndarray:
        """The field as an array."""
        return np.frombuffer(self._vector(field, dtype.itemsize), dtype)

    def _place(self, field: int) -> int:
        """Where the field is; 0 where it is left out."""
        if 4 + 2 * field >= _number(self.data, self.fields, "<H"):
            return 0
        offset = _number(self.data, self.fields + 4 + 2 * field, "<H")
        return self.start + offset if offset else 0

    def _vector(self, field: int, itemsize: int) -> bytes:
        at = self._place(field)
        if not at:
            return b""
        at += _number(self.data, at, "<I")
        stop = at + 4 + _number(self.data, at, "<I") * itemsize
        if stop > len(self.data):
            raise Damaged("expected a whole packet, got a part of it: it is truncated")
        return self.data[at + 4 : stop]
