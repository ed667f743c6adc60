"""Readers of event recordings: event by event as others read them; what is refused.

tests/test_mutations.py damages their files in other ways.
"""

import lzma
import os
import re
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from recording_files import SIZES, WRITERS, aedat4, lz4, made_up, npz

from spikejax.data.events import recordings
from spikejax.data.events.columns import EVENTS
from spikejax.data.events.recordings import extent, read

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


@pytest.fixture(params=WRITERS, scope="session")
def file(request, tmp_path_factory):
    """A path, and the writer of its format."""
    return tmp_path_factory.mktemp("recording") / request.param, WRITERS[request.param]


def written(path, data):
    path.write_bytes(data)
    return path


# Each format


@pytest.mark.parametrize(
    "name, header, words, events",
    [
        # jAER, DVS128.java, Extractor: y in bits 8 to 14, x in 1 to 7 from the right,
        # "ON events have raw polarity 0"; bit 15 is a mark of the cable. Big-endian.
        (
            "a.aedat",
            b"#!AER-DAT2.0\r\n",
            "00007efa 00000005  00007efb 00000006  00008000 00000007",
            [(2, 1, 5, True), (2, 1, 6, False)],
        ),
        # Prophesee, EVT 2.0 format: an event without a time, EVT_TIME_HIGH of 3, and
        # CD_OFF and CD_ON of 6 bits of time, 11 of x and 11 of y. Little-endian.
        (
            "a.raw",
            b"% evt 2.0\n",
            "00000010 03000080  04484001 04488011",
            [(9, 4, 3 * 64 + 5, False), (9, 4, 3 * 64 + 6, True)],
        ),
        # Prophesee, DAT format: time; x in 14 bits, y in 14, p. Little-endian.
        (
            "a.dat",
            b"% Version 2\n\x0c\x08",
            "05000000 09000110  06000000 09000100",
            [(9, 4, 5, True), (9, 4, 6, False)],
        ),
        # N-MNIST, garrickorchard.com: x, y, 1 bit of polarity ("0 for OFF, 1 for ON"),
        # 23 of time. Big-endian.
        (
            "a.bin",
            b"",
            "09 04 80 00 05  09 04 01 00 00",
            [(9, 4, 5, True), (9, 4, 65536, False)],
        ),
    ],
)
def test_words_by_hand(tmp_path, name, header, words, events):
    path = written(tmp_path / name, header + bytes.fromhex(words))
    assert read(path).events.tolist() == events


def test_sizes_that_no_file_says_are_those_of_the_events():
    events = np.array([(3, 4, 0, True), (9, 1, 0, True)], EVENTS)
    assert extent(events) == (5, 10)


@pytest.mark.parametrize(
    "name, header",
    [
        ("a.raw", b"% evt 2.0\n% geometry 50x40\n"),
        ("a.dat", b"% Height 40\n% Width 50\n"),
    ],
)
def test_the_size_of_the_camera_is_in_the_header(tmp_path, name, header):
    data = WRITERS[name](made_up(), header)
    assert read(written(tmp_path / name, data)).size == (40, 50)


@pytest.mark.parametrize("end", ["", "% end\n"])
@pytest.mark.parametrize("first", [0x1000, 0x1025, 0x2025, 0x2525, 0xA25, 0x0A2025])
def test_words_of_evt2_that_begin_like_a_line_are_words(tmp_path, first, end):
    words = struct.pack("<II", 8 << 28 | first, 1 << 28 | 9 << 11 | 10)
    header = "% evt 2.0\r\n% format EVT2;height=720;width=1280\n% endian ?\n" + end
    recording = read(written(tmp_path / "a.raw", header.encode() + words + words))
    assert recording.events.tolist() == [(9, 10, first << 6, True)] * 2
    assert recording.size == (720, 1280)


def test_words_of_dat_that_begin_like_a_line_are_words(tmp_path):
    words = struct.pack("<II", 0x0A2025, 1 << 28 | 4 << 14 | 9)
    header = b"% Version 2\n\x0c\x08"
    recording = read(written(tmp_path / "a.dat", header + words))
    assert recording.events.tolist() == [(9, 4, 0x0A2025, True)]


