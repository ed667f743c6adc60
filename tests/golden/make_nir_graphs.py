"""Writes nir_LIBRARY.nir and nir_graphs.npz: graphs that other libraries export to NIR.

The tests read the graphs and expect the spikes of the library; they need none of the
libraries. To make the files again:

    pip install nir==1.0.8 nirtorch==2.6 loguru pbr matplotlib
    pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu
    pip install --no-deps spikingjelly==2.0.0 snntorch==1.0.0 norse==1.1.0 sinabs==3.1.3
    python tests/golden/make_nir_graphs.py

For every graph the npz holds "NAME/xs" [T, B, ...] and "NAME/ys", the outputs of its
last layer, images channels-first. What each export needs to come out right:

spikingjelly: hard reset; soft reset is refused.
snntorch: beta and threshold as arrays of the layer's shape, and ignore_dims=[0];
    without them the export of 1.0.0 raises with nir 1.0.8 ("type mismatch").
norse: dt=1.0, which writes tau in seconds; by default tau is 1000 times too small.
sinabs: norm_input=True (ExpLeak's default is False), and one spike a step
    (spike_fn=SingleSpike); a graph says neither. Times and thresholds as arrays, and
    infer_types(): without them nir.write raises (TypeError of h5py).
"""

from pathlib import Path

import nir
import numpy as np
import torch
from torch import nn

HERE = Path(__file__).parent
STEPS, BATCH = 12, 2


def spikingjelly():
    """Convolutions, mean pooling and LIF that scale their input or not, and IF."""
    from spikingjelly.activation_based import layer, neuron
    from spikingjelly.activation_based.nir_exchange import export_to_nir

    net = nn.Sequential(
        layer.Conv2d(2, 3, 3, padding=1),
        neuron.LIFNode(tau=2.5, v_threshold=0.3, v_reset=-0.1),
        layer.AvgPool2d(2),
        layer.Conv2d(3, 4, 3, stride=2, padding=1, bias=False),
        neuron.LIFNode(tau=3.0, decay_input=False, v_threshold=0.3, v_reset=0.0),
        layer.Flatten(),
        layer.Linear(16, 5),
        neuron.IFNode(v_threshold=0.2, v_reset=0.0),
    )
    return net, (2, 8, 8), lambda x: export_to_nir(net, x)


def spikingjelly_cuba():
    """Current-based LIF, whose membrane rests at 0 and is reset below it."""
    from spikingjelly.activation_based import layer, neuron
    from spikingjelly.activation_based.nir_exchange import export_to_nir

    net = nn.Sequential(
        layer.Linear(6, 8),
        neuron.CUBALIFNode(0.5, 0.75, v_threshold=0.8, v_reset=-0.5),
    )
    return net, (6,), lambda x: export_to_nir(net, x)


def snntorch():
    """A convolution and Leaky neurons, with the library's default, late soft reset."""
    import snntorch as snn
    from snntorch.export_nir import export_to_nir

    def leaky(shape, beta):
        beta = torch.full(shape, beta)
        return snn.Leaky(beta, torch.full(shape, 0.2), init_hidden=True)

    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        leaky((3, 6, 6), 0.7),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(27, 5),
        leaky((5,), 0.9),
    )
    return net, (2, 6, 6), lambda x: export_to_nir(net, x, ignore_dims=[0])


def snntorch_recurrent():
    """Recurrent Leaky neurons; their betas differ."""
    import snntorch as snn
    from snntorch.export_nir import export_to_nir

    betas = torch.linspace(0.5, 0.9, 5)
    net = nn.Sequential(
        nn.Linear(6, 8),
        snn.RLeaky(0.8, linear_features=8, threshold=0.5, init_hidden=True),
        nn.Linear(8, 5),
        snn.Leaky(betas, torch.full((5,), 0.2), init_hidden=True),
    )
    return net, (6,), lambda x: export_to_nir(net, x, ignore_dims=[0])


def snntorch_synaptic():
    """Recurrent and plain Synaptic neurons; numbers of the latter differ."""
    import snntorch as snn
    from snntorch.export_nir import export_to_nir

    alphas, betas = torch.linspace(0.2, 0.6, 5), torch.linspace(0.5, 0.9, 5)
    net = nn.Sequential(
        nn.Linear(6, 8),
        snn.RSynaptic(0.6, 0.8, linear_features=8, init_hidden=True),
        nn.Linear(8, 5),
        snn.Synaptic(alphas, betas, torch.full((5,), 0.4), init_hidden=True),
    )
    return net, (6,), lambda x: export_to_nir(net, x, ignore_dims=[0])


