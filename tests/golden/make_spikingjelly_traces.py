"""Writes spikingjelly.npz: what SpikingJelly's neurons do with a fixed random input.

The tests compare with the file and need no SpikingJelly. To make it again:

    pip install numpy "spikingjelly==2.0.0"
    pip install torch --index-url https://download.pytorch.org/whl/cpu
    python tests/golden/make_spikingjelly_traces.py

For every case (neuron, reset, decay_input) the file holds "CASE/spikes" and
"CASE/membranes" [T, n]; for every surrogate and detach_reset also, under
"CASE/SURROGATE-detach=BOOL", the gradient of

    sum(spikes * spike_weights) + sum(membranes * membrane_weights)

for the inputs xs [T, n] ("/dx") and, for PLIF, for its w ("/dw").
"""

from itertools import product
from pathlib import Path

import numpy as np
import torch
from spikingjelly.activation_based import neuron, surrogate

STEPS, NEURONS = 32, 6
LIF_TAU, PLIF_TAU = 3.0, 2.5
RESETS = {"soft": None, "zero": 0.0, "below": -0.25}
SURROGATES = {"atan": surrogate.ATan(2.0), "sigmoid": surrogate.Sigmoid(4.0)}


def build(name, decay_input, options):
    """One SpikingJelly neuron, step by step."""
    if name == "IF":
        return neuron.IFNode(**options)
    if name == "LIF":
        return neuron.LIFNode(LIF_TAU, decay_input, **options)
    return neuron.ParametricLIFNode(PLIF_TAU, decay_input, **options)


def run(node, xs, spike_weights, membrane_weights):
    """Spikes, membranes and the gradients for xs and, where there is one, for w."""
    xs = torch.tensor(xs, requires_grad=True)
    spikes, membranes = [], []
    for x in xs:
        spikes.append(node(x))
        membranes.append(node.v)
    spikes, membranes = torch.stack(spikes), torch.stack(membranes)
    loss = (spikes * torch.tensor(spike_weights)).sum()
    loss = loss + (membranes * torch.tensor(membrane_weights)).sum()
    loss.backward()
    dw = node.w.grad.numpy() if hasattr(node, "w") else None
    return spikes.detach().numpy(), membranes.detach().numpy(), xs.grad.numpy(), dw


def main():
    rng = np.random.default_rng(0)
    xs = rng.normal(0.7, 1.0, (STEPS, NEURONS)).astype(np.float32)
    weights = rng.normal(size=(2, STEPS, NEURONS)).astype(np.float32)
    saved = {"xs": xs, "spike_weights": weights[0], "membrane_weights": weights[1]}
    saved |= {"lif_tau": np.float32(LIF_TAU), "plif_tau": np.float32(PLIF_TAU)}
    for name, reset, decay_input in product(
        ("IF", "LIF", "PLIF"), RESETS, (False, True)
    ):
        if name == "IF" and decay_input:
            continue
        case = f"{name}-{reset}-decay={decay_input}"
        for spike, detach_reset in product(SURROGATES, (False, True)):
            options = {
                "v_reset": RESETS[reset],
                "detach_reset": detach_reset,
                "surrogate_function": SURROGATES[spike],
            }
            node = build(name, decay_input, options)
            spikes, membranes, dx, dw = run(node, xs, *weights)
            saved[f"{case}/spikes"] = spikes.astype(np.uint8)
            saved[f"{case}/membranes"] = membranes
            saved[f"{case}/{spike}-detach={detach_reset}/dx"] = dx
            if dw is not None:
                saved[f"{case}/{spike}-detach={detach_reset}/dw"] = dw
    path = Path(__file__).with_name("spikingjelly.npz")
    np.savez_compressed(path, **saved)
    print(f"{path.name}: {len(saved)} arrays, {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
