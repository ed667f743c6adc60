"""Sets of TFDS's format, written here, small: read, damaged, refused, prepared."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from experiments import prepare
from spikejax.data import images, split
from spikejax.data.crop import center_crop, inception_crop
from spikejax.data.images import eval_batches, load, train_batches

GREY = {
    "image": tfds.features.Image(shape=(6, 5, 1)),
    "label": tfds.features.ClassLabel(names=["cat", "dog", "owl"]),
}


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


VARYING = {**GREY, "image": tfds.features.Image(shape=(None, None, 1))}


def grey(count, seed=0, label=None):
    rng = np.random.default_rng(seed)
    return [
        {
            "image": png(rng.integers(0, 256, (6, 5), np.uint8)),
            "label": i % 3 if label is None else label,
        }
        for i in range(count)
    ]


def builder_class(features, splits, version="1.0.0", configs=()):
    def split(self, examples):
        return iter(enumerate(examples))

    def info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), description="-"
        )

    members = {
        "VERSION": tfds.core.Version(version),
        "BUILDER_CONFIGS": [tfds.core.BuilderConfig(name=name) for name in configs],
        "_info": info,
        "_split_generators": lambda self, _: {
            name: self._generate_examples(examples) for name, examples in splits.items()
        },
        "_generate_examples": split,
        "__module__": __name__,
    }
    return type("TinyPets", (tfds.core.GeneratorBasedBuilder,), members)


def write(folder, features=GREY, splits=None, **options):
    """Prepares a set named tiny_pets; returns the folder of its files."""
    splits = splits or {"train": grey(20), "test": grey(6, seed=1)}
    with tfds.core.registered.skip_registration():
        made = builder_class(features, splits, **options)
    for config in options.get("configs", (None,)):
        builder = made(data_dir=folder, config=config, file_format="array_record")
        builder.download_and_prepare()
    return builder.data_path


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
    pixels = pets.train.in_memory.images / 255
    assert np.allclose(pets.mean, pixels.mean((0, 1, 2)))
    assert np.allclose(pets.std, pixels.std((0, 1, 2)))


def test_a_prepared_set_holds_what_was_written(prepared):
    written = {(e["image"], e["label"]) for e in grey(20)}
    train = load("tiny_pets", prepared).train
    got = [train[i] for i in range(20)]
    assert {(png(e["image"][..., 0]), e["label"]) for e in got} == written
    assert all(isinstance(e["label"], int) for e in got)


def test_a_split_is_decoded_when_it_is_first_drawn_from(prepared):
    pets = load("tiny_pets", str(prepared))
    assert "in_memory" not in vars(pets.train)
    train_batches(pets.train, 4, seed=0)
    assert "in_memory" in vars(pets.train) and "in_memory" not in vars(pets.test)


def test_a_large_split_is_decoded_batch_by_batch_to_the_same(prepared, monkeypatch):
    pets = load("tiny_pets", prepared)
    expected = pets.train.in_memory.images
    drawn = next(train_batches(pets.train, 8, seed=0))
    monkeypatch.setattr(split, "IN_MEMORY_BYTES", 20 * 6 * 5 - 1)
    again = load("tiny_pets", prepared)
    got = list(eval_batches(again.train, 8))
    assert [len(b["label"]) for b in got] == [8, 8, 4]
    assert np.array_equal(np.concatenate([b["image"] for b in got]), expected)
    assert got[0]["label"].dtype == np.int32
    batch = next(train_batches(again.train, 8, seed=0))
    assert np.array_equal(batch["label"], drawn["label"])
    assert "in_memory" not in vars(again.train)


def test_colour_of_an_encoded_image_follows_the_info(tmp_path):
    features = {**GREY, "image": tfds.features.Image(shape=(6, 5, 3))}
    write(tmp_path, features)
    image = load("tiny_pets", tmp_path).train[0]["image"]  # the files are grey
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


def test_workers_read_what_is_not_in_memory(tmp_path):
    write(tmp_path, VARYING)
    train = load("tiny_pets", tmp_path).train
    here, there = (
        train_batches(train, 8, seed=0, crop=inception_crop(4), workers=workers)
        for workers in (0, 1)
    )
    try:
        for _ in range(3):
            one, other = next(here), next(there)
            assert np.array_equal(one["image"], other["image"])
            assert np.array_equal(one["label"], other["label"])
    finally:
        there.close()


# Sets that cannot be read


def refused(match, name, data_dir):
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
        name,
        tmp_path,
    )


def test_a_set_that_is_not_prepared_says_what_to_run(tmp_path):
    refused(
        rf"mnist: expected a prepared set in {tmp_path}, got none\. "
        rf"Run: python -m experiments\.prepare mnist --data-dir {tmp_path}$",
        "mnist",
        tmp_path,
    )


def test_without_a_folder_tfds_default_is_meant(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    refused(rf"in {tmp_path}.*Run: python -m experiments.prepare mnist$", "mnist", None)
    write(tmp_path)
    assert len(load("tiny_pets").test) == 6


def test_a_preparation_that_was_broken_off_does_not_count(tmp_path):
    write(tmp_path).rename(tmp_path / "tiny_pets/incomplete.X1_1.0.0")
    # Which one: whether another test has told TFDS of such a builder.
    refused(
        "expected (digits, fake, .* a TFDS set|a prepared set)", "tiny_pets", tmp_path
    )


def file_of(folder, split):
    return folder / f"tiny_pets-{split}.array_record-00000-of-00001"


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_file_is_named(copied, split):
    data_dir, folder = copied
    file_of(folder, split).unlink()
    refused(
        rf"expected the file .*tiny_pets-{split}\.array.*, got none",
        "tiny_pets",
        data_dir,
    )


@pytest.mark.parametrize("size", [0, 100, 65536, 131071])
def test_a_truncated_file_is_named(copied, size):
    data_dir, folder = copied
    whole = file_of(folder, "test").read_bytes()
    assert len(whole) == 131072
    file_of(folder, "test").write_bytes(whole[:size])
    refused(
        r"expected 6 examples in .*tiny_pets-test.array_record.*, got 0: .* truncated",
        "tiny_pets",
        data_dir,
    )


def test_a_flipped_byte_is_found(copied):
    data_dir, folder = copied
    file = file_of(folder, "train")
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    refused(
        r"split 'train': expected readable array_record.* damaged",
        "tiny_pets",
        data_dir,
    )


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_a_truncated_description_is_refused(copied, name):
    data_dir, folder = copied
    (folder / name).write_text((folder / name).read_text()[:40])
    refused(r"tiny_pets: expected a readable dataset_info", "tiny_pets", data_dir)


def test_another_file_format_is_refused(copied):
    data_dir, folder = copied
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    refused(r"expected array_record files, got tfrecord", "tiny_pets", data_dir)


@pytest.mark.parametrize("label", ["mask", "label"])
def test_a_set_without_classes_is_refused(tmp_path, label):
    examples = [{"image": e["image"], label: 1} for e in grey(4)]
    features = {"image": GREY["image"], label: tfds.features.Scalar(np.int32)}
    write(tmp_path, features, {"train": examples, "test": examples})
    refused(
        f"expected the features image and label.* got image, {label}",
        "tiny_pets",
        tmp_path,
    )


def test_sixteen_bit_images_are_refused(tmp_path):
    features = {**GREY, "image": tfds.features.Image(shape=(6, 5, 1), dtype=np.uint16)}
    write(tmp_path, features)
    refused(r"expected uint8 images, got uint16", "tiny_pets", tmp_path)


def test_labels_out_of_range_are_refused(tmp_path):
    write(tmp_path, splits={"train": grey(3, label=-1), "test": grey(3)})
    refused(r"expected labels from 0 to 2, got -1 at index 0", "tiny_pets", tmp_path)


def test_a_set_of_varying_shapes_needs_a_crop(tmp_path):
    write(tmp_path, VARYING)
    refused(r"tiny_pets/1.0.0, split 'train', whose images have", "tiny_pets", tmp_path)


def test_an_image_of_another_shape_than_the_info_says_needs_a_crop(tmp_path):
    odd = {"image": png(np.zeros((4, 4), np.uint8)), "label": 0}
    write(tmp_path, splits={"train": [*grey(3), odd], "test": grey(3)})
    refused(
        r"one shape \(6, 5, 1\), got \(4, 4, 1\) at index \d\. .* needs a crop",
        "tiny_pets",
        tmp_path,
    )


def test_a_set_without_a_held_out_split_is_refused(tmp_path):
    write(tmp_path, splits={"train": grey(3)})
    refused(r"train and test or validation, got train\. ", "tiny_pets", tmp_path)


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


# Preparing


def test_preparing_without_tensorflow_names_the_extra(monkeypatch):
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'spikejax\[prepare\]'$") as exit:
        prepare.main("mnist")
    assert "\n" not in str(exit.value)


def test_preparing_an_unknown_set_is_refused():
    with pytest.raises(SystemExit, match=r"got 'minst'. Did you mean mnist"):
        prepare.main("minst")


def test_what_is_prepared_can_be_loaded(tmp_path, monkeypatch, capsys):
    made = builder_class(GREY, {"train": grey(5), "test": grey(2)})
    monkeypatch.setattr(tfds, "builder", lambda name, **options: made(**options))
    monkeypatch.setattr(tfds, "list_builders", lambda **_: ["tiny_pets"])
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: name)
    prepare.main("tiny_pets", str(tmp_path))
    assert "tiny_pets is prepared in" in capsys.readouterr().out
    assert len(load("tiny_pets", tmp_path).train) == 5


@pytest.mark.parametrize("name", ["tiny_imagenet", "folder"])
def test_what_needs_no_preparing_says_so(name):
    with pytest.raises(SystemExit, match=rf"as it is\. Train at once: --data {name} "):
        prepare.main(name)


def test_archives_that_are_fetched_by_hand_are_asked_for_in_one_line(monkeypatch):
    class Builder:
        def download_and_prepare(self):
            raise AssertionError("Manual directory\n  is empty.")

    monkeypatch.setattr(tfds, "builder", lambda name, **options: Builder())
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(SystemExit, match=r"^prepare mnist: Manual directory is empty"):
        prepare.main("mnist")


def test_a_download_that_fails_is_one_line(monkeypatch):
    def builder(name, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tfds, "builder", builder)
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(SystemExit, match=r"^mnist: no route to host$"):
        prepare.main("mnist")
