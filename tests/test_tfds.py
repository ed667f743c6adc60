"""Sets of TFDS's format, written here, small: read, damaged, refused."""

import json
import pickle
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tiny_pets import GREY, VARYING, grey, png, write

from spikejax.data import images, split
from spikejax.data.augment import center_crop, inception_crop
from spikejax.data.images import eval_batches, load, train_batches


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    write(folder)
    return folder


@pytest.fixture
def copied(prepared, tmp_path):
    """A set that a test may damage: (data_dir, folder of the files)."""
    shutil.copytree(prepared, tmp_path / "data")
    return tmp_path / "data", tmp_path / "data/tiny_pets/1.0.0"


def test_a_prepared_set_tells_its_shape_and_classes(prepared):
    pets = load("tiny_pets", prepared)
    assert pets.shape == (6, 5, 1) and pets.num_classes == 3
    assert pets.class_names == ("cat", "dog", "owl")
    assert (len(pets.train), len(pets.test)) == (20, 6)
    pixels = pets.train.cached().values / 255
    assert np.allclose(pets.mean, pixels.mean((0, 1, 2)))
    assert np.allclose(pets.std, pixels.std((0, 1, 2)))


def test_a_prepared_set_holds_what_was_written(prepared):
    written = {(e["image"], e["label"]) for e in grey(20)}
    train = load("tiny_pets", prepared).train
    got = train.take(range(20))
    pngs = [png(image[..., 0]) for image in got["image"]]
    assert set(zip(pngs, got["label"].tolist(), strict=True)) == written


def test_a_split_is_decoded_when_it_is_first_drawn_from(prepared):
    pets = load("tiny_pets", str(prepared))
    assert "_decoded" not in vars(pets.train)
    train_batches(pets.train, 4, seed=0)
    assert "_decoded" in vars(pets.train) and "_decoded" not in vars(pets.test)


def test_a_large_split_is_decoded_batch_by_batch_to_the_same(prepared, monkeypatch):
    pets = load("tiny_pets", prepared)
    expected = pets.train.cached().values
    drawn = next(train_batches(pets.train, 8, seed=0))
    monkeypatch.setattr(split, "IN_MEMORY_BYTES", 20 * 6 * 5 - 1)
    again = load("tiny_pets", prepared)
    got = list(eval_batches(again.train, 8))
    assert [len(b["label"]) for b in got] == [8, 8, 4]
    assert np.array_equal(np.concatenate([b["image"] for b in got]), expected)
    assert got[0]["label"].dtype == np.int32
    batch = next(train_batches(again.train, 8, seed=0))
    assert np.array_equal(batch["label"], drawn["label"])
    assert again.train.cached() is again.train


def test_colour_of_an_encoded_image_follows_the_info(tmp_path):
    features = {**GREY, "image": tfds.features.Image(shape=(6, 5, 3))}
    write(tmp_path, features)
    image = load("tiny_pets", tmp_path).train.take([0])["image"][
        0
    ]  # the files are grey
    assert image.shape == (6, 5, 3) and np.ptp(image, axis=-1).max() == 0


def test_validation_stands_in_for_test(tmp_path):
    write(tmp_path, splits={"train": grey(9), "validation": grey(4)})
    assert len(load("tiny_pets", tmp_path).test) == 4


def test_a_constant_channel_has_a_deviation_to_divide_by(tmp_path):
    black = [{"image": png(np.zeros((6, 5), np.uint8)), "label": 0}] * 3
    write(tmp_path, splits={"train": black, "test": black})
    assert load("tiny_pets", tmp_path).std == (1 / 255,)


def test_the_newest_version_is_read(tmp_path):
    for version in ("9.0.0", "10.0.0"):
        write(tmp_path, version=version)
    assert "10.0.0" in load("tiny_pets", tmp_path).train.name


def test_one_of_several_configurations_has_to_be_named(tmp_path):
    write(tmp_path, configs=("big", "small"))
    with pytest.raises(ValueError, match=r"got big, small\. Name one: tiny_pets/big"):
        load("tiny_pets", tmp_path)
    assert len(load("tiny_pets/small", tmp_path).train) == 20


# Images with sizes of their own


def test_images_of_any_size_are_cropped(tmp_path):
    sizes = [(4, 9), (7, 7), (20, 3)]
    pets = [{"image": png(np.full(s, 50 + s[0], np.uint8)), "label": 1} for s in sizes]
    write(tmp_path, VARYING, {"train": grey(9), "validation": pets})
    found = load("tiny_pets", tmp_path)
    assert found.shape == (None, None, 1)
    assert (found.mean, found.std) == images.PHOTOGRAPHS
    batch = next(iter(eval_batches(found.test, 3, crop=center_crop(8))))
    assert batch["image"].shape == (3, 8, 8, 1)
    assert sorted(batch["image"][:, 0, 0, 0]) == [54, 57, 70]
    assert np.all(batch["image"] == batch["image"][:, :1, :1])


def test_a_split_without_labels_gives_way_to_the_validation_split(tmp_path):
    hidden = grey(3, label=-1)
    splits = {"train": grey(3), "test": hidden, "validation": grey(5, seed=2)}
    write(tmp_path, splits=splits)
    assert len(load("tiny_pets", tmp_path).test) == 5
    write(tmp_path / "shown", splits=splits | {"test": grey(4)})
    assert len(load("tiny_pets", tmp_path / "shown").test) == 4


