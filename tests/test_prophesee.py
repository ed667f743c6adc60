"""EVT 2.1 and 3.0: words by hand, and a real recording as other packages read it."""

import lzma

import numpy as np
import pytest
from recording_files import evt3, evt21, made_up

from spikejax.data.events import recordings


def read(path, data):
    path.write_bytes(data)
    return recordings.read(path)


# docs.prophesee.ai, EVT 3.0 format, little-endian: y of 11 bits; x of 11 bits after one
# of polarity; 12 bits of time each.
@pytest.mark.parametrize(
    "words, events",
    [
        # x = 9 ON; then 10 and 12 of the first vector from the base 10 on, OFF, and 22
        # and 23 of the second one.
        (
            "0180 0560 0400 0928 0A30 0540 0350",
            [(9, 4, 4101, True), *((x, 4, 4101, False) for x in (10, 12, 22, 23))],
        ),
        # Words before the first time and the first y have none.
        ("0928 0180 0928 0560 0400 0928", [(9, 4, 4101, True)]),
        # A vector without a base has no place; the short one has 8 bits.
        ("0180 0400 FF4F 0930 015F", [(9, 4, 4096, False)]),
        # The base is used by pixels between, which do not move it.
        (
            "0180 0400 0938 0140 0520 0140",
            [(9, 4, 4096, True), (5, 4, 4096, False), (21, 4, 4096, True)],
        ),
        # The high bits again leave the low ones, others make them 0.
        (
            "0180 0560 0400 0180 0928 0280 0928",
            [(9, 4, 4101, True), (9, 4, 8192, True)],
        ),
        # 24 bits of time run over.
        (
            "FF8F FF6F 0400 0928 0080 0160 0928",
            [(9, 4, 2**24 - 1, True), (9, 4, 2**24 + 1, True)],
        ),
        # A trigger, and messages of the camera.
        ("0180 01A0 14E0 FFFF 0F70 0400 0928", [(9, 4, 4096, True)]),
    ],
)
def test_words_of_evt3_by_hand(tmp_path, words, events):
    data = b"% evt 3.0\n% end\n" + bytes.fromhex(words)
    assert read(tmp_path / "a.raw", data).events.tolist() == events


# EVT 2.1: the upper half is a word of EVT 2; in the lower one bit n is the pixel x + n.
# Time high of 3, then ON at 5, from x = 32 on, y = 4, the bits 0, 2 and 31.
@pytest.mark.parametrize(
    "line, words",
    [
        ("", "00000000 03000080  05000080 04004111"),
        (";endianness=little", "00000000 03000080  05000080 04004111"),
        (";endianness=legacy", "03000080 00000000  04004111 05000080"),
    ],
)
def test_words_of_evt21_by_hand(tmp_path, line, words):
    header = f"% format EVT21;height=40;width=80{line}\n% end\n".encode()
    recording = read(tmp_path / "a.raw", header + bytes.fromhex(words))
    expected = [(x, 4, 3 * 64 + 5, True) for x in (32, 34, 63)]
    assert recording.events.tolist() == expected and recording.size == (40, 80)


@pytest.mark.parametrize("version, name", [("2.1", "21"), ("3.0", "3")])
def test_headers_without_an_end_and_sizes_in_them(tmp_path, version, name):
    whole = {"2.1": evt21, "3.0": evt3}[version](made_up())
    words = whole[whole.index(b"% end\n") + 6 :]
    header = f"% Date 2020\n% evt {version}\n% geometry 50x40\n".encode()
    recording = read(tmp_path / "a.raw", header + words)
    assert np.array_equal(recording.events, made_up()) and recording.size == (40, 50)


@pytest.fixture(scope="module")
def real(data_dir, tmp_path_factory):
    """A real recording of EVT 2, with times as EVT 3 can begin with."""
    path = data_dir.parent / "event_formats/evt2.raw.xz"
    if not path.exists():
        pytest.skip(f"no {path}")
    data = lzma.decompress(path.read_bytes())
    events = read(tmp_path_factory.mktemp("real") / "a.raw", data).events[:50_000]
    events["t"] %= 2**24
    return events


def test_evt3_of_a_real_recording_as_others_read_it(real, tmp_path):
    header = b"% evt 3.0\n% format EVT3;height=480;width=640\n% end\n"
    data = evt3(real, header)
    assert np.array_equal(read(tmp_path / "a.raw", data).events, real)
    assert len(data) < 4 * len(real)  # there are vectors in it

    expelliarmus = pytest.importorskip("expelliarmus")
    # It has no triggers, and times of its own.
    (tmp_path / "b.raw").write_bytes(data.replace(b"\x01\xa0", b"", 1))
    theirs = expelliarmus.Wizard(encoding="evt3").read(tmp_path / "b.raw")
    assert all(np.array_equal(theirs[name], real[name]) for name in "xyp")

    theirs = pytest.importorskip("evt3").decode_file(str(tmp_path / "a.raw"))
    for name, column in {"x": "x", "y": "y", "t": "timestamp", "p": "polarity"}.items():
        assert np.array_equal(getattr(theirs, column), real[name])


@pytest.mark.parametrize("swapped", [False, True])
def test_evt21_of_a_real_recording(real, tmp_path, swapped):
    data = evt21(real, swapped).replace(b"height=34;width=34", b"height=480;width=640")
    assert np.array_equal(read(tmp_path / "a.raw", data).events, real)
    assert len(data) < 8 * len(real)
