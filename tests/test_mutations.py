"""Damaged files: one line that names them, little memory and time, for any damage.

The long run, 1,000 files per reader:

    SPIKEJAX_MUTATIONS=1000 python -m pytest tests/test_mutations.py
"""

import io
import json
import os
import resource
import struct
import sys
import time
import zlib
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from recording_files import WRITERS, aedat4, made_up
from test_files import folder, tiny_files, write_zip
from test_sets import gesture_archive

from spikejax.data import images
from spikejax.data.augment import center_crop
from spikejax.data.events import Framing, columns, load, recordings
from spikejax.experiment import config
from spikejax.nir.read import from_nir
from spikejax.train import workdir
from spikejax.train.progress import Progress

COUNT = int(os.environ.get("SPIKEJAX_MUTATIONS", "30"))
GOLDEN = Path(__file__).parent / "golden"
SECONDS = 10  # of CPU time
GIGABYTE = 2**30 if sys.platform == "darwin" else 2**20  # in the unit of resource
HUGE = (b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\xff" * 4, b"\0\0\0\x40")


def mutated(data, rng):
    """The bytes with damage of one kind, half of the time near the start or the end."""
    out = bytearray(data)

    def place():
        near = int(rng.integers(0, 1 + min(len(out) - 1, 300)))
        return rng.choice([near, len(out) - 1 - near, *rng.integers(0, len(out), 2)])

    at, other, length = int(place()), int(place()), int(rng.integers(1, 40))
    kind = rng.choice(["flip", "cut", "insert", "delete", "huge", "swap", "repeat"])
    if kind == "flip":
        for _ in range(rng.integers(1, 8)):
            out[place()] ^= 1 << int(rng.integers(0, 8))
    elif kind == "cut":
        del out[at:]
    elif kind == "insert":
        out[at:at] = rng.bytes(length)
    elif kind == "delete":
        del out[at : at + length]
    elif kind == "huge":
        out[at : at + 4] = HUGE[rng.integers(0, len(HUGE))]
    elif kind == "swap":
        a, b = sorted((at, other))
        block = out[a : a + length], out[b : b + length]
        out[b : b + length], out[a : a + length] = block
    else:
        out[at : at + length] = bytes([rng.choice([0, 9, 32, 48, 127, 255])]) * length
    return bytes(out)


def with_right_sums(data):
    """A zip file with right checksums of its members, so that they are read."""
    out, at = bytearray(data), 0
    while (at := data.find(b"PK\x03\x04", at)) >= 0 and at + 30 <= len(data):
        length, _, name, extra = struct.unpack_from("<IIHH", data, at + 18)
        start = at + 30 + name + extra
        crc = zlib.crc32(data[start : start + length])
        struct.pack_into("<I", out, at + 14, crc)
        at += 4
    at = 0
    while (at := data.find(b"PK\x01\x02", at)) >= 0 and at + 46 <= len(data):
        (local,) = struct.unpack_from("<I", data, at + 42)
        if local + 18 <= len(out):
            out[at + 16 : at + 20] = out[local + 14 : local + 18]
        at += 4
    return bytes(out)


def mutated_zip(data, rng):
    return with_right_sums(mutated(data, rng))


def survives(path, whole, read, change=mutated, names=None, least=COUNT // 10):
    """Reads COUNT damaged files, of which so many are refused at least."""
    rng, refused = np.random.default_rng(zlib.crc32(path.name.encode())), 0
    path.write_bytes(whole)
    read(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for n in range(COUNT):
        damaged = change(whole, rng)
        path.write_bytes(damaged)
        start = time.process_time()
        try:
            read(path)
        except ValueError as error:
            message, refused = str(error), refused + 1
            assert "\n" not in message and len(message) < 1000, message
            assert any(str(name) in message for name in names or [path]), message
        except BaseException:
            (path.parent / f"failed_{n}").write_bytes(damaged)
            raise
        assert time.process_time() - start < SECONDS
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < GIGABYTE
    assert refused >= least


# Event recordings

WHOLE = {name: partial(write, made_up()) for name, write in WRITERS.items()}
WHOLE["plain.aedat4"] = partial(aedat4, made_up(), compress=bytes, compression=0)


def sound(path):
    """Reads a recording, and frames it as a set does."""
    events, size = recordings.read(path)
    height, width = size or recordings.extent(events)
    assert len(events) and events.dtype == columns.EVENTS
    assert (np.diff(events["t"]) >= 0).all() and np.ptp(events["t"]) < 2**41
    assert min(events["x"].min(), events["y"].min()) >= 0
    assert events["x"].max() < width <= 2048 and events["y"].max() < height <= 2048


@pytest.mark.parametrize("name", WHOLE)
def test_recordings(tmp_path, name):
    change = mutated_zip if name.endswith("npz") else mutated
    survives(tmp_path / name, WHOLE[name](), sound, change)


def packed(**more):
    file, e = io.BytesIO(), made_up()
    columns = {name: e[name] for name in "xytp"} | {"labels": [0, 1]}
    np.savez(file, offsets=[0, 20, len(e)], **columns | more)
    return file.getvalue()


def test_many_recordings_in_one_file(tmp_path):
    (tmp_path / "set").mkdir()
    for part in ("train", "test"):
        (tmp_path / f"set/{part}.npz").write_bytes(packed())

    def read(path):
        cached = tmp_path / "cache"
        load(str(path.parent), Framing(2), cache_dir=cached)

    path = tmp_path / "set/train.npz"
    survives(path, packed(), read, mutated_zip, [path, path.parent])


def test_labels_of_gestures(tmp_path):
    gesture_archive(tmp_path / "set")

    def read(path):
        load(str(path.parent), Framing(1, side=8), cache_dir=tmp_path / "cached")

    path = tmp_path / "set/user01_led_labels.csv"
    survives(path, path.read_bytes(), read, names=[path, path.parent])


@pytest.mark.parametrize("name", ["info.json", "train.frames"])
def test_cached_frames(tmp_path, name):
    (tmp_path / "set").mkdir()
    for part in ("train", "test"):
        (tmp_path / f"set/{part}.npz").write_bytes(packed())
    read = partial(load, str(tmp_path / "set"), Framing(2), cache_dir=tmp_path / "c")
    read()
    (path,) = (tmp_path / "c").glob(f"*/{name}")
    survives(path, path.read_bytes(), lambda _: read(), names=[path.parent])


# Images


def drawn(name, root):
    """Draws every image of a set."""
    found = images.load(name, root)
    for source in (found.train, found.test):
        batch = source.take(range(len(source)), center_crop(8))
        assert batch["label"].max() < found.num_classes


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
def test_images_of_a_folder(tmp_path, kind):
    file, path = io.BytesIO(), folder(tmp_path) / "train/cat/9.png"
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    Image.fromarray(noise).save(file, kind)
    read = partial(drawn, "folder", tmp_path)
    survives(path, file.getvalue(), lambda _: read(), names=["train/cat/9.png"])


@pytest.mark.parametrize("part", ["zip", "text"])
def test_tiny_imagenet(tmp_path, part):
    files, path = tiny_files(""), tmp_path / "tiny-imagenet-200.zip"
    texts = ("wnids.txt", "words.txt", "val/val_annotations.txt")

    def change(data, rng):
        if part == "zip":
            return mutated(data, rng)
        name = texts[rng.integers(0, len(texts))]
        text = mutated(files[name].encode(), rng)
        return write_zip(tmp_path / "other", files | {name: text}).read_bytes()

    whole = write_zip(tmp_path / "other", files).read_bytes()
    (tmp_path / "sets").mkdir()
    path = tmp_path / "sets/tiny-imagenet-200.zip"
    survives(path, whole, lambda _: drawn("tiny_imagenet", path.parent), change)


# NIR

LIBRARIES = ("norse", "snntorch", "snntorch_recurrent", "spikingjelly")


@pytest.mark.parametrize("name", LIBRARIES)
def test_nir(tmp_path, name):
    whole = (GOLDEN / f"nir_{name}.nir").read_bytes()
    survives(tmp_path / "a.nir", whole, partial(from_nir, dt=1e-4))


SHAPES = [(), (0,), (1,), (2, 3), (1, 1, 1, 1), (5, 4, 3, 3, 2)]
NUMBERS = [np.nan, -1, 0, 1e300, 2**31, np.inf, 7]


def another(file, rng):
    """Changes one dataset of an open HDF5 file."""
    items = []
    file["node"].visititems(lambda _, item: items.append(item))
    groups = [item for item in items if isinstance(item, h5py.Group)]
    sets = [item for item in items if isinstance(item, h5py.Dataset)]
    item, other = (sets[n] for n in rng.integers(0, len(sets), 2))
    group, shape = groups[rng.integers(0, len(groups))], item.shape
    name, number = item.name, NUMBERS[rng.integers(0, len(NUMBERS))]
    how = rng.choice(["less", "swap", "group", "loop", "shape", "number"])
    if how == "loop":
        group["again"] = groups[rng.integers(0, len(groups))]
        return
    del file[name]
    if how == "swap":
        file[name] = other[()]
    elif how == "group":
        file.create_group(name)
    elif how != "less":
        shape = SHAPES[rng.integers(0, len(SHAPES))] if how == "shape" else shape
        file[name] = np.full(shape, number)


def test_nir_with_other_nodes(tmp_path):
    path = tmp_path / "a.nir"

    def change(data, rng):
        path.write_bytes(data)
        with h5py.File(path, "r+") as file:
            another(file, rng)
        return path.read_bytes()

    whole = (GOLDEN / "nir_sinabs.nir").read_bytes()
    survives(path, whole, partial(from_nir, dt=1.0), change)


# Files of a run


def test_config_of_a_run(tmp_path):
    settings = config.identity(config.Experiment(tmp_path))
    defaults = config.defaults(config.Experiment(tmp_path))
    workdir.write(tmp_path / "config.json", settings)
    whole = (tmp_path / "config.json").read_bytes()
    for read in (
        lambda _: workdir.check(tmp_path, settings, defaults),
        lambda _: config.read(tmp_path),
    ):
        survives(tmp_path / "config.json", whole, read, names=[tmp_path])


def test_metrics_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("tensorboardX.SummaryWriter", lambda *_, **__: nullcontext())
    lines = [{"step": n, "loss": 1 / n} for n in range(1, 30)]

    def read(path):
        with Progress(tmp_path, 100, 10):
            pass
        kept = map(json.loads, path.read_text("utf-8").splitlines())
        assert all(line["step"] <= 10 for line in kept)

    whole = "".join(json.dumps(line) + "\n" for line in lines).encode()
    survives(tmp_path / "metrics.jsonl", whole, read, least=0)
