"""The plain cell against traces of SpikingJelly: spikes, membranes and gradients."""

from functools import partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spikejax import surrogate
from spikejax.neurons import NeuronOptions, NeuronParams, lif
from spikejax.unroll import unroll

GOLDEN = np.load(Path(__file__).parent / "golden/spikingjelly.npz")
RESETS = {"soft": None, "zero": 0.0, "below": -0.25}
SURROGATES = {"atan": surrogate.atan(2.0), "sigmoid": surrogate.sigmoid(4.0)}
LEAKS = {
    "IF": 0.0,
    "LIF": 1 / float(GOLDEN["lif_tau"]),
    "PLIF": 1 / float(GOLDEN["plif_tau"]),
}
CASES = [
    (neuron, reset, decay_input)
    for neuron, reset, decay_input in product(LEAKS, RESETS, (False, True))
    if not (neuron == "IF" and decay_input)
]


@partial(jax.jit, static_argnames="options")
def spikes_membranes_gradients(leak, xs, spike_weights, membrane_weights, options):
    def both(params, v, x):
        v, (z,) = lif(params, v, x, options)
        return v, jnp.stack([z, v], -1)

    def weighted_sum(leak, xs):
        v = jnp.full_like(xs[:1], options.v_reset or 0.0)
        _, out = unroll(both, NeuronParams(leak), v, xs[None])
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
        NeuronOptions(RESETS[reset], decay_input, detach_reset, SURROGATES[spike]),
    )
    case = f"{neuron}-{reset}-decay={decay_input}"
    gradients = f"{case}/{spike}-detach={detach_reset}"
    assert spikes.shape == (32, 6) and 0.03 < spikes.mean() < 0.8
    np.testing.assert_array_equal(spikes, GOLDEN[f"{case}/spikes"])
    np.testing.assert_allclose(membranes, GOLDEN[f"{case}/membranes"], 0, 1e-6)
    np.testing.assert_allclose(dx, GOLDEN[f"{gradients}/dx"], 0, 1e-5)
    if neuron == "PLIF":  # leak = sigmoid(w)
        dw = dleak * LEAKS["PLIF"] * (1 - LEAKS["PLIF"])
        np.testing.assert_allclose(dw, GOLDEN[f"{gradients}/dw"], 1e-5)
