"""Adaptive, synaptic, refractory and integer neurons: traces by hand, and relatives."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import spikejax
from spikejax import IF, LIF, MultiThreshold, neurons, stepper, surrogate
from spikejax.layers import LI
from spikejax.nn.cells import ALIF, ILIF, CubaLIF, RefractoryLIF

EVERY = {
    "alif": lambda: ALIF(4.0, tau_adaptation=8.0, strength=0.5),
    "cuba": lambda: CubaLIF(3.0, tau_synapse=2.0, decay_input=False),
    "refractory": lambda: RefractoryLIF(2, tau=4.0, decay_input=False),
    "ilif": lambda: ILIF(4),
}


def currents(shape=(3, 12, 5), scale=1.5):
    return jax.random.normal(jax.random.key(0), shape) * scale + 0.5


def line(values):
    """Return one neuron's input [1, T, 1]."""
    return jnp.array(values, jnp.float32)[None, :, None]


def test_adaptive_by_hand():
    # leak 0 and strength 1, tau_adaptation 2: thresholds 1, then 1.5, 1.25, 1.625 ...
    layer = ALIF(math.inf, strength=1.0, tau_adaptation=2.0, decay_input=False)
    # u:      1     1.25   1.5   | reset by the threshold of the step
    # theta:  1     1.5    1.25
    # z:      1     0      1
    # v:      0     1.25   0.25;  a: 0.5  0.25  0.625
    spikes = layer(line([1.0, 1.25, 0.25, 1.374, 0.01]))
    # then u = 1.624 < 1.625, and u = 1.634 >= 1 + 0.3125
    assert spikes.ravel().tolist() == [1, 0, 1, 0, 1]


def test_without_strength_it_is_lif():
    xs = currents()
    adaptive = ALIF(4.0, strength=0.0, detach_reset=True)
    np.testing.assert_array_equal(adaptive(xs), LIF(4.0, detach_reset=True)(xs))


def test_adaptation_lowers_the_rate():
    xs = jnp.full((1, 400, 1), 1.2)
    rates = [
        float(ALIF(tau_adaptation=50.0, strength=b, decay_input=False)(xs).mean())
        for b in (0.0, 8.0, 40.0)
    ]
    assert rates[0] == 1 and rates[0] > 1.5 * rates[1] > 2 * rates[2] > 0


def test_synaptic_by_hand():
    # tau_synapse 2 halves the current; tau = inf adds it up: 1, 1.5, 1.75, ...
    layer = CubaLIF(math.inf, 1.6, tau_synapse=2.0, decay_input=False)
    # i:  1    0.5   0.25  1.125
    # u:  1    1.5   1.75  1.275;  z = 1 at the third, which leaves 0.15
    assert layer(line([1.0, 0.0, 0.0, 1.0])).ravel().tolist() == [0, 0, 1, 0]


def test_a_leaking_current_is_an_integrator_before_the_neuron():
    xs = currents()
    whole = CubaLIF(4.0, tau_synapse=3.0)(xs)

    def accumulated(current, x):  # i' = i - i / tau + x
        current = current - current / 3.0 + x
        return current, current

    _, given = jax.lax.scan(accumulated, jnp.zeros((3, 5)), jnp.moveaxis(xs, 1, 0))
    np.testing.assert_array_equal(whole, LIF(4.0)(jnp.moveaxis(given, 0, 1)))
    readout = LI(3.0, decay_input=False)
    np.testing.assert_allclose(readout(xs), jnp.moveaxis(given, 0, 1), rtol=1e-6)


def test_refractory_by_hand():
    layer = RefractoryLIF(2, tau=math.inf, decay_input=False)
    # The second spike would come with the second input; 0.5 are left after the first.
    spikes = layer(line([1.5, 9.0, 9.0, 0.5, 0.2]))
    assert spikes.ravel().tolist() == [1, 0, 0, 1, 0]


def test_without_a_period_it_is_lif_and_a_period_bounds_the_rate():
    xs = currents()
    np.testing.assert_array_equal(RefractoryLIF(0)(xs), LIF()(xs))
    for period in (1, 3):
        spikes = RefractoryLIF(period)(jnp.full((1, 40, 1), 100.0))
        assert spikes.sum() == 40 // (period + 1)
        gaps = np.diff(np.flatnonzero(spikes.ravel()))
        assert set(gaps.tolist()) == {period + 1}


def test_no_gradient_reaches_the_input_of_a_resting_neuron():
    layer = RefractoryLIF(2, tau=math.inf, decay_input=False)
    xs = line([1.5, 0.9, 0.9, 0.5])
    gradient = jax.grad(lambda xs: layer(xs).sum())(xs).ravel()
    assert gradient[1] == gradient[2] == 0 and gradient[0] != 0 != gradient[3]


