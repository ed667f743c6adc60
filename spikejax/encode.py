"""From images to sequences: the one border between [B, ...] and [B, T, ...]."""

import jax
import jax.numpy as jnp


def _check(who, images, time_steps):
    if time_steps < 1:
        raise ValueError(f"{who}: expected time_steps >= 1, got {time_steps}.")
    if images.ndim < 2:
        raise ValueError(
            f"{who}: expected a batch [B, ...], got shape {images.shape}. "
            "For one image, add the batch axis: image[None]."
        )


def direct(images: jax.Array, time_steps: int) -> jax.Array:
    """The image itself as a constant current at every step: [B, ...] -> [B, T, ...]."""
    _check("direct", images, time_steps)
    shape = (images.shape[0], time_steps, *images.shape[1:])
    return jnp.broadcast_to(images[:, None], shape)


def poisson(images: jax.Array, time_steps: int, *, rng: jax.Array) -> jax.Array:
    """Independent spikes with the intensity as probability: z_t = [U(0, 1) < x].

    Args:
        images: [B, ...] with values in [0, 1]; less never fires, more always does.
        time_steps: T >= 1.
        rng: random key.

    Returns:
        spikes in {0, 1}, [B, T, ...], mean over T tends to x.
    """
    _check("poisson", images, time_steps)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"poisson: expected intensities in [0, 1], got {images.dtype}. Divide: "
            "images / 255."
        )
    shape = (images.shape[0], time_steps, *images.shape[1:])
    uniform = jax.random.uniform(rng, shape, images.dtype)
    return (uniform < images[:, None]).astype(images.dtype)


def latency(images: jax.Array, time_steps: int) -> jax.Array:
    """One spike each, the earlier the brighter: at step round((1 - x) (T - 1)).

    Args:
        images: [B, ...] with values in [0, 1], clipped; zero does not fire.
        time_steps: T >= 1.

    Returns:
        spikes in {0, 1}, [B, T, ...], at most one over T.
    """
    _check("latency", images, time_steps)
    x = jnp.clip(images, 0, 1)
    step = jnp.round((1 - x) * (time_steps - 1)).astype(jnp.int32)
    spikes = jax.nn.one_hot(step, time_steps, axis=1, dtype=images.dtype)
    return spikes * (x > 0)[:, None].astype(images.dtype)
