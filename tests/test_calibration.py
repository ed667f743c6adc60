"""Conversion without training: thresholds, biases, sums of spikes, signed neurons."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax import energy, stepper
from spikejax._compat import List
from spikejax.conversion import calibrate, convert, fold_norms, least_squares, steps
from spikejax.functions import Function
from spikejax.nn.quant import QuantReLU, ScaledIF, half_up

SIGNED = -math.inf


def currents(z):
    """Input [B, T, C] of T steps with the values z [T]."""
    return jnp.asarray(z, jnp.float32)[None, :, None]


def test_signed_spikes_by_hand():
    """v_threshold 2 and N = 2: spikes of 1, up to two in a step."""
    layer = ScaledIF(2.0, 2, lowest=SIGNED)
    # 0.4 waits; 0.4 + 0.4 rounds to 1; -3 leaves -3.2, of which two can go; then -1.
    spikes = layer(currents([0.4, 0.4, -3.0, 0.0, 0.0]))
    np.testing.assert_array_equal(spikes[0, :, 0], [0, 1, -2, -1, 0])
    trains = layer(currents([0.4, 0.4, -3.0]), trains=True)[0, :, 0]
    np.testing.assert_array_equal(trains, [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1]])


def test_a_relu_takes_back_what_it_sent_and_no_more():
    layer = ScaledIF(2.0, 2, lowest=0.0)
    spikes = layer(currents([1.6, -3.0, 0.0, 2.0, 0.5]))
    # 2, and back to a sum of 0; the membrane is at -1.4, and 0.6 rounds to 1.
    np.testing.assert_array_equal(spikes[0, :, 0], [2, -2, 0, 1, 0])
    plain = ScaledIF(2.0, 2)(currents([1.6, -3.0, 0.0, 2.0, 0.5]))
    np.testing.assert_array_equal(plain[0, :, 0], [2, 0, 0, 0, 0])


@pytest.mark.parametrize(("dyadic", "number"), [(False, 3), (True, 2)])
@pytest.mark.parametrize("lowest", [None, 0.0, SIGNED])
def test_the_mean_output_is_the_staircase(dyadic, number, lowest):
    """The total is one rounding of the whole input; both kinds have three levels."""
    layer = ScaledIF(1.5, number, dyadic=dyadic, lowest=lowest)
    z = jnp.linspace(-2.01, 2, 57)
    got = layer(jnp.repeat(z[None, None], 4, 1)).mean(1)[0]
    least = -12 if lowest == SIGNED else 0
    expected = np.clip(np.floor(np.asarray(z) * 12 / 1.5 + 0.5), least, 12) * 1.5 / 12
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_dyadic_spikes_of_two_sizes():
    """v_threshold 3: sizes 2 and 1. Three is both, and counts as two spikes."""
    layer = ScaledIF(3.0, 2, dyadic=True)
    z = currents([3.0, 1.0, 2.0, 0.0])
    np.testing.assert_array_equal(layer(z)[0, :, 0], [3, 1, 2, 0])
    trains = layer(z, trains=True)[0, :, 0]
    np.testing.assert_array_equal(trains, [[1, 1], [0, 1], [1, 0], [0, 0]])
    np.testing.assert_array_equal(layer.count(jnp.array([3.0, 1, 2, -3])), [2, 1, 1, 2])


def test_taking_back_undoes_the_order_of_the_input():
    """Any order of the same currents has the total of their mean."""
    z = np.random.default_rng(0).normal(0.2, 0.6, (1, 6, 200)).astype("f4")
    total = np.asarray(ScaledIF(4.0, 8, lowest=0.0)(jnp.asarray(z))).sum(1)
    whole = np.maximum(np.floor(z.sum(1) * 2 + 0.5), 0) / 2
    # Rounding of sums decides on a tie, so all but a few are equal.
    assert (np.abs(total - whole) < 1e-4).mean() > 0.99
    plain = np.asarray(ScaledIF(4.0, 8)(jnp.asarray(z))).sum(1)
    assert (np.abs(plain - whole) < 1e-4).mean() < 0.8


def error(x, theta, levels):
    step = theta / levels
    return ((step * np.clip(np.round(x / step), 0, levels) - x) ** 2).mean()


@pytest.mark.parametrize("levels", [3, 15])
def test_least_squares_is_as_good_as_a_search(levels):
    x = np.abs(np.random.default_rng(levels).normal(size=4000)).astype("f4")
    found = float(least_squares(jnp.asarray(x), levels))
    best = min(error(x, theta, levels) for theta in x.max() * np.arange(1, 201) / 200)
    assert error(x, found, levels) <= best * 1.01
    step = found / levels  # a fixed point: theta = p sum(x q) / sum(q^2)
    q = np.clip(np.round(x / step), 0, levels)
    assert found == pytest.approx(levels * (x * q).sum() / (q * q).sum(), rel=1e-2)


def test_least_squares_of_whole_levels_and_of_nothing():
    x = jnp.arange(8.0) / 2
    assert float(least_squares(x, 7)) == pytest.approx(3.5, rel=1e-3)
    assert float(least_squares(jnp.zeros(5), 7)) == 0
    # Small activations have a small threshold.
    assert float(least_squares(x / 1000, 7)) == pytest.approx(3.5e-3, rel=1e-3)


class Inverted(nnx.Module):
    """Two inverted residuals of Flax: linear bottlenecks, a shortcut of currents."""

    def __init__(self):
        make = partial(nnx.Linear, rngs=nnx.Rngs(0))
        self.stem = make(6, 4)
        self.wide = List([make(4, 16), make(4, 16)])
        self.narrow = List([make(16, 4), make(16, 4)])
        self.head = make(4, 3)

    def __call__(self, xs):
        xs = self.stem(xs)
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            xs = xs + narrow(nnx.relu6(wide(xs)))
        return self.head(xs)


XS = jax.random.normal(jax.random.key(1), (64, 1, 6))
FINE = partial(QuantReLU, levels=60, rounding=half_up)


def answer(model, xs=XS):
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, xs: nnx.merge(graphdef, state)(xs))(state, xs)


@pytest.fixture(scope="module")
def made():
    """The network, and its quantised copy with all that calibrate can do."""
    model = Inverted()
    options = {"rule": least_squares, "per_channel": True, "currents": True}
    return model, calibrate(model, XS, neuron=FINE, correct=True, **options)


def test_currents_are_sites_before_all_weights_but_the_first(made):
    _, (ann, swaps) = made
    names = ["wide/0", "wide/0#2", "wide/1", "wide/1#2", "head"]
    assert [swap.path for swap in swaps] == names
    assert [site.signed for site in ann.sites] == [True, False, True, False, True]
    shapes = [swap.v_threshold.shape for swap in swaps]
    assert shapes == [(4,), (16,), (4,), (16,), (4,)]
    snn = convert(ann, XS, 4, neuron=partial(ScaledIF, dyadic=True)).model
    by_path = {row.path: row for row in energy.measure(snn, XS).connections}
    assert [path for path, row in by_path.items() if row.macs] == ["model/stem"]
    assert all(row.acs > 0 for path, row in by_path.items() if path != "model/stem")


def test_without_currents_they_meet_weights_as_they_are():
    ann, swaps = calibrate(Inverted(), XS, neuron=FINE)
    assert len(swaps) == 2
    assert float(jnp.abs(answer(ann) - answer(Inverted())).max()) < 0.1


def test_many_levels_are_near_the_network(made):
    model, (ann, _) = made
    expected = answer(model)
    assert float(jnp.abs(answer(ann) - expected).max()) < 0.15
    assert float(jnp.abs((answer(ann) - expected).mean((0, 1))).max()) < 0.01


@pytest.mark.parametrize("steps_, number", [(1, 60), (4, 15)])
def test_a_spiking_copy_answers_as_the_quantised_one(made, steps_, number):
    """With spikes that may be taken back T steps of N thresholds have T N levels."""
    _, (ann, _) = made
    neuron = partial(ScaledIF, lowest=0.0)
    run = steps.stream(convert(ann, XS, number, neuron=neuron).model, XS, steps_)
    wrong = jnp.abs(run.logits[-1] - answer(ann)[:, 0]).max(-1) > 1e-4
    assert float(wrong.mean()) < 0.1  # rounding moves a spike here and there


def test_equal_and_dyadic_thresholds_answer_alike(made):
    _, (ann, _) = made
    equal, dyadic = (
        steps.stream(
            convert(ann, XS, n, neuron=partial(ScaledIF, dyadic=d)).model, XS, 2
        )
        for n, d in ((7, False), (3, True))
    )
    wrong = jnp.abs(equal.logits - dyadic.logits).max((0, 2)) > 1e-4
    assert float(wrong.mean()) < 0.1  # rounding moves a spike here and there
    assert dyadic.spikes[-1].sum() < equal.spikes[-1].sum() / 2


def test_agreement_of_signed_sites(made):
    _, (ann, _) = made
    snn = convert(ann, XS, 60).model
    rows = steps.agreement(ann, snn, XS, 1)
    assert max(row.error for row in rows) < 1e-3
    assert max(row.clipping for row in rows) < 0.02


def test_the_correction_gives_each_layer_the_mean_of_the_network():
    """Coarse levels lose the small activations of one layer; their mean comes back."""
    model = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.relu)
    coarse = {"rule": least_squares, "neuron": partial(QuantReLU, levels=1)}
    means = [
        jnp.abs(
            (
                answer(calibrate(model, XS, **coarse, correct=correct).model)
                - answer(model)
            ).mean((0, 1))
        ).max()
        for correct in (False, True)
    ]
    assert means[1] < 0.5 * means[0]


def test_one_channel_that_is_silent_gets_the_mean_of_the_others():
    def f(w, x):
        return jax.nn.relu(x @ w)

    w = jnp.eye(6).at[:, 2].set(0.0)
    (swap,) = calibrate(Function(f, w), XS, per_channel=True).swaps
    others = np.delete(np.asarray(swap.v_threshold), 2)
    assert float(swap.v_threshold[2]) == pytest.approx(others.mean(), rel=1e-5)
    with pytest.raises(ValueError, match="expected a positive threshold"):
        calibrate(Function(f, jnp.zeros((6, 6))), XS, per_channel=True)


def test_layers_of_a_scan_have_channels_and_biases_too():
    def f(params, x):
        def body(x, w):
            return jax.nn.relu(x @ w), None

        return jax.lax.scan(body, x, params)[0]

    w = jax.random.normal(jax.random.key(0), (3, 6, 6)) / 2
    network = Function(f, w)
    ann, (swap,) = calibrate(network, XS, neuron=FINE, per_channel=True, correct=True)
    assert swap.v_threshold.shape == (3, 6)
    snn = convert(ann, XS, 60).model
    run = steps.stream(snn, XS, 1)
    np.testing.assert_allclose(run.logits[0], answer(ann)[:, 0], atol=1e-3)
    report = energy.measure(snn, XS)
    assert report.spikes_per_image == pytest.approx(float(run.spikes[0].mean()))


def test_scales_of_channels_learn_each_on_its_own():
    layer, xs = QuantReLU(2), XS[..., :2]

    def gradient(scale, xs):
        return jax.grad(lambda s: (layer.quantise(xs, s, None) ** 2).sum())(scale)

    both = gradient(jnp.array([0.3, 0.5]), xs)
    for channel, scale in enumerate((0.3, 0.5)):
        one = gradient(jnp.float32(scale), xs[..., channel : channel + 1])
        assert float(both[channel]) == pytest.approx(float(one), rel=1e-5)


WEIGHT = {"w": jnp.eye(4)}


class TimeFirst(nnx.Module):
    """A network that puts time before the batch on its way."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.last = (nnx.Linear(5, n, rngs=rngs) for n in (5, 3))

    def __call__(self, xs):
        xs = nnx.relu(self.first(jnp.swapaxes(xs, 0, 1)))
        return jnp.swapaxes(self.last(xs), 0, 1)


