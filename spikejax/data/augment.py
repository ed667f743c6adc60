"""Augmentation of image batches in numpy, and square crops of photographs.

An augmentation is a function (images uint8 [B, H, W, C], rng) -> images of the same
shape; training calls it with 8 images at a time. A crop is a function (image, rng) ->
square image. Neither modifies its argument, and rng is the only source of randomness.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]
Crop = Callable[[Image.Image, np.random.Generator], Image.Image]
# (image, strength, sign) -> image
Operation = Callable[[Image.Image, float, float], Image.Image]
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

# Inception crops: fraction of the area, and width divided by height.
AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
TRIES = 10  # a drawn box can exceed the image; torchvision and timm stop after 10 too
BICUBIC = Image.Resampling.BICUBIC
"""Pillow's, for ``center_crop``."""
CENTER = 224 / 232  # fraction of the short side that evaluation sees


def compose(*augments: Augment) -> Augment:
    """Return the augmentation that applies the given ones from left to right."""

    def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        for each in augments:
            images = each(images, rng)
        return images

    return augment


def random_crop(pad: int = 4, *, mirror: bool = False) -> Augment:
    """Pad each side with black, then cut out a random window of the original size.

    Args:
        pad: width of the border in pixels, >= 0.
        mirror: pad with the mirror image of the border instead.

    Reference: He et al. 2015, arXiv:1512.03385, section 4.2; with mirrors Jordan 2024,
    arXiv:2404.00498.
    """

    def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        count, *_, height, width, _ = images.shape
        border = [(0, 0)] * (images.ndim - 3) + [(pad, pad), (pad, pad), (0, 0)]
        padded = np.pad(images, border, "reflect" if mirror else "constant")
        corners = rng.integers(0, 2 * pad + 1, (count, 2))
        out = np.empty_like(images)
        # A loop of plain copies is several times faster than one indexed gather.
        for i, (y, x) in enumerate(corners.tolist()):
            out[i] = padded[i, ..., y : y + height, x : x + width, :]
        return out

    return augment


def random_flip() -> Augment:
    """Mirror each image left to right with probability one half."""

    def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        flipped = rng.random(len(images)) < 0.5
        out = images.copy()
        out[flipped] = images[flipped, ..., ::-1, :]
        return out

    return augment


def cutout(size: int) -> Augment:
    """Paint a grey square around a random pixel, clipped at the border of the image.

    Args:
        size: side of the square in pixels, >= 1 (16 on CIFAR-10, 8 on CIFAR-100).

    Reference: DeVries and Taylor 2017, arXiv:1708.04552, who paint the mean of the set.
    """

    def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        count, height, width, _ = images.shape
        tops = rng.integers(0, height, count) - size // 2
        lefts = rng.integers(0, width, count) - size // 2
        out = images.copy()
        for i, (y, x) in enumerate(zip(tops.tolist(), lefts.tolist(), strict=True)):
            # A negative start would count from the other side of the image.
            out[i, max(y, 0) : y + size, max(x, 0) : x + size] = 128
        return out

    return augment


def autoaugment_cifar() -> Augment:
    """Apply one of AutoAugment's 25 sub-policies for CIFAR-10 to each image.

    A sub-policy is two operations, each applied with its own probability. The place of
    AutoAugment is between flip and Cutout.

    Reference: Cubuk et al. 2018, arXiv:1805.09501, tables 6 and 7. The paper leaves
    open: we fill with black, scale its 150 pixels (of 331) to the side of the image,
    draw the sign of a shear, shift or rotation, and let a larger magnitude solarize or
    posterize more.
    """

    def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        count = len(images)
        chosen = rng.integers(0, len(CIFAR_POLICY), count).tolist()
        chances = rng.random((count, 2)).tolist()
        signs = rng.choice((-1.0, 1.0), (count, 2)).tolist()
        out = np.empty_like(images)
        for i, policy in enumerate(chosen):
            image = to_image(images[i])
            steps = zip(CIFAR_POLICY[policy], chances[i], signs[i], strict=True)
            for (name, probability, magnitude), chance, sign in steps:
                if chance < probability:
                    image = OPERATIONS[name](image, magnitude / 9, sign)
            out[i] = to_pixels(image)
        return out

    return augment


def inception_crop(size: int) -> Crop:
    """Cut out a random part of 8 to 100 % of the area and aspect 3/4 to 4/3.

    Args:
        size: side of the result in pixels, >= 1.

    Reference: Szegedy et al. 2014, arXiv:1409.4842, section 6. It leaves open, and we
    follow common use: the area is uniform, the logarithm of the aspect is uniform, and
    after ten boxes that do not fit the largest central one of such an aspect is taken.
    """

    def crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        return cut(image, _random_box(image.width, image.height, rng), size)

    return crop


def center_crop(
    size: int,
    part: float = CENTER,
    resample: Image.Resampling = Image.Resampling.BILINEAR,
) -> Crop:
    """Cut out the middle, 224/232 of the short side: resize to 232, then crop to 224.

    Args:
        size: as in `inception_crop`.
        part: of the short side, in (0, 1].
        resample: as in Pillow; EfficientNet takes 224/256 and BICUBIC.
    """

    def crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        side = min(image.size) * part
        # One resampling does both steps and reads no pixel outside the crop.
        box = _middle(image.width, image.height, side, side)
        return cut(image, box, size, resample)

    return crop


