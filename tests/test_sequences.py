"""Sequences of different lengths: padding, files of SHD's layout, batches."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from spikejax.data import images, sequences
from spikejax.data.sequences import pad
from spikejax.data.split import Arrays


def test_pad_by_hand():
    rows = [np.array([[1.0, 2]]), np.array([[3.0, 4], [5, 6], [7, 8]])]
    found = pad(rows, [4, 0], 2)
    assert found.values.tolist() == [[[1, 2], [0, 0]], [[3, 4], [5, 6]]]
    assert found.lengths.tolist() == [1, 2] and found.labels.tolist() == [4, 0]
    assert found.lengths.dtype == found.labels.dtype == np.int32
    assert found.shape == (2, 2) and len(found) == 2 and found.cached() is found


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [np.zeros((0, 2))],
        [np.zeros((1, 2)), np.zeros((1, 3))],
        [np.zeros((1, 2)), np.zeros((1, 2), int)],
    ],
)
def test_sequences_that_do_not_fit_together(rows):
    with pytest.raises(ValueError, match=r"pad: expected sequences \[L, F\] of one F"):
        pad(rows, [0] * len(rows), 4)


def test_batches_have_the_lengths_of_their_sequences():
    lengths = np.arange(1, 11, dtype=np.int32)
    xs = np.zeros((10, 10, 1), np.float32)
    xs[:, :, 0] = np.arange(10) < lengths[:, None]
    split = Arrays(xs, lengths - 1, lengths)
    batches = images.train_batches(split, 4, seed=0)
    for _ in range(3):
        batch = next(batches)
        assert sorted(batch) == ["image", "label", "length"]
        np.testing.assert_array_equal(batch["image"].sum((1, 2)), batch["length"])
        np.testing.assert_array_equal(batch["label"], batch["length"] - 1)
    batches.close()
    found = [batch["length"] for batch in images.eval_batches(split, 4)]
    np.testing.assert_array_equal(np.concatenate(found), lengths)


def write(path, spikes, labels, keys=()):
    """Write spikes [(seconds, unit), ...] of recordings, in the layout of SHD."""
    h5py = pytest.importorskip("h5py", reason="needs the extra events")
    with h5py.File(path, "w") as file:
        file["labels"] = np.array(labels, np.uint16)
        extra = file.create_group("extra")
        if keys:
            extra["keys"] = np.array(keys, "S10")
        for k, (name, dtype) in enumerate((("times", "f2"), ("units", "u2"))):
            shape = (len(spikes),)
            vlen = h5py.vlen_dtype(np.dtype(dtype))
            rows = file.create_dataset(f"spikes/{name}", shape, dtype=vlen)
            for i, row in enumerate(spikes):
                rows[i] = np.array([spike[k] for spike in row], dtype)


@pytest.fixture
def shd(tmp_path):
    train = [[(0.001, 0), (0.002, 4), (0.0251, 699)], [(0.011, 5), (0.9, 5)]]
    write(tmp_path / "shd_train.h5", train * 10, [1, 0] * 10, ["zero", "one"])
    write(tmp_path / "shd_test.h5", [[(0.0, 10)], []], [1, 1], ["zero", "one"])
    return tmp_path


def test_spikes_are_counted_by_unit_and_step(shd):
    found = sequences.heidelberg("shd", shd, 50)
    assert found.class_names == ("zero", "one") and found.num_classes == 2
    assert found.shape == (140,) and found.split == "shd_test.h5"
    first, second = found.train.values[:2]
    assert first.shape == (50, 140) and first.dtype == np.uint8
    places = {(int(t), int(f)): int(first[t, f]) for t, f in np.argwhere(first)}
    assert places == {(0, 0): 2, (2, 139): 1}
    assert np.argwhere(second).tolist() == [[1, 1]]  # the spike at 0.9 s is cut off
    assert found.train.lengths.tolist() == [3, 50] * 10
    assert found.train.labels.tolist() == [1, 0] * 10
    # A recording without spikes has one step, in which there is none.
    assert found.test.lengths.tolist() == [1, 1] and found.test.values.sum() == 1


def test_steps_and_units_have_their_size(shd):
    found = sequences.heidelberg("shd", shd, 4, step_ms=20, units=700)
    assert found.train.values[0].tolist() == [[2], [1], [0], [0]]
    assert found.train.lengths[:2].tolist() == [2, 4]


def test_counts_stay_at_255(tmp_path):
    for part in ("train", "test"):
        write(tmp_path / f"shd_{part}.h5", [[(0.0, 0)] * 300], [0])
    found = sequences.heidelberg("shd", tmp_path, 4)
    assert found.train.values.max() == 255 and found.class_names == ("0",)


def test_validation_is_a_part_of_training(shd):
    found = sequences.heidelberg("shd", shd, 50, validation=True)
    assert (len(found.train), len(found.test)) == (18, 2)
    assert found.split == "the last tenth of shd_train.h5"
    (shd / "shd_test.h5").unlink()
    assert len(sequences.heidelberg("shd", shd, 50, validation=True).test) == 2
    for part, labels in (("train", [2]), ("valid", [1]), ("test", [0])):
        write(shd / f"ssc_{part}.h5", [[(0.0, 0)]], labels)
    found = sequences.heidelberg("ssc", shd, 50, validation=True)
    assert found.test.labels.tolist() == [1] and found.split == "ssc_valid.h5"
    assert found.class_names == ("0", "1", "2")
    assert sequences.heidelberg("ssc", shd, 50).test.labels.tolist() == [0]


def test_files_that_are_missing_or_of_another_layout(shd):
    message = r"ssc_train: expected .*ssc_train.h5 with labels, spikes/times"
    with pytest.raises(ValueError, match=message):
        sequences.heidelberg("ssc", shd, 50)
    (shd / "shd_test.h5").write_bytes((shd / "shd_test.h5").read_bytes()[:200])
    with pytest.raises(ValueError, match="shd_test: expected .* Give --data-dir"):
        sequences.heidelberg("shd", shd, 50)
    with pytest.importorskip("h5py").File(shd / "shd_train.h5", "a") as file:
        del file["spikes/units"]
    with pytest.raises(ValueError, match="shd_train: expected .*units"):
        sequences.heidelberg("shd", shd, 50)


def test_a_unit_that_the_set_does_not_have_is_an_error(tmp_path):
    write(tmp_path / "shd_train.h5", [[(0.001, 700)]], [0])
    with pytest.raises(ValueError, match="shd_train: expected .* got: unit 700 of 700"):
        sequences.heidelberg("shd", tmp_path, 50)


def test_mnist_1d_is_that_of_its_package(monkeypatch):
    made = {"x": np.arange(800.0).reshape(20, 40), "y": np.arange(20) % 10}
    made |= {"x_test": np.ones((3, 40)), "y_test": np.array([7, 8, 9])}
    given = SimpleNamespace(seed=42)
    module = ModuleType("mnist1d.data")
    module.get_dataset_args = lambda: given
    module.make_dataset = lambda args: made if args is given else None
    monkeypatch.setitem(sys.modules, "mnist1d", ModuleType("mnist1d"))
    monkeypatch.setitem(sys.modules, "mnist1d.data", module)
    found = sequences.mnist_1d()
    np.testing.assert_array_equal(found.train.values[..., 0], made["x"])
    assert found.train.values.dtype == np.float32 and found.shape == (1,)
    assert found.test.labels.tolist() == [7, 8, 9] and found.num_classes == 10
    assert set(found.train.lengths) == {40}
    found = sequences.mnist_1d(8, validation=True)
    assert found.test.values[:, :, 0].tolist() == made["x"][18:, :8].tolist()
    assert len(found.train) == 18 and set(found.train.lengths) == {8}


def test_sets_without_their_package(shd, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match="shd_train: expected the package h5py, got"):
        sequences.heidelberg("shd", shd, 50)
    monkeypatch.setitem(sys.modules, "mnist1d", None)
    with pytest.raises(ValueError, match="expected the package mnist1d, got none"):
        sequences.mnist_1d()