TRACES = np.load(Path(__file__).parent / "golden" / "cells.npz")
TRACED = {  # see make_cell_traces.py for the mapping of parameters
    "alif": lambda: ALIF(
        5.0,
        0.5,
        tau_adaptation=20.0,
        strength=0.1 * (1 - 1 / 20) / (1 / 20),
        v_reset=0.0,
        surrogate=surrogate.fast_sigmoid(1.0),
    ),
} | {
    f"cuba-{reset}-detach={detach}": lambda v_reset=v_reset, detach=detach: CubaLIF(
        4.0,
        tau_synapse=2.0,
        decay_input=False,
        v_reset=v_reset,
        detach_reset=detach,
    )
    for reset, v_reset in (("soft", None), ("zero", 0.0))
    for detach in (False, True)
}


@pytest.mark.parametrize("name", TRACED)
def test_adaptive_and_synaptic_neurons_equal_norse_and_spikingjelly(name):
    layer = TRACED[name]()

    def step(state, x):
        state, z = layer.step(state, x)
        return state, (z, state[0])

    @jax.jit
    def both(xs):
        _, (spikes, membranes) = jax.lax.scan(step, layer.start(xs[0].shape), xs)
        loss = (spikes * TRACES["spike_weights"]).sum()
        loss += (membranes * TRACES["membrane_weights"]).sum()
        return loss, (spikes, membranes)

    dx, (spikes, membranes) = jax.grad(both, has_aux=True)(jnp.array(TRACES["xs"]))
    assert 0.1 < spikes.mean() < 0.9
    np.testing.assert_array_equal(spikes, TRACES[f"{name}/spikes"])
    np.testing.assert_allclose(membranes, TRACES[f"{name}/membranes"], atol=2e-6)
    np.testing.assert_allclose(dx, TRACES[f"{name}/dx"], rtol=1e-4, atol=1e-5)


def golden():
    path = Path(__file__).parents[2] / "shared" / "golden" / "rules.json"
    if not path.exists():
        pytest.skip(f"no golden file {path.name}")
    return json.loads(path.read_text())


def test_integer_neuron_rounds_as_the_published_one():
    found = golden()["ilif beta .25 th 1 D 4"]
    x = jnp.array(found["x"], jnp.float32)
    state, counts = ILIF(4).start(x[0].shape), []
    for step in x:
        state, count = ILIF(4).step(state, step)
        counts.append(count)
    np.testing.assert_array_equal(jnp.stack(counts), found["count"])
    np.testing.assert_allclose(state, found["v_end"], atol=1e-6)


@pytest.mark.parametrize("theta", [1.0, 0.5])
def test_integer_neuron_rounds_and_its_gradient_is_that_of_a_clip(theta):
    x, neuron = jnp.linspace(-1.03, 5.13, 41)[None, None], ILIF(4, theta)
    y, pull = jax.vjp(neuron, theta * x)
    np.testing.assert_array_equal(y, jnp.clip(jnp.round(x), 0, 4))
    (dx,) = pull(jnp.ones_like(y))
    np.testing.assert_array_equal(theta * dx, (x > 0) & (x < 4))
    trains = neuron(theta * x, trains=True)
    assert set(np.unique(trains)) == {0, 1}
    np.testing.assert_array_equal(trains.sum(-1), y)


def test_only_the_membrane_starts_from_v_start():
    v, adaptation = ALIF(v_start=0.25).start((2, 3))
    assert (v == 0.25).all() and (adaptation == 0).all() and v.shape == (2, 3)


@pytest.mark.parametrize("name", EVERY)
def test_whole_equals_step_by_step(name):
    xs, model = currents(), EVERY[name]()
    state, step = stepper(model, xs)
    parts = []
    for t in range(xs.shape[1]):
        state, spikes = step(state, xs[:, t : t + 1])
        parts.append(spikes)
    whole = model(xs)
    np.testing.assert_array_equal(jnp.concatenate(parts, 1), whole)
    assert 0.02 < whole.mean() < 3


@pytest.mark.parametrize("name", EVERY)
def test_written_out_and_in_a_loop_have_one_gradient(name):
    model = EVERY[name]()
    xs = currents((2, 8, 3))

    def looped(xs):
        return (model(xs) * jnp.arange(8.0)[:, None]).sum()

    def written(xs):
        state, total = model.start(xs[:, 0].shape), 0.0
        for t in range(8):
            state, spikes = model.step(state, xs[:, t])
            total += (spikes * t).sum()
        return total

    gradient = jax.grad(looped)(xs)
    np.testing.assert_allclose(gradient, jax.grad(written)(xs), rtol=1e-5, atol=1e-6)
    assert jnp.abs(gradient[:, 0]).max() > 0  # through time


