"""Encodings of images [B, ...] as sequences [B, T, ...]."""

from collections.abc import Callable, Sequence
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np


def direct(images: jax.Array, time_steps: int) -> jax.Array:
    """Return the image itself as a constant current, [B, T, ...].

    Args:
        images: [B, ...].
        time_steps: T >= 1.

    Raises:
        ValueError: images have no batch axis, or T < 1.

    Examples:
        >>> direct(jnp.zeros((2, 32, 32, 3)), 4).shape
        (2, 4, 32, 32, 3)
    """
    shape = jnp.shape(images)
    if len(shape) < 2 or not isinstance(time_steps, Integral) or time_steps < 1:
        raise ValueError(
            "encode: expected a batch [B, ...] and a whole number of time_steps >= 1, "
            f"got shape {shape} and {time_steps!r}. For one image: image[None]."
        )
    # Not the field's [T, B, ...]: with B sharded, folding T and B into one makes XLA
    # gather whole activations, silently (142 instead of 18 MB per device, on eight).
    shape = (shape[0], time_steps, *shape[1:])
    return jnp.broadcast_to(jnp.asarray(images)[:, None], shape)


def normalised(
    mean: Sequence[float], std: Sequence[float], time_steps: int
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return the encoding (images, rng) -> xs of 8-bit images, every step equal.

    xs_t = (image / 255 - mean) / std

    Args:
        mean, std: of the channels, where white is 1.
        time_steps: T >= 1.

    Returns:
        function of uint8 [B, H, W, C], with ``direct``'s [B, T, H, W, C] in float32.
    """
    # NumPy: an array of JAX's here would keep processes from being joined later.
    shift, scale = np.array(mean, np.float32), np.array(std, np.float32)

    def encode(images: jax.Array, rng: jax.Array) -> jax.Array:
        return direct((images / 255.0 - shift) / scale, time_steps)

    return encode


def currents(raw: jax.Array, rng: jax.Array) -> jax.Array:
    """Return frames of events or sequences, [B, T, ...], themselves as currents."""
    return raw.astype(jnp.float32)


def poisson(images: jax.Array, time_steps: int, *, rng: jax.Array) -> jax.Array:
    """Return independent spikes with the intensity as probability: z_t = [U(0,1) < x].

    Args:
        images: [B, ...], floats in [0, 1]; less never fires, more always does.
        time_steps: T >= 1.
        rng: random key.

    Returns:
        spikes in {0, 1}, [B, T, ...], whose mean over T tends to x.

    Raises:
        ValueError: as for ``direct``, or images are not floats.
    """
    _check_intensities("poisson", images)
    xs = direct(images, time_steps)
    # A bfloat16 uniform has 7 bits: x = 1/255 then fires twice as often as it should.
    uniform = jax.random.uniform(rng, xs.shape, jnp.float32)
    return (uniform < xs).astype(images.dtype)


def latency(images: jax.Array, time_steps: int) -> jax.Array:
    """Return one spike each, the brighter the earlier: at round((1 - x) (T - 1)).

    Args:
        images: [B, ...], floats in [0, 1], clipped; zero does not fire.
        time_steps: T >= 1.

    Returns:
        spikes in {0, 1}, [B, T, ...], at most one over T.

    Raises:
        ValueError: as for ``poisson``.

    Examples:
        >>> latency(jnp.array([[1.0, 0.5, 0.0]]), 3)[0].tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    _check_intensities("latency", images)
    # bfloat16 rounds step 399 of 400 to 400, which does not exist: no spike.
    xs = jnp.clip(direct(images, time_steps).astype(jnp.float32), 0, 1)
    step = jnp.round((1 - xs[:, 0]) * (time_steps - 1)).astype(jnp.int32)
    spikes = jax.nn.one_hot(step, time_steps, axis=1, dtype=images.dtype)
    return jnp.where(xs > 0, spikes, 0)


def _check_intensities(who: str, images: jax.Array) -> None:
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"{who}: expected intensities in [0, 1], got {images.dtype}. Divide: "
            "images / 255."
        )
