"""The network of fixed filters: what they are, what its layers see, and its sizes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.datasets import load_sample_images

from spikejax import calibrate, convert, energy
from spikejax.encode import direct
from spikejax.layers import MultiThreshold
from spikejax.memory import keep_membranes
from spikejax.models.whitened import WhitenedCNN, patch_basis
from spikejax.nn.norm import td_batch_norm
from spikejax.nn.quant import QuantReLU

# One image at both steps: what differs between them is the membranes' doing.
XS = direct(jax.random.normal(jax.random.key(1), (2, 9, 9, 3)), 2)
neuron = partial(MultiThreshold, 2, decay_input=False, learn_thresholds=True)


class Spy(nnx.Conv):
    """A convolution that records what it sees, where it is called eagerly."""

    seen: list[np.ndarray] = []

    def __call__(self, inputs, *args, **options):
        if not isinstance(inputs, jax.core.Tracer):
            self.seen.append(np.asarray(inputs))
        return super().__call__(inputs, *args, **options)


def tiny(**options):
    # Inputs three thresholds wide, so that layers fire with the first statistics.
    options |= {"norm": partial(td_batch_norm, v_threshold=3.0), "rngs": nnx.Rngs(0)}
    model = WhitenedCNN((4, 6), 5, neuron=neuron, **options)
    model.eval()
    return model


# Filters


@pytest.mark.parametrize("channels", [1, 3])
def test_filters_are_products_of_cosines_and_orthonormal(channels):
    basis = np.asarray(patch_basis(channels)).reshape(4 * channels, -1)
    np.testing.assert_allclose(basis.T @ basis, np.eye(4 * channels), atol=1e-6)

    def cosines(n):
        k, place = np.arange(n)[:, None], np.arange(n)
        rows = np.cos(np.pi * k * (2 * place + 1) / (2 * n))
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    expected = np.kron(np.kron(cosines(2), cosines(2)), cosines(channels))
    np.testing.assert_allclose(basis.T, expected, atol=1e-6)


def test_filters_of_colours_are_brightness_and_two_differences():
    of_colour = np.asarray(patch_basis(3))[0, 0, :, :3] * 2
    brightness, red_blue, green = of_colour.T
    np.testing.assert_allclose(brightness, np.ones(3) / np.sqrt(3), atol=1e-6)
    np.testing.assert_allclose(red_blue, np.array([1, 0, -1]) / np.sqrt(2), atol=1e-6)
    np.testing.assert_allclose(green, np.array([1, -2, 1]) / np.sqrt(6), atol=1e-6)


def correlation(rows):
    """The mean size of the correlation of two columns."""
    return np.abs(np.corrcoef(rows.T))[~np.eye(rows.shape[1], dtype=bool)].mean()


def test_filters_whiten_patches_of_photographs():
    # Two photographs, every fourth pixel: neighbours differ as in small images.
    photos = np.stack(load_sample_images().images)[:, ::4, ::4] / 255.0
    corners = [photos[:, i : 106 + i, j : 159 + j] for i in (0, 1) for j in (0, 1)]
    patches = np.stack(corners, -2).reshape(-1, 12)
    basis = np.asarray(patch_basis(3)).reshape(12, 12)
    assert correlation(patches) > 0.8 > 0.06 > correlation(patches @ basis)


# Network


def whole(model):
    return model(XS)


def stepwise(model):
    keep_membranes(model, XS[:, :1])
    return jnp.concatenate([model(XS[:, t : t + 1]) for t in range(2)], 1)


@pytest.fixture(scope="module")
def results():
    graphdef, params, rest = nnx.split(tiny(), nnx.Param, ...)
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    def gradient(run):
        @partial(jax.grad, has_aux=True)
        def both(params):
            logits = run(nnx.merge(graphdef, params, rest))
            return (logits[..., 0] ** 2).sum(), logits

        return jax.jit(both)(params)

    return {run: gradient(run) for run in (whole, stepwise)}


def test_layer_by_layer_is_step_by_step(results):
    logits = results[whole][1]
    assert logits.shape == (2, 2, 5)
    assert not jnp.allclose(logits[:, 0], logits[:, 1], atol=1e-3)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, results[stepwise], results[whole])


def test_all_parameters_get_a_gradient_and_the_filters_are_none(results):
    gradients = results[whole][0]
    assert "filters" not in gradients
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert jnp.isfinite(gradient).all() and jnp.any(gradient != 0), path


def test_logits_stay_what_they_were(results):
    assert float(jnp.abs(results[whole][1]).sum()) == pytest.approx(2.802838, rel=1e-4)


def test_all_layers_after_the_filters_see_whole_numbers_of_spikes():
    Spy.seen.clear()
    model = tiny(conv=Spy)
    model(XS)
    image, *spikes = Spy.seen
    assert image.shape == XS.shape and len(spikes) == 4
    for seen in spikes:
        assert set(np.unique(seen)) == {0.0, 1.0, 2.0}


def test_pooling_of_currents_is_pooling_of_spikes_in_one_step():
    model, xs = tiny(), jax.random.normal(jax.random.key(2), (2, 1, 8, 8, 24))
    conv, norm, layer = model.convs[0], model.norms[1], model.neurons[1]
    pool = partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
    currents = layer(norm(pool(conv(xs))))
    assert len(jnp.unique(currents)) == 3
    np.testing.assert_array_equal(currents, pool(layer(norm(conv(xs)))))
    logits = model(XS[:, :1])
    model.pool_spikes = True
    np.testing.assert_array_equal(model(XS[:, :1]), logits)


def test_only_the_filters_multiply():
    report = energy.measure(tiny(), XS[:, :1])
    # 8x8 patches of 12 numbers meet 12 filters, at 4.6 pJ; a third of them are red
    # against blue, whose weight for green is 0.
    assert report.mac_nj == pytest.approx(8 * 8 * (12 * 12 - 4 * 4) * 4.6e-3)
    assert report.energy_nj > report.mac_nj


def test_with_average_pooling_it_converts_exactly():
    def build(neuron):
        return WhitenedCNN(
            (4, 6), 5, neuron=neuron, pool=nnx.avg_pool, rngs=nnx.Rngs(0)
        )

    xs = XS[:, :1]
    relu = build(lambda: nnx.relu)
    ann = calibrate(relu, xs, neuron=partial(QuantReLU, 2)).model
    snn, _ = convert(ann, xs, 3)
    ann.eval()
    np.testing.assert_allclose(snn(xs), ann(xs), atol=1e-5)
    # All is linear between the neurons, the mean before the head too.
    relu.eval()
    relu.neurons[-1] = lambda x: x
    maps = jax.random.normal(jax.random.key(2), (2, 1, 2, 2, 6))
    relu.convs[3] = lambda xs: maps
    np.testing.assert_allclose(
        relu(xs), relu.head(relu.norms[-1](maps).mean((2, 3))) / 9, atol=1e-6
    )