def test_each_channel_learns_numbers_of_its_own():
    taus = np.array([2.0, 4.0, 8.0])
    layer = ALIF(
        taus,
        np.ones(3),
        tau_adaptation=taus * 5,
        strength=np.ones(3),
        learn_tau=True,
        learn_thresholds=True,
        learn_strength=True,
        decay_input=False,
    )
    xs = currents((2, 20, 3))
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(params))
    leaks = {"leak_logit": (3,), "adaptation_leak_logit": (3,)}
    assert shapes == leaks | {"log_steps": (1, 3), "strength": (3,)}

    def total(params):
        return (nnx.merge(graphdef, params, rest)(xs) * jnp.arange(3.0)).sum()

    gradients = nnx.to_pure_dict(jax.grad(total)(params))
    assert all(jnp.abs(g).ravel()[1:].min() > 0 for g in gradients.values())
    alone = [
        ALIF(t, tau_adaptation=5 * t, decay_input=False)(xs[..., k : k + 1])
        for k, t in enumerate(taus)
    ]
    np.testing.assert_allclose(layer(xs), jnp.concatenate(alone, -1))


def test_a_synapse_learns_its_time_constant_with_the_membrane():
    taus = np.array([1.5, 3.0])
    options = {"tau_synapse": taus, "v_threshold": 0.5, "decay_input": False}
    layer = CubaLIF(4.0, learn_tau=True, **options)
    xs = currents((2, 20, 2))
    np.testing.assert_array_equal(layer(xs), CubaLIF(4.0, **options)(xs))
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    assert set(nnx.to_pure_dict(params)) == {"leak_logit", "synaptic_leak_logit"}
    np.testing.assert_allclose(layer.params.synaptic_leak, 1 / taus, rtol=1e-6)

    def total(params):
        return (nnx.merge(graphdef, params, rest)(xs) * jnp.arange(20.0)[:, None]).sum()

    # one channel without gradient would have learned nothing
    assert jnp.abs(
        nnx.to_pure_dict(jax.grad(total)(params))["synaptic_leak_logit"]
    ).all()
    with pytest.raises(ValueError, match="CubaLIF: expected .* > 1 and finite where"):
        CubaLIF(4.0, tau_synapse=1.0, learn_tau=True)


def test_ternary_and_halving_neurons_need_no_class():
    """Signed amounts, and a start, of the neurons that exist."""
    found = golden()["ternary decay .25 th .5 on x-1"]
    x = jnp.array(golden()["ilif beta .25 th 1 D 4"]["x"], jnp.float32) - 1
    amounts = neurons.NeuronParams(0.75, (0.5, -0.5), (1.0, -1.0))
    hard = neurons.NeuronOptions(v_reset=0.0, decay_input=False)
    layer = spikejax.layers.Neuron(neurons.parallel, amounts, hard)
    state, given = layer.start(x[0].shape), []
    for step in x:
        state, spikes = layer.step(state, step)
        given.append(spikes)
    np.testing.assert_array_equal(jnp.stack(given), jnp.array(found))
    dyadic = neurons.dyadic_thresholds(3)
    halving = MultiThreshold(
        dyadic, neurons.cascade, tau=math.inf, decay_input=False, v_start=0.125
    )
    levels = halving(jnp.linspace(0, 1.9, 58)[None, None]).ravel()
    expected = jnp.clip(jnp.round(jnp.linspace(0, 1.9, 58) * 4), 0, 7) / 4
    np.testing.assert_array_equal(levels, expected)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ALIF(strength=-1.0), "ALIF: expected strength >= 0, got -1.0."),
        (lambda: ALIF(tau_adaptation=0.5), "ALIF: expected tau >= 1"),
        (lambda: CubaLIF(tau_synapse=0.1), "CubaLIF: expected tau >= 1"),
        (lambda: CubaLIF(v_threshold=0.0), "CubaLIF: expected .* positive thresholds"),
        (lambda: RefractoryLIF(-1), "RefractoryLIF: expected a period of 0 or more"),
        (lambda: RefractoryLIF(1.5), "RefractoryLIF: expected a period of 0 or more"),
        (lambda: ILIF(0), "num_thresholds: expected a whole number >= 1, got 0"),
        (lambda: ILIF(v_threshold=-1.0), "ILIF: expected .* positive thresholds"),
        (lambda: ILIF(tau=0.5), "ILIF: expected tau >= 1"),
        (lambda: ILIF(4, np.ones(3)), r"ILIF: expected one v_threshold, got .* \(3,\)"),
    ],
)
def test_arguments_have_ranges(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_refractory_by_integrate_and_fire():
    """An own loop in NumPy: the period as a counter per neuron."""
    xs = np.asarray(currents((2, 30, 4)))
    v, left, given = np.zeros((2, 4), np.float32), np.zeros((2, 4), int), []
    for x in xs.swapaxes(0, 1):
        awake = left == 0
        u = np.where(awake, v + x, v)
        z = awake & (u >= 1)
        v, left = u - z, np.where(awake, 3 * z, left - 1)
        given.append(z)
    layer = RefractoryLIF(3, tau=math.inf, decay_input=False)
    np.testing.assert_array_equal(layer(jnp.asarray(xs)), np.stack(given, 1))
    assert not np.array_equal(layer(jnp.asarray(xs)), IF()(jnp.asarray(xs)))
    assert layer.options.surrogate == surrogate.ATAN