def test_milliseconds_of_gesture_may_have_fractions(tmp_path):
    np.save(tmp_path / "a.npy", [[1, 2, 1, 80.047], [1, 2, 0, 80.9]])
    assert read(tmp_path / "a.npy").events["t"].tolist() == [80047, 80900]  # Tonic's


def test_the_clock_of_nmnist_runs_over(tmp_path):
    rows = [(1, 2, 128, 0, 9), (0, 240, 0, 0, 0), (3, 4, 0, 0, 9)]
    path = written(tmp_path / "a.bin", np.array(rows, np.uint8).tobytes())
    assert read(path).events.tolist() == [(1, 2, 9, True), (3, 4, 9 + 8192, False)]


def test_npz_may_hold_differences_of_time_and_no_size(tmp_path):
    e = made_up()
    dt = np.diff(e["t"], prepend=0).astype(np.uint16)
    data = npz(e, t=None, dt=dt, p=np.where(e["p"], 1, -1), height=None)
    recording = read(written(tmp_path / "a.npz", data))
    assert np.array_equal(recording.events, e) and recording.size is None


@pytest.mark.parametrize("name", ["none", "lz4", "zstandard"])
def test_aedat4_has_three_compressions_and_may_lack_its_table(tmp_path, name):
    zstandard = pytest.importorskip("zstandard")
    compress, number = {
        "none": (bytes, 0),
        "lz4": (lz4.compress, 2),
        "zstandard": (zstandard.ZstdCompressor().compress, 3),
    }[name]
    for table in (None, 0):
        data = aedat4(made_up(), compress, number, table)
        recording = read(written(tmp_path / "a.aedat4", data))
        assert np.array_equal(recording.events, made_up())


# Others read the same


@pytest.fixture(scope="module")
def formats(data_dir):
    path = data_dir.parent / "event_formats"
    if not path.is_dir():
        pytest.skip(f"no recordings in {path}")
    return path


def assert_same(events, x, y, t, p):
    for name, column in zip("xytp", (x, y, t, p), strict=True):
        assert np.array_equal(events[name], column), name


@pytest.mark.parametrize(
    "name, encoding, count", [("ncars.dat", "dat", 2009), ("evt2.raw", "evt2", 521252)]
)
def test_prophesee_as_expelliarmus_reads_it(formats, tmp_path, name, encoding, count):
    expelliarmus = pytest.importorskip("expelliarmus")
    path = formats / name
    if name == "evt2.raw":
        whole = lzma.decompress((formats / "evt2.raw.xz").read_bytes())
        path = written(tmp_path / name, whole)
    expected = expelliarmus.Wizard(encoding=encoding).read(path)
    events = read(path).events
    assert len(events) == count
    assert_same(events, *(expected[n] for n in "xytp"))


def test_aedat4_as_the_package_aedat_reads_it(formats):
    aedat = pytest.importorskip("aedat")
    path = formats / "qvga.aedat4"
    parts = [p["events"] for p in aedat.Decoder(str(path)) if "events" in p]
    expected = np.concatenate(parts)
    recording = read(path)
    assert recording.size == (240, 320) and len(expected) == 111954
    assert_same(recording.events, *(expected[n] for n in ("x", "y", "t", "on")))


def test_nmnist_files_as_tonic_reads_them(formats, tmp_path):
    io_of_tonic = pytest.importorskip("tonic.io")
    with tarfile.open(formats / "nmnist_bin.tar.xz") as tar:
        names = [m.name for m in tar.getmembers() if m.isfile()]
        tar.extractall(tmp_path, filter="data")
    assert len(names) == 30
    for name in names:
        expected = io_of_tonic.read_mnist_file(tmp_path / name, EVENTS)
        assert np.array_equal(read(tmp_path / name).events, expected)


