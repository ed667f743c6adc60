"""Every neuron with everything that takes a neuron: nothing needs a case of its own."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax import energy, neurons, nir, surrogate
from spikejax.layers import (
    IF,
    LI,
    LIF,
    PLIF,
    MultiThreshold,
    Neuron,
)
from spikejax.memory import stepper
from spikejax.neurons import NeuronOptions, NeuronParams
from spikejax.nn.quant import ScaledIF
from spikejax.nn.recurrent import Recurrent


class AdaptiveParams(NamedTuple):
    """LIF whose threshold rises by beta with each spike and decays by rho."""

    leak: float = 0.5
    thresholds: tuple = (0.75,)
    rho: float = 0.75
    beta: float = 0.25


def adaptive(params, state, x, options):
    """One step of an adaptive neuron: a cell with a state of two arrays."""
    theta = params.thresholds[0] + params.beta * state["a"]
    u = neurons.charge(params.leak, state["v"], x, options)
    z = options.surrogate(u - theta)
    v = neurons.reset(u, z, theta * z, options)
    return {"v": v, "a": params.rho * state["a"] + z}, (z,)


def adaptive_rest(params, shape, v_start):
    return {"v": jnp.full(shape, v_start), "a": jnp.zeros(shape)}


NO_DECAY = NeuronOptions(decay_input=False)
NEURONS = {
    "lif": LIF,
    "lif hard": partial(LIF, 3.0, 0.5, v_reset=-0.25, detach_reset=True),
    "if": IF,
    "plif": partial(PLIF, learn_thresholds=True),
    "li": LI,
    "parallel": partial(MultiThreshold, 4, v_threshold=0.5),
    "parallel unequal": partial(MultiThreshold, (0.5, 0.75, 2.0), learn_tau=True),
    "cascade": partial(MultiThreshold, 3, neurons.cascade, v_threshold=0.5),
    "cascade dyadic": partial(MultiThreshold, (1.0, 0.5, 0.25), neurons.cascade),
    "independent": partial(MultiThreshold, 2, neurons.independent, v_threshold=0.5),
    "scaled": partial(ScaledIF, 0.75, 2),
    "late": lambda: Neuron(neurons.late_reset, NeuronParams(0.25), NO_DECAY),
    "i-lif": lambda: Neuron(
        neurons.parallel,
        NeuronParams(0.75, (0.5, 1.5, 2.5, 3.5), (1.0, 1.0, 1.0, 1.0)),
        NeuronOptions(None, False, True, surrogate.rectangle()),
    ),
    "ternary": lambda: Neuron(
        neurons.parallel, NeuronParams(0.75, (0.5, -0.5), (0.5, -0.5)), NO_DECAY
    ),
    "adaptive": lambda: Neuron(adaptive, AdaptiveParams(), start=adaptive_rest),
}
XS = 2 * jax.random.normal(jax.random.key(0), (2, 5, 3)) + 0.5
every_neuron = pytest.mark.parametrize("name", NEURONS)


def spikes_of(layer):
    """The binary spikes of the currents XS; an integrator has none."""
    return 0 if isinstance(layer, LI) else int(layer(XS, trains=True).sum())


@every_neuron
def test_energy_counts_its_spikes(name):
    layer = NEURONS[name]()
    network = nnx.Sequential(layer, nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    report = energy.measure(network, XS)
    assert report.spikes_per_image == spikes_of(layer) / 2
    (row,) = report.connections
    is_analog = name == "li"  # spikes cost accumulates, whatever they weigh
    assert (row.acs > 0, row.macs > 0) == (not is_analog, is_analog)
    assert spikes_of(layer) > 0 or name == "li"


@every_neuron
def test_whole_is_step_by_step_and_a_scan_over_the_stepper(name):
    layer = NEURONS[name]()
    whole = layer(XS)
    state, step = stepper(layer, XS)
    _, slices = jax.lax.scan(
        lambda state, x: step(state, x[:, None]), state, jnp.moveaxis(XS, 1, 0)
    )
    np.testing.assert_allclose(jnp.moveaxis(slices[:, :, 0], 0, 1), whole, 0, 1e-6)
    for t in range(5):
        state, ys = step(state, XS[:, t : t + 1])
        np.testing.assert_allclose(ys[:, 0], whole[:, t], 0, 1e-6)


@pytest.mark.parametrize("steps", [4, 5])  # written out, and in a loop
@every_neuron
def test_recurrent_without_weights_is_the_neuron(name, steps):
    recurrent = Recurrent(NEURONS[name](), 3, rngs=nnx.Rngs(0))
    recurrent.recurrent.kernel[...] = jnp.zeros((3, 3))
    xs = XS[:, :steps]
    np.testing.assert_allclose(recurrent(xs), NEURONS[name]()(xs), 0, 1e-6)


@every_neuron
def test_nir_takes_it_or_says_why_not(name):
    layer = NEURONS[name]()
    try:
        graph = nir.to_nir(layer, XS[:, :1], dt=1e-3)
    except ValueError as error:
        assert str(error).startswith("to_nir: expected ")
        assert name in ("late", "ternary", "adaptive")
    else:
        again = nir.from_nir(graph, dt=1e-3)
        np.testing.assert_allclose(again(XS), layer(XS), 0, 1e-5)


@every_neuron
def test_tau_may_differ_from_channel_to_channel(name):
    leaks = np.array([0.1, 0.5, 0.75], np.float32)
    layer = NEURONS[name]()
    params = layer.params._replace(leak=leaks)

    def remade(leak):
        return Neuron(
            layer.cell,
            params._replace(leak=leak),
            layer.options,
            start=layer.rest,
            v_start=float(layer.v_start),
            unit=None if layer.unit is None else float(layer.unit[...]),
        )

    ys = remade(leaks)(XS)
    for k in range(3):
        alone = remade(float(leaks[k]))(XS[..., k])
        np.testing.assert_allclose(ys[..., k], alone, 0, 1e-6)


# Up to four steps are written out, more are a loop, whose rule every neuron shares.
@pytest.mark.parametrize(
    ("name", "steps"), [*((name, 5) for name in NEURONS), ("lif", 3), ("cascade", 3)]
)
def test_second_derivatives_are_those_of_the_gradient(name, steps):
    """A Hessian-vector product, reverse over reverse, is a directional difference."""
    layer, xs = NEURONS[name](), XS[:, :steps]
    direction = jax.random.normal(jax.random.key(1), xs.shape)

    @jax.jit
    @jax.grad
    def gradient(xs):
        return jnp.square(layer(xs)).sum()

    @jax.jit
    @jax.grad
    def product(xs):
        return (gradient(xs) * direction).sum()

    found = product(xs)
    assert jnp.all(jnp.isfinite(found))
    assert jnp.any(found != 0) or name == "i-lif"  # a rectangle has no slope


@pytest.mark.parametrize("name", ["parallel", "adaptive"])
def test_the_program_written_out_for_a_tpu_is_derived_beside_the_loop(
    written_for_tpus, name
):
    layer = NEURONS[name]()

    @jax.vmap
    @jax.grad
    def gradient(xs):
        return jnp.square(layer(xs[None])).sum()

    product = jax.jit(jax.grad(lambda xs: jnp.square(gradient(xs)).sum()))
    two = XS[..., :2]  # channels of a shape that no other test has traced
    assert "platform_index" in str(jax.make_jaxpr(product)(two))
    np.testing.assert_allclose(product(two), product(XS)[..., :2], 1e-6, 1e-6)


@every_neuron
def test_vmap_is_a_batch(name):
    layer = NEURONS[name]()
    alone = jax.vmap(lambda xs: layer(xs[None])[0])(XS)
    np.testing.assert_allclose(alone, layer(XS), 0, 1e-6)


@pytest.mark.parametrize("learn", [False, True])
def test_thresholds_and_tau_per_channel_are_learned_in_their_shape(learn):
    tau, theta = np.array([1.5, 2.0, 4.0]), np.array([0.5, 1.0, 2.0])
    layer = MultiThreshold(
        (theta, 2 * theta), tau=tau, learn_tau=learn, learn_thresholds=learn
    )
    ys = layer(XS)
    for k in range(3):
        alone = MultiThreshold((theta[k], 2 * theta[k]), tau=tau[k])(XS[..., k])
        np.testing.assert_array_equal(ys[..., k], alone)
    found = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    shapes = {name: value.shape for name, value in found.items()}
    assert shapes == ({"leak_logit": (3,), "log_steps": (2, 3)} if learn else {})
    assert math.isclose(float(layer.params.leak[1]), 0.5, rel_tol=1e-6)
