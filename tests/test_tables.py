"""Text, HDF5 and N-Caltech101: files by hand, and what is refused."""

import io
import re
import tarfile

import h5py
import numpy as np
import pytest
from recording_files import dsec, made_up, metavision

from spikejax.data.events import recordings

EVENTS = [(9, 4, 1_500_000, True), (5, 6, 1_500_002, False)]


def read(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return recordings.read(path)


@pytest.mark.parametrize(
    "text, size",
    [
        ("1.500000000 9 4 1\n1.500002000 5 6 0\n", None),  # of the RPG
        ("240 180\n1.5 9 4 1\n1.500002 5 6 0", (180, 240)),  # of E2VID
        ("1.5e0 9 4 1\n1.500002e0 5 6 -1\n", None),
        ("#!events.txt\n# of v2e\n\n1500000 9 4 1\n# more\n1500002 5 6 0\n", None),
        ("t,x,y,p\r\n1500000,9,4,1\r\n1500002,5,6,0\r\n", None),
        ('"x","y","polarity","timestamp_us"\n9,4,1,1500000\n5,6,0,1500002\n', None),
        ("x;y;on;t;p\n9;4;7.5;1500000;1\n5;6;7.5;1500002;0\n", None),
        ("%geometry:320,300\n9,4,1,1500000\n5,6,0,1500002\n", (300, 320)),
        ("%geometry:320x300\nx,y,p,t\n9,4,1,1500000\n5,6,0,1500002\n", (300, 320)),
        ("Timestamp X Y Pol\n1.5 9 4 1\n1.500002 5 6 0\n", None),
    ],
)
def test_text_by_hand(tmp_path, text, size):
    recording = read(tmp_path / "a.TXT", text)
    assert recording.events.tolist() == EVENTS and recording.size == size


def test_seconds_since_1970_keep_their_microseconds(tmp_path):
    recording = read(tmp_path / "a.txt", "1468941032.229165 9 4 1\n")
    assert recording.events["t"].tolist() == [1468941032229165]


@pytest.mark.parametrize(
    "text, message",
    [
        ("x,y,t\n9,4,5\n", "expected lines of t, x, y and p, or a first line that"),
        ("1 2 3\n", "expected lines of t, x, y and p, .* got '1 2 3.n'"),
        ("1500000 9 4 1\n1500000.5 5 6 0\n", "whole numbers x, y and p, and t in one"),
        ("1.5 9 4.5 1\n", "whole numbers x, y and p"),
        ("1.5 nan 4 1\n", "whole numbers x, y and p"),
        ("1.5 inf 4 1\n", "got damaged data"),
        ("1e300 9 4 1\n", "got damaged data"),
        ("1500000 9 4 1\n1500002 5 6\n", "got damaged data"),
        ("1500000 9 4 1\n1500002 5 six 0\n", "got damaged data"),
        ("1500000 9 4 1 \xff\n", "got damaged data"),
        ("t,x,y,p\n", "got no events"),
        ("", "got no events"),
        ("2 9 4 1\n1 9 4 1\n", r"after t=2\. If its camera .* sort=True \(--sort\)"),
    ],
)
def test_text_that_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as info:
        read(tmp_path / "a.csv", text)
    assert "\n" not in str(info.value)


def test_the_layouts_of_hdf5(tmp_path):
    for write in (metavision, dsec):
        for options in ({}, {"chunks": (16,), "compression": "gzip", "shuffle": True}):
            data = write(made_up(), **options)
            events, size = read(tmp_path / "a.h5", data)
            assert np.array_equal(events, made_up()) and size is None
    file = io.BytesIO()
    with h5py.File(file, "w") as h5:  # no offset: E2VID's own
        for name in "xytp":
            h5[f"events/{name}"] = made_up()[name]
    assert np.array_equal(read(tmp_path / "a.h5", file.getvalue()).events, made_up())


def with_filter(number):
    """A file whose chunk was packed by a filter of that number."""
    file, made = io.BytesIO(), h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    made.set_chunk((4,))
    made.set_filter(number, h5py.h5z.FLAG_OPTIONAL)
    with h5py.File(file, "w") as h5:
        group, space = h5.create_group("events"), h5py.h5s.create_simple((4,))
        for name in b"x", b"y", b"t", b"p":
            h5py.h5d.create(group.id, name, h5py.h5t.STD_I64LE, space, made)
    return file.getvalue()


@pytest.mark.parametrize(
    "number, hint",
    [
        (36559, "36559: ECF, Prophesee's hdf5_ecf, .* HDF5_PLUGIN_PATH"),
        (32099, r"32099: hdfgroup\.org lists it"),
    ],
)
def test_filters_that_are_not_installed_are_named(tmp_path, number, hint):
    with pytest.raises(ValueError, match=f"is installed, got number {hint}"):
        read(tmp_path / "a.h5", with_filter(number))


def test_blosc_of_dsec(tmp_path):
    plugin = pytest.importorskip("hdf5plugin")
    data = dsec(made_up(), **dict(plugin.Blosc(cname="zstd")) | {"chunks": (32,)})
    assert np.array_equal(read(tmp_path / "a.h5", data).events, made_up())


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda h5: h5.__delitem__("events/p"),
            "or events/x, y, t and p, got .*events",
        ),
        (lambda h5: h5["events"].move("x", "z"), "or events/x, y, t and p"),
        (lambda h5: replace(h5, "x", ["a"] * 50), "numbers in the file, got others"),
        (
            lambda h5: replace(h5, "x", np.zeros((50, 2), int)),
            "as many x as y, t and p",
        ),
        (lambda h5: replace(h5, "x", np.zeros(50)), "got float64"),
        (lambda h5: link(h5), "numbers in the file, got others in events/x"),
        (lambda h5: huge(h5), "expected up to .* bytes unpacked, got 3435"),
    ],
)
def test_hdf5_that_is_refused(tmp_path, change, message):
    (tmp_path / "other.h5").write_bytes(dsec(made_up()))
    path = tmp_path / "a.h5"
    path.write_bytes(dsec(made_up()))
    with h5py.File(path, "r+") as h5:
        change(h5)
    with pytest.raises(ValueError, match=message) as info:
        recordings.read(path)
    assert re.match(f"{path}: expected", str(info.value))