@pytest.mark.parametrize("batch", [3, 4])
def test_as_many_images_as_time_steps_are_not_mixed_up(batch):
    xs = jax.random.normal(jax.random.key(3), (batch, 4, 5))
    snn = convert(calibrate(TimeFirst(), xs).model, xs).model
    state, step = stepper(snn, xs[:, :1])
    for t in range(4):
        state, ys = step(state, xs[:, t : t + 1])
        np.testing.assert_allclose(snn(xs)[:, t], ys[:, 0], rtol=1e-5, atol=1e-6)


def test_an_activation_at_two_places_gets_two_scales():
    quant, rngs = QuantReLU(levels=100), nnx.Rngs(0)
    first, last = (nnx.Linear(8, 8, rngs=rngs) for _ in range(2))
    last.kernel[...] = 20 * last.kernel[...]
    xs = jax.random.normal(jax.random.key(0), (32, 1, 8))
    shared, swaps = calibrate(nnx.Sequential(first, quant, last, quant), xs)
    plain = nnx.Sequential(first, nnx.relu, last, nnx.relu)
    own = calibrate(plain, xs, neuron=lambda: QuantReLU(levels=100))
    for site, swap in zip(shared.sites, swaps, strict=True):
        np.testing.assert_allclose(100 * site.scale[...], swap.v_threshold, rtol=1e-6)
    np.testing.assert_array_equal(shared(xs), own.model(xs))
    noisy = QuantReLU(noise=1.0, rngs=nnx.Rngs(noise=0))
    made = calibrate(nnx.Sequential(first, noisy, last, noisy), xs).model
    made.train()
    keys = [jax.random.key_data(site.key()).tolist() for site in made.sites]
    assert keys[0] != keys[1]


