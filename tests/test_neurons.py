"""Cells: traces by hand, and how the cells are related.

Numbers here are mostly multiples of powers of two, on which float32 makes no error.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spikejax import neurons, surrogate
from spikejax.neurons import (
    NeuronOptions,
    NeuronParams,
    cascade,
    independent,
    lif,
    parallel,
)

RESETS = {"soft": None, "zero": 0.0, "below": -0.25}
CELLS = {
    "lif": (lif, (1.0,)),
    "parallel": (parallel, (0.75, 1.0, 2.0)),
    "cascade": (cascade, (1.0, 0.5, 0.25)),
    "independent": (independent, (0.75, 1.0, 2.0)),
}
MULTI = {name: CELLS[name][0] for name in ("parallel", "cascade", "independent")}

every_cell = pytest.mark.parametrize("name", CELLS)
every_multi = pytest.mark.parametrize("name", MULTI)
every_reset = pytest.mark.parametrize("reset", RESETS)


def currents(seed):
    """Random inputs [T, n], the same shape everywhere: each new one compiles again."""
    return 2 * jax.random.normal(jax.random.key(seed), (5, 16)) + 0.5


def rest(cell, x, number):
    """Membranes at zero, as the cell wants them."""
    return jnp.zeros((number, *x.shape) if cell is independent else x.shape)


def step(cell, params, v, x, *, trains=False, **options):
    """One step: the membrane, and the weighted sum of the spikes or the trains."""
    v, spikes = cell(params, v, x, NeuronOptions(**options))
    if trains:
        return v, jnp.stack(spikes, -1)
    weights = neurons.spike_weights(cell, params)  # the first is 1
    pairs = zip(weights[1:], spikes[1:], strict=True)
    return v, sum((w * z for w, z in pairs), spikes[0])


def run(cell, params, xs, v=None, **options):
    """Steps written out: the spikes and the membranes after each one, [T, ...]."""
    v = rest(cell, xs[0], len(params.thresholds)) if v is None else v
    spikes, membranes = [], []
    for x in xs:
        v, z = step(cell, params, v, x, **options)
        spikes.append(z)
        membranes.append(v)
    return jnp.stack(spikes), jnp.stack(membranes)


# --- traces by hand: leak 1/2 and decay_input=False halve the membrane, then add x


def trace(cell, thresholds, xs, **options):
    """Spikes and membranes of one neuron, as lists."""
    params = NeuronParams(0.5, thresholds)
    spikes, membranes = run(cell, params, jnp.array(xs), decay_input=False, **options)
    return spikes.tolist(), membranes.tolist()


def test_lif_by_hand():
    xs = [0.75, 0.75, 0.75, 0.75, 2.0]  # u = .75, 1.125, .8125, 1.15625, 2.078125
    spikes, membranes = trace(lif, (1.0,), xs)
    assert spikes == [0, 1, 0, 1, 1]
    assert membranes == [0.75, 0.125, 0.8125, 0.15625, 1.078125]


def test_lif_with_hard_reset_by_hand():
    xs = [0.75, 0.75, 0.75, 2.0]  # u - rest falls by half each step; rest is -1/2
    v = jnp.array(-0.5)
    spikes, membranes = run(
        lif, NeuronParams(0.5), jnp.array(xs), v, v_reset=-0.5, decay_input=False
    )
    assert spikes.tolist() == [0, 0, 0, 1]
    assert membranes.tolist() == [0.25, 0.625, 0.8125, -0.5]


def test_parallel_by_hand():
    xs = [2.5, 0.5, 4.0, -1.0]  # u = 2.5, .75, 4.375, -.3125
    spikes, membranes = trace(parallel, (1.0, 2.0, 3.0), xs)
    assert spikes == [2, 0, 3, 0]
    assert membranes == [0.5, 0.75, 1.375, -0.3125]


def test_parallel_with_unequal_thresholds_weighs_its_trains_by_hand():
    xs = [2.25, 1.125, 0.375, 0.0]  # u = 2.25, 1.25, .5, 0
    spikes, membranes = trace(parallel, (0.5, 1.0, 2.0), xs)  # weights 1, 1, 2
    assert spikes == [4, 2, 1, 0]
    assert membranes == [0.25, 0.25, 0.0, 0.0]
    trains, _ = trace(parallel, (0.5, 1.0, 2.0), xs, trains=True)
    assert trains == [[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]


def test_parallel_with_hard_reset_by_hand():
    xs = [2.5, 0.5, 4.0, 0.75]  # u = 2.5, .5, 4.25, .75
    spikes, membranes = trace(parallel, (1.0, 2.0, 3.0), xs, v_reset=0.0)
    assert spikes == [2, 0, 3, 0]
    assert membranes == [0, 0.5, 0, 0.75]


def test_cascade_by_hand():
    xs = [3.75, 1.25, -1.0]  # u = 3.75, 1.375, -.8125
    spikes, membranes = trace(cascade, (2.0, 1.0, 0.5), xs)  # weights 1, 1/2, 1/4
    assert spikes == [1.75, 0.5, 0]
    assert membranes == [0.25, 0.375, -0.8125]
    trains, _ = trace(cascade, (2.0, 1.0, 0.5), xs, trains=True)
    assert trains == [[1, 1, 1], [0, 1, 0], [0, 0, 0]]


def test_cascade_acts_in_the_order_given_by_hand():
    spikes, membranes = trace(cascade, (1.0, 2.0), [2.5])  # 2.5 - 1 = 1.5 < 2
    assert spikes == [1] and membranes == [1.5]
    spikes, membranes = trace(cascade, (2.0, 1.0), [2.5])  # 2.5 - 2 = 0.5 < 1
    assert spikes == [1] and membranes == [0.5]


def test_cascade_with_hard_reset_fires_its_first_threshold_reached_alone():
    spikes, membranes = trace(cascade, (2.0, 1.0), [3.5, 1.5, 0.5], v_reset=0.0)
    assert spikes == [1, 0.5, 0] and membranes == [0, 0, 0.5]


def test_independent_by_hand():
    xs = [1.5, 1.5, 0.25]
    spikes, membranes = trace(independent, (1.0, 2.0), xs)
    assert spikes == [1, 2, 0]  # u = (1.5, 1.5), (1.75, 2.25), (.625, .375)
    assert membranes == [[0.5, 1.5], [0.75, 0.25], [0.625, 0.375]]
    trains, _ = trace(independent, (1.0, 2.0), xs, trains=True)
    assert trains == [[1, 0], [1, 1], [0, 0]]


# --- what a cell with one threshold, or with equal ones, has to be


def value_and_gradients(cell, params, xs, **options):
    """Spikes, membranes, and gradients of a random sum of the spikes and the state."""
    weights = jax.random.normal(jax.random.key(2), xs.shape)

    def loss(params, xs):
        spikes, membranes = run(cell, params, xs, **options)
        loss = (weights * spikes).sum() + (weights[0] * membranes[-1]).sum()
        return loss, (spikes, membranes)

    gradients, out = jax.grad(loss, (0, 1), has_aux=True)(params, xs)
    return *out, gradients


@pytest.mark.parametrize("detach_reset", [False, True])
@every_reset
@every_multi
def test_one_threshold_is_the_plain_neuron_bit_for_bit(name, reset, detach_reset):
    options = {"v_reset": RESETS[reset], "detach_reset": detach_reset}
    xs = currents(1)
    params = NeuronParams(jnp.float32(0.3), (jnp.float32(0.7),))
    plain = value_and_gradients(lif, params, xs, **options)
    multi = value_and_gradients(MULTI[name], params, xs, **options)
    assert 0 < plain[0].mean() < 1
    multi = (multi[0], multi[1].reshape(xs.shape), multi[2])  # independent: [T, 1, n]
    jax.tree.map(np.testing.assert_array_equal, plain, multi)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("theta", [0.5, 1.0])
def test_equal_thresholds_and_soft_reset_emit_the_floor_in_both_modes(number, theta):
    h = jnp.arange(-3, 9, 1 / 32)  # every threshold is met exactly
    expected = jnp.clip(jnp.floor(h / theta), 0, number)
    for cell, thresholds in [
        (parallel, neurons.equal_thresholds(number, theta)),
        (cascade, neurons.repeated_thresholds(number, theta)),
    ]:
        v, z = step(cell, NeuronParams(0.0, thresholds), 0 * h, h, decay_input=False)
        np.testing.assert_array_equal(z, expected)
        np.testing.assert_array_equal(v, h - theta * expected)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["parallel", "cascade"])
def test_one_step_of_n_thresholds_is_n_steps_of_integrate_and_fire(name, number):
    small = jnp.arange(0, 1, 1 / 32)  # the input of each of the N small steps
    v = jnp.arange(0, 1, 1 / 16)[:, None] + 0 * small
    spaced = {
        "parallel": neurons.equal_thresholds,
        "cascade": neurons.repeated_thresholds,
    }[name]
    params = NeuronParams(0.0, spaced(number))
    x = number * small + 0 * v
    after, counts = step(MULTI[name], params, v, x, decay_input=False)
    xs = jnp.broadcast_to(small, (number, *v.shape))
    spikes, membranes = run(lif, NeuronParams(0.0), xs, v, decay_input=False)
    np.testing.assert_array_equal(counts, spikes.sum(0))
    np.testing.assert_array_equal(after, membranes[-1])
    assert counts.max() == number
    assert jnp.all((after >= 0) & (after < 1))


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_dyadic_cascade_has_two_to_the_n_levels(number):
    h = jnp.arange(-0.5, 2.5, 1 / 64)
    params = NeuronParams(0.0, neurons.dyadic_thresholds(number))
    v, z = step(cascade, params, 0 * h, h, decay_input=False)
    level = 2.0 ** (1 - number)
    expected = level * jnp.clip(jnp.floor(h / level), 0, 2**number - 1)
    np.testing.assert_array_equal(z, expected)
    np.testing.assert_array_equal(v, h - expected)


def test_independent_equals_the_multi_level_firing_unit():
    """In that unit the reset comes with the next charge, and H(0) = 0."""
    levels = jnp.array([0.6, 1.6, 2.6])
    xs = currents(3)
    weights = jax.random.normal(jax.random.key(4), xs.shape)

    def straight_through(u):
        box = jnp.clip(u - levels + 0.5, 0, 1)
        return box + jax.lax.stop_gradient((u > levels) - box)

    def unit(xs):
        u = s = jnp.zeros((xs.shape[1], 3))
        outputs = []
        for x in xs:
            u = 0.25 * u * (1 - s) + x[:, None]
            s = straight_through(u)
            outputs.append(s.sum(-1))
        return (weights * jnp.stack(outputs)).sum(), jnp.stack(outputs)

    def ours(xs):
        options = {"v_reset": 0.0, "decay_input": False}
        params = NeuronParams(0.75, (0.6, 1.6, 2.6))
        spike = surrogate.rectangle(1.0)
        spikes, _ = run(independent, params, xs, surrogate=spike, **options)
        return (weights * spikes).sum(), spikes

    expected_gradient, expected = jax.jit(jax.grad(unit, has_aux=True))(xs)
    gradient, spikes = jax.jit(jax.grad(ours, has_aux=True))(xs)
    assert set(np.unique(spikes)) == {0, 1, 2, 3}
    np.testing.assert_allclose(spikes, expected, 0, 1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, 0, 1e-5)


# --- what holds for every cell


@every_cell
def test_gradient_reaches_the_past_and_not_the_future(name):
    cell, thresholds = CELLS[name]

    def early_spikes(xs):
        return run(cell, NeuronParams(0.5, thresholds), xs)[0][:3].sum()

    gradient = jax.jit(jax.grad(early_spikes))(jnp.full(6, 0.9))
    assert jnp.all(gradient[:3] != 0) and jnp.all(gradient[3:] == 0)


@every_cell
def test_jit_changes_nothing(name):
    cell, thresholds = CELLS[name]
    function = partial(value_and_gradients, cell)
    params = NeuronParams(jnp.float32(0.4), tuple(map(jnp.float32, thresholds)))
    plain = function(params, currents(5))
    jitted = jax.jit(function)(params, currents(5))
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, plain, jitted)


@every_reset
@every_cell
def test_trains_are_binary_and_their_weighted_sum_is_the_output(name, reset):
    cell, thresholds = CELLS[name]
    weights = {
        "lif": [1],
        "parallel": [1, 1 / 3, 4 / 3],  # steps .75, .25, 1
        "cascade": [1, 0.5, 0.25],
        "independent": [1, 1, 1],
    }[name]
    xs = currents(6)
    params = NeuronParams(0.5, thresholds)
    spikes, membranes = run(cell, params, xs, v_reset=RESETS[reset])
    trains, same = run(cell, params, xs, v_reset=RESETS[reset], trains=True)
    assert trains.shape == (*xs.shape, len(weights))
    assert set(np.unique(trains)) == {0, 1}
    assert jnp.all(trains.any((0, 1)))
    np.testing.assert_allclose(trains @ jnp.array(weights), spikes, 1e-6)
    np.testing.assert_array_equal(membranes, same)


def test_gradient_through_a_reset_by_hand():
    # rectangle(1): slope 1 within 1/2 of a threshold. u = 1.25; thresholds 1, 1.5.
    options = {"decay_input": False, "surrogate": surrogate.rectangle(1.0)}

    def membrane(u, cell, thresholds, **more):
        params = NeuronParams(0.0, thresholds)
        return step(cell, params, 0.0, u, **options, **more)[0]

    slope = jax.grad(membrane)
    u = jnp.float32(1.25)
    assert slope(u, lif, (1.0,)) == 1 - 1.0  # u - z
    assert slope(u, lif, (1.0,), v_reset=0.25) == (1 - 1) + (0.25 - 1.25)
    assert slope(u, parallel, (1.0, 1.5)) == 1 - 1.0 - 0.5  # u - z1 - z2 / 2
    assert slope(u, cascade, (0.875, 0.5)) == (1 - 0.875) * (1 - 0.5)
    for cell, thresholds in ((lif, (1,)), (parallel, (1, 1.5)), (cascade, (1, 0.5))):
        assert slope(u, cell, thresholds, detach_reset=True) == 1
        assert slope(u, cell, thresholds, detach_reset=True, v_reset=0.25) == 0


@pytest.mark.parametrize("detach_reset", [False, True])
def test_equal_thresholds_in_cascade_have_the_gradient_of_parallel_ones(detach_reset):
    """Rectangles between levels make it that of a clipped ReLU, not N times that."""
    options = {"surrogate": surrogate.rectangle(2.0), "decay_input": False}
    us = jnp.linspace(-0.5, 3, 400)  # on no edge of a rectangle

    def slopes(cell, thresholds):
        def spikes(u):
            params = NeuronParams(0.0, thresholds)
            more = {"detach_reset": detach_reset}
            return step(cell, params, 0.0, u, **options, **more)[1]

        return jax.vmap(jax.grad(spikes))(us)

    found = slopes(cascade, (0.5,) * 4)
    np.testing.assert_array_equal(found, slopes(parallel, (0.5, 1.0, 1.5, 2.0)))
    np.testing.assert_array_equal(found, np.where((us > 0.25) & (us < 2.25), 2, 0))


@pytest.mark.parametrize("threshold", [0.5, 1.0, 4.0])
def test_the_gradient_of_a_cascade_neither_explodes_nor_changes_sign(threshold):
    """sum_k h_k prod_(j<k) max(0, 1 - theta h_j), h_k = H'(u_(k-1) - theta)."""
    count, derivative = 4, surrogate.atan(5.0)
    us = jnp.linspace(-threshold, (count + 1) * threshold, 301)

    def spikes(u):
        params = NeuronParams(0.0, (threshold,) * count)
        options = {"detach_reset": True, "surrogate": derivative}
        return step(cascade, params, 0.0, u, decay_input=False, **options)[1]

    found = jax.vmap(jax.grad(spikes))(us)
    u, rest, expected = np.asarray(us, np.float64), 1.0, 0.0
    for _ in range(count):
        x = u - threshold
        h = 2.5 / (1 + (np.pi / 2 * 5 * x) ** 2)
        expected = expected + rest * h
        rest = rest * np.maximum(0, 1 - threshold * h)
        u = u - threshold * (x >= 0)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert found.min() > 0 and found.max() <= max(1 / threshold, 2.5) + 1e-6