def replace(h5, name, data):
    del h5["events"][name]
    h5["events"][name] = data


def link(h5):
    del h5["events/x"]
    path = h5.filename.replace("a.h5", "other.h5")
    h5["events/x"] = h5py.ExternalLink(path, "events/y")


def huge(h5):
    del h5["events/x"]
    h5.create_dataset("events/x", (2**32 // 5 // 2,), "i8", chunks=(16,))


def test_ncaltech101_as_tonic_reads_it(data_dir, tmp_path):
    io_of_tonic = pytest.importorskip("tonic.io")
    archive = data_dir.parent / "event_formats/nmnist_bin.tar.xz"
    if not archive.exists():
        pytest.skip(f"no {archive}")
    with tarfile.open(archive) as tar:
        name = next(m.name for m in tar.getmembers() if m.isfile())
        data = bytearray(tar.extractfile(name).read())
    data[:2] = 233, 172  # a pixel of a larger picture, as they are there
    with pytest.raises(
        ValueError, match="inside a camera 34x34, got event 0 with x=233"
    ):
        read(tmp_path / "00001.bin", bytes(data))
    recording = read(tmp_path / "image_0001.bin", bytes(data))
    expected = io_of_tonic.read_mnist_file(
        tmp_path / "image_0001.bin", recording.events.dtype
    )
    assert np.array_equal(recording.events, expected) and recording.size is None
    assert recordings.extent(recording.events) == (173, 234)


def test_seconds_are_rounded_to_microseconds(tmp_path):
    """0.000249 * 1e6 is a little less than 249."""
    (tmp_path / "a.txt").write_text("0.000249 9 4 1\n0.000251 5 6 0\n")
    assert recordings.read(tmp_path / "a.txt").events["t"].tolist() == [249, 251]
