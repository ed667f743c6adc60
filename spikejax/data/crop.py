"""Which part of a photograph of any size a network sees, made square.

A crop is a function (image, rng) to the part, size x size pixels. All its randomness
comes from rng.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

Crop = Callable[[Image.Image, np.random.Generator], Image.Image]
Box = tuple[float, float, float, float]  # left, top, right, bottom

AREA = (0.08, 1.0)  # of the image
ASPECT = (3 / 4, 4 / 3)  # width to height
TRIES = 10
SEEN = 224 / 232  # of the short side, in evaluation


def inception_crop(size: int) -> Crop:
    """A random part of 8 to 100 % of the area, of aspect 3/4 to 4/3, for training.

    Args:
        size: side of the result in pixels, >= 1.

    Reference: Szegedy et al. 2014, arXiv:1409.4842, section 6. It leaves open, and we
    follow common use: the area is uniform, the logarithm of the aspect is; what does
    not fit is drawn again, ten times at most, and then the largest part in the middle
    of an aspect in these bounds is taken.
    """
    _check("inception_crop", size)

    def crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        return cut(image, _random_box(image.width, image.height, rng), size)

    return crop


def center_crop(size: int) -> Crop:
    """The middle, 224/232 of the short side: for size 224 resize to 232, then crop.

    One resampling does both, and it does not see beyond the part.

    Args:
        size: side of the result in pixels, >= 1.
    """
    _check("center_crop", size)

    def crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        side = min(image.size) * SEEN
        return cut(image, _middle(image.width, image.height, side, side), size)

    return crop


def cut(image: Image.Image, box: Box, size: int) -> Image.Image:
    """The box of the image, resampled to size x size (bilinear, antialiased).

    A JPEG that is not decoded yet is decoded at 1/2, 1/4 or 1/8 where the box still has
    size x size pixels then. That is up to twice as fast, and changes the resampling.
    """
    width, height = image.size
    left, top, right, bottom = box
    needed = math.ceil(width * size / (right - left))
    image.draft(None, (needed, math.ceil(height * size / (bottom - top))))
    x, y = image.width / width, image.height / height
    scaled = (
        left * x,
        top * y,
        min(right * x, image.width),  # rounding may lead beyond the edge
        min(bottom * y, image.height),
    )
    return image.resize((size, size), Image.Resampling.BILINEAR, box=scaled)


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
    return _middle(
        width, height, min(width, height * ASPECT[1]), min(height, width / ASPECT[0])
    )


def _middle(width: int, height: int, w: float, h: float) -> Box:
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def _check(who: str, size: int) -> None:
    if size < 1:
        raise ValueError(f"{who}: expected size >= 1, got {size}. Use 224 on ImageNet.")