def test_leak_and_thresholds_may_differ_from_neuron_to_neuron():
    leaks, low = jnp.linspace(0, 0.5, 16), jnp.linspace(0.5, 2, 16)
    xs = currents(8)
    params = NeuronParams(leaks, (low, 2 * low))
    spikes, membranes = run(parallel, params, xs, decay_input=False)
    for n in (0, 7, 15):
        one = NeuronParams(leaks[n], (low[n], 2 * low[n]))
        alone = run(parallel, one, xs[:, n], decay_input=False)
        np.testing.assert_allclose(spikes[:, n], alone[0], 1e-6)
        np.testing.assert_allclose(membranes[:, n], alone[1], 1e-6)


def test_thresholds_by_number():
    assert neurons.equal_thresholds(3, 0.5) == (0.5, 1.0, 1.5)
    assert neurons.repeated_thresholds(3, 0.5) == (0.5, 0.5, 0.5)
    assert neurons.dyadic_thresholds(3, 2.0) == (2.0, 1.0, 0.5)
    assert NeuronParams() == (0.5, neurons.equal_thresholds(1), None)


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("kind", ["equal", "repeated", "dyadic"])
def test_there_must_be_a_threshold(kind, number):
    build = getattr(neurons, f"{kind}_thresholds")
    with pytest.raises(ValueError, match=f"a whole number >= 1, got {number}. One"):
        build(number)


