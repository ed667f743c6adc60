"""Neurons as equations of NIR: the numbers, and what each reads back as."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import nir
import numpy as np
import pytest

from spikejax import neurons
from spikejax.layers import IF, LI, LIF, PLIF, MultiThreshold, Neuron
from spikejax.memory import keep_membranes
from spikejax.neurons import NeuronOptions, NeuronParams, late_reset
from spikejax.nir.neurons import (
    EULER,
    EXPONENTIAL,
    Dialect,
    NodeParams,
    loop,
    node,
    node_step,
    read_neurons,
    specs,
    write,
)
from spikejax.nn.cells import CubaLIF
from spikejax.nn.quant import ScaledIF

DT = 1e-3


def part(layer, *, factor=1.0, soft_reset=loop, integration=EULER, shape=(2,)):
    (spec,) = specs("n", layer, shape, factor, integration)
    return write("n", spec, DT, integration, soft_reset)


def parameters(made):
    names = "tau", "tau_mem", "tau_syn", "r", "w_in", "v_leak"
    names += "v_threshold", "v_reset"
    return {k: float(getattr(made, k)[0]) for k in names if hasattr(made, k)}


@pytest.mark.parametrize(
    ("layer", "kind", "expected"),
    [
        (
            LIF(4.0, 0.5, v_reset=0.0),
            nir.LIF,
            dict(tau=4e-3, r=1, v_leak=0, v_threshold=0.5, v_reset=0),
        ),
        (
            LIF(4.0, 0.5, v_reset=-0.25, decay_input=False),
            nir.LIF,
            dict(tau=4e-3, r=4, v_leak=-0.25, v_threshold=0.5, v_reset=-0.25),
        ),
        (
            PLIF(5.0, v_reset=0.0),
            nir.LIF,
            dict(tau=5e-3, r=1, v_leak=0, v_threshold=1, v_reset=0),
        ),
        (IF(2.0, v_reset=-1.0), nir.IF, dict(r=1e3, v_threshold=2, v_reset=-1)),
        (LI(4.0), nir.LI, dict(tau=4e-3, r=1, v_leak=0)),
        (LI(math.inf, decay_input=False), nir.I, dict(r=1e3)),
        (
            CubaLIF(4.0, tau_synapse=2.0, v_reset=-0.25, decay_input=False),
            nir.CubaLIF,
            dict(tau_mem=4e-3, tau_syn=2e-3, w_in=2, r=4)
            | dict(v_leak=-0.25, v_threshold=1, v_reset=-0.25),
        ),
    ],
)
def test_one_node_says_it_all(layer, kind, expected):
    made = part(layer)
    assert made.entry == "n" and made.outputs == [("n", 1.0)]
    assert type(made.nodes["n"]) is kind and not made.edges
    assert parameters(made.nodes["n"]) == pytest.approx(expected, rel=1e-6)
    assert made.nodes["n"].r.shape == (2,)


def test_a_factor_of_the_input_is_in_r():
    made = part(LIF(4.0, v_reset=0.0, decay_input=False), factor=0.5).nodes["n"]
    assert parameters(made)["r"] == pytest.approx(2)


def test_soft_reset_is_a_loop():
    made = part(LIF(4.0, 0.5))
    assert parameters(made.nodes["n.membrane"]) == pytest.approx(
        dict(tau=4e-3, r=1, v_leak=0)
    )
    assert made.nodes["n.threshold_1"].threshold[0] == 0.5
    # one step later: u[t+1] = 3/4 (u - 0.5 z) + x/4, so -0.5 z comes as -1.5 z
    assert made.nodes["n.reset_1"].scale[0] == pytest.approx(-1.5)
    assert made.edges == [
        ("n.membrane", "n.threshold_1"),
        ("n.threshold_1", "n.reset_1"),
        ("n.reset_1", "n.membrane"),
    ]
    assert made.outputs == [("n.threshold_1", 1.0)]


def test_soft_reset_as_a_node_is_said_in_its_metadata():
    made = part(LIF(4.0, 0.5), soft_reset=node).nodes["n"]
    assert type(made) is nir.LIF and made.metadata == {"reset": "subtract"}
    made = part(ScaledIF(0.5), soft_reset=node).nodes["n"]
    assert made.metadata == {"reset": "subtract", "v_start": 0.25}
    assert parameters(made) == dict(r=1e3, v_threshold=0.5, v_reset=0)


def test_soft_reset_comes_back_past_a_synaptic_current():
    layer = CubaLIF(4.0, 0.5, tau_synapse=3.0)
    made = part(layer)
    assert made.entry == "n.synapse"
    assert parameters(made.nodes["n.synapse"]) == pytest.approx(
        dict(tau=3e-3, r=3, v_leak=0)
    )
    assert made.edges[0] == ("n.synapse", "n.membrane")
    assert made.edges[1:] == part(LIF(4.0, 0.5)).edges
    made = part(layer, soft_reset=node).nodes["n"]
    assert type(made) is nir.CubaLIF and made.metadata == {"reset": "subtract"}


def test_several_thresholds_share_a_membrane():
    layer = MultiThreshold((0.25, 0.5, 1.0), tau=2.0)
    made = part(layer)
    assert len(made.nodes) == 1 + 2 * 3
    thresholds = [made.nodes[f"n.threshold_{k}"].threshold[0] for k in (1, 2, 3)]
    resets = [made.nodes[f"n.reset_{k}"].scale[0] for k in (1, 2, 3)]
    assert thresholds == [0.25, 0.5, 1.0] and resets == [-0.25, -0.25, -0.5]
    assert [weight for _, weight in made.outputs] == [1, 1, 2]
    assert part(layer, soft_reset=node).nodes.keys() == made.nodes.keys()


def test_a_cascade_carries_each_spike_to_the_next_threshold():
    made = part(MultiThreshold((1.0, 0.5), neurons.cascade))
    assert made.nodes["n.carry_1"].scale[0] == -1
    assert ("n.threshold_1", "n.carry_1") in made.edges
    assert ("n.carry_1", "n.threshold_2") in made.edges
    assert [weight for _, weight in made.outputs] == [1, 0.5]


def test_independent_thresholds_are_a_membrane_each():
    layer = MultiThreshold((0.5, 1.0), neurons.independent, v_reset=0.0)
    first, second = specs("n", layer, (2,), 1.0, EULER)
    assert (first.thresholds, second.thresholds) == ((0.5,), (1.0,))


def test_several_thresholds_cannot_set_one_membrane():
    with pytest.raises(ValueError, match="got hard reset of one membrane by several"):
        part(MultiThreshold(3, v_reset=0.0))


class OwnParams(NamedTuple):
    """Parameters without a leak."""

    thresholds: tuple[float, ...] = (1.0,)


def own_cell(params, v, x, options):
    return v + x, (options.surrogate(v + x),)


@pytest.mark.parametrize(
    ("layer", "problem"),
    [
        (Neuron(own_cell, OwnParams()), "got the cell 'own_cell'"),
        (
            Neuron(neurons.parallel, NeuronParams(0.5, (1.0, -1.0), (1.0, -1.0))),
            "got spikes of negative amounts",
        ),
        (
            LIF(np.array([2.0, np.inf]), decay_input=False),
            "got only some neurons with a leak",
        ),
        (
            CubaLIF(tau_synapse=np.array([2.0, np.inf])),
            "got only some neurons with a leak",
        ),
    ],
)
def test_neurons_without_nodes_are_refused(layer, problem):
    with pytest.raises(ValueError, match=f"to_nir: .* at 'n', {problem}"):
        part(layer)


def test_numbers_of_every_neuron_are_in_its_nodes():
    layer = LIF(np.array([2.0, 4.0]), np.array([0.25, 0.5]), v_reset=0.0)
    made = part(layer).nodes["n"]
    np.testing.assert_allclose(made.tau, [2e-3, 4e-3])
    np.testing.assert_allclose(made.v_threshold, [0.25, 0.5])
    image = part(layer, shape=(3, 3, 2)).nodes["n"]
    assert image.tau.shape == (2, 3, 3) and (image.tau[1] == made.tau[1]).all()
    back = read_neurons("n", made, DT, Dialect())
    assert type(back) is LIF
    np.testing.assert_allclose(back.params.leak, [0.5, 0.25])


def test_a_late_reset_subtracts_more_than_its_threshold():
    params, options = NeuronParams(0.2, (0.5,)), NeuronOptions(decay_input=False)
    made = part(Neuron(late_reset, params, options), soft_reset=node)
    # the whole threshold leaves the membrane of the next step, after its leak
    assert made.nodes["n.reset_1"].scale[0] == pytest.approx(-0.5)


@pytest.mark.parametrize("integration", [EULER, EXPONENTIAL])
@pytest.mark.parametrize("leak", [0.01, 0.5, 0.9])
def test_leaks_become_time_constants_and_leaks_again(integration, leak):
    tau = integration.tau(DT, leak)
    assert integration.leak(DT, tau) == pytest.approx(leak, rel=1e-12)


def test_exponential_decay_is_the_solution_of_the_equation():
    tau = EXPONENTIAL.tau(DT, 0.5)
    assert math.exp(-DT / tau) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="got tau = 1, which exponential decay"):
        part(LIF(1.0, v_reset=0.0), integration=EXPONENTIAL)
    with pytest.raises(ValueError, match="got tau = 1, which exponential decay"):
        part(CubaLIF(tau_synapse=1.0, v_reset=0.0), integration=EXPONENTIAL)


@pytest.mark.parametrize("integration", [EULER, EXPONENTIAL])
@pytest.mark.parametrize(
    "layer",
    [
        LIF(3.0, 0.3, v_reset=0.0),
        LIF(7.0, 0.3, v_reset=-0.25, decay_input=False),
        IF(0.3, v_reset=-0.25),
        LI(3.0),
        LI(math.inf, decay_input=False),
        CubaLIF(3.0, 0.3, tau_synapse=5.0, v_reset=0.0),
        CubaLIF(3.0, 0.3, tau_synapse=5.0, v_reset=-0.25, decay_input=False),
    ],
)
def test_plain_layers_come_back_as_they_were(layer, integration):
    made = part(layer, integration=integration).nodes["n"]
    back = read_neurons("n", made, DT, Dialect(integration))
    assert type(back) is type(layer) and back.cell is layer.cell
    assert back.leak == pytest.approx(layer.leak, rel=1e-12)
    currents = [getattr(n, "synaptic_leak", 1.0) for n in (back, layer)]
    assert currents[0] == pytest.approx(currents[1], rel=1e-12)
    assert back.thresholds == pytest.approx(layer.thresholds)
    assert back.options == layer.options


def test_a_node_is_read_by_its_text():
    # every neuron its own: the equations in numpy
    rng = np.random.default_rng(0)
    tau, r = rng.uniform(2e-3, 9e-3, 4), rng.uniform(1, 3, 4)
    v_leak, v_reset = rng.uniform(-0.3, 0.3, 4), rng.uniform(-0.5, 0.2, 4)
    threshold = rng.uniform(0.4, 0.8, 4)
    made = nir.LIF(tau, r, v_leak, threshold, v_reset)
    xs = rng.uniform(-0.5, 1.5, (30, 4)).astype(np.float32)
    v, expected = v_reset, []
    for x in xs:
        v = v + DT / tau * (v_leak - v + r * x)
        z = v > threshold
        v = np.where(z, v_reset, v)
        expected.append(z)
    layer = read_neurons("n", made, DT, Dialect())
    assert layer.cell is node_step and 0.1 < np.mean(expected) < 0.9
    np.testing.assert_array_equal(layer(jnp.asarray(xs)[None])[0], expected)


@pytest.mark.parametrize("r", [1.0, 2.5])
@pytest.mark.parametrize("v_reset", [0.0, -0.3])
def test_a_current_is_read_by_its_text(r, v_reset):
    # every neuron its own: the equations in numpy
    rng = np.random.default_rng(1)
    tau_syn, tau_mem = rng.uniform(2e-3, 9e-3, (2, 5))
    w_in, threshold = rng.uniform(2, 3, 5), rng.uniform(0.4, 0.8, 5)
    r, v_reset, v_leak = np.full(5, r), np.full(5, v_reset), np.full(5, 0.1)
    xs = rng.uniform(-0.5, 1.5, (40, 5)).astype(np.float32)
    i, v, u, fired, membranes = 0.0, v_reset, v_leak, [], []
    for x in xs:
        i = i + DT / tau_syn * (w_in * x - i)
        v = v + DT / tau_mem * (v_leak - v + r * i)
        u = u + DT / tau_mem * (v_leak - u + r * i)
        fired.append(v > threshold)
        membranes.append(u)
        v = np.where(fired[-1], v_reset, v)
    lif = nir.CubaLIF(tau_syn, tau_mem, r, v_leak, threshold, v_reset, w_in)
    li = nir.CubaLI(tau_syn, tau_mem, r, v_leak, w_in)
    spikes, readout = (
        read_neurons("n", node, DT, Dialect())(jnp.asarray(xs)[None])[0]
        for node in (lif, li)
    )
    assert 0.1 < np.mean(fired) < 0.9
    np.testing.assert_array_equal(spikes, fired)
    np.testing.assert_allclose(readout, membranes, rtol=1e-5)
    with pytest.raises(ValueError, match="at least dt=0.01 s, .* got tau 0.00"):
        read_neurons("n", lif, 0.01, Dialect())


def test_currents_are_written_as_they_were_read():
    numbers = {"tau_syn": 4e-3, "tau_mem": 5e-3, "r": 2.0, "v_leak": 0.1, "w_in": 3.0}
    made = nir.CubaLI(**{key: np.full(2, value) for key, value in numbers.items()})
    again = part(read_neurons("n", made, DT, Dialect())).nodes["n"]
    # r and w_in are one gain: the current is counted in units of w_in / tau_syn
    assert type(again) is nir.CubaLI and again.w_in * again.r == pytest.approx(6.0)
    assert again.tau_syn == pytest.approx(4e-3) and again.v_leak == pytest.approx(0.1)


def test_a_leaky_integrator_rests_where_its_node_does():
    made = nir.LI(np.full(1, 2e-3), np.full(1, 3.0), np.full(1, 0.5))
    ys = read_neurons("n", made, DT, Dialect())(jnp.asarray([[[0.0], [1.0]]]))
    np.testing.assert_allclose(ys.ravel(), [0.5, 2.0])


def test_other_nodes_are_none_and_a_wrong_dt_is_told():
    assert read_neurons("n", nir.Linear(np.eye(2)), DT, Dialect()) is None
    made = part(LIF(4.0, v_reset=0.0)).nodes["n"]
    with pytest.raises(ValueError, match="'n' with a positive tau of at least dt=1 s"):
        read_neurons("n", made, 1, Dialect())
    below = nir.IF(np.ones(1), np.ones(1), np.full(1, 1.5))
    with pytest.raises(ValueError, match="thresholds above reset and rest, got"):
        read_neurons("n", below, DT, Dialect())


def test_steps_of_a_node_are_the_whole():
    params = NodeParams(0.5, 2.0, thresholds=(0.5,), amounts=(0.5,))
    layer = Neuron(node_step, params, v_start=0.25)
    xs = jnp.asarray([[1.0, 3.0, -2.0, 0.5]])[..., None]
    whole = layer(xs)
    assert 0 < whole.sum() < 4
    keep_membranes(layer, xs)
    steps = [layer(xs[:, t : t + 1]) for t in range(4)]
    np.testing.assert_array_equal(jnp.concatenate(steps, 1), whole)