def test_a_minimum_caps_an_activation_that_nothing_else_sees():
    xs = jnp.array([[[1.0, 2, 3, 4]]])
    for cap in (lambda y: jnp.minimum(y, 2.0), lambda y: jnp.minimum(2.0, y)):
        alone = Function(lambda p, x, cap=cap: cap(nnx.relu(x @ p["w"])), WEIGHT)
        (swap,) = calibrate(alone, xs).swaps
        assert swap.v_threshold == pytest.approx(2.0, rel=1e-3)

    def twice(p, x):
        y = nnx.relu(x @ p["w"])
        return jnp.minimum(y, 0.5) + 3 * y

    inner = jax.jit(lambda y: jnp.minimum(y, 0.5) + 3 * y)
    for f in (twice, lambda p, x: inner(nnx.relu(x @ p["w"]))):
        with pytest.raises(ValueError, match="ReLUs, got min at"):
            calibrate(Function(f, WEIGHT), xs)


def test_a_spiking_network_is_not_converted_again():
    xs = jnp.ones((2, 1, 5))
    snn = convert(calibrate(TimeFirst(), xs).model, xs).model
    for again in (calibrate, convert):
        with pytest.raises(ValueError, match="network of ReLUs, got a spiking one"):
            again(snn, xs)


def test_a_batch_without_images_is_refused():
    net = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu)
    for shape in ((0, 1, 3), (2, 0, 3), (3,)):
        with pytest.raises(ValueError, match="calibrate: expected input "):
            calibrate(net, jnp.ones(shape))


def test_the_largest_activation_is_above_the_threshold():
    """At the clip exactly the last bit would decide on its gradient."""
    net = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu)
    xs = jax.random.normal(jax.random.key(0), (8, 1, 3))
    (swap,) = calibrate(net, xs).swaps
    largest = float(net(xs).max())
    assert 0.999 * largest < swap.v_threshold < largest


def test_a_slope_below_zero_is_no_relu():
    linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    net = nnx.Sequential(linear, lambda x: jnp.where(x > 0, x, x / 2), linear, nnx.relu)
    with pytest.raises(ValueError, match="got select_n at|got gt at"):
        calibrate(net, jnp.ones((2, 1, 3)))


def test_folded_answers_are_compared_without_rounding_of_products():
    seen = []

    class Watched(nnx.Sequential):
        def __call__(self, x):
            seen.append(jax.config.jax_default_matmul_precision)
            return super().__call__(x)

    rngs = nnx.Rngs(0)
    layers = nnx.Linear(8, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
    fold_norms(Watched(*layers), jnp.ones((2, 8)))
    assert seen[-2:] == ["highest", "highest"]