def test_aedat2_files_as_tonic_reads_them(data_dir, tmp_path):
    io_of_tonic = pytest.importorskip("tonic.io")
    archive = data_dir.parent / "dvs128_aedat2/recordings.tar.xz"
    if not archive.exists():
        pytest.skip(f"no {archive}")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    paths = sorted(tmp_path.glob("**/*.aedat"))
    assert len(paths) == 7
    for path in paths:
        version, start, _ = io_of_tonic.read_aedat_header_from_file(str(path))
        raw = io_of_tonic.get_aer_events_from_file(str(path), version, start)
        address = raw["address"].astype(int)
        x, y = 127 - (address >> 1 & 127), 127 - (address >> 8 & 127)
        assert_same(read(path).events, x, y, raw["timeStamp"], 1 - (address & 1))


# What is refused


def refused(path):
    """The one line that says what is wrong with the file."""
    with pytest.raises(ValueError) as info:
        read(path)
    message = str(info.value)
    assert "\n" not in message and len(message) < 600
    assert message.startswith((f"{path}: expected", "recording: expected"))
    return message


def test_empty_files_and_recordings(file):
    path, write = file
    for data in (b"", write(made_up(0))):
        assert "expected" in refused(written(path, data))


def test_truncated_files(file):
    path, write = file
    message = refused(written(path, write(made_up())[:-3]))
    if path.suffix != ".csv":  # a time with fewer digits is a time
        assert "damaged data" in message


def test_unsorted_recordings_are_refused_or_sorted(file):
    path, write = file
    events = made_up()
    events["t"] += 5000
    events["t"][20:] -= 5000
    message = refused(written(path, write(events)))
    assert "in the order of time" in message and "got event 20 with x=" in message
    assert "read it with sort=True (--sort)" in message
    if path.suffix == ".npy":
        events["t"] = events["t"] // 1000 * 1000
    expected = events[np.argsort(events["t"], kind="stable")]
    assert np.array_equal(read(path, sort=True).events, expected)


@pytest.mark.parametrize("axis", "xy")
def test_events_out_of_range(file, axis):
    path, write = file
    side, _ = SIZES.get(path.name, (34, 34)) or (0, 0)
    if path.name == "a.aedat" or side in (0, 180):
        pytest.skip("its bits cannot say more, or it does not say the size")
    events = made_up()
    events[axis][20] = side
    message = refused(written(path, write(events)))
    assert f"inside a camera {side}x{side}, got event 20 with x=" in message
    assert f"{axis}={side}" in message and "--sort" not in message


def test_columns_of_different_lengths_and_kinds(tmp_path):
    e = made_up()
    path = tmp_path / "a.npz"
    for more, text in (
        ({"x": e["x"][:-1]}, "as many x as y, t and p"),
        ({"x": e["x"][:1]}, "as many x as y, t and p"),
        ({"t": e["t"] * 1e-6}, "t in microseconds, got int16, int16, float64, bool"),
        ({"p": np.where(e["p"], "ON", "OFF")}, "int64, <U3"),
        ({"x": np.where(e["p"], np.nan, 1.0)}, "got float64"),
        ({"p": e["p"] + 1}, "polarities -1, 0 or 1, got .*p=2"),
        (
            {"x": e["x"].astype(int) + 40_000, "height": None},
            "camera 2048x2048, .*x=40",
        ),
        ({"height": 10**6}, "camera of up to 2048x2048 pixels, got 34x1000000"),
        ({"height": 0}, "got 34x0"),
        ({"t": e["t"] + 2**40 * (e["t"] > 2000)}, "less than 12 days"),
        ({"t": None}, "expected arrays x, y, p, and t or dt, got height, p, width, x"),
        ({"more": np.zeros(2**24)}, "expected up to .* bytes unpacked, got 134"),
    ):
        assert re.search(text, refused(written(path, npz(e, compress=1, **more))))


@pytest.mark.parametrize("name", ["lz4", "zstandard"])
def test_packets_that_unpack_to_more_than_events_are_refused(tmp_path, name):
    module = pytest.importorskip("zstandard") if name == "zstandard" else lz4
    compress = module.compress
    data = aedat4(
        made_up(), lambda d: compress(d + bytes(2**27)), 1 + 2 * (module != lz4)
    )
    assert "bytes" in refused(written(tmp_path / "a.aedat4", data))


