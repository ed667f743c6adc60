"""Augmentation of image batches in numpy: crop, flip, Cutout, AutoAugment.

Every function here makes an augmentation: a function (images uint8 [B, H, W, C], rng)
to images of the same shape. It leaves its argument as it is, and all its randomness
comes from rng. Training calls it with 8 images at a time.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]

LEVELS = 9  # the magnitudes of a policy are 0 to 9


def compose(*augments: Augment) -> Augment:
    """The given augmentations, one after the other."""

    def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        for each in augments:
            images = each(images, rng)
        return images

    return augment


def random_crop(pad: int = 4) -> Augment:
    """Pads each side with black, then cuts out a window of the former size.

    Args:
        pad: width of the border in pixels, >= 0.

    Reference: He et al. 2015, arXiv:1512.03385, section 4.2.
    """
    if pad < 0:
        raise ValueError(f"random_crop: expected pad >= 0, got {pad}. Use pad=4.")

    def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        count, height, width, _ = images.shape
        padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        corners = rng.integers(0, 2 * pad + 1, (count, 2))
        out = np.empty_like(images)
        # A loop of plain copies is several times faster than one indexed gather.
        for i, (y, x) in enumerate(corners.tolist()):
            out[i] = padded[i, y : y + height, x : x + width]
        return out

    return augment


def random_flip() -> Augment:
    """Mirrors each image left to right with probability one half."""

    def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        flipped = rng.random(len(images)) < 0.5
        out = images.copy()
        out[flipped] = images[flipped, :, ::-1]
        return out

    return augment


def cutout(size: int) -> Augment:
    """Paints a square around a random pixel grey; its part outside is lost.

    Args:
        size: side of the square in pixels, >= 1 (16 on CIFAR-10, 8 on CIFAR-100).

    Reference: DeVries and Taylor 2017, arXiv:1708.04552, who paint the mean of the set.
    """
    if size < 1:
        raise ValueError(f"cutout: expected size >= 1, got {size}. Use 16 on CIFAR-10.")

    def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        count, height, width, _ = images.shape
        tops = rng.integers(0, height, count) - size // 2
        lefts = rng.integers(0, width, count) - size // 2
        out = images.copy()
        for i, (y, x) in enumerate(zip(tops.tolist(), lefts.tolist(), strict=True)):
            out[i, max(y, 0) : y + size, max(x, 0) : x + size] = 128
        return out

    return augment


def autoaugment_cifar() -> Augment:
    """One of the 25 sub-policies that AutoAugment found on CIFAR-10, for each image.

    A sub-policy is two operations, each done with its own probability. Goes between
    the flip and Cutout; for colour images [B, H, W, 3].

    Reference: Cubuk et al. 2018, arXiv:1805.09501, tables 6 and 7. The paper leaves
    open: we fill with black, scale its 150 pixels (of 331) to the side of the image,
    draw the sign of a shear, shift or turn, and let a larger magnitude solarize or
    posterize more.
    """
    return _autoaugment("autoaugment_cifar", CIFAR_POLICY)


def autoaugment_imagenet() -> Augment:
    """One of the 25 sub-policies that AutoAugment found on ImageNet, for each image.

    Goes after crop and flip; timm calls it "original", and there a larger magnitude
    solarizes and posterizes less. All else is as in autoaugment_cifar.

    Reference: Cubuk et al. 2018, arXiv:1805.09501, tables 6 and 9.
    """
    return _autoaugment("autoaugment_imagenet", IMAGENET_POLICY)


def _autoaugment(who: str, policy: Sequence[tuple]) -> Augment:
    def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(
                f"{who}: expected colour images [B, H, W, 3], got shape "
                f"{images.shape}. Leave it out for this set."
            )
        count = len(images)
        chosen = rng.integers(0, len(policy), count).tolist()
        chances = rng.random((count, 2)).tolist()
        signs = rng.choice((-1.0, 1.0), (count, 2)).tolist()
        out = images.copy()
        for i, sub_policy in enumerate(chosen):
            steps = zip(policy[sub_policy], chances[i], signs[i], strict=True)
            drawn = [
                (OPERATIONS[name], magnitude / LEVELS, sign)
                for (name, probability, magnitude), chance, sign in steps
                if chance < probability
            ]
            if drawn:
                image = Image.fromarray(images[i])
                for operation, strength, sign in drawn:
                    image = operation(image, strength, sign)
                out[i] = np.asarray(image)
        return out

    return augment


def _affine(image: Image.Image, a, b, c, d, e, f) -> Image.Image:
    """The image whose pixel (x, y) was at (a x + b y + c, d x + e y + f)."""
    return image.transform(
        image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.NEAREST
    )


def _enhance(enhancer) -> Callable:
    """Factor from 0.1 to 1.9, where 1 is the image as it was."""
    return lambda image, strength, sign: enhancer(image).enhance(0.1 + 1.8 * strength)


# name: (image, strength in 0..1, sign -1 or 1) -> image
OPERATIONS: dict[str, Callable[[Image.Image, float, float], Image.Image]] = {
    "shear_x": lambda im, m, sign: _affine(im, 1, sign * 0.3 * m, 0, 0, 1, 0),
    "shear_y": lambda im, m, sign: _affine(im, 1, 0, 0, sign * 0.3 * m, 1, 0),
    "translate_x": lambda im, m, sign: _affine(
        im, 1, 0, int(sign * m * im.width * 150 / 331), 0, 1, 0
    ),
    "translate_y": lambda im, m, sign: _affine(
        im, 1, 0, 0, 0, 1, int(sign * m * im.height * 150 / 331)
    ),
    "rotate": lambda im, m, sign: im.rotate(sign * 30 * m),
    "auto_contrast": lambda im, m, sign: ImageOps.autocontrast(im),
    "invert": lambda im, m, sign: ImageOps.invert(im),
    "equalize": lambda im, m, sign: ImageOps.equalize(im),
    "solarize": lambda im, m, sign: ImageOps.solarize(im, round(256 * (1 - m))),
    "posterize": lambda im, m, sign: ImageOps.posterize(im, round(8 - 4 * m)),
    "contrast": _enhance(ImageEnhance.Contrast),
    "color": _enhance(ImageEnhance.Color),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
}

# Table 7: two times (operation, probability, magnitude).
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

# Table 9.
IMAGENET_POLICY = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("auto_contrast", 0.6, 5)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 4), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 7)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 2)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 8), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("color", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 2)),
    (("equalize", 0.0, 7), ("equalize", 0.8, 8)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("color", 1.0, 2)),
    (("color", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 8)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 9)),
    (("color", 0.4, 0), ("equalize", 0.6, 3)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("auto_contrast", 0.6, 5)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
)
