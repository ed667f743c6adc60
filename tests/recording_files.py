"""Writers of recordings, from the descriptions of their formats, for the tests."""

import io
import struct

import h5py
import numpy as np
import pytest

from spikejax.data.events.columns import EVENTS

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


def evt21(e, swapped=False):
    """EVT 2.1 of a GenX320, or of an IMX636, which sends the upper half first."""
    words, high, last = [], None, None
    for x, y, t, p in e.tolist():
        if t >> 6 != high:
            high = t >> 6
            words.append([0, 8 << 28 | high])
        upper = p << 28 | (t & 63) << 22 | x // 32 * 32 << 11 | y
        # One word for neighbours, unless a pixel comes twice or before the last.
        if last == upper and words[-1][0] < 1 << x % 32:
            words[-1][0] |= 1 << x % 32
        else:
            words.append([1 << x % 32, upper])
        last = upper
    order = ";endianness=legacy" if swapped else ""
    header = f"% evt 2.1\n% format EVT21;height=34;width=34{order}\n% end\n"
    words = np.array(words, np.int64).reshape(-1, 2)
    return (
        header.encode() + (words[:, ::-1] if swapped else words).astype("<u4").tobytes()
    )


def evt3(e, header=b"% evt 3.0\n% format EVT3;height=34;width=34\n% end\n"):
    """EVT 3.0 with vectors of 12 and 8 pixels, and of the time only what changes."""
    words, state, group = [0xA001], {}, []

    def send(kind, content):
        if state.get(kind) != content:
            state[kind] = content
            words.append(kind << 12 | content)

    def flush():
        if len(group) == 1:
            words.append(2 << 12 | group[0][3] << 11 | group[0][0])
        elif group:
            first = group[0][0]
            words.append(3 << 12 | group[0][3] << 11 | first)
            mask = sum(1 << x - first for x, _, _, _ in group)
            words.append(4 << 12 | mask & 0xFFF)
            words.append(5 << 12 | mask >> 12)
        group.clear()

    for event in e.tolist():
        x, y, t, p = event
        if group and (
            group[-1][1:] != (y, t, p) or not group[-1][0] < x < group[0][0] + 20
        ):
            flush()
        if not group:
            if state.get(8) != t >> 12 & 0xFFF:
                send(8, t >> 12 & 0xFFF)
                state[6] = 0
            send(6, t & 0xFFF)
            send(0, y)
        group.append(event)
    flush()
    return header + np.array(words, "<u2").tobytes()


def davis(e, chip="eu.seebetter.ini.chips.davis.DAVIS240C", size=(180, 240)):
    """AEDAT 2 of a DAVIS as jAER writes it, with a frame, the IMU and a signal."""
    x, y = size[1] - 1 - e["x"].astype(int), size[0] - 1 - e["y"].astype(int)
    address = y << 22 | x << 12 | e["p"].astype(int) << 11
    rows = np.stack([address, e["t"]], 1)
    others = [[0x80000000 | 5 << 12, 3], [0x80000C00, 9], [0x400, 0]]
    rows = np.concatenate([others[:2], rows, others[2:]])
    header = f"#!AER-DAT2.0\r\n# AEChip: {chip}\r\n#End Of ASCII Header\r\n"
    return header.encode() + rows.astype(">u4").tobytes()


def aedat3(e, source="DVS128", each=8):
    """AEDAT 3.1 in packets, with one of frames, and an event marked as invalid."""
    header = f"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: {source}\r\n"
    header += "#Start-Time: 2016-01-01 12:00:00 (TZ+0100)\r\n#!END-HEADER\r\n"
    data = header.encode() + struct.pack("<hh6i", 2, 1, 4, 0, 0, 3, 3, 3) + bytes(12)
    bad = np.array([[0, 0]], "<u4")
    for part in np.array_split(e, 2):
        word = part["x"].astype(int) << 17 | part["y"].astype(int) << 2
        rows = np.stack([word | part["p"].astype(int) << 1 | 1, part["t"]], 1)
        rows = np.concatenate([bad, rows]).astype("<u4")
        n = len(rows)
        data += struct.pack("<hh6i", 1, 1, each, 4, 0, n, n, n - 1) + rows.tobytes()
    return data


def text(e, first="34 34\n"):
    """Lines t x y p in seconds, as the RPG's."""
    rows = (f"{t / 1e6:.6f} {x} {y} {int(p)}\n" for x, y, t, p in e.tolist())
    return (first + "".join(rows)).encode()


def csv(e):
    """Prophesee's: metavision_file_to_csv."""
    rows = (f"{x},{y},{int(p)},{t}\n" for x, y, t, p in e.tolist())
    return ("%geometry:34,34\n" + "".join(rows)).encode()


def metavision(e, **options):
    """HDF5 as Prophesee's cameras write it, without their filter."""
    file, kinds = io.BytesIO(), [("x", "<u2"), ("y", "<u2"), ("p", "<i2"), ("t", "<i8")]
    with h5py.File(file, "w") as h5:
        h5["CD/indexes"] = np.zeros(1, [("id", "<u8"), ("ts", "<i8")])
        h5.create_dataset("CD/events", data=e[list("xypt")].astype(kinds), **options)
    return file.getvalue()


def dsec(e, **options):
    """HDF5 of DSEC: times from an offset on."""
    file, start = io.BytesIO(), e["t"][0] if len(e) else 0
    options = {"chunks": True, "compression": "gzip"} | options if len(e) else {}
    with h5py.File(file, "w") as h5:
        h5["t_offset"], h5["ms_to_idx"] = np.int64(start), np.zeros(1, np.uint64)
        for name, kind in {"x": "u2", "y": "u2", "p": "u1", "t": "<i8"}.items():
            data = (e[name] - start * (name == "t")).astype(kind)
            h5.create_dataset(f"events/{name}", data=data, **options)
    return file.getvalue()


WRITERS = {
    "a.aedat": aedat2,
    "davis.aedat": davis,
    "3.aedat": aedat3,
    "a.aedat4": aedat4,
    "a.raw": evt2,
    "21.raw": evt21,
    "legacy.raw": lambda e: evt21(e, swapped=True),
    "3.raw": evt3,
    "a.dat": dat,
    "a.bin": nmnist,
    "image_1.bin": nmnist,
    "a.npz": npz,
    "a.npy": gesture,
    "a.txt": text,
    "a.csv": csv,
    "a.hdf5": metavision,
    "a.h5": dsec,
}
# Of the camera, where it is not 34x34: what the file says, or all that it can.
SIZES = dict.fromkeys(("a.aedat", "3.aedat", "a.npy"), (128, 128))
SIZES |= {"davis.aedat": (180, 240)} | dict.fromkeys(("a.hdf5", "a.h5", "image_1.bin"))