def test_several_cameras_in_a_file_are_refused(tmp_path):
    path = written(tmp_path / "a.aedat4", aedat4(made_up(), streams=(1, 2)))
    assert re.search("one stream of events, got 2 .1, 2.*stream_id", refused(path))
    written(path, aedat4(made_up(), streams=()))
    assert "got 0 (none)" in refused(path)


@pytest.mark.parametrize(
    "name, data, expected",
    [
        ("a.aedat", b"#!AER-DAT3.0\r\n", "got AEDAT 3.0. jAER reads it. Or make an"),
        ("a.aedat", b"#!AER-DAT1.0\r\n", "got AEDAT 1.0. jAER reads it. Or make an"),
        ("a.aedat", b"AEDAT", "#!AER-DAT3.1 or #!AER-DAT4.0, got one with b'AEDAT'"),
        # An address of a DAVIS240C
        ("a.aedat", b"#!AER-DAT2.0\r\n\x16\x86\x48\0\0\0\0\5", "AEChip: DAVIS346'"),
        ("a.aedat", b"#!AER-DAT2.0\r\n# no end", "got the address 0x23206e6f"),
        ("a.aedat", b"#!AER-DAT2.0\r\n\0\1\0\0\0\0\0\5", "address 0x10000: damage"),
        ("a.raw", b"% date 1\n% evt 4.0\n", "got EVT 4.0. metavision_file_to_dat of"),
        ("a.raw", b"\0\0\0\0", "expected a header with '% evt 2.0'"),
        ("a.raw", b"% evt 2.0\n\0\0\0\x30", "got the kind 3 at word 0"),
        ("a.raw", b"% evt 3.0\n\0\x80\0\x90", "got the kind 9 at word 1"),
        ("a.dat", b"% Version 1\n\x0c\x08", "DAT file of version 2"),
        ("a.dat", b"% Version 2\n\x01\x08", "kind 0 or 12"),
        ("a.dat", b"% Version 2\n", "kind 0 or 12"),
        ("a.aedat4", b"#!AER-DAT4.0\n", "expected a header #!AER-DAT4.0, got one with"),
        ("a.npy", b"\x93NUMPY", "damaged"),
        ("a.mat", b"", "expected a file .aedat, .aedat4, .raw"),
    ],
)
def test_other_formats(tmp_path, name, data, expected):
    message = refused(written(tmp_path / name, data))
    assert expected in message and "np.savez(path, x=x" in message


@pytest.mark.parametrize("rows", [np.zeros(3, EVENTS), np.zeros((3, 5)), np.zeros(4)])
def test_npy_of_another_layout(tmp_path, rows):
    np.save(tmp_path / "a.npy", rows)
    assert "expected rows x, y, p, t of DVS128 Gesture" in refused(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("README.txt", False), ("License.TXT", False), ("license_plate.NPZ", True)],
)
def test_texts_about_recordings_are_none(name, expected):
    assert recordings.is_recording(Path(name)) == expected


def test_a_file_that_is_not_there(tmp_path):
    path = tmp_path / "a.bin"
    assert f"{path}: expected a file, got none. Check its path" in refused(path)


# Any recording


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 33),
            st.integers(0, 33),
            st.integers(0, 8_000_000),
            st.booleans(),
        ),
        min_size=1,
        max_size=30,
    )
)
def test_any_recording_comes_back_as_it_was(file, rows):
    path, write = file
    events = np.array(sorted(rows, key=lambda row: row[2]), EVENTS)
    recording = read(written(path, write(events)))
    if path.suffix == ".npy":  # it has milliseconds only
        events["t"] = events["t"] // 1000 * 1000
    assert recording.events.dtype == EVENTS
    assert np.array_equal(recording.events, events)
    assert recording.size == SIZES.get(path.name, (34, 34))


def test_all_formats_have_a_writer_here():
    assert {os.path.splitext(name)[1] for name in WRITERS} == set(recordings.READERS)
