"""Recordings of Prophesee's cameras: .raw of EVT 2.0, 2.1 and 3.0, and .dat.

Read here: expelliarmus ends the process on some damaged files and has no EVT 2.1; evt3
0.4 sets the low bits of the time to 0 wherever a camera repeats the high ones.

Reference: docs.prophesee.ai, "Data Encoding Formats", and the decoders of OpenEB.
"""

import re

import numpy as np

from spikejax.data.events.columns import (
    Columns,
    CorruptRecording,
    OtherFormat,
    Size,
    split,
)

VERSION = rb"(?:%[^\n]*\n)*?% (?:evt |format EVT)([\d.]+)[;\s]"
VERSIONS = {"2": "2.0", "21": "2.1", "3": "3.0"}  # in a line "% format"
# Data can begin with a "%" too. The header ends with "% end" in newer files. Else the
# fourth byte of a line decides: it is printable, 0x20 to 0x7e, and no word of EVT 2
# ends so, as its kind would be 2 to 7.
HEADER = rb"(?:%(?! end\r?\n)[^\n]{2}[ -~][^\n]*\n)*(?:% end\r?\n)?"

# The kinds of words that all versions have, and are not pixels: the high bits of the
# time, a trigger, and the camera's own messages.
TIME_HIGH, TRIGGER, OTHERS, CONTINUED = 8, 10, 14, 15


def read_raw(data: bytes) -> Columns:
    """Read EVT 2.0, 2.1 or 3.0, which the header names.

    Raises:
        ValueError: another version, words of unknown kinds, or a part of a word.
    """
    if not (found := re.match(VERSION, data)):
        raise CorruptRecording(
            "expected a header with '% evt 2.0', 2.1 or 3.0, got one with "
            f"{data[:60]!r}"
        )
    name = found[1].decode()
    version = VERSIONS.get(name, name)
    if version not in VERSIONS.values():
        raise OtherFormat(
            f"expected EVT 2.0, 2.1 or 3.0, got EVT {version}. metavision_file_to_dat "
            "of Prophesee's OpenEB makes a .dat of it"
        )
    words = {"2.0": "<u4", "2.1": "<u4, <u4", "3.0": "<u2"}[version]
    lines, body = split(data, HEADER, words, "a header")
    size = _size_in_header(lines)
    if version == "3.0":
        return _evt3(body, size)
    if version == "2.0":
        return _evt2(body, None, size)
    # 64 bits, of which older cameras (IMX636) send the upper 32 first.
    high, low = ("f0", "f1") if "endianness=legacy" in lines else ("f1", "f0")
    return _evt2(body[high], np.ascontiguousarray(body[low]), size)


def _evt2(words: np.ndarray, valid: np.ndarray | None, size: Size | None) -> Columns:
    """Read 32 bits: 4 bits of kind, 6 low bits of the time, 11 of x and 11 of y.

    In EVT 2.1, 32 more bits say which of the pixels from x on changed.
    """
    kind = words >> 28
    _check_kinds(kind, (0, 1, TIME_HIGH, TRIGGER, OTHERS, CONTINUED))
    highs, changes = np.flatnonzero(kind == TIME_HIGH), np.flatnonzero(kind <= 1)
    which = np.searchsorted(highs, changes) - 1
    # The time of events before the first high bits is unknown: they are skipped.
    which, changes = which[which >= 0], changes[which >= 0]
    seen = words[changes].astype(np.int64)
    t = (words[highs[which]].astype(np.int64) & 0x0FFFFFFF) << 6 | seen >> 22 & 63
    x, y, p = seen >> 11 & 2047, seen & 2047, kind[changes]
    if valid is None:
        return Columns(x, y, t, p, size)
    at, offset = _bits(valid[changes])
    return Columns(x[at] + offset, y[at], t[at], p[at], size)


