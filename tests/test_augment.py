"""Augmentations and crops: what they change, and that rng alone decides."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from spikejax.data import augment
from spikejax.data.augment import center_crop, cut, inception_crop

EVERY = {
    "crop": augment.random_crop(),
    "flip": augment.random_flip(),
    "cutout": augment.cutout(16),
    "autoaugment": augment.autoaugment_cifar(),
    "all": augment.compose(
        augment.random_crop(), augment.autoaugment_cifar(), augment.cutout(8)
    ),
}


def some_images(count=64, shape=(32, 32, 3)):
    return np.random.default_rng(3).integers(1, 256, (count, *shape), np.uint8)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", EVERY)
def test_shape_and_type_stay_and_the_argument_is_left_alone(name):
    images = some_images()
    before = images.copy()
    out = EVERY[name](images, rng())
    assert out.shape == images.shape and out.dtype == np.uint8
    assert np.array_equal(images, before)
    assert not np.array_equal(out, images)


@pytest.mark.parametrize("name", EVERY)
def test_the_same_rng_gives_the_same_images(name):
    images = some_images()
    first = EVERY[name](images, rng(1))
    assert np.array_equal(first, EVERY[name](images, rng(1)))
    assert not np.array_equal(first, EVERY[name](images, rng(2)))


def test_compose_goes_from_left_to_right():
    both = augment.compose(lambda x, r: x + 1, lambda x, r: x * 2)
    assert both(np.ones((1, 1, 1, 1), np.uint8), rng()).item() == 4


@pytest.mark.parametrize(("mirror", "mode"), [(False, "constant"), (True, "reflect")])
def test_a_crop_is_a_window_of_the_padded_image(mirror, mode):
    images = some_images(8, (5, 7, 2))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode)
    crop = augment.random_crop(2, mirror=mirror)
    for image, border in zip(crop(images, rng()), padded, strict=True):
        windows = [border[y : y + 5, x : x + 7] for y in range(5) for x in range(5)]
        assert sum(np.array_equal(image, window) for window in windows) == 1


def test_a_crop_takes_every_corner():
    mark = np.zeros((500, 3, 3, 1), np.uint8)
    mark[:, 1, 1] = 1
    out = augment.random_crop(1)(mark, rng())
    assert np.all(out.sum(0) > 0)


def test_a_crop_without_padding_changes_nothing():
    images = some_images()
    assert np.array_equal(augment.random_crop(0)(images, rng()), images)


def test_half_of_the_images_are_mirrored():
    images = some_images(1000, (4, 6, 3))
    out = augment.random_flip()(images, rng())
    mirrored = np.all(out == images[:, :, ::-1], (1, 2, 3))
    assert np.all(mirrored | np.all(out == images, (1, 2, 3)))
    assert 430 < mirrored.sum() < 570


def test_cutout_paints_one_square_whose_part_outside_is_lost():
    images = np.zeros((400, 12, 10, 3), np.uint8)
    painted = augment.cutout(4)(images, rng())
    areas = set()
    for image in painted:
        rows, columns = np.nonzero(image[..., 0])
        box = image[rows.min() : rows.max() + 1]
        box = box[:, columns.min() : columns.max() + 1]
        assert np.all(box == 128)
        assert np.count_nonzero(image) == box.size
        areas.add(box.shape[:2])
    assert areas == {(h, w) for h in (2, 3, 4) for w in (2, 3, 4)}


def test_cutout_larger_than_twice_the_image_paints_all_of_it():
    out = augment.cutout(64)(some_images(20), rng())
    assert np.all(out == 128)


def test_the_policy_has_25_pairs_and_uses_every_operation():
    assert len(augment.CIFAR_POLICY) == 25
    steps = [step for pair in augment.CIFAR_POLICY for step in pair]
    assert len(steps) == 50 and {name for name, _, _ in steps} == set(
        augment.OPERATIONS
    )
    for _, probability, magnitude in steps:
        assert 0 <= probability <= 1 and 0 <= magnitude <= 9


def test_every_image_draws_its_own_policy():
    same = np.repeat(some_images(1), 600, axis=0)
    out = augment.autoaugment_cifar()(same, rng())
    kinds = {image.tobytes() for image in out}
    assert 25 < len(kinds) < 120  # 25 policies, each in a few forms
    untouched = np.all(out == same, (1, 2, 3)).mean()
    assert 0.1 < untouched < 0.35  # no operation drawn, or one without effect here


def test_autoaugment_follows_the_table(monkeypatch):
    monkeypatch.setattr(
        augment, "CIFAR_POLICY", ((("invert", 1.0, 0), ("solarize", 0.0, 9)),)
    )
    images = some_images()
    assert np.array_equal(augment.autoaugment_cifar()(images, rng()), 255 - images)


def operation(name, image, magnitude, sign=1.0):
    """The operation on an array, as an array."""
    result = augment.OPERATIONS[name](Image.fromarray(image), magnitude / 9, sign)
    return np.asarray(result)


@pytest.mark.parametrize("name", ["shear_y", "translate_x", "translate_y", "rotate"])
def test_geometry_at_magnitude_0_is_the_image_and_the_sign_turns_it_round(name):
    image = some_images(1)[0]
    assert np.array_equal(operation(name, image, 0), image)
    one, other = operation(name, image, 9, 1.0), operation(name, image, 9, -1.0)
    assert not np.array_equal(one, other)


def test_translation_reaches_the_papers_150_of_331_pixels():
    image = some_images(1)[0]
    expected = np.zeros_like(image)
    expected[:, :-14] = image[:, 14:]  # 32 * 150 / 331 = 14.5
    assert np.array_equal(operation("translate_x", image, 9), expected)
    expected = np.zeros_like(image)
    expected[14:] = image[:-14]
    assert np.array_equal(operation("translate_y", image, 9, -1.0), expected)


def test_shear_moves_each_column_further():
    image = np.zeros((31, 31, 3), np.uint8)
    image[15] = 255
    rows = operation("shear_y", image, 9)[..., 0].argmax(0)
    assert rows[0] == 15 and rows[-1] == 15 - 9  # 0.3 * 30
    assert np.all(np.diff(rows) <= 0)


def test_solarize_and_posterize_grow_with_the_magnitude():
    image = some_images(1)[0]
    assert np.array_equal(operation("solarize", image, 0), image)
    assert np.array_equal(operation("solarize", image, 9), 255 - image)
    half = operation("solarize", image, 4.5)
    assert np.array_equal(half, np.where(image < 128, image, 255 - image))
    assert np.array_equal(operation("posterize", image, 9), image & 0xF0)
    assert np.array_equal(operation("posterize", image, 0), image)


@pytest.mark.parametrize("name", ["brightness", "contrast", "color", "sharpness"])
def test_an_enhancement_at_the_middle_is_the_image(name):
    image = some_images(1)[0]
    assert np.array_equal(operation(name, image, 4.5), image)


def test_brightness_runs_from_a_tenth_to_nearly_twice():
    image = np.full((2, 2, 3), 100, np.uint8)
    assert np.all(operation("brightness", image, 0) == 10)
    assert np.all(operation("brightness", image, 9) == 190)


def test_autoaugment_takes_grey_images():
    grey = some_images(200, (8, 8, 1))
    out = augment.autoaugment_cifar()(grey, rng())
    assert out.shape == grey.shape and not np.array_equal(out, grey)


# Crops


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
        monkeypatch.setattr(augment, "cut", lambda image, box, *_: found.append(box))
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
    ("size", "box"), [((300, 6), (146, 0, 154, 6)), ((6, 300), (0, 146, 6, 154))]
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


def test_magnitudes_are_those_of_the_paper(monkeypatch):
    image = np.random.default_rng(3).integers(1, 256, (32, 32, 3), np.uint8)
    pil = Image.fromarray(image)
    turned = augment.OPERATIONS["rotate"](pil, 1.0, 1.0)
    np.testing.assert_array_equal(turned, np.asarray(pil.rotate(30)))
    grey = np.asarray(augment.OPERATIONS["color"](pil, 0.0, 1.0)).astype(int)
    assert np.ptp(grey, -1).mean() < 0.2 * np.ptp(image.astype(int), -1).mean()
    columns = np.tile(np.array([100, 100, 120, 200], np.uint8), (32, 8))
    flat = Image.fromarray(columns[..., None].repeat(3, -1))
    stretched = np.asarray(augment.OPERATIONS["auto_contrast"](flat, 0, 1))
    np.testing.assert_allclose(np.unique(stretched), [0, 51, 255], atol=1)
    policy = ("brightness", 1.0, 9), ("invert", 0.0, 0)
    monkeypatch.setattr(augment, "CIFAR_POLICY", (policy,))
    hundred = np.full((1, 4, 4, 3), 100, np.uint8)
    brighter = augment.autoaugment_cifar()(hundred, np.random.default_rng(0))
    assert np.all(brighter == 190)  # 1.9 times


def test_a_crop_is_resampled_as_it_is_asked_to():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    image, bicubic = Image.fromarray(pixels), augment.BICUBIC
    expected = image.resize((24, 24), bicubic, (10, 0, 70, 60)).tobytes()
    assert center_crop(24, 1.0, bicubic)(image, None).tobytes() == expected
    assert center_crop(24, 1.0)(image, None).tobytes() != expected


def test_a_narrow_part_of_a_jpeg_is_read_at_full_size(tmp_path):
    Image.new("RGB", (800, 600)).save(tmp_path / "a.jpg")
    image = Image.open(tmp_path / "a.jpg")
    cut(image, (0, 0, 100, 600), 100)
    assert image.size == (800, 600)
