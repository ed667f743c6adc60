"""AEDAT, the recordings of iniVation's cameras and of jAER: versions 2, 3.1 and 4.

Read here: Tonic 1.7's read_dvs_128 fails on every file, as it unpacks two of three
values, and a damaged AEDAT 4 file makes the package aedat, which Tonic calls, end the
whole process. For 3.1 and the DAVIS no kept package was found.

Reference: docs.inivation.com, "AEDAT File Formats"; jAER's DVS128 and DavisBaseCamera.
"""

import re

import numpy as np
import numpy.typing as npt

from spikejax.data.events.columns import (
    UNPACKED,
    Columns,
    CorruptRecording,
    OtherFormat,
    Size,
    check_unpacked,
    split,
)

CAMERAS = {  # (height, width)
    "DVS128": (128, 128),
    "DAVIS240": (180, 240),
    "DAVIS346": (260, 346),
    "DAVIS640": (480, 640),
}


def read_aedat(data: bytes) -> Columns:
    """Read AEDAT of the version in the first line.

    Raises:
        ValueError: another version or camera, or damaged packets.
    """
    found = re.match(rb"#!AER-DAT([\d.]+)", data)
    version = found[1].decode() if found else "none"
    readers = {"2.0": _aedat2, "3.1": _aedat3, "4.0": read_aedat4}
    if version in readers:
        return readers[version](data)
    expected = "a header #!AER-DAT2.0, #!AER-DAT3.1 or #!AER-DAT4.0"
    if found:
        raise OtherFormat(f"expected {expected}, got AEDAT {version}. jAER reads it")
    raise CorruptRecording(f"expected {expected}, got one with {data[:60]!r}")


def _camera(line: str) -> str | None:
    """Return the name in CAMERAS of the camera that a line of a header names."""
    found = re.search("|".join(CAMERAS), line.upper())
    return found[0] if found else None


# AEDAT 2: big-endian pairs of address and microseconds.


def _aedat2(data: bytes) -> Columns:
    """Read AEDAT 2 of a DVS128, a DAVIS, or v2e."""
    # A line has no byte 0, and a first event of a DAVIS may begin with a "#": its time,
    # if not its address, has one in the first 16 s. New files say where the lines end.
    end = rb" ?End [Oo]f ASCII Header"
    header = rb"#!AER-DAT2\.0[^\n]*\n(?:#(?!%b)[^\n\0]*\n)*(?:#%b[^\n]*\n)?"
    pairs = [("address", ">u4"), ("t", ">u4")]
    lines, words = split(data, header % (end, end), pairs, "AEDAT 2")
    chip = re.search(r"AEChip: ([^\r\n]*)", lines)
    camera = _camera(chip[1]) if chip else None
    if (camera or "DVS128") != "DVS128" or "AEDat2Output in v2e" in lines:
        return _davis(words, camera)
    # Words with bit 15 are marks of a synchronisation cable.
    words = words[words["address"] & 0x8000 == 0]
    address = words["address"].astype(np.int64)
    if len(longer := address[address >> 15 != 0]):
        raise OtherFormat(
            f"expected AEDAT 2 of a DVS128, or a line '# AEChip: DAVIS346' or another "
            f"of {', '.join(CAMERAS)}, got the address {longer[0]:#x}: damage, or "
            "another camera. jAER reads it"
        )
    # Both axes of the chip run against those of the picture, and bit 0 is 0 for ON.
    x, y = 127 - (address >> 1 & 127), 127 - (address >> 8)
    return Columns(x, y, words["t"], 1 - (address & 1), CAMERAS["DVS128"])


def _davis(words: np.ndarray, camera: str | None) -> Columns:
    # Bit 31: a pixel of a frame or a sample of the IMU; bit 10: a signal from outside.
    words = words[words["address"] & 0x80000400 == 0]
    address = words["address"].astype(np.int64)
    x, y = address >> 12 & 1023, address >> 22 & 511
    if camera is None:  # v2e does not say it: the smallest that has all events
        sizes = (CAMERAS[name] for name in ("DAVIS240", "DAVIS346", "DAVIS640"))
        top, right = int(y.max(initial=0)), int(x.max(initial=0))
        size = next(((h, w) for h, w in sizes if top < h and right < w), (480, 640))
    else:
        size = CAMERAS[camera]
    # jAER mirrors x too; v2e writes it so.
    return Columns(
        size[1] - 1 - x, size[0] - 1 - y, words["t"], address >> 11 & 1, size
    )


# AEDAT 3.1: little-endian packets of one kind of events each.

_HEAD = np.dtype(
    [("kind", "<i2"), ("source", "<i2"), ("size", "<u4"), ("offset", "<u4")]
    + [(name, "<u4") for name in ("overflow", "capacity", "number", "valid")]
)
_POLARITY = 1


def _aedat3(data: bytes) -> Columns:
    """Read AEDAT 3.1: y of 15 bits from bit 2 on, x from 17; bit 1 is 1 for ON."""
    header = rb"#!AER-DAT3\.1\r?\n#Format: RAW\r?\n(?:#[^\n]*\n)*?#!END-HEADER\r?\n"
    lines, body = split(data, header, np.uint8, "a whole header of AEDAT 3.1, RAW")
    pairs, position = [("word", "<u4"), ("t", "<i4")], 0
    packets, times, sources = [np.empty(0, pairs)], [np.empty(0, np.int64)], set()
    while position < len(body):
        # frombuffer refuses a packet that is longer than the rest of the file.
        head = np.frombuffer(body, _HEAD, 1, position)[0]
        size, capacity, number = (int(head[n]) for n in ("size", "capacity", "number"))
        position += _HEAD.itemsize
        np.frombuffer(body, np.uint8, capacity * size, position)
        if head["kind"] == _POLARITY:
            if size != 8 or number > capacity:
                raise CorruptRecording(
                    f"expected events of 8 bytes, up to {capacity} in a packet, got "
                    f"{number} of {size} bytes"
                )
            packet = np.frombuffer(body, pairs, number, position)
            sources.add(int(head["source"]))
            packets.append(packet)
            # 31 bits of the time run over every 36 minutes.
            times.append(packet["t"] + (head["overflow"].astype(np.int64) << 31))
        position += capacity * size
    if len(sources) > 1:
        raise OtherFormat(f"expected events of one camera, got those of {sources}")
    word, t = np.concatenate(packets)["word"].astype(np.int64), np.concatenate(times)
    whole = word & 1 == 1  # not marked as invalid
    word, t = word[whole], t[whole]
    x, y, p = word >> 17, word >> 2 & 0x7FFF, word >> 1 & 1
    camera = _camera("".join(re.findall(r"#Source \d+: ([^\r\n]*)", lines)))
    return Columns(x, y, t, p, CAMERAS[camera] if camera else None)


# AEDAT 4: packets of flatbuffers.

_PACKED = [("t", "<i8"), ("x", "<i2"), ("y", "<i2"), ("p", "u1"), ("padding", "V3")]


def read_aedat4(data: bytes) -> Columns:
    """Read the events of the stream of events in the file."""
    line, _ = split(data, rb"#!AER-DAT4\.0\r\n", np.uint8, "a header #!AER-DAT4.0")
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
            check_unpacked(unpacked, data)
    e = np.concatenate(packets)
    return Columns(e["x"], e["y"], e["t"], e["p"], size)


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