def _evt3(words: np.ndarray, size: Size | None) -> Columns:
    """Read 16 bits with 4 bits of kind; y, the time and the base of x stay until set.

    Kind 2 is a pixel x. 4 and 5 are bits of 12 and 8 pixels from the base on, which 3
    sets, and which moves behind them.
    """
    kind, content = words >> 12, words & 0xFFF
    _check_kinds(kind, (0, 2, 3, 4, 5, 6, 7, TIME_HIGH, TRIGGER, OTHERS, CONTINUED))
    highs = np.flatnonzero(kind == TIME_HIGH)
    high = content[highs].astype(np.int64)
    step = np.diff(high, prepend=high[:1])
    high += np.cumsum(step <= -(2**11)) << 12  # 24 bits of time run over every 16.8 s
    # The low bits are 0 from a new value of the high ones on, until they are sent.
    low = content.copy()
    low[highs] = 0
    lows = np.union1d(np.flatnonzero(kind == 6), highs[step != 0])
    rows, bases = np.flatnonzero(kind == 0), np.flatnonzero(kind == 3)
    vectors = np.flatnonzero((kind == 4) | (kind == 5))
    ends = np.append(0, np.cumsum(np.where(kind[vectors] == 4, 12, 8)))

    at = np.flatnonzero((kind == 2) | (kind == 4) | (kind == 5))
    base = np.searchsorted(bases, at) - 1
    # Events before the first time, y or base are skipped.
    whole = (at > _first(highs)) & (at > _first(rows)) & ((kind[at] == 2) | (base >= 0))
    at, base = at[whole], base[whole]
    # The word that sets x and p: for a pixel its own.
    source = np.where(kind[at] == 2, at, bases[base] if len(bases) else at)
    x = (content[source] & 2047).astype(np.int64)
    x += ends[np.searchsorted(vectors, at)] - ends[np.searchsorted(vectors, source)]
    valid = np.where(kind[at] == 5, content[at] & 0xFF, content[at])
    valid[kind[at] == 2] = 1
    y = content[rows[np.searchsorted(rows, at) - 1]] & 2047
    t = high[np.searchsorted(highs, at) - 1] << 12
    last = np.searchsorted(lows, at) - 1
    t[last >= 0] |= low[lows[last[last >= 0]]]
    pixel, offset = _bits(valid.astype("<u2"))
    p = content[source] >> 11
    return Columns(x[pixel] + offset, y[pixel], t[pixel], p[pixel], size)


def _first(places: np.ndarray) -> float:
    return float(places[0]) if len(places) else np.inf


def _bits(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of the bits that are set: of their words, and in these."""
    # A shift by each place would take 8 bytes per bit.
    bits = np.unpackbits(words[:, None].view(np.uint8), axis=1, bitorder="little")
    word, place = np.nonzero(bits)
    return word, place


def _check_kinds(kind: np.ndarray, known: tuple[int, ...]) -> None:
    # Any other kind is damage, or another version under a wrong header.
    unknown = np.flatnonzero(~np.isin(kind, known))
    if len(unknown):
        n = unknown[0]
        raise CorruptRecording(
            f"expected words of the kinds {', '.join(map(str, known))}, got the kind "
            f"{kind[n]} at word {n}"
        )


def read_dat(data: bytes) -> Columns:
    """Read DAT 2: pairs of 32 bits, microseconds and polarity, y and x."""
    # Lines, then the kind of the events (0 or 12: changes of pixels) and their 8 bytes.
    header = rb"(?!(?:%[^\n]*\n)*?% Version (?!2\s))(?:%[^\n]*\n)*[\x00\x0c]\x08"
    words = [("t", "<u4"), ("pixel", "<u4")]
    expected = "a DAT file of version 2 and kind 0 or 12"
    lines, words = split(data, header, words, expected)
    pixel = words["pixel"].astype(np.int64)
    x, y = pixel & 0x3FFF, pixel >> 14 & 0x3FFF
    return Columns(x, y, words["t"], pixel >> 28 & 1, _size_in_header(lines))


def _size_in_header(lines: str) -> Size | None:
    """Return (height, width) if the lines of a Prophesee file have them."""
    if found := re.search(r"% geometry (\d+)x(\d+)", lines):
        return int(found[2]), int(found[1])
    height = re.search(r"height[= ](\d+)", lines, re.IGNORECASE)
    width = re.search(r"width[= ](\d+)", lines, re.IGNORECASE)
    return (int(height[1]), int(width[1])) if height and width else None
