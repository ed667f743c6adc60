"""From images to sequences: constant, random and timed spikes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spikejax import encode

IMAGES = jnp.linspace(0, 1, 2 * 3 * 3 * 1).reshape(2, 3, 3, 1)
ENCODINGS = {
    "direct": encode.direct,
    "poisson": lambda images, steps: encode.poisson(
        images, steps, rng=jax.random.key(0)
    ),
    "latency": encode.latency,
}


def test_direct_repeats_the_image():
    xs = encode.direct(IMAGES, 3)
    assert xs.shape == (2, 3, 3, 3, 1)
    for t in range(3):
        np.testing.assert_array_equal(xs[:, t], IMAGES)


def test_images_of_8_bits_are_normalised_on_the_device():
    made = jax.jit(encode.normalised((0.5, 0.25, 0.0), (0.5, 0.25, 1.0), 2))
    xs = made(jnp.full((2, 4, 4, 3), 255, jnp.uint8), jax.random.key(0))
    assert xs.shape == (2, 2, 4, 4, 3) and xs.dtype == jnp.float32
    np.testing.assert_array_equal(xs, np.full(xs.shape, (1.0, 3.0, 1.0)))


def test_poisson_fires_at_the_rate_of_the_intensity():
    steps = 4000
    xs = encode.poisson(IMAGES, steps, rng=jax.random.key(0))
    assert set(np.unique(xs)) == {0.0, 1.0}
    deviation = np.sqrt(IMAGES * (1 - IMAGES) / steps)
    assert np.all(np.abs(xs.mean(1) - IMAGES) <= 4 * deviation)


def test_poisson_of_short_floats_fires_at_the_same_rate():
    dark = jnp.full((1, 1), 1 / 256, jnp.bfloat16)
    xs = encode.poisson(dark, 20_000, rng=jax.random.key(0))
    assert float(xs.astype(jnp.float32).sum()) == pytest.approx(20_000 / 256, rel=0.4)


def test_poisson_never_fires_at_zero_and_always_at_one():
    images = jnp.array([[-1.0, 0.0, 1.0, 2.0]])
    xs = encode.poisson(images, 100, rng=jax.random.key(0))
    np.testing.assert_array_equal(xs.mean(1), [[0, 0, 1, 1]])


def test_poisson_steps_are_independent_and_follow_the_key():
    half = jnp.full((1, 1), 0.5)
    xs = encode.poisson(half, 4000, rng=jax.random.key(0))[0, :, 0]
    assert abs(np.corrcoef(xs[:-1], xs[1:])[0, 1]) < 0.06
    again = encode.poisson(half, 4000, rng=jax.random.key(0))[0, :, 0]
    other = encode.poisson(half, 4000, rng=jax.random.key(1))[0, :, 0]
    np.testing.assert_array_equal(xs, again)
    assert 0.4 < float((xs != other).mean()) < 0.6


def test_latency_by_hand():
    images = jnp.array([[1.0, 0.75, 0.5, 0.25, 1e-6, 0.0]])
    spikes = encode.latency(images, 5)[0]
    expected = np.zeros((5, 6))
    expected[range(5), range(5)] = 1  # each a step later, and zero never
    np.testing.assert_array_equal(spikes, expected)


def test_latency_fires_once_and_earlier_when_brighter():
    spikes = np.asarray(encode.latency(IMAGES, 8)).reshape(2, 8, 9)
    np.testing.assert_array_equal(spikes.sum(1), (IMAGES > 0).reshape(2, 9))
    steps = spikes.argmax(1).reshape(-1)[1:]  # from dark to bright
    assert np.all(np.diff(steps) <= 0) and steps[-1] == 0


def test_latency_clips_and_fits_into_one_step():
    images = jnp.array([[-0.5, 0.0, 0.3, 1.5]])
    np.testing.assert_array_equal(encode.latency(images, 1)[0], [[0, 0, 1, 1]])
    np.testing.assert_array_equal(encode.latency(images, 4)[0, :, 3], [1, 0, 0, 0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_latency_of_short_floats_has_all_its_steps(dtype):
    images = jnp.array([[1.0, 0.5, 0.25, 1 / 256, 1e-3, 0.0]], dtype)
    # Neither 398.44, the step of 1/256 of 400, nor 399 is a bfloat16.
    spikes = encode.latency(images, 400)[0]
    np.testing.assert_array_equal(spikes.sum(0), [1, 1, 1, 1, 1, 0])
    assert spikes.dtype == dtype
    np.testing.assert_array_equal(spikes.argmax(0), [0, 200, 299, 397, 399, 0])


@pytest.mark.parametrize("name", ENCODINGS)
def test_encodings_keep_type_and_are_the_same_in_jit(name):
    encoding = ENCODINGS[name]
    xs = encoding(IMAGES.astype(jnp.bfloat16), 2)
    assert xs.shape == (2, 2, 3, 3, 1) and xs.dtype == jnp.bfloat16
    jitted = jax.jit(encoding, static_argnums=1)
    np.testing.assert_array_equal(jitted(IMAGES, 2), encoding(IMAGES, 2))


@pytest.mark.parametrize("name", ENCODINGS)
def test_no_time_steps_are_an_error(name):
    with pytest.raises(ValueError, match=r"encode: .* time_steps >= 1, got .* and 0\."):
        ENCODINGS[name](IMAGES, 0)


@pytest.mark.parametrize("name", ENCODINGS)
def test_no_batch_is_an_error(name):
    message = r"encode: expected a batch \[B, \.\.\.\] .*, got shape \(3,\)"
    with pytest.raises(ValueError, match=message):
        ENCODINGS[name](jnp.ones(3), 2)


@pytest.mark.parametrize("name", ["poisson", "latency"])
def test_intensities_in_bytes_are_an_error(name):
    with pytest.raises(ValueError, match=f"{name}: .* got uint8. Divide: images / 255"):
        ENCODINGS[name](jnp.zeros((1, 2), jnp.uint8), 2)