def norse():
    """LIF, IF and a leaky integrator, of one shape for the whole layer."""
    import norse.torch as library
    from norse.torch.module.iaf import IAFCell, IAFParameters
    from norse.torch.utils.export_nir import to_nir

    p = library.LIFBoxParameters(
        tau_mem_inv=torch.tensor(250.0), v_th=torch.tensor(0.1)
    )
    net = library.SequentialState(
        nn.Linear(6, 8),
        library.LIFBoxCell(p),
        nn.Linear(8, 7),
        IAFCell(IAFParameters(v_th=torch.tensor(0.6))),
        nn.Linear(7, 5),
        library.LIBoxCell(),
    )
    return net, (6,), lambda x: to_nir(net, x, dt=1.0)


def norse_cuba():
    """LIF with a synaptic current."""
    import norse.torch as library
    from norse.torch.utils.export_nir import to_nir

    p = library.LIFParameters(
        tau_syn_inv=torch.full((8,), 300.0),
        tau_mem_inv=torch.full((8,), 250.0),
        v_leak=torch.zeros(8),
        v_th=torch.full((8,), 0.3),
        v_reset=torch.zeros(8),
    )
    net = library.SequentialState(nn.Linear(6, 8), library.LIFCell(p))
    return net, (6,), lambda x: to_nir(net, x, dt=1.0)


def sinabs():
    """A convolution, sum pooling, IAF, LIF and a leaky integrator."""
    import sinabs.layers as sl
    from sinabs.activation import SingleSpike
    from sinabs.nir import to_nir

    def export(x):
        graph = to_nir(net, x)
        graph.infer_types()
        return graph

    def vector(value):
        return torch.full((5,), value)

    one = {"batch_size": BATCH, "spike_fn": SingleSpike}
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        sl.IAFSqueeze(spike_threshold=torch.tensor(0.8), **one),
        sl.SumPool2d(2),
        nn.Flatten(),
        nn.Linear(27, 5),
        sl.LIFSqueeze(tau_mem=vector(4.0), spike_threshold=vector(0.3), **one),
        nn.Linear(5, 5),
        sl.ExpLeakSqueeze(tau_mem=vector(6.0), norm_input=True, batch_size=BATCH),
    )
    return net, (2, 6, 6), export


GRAPHS = (spikingjelly, spikingjelly_cuba, norse, norse_cuba, sinabs)
GRAPHS += (snntorch, snntorch_recurrent, snntorch_synaptic)


def outputs(name, net, xs):
    """What the network gives for xs [T, B, ...], step by step from rest."""
    if name == "sinabs":  # takes all steps at once, batch first
        flat = xs.transpose(0, 1).reshape(-1, *xs.shape[2:])
        return net(flat).reshape(BATCH, STEPS, -1).transpose(0, 1)
    if name.startswith("spikingjelly"):
        from spikingjelly.activation_based import functional

        functional.reset_net(net)
    if name.startswith("snntorch"):
        from snntorch import utils

        utils.reset(net)
    ys, state = [], None
    for x in xs:
        if name.startswith("norse"):
            y, state = net(x, state)
        else:
            y = net(x)
        ys.append(y)
    return torch.stack(ys)


@torch.no_grad()
def main():
    saved = {}
    for make in GRAPHS:
        name = make.__name__
        torch.manual_seed(0)
        net, shape, export = make()
        xs = 2 * (torch.rand(STEPS, BATCH, *shape) < 0.5).float()
        ys = outputs(name, net, xs)
        example = xs[:, 0] if name == "sinabs" else xs[0, :1]
        if name == "sinabs":  # counts its batches
            example = xs[:BATCH].reshape(-1, *shape)
        nir.write(HERE / f"nir_{name}.nir", export(example), compression=None)
        saved[f"{name}/xs"] = xs.numpy().astype(np.uint8)
        saved[f"{name}/ys"] = ys.numpy().astype(np.float32)
        print(f"{name}: mean output {ys.mean():.3f}")
    np.savez_compressed(HERE / "nir_graphs.npz", **saved)


if __name__ == "__main__":
    main()
