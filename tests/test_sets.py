"""Sets of recordings: how they may lie, which split, what is kept, batches of them."""

import itertools
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from recording_files import aedat2, aedat3, made_up, nmnist

from spikejax.data.events import EventSet, Framing, frames, load, recordings
from spikejax.data.images import eval_batches, train_batches


def write(path: Path, seed=0, count=40, step=100, size=(6, 8)):
    """A recording of `count` events, `step` microseconds apart; the first says seed."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "x": rng.integers(0, size[1], count),
        "y": rng.integers(0, size[0], count),
        "t": 50 + step * np.arange(count),
        "p": rng.integers(0, 2, count),
    }
    np.savez(path, height=size[0], width=size[1], **columns)
    return recordings.read(path).events


@pytest.fixture
def made(tmp_path):
    """Loads a set with its frames kept beside the test."""

    def make(name="set", **framing) -> EventSet:
        framing = Framing(**{"time_steps": 2} | framing)
        path = str(tmp_path / name)
        return load(path, framing, cache_dir=tmp_path / "cache")

    return make


def class_folders(root, classes=("ant", "bee"), count=12):
    return {
        (name, n): write(root / name / f"{name}_{n}.npz", 100 * k + n)
        for k, name in enumerate(classes)
        for n in range(count)
    }


# How recordings may lie


def test_a_folder_for_each_class(tmp_path, made):
    events = class_folders(tmp_path / "set")
    data = made()
    assert data.class_names == ("ant", "bee") and data.num_classes == 2
    assert data.shape == (6, 8, 2) and data.sensor == (6, 8)
    assert data.split == "the last tenth of each class, in the order of the names"
    # of 0..11 the last two in the order of numbers, not of letters
    assert data.train.labels.tolist() == [0] * 10 + [1] * 10
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    for n, key in enumerate([("ant", 10), ("ant", 11), ("bee", 10), ("bee", 11)]):
        expected = frames.by_number(events[key], (6, 8), 2)
        assert np.array_equal(data.test.values[n], expected)


def test_recordings_too_short_to_be_divided_are_an_error(tmp_path, made):
    write(tmp_path / "set/ant.npz", step=1000, count=40)
    write(tmp_path / "set/bee.npz", step=1000, count=40)  # a window long
    with pytest.raises(ValueError, match="recordings .* both splits, got 0 for test"):
        made(window=30_000)
    write(tmp_path / "set/ant.npz", step=1000, count=400)
    with pytest.raises(ValueError, match="none in one of the splits of bee. Take a"):
        made(window=30_000)
    assert not list((tmp_path / "cache").rglob("*.frames"))


def test_train_and_test_folders_are_the_split(tmp_path, made):
    class_folders(tmp_path / "set/Train", count=3)
    class_folders(tmp_path / "set/Test", count=2)
    data = made()
    assert (len(data.train), len(data.test)) == (6, 4)
    assert data.split == "Test, as given"


def test_one_long_recording_for_each_class_is_cut(tmp_path, made):
    events = write(tmp_path / "set/ant.npz", 0, count=41, step=150)
    write(tmp_path / "set/bee.npz", 1, count=27, step=150)
    data = made(kind="duration", window=400)
    assert data.split == "the last fifth of each recording" and data.window == 400
    # 15 windows of 400 us and 9; 12 and 8 of them to train on
    assert data.train.labels.tolist() == [0] * 12 + [1] * 8
    assert data.test.labels.tolist() == [0, 0, 0, 1]
    for counts, k in ((data.train.values[1], 1), (data.test.values[0], 12)):
        start = 50 + 400 * k
        part = events[(events["t"] >= start) & (events["t"] < start + 400)]
        expected = frames.by_duration(part, (6, 8), 2, span=(start, start + 400))
        assert np.array_equal(counts, expected)
    assert data.train.values[1].sum((1, 2, 3)).tolist() == [1, 2]  # at 50, 200, 350 us


def test_a_window_cuts_the_recordings_of_class_folders_too(tmp_path, made):
    whole = class_folders(tmp_path / "set/Train", count=2)["ant", 0]
    class_folders(tmp_path / "set/Test", count=1)
    data, cuts = made(kind="duration", window=100), frames.windows(whole, 100)
    assert data.window == 100 and made().window is None
    assert len(data.train) == 4 * len(cuts) and len(data.test) == 2 * len(cuts)
    expected = frames.by_duration(cuts[1], (6, 8), 2, span=(150, 250))
    assert np.array_equal(data.train.values[1], expected)


def test_windows_without_events_are_no_samples(tmp_path, made):
    for name in ("ant", "bee"):
        events = write(tmp_path / f"set/{name}.npz", step=100, count=70)
        columns = {n: events[n].astype(int) for n in "xyp"}
        t = events["t"] + 3000 * (events["t"] >= 2050)  # a pause of 3 ms
        np.savez(tmp_path / f"set/{name}.npz", t=t, height=6, width=8, **columns)
    data = made(window=1000)  # 2 windows, 3 without events, 4, and a shorter rest
    assert data.train.labels.tolist() == [0] * 5 + [1] * 5 and len(data.test) == 2
    assert (data.train.values.sum((1, 2, 3, 4), dtype=int) == 10).all()


def test_many_recordings_in_one_file(tmp_path, made):
    (tmp_path / "set").mkdir()
    for part, labels in (("train", [2, 0]), ("test", [0])):
        n = 5 * len(labels)
        np.savez(
            tmp_path / f"set/{part}.npz",
            x=np.arange(n),
            y=np.zeros(n, int),
            p=np.ones(n, bool),
            dt=np.full(n, 60_000, np.uint16),
            offsets=np.arange(0, n + 1, 5),
            labels=labels,
        )
    data = made()
    assert data.class_names == ("0", "1", "2") and data.split == "test.npz, as given"
    assert data.train.labels.tolist() == [2, 0]
    assert data.sensor == (1, 10)  # as no file says it: what the events need
    seen = made(kind="duration", time_steps=5).train.values[1]
    assert np.argwhere(seen)[:, [0, 2]].tolist() == [[k, 5 + k] for k in range(5)]


# Sets by name, in Tonic's folders


def test_cifar10_dvs_is_split_nine_to_one(tmp_path):
    class_folders(tmp_path / "CIFAR10DVS", ("airplane", "bird"), 20)
    data = load("cifar10-dvs", Framing(2), tmp_path, cache_dir=tmp_path / "cache")
    assert (len(data.train), len(data.test)) == (36, 4)
    assert data.class_names == ("airplane", "bird")
    assert "last tenth of each class" in data.split


def test_dvs128_gesture_has_its_authors_split(tmp_path):
    rows = np.array([[3, 4, 1, 2], [5, 6, 0, 7]])  # x, y, p, milliseconds
    for part, label in [(p, k) for p in ("Train", "Test") for k in range(11)]:
        path = tmp_path / f"DVSGesture/ibmGesture{part}/user01_led/{label}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, rows)
    data = load("dvs128-gesture", Framing(1), tmp_path, cache_dir=tmp_path / "cache")
    assert sorted(data.train.labels) == sorted(data.test.labels) == list(range(11))
    assert data.num_classes == 11 and data.sensor == (128, 128)
    assert np.argwhere(data.test.values[0]).tolist() == [[0, 4, 3, 1], [0, 6, 5, 0]]


def gesture_archive(root, labels=None):
    """The layout of DvsGesture.tar.gz, with one user to train and one to test."""
    root.mkdir()
    events = made_up(1100, (128, 128), step=30)
    edges = np.append(events["t"][::100], events["t"][-1] + 1).tolist()
    rows = [f"{k + 1},{edges[k]},{edges[k + 1]}" for k in range(11)]
    for user, part in (("user01_led", "train"), ("user24_led", "test")):
        (root / f"{user}.aedat").write_bytes(aedat3(events))
        text = "\n".join(["class,startTime_usec,endTime_usec", *(labels or rows)])
        (root / f"{user}_labels.csv").write_text(f"{text}\n")
        (root / f"trials_to_{part}.txt").write_text(f"{user}.aedat\n")
    (root / "gesture_mapping.csv").write_text("action,label\nhand_clapping,1\n")
    return events


@pytest.mark.parametrize("name", ["dvs128-gesture", "folder"])
def test_dvs128_gesture_from_its_archive(tmp_path, name):
    events = gesture_archive(tmp_path / "DvsGesture")
    name = str(tmp_path / "DvsGesture") if name == "folder" else name
    data = load(name, Framing(2), tmp_path, cache_dir=tmp_path / "cache")
    assert data.train.labels.tolist() == data.test.labels.tolist() == list(range(11))
    assert data.class_names[0] == "hand clapping" and data.sensor == (128, 128)
    assert data.split == "trials_to_test.txt, as given"
    for k, counts in enumerate(data.test.values):
        part = events[100 * k : 100 * k + 100]
        assert np.array_equal(counts, frames.by_number(part, (128, 128), 2))


def test_other_labels_of_a_gesture_archive_are_framed_again_or_refused(tmp_path):
    folder, cache = tmp_path / "DvsGesture", tmp_path / "cache"
    gesture_archive(folder)
    assert len(load(str(folder), Framing(2), cache_dir=cache).train) == 11
    table = folder / "user01_led_labels.csv"
    lines = table.read_text().splitlines(keepends=True)
    # The first gesture comes twice; one more has no events.
    table.write_text("".join([*lines, lines[1], "11,5000000,6000000\n"]))
    assert len(load(str(folder), Framing(2), cache_dir=cache).train) == 12
    (folder / "trials_to_train.txt").write_text("user01_led.aedat user24_led.aedat")
    assert len(load(str(folder), Framing(2), cache_dir=cache).train) == 23
    for line, text in (
        ("12,0,9\n", r"expected a class of 1 to 11, .* got \[12, 0, 9\]"),
        ("3,0\n", r"expected a class .* and an end, got \[3, 0\]"),
        ("3,0,9.5\n", "expected lines of class, startTime_usec and"),
    ):
        table.write_text("".join([*lines[:-1], line]))
        with pytest.raises(ValueError, match=rf"led_labels\.csv: {text}"):
            load(str(folder), Framing(2), cache_dir=cache)


def test_cifar10_dvs_from_its_archive(tmp_path):
    for label in ("airplane", "truck"):  # unpacked airplane.zip and truck.zip
        (tmp_path / "CIFAR10DVS" / label).mkdir(parents=True)
        for n in range(11):
            path = tmp_path / f"CIFAR10DVS/{label}/cifar10_{label}_{n}.aedat"
            path.write_bytes(aedat2(made_up(50 + n, (128, 128))))
    data = load("cifar10-dvs", Framing(1), tmp_path, cache_dir=tmp_path / "cache")
    assert data.class_names == ("airplane", "truck") and data.sensor == (128, 128)
    # By their numbers 9 and 10 are the last.
    assert data.test.values.sum((1, 2, 3, 4), int).tolist() == [59, 60, 59, 60]
    expected = frames.by_number(made_up(59, (128, 128)), (128, 128), 1)
    assert np.array_equal(data.test.values[0], expected)


def test_ncaltech101_is_as_large_as_its_events(tmp_path):
    root, size = tmp_path / "NCALTECH101/Caltech101", (170, 230)
    for label in ("anchor", "yin_yang"):
        (root / label).mkdir(parents=True)
        for n in range(10):
            data = nmnist(made_up(60, size, step=50))
            (root / f"{label}/image_{n:04}.bin").write_bytes(data)
    data = load("ncaltech101", Framing(1), tmp_path, cache_dir=tmp_path / "cache")
    events = made_up(60, size, step=50)
    assert data.sensor == recordings.extent(events) and len(data.test) == 2
    expected = frames.by_number(events, data.sensor, 1)
    assert np.array_equal(data.test.values[1], expected)


def test_events_out_of_order_are_sorted_when_asked(tmp_path, made):
    sorted_events = class_folders(tmp_path / "set")["ant", 10]
    path = tmp_path / "set/ant/ant_10.npz"
    with np.load(path) as arrays:
        arrays = dict(arrays)
    order = np.random.default_rng(0).permutation(len(sorted_events))
    np.savez(path, **arrays | {name: arrays[name][order] for name in "xytp"})
    with pytest.raises(
        ValueError, match=r"ant_10\.npz: expected events in .* \(--sort"
    ):
        made()
    expected = frames.by_number(sorted_events, (6, 8), 2)
    assert np.array_equal(made(sort=True).test.values[0], expected)


def test_hidden_files_do_not_count_and_names_may_differ_in_case(tmp_path, made):
    for name in ("Mug", "mug", "box"):
        write(tmp_path / f"set/{name}.npz", step=1000)
        (tmp_path / f"set/._{name}.npz").write_bytes(b"of macOS")
    (tmp_path / "set/.ipynb_checkpoints/a").mkdir(parents=True)
    assert made(window=4000).class_names == ("Mug", "box", "mug")


def test_nmnist_as_tonic_reads_it(data_dir, tmp_path):
    tonic = pytest.importorskip("tonic")
    archive = data_dir.parent / "event_formats/nmnist_bin.tar.xz"
    if not archive.exists():
        pytest.skip(f"no {archive}")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "NMNIST", filter="data")

    class Local(tonic.datasets.NMNIST):
        def _check_exists(self):
            return True

    Local.__name__ = "NMNIST"  # of its folder
    data = load("nmnist", Framing(4), tmp_path, cache_dir=tmp_path / "cache")
    assert (len(data.train), len(data.test)) == (20, 10)
    to_frame = tonic.transforms.ToFrame(sensor_size=(34, 34, 2), n_time_bins=1)
    for part, is_train in ((data.train, True), (data.test, False)):
        tonics = Local(str(tmp_path), train=is_train, transform=to_frame)
        assert part.labels.tolist() == tonics.targets
        for counts, (expected, _) in zip(part.values, tonics, strict=True):
            expected = expected[0].transpose(1, 2, 0)
            assert abs(counts.sum(0).astype(int) - expected).sum() <= 1


def test_the_local_slice_of_nmnist(data_dir, tmp_path):
    path = data_dir.parent / "nmnist_small"
    if not path.is_dir():
        pytest.skip(f"no {path}")
    data = load(str(path), Framing(2, side=17), cache_dir=tmp_path)
    assert data.train.values.shape == (900, 2, 17, 17, 2) and len(data.test) == 100
    assert data.sensor == (34, 34) and data.num_classes == 10
    with np.load(path / "test.npz") as arrays:
        assert np.array_equal(data.test.labels, arrays["labels"])
        counts = np.diff(arrays["offsets"])
    assert np.array_equal(data.test.values.sum((1, 2, 3, 4), dtype=int), counts)


# Frames


@pytest.mark.parametrize(
    "kind, make",
    [
        ("duration", frames.by_duration),
        ("voxel", frames.voxel_grid),
        ("surface", frames.time_surface),
    ],
)
def test_kinds_of_frames_and_their_size(tmp_path, made, kind, make):
    events = class_folders(tmp_path / "set")["ant", 0]
    data = made(kind=kind, side=4, time_steps=3)
    expected = make(frames.resized(events, (6, 8), (4, 4)), (4, 4), 3)
    assert data.shape == (4, 4, expected.shape[-1])
    assert data.train.values.dtype == expected.dtype
    assert np.array_equal(data.train.values[0], expected)


def test_frames_are_kept_until_a_file_or_setting_changes(tmp_path, made, monkeypatch):
    class_folders(tmp_path / "set")
    first = made()

    def kept():
        return sorted(path.name for path in (tmp_path / "cache").iterdir())

    assert len(kept()) == 1
    with monkeypatch.context() as patch:
        patch.setattr(recordings, "read", None)  # the files are not read again
        assert np.array_equal(made().train.values, first.train.values)
    made(kind="duration")
    assert len(kept()) == 2
    write(tmp_path / "set/ant/ant_3.npz", 99)
    os.utime(tmp_path / "set/ant/ant_3.npz", ns=(1, 1))
    assert not np.array_equal(made().train.values, first.train.values)
    assert len(kept()) == 3


@pytest.mark.parametrize("name", ["train.frames", "test.frames", "info.json"])
def test_kept_frames_that_were_changed_are_not_used(tmp_path, made, name):
    class_folders(tmp_path / "set")
    made()
    (path,) = (tmp_path / "cache").glob(f"*/{name}")
    whole = path.read_bytes()
    changed = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    for content in (changed, whole[:-1], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"^{path.parent}: .* Delete the folder"):
            made()
    path.write_bytes(whole)
    assert len(made().test) == 4


def test_what_is_interrupted_is_not_kept(tmp_path, made, monkeypatch):
    class_folders(tmp_path / "set")
    read, calls = recordings.read, []

    def interrupted(path, **more):
        calls.append(path)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return read(path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(recordings, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made()
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(made().train) == 20


# Batches


def test_batches_are_those_of_images(tmp_path, made):
    class_folders(tmp_path / "set")
    data = made()
    augment = frames.roll(2)

    def stream():
        return train_batches(data.train, 8, seed=1, augment=augment)

    batches = stream()
    taken = [next(batches) for _ in range(4)]
    assert taken[0]["image"].shape == (8, 2, 6, 8, 2)
    state = json.loads(json.dumps(batches.get_state()))
    more = [next(batches)["image"] for _ in range(3)]
    again = stream()
    for batch, expected in zip(itertools.islice(again, 4), taken, strict=True):
        assert np.array_equal(batch["image"], expected["image"])
        assert np.array_equal(batch["label"], expected["label"])
    other = stream()
    other.set_state(state)
    assert np.array_equal([next(other)["image"] for _ in more], more)
    assert [len(b["label"]) for b in eval_batches(data.test, 3)] == [3, 1]


# What is refused


def refused(text, *args, **options):
    with pytest.raises(ValueError, match=text) as info:
        load(*args, cache_dir="unused", **options)
    assert "\n" not in str(info.value)


def test_names_and_folders_that_are_not_there(tmp_path):
    refused(r"gone: expected cifar10-dvs, .* no folder gone\. docs", "gone", Framing(2))
    text = r"got no folder .*CIFAR10DVS\. Give.*tonic\.datasets\.CIFAR10DVS\(save_to='"
    refused(text, "cifar10-dvs", Framing(2), tmp_path)
    refused(r"and with train=False\.", "nmnist", Framing(2), tmp_path)
    refused(r"got 0 and 0 in .* docs/events\.md", str(tmp_path), Framing(2))


def test_folders_without_recordings_and_a_single_class(tmp_path, made):
    class_folders(tmp_path / "set")
    (tmp_path / "set/wasp").mkdir()
    (tmp_path / "set/bee/README.txt").touch()
    assert made().class_names == ("ant", "bee")  # the third is empty
    (tmp_path / "set/wasp/wasp_1.mp4").touch()
    with pytest.raises(ValueError, match="ant, bee, wasp; not in both splits: wasp"):
        made()
    for n in (2, 3):
        write(lower := tmp_path / f"set/wasp/{n}.npz", n)
        lower.rename(lower.with_suffix(".NPZ"))
    assert made().class_names == ("ant", "bee", "wasp")
    class_folders(tmp_path / "one", ("ant",))
    with pytest.raises(ValueError, match="of at least 2 classes .* Classes: ant;"):
        made("one")


def test_two_spellings_of_a_split_are_refused(tmp_path, made):
    class_folders(tmp_path / "set/train", count=2)
    class_folders(tmp_path / "set/test", count=2)
    class_folders(tmp_path / "set/Train", count=2)
    with pytest.raises(ValueError, match=r"spelling .* got Train, test, train\. Join"):
        made()


def test_classes_that_differ_and_cameras_that_differ(tmp_path, made):
    class_folders(tmp_path / "set/train", count=2)
    class_folders(tmp_path / "set/test", ("ant", "wasp"), 2)
    with pytest.raises(ValueError, match="wasp; not in both splits: bee, wasp"):
        made()
    class_folders(tmp_path / "other")
    write(tmp_path / "other/bee/bee_3.npz", size=(6, 7))
    with pytest.raises(
        ValueError, match=r"one camera .* \[\(6, 7\), \(6, 8\)\]\. Give"
    ):
        made("other")
    assert not any((tmp_path / "cache").iterdir())


def test_a_damaged_recording_is_named(tmp_path, made):
    class_folders(tmp_path / "set")
    path = tmp_path / "set/bee/bee_7.npz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"bee_7\.npz: expected whole data, got"):
        made()


def test_files_of_many_recordings_are_checked(tmp_path, made):
    (tmp_path / "set").mkdir()
    good = {"x": [1, 2], "y": [1, 2], "p": [0, 1], "t": [5, 6]}
    good |= {"offsets": [0, 2], "labels": [0]}
    for wrong, text in (
        ({"t": [6, 5]}, r"train\.npz: expected events in the order"),
        ({"offsets": [0, 1, 2]}, r"one more than labels, got .* shorter"),
        ({"offsets": [0, 3]}, r"offsets from 0 to 2, got .* and 0 to 3"),
        ({"offsets": [1, 2]}, r"offsets from 0 to 2, got .* and 1 to 2"),
        ({"offsets": [0, 2, 2], "labels": [0, 1]}, "got no events"),
        ({"offsets": [0.0, 2.0]}, r"got damaged data \(.*integer"),
        ({"labels": None}, r"labels, and offsets, .* got damaged data \('labels'\)"),
        ({"labels": [0.5]}, r"got damaged data \(.*integer"),
        ({"labels": [-1]}, "expected labels 0 to 65535, .* got labels -1 to -1"),
        ({"labels": [2**16]}, "got labels 65536 to"),
        ({"t": [1e-6, 2e-6]}, "and t in microseconds, got int64, int64, float64"),
        ({"labels": [2**40]}, "got labels 1099511627776 to"),
        ({"t": [np.nan, 1]}, "and t in microseconds, got int64, int64, float64"),
        ({"p": ["ON", "OFF"]}, "got int64, int64, int64, <U3"),
        ({"x": [1, 40_000]}, "inside a camera 2048x2048, got event 1 with x=40000"),
        ({"t": None}, "expected arrays x, y, p, and t or dt, got labels"),
    ):
        for part in ("train", "test"):
            arrays = {k: v for k, v in (good | wrong).items() if v is not None}
            np.savez(tmp_path / f"set/{part}.npz", **arrays)
        with pytest.raises(ValueError, match=text):
            made()


def test_framing_out_of_range():
    with pytest.raises(ValueError, match="one of number, duration, .* got 'frames'"):
        Framing(2, "frames")
    with pytest.raises(ValueError, match="1 to 100000 time steps, got 'number' and 0"):
        Framing(0)