@pytest.mark.parametrize(
    "thresholds, rising, problem",
    [
        ((), False, "positive"),
        ((0.0, 1.0), True, "positive"),
        ((1.0, -1.0), False, "positive"),
        ((1.0, float("nan")), False, "positive"),
        (("1", "2"), False, "positive"),
        ((1.0, float("inf")), True, "finite"),
        ((1.0, 3.0, 2.0), True, "rising"),
        ((1.0, 1.0), True, "rising"),
        ((np.array([1.0, 3.0]), 2.0), True, "rising"),
    ],
)
def test_thresholds_must_be_there_positive_and_rising(thresholds, rising, problem):
    message = f"layer: expected at least one threshold, {problem} thresholds, got "
    with pytest.raises(ValueError, match=message):
        neurons.check_thresholds("layer", thresholds, rising=rising)


def test_thresholds_that_are_in_order_pass():
    neurons.check_thresholds("layer", (1.0, 2.0), rising=True)
    neurons.check_thresholds("layer", (2.0, 1.0, 1.0), rising=False)


# --- amounts of one's own


def test_rounded_thresholds_make_an_ilif_neuron():
    """C = round(clip(u, 0, N)), v' = u - C, as I-LIF has it (arXiv:2407.20708)."""
    number, xs = 4, jnp.arange(-8, 48, dtype=jnp.float32).reshape(7, 8) / 8 - 0.4375
    levels = tuple(k - 0.5 for k in range(1, number + 1))
    params = NeuronParams(0.75, levels, (1.0,) * number)
    spikes, membranes = run(parallel, params, xs, decay_input=False)
    v = np.zeros(8)
    for x, z, after in zip(np.asarray(xs), spikes, membranes, strict=True):
        u = 0.25 * v + x
        count = np.round(np.clip(u, 0, number))
        v = u - count
        np.testing.assert_array_equal(z, count)
        np.testing.assert_allclose(after, v, 0, 1e-6)
    assert set(np.unique(spikes)) == {0, 1, 2, 3, 4}


