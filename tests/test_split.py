"""Splits by index: images of many kinds decoded, and what is wrong with them said."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from spikejax.data import split
from spikejax.data.augment import center_crop, inception_crop
from spikejax.data.split import Arrays, EncodedImages, Record


def listed(*encoded, shape=(None, None, 3), num_classes=2):
    """A split of these files, whose labels are 0, 1, 0, 1, ..."""

    def read(indices):
        return [Record(encoded[i], i % 2, f"file {i}") for i in indices]

    return EncodedImages("some", len(encoded), read, shape, num_classes)


def image_file(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


ORANGE = (250, 130, 10)
CYAN, WHITE = (0, 255, 255), (255, 255, 255)


@pytest.mark.parametrize(
    ("encoded", "colour"),
    [
        (image_file(Image.new("RGB", (20, 30), ORANGE), quality=95), ORANGE),
        (image_file(Image.new("L", (20, 30), 77)), (77, 77, 77)),
        (image_file(Image.new("CMYK", (20, 30), (255, 0, 0, 0))), CYAN),
        (image_file(Image.new("CMYK", (20, 30), (0, 0, 0, 0))), WHITE),
        (image_file(Image.new("RGB", (20, 30), ORANGE), "PNG"), ORANGE),
        (image_file(Image.new("RGB", (20, 30), ORANGE).quantize(8), "PNG"), ORANGE),
        (image_file(Image.new("1", (20, 30), 1), "PNG"), WHITE),
        (image_file(Image.new("RGB", (1, 1), ORANGE), quality=95), ORANGE),
    ],
    ids=["rgb", "grey", "cyan", "no ink", "png", "palette", "1 bit", "1 pixel"],
)
@pytest.mark.parametrize("crop", [center_crop(16), inception_crop(16)])
def test_every_kind_of_image_becomes_colour(encoded, colour, crop):
    batch = listed(encoded).take([0], crop)
    assert batch["image"].shape == (1, 16, 16, 3) and batch["image"].dtype == np.uint8
    assert np.abs(batch["image"].astype(int) - colour).max() <= 3


def test_colour_becomes_grey_where_the_set_is_grey():
    source = listed(
        image_file(Image.new("RGB", (9, 9), (0, 255, 0))), shape=(None, None, 1)
    )
    assert np.abs(source.take([0], center_crop(4))["image"] - 150.0).max() <= 2


def test_a_grey_palette_image_is_smoothed_like_any_other():
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    source = listed(image_file(Image.fromarray(stripes).convert("P"), "PNG"))
    pixels = source.take([0], center_crop(8))["image"]
    assert pixels.min() > 100 and pixels.max() < 155


def test_an_image_without_a_crop_keeps_its_size():
    source = listed(image_file(Image.new("RGB", (7, 5))))
    batch = source.take([0])
    assert batch["image"].shape == (1, 5, 7, 3) and batch["label"].tolist() == [0]


JPEG = image_file(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
)
PNG = image_file(Image.open(io.BytesIO(JPEG)), "PNG")


@pytest.mark.parametrize("crop", [center_crop(16), None])
@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (JPEG[:-100], "image file is truncated"),
        (JPEG[:700], "image file is truncated"),
        (JPEG[:10], "Truncated File Read"),
        (PNG[:200], "truncated"),
        (PNG[:1000] + b"\0\0\0" + PNG[1003:], ""),
        (b"", "cannot identify image file"),
        (b"<html>not found</html>", "cannot identify image file"),
    ],
)
def test_a_damaged_image_is_named_in_one_line(encoded, reason, crop):
    source = listed(JPEG, JPEG, encoded)
    with pytest.raises(
        ValueError, match=rf"^some: .* image .* at file 2, got: .*{reason}.*\. Copy"
    ) as caught:
        source.take([0, 2], crop)
    assert "\n" not in str(caught.value)


def test_labels_out_of_range_are_refused():
    source = listed(JPEG, JPEG, shape=(40, 40, 3), num_classes=1)
    with pytest.raises(ValueError, match=r"labels 0 to 0, got .* and 1 at file 1\. "):
        source.take([1])


def test_examples_stay_in_order_whatever_the_threads(monkeypatch):
    files = [image_file(Image.new("L", (6, 6), i * 9)) for i in range(23)]
    for threads in (1, 2, 5, 40):
        monkeypatch.setattr(split, "THREADS", threads)
        batch = listed(*files, shape=(6, 6, 1)).take(range(23))
        assert np.array_equal(batch["image"][:, 3, 3, 0], np.arange(23) * 9)
        assert np.array_equal(batch["label"], np.arange(23) % 2)


def test_only_splits_of_one_shape_stay_in_memory(monkeypatch):
    source, any_size = (
        listed(JPEG, JPEG, shape=shape) for shape in ((40, 40, 3), (None, None, 3))
    )
    assert any_size.cached() is any_size
    cached, expected = source.cached(), source.take([0, 1])
    assert isinstance(cached, Arrays) and source.cached() is cached
    assert np.array_equal(cached.values, expected["image"])
    assert cached.cached() is cached and np.array_equal(cached.labels, [0, 1])
    monkeypatch.setattr(split, "IN_MEMORY_BYTES", 2 * 40 * 40 * 3 - 1)
    assert source.cached() is source


def test_labels_of_arrays_are_checked_once():
    images = np.zeros((3, 2, 2, 1), np.uint8)
    for labels, text in (
        ([0, -1, 2], "the smallest -1"),
        ([0, 1], r"expected 3 .* got int64 \(2,\)"),
        ([0.0, 1.0, 2.0], "got float64"),
    ):
        with pytest.raises(ValueError, match=text):
            Arrays(images, np.array(labels))


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_are_cropped_as_files_are(channels):
    pixels = np.random.default_rng(1).integers(0, 256, (2, 30, 40, channels), np.uint8)
    labels = np.arange(2, dtype=np.int32)
    files = [
        image_file(Image.fromarray(p.squeeze(-1) if channels == 1 else p), "PNG")
        for p in pixels
    ]
    encoded = listed(*files, shape=(30, 40, channels))
    for crop in (center_crop(9), inception_crop(9)):
        expected = Arrays(pixels, labels).take([1, 0], crop)
        batch = encoded.take([1, 0], crop)
        assert np.array_equal(batch["image"], expected["image"])
        assert np.array_equal(batch["label"], [1, 0])


def test_a_crop_draws_by_the_index_unless_it_is_given_numbers():
    pixels = np.random.default_rng(1).integers(0, 256, (1, 30, 40, 3), np.uint8)
    source = Arrays(pixels.repeat(4, 0), np.zeros(4, np.int32))
    crop = inception_crop(9)
    all_four = source.take(range(4), crop)["image"]
    assert len({image.tobytes() for image in all_four}) == 4
    assert np.array_equal(source.take([2], crop)["image"][0], all_four[2])
    given = source.take([0], crop, [np.random.default_rng(2)])["image"]
    assert np.array_equal(given[0], all_four[2])


# The real thing


def test_photographs_of_every_size_and_colour(data_dir):
    path = data_dir.parent / "imagenet_samples/originals.zip"
    if not path.exists():
        pytest.skip(f"no photographs: {path} is not there")
    with zipfile.ZipFile(path) as archive:
        files = [archive.read(name) for name in sorted(archive.namelist())]
    batch = listed(*files).take(range(len(files)), center_crop(64))
    assert batch["image"].shape == (28, 64, 64, 3)
    grey = np.all(batch["image"] == batch["image"][..., :1], (1, 2, 3))
    assert grey.sum() == 4
    assert np.all(batch["image"].std((1, 2, 3)) > 10)
    for i, file in enumerate(files):  # each is the picture it was
        small = Image.open(io.BytesIO(file)).convert("RGB")
        side = min(small.size)
        left, top = (small.width - side) // 2, (small.height - side) // 2
        small = small.crop((left, top, left + side, top + side)).resize((8, 8))
        got = Image.fromarray(batch["image"][i]).resize((8, 8))
        assert np.abs(np.asarray(small, int) - np.asarray(got)).mean() < 12
