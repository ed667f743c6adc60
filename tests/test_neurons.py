"""Cells: traces by hand, SpikingJelly's traces, and what they have to do with each other.

Numbers here are mostly multiples of powers of two, on which float32 makes no error.
"""

from functools import partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spikejax import neurons, surrogate
from spikejax.neurons import NeuronParams, cascade, independent, lif, parallel
from spikejax.unroll import unroll

GOLDEN = np.load(Path(__file__).parent / "golden/spikingjelly.npz")
RESETS = {"soft": None, "zero": 0.0, "below": -0.25}
SURROGATES = {"atan": surrogate.atan(2.0), "sigmoid": surrogate.sigmoid(4.0)}
CELLS = {
    "lif": (lif, (1.0,)),
    "parallel": (parallel, (0.75, 1.0, 2.0)),
    "cascade": (cascade, (1.0, 0.5, 0.25)),
    "independent": (independent, (0.75, 1.0, 2.0)),
}
MULTI = {name: CELLS[name][0] for name in ("parallel", "cascade", "independent")}

LEAKS = {
    "IF": 0.0,
    "LIF": 1 / float(GOLDEN["lif_tau"]),
    "PLIF": 1 / float(GOLDEN["plif_tau"]),
}
CASES = [case for case in product(LEAKS, RESETS, (False, True)) if case[::2] != ("IF", 1)]

every_cell = pytest.mark.parametrize("name", CELLS)
every_multi = pytest.mark.parametrize("name", MULTI)
every_reset = pytest.mark.parametrize("reset", RESETS)


def rest(cell, x, number):
    """Membranes at zero, as the cell wants them."""
    return jnp.zeros((number, *x.shape) if cell is independent else x.shape)


def run(cell, params, xs, v=None, **options):
    """Steps written out: the spikes and the membranes after each one, [T, ...]."""
    v = rest(cell, xs[0], len(params.thresholds)) if v is None else v
    spikes, membranes = [], []
    for x in xs:
        v, z = cell(params, v, x, **options)
        spikes.append(z)
        membranes.append(v)
    return jnp.stack(spikes), jnp.stack(membranes)


# --- SpikingJelly


@partial(jax.jit, static_argnames=("v_reset", "decay_input", "detach_reset", "spike"))
def spikes_membranes_gradients(leak, xs, spike_weights, membrane_weights, **options):
    def both(params, v, x):
        v, z = lif(params, v, x, **options)
        return v, jnp.stack([z, v], -1)

    def weighted_sum(leak, xs):
        _, out = unroll(both, NeuronParams(leak), jnp.zeros_like(xs[:1]), xs[None])
        spikes, membranes = out[0, ..., 0], out[0, ..., 1]
        loss = (spikes * spike_weights).sum() + (membranes * membrane_weights).sum()
        return loss, (spikes, membranes)

    gradients, out = jax.grad(weighted_sum, (0, 1), has_aux=True)(leak, xs)
    return *out, *gradients


@pytest.mark.parametrize("detach_reset", [False, True], ids=["through", "detached"])
@pytest.mark.parametrize("spike", SURROGATES)
@pytest.mark.parametrize("neuron, reset, decay_input", CASES)
def test_equals_spikingjelly(neuron, reset, decay_input, spike, detach_reset):
    spikes, membranes, dleak, dx = spikes_membranes_gradients(
        LEAKS[neuron],
        GOLDEN["xs"],
        GOLDEN["spike_weights"],
        GOLDEN["membrane_weights"],
        v_reset=RESETS[reset],
        decay_input=decay_input,
        detach_reset=detach_reset,
        spike=SURROGATES[spike],
    )
    case = f"{neuron}-{reset}-decay={decay_input}"
    gradients = f"{case}/{spike}-detach={detach_reset}"
    np.testing.assert_array_equal(spikes, GOLDEN[f"{case}/spikes"])
    np.testing.assert_allclose(membranes, GOLDEN[f"{case}/membranes"], 0, 1e-6)
    np.testing.assert_allclose(dx, GOLDEN[f"{gradients}/dx"], 0, 1e-5)
    if neuron == "PLIF":  # leak = sigmoid(w)
        dw = dleak * LEAKS["PLIF"] * (1 - LEAKS["PLIF"])
        np.testing.assert_allclose(dw, GOLDEN[f"{gradients}/dw"], 1e-5)


def test_the_golden_traces_hold_spikes_silence_and_hard_and_soft_resets():
    for neuron, reset, decay_input in CASES:
        spikes = GOLDEN[f"{neuron}-{reset}-decay={decay_input}/spikes"]
        assert spikes.shape == (32, 6) and 0.03 < spikes.mean() < 0.8
    soft, hard = (GOLDEN[f"LIF-{reset}-decay=False/spikes"] for reset in ("soft", "zero"))
    assert (soft != hard).any()


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


def test_a_membrane_equal_to_the_threshold_fires():
    spikes, membranes = trace(lif, (1.0,), [1.0, 1.0])
    assert spikes == [1, 1] and membranes == [0, 0]


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


@pytest.mark.parametrize("decay_input, limit", [(True, 0.5), (False, 2.0)])
def test_a_silent_membrane_settles_at_the_input_times_the_gain(decay_input, limit):
    params = NeuronParams(0.25, (10.0,))
    _, membranes = run(lif, params, jnp.full(60, 0.5), decay_input=decay_input)
    assert membranes[-1] == pytest.approx(limit, abs=1e-5)


@pytest.mark.parametrize("decay_input", [False, True])
@pytest.mark.parametrize("v_reset, goal", [(None, 0.0), (0.0, 0.0), (-0.5, -0.5)])
def test_without_input_the_membrane_goes_back_to_rest(v_reset, goal, decay_input):
    options = {"v_reset": v_reset, "decay_input": decay_input}
    xs = jnp.full(60, goal if decay_input else 0.0)  # decay_input pulls it towards x
    if decay_input:
        xs = xs * 0
        goal = goal + 0.0
    _, membranes = run(lif, NeuronParams(0.25), xs, jnp.array(0.875), **options)
    assert membranes[-1] == pytest.approx(goal, abs=1e-5)


# --- one threshold is the plain neuron


@jax.jit
def _unused(x):
    return x
