"""Spiking transformers: the authors' answers, and two families read with NumPy.

golden/transformers.json has logits and mean spikes per neuron, in the order of
computation, of the public code of Spikformer and E-SpikeFormer, run in float64 with the
weights of ``wave``.
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax import LIF, MultiThreshold, losses
from spikejax.layers import Neuron
from spikejax.models.spikformer import (
    e_spikeformer,
    qkformer,
    sdt,
    small,
    spikformer,
)
from spikejax.models.transformer import (
    Attention,
    Block,
    Chain,
    Paths,
    Transformer,
    Weighted,
)
from spikejax.nn.penalty import Penalised

GOLDEN = json.loads((Path(__file__).parent / "golden/transformers.json").read_text())


def made(design, num_classes=10, **options):
    model = Transformer(design, num_classes, rngs=nnx.Rngs(0), **options)
    model.eval()
    return model


def units(layer):
    """The weighted layers of a layer, in the order of the authors' parameters."""
    parts = {
        Weighted: lambda x: [],
        Chain: lambda x: x.units,
        Attention: lambda x: [*x.units, x.last],
        Block: lambda x: x.branches,
        Paths: lambda x: [x.main, x.side],
        Transformer: lambda x: x.layers,
    }[type(layer)](layer)
    return [u for p in parts for u in units(p)] if parts else [layer]


def wave(number, shape):
    """The values of the authors' parameter of that number."""
    i = np.arange(np.prod(shape), dtype=float)
    return np.sin(1 + 0.013 * i**2 + 0.7 * i + 3 * number).reshape(shape)


def fill(model, scale, *, spike=1.0, unused=()):
    """Set the weights by their numbers, and return the number of parameters.

    spike: size of a spike in the authors' code, which multiplies the weights here.
    unused: numbers of parameters that their code has and does not use.
    """
    gain, shift, width = scale
    number = 0

    def take(shape):
        nonlocal number
        while number in unused:
            number += 1
        number += 1
        return wave(number - 1, shape)

    def kernel(layer, factor):
        *sides, inputs, outputs = layer.kernel.shape
        s = take((outputs, inputs, *sides)) * gain / np.sqrt(inputs * np.prod(sides))
        layer.kernel[...] = jnp.asarray(factor * np.moveaxis(s, (0, 1), (-1, -2)))
        if layer.bias is not None:
            layer.bias[...] = jnp.asarray(shift + 0.3 * take((outputs,)))

    for k, unit in enumerate(units(model)):
        kernel(unit.layer, spike if k else 1.0)
        shape, i = unit.norm.scale.shape, np.arange(unit.norm.scale.size)
        unit.norm.scale[...] = jnp.asarray(width + 0.3 * take(shape))
        unit.norm.bias[...] = jnp.asarray(shift + 0.3 * take(shape))
        unit.norm.mean[...] = jnp.asarray(0.1 * np.sin(1.3 * i))
        unit.norm.var[...] = jnp.asarray(1 + 0.5 * np.sin(0.9 * i))
    kernel(model.head, 1.0)
    return number


def images(side, steps):
    """The input of the authors' code, with channels last and a time axis."""
    i = np.arange(2 * 3 * side * side)
    xs = np.sin(0.37 * i) + 0.5 * np.cos(0.011 * i)
    xs = xs.reshape(2, 3, side, side).transpose(0, 2, 3, 1)[:, None]
    return jnp.asarray(np.repeat(xs, steps, 1), jnp.float32)


@pytest.fixture
def spikes(monkeypatch):
    """The mean spikes of each layer of neurons, as they are called."""
    found, call = [], Neuron.__call__

    def noted(self, xs, **options):
        ys = call(self, xs, **options)
        found.append(ys.mean())
        return ys

    monkeypatch.setattr(Neuron, "__call__", noted)
    return found


