"""Augmentations: what they may change, and that rng alone decides."""

import numpy as np
import pytest
from PIL import Image

from spikejax.data import augment

EVERY = {
    "crop": augment.random_crop(),
    "flip": augment.random_flip(),
    "cutout": augment.cutout(16),
    "autoaugment": augment.autoaugment_cifar(),
    "autoaugment_imagenet": augment.autoaugment_imagenet(),
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


def test_a_crop_is_a_window_of_the_padded_image():
    images = some_images(8, (5, 7, 2))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    for image, border in zip(
        augment.random_crop(2)(images, rng()), padded, strict=True
    ):
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


POLICIES = (augment.CIFAR_POLICY, augment.IMAGENET_POLICY)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_has_25_pairs_of_known_operations(policy):
    assert len(policy) == 25
    for pair in policy:
        assert len(pair) == 2
        for name, probability, magnitude in pair:
            assert name in augment.OPERATIONS
            assert 0 <= probability <= 1 and 0 <= magnitude <= 9


def test_every_operation_is_in_a_policy():
    used = {name for policy in POLICIES for pair in policy for name, _, _ in pair}
    assert used == set(augment.OPERATIONS)


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


@pytest.mark.parametrize(
    "name", ["shear_x", "shear_y", "translate_x", "translate_y", "rotate"]
)
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


def test_shear_of_rows_is_that_of_columns_turned():
    image = some_images(1)[0]
    turned = operation("shear_y", image.transpose(1, 0, 2), 6, -1.0)
    assert np.array_equal(operation("shear_x", image, 6, -1.0).swapaxes(0, 1), turned)


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


def test_autoaugment_refuses_grey_images():
    with pytest.raises(ValueError, match=r"expected colour images .* \(2, 8, 8, 1\)"):
        augment.autoaugment_cifar()(some_images(2, (8, 8, 1)), rng())
    with pytest.raises(ValueError, match=r"autoaugment_imagenet: expected colour"):
        augment.autoaugment_imagenet()(some_images(2, (8, 8, 1)), rng())


def test_sizes_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"random_crop: expected pad >= 0, got -1"):
        augment.random_crop(-1)
    with pytest.raises(ValueError, match=r"cutout: expected size >= 1, got 0"):
        augment.cutout(0)
