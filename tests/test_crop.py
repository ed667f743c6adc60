"""Crops: what they may cut out, and how it is resampled."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from spikejax.data import crop
from spikejax.data.crop import center_crop, cut, inception_crop


def photograph(width, height, seed=0):
    """Smooth in space, so that resampling is well defined."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    file.seek(0)
    return Image.open(file)


@pytest.fixture
def boxes(monkeypatch):
    """boxes(crop, width, height, count): what is cut out."""

    def collect(make, width, height, count):
        found = []
        monkeypatch.setattr(crop, "cut", lambda image, box, size: found.append(box))
        image, rng = Image.new("RGB", (width, height)), np.random.default_rng(0)
        for _ in range(count):
            make(image, rng)
        monkeypatch.undo()
        return np.array(found)

    return collect


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (64, 64)])
def test_a_random_part_has_the_papers_area_and_aspect(boxes, width, height):
    left, top, right, bottom = boxes(inception_crop(224), width, height, 2000).T
    assert np.all((left >= 0) & (top >= 0) & (right <= width) & (bottom <= height))
    area = (right - left) * (bottom - top) / (width * height)
    aspect = (right - left) / (bottom - top)
    rounding = 1 + 2 / np.minimum(right - left, bottom - top)
    assert np.all((area >= 0.08 / rounding**2) & (area <= 1))
    assert np.all((aspect >= 0.75 / rounding) & (aspect <= 4 / 3 * rounding))
    assert area.min() < 0.1 and area.max() > 0.9
    small = area < 0.3  # which always fit, so that nothing was drawn again
    assert np.mean(small) > 0.2 and abs(area[small].mean() - 0.19) < 0.02
    assert abs(np.log(aspect[small]).mean()) < 0.03


def test_a_random_part_is_anywhere(boxes):
    left, top, right, bottom = boxes(inception_crop(8), 12, 12, 2000).T
    small = right - left <= 6
    places = Counter(zip(left[small], bottom[small], strict=True))
    assert {x for x, _ in places} >= set(range(7))
    assert {y for _, y in places} >= set(range(6, 13))


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((300, 6), (146, 0, 154, 6)),
        ((6, 300), (0, 146, 6, 154)),
    ],
)
def test_where_nothing_fits_the_middle_is_taken(boxes, size, box):
    found = boxes(inception_crop(8), *size, 50)
    assert np.all(found == box, axis=1).mean() > 0.8


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (2, 3), (75, 56)])
@pytest.mark.parametrize("make", [inception_crop, center_crop])
def test_a_tiny_image_is_enlarged(make, size):
    image = Image.new("RGB", size, (1, 2, 3))
    for seed in range(20):
        part = make(32)(image, np.random.default_rng(seed))
        assert part.size == (32, 32) and part.getpixel((31, 0)) == (1, 2, 3)


def test_the_rng_decides():
    image, parts = photograph(80, 60), []
    for seed in (1, 1, 2):
        parts.append(inception_crop(16)(image, np.random.default_rng(seed)).tobytes())
    assert parts[0] == parts[1] != parts[2]


@pytest.mark.parametrize("size", [(696, 464), (348, 696), (232, 232)])
def test_the_center_crop_is_resize_232_and_crop_224(size):
    image = photograph(*size)
    scale = 232 / min(size)
    resized = image.resize([round(side * scale) for side in size], 2)
    left, top = ((side - 224) / 2 for side in resized.size)
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224)))
    got = np.asarray(center_crop(224)(image, np.random.default_rng(0)))
    assert np.abs(got.astype(int) - expected).mean() < 1
    assert np.abs(np.roll(got, 2, 0).astype(int) - expected).mean() > 2


def test_the_center_crop_keeps_its_ratio_at_other_sizes(boxes):
    assert np.allclose(boxes(center_crop(64), 464, 500, 1), (8, 26, 456, 474))


def test_a_part_of_the_very_size_is_not_resampled():
    image = photograph(40, 30)
    got = np.asarray(cut(image, (7, 5, 27, 25), 20))
    assert np.array_equal(got, np.asarray(image)[5:25, 7:27])


def test_each_side_is_scaled_by_itself():
    ramp = np.zeros((40, 80, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(80), np.arange(40)[:, None]
    got = np.asarray(cut(Image.fromarray(ramp), (0, 0, 80, 40), 20)).astype(int)
    assert np.allclose(got[5, 2:-2, 0], np.arange(2, 18) * 4 + 1.5, atol=1)
    assert np.allclose(got[2:-2, 5, 1], np.arange(2, 18) * 2 + 0.5, atol=1)


def test_a_large_jpeg_is_decoded_smaller_to_nearly_the_same():
    whole, shrunk = jpeg(photograph(800, 600)), jpeg(photograph(800, 600))
    whole.load()
    box = (80, 60, 680, 560)
    expected = np.asarray(cut(whole, box, 100)).astype(int)
    got = np.asarray(cut(shrunk, box, 100))
    assert whole.size == (800, 600) and shrunk.size == (200, 150)  # a fourth
    assert np.abs(got - expected).mean() < 1


@pytest.mark.parametrize(("size", "decoded"), [(301, (401, 303)), (302, (801, 605))])
def test_a_jpeg_keeps_the_pixels_that_are_needed(size, decoded):
    image = jpeg(photograph(801, 605))
    cut(image, (100, 2, 801, 605), size)
    assert image.size == decoded


@pytest.mark.parametrize("make", [inception_crop, center_crop])
def test_a_size_out_of_range_is_refused(make):
    with pytest.raises(
        ValueError, match=rf"{make.__name__}: expected size >= 1, got 0"
    ):
        make(0)
