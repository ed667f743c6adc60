"""Builds the networks of energy.json, and writes the file:

python tests/golden/make_energy.py
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax import energy, neurons
from spikejax._compat import iter_modules
from spikejax.layers import LIF, MultiThreshold
from spikejax.models import resnet

FILE = Path(__file__).parent / "energy.json"
NEURONS = {
    "relu": lambda: nnx.relu,
    "lif": LIF,
    "parallel": partial(MultiThreshold, 4, v_threshold=0.5, decay_input=False),
    "cascade": partial(MultiThreshold, 4, neurons.cascade, v_threshold=0.5),
    "dyadic": partial(MultiThreshold, (1.0, 0.5, 0.25), neurons.cascade),
}
RESIDUALS = {"plain": resnet.plain, "sew": resnet.sew, "ms": resnet.ms}


def network(neuron: str, residual: str) -> nnx.Module:
    """A narrow ResNet-20 whose weights are eighths: sums are exact on any machine."""
    model = resnet.ResNet(
        (3, 3, 3),
        (3, 4, 5),
        3,
        neuron=NEURONS[neuron],
        residual=RESIDUALS[residual],
        in_channels=2,
        rngs=nnx.Rngs(0),
    )
    for _, module in iter_modules(model):
        if isinstance(module, nnx.Conv | nnx.Linear):
            module.kernel[...] = jnp.round(module.kernel[...] * 8) / 8
        if isinstance(module, nnx.BatchNorm):
            module.scale[...] = jnp.ones_like(module.scale[...])
            # with epsilon it is 1 exactly
            module.var[...] = jnp.full_like(module.var[...], 1 - 1e-5)
    return model


def images() -> jax.Array:
    """Two images [2, T=2, 8, 8, 2] in eighths."""
    xs = jax.random.normal(jax.random.key(0), (2, 2, 8, 8, 2))
    return jnp.round(xs * 8) / 8


def rows(neuron: str, residual: str) -> list[list]:
    """The rows of the report: neurons, then connections."""
    report = energy.measure(network(neuron, residual), images())
    neurons = [[row.path, row.rate, row.spikes] for row in report.neurons]
    return neurons + [
        [row.path, row.acs, row.macs, row.dense_macs] for row in report.connections
    ]


if __name__ == "__main__":
    found = {f"{n} {r}": rows(n, r) for n in NEURONS for r in RESIDUALS}
    lines = [
        f"{json.dumps(name)}: [\n"
        + ",\n".join(f"  {json.dumps(row)}" for row in network_rows)
        + "\n]"
        for name, network_rows in found.items()
    ]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
