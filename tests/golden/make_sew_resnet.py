"""Writes sew_resnet.npz: what SpikingJelly's SEW-ResNet-18 answers with seeded weights.

It runs twice: with SpikingJelly's LIF neurons, soft reset, and with snnTorch's Leaky in
their place. The weights are made anew from the seed by the tests (see seeded.py), so
the file holds names, shapes and answers alone. To make it again:

    pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu
    pip install loguru && pip install --no-deps spikingjelly==2.0.0 snntorch==1.0.0
    python tests/golden/make_sew_resnet.py

"LIBRARY/logits" is [T, B, 10], and "LIBRARY/rates" the mean spikes of each layer of
neurons. The seed is the first for which no membrane comes closer than 1e-5 to its
threshold: then rounding cannot change a spike.
"""

from pathlib import Path

import numpy as np
import snntorch
import snntorch.utils
import torch
from seeded import images, weights
from spikingjelly.activation_based import functional, neuron
from spikingjelly.activation_based.model.sew_resnet import sew_resnet18

NUM_CLASSES, BETA, TAU = 10, 0.5, 2.0


def spikingjelly_neuron(**_):
    """LIF with soft reset."""
    return neuron.LIFNode(tau=TAU, v_reset=None)


def snntorch_neuron(**_):
    """Leaky with the library's default reset."""
    return snntorch.Leaky(beta=BETA, init_hidden=True)


@torch.no_grad()
def answers(make, seed):
    """Names, shapes, logits [T, B, K], rates of the layers and the smallest margin."""
    net = sew_resnet18(spiking_neuron=make, num_classes=NUM_CLASSES, cnf="ADD").eval()
    kinds = (neuron.LIFNode, snntorch.Leaky)
    state = {
        name: tensor.numpy()
        for name, tensor in net.state_dict().items()
        if "num_batches" not in name and "sn" not in name.split(".")[-2]
    }
    names, shapes = list(state), [value.shape for value in state.values()]
    made = weights(names, shapes, seed)
    net.load_state_dict({k: torch.tensor(v) for k, v in made.items()}, strict=False)
    rates, margins = {}, []

    def watch(name):
        def hook(module, _, z):
            spiked = isinstance(module, neuron.LIFNode)  # v is after the reset there
            u = module.v + z if spiked else module.mem
            margins.append(float((u - 1).abs().min()))
            rates.setdefault(name, []).append(float(z.mean()))

        return hook

    for name, module in net.named_modules():
        if isinstance(module, kinds):
            module.register_forward_hook(watch(name))
    functional.reset_net(net)
    snntorch.utils.reset(net)
    logits = torch.stack([net(x) for x in torch.tensor(images(seed)).transpose(0, 1)])
    rates = np.array([np.mean(r) for r in rates.values()])
    return names, shapes, logits.numpy(), rates, min(margins)


def main():
    for seed in range(1000):
        found = {
            "spikingjelly": answers(spikingjelly_neuron, seed),
            "snntorch": answers(snntorch_neuron, seed),
        }
        margin = min(result[-1] for result in found.values())
        print(f"seed {seed}: margin {margin:.1e}")
        if margin > 1e-5:
            break
    saved = {"seed": seed, "tau": TAU, "beta": BETA}
    for library, (names, shapes, logits, rates, _) in found.items():
        saved["names"], saved["shapes"] = names, [" ".join(map(str, s)) for s in shapes]
        saved[f"{library}/logits"], saved[f"{library}/rates"] = logits, rates
        print(library, np.round(rates, 3))
    np.savez_compressed(Path(__file__).with_name("sew_resnet.npz"), **saved)


if __name__ == "__main__":
    main()