def test_a_ternary_neuron_fires_on_both_sides():
    """s = sign(u) [|u| >= 1/2], u <- u (1 - |s|), as Guo et al. (AAAI 2024) have it."""
    xs = jnp.array([[0.75, -0.75], [0.25, -0.25], [0.375, -0.4375], [0.5, -0.5]])
    params = NeuronParams(0.75, (0.5, -0.5), (0.5, -0.5))
    options = {"decay_input": False, "v_reset": 0.0}
    spikes, membranes = run(parallel, params, xs, **options)
    assert spikes.tolist() == [[1, -1], [0, 0], [0, -1], [1, -1]]
    assert membranes.tolist() == [[0, 0], [0.25, -0.25], [0.4375, 0], [0, 0]]
    trains, _ = run(parallel, params, xs, trains=True, **options)
    assert set(np.unique(trains)) == {0, 1}


@pytest.mark.parametrize(
    ("leak", "decay_input", "expected"),
    [
        (0.5, True, [0.5, 1.75, -0.125, 0.1875]),
        (0.5, False, [1.0, 3.5, -0.25, 0.375]),
        (0.0, False, [1.0, 4.0, 2.0, 2.5]),
    ],
)
def test_a_leaky_integrator_by_hand(leak, decay_input, expected):
    v, options = jnp.zeros(()), NeuronOptions(decay_input=decay_input)
    for x, membrane in zip([1.0, 3.0, -2.0, 0.5], expected, strict=True):
        v, trains = neurons.integrate(NeuronParams(leak), v, x, options)
        assert float(v) == membrane and trains == ()


def test_a_late_reset_takes_the_whole_threshold_after_the_leak():
    # mem = beta mem + x - z_before threshold, as snnTorch writes it
    beta, threshold = 0.75, 0.5
    params, options = NeuronParams(1 - beta, (threshold,)), NeuronOptions(None, False)
    v, mem, z, count = jnp.zeros(()), 0.0, 0.0, 0
    for x in np.linspace(-0.2, 0.9, 24, dtype=np.float32):
        mem = beta * mem + x - z * threshold
        z = float(mem > threshold)
        v, (spikes,) = neurons.late_reset(params, v, x, options)
        assert float(spikes) == z
        count += z
    assert 3 < count < 20