def square_crop(size: int) -> Crop:
    """Cut out the middle square, as large as it can be.

    Args:
        size: as in `inception_crop`.
    """

    def crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        side = min(image.size)
        return cut(image, _middle(image.width, image.height, side, side), size)

    return crop


def cut(
    image: Image.Image,
    box: Box,
    size: int,
    resample: Image.Resampling = Image.Resampling.BILINEAR,
) -> Image.Image:
    """Resample a box of the image to size x size, antialiased.

    Args:
        image: a JPEG that is not decoded yet is decoded at 1/2, 1/4 or 1/8 of its size
            if its box keeps size x size pixels; this changes the resampling.
        box: left, top, right, bottom in pixels, inside the image.
        size: side of the result in pixels, >= 1.
        resample: as in Pillow.
    """
    width, height = image.size
    left, top, right, bottom = box
    # Measured on 28 ImageNet photographs: 1.2 times as fast at 224, 1.3 times at 64,
    # and on average 0.7 and 2 of 255 grey levels away from decoding at full size.
    needed = math.ceil(width * size / (right - left))
    image.draft(None, (needed, math.ceil(height * size / (bottom - top))))
    x, y = image.width / width, image.height / height
    # Rounding can exceed the edge, which Pillow refuses.
    right, bottom = min(right * x, image.width), min(bottom * y, image.height)
    box = left * x, top * y, right, bottom
    return image.resize((size, size), resample, box)


def to_image(pixels: np.ndarray) -> Image.Image:
    """Return pixels uint8 [H, W, C] as an image; Pillow has no axis for one channel."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def to_pixels(image: Image.Image) -> np.ndarray:
    """Return an image as pixels uint8 [H, W, C]."""
    return np.asarray(image).reshape(image.height, image.width, -1)


def _random_box(width: int, height: int, rng: np.random.Generator) -> Box:
    for _ in range(TRIES):
        area = width * height * rng.uniform(*AREA)
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        w = max(1, round(math.sqrt(area * aspect)))
        h = max(1, round(math.sqrt(area / aspect)))
        if w <= width and h <= height:
            left = int(rng.integers(0, width - w + 1))
            top = int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, height * ASPECT[1]), min(height, width / ASPECT[0])
    return _middle(width, height, w, h)


def _middle(width: int, height: int, w: float, h: float) -> Box:
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    """Move the pixel at (a x + b y + c, d x + e y + f) to (x, y); matrix is a to f."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix)  # nearest


def _shift(image: Image.Image, x: float, y: float) -> Image.Image:
    # The paper shifts by up to 150 of ImageNet's 331 pixels: scaled to the side.
    x, y = int(x * image.width * 150 / 331), int(y * image.height * 150 / 331)
    return _affine(image, 1, 0, x, 0, 1, y)


def _enhance(enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    # Factors from 0.1 to 1.9; at 1, magnitude 4.5, the image is not changed.
    return lambda image, strength, sign: enhancer(image).enhance(0.1 + 1.8 * strength)


# The strength is the magnitude of a policy divided by 9; the sign is -1 or 1.
OPERATIONS: dict[str, Operation] = {
    "shear_y": lambda im, m, sign: _affine(im, 1, 0, 0, sign * 0.3 * m, 1, 0),
    "translate_x": lambda im, m, sign: _shift(im, sign * m, 0),
    "translate_y": lambda im, m, sign: _shift(im, 0, sign * m),
    # Pillow turns counter-clockwise; the drawn sign makes the direction irrelevant.
    "rotate": lambda im, m, sign: im.rotate(sign * 30 * m),
    "auto_contrast": lambda im, m, sign: ImageOps.autocontrast(im),
    "invert": lambda im, m, sign: ImageOps.invert(im),
    "equalize": lambda im, m, sign: ImageOps.equalize(im),
    # A larger magnitude changes more. timm's "original" policy does the reverse.
    "solarize": lambda im, m, sign: ImageOps.solarize(im, round(256 * (1 - m))),
    "posterize": lambda im, m, sign: ImageOps.posterize(im, round(8 - 4 * m)),
    "contrast": _enhance(ImageEnhance.Contrast),
    "color": _enhance(ImageEnhance.Color),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
}

# Table 7 of the paper: two operations with (name, probability, magnitude 0 to 9).
CIFAR_POLICY = (
    (("invert", 0.1, 7), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("auto_contrast", 0.5, 8), ("equalize", 0.9, 2)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 5), ("equalize", 0.5, 1)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 7), ("auto_contrast", 0.4, 8)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 3)),
    (("equalize", 0.2, 0), ("auto_contrast", 0.6, 0)),
    (("equalize", 0.2, 8), ("equalize", 0.6, 4)),
    (("color", 0.9, 9), ("equalize", 0.6, 6)),
    (("auto_contrast", 0.8, 4), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("auto_contrast", 0.9, 3)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("auto_contrast", 0.9, 2), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 8), ("invert", 0.1, 3)),
    (("translate_y", 0.7, 9), ("auto_contrast", 0.9, 1)),
)
