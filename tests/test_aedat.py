"""AEDAT 2 of a DAVIS and of v2e, and AEDAT 3.1: words by hand, and what is refused."""

import struct

import numpy as np
import pytest
from recording_files import aedat3, davis, made_up

from spikejax.data.events import recordings

CHIP = b"# AEChip: eu.seebetter.ini.chips.davis."
END = b"#End Of ASCII Header\r\n"
V2E = b"# This is a raw AE data file created by AEDat2Output in v2e (see ...)\r\n"


def read(tmp_path, data):
    (tmp_path / "a.aedat").write_bytes(data)
    return recordings.read(tmp_path / "a.aedat")


def refused(tmp_path, data, text):
    with pytest.raises(ValueError, match=text) as info:
        read(tmp_path, data)
    assert "\n" not in str(info.value)


# jAER, DavisBaseCamera: y in bits 22 to 30 from below, x in 12 to 21 from the right, ON
# in bit 11; bit 10 is a signal from outside, bit 31 a frame or the IMU. Big-endian.
@pytest.mark.parametrize(
    "header, words, size, events",
    [
        (
            CHIP + b"DAVIS240C\r\n",
            "00C04800 00000005  80C04800 00000005"
            "  00C04400 00000006  00C04000 00000007",
            (180, 240),
            [(235, 176, 5, True), (235, 176, 7, False)],
        ),
        (
            CHIP + b"Davis346red\r\n" + END,
            "00C04800 00000005",
            (260, 346),
            [(341, 256, 5, True)],
        ),
        # A first word that begins with a "#".
        (
            CHIP + b"DAVIS240C\r\n" + END,
            "23012020 2020200A",
            (180, 240),
            [(221, 39, 538976266, False)],
        ),
        (
            CHIP + b"DAVIS240C\r\n",
            "23000800 00000005",
            (180, 240),
            [(239, 39, 5, True)],
        ),
        # v2e does not name the camera: 240x180, or what has x = 240.
        (V2E, "00C04800 00000005", (180, 240), [(235, 176, 5, True)]),
        (
            V2E,
            "00C04800 00000005  00CF0000 00000005",
            (260, 346),
            [(341, 256, 5, True), (105, 256, 5, False)],
        ),
    ],
)
def test_words_of_a_davis_by_hand(tmp_path, header, words, size, events):
    data = b"#!AER-DAT2.0\r\n" + header + bytes.fromhex(words)
    recording = read(tmp_path, data)
    assert recording.events.tolist() == events and recording.size == size


def test_events_outside_of_a_davis_are_refused(tmp_path):
    events = made_up()
    events["x"][7] = -1  # as 240 of the chip
    message = "inside a camera 240x180, got event 7 with x=-1"
    refused(tmp_path, davis(events), message)


# AEDAT 3.1: x of 15 bits, y of 15, ON, and valid; little-endian, y downwards. Two
# packets: a special event, and two of pixels, one of which is not valid.
def test_words_of_aedat3_by_hand(tmp_path):
    words = "13001200 05000000  12001200 06000000"
    data = b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DAVIS240C\r\n#!END-HEADER\r\n"
    data += struct.pack("<hh6i", 0, 1, 8, 4, 0, 1, 1, 1) + bytes(8)
    data += struct.pack("<hh6i", 1, 1, 8, 4, 1, 2, 2, 1) + bytes.fromhex(words)
    recording = read(tmp_path, data)
    assert recording.events.tolist() == [(9, 4, 2**31 + 5, True)]
    assert recording.size == (180, 240)


def test_cameras_that_are_not_known_have_no_size(tmp_path):
    recording = read(tmp_path, aedat3(made_up(), source="Dynapse"))
    assert recording.size is None and np.array_equal(recording.events, made_up())


def test_packets_of_aedat3_are_checked(tmp_path):
    refused(
        tmp_path, aedat3(made_up(), each=4), "of 8 bytes, up to 26 in a packet, got"
    )
    whole = aedat3(made_up())
    second = whole.rindex(struct.pack("<hh", 1, 1))
    other = bytearray(whole)
    other[second + 2] = 2
    refused(tmp_path, bytes(other), "events of one camera, got those of {1, 2}")
    other = bytearray(whole)
    other[second + 16 : second + 20] = b"\xff\xff\xff\x7f"  # capacity
    refused(tmp_path, bytes(other), "damaged data")
    other[second + 16 : second + 20] = b"\xff\xff\xff\xff"
    refused(tmp_path, bytes(other), "expected")
    packed = whole.replace(b"RAW", b"PNG")
    refused(tmp_path, packed, "a whole header of AEDAT 3.1, RAW, got one with")
