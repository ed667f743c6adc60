"""Writers of recordings, from the descriptions of their formats, for the tests."""

import io
import struct

import numpy as np
import pytest

from spikejax.data.events.recordings import EVENTS

lz4 = pytest.importorskip("lz4.frame")


def made_up(count=50, size=(34, 34), step=500):
    """Events at random places, some at the same time."""
    rng = np.random.default_rng(1)
    events = np.empty(count, EVENTS)
    events["y"] = rng.integers(0, size[0], count)
    events["x"] = rng.integers(0, size[1], count)
    events["t"] = 7 + np.cumsum(rng.integers(0, step, count))
    events["p"] = rng.integers(0, 2, count)
    return events


def aedat2(e):
    x, y = 127 - e["x"].astype(int), 127 - e["y"].astype(int)
    address = y << 8 | x << 1 | ~e["p"]  # bit 0 is 0 for ON
    header = b"#!AER-DAT2.0\r\n# AEChip: ch.unizh.ini.jaer.chip.retina.DVS128\r\n"
    return header + np.stack([address, e["t"]], 1).astype(">u4").tobytes()


XML = """<dv version="2.0"><node name="outInfo" path="/">
<node name="0" path="/0/"><attr key="typeIdentifier" type="string">FRME</attr></node>
{}</node></dv>"""
STREAM = """<node name="{2}" path="/{2}/">
<attr key="typeIdentifier" type="string">EVTS</attr>
<node name="info" path="/{2}/info/"><attr key="sizeX" type="int">{1}</attr>
<attr key="sizeY" type="int">{0}</attr></node></node>"""


def flatbuffer(vtable, fields, rest=b""):
    """Length, offset of the table, name, vtable, table, what it points to."""
    table = struct.pack("<HH", 4 + 2 * len(vtable), 4 + len(fields))
    table += struct.pack(f"<{len(vtable)}H", *vtable)
    start = 8 + len(table)  # after the offset and the name
    body = struct.pack("<I4s", start, b"NAME") + table
    body += struct.pack("<i", start - 8) + fields + rest
    return struct.pack("<I", len(body)) + body


def aedat4(
    e, compress=lz4.compress, compression=1, table=None, size=(34, 34), streams=(1,)
):
    xml = XML.format("".join(STREAM.format(*size, n) for n in streams)).encode()
    types = {"t": "<i8", "x": "<i2", "y": "<i2", "p": "u1", "padding": "V3"}
    packed = np.zeros(len(e), list(types.items()))
    for name in "txyp":
        packed[name] = e[name]
    packets = b""
    for part in np.array_split(packed, 2):
        vector = struct.pack("<I", len(part)) + part.tobytes()
        data = compress(flatbuffer([4], struct.pack("<I", 4), vector))
        other = compress(b"a packet of another stream")
        packets += struct.pack("<ii", 0, len(other)) + other
        packets += struct.pack("<ii", 1, len(data)) + data
    text = struct.pack("<I", len(xml)) + xml
    for _ in range(2):  # the place of the table is known once the length is
        fields = struct.pack("<iqI", compression, -1 if table is None else table, 4)
        header = flatbuffer([4, 8, 16], fields, text)
        if table is not None:
            table = 14 + len(header) + len(packets)
    return b"#!AER-DAT4.0\r\n" + header + packets + (b"" if table is None else b"table")


def evt2(e, header=b"% Date 2020\n% evt 2.0\n% geometry 34x34\n"):
    words, high = [0xA0000001], None  # a trigger from outside
    for x, y, t, p in e.tolist():
        if t >> 6 != high:
            high = t >> 6
            words.append(8 << 28 | high)
        words.append(p << 28 | (t & 63) << 22 | x << 11 | y)
    return header + np.array(words, "<u4").tobytes()


def dat(e, header=b"% Version 2\n% Height 34\n% Width 34\n"):
    pixel = e["p"].astype(np.int64) << 28 | e["y"].astype(np.int64) << 14 | e["x"]
    return header + b"\x0c\x08" + np.stack([e["t"], pixel], 1).astype("<u4").tobytes()


def nmnist(e):
    t = e["t"]
    rows = [e["x"], e["y"], e["p"] * 128 | t >> 16, t >> 8 & 255, t & 255]
    return np.stack(rows, 1).astype(np.uint8).tobytes()


def npz(e, compress=False, **more):
    file = io.BytesIO()
    columns = {"height": 34, "width": 34} | {n: e[n] for n in "xytp"} | more
    save = np.savez_compressed if compress else np.savez
    save(file, **{k: v for k, v in columns.items() if v is not None})
    return file.getvalue()


def gesture(e):
    file = io.BytesIO()
    np.save(file, np.stack([e["x"], e["y"], e["p"], e["t"] // 1000], 1).astype(float))
    return file.getvalue()


WRITERS = {
    "a.aedat": aedat2,
    "a.aedat4": aedat4,
    "a.raw": evt2,
    "a.dat": dat,
    "a.bin": nmnist,
    "a.npz": npz,
    "a.npy": gesture,
}