def test_a_split_goes_to_another_process(tmp_path):
    write(tmp_path, VARYING)
    train = load("tiny_pets", tmp_path).train
    again = pickle.loads(pickle.dumps(train))
    one, other = (s.take(range(8), inception_crop(4))["image"] for s in (train, again))
    assert np.array_equal(one, other)


# Sets that cannot be read


def refused(match, data_dir, name="tiny_pets"):
    """Loading and drawing a batch ends in one line that matches."""
    with pytest.raises(ValueError, match=match) as caught:
        train_batches(load(name, data_dir).train, 2, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cifar1O", "Did you mean cifar10"),
        ("minst", "Did you mean mnist"),
        ("digit", "Did you mean digits"),
        ("", "See https://www.tensorflow.org/datasets"),
        ("../mnist", "got '../mnist'"),
    ],
)
def test_an_unknown_name_is_refused_with_the_closest(name, hint, tmp_path):
    refused(
        rf"expected digits, fake, tiny_imagenet, folder or a TFDS set.*{hint}",
        tmp_path,
        name,
    )


def test_a_set_that_is_not_prepared_says_what_to_run(tmp_path):
    refused(
        rf"mnist: expected one prepared set in {tmp_path}, got none\. "
        rf"Run: python -m experiments\.prepare mnist --data-dir {tmp_path}$",
        tmp_path,
        "mnist",
    )


def test_without_a_folder_tfds_default_is_meant(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    refused(rf"in {tmp_path}.*Run: python -m experiments.prepare mnist$", None, "mnist")
    write(tmp_path)
    assert len(load("tiny_pets").test) == 6


def test_a_preparation_that_was_broken_off_does_not_count(tmp_path):
    write(tmp_path).rename(tmp_path / "tiny_pets/incomplete.X1_1.0.0")
    # Which one: whether another test has told TFDS of such a builder.
    refused("expected (digits, fake, .* a TFDS set|one prepared set)", tmp_path)


def file_of(folder, split):
    return folder / f"tiny_pets-{split}.array_record-00000-of-00001"


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_file_is_named(copied, split):
    data_dir, folder = copied
    file_of(folder, split).unlink()
    refused(rf"examples in .*tiny_pets-{split}\.array.*, got 0: .* missing", data_dir)


@pytest.mark.parametrize("size", [0, 100, 65536, 131071])
def test_a_truncated_file_is_named(copied, size):
    data_dir, folder = copied
    whole = file_of(folder, "test").read_bytes()
    assert len(whole) == 131072
    file_of(folder, "test").write_bytes(whole[:size])
    refused(r"expected 6 examples in .*tiny_pets-test.*, got 0: .*truncated", data_dir)


def test_a_flipped_byte_is_found(copied):
    data_dir, folder = copied
    file = file_of(folder, "train")
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    refused(r"split 'train': expected readable files, got a damaged", data_dir)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_a_truncated_description_is_refused(copied, name):
    data_dir, folder = copied
    (folder / name).write_text((folder / name).read_text()[:40])
    refused(r"tiny_pets: expected a readable dataset_info", data_dir)


def test_another_file_format_is_refused(copied):
    data_dir, folder = copied
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    refused(r"expected array_record files .*got tfrecord", data_dir)


@pytest.mark.parametrize("label", ["mask", "label"])
def test_a_set_without_classes_is_refused(tmp_path, label):
    examples = [{"image": e["image"], label: 1} for e in grey(4)]
    features = {"image": GREY["image"], label: tfds.features.Scalar(np.int32)}
    write(tmp_path, features, {"train": examples, "test": examples})
    refused(f"features image .* and label.*got .*'{label}': Scalar", tmp_path)


def colours(dtype):
    return tfds.features.Image(shape=(6, 5, 1), dtype=dtype)


ODD = {"image": png(np.zeros((4, 4), np.uint8)), "label": 0}


@pytest.mark.parametrize(
    ("features", "splits", "match"),
    [
        (GREY | {"image": colours(np.uint16)}, {}, r"image \(uint8\) .* dtype=uint16"),
        (VARYING, {}, "expected a crop, as the images"),
        (GREY, {"train": grey(3, label=-1)}, "labels 0 to 2, got .* and -1 at index 0"),
        (
            GREY,
            {"train": [*grey(3), ODD]},
            r"images \(6, 5\) .*, got \(4, 4\) and 0 at index \d\. Give a crop",
        ),
    ],
    ids=["16 bit", "any shape", "no label", "an odd shape"],
)
def test_a_set_that_cannot_be_trained_on_is_refused(tmp_path, features, splits, match):
    write(tmp_path, features, {"train": grey(3), "test": grey(3)} | splits)
    refused(match, tmp_path)


def test_a_set_without_a_held_out_split_is_refused(tmp_path):
    write(tmp_path, splits={"train": grey(3)})
    refused(r"train and test or validation, got .*, splits train\. ", tmp_path)


# The real thing


def test_cifar10_is_read_without_tensorflow(data_dir):
    cifar = load("cifar10", data_dir)
    assert cifar.shape == (32, 32, 3) and cifar.class_names[3] == "cat"
    assert (len(cifar.train), len(cifar.test)) == (50000, 10000)
    assert cifar.mean == images.STATISTICS["cifar10"][0]
    counts = np.zeros(10, int)
    mean = np.zeros(3)
    for batch in eval_batches(cifar.test, 500):
        counts += np.bincount(batch["label"], minlength=10)
        mean += batch["image"].mean((0, 1, 2)) / 255 / 20
    assert np.all(counts == 1000)
    assert np.allclose(mean, cifar.mean, atol=0.005)
    assert "tensorflow" not in sys.modules
