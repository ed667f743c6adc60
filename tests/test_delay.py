"""Learned delays: whole delays shift, kernels sum to 1, slices equal the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax import ILIF, LIF, energy, spike_driven, stepper
from spikejax.energy import measure
from spikejax.layers import Fixed
from spikejax.memory import Membrane, keep_membranes
from spikejax.nn.delay import Delay, DelayedLinear, place


def spikes(shape=(2, 9, 3), key=0):
    return (jax.random.uniform(jax.random.key(key), shape) < 0.4).astype(jnp.float32)


def with_delays(layer, delays):
    layer.delays[...] = jnp.asarray(delays, jnp.float32)
    return layer


def shifted(x, steps):
    """Return x [B, T] later, in NumPy."""
    return np.pad(np.asarray(x), ((0, 0), (steps, 0)))[:, : x.shape[1]]


@pytest.mark.parametrize("width", [None, 0.23, 2.0])
def test_kernels_sum_to_one_and_are_centred(width):
    delays = jnp.linspace(0, 6, 13)
    taps = place(delays, 6, width)
    np.testing.assert_allclose(taps.sum(0), 1, atol=1e-6)
    inner = slice(None) if width is None else slice(6, 7)  # away from the ends
    centre = (taps * jnp.arange(7.0)[:, None]).sum(0)
    np.testing.assert_allclose(centre[inner], delays[inner], atol=1e-5)


def test_the_gaussian_is_the_published_one():
    """exp(-((n - p - L // 2) / sigma)^2 / 2) / sum, with p around the middle."""
    length, sigma, p = 7, 1.3, np.array([-2.4, 0.0, 1.7])
    n = np.arange(length)[:, None]
    expected = np.exp(-0.5 * ((n - p - length // 2) / sigma) ** 2)
    taps = place(jnp.asarray(p) + length // 2, length - 1, sigma)
    np.testing.assert_allclose(taps, expected / expected.sum(0), rtol=1e-5)


def test_whole_delays_shift_and_halves_are_means():
    xs = spikes()
    layer = with_delays(Delay(4, 3, rngs=nnx.Rngs(0)), [0, 4, 2.5])
    ys = layer(xs)
    np.testing.assert_array_equal(ys[..., 0], xs[..., 0])
    np.testing.assert_array_equal(ys[..., 1], shifted(xs[..., 1], 4))
    mean = (shifted(xs[..., 2], 2) + shifted(xs[..., 2], 3)) / 2
    np.testing.assert_allclose(ys[..., 2], mean)


def test_delays_out_of_range_act_as_the_nearest():
    layer = with_delays(Delay(1, 2, rngs=nnx.Rngs(0)), [-2.0, 9.0])
    xs = spikes((2, 9, 2))
    ys = layer(xs)  # in training
    np.testing.assert_array_equal(ys[..., 0], xs[..., 0])
    np.testing.assert_array_equal(ys[..., 1], shifted(xs[..., 1], 1))


@pytest.mark.parametrize("width", [None, 1.5])
def test_in_evaluation_spikes_stay_spikes(width):
    layer = with_delays(Delay(4, 3, width=width, rngs=nnx.Rngs(0)), [0.6, 9.0, -2.0])
    layer.eval()
    xs = spikes()
    ys = layer(xs)
    # Rounded, and kept within 0 to 4.
    for k, steps in enumerate((1, 4, 0)):
        np.testing.assert_array_equal(ys[..., k], shifted(xs[..., k], steps))


def test_weights_behind_a_delay_meet_spikes_in_evaluation():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.neuron, self.last = ILIF(2), LIF()
            self.delay = Delay(3, 3, rngs=rngs)
            self.dense = DelayedLinear(3, 5, 2, rngs=rngs)
            self.head = nnx.Linear(5, 2, use_bias=False, rngs=rngs)

        def __call__(self, xs):
            return self.head(self.last(3 * self.dense(self.delay(self.neuron(xs)))))

    model = Net(nnx.Rngs(0))
    model.eval()
    xs = 2 * spikes((2, 8, 3))
    logits, report = spike_driven(model, xs)
    assert [layer.trains for layer in report.layers] == [2, 1]
    assert report.layers[0].acs > 0 == report.layers[0].macs
    np.testing.assert_allclose(logits, model(xs), atol=1e-6)
    spent = energy.measure(model, xs)
    acs = sum(layer.acs for layer in report.layers)
    np.testing.assert_allclose(spent.energy_nj, acs * 0.9e-3, rtol=1e-5)


@pytest.mark.parametrize("width", [None, 1.0])
def test_synapses_by_an_own_loop(width):
    layer = DelayedLinear(3, 2, 4, width=width, rngs=nnx.Rngs(1))
    xs, taps = spikes(), np.asarray(layer.taps())
    weights = np.asarray(layer.kernel[...])
    expected = np.zeros((2, 9, 2))
    for n in range(5):
        for i in range(3):
            for o in range(2):
                late = shifted(xs[..., i], n)
                expected[..., o] += weights[i, o] * taps[n, i, o] * late
    np.testing.assert_allclose(layer(xs), expected, atol=1e-5)
    sizes = [p.size for p in jax.tree.leaves(nnx.state(layer, nnx.Param))]
    assert sizes == [6, 6]  # two numbers per synapse


@pytest.mark.parametrize("steps", [1, 4])
def test_slices_equal_the_whole(steps):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.delay = Delay(3, 3, rngs=rngs)
            self.dense = DelayedLinear(3, 5, 2, rngs=rngs)
            self.neuron = LIF()

        def __call__(self, xs):
            return self.neuron(4 * self.dense(self.delay(xs)))

    model, xs = Net(nnx.Rngs(0)), spikes((2, 8, 3))
    state, step = stepper(model, xs[:, :steps])
    parts = []
    for t in range(0, 8, steps):
        state, ys = step(state, xs[:, t : t + steps])
        parts.append(ys)
    model.eval()
    whole = model(xs)
    np.testing.assert_array_equal(jnp.concatenate(parts, 1), whole)
    assert whole.sum() > 0


def test_a_delay_is_learned():
    """The teacher delays by 1, 4 and 2 steps; the student finds them."""
    xs = jax.random.normal(jax.random.key(3), (16, 30, 3))
    wanted = with_delays(Delay(5, 3, rngs=nnx.Rngs(0)), [1.0, 4.0, 2.0])(xs)
    student = with_delays(Delay(5, 3, width=2.0, rngs=nnx.Rngs(0)), [2.5, 2.5, 2.5])
    graphdef, params, widths, rest = nnx.split(student, nnx.Param, Fixed, ...)

    @jax.jit
    def step(params, width):
        def loss(params):
            narrowed = jax.tree.map(lambda _: width, widths)
            model = nnx.merge(graphdef, params, narrowed, rest)
            return ((model(xs) - wanted) ** 2).mean()

        return jax.tree.map(lambda p, g: p - 2 * g, params, jax.grad(loss)(params))

    for width in np.geomspace(2.0, 0.3, 60):
        params = step(params, width)
    found = nnx.merge(graphdef, params, widths, rest).delays[...]
    np.testing.assert_array_equal(jnp.round(found), [1, 4, 2])


def test_no_delay_is_stuck_outside_of_its_range():
    layer = with_delays(Delay(4, 2, width=1.0, rngs=nnx.Rngs(0)), [-3.0, 7.0])
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    xs = spikes((2, 9, 2))

    def loss(params):
        return (nnx.merge(graphdef, params, rest)(xs) * jnp.arange(9.0)[:, None]).sum()

    gradient = jax.grad(loss)(params).delays[...]
    assert jnp.isfinite(gradient).all() and (gradient != 0).all()


def test_the_gradient_of_synapses_is_that_of_differences():
    layer = DelayedLinear(2, 1, 3, width=0.8, rngs=nnx.Rngs(2))
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    xs = jax.random.normal(jax.random.key(1), (3, 6, 2))
    labels = jnp.array([[0.3], [0.1], [-0.2]])[:, None]

    def loss(params):
        return ((nnx.merge(graphdef, params, rest)(xs) - labels) ** 2).sum()

    gradients = nnx.to_pure_dict(jax.grad(loss)(params))
    plain = nnx.to_pure_dict(params)
    for name, value in plain.items():
        for index in ((0, 0), (1, 0)):
            up, down = (plain | {name: value.at[index].add(h)} for h in (1e-2, -1e-2))
            nnx.replace_by_pure_dict(params, up)
            high = loss(params)
            nnx.replace_by_pure_dict(params, down)
            estimate = (high - loss(params)) / 2e-2
            np.testing.assert_allclose(gradients[name][index], estimate, rtol=2e-2)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda r: Delay(0, 3, rngs=r), "Delay: expected max_delay and features of"),
        (lambda r: Delay(2, 3, width=0.0, rngs=r), "Delay: .* a positive width, got"),
        (lambda r: DelayedLinear(0, 3, 2, rngs=r), "DelayedLinear: expected max_del"),
        (lambda r: Delay(2, 3, rngs=r)(spikes((1, 4, 2))), "Delay: expected input"),
        (lambda r: Delay(2, 3, rngs=r)(jnp.ones(3)), "Delay: expected a floating"),
        (
            lambda r: DelayedLinear(3, 2, 2, rngs=r)(spikes((1, 4, 2))),
            "expected input .B, T, 3., got shape",
        ),
    ],
)
def test_arguments_have_ranges(make, text):
    with pytest.raises(ValueError, match=text):
        make(nnx.Rngs(0))


def test_dense_macs_are_those_of_one_time_step():
    """A tap of each synapse: 4 of them for each of 5 inputs and 3 outputs."""
    layer = DelayedLinear(5, 3, 3, rngs=nnx.Rngs(0))
    xs = jax.random.normal(jax.random.key(0), (2, 8, 5))
    whole, stepped = measure(layer, xs), measure(layer, xs, jnp.array([8, 8]))
    assert whole.dense_macs == stepped.dense_macs == 4 * 5 * 3


def test_an_input_without_time_is_refused():
    layer = Delay(3, 5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"\[B, T, ..., 5\], got shape \(2, 5\)"):
        layer(jnp.ones((2, 5)))


def test_delays_are_spread_over_their_range_at_first():
    delays = np.asarray(Delay(8, 1000, rngs=nnx.Rngs(0)).delays[...])
    counts, _ = np.histogram(delays, 4, (0, 8))
    assert counts.sum() == 1000 and counts.min() > 200


def test_the_past_is_kept_in_float32():
    layer = Delay(2, 3, rngs=nnx.Rngs(0))
    held = keep_membranes(layer, jnp.ones((1, 1, 3), jnp.bfloat16))
    assert held(jnp.ones((1, 2, 3), jnp.bfloat16)).dtype == jnp.bfloat16
    assert [leaf.dtype for leaf in jax.tree.leaves(nnx.state(held, Membrane))] == [
        jnp.float32
    ]
