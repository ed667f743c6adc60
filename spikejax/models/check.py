"""Checks of the arguments and of the input that all networks share."""

import inspect

import jax
import jax.numpy as jnp

from spikejax.layers import Factory


def check_factory(who: str, neuron: Factory) -> None:
    """Check that ``neuron`` makes an activation when it is called with no arguments.

    Raises:
        ValueError: it is an activation itself, such as LIF() or nnx.relu, or no
            function.
    """
    try:
        inspect.signature(neuron).bind()
    except TypeError as error:
        name = getattr(neuron, "__name__", f"a {type(neuron).__name__}")
        raise ValueError(
            f"{who}: expected neuron=LIF, partial(LIF, 3.0), lambda: nnx.relu, or "
            f"another factory without arguments, got {name}. Every layer "
            "calls it for neurons of its own."
        ) from error


def check_images(who: str, xs: jax.Array, channels: int, side: int = 1) -> None:
    """Check the input of a network of images.

    Args:
        who: the network.
        xs: its input.
        channels: that it takes.
        side: the smallest height and width that it takes.

    Raises:
        ValueError: xs is not [B, T, H, W, C] of those sizes, in floating point.
    """
    shape = xs.shape
    if len(shape) != 5 or shape[4] != channels or min(shape[2:4]) < side:
        raise ValueError(
            f"{who}: expected images [B, T, H, W, {channels}] of sides of at least "
            f"{side}, got shape {shape}. Without time, add the axis: images[:, None]; "
            "for other channels, build the network with in_channels."
        )
    if not jnp.issubdtype(xs.dtype, jnp.floating):
        raise ValueError(
            f"{who}: expected images in floating point, got {xs.dtype}. Scale them as "
            "in training: card.encode(images) of a trained run, or images / 255."
        )
