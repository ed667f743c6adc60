"""Writes cells.npz: adaptive and current-based neurons of Norse and SpikingJelly.

The tests compare with the file and need neither library. To make it again:

    pip install torch --index-url https://download.pytorch.org/whl/cpu
    pip install numpy "nir==1.0.8" "nirtorch==2.6" loguru pbr
    pip install --no-deps "spikingjelly==2.0.0" "norse==1.1.0"
    python tests/golden/make_cell_traces.py

ALIF is Norse's LSNN. Its threshold b starts at v_th, decays to v_th within the step and
then jumps by beta, so with rho = dt / tau_b an adaptation a has the factor

    strength = beta (1 - rho) / rho

Its input acts one step later, so it gets one step more, and the first output is left
out; with dt / tau_syn = 1 nothing of it lasts. Its surrogate derivative, "super", is
1 / (1 + |x|)^2 whatever alpha is. CubaLIF is SpikingJelly's CUBALIFNode:
c_decay = 1 - 1 / tau_synapse, v_decay = 1 - 1 / tau, and the current is not scaled.

Per case the file holds "spikes" and "membranes" [T, n], and the gradient "dx" of

    sum(spikes * spike_weights) + sum(membranes * membrane_weights)

for the inputs xs [T, n].
"""

from pathlib import Path

import numpy as np
import torch
from norse.torch.functional import lsnn
from spikingjelly.activation_based import neuron, surrogate

STEPS, NEURONS = 32, 6
DT, TAU, TAU_ADAPTATION, BETA = 1e-3, 5.0, 20.0, 0.1
C_DECAY, V_DECAY = 0.5, 0.75
RESETS = {"soft": None, "zero": 0.0}


def alif(xs):
    """Spikes and membranes of Norse's adaptive neuron, hard reset."""
    p = lsnn.LSNNParameters(
        tau_syn_inv=torch.tensor(1 / DT),
        tau_mem_inv=torch.tensor(1 / (TAU * DT)),
        tau_adapt_inv=torch.tensor(1 / (TAU_ADAPTATION * DT)),
        v_th=torch.tensor(0.5),
        beta=torch.tensor(BETA),
    )
    zeros = torch.zeros_like(xs[0])
    state = lsnn.LSNNFeedForwardState(v=zeros, i=zeros, b=zeros + p.v_th)
    both = []
    for x in torch.cat([xs, zeros[None]]):
        z, state = lsnn.lsnn_feed_forward_step(x, state, p, DT)
        both.append((z, state.v))
    return both[1:]


def cuba(xs, reset, detach_reset):
    """Spikes and membranes of SpikingJelly's current-based neuron."""
    node = neuron.CUBALIFNode(
        C_DECAY,
        V_DECAY,
        v_threshold=1.0,
        v_reset=RESETS[reset],
        surrogate_function=surrogate.ATan(2.0),
    )
    node.detach_reset = detach_reset  # its initialiser has no argument for it
    return [(node(x), node.v) for x in xs]


def main():
    rng = np.random.default_rng(0)
    xs = rng.normal(0.7, 1.0, (STEPS, NEURONS)).astype(np.float32)
    weights = rng.normal(size=(2, STEPS, NEURONS)).astype(np.float32)
    saved = {"xs": xs, "spike_weights": weights[0], "membrane_weights": weights[1]}
    cases = {"alif": alif}
    for reset in RESETS:
        for detach_reset in (False, True):
            cases[f"cuba-{reset}-detach={detach_reset}"] = (
                lambda xs, reset=reset, detach=detach_reset: cuba(xs, reset, detach)
            )
    for name, run in cases.items():
        inputs = torch.tensor(xs, requires_grad=True)
        spikes, membranes = map(torch.stack, zip(*run(inputs), strict=True))
        both = (torch.tensor(w) for w in weights)
        loss = sum(
            (y * w).sum() for y, w in zip((spikes, membranes), both, strict=True)
        )
        loss.backward()
        saved[f"{name}/spikes"] = spikes.detach().numpy().astype(np.uint8)
        saved[f"{name}/membranes"] = membranes.detach().numpy()
        saved[f"{name}/dx"] = inputs.grad.numpy()
        print(f"{name}: {spikes.mean():.3f} spikes per step")
    path = Path(__file__).with_name("cells.npz")
    np.savez_compressed(path, **saved)
    print(f"{path.name}: {len(saved)} arrays, {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