# Design, side, time steps, size of a spike, numbers of unused LayerNorms, parameters.
CASES = {
    "spikformer": (
        spikformer(32, 2, heads=4),
        *(16, 4, 1.0, (15, 16, 33, 34, 43, 44, 61, 62), 73),
    ),
    "e-spikeformer": (e_spikeformer((16, 32, 64, 64)), 64, 1, 0.25, (), 314),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_spikes_are_those_of_the_authors_code(name, spikes):
    design, side, steps, spike, unused, number = CASES[name]
    model, golden = made(design), GOLDEN[name]
    assert fill(model, golden["scale"], spike=spike, unused=unused) == number
    graphdef, state = nnx.split(model)

    @jax.jit
    def answer(state, xs):
        return nnx.merge(graphdef, state)(xs).mean(1), spikes

    logits, means = answer(state, images(side, steps))
    np.testing.assert_allclose(logits, golden["logits"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(means, golden["spikes"], rtol=0, atol=6e-5)


# The other two families: images [B, T, H, W, C] in float64, read from the papers' code.


def convolve(xs, kernel, stride):
    side = kernel.shape[0]
    pad = ((0, 0), (0, 0), *((side // 2, side // 2),) * 2, (0, 0))
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(xs, pad), (side, side), (2, 3)
    )[:, :, ::stride, ::stride]
    return np.einsum("bthwcij,ijcd->bthwd", windows, kernel)


def halved(xs):
    pad = ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0))
    padded = np.pad(xs, pad, constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    return windows[:, :, ::2, ::2].max((-1, -2))


def fire(xs, threshold=1.0):
    """LIF with tau 2 and hard reset to 0."""
    v, spikes = np.zeros_like(xs[:, 0]), np.zeros_like(xs)
    for t in range(xs.shape[1]):
        u = v + (xs[:, t] - v) / 2
        distance = abs(u - threshold)  # float32 has the same spikes; ties are exact
        assert np.all((distance == 0) | (distance > 1e-6))
        spikes[:, t] = u >= threshold
        v = np.where(spikes[:, t], 0, u)
    return spikes


class Reading:
    """A network of the papers' equations, with the weights of a model of ours."""

    def __init__(self, model):
        self.weights, self.head = iter(units(model)), model.head

    def weigh(self, xs, stride=1):
        unit = next(self.weights)
        kernel = np.asarray(unit.layer.kernel[...], float)
        kernel = kernel if kernel.ndim == 4 else kernel[None, None]
        ys = convolve(xs, kernel, stride)
        if unit.layer.bias is not None:
            ys = ys + np.asarray(unit.layer.bias[...])
        norm = {k: np.asarray(getattr(unit.norm, k)[...]) for k in ("mean", "var")}
        ys = (ys - norm["mean"]) / np.sqrt(norm["var"] + 1e-5)
        return ys * np.asarray(unit.norm.scale[...]) + np.asarray(unit.norm.bias[...])

    def logits(self, ys):
        return ys @ np.asarray(self.head.kernel[...]) + np.asarray(self.head.bias[...])

    def sdt(self, xs, depth):
        xs = fire(self.weigh(xs))
        xs = fire(self.weigh(xs))
        xs = halved(fire(self.weigh(xs)))
        xs = halved(self.weigh(xs))
        xs = xs + self.weigh(fire(xs))
        for _ in range(depth):
            s = fire(xs)
            q, k, v = (fire(self.weigh(s)) for _ in range(3))
            active = fire((k * v).sum((2, 3), keepdims=True), 0.5)
            xs = xs + self.weigh(q * active)
            xs = xs + self.weigh(fire(self.weigh(fire(xs))))
        return self.logits(fire(xs.mean((2, 3))))

    def mlp(self, xs):
        return xs + fire(self.weigh(fire(self.weigh(xs))))

    def tokens(self, xs, heads):
        q, k = (fire(self.weigh(xs)) for _ in range(2))
        split = (*q.shape[:4], heads, -1)
        active = fire(q.reshape(split).sum(-1, keepdims=True), 0.5)
        masked = (active * k.reshape(split)).reshape(k.shape)
        return self.mlp(xs + fire(self.weigh(masked)))

    def pixels(self, xs, heads):
        q, k, v = (fire(self.weigh(xs)) for _ in range(3))
        flat = [
            x.reshape(*x.shape[:2], -1, heads, x.shape[4] // heads) for x in (q, k, v)
        ]
        ys = 0.125 * np.einsum("btnhd,btmhd,btmhe->btnhe", *flat)
        return self.mlp(xs + fire(self.weigh(fire(ys.reshape(v.shape), 0.5))))

    def qkformer(self, xs, heads, imagenet):
        first = halved if imagenet else lambda x: x
        second = (lambda x: x) if imagenet else halved
        xs = fire(first(self.weigh(xs)))
        for stage in range(3):
            main = fire(first(self.weigh(xs)))
            if imagenet or stage:
                main = fire(second(self.weigh(main)))
            xs = main + fire(self.weigh(xs, 2 if imagenet or stage else 1))
            xs = (self.pixels if stage == 2 else self.tokens)(xs, heads)
        return self.logits(xs.mean((2, 3)))


def scattered(model, seed):
    """Give a model weights and statistics with which its neurons fire."""
    rng = np.random.default_rng(seed)
    for unit in units(model):
        size = unit.norm.scale.shape
        unit.norm.scale[...] = jnp.asarray(rng.uniform(1, 3, size), jnp.float32)
        unit.norm.bias[...] = jnp.asarray(rng.normal(1.5, 1.0, size), jnp.float32)
        unit.norm.mean[...] = jnp.asarray(rng.normal(0, 0.2, size), jnp.float32)
        unit.norm.var[...] = jnp.asarray(rng.uniform(0.5, 1.5, size), jnp.float32)
    return model


def noise(side, steps):
    return jax.random.normal(jax.random.key(1), (2, steps, side, side, 3))


def test_sdt_is_its_equations():
    model = scattered(made(sdt(16, 1, halve=(2, 3))), 0)
    xs = noise(8, 3)
    expected = Reading(model).sdt(np.asarray(xs, float), 1)
    assert expected.std(1).min() > 0  # time steps differ
    np.testing.assert_allclose(model(xs), expected, rtol=1e-5, atol=1e-5)
    assert expected.std(0).max() > 1e-3  # the images differ


@pytest.mark.parametrize(("imagenet", "side"), [(False, 8), (True, 32)])
def test_qkformer_is_its_equations(imagenet, side):
    design = qkformer(16, (1, 1, 1), heads=2, imagenet=imagenet)
    model = scattered(made(design), 1)
    xs = noise(side, 2)
    expected = Reading(model).qkformer(np.asarray(xs, float), 2, imagenet)
    np.testing.assert_allclose(model(xs), expected, rtol=1e-5, atol=1e-5)
    assert expected.std(0).max() > 1e-3


def test_attention_is_as_large_for_neurons_of_several_spikes():
    def scale(neuron):
        make = partial(Transformer, spikformer(8, 1, heads=2), 3, neuron=neuron)
        model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
        return dict(model.layers[-1].branches[0].options)["scale"]

    assert scale(LIF) == scale(lambda: nnx.relu) == 0.125
    assert scale(partial(MultiThreshold, 4)) == 0.125 / 4**3


def thresholds(model):
    attention = model.layers[-1].branches[0]
    parts = attention.neurons[0], attention.attention_neuron, attention.neuron
    return [float(part.thresholds[0]) for part in parts]


def test_the_neurons_are_the_papers_unless_others_are_given():
    design = spikformer(8, 1, heads=2)
    assert thresholds(made(design)) == [1, 0.5, 1]
    assert thresholds(made(design, neuron=partial(LIF, 2.0, 3.0))) == [3, 3, 3]
    half = {"neuron": LIF, "attention_neuron": partial(LIF, 2.0, 0.25)}
    assert thresholds(made(design, **half)) == [1, 0.25, 1]


def test_remat_recomputes_every_layer():
    model = made(small(8, 1, heads=2), remat=True)
    graphdef, state = nnx.split(model)
    jaxpr = jax.make_jaxpr(lambda s: nnx.merge(graphdef, s)(noise(8, 1)))(state)
    names = [eqn.primitive.name for eqn in jaxpr.eqns]
    assert names.count("checkpoint") + names.count("remat2") == len(model.layers)


def test_the_head_starts_small():
    kernel = made(small(8, 1, heads=2), 100).head.kernel[...]
    assert jnp.abs(kernel).max() <= 0.02 / 0.87962566103423978 * 2
    assert 0.015 < kernel.std() < 0.025


def test_wrong_arguments_say_what_is_expected():
    with pytest.raises(ValueError, match=r"Transformer: expected neuron=LIF, .* got a"):
        made(sdt(8, 1), neuron=LIF())
    with pytest.raises(
        ValueError, match=r"Transformer: expected images \[B, T, H, W, 3"
    ):
        made(small(8, 1, heads=2))(jnp.ones((1, 1, 4, 4, 3)))
    with pytest.raises(ValueError, match="self_attention: expected .* and 3 heads"):
        made(spikformer(8, 1, heads=3))(jnp.ones((1, 1, 4, 4, 3)))


def test_a_cost_of_spikes_does_not_change_the_network():
    several = partial(MultiThreshold, 4, v_threshold=0.5)

    def penalised():
        return Penalised(several(), losses.firing_rate)

    xs = jax.random.normal(jax.random.key(0), (2, 1, 32, 32, 3))
    plain, with_cost = (
        Transformer(spikformer(16, 1, heads=2), 3, neuron=neuron, rngs=nnx.Rngs(0))
        for neuron in (several, penalised)
    )
    np.testing.assert_array_equal(with_cost(xs), plain(xs))
