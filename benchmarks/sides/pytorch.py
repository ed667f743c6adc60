"""PyTorch: what the sides of its libraries share, and the network without neurons.

The ReLU network sees the time steps folded into the batch.
"""

import os
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.workloads import CLASSES, STRIDES, Prepared, Sizes, batch, weights

# As ``turns.environment`` says, and not what there is: without a GPU it fails.
DEVICE = torch.device("cuda" if os.environ.get("CUDA_VISIBLE_DEVICES") else "cpu")


def prepare(sizes: Sizes, mode: str) -> Prepared:
    """The network with ReLU, the only mode."""
    network = convolutions(sizes, nn, nn.ReLU)

    def logits(xs):
        return network(xs.flatten(0, 1)).unflatten(0, xs.shape[:2]).mean(0)

    return classifier(sizes, network, logits, {"torch": torch.__version__})


def convolutions(sizes: Sizes, layers, neuron: Callable) -> nn.Module:
    """Three convolutions, two of them with stride 2; ``layers`` are nn's or others."""
    modules, inputs = [], 3
    for outputs, stride in zip(sizes.channels, STRIDES, strict=True):
        modules += [
            layers.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            layers.BatchNorm2d(outputs),
            neuron(),
        ]
        inputs = outputs
    modules += [layers.AdaptiveAvgPool2d(1), layers.Flatten()]
    return nn.Sequential(*modules, layers.Linear(inputs, CLASSES))


def time_major(sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """The input [T, B, n] or [T, B, C, H, W], and its labels, on the device."""
    xs, labels = map(torch.from_numpy, batch(sizes))
    if sizes.network == "linear":
        xs = xs.transpose(0, 1)
    elif sizes.network == "pooled":
        xs = xs.permute(1, 0, 4, 2, 3)
    else:
        xs = xs.permute(0, 3, 1, 2).repeat(sizes.time_steps, 1, 1, 1, 1)
    return xs.contiguous().to(DEVICE), labels.to(DEVICE)


def classifier(
    sizes: Sizes,
    network: nn.Module,
    logits: Callable,
    versions: dict[str, str],
    optimizer: Callable | None = None,
) -> Prepared:
    """Steps of training, or of evaluation.

    Args:
        logits: input [T, B, ...] to the time mean of the logits [B, K]; it runs
            ``network`` or something compiled from it, and resets it.
        optimizer: of the parameters; SGD with momentum by default.
    """
    place(network)
    network.train(sizes.trains)
    xs, labels = time_major(sizes)
    make = optimizer or (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    optimizer_ = make(network.parameters())

    def loss():
        return nn.functional.cross_entropy(logits(xs), labels)

    def train():
        optimizer_.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        optimizer_.step()
        return value.detach()

    @torch.inference_mode()
    def answer():
        return loss()

    step = synchronised(train if sizes.trains else answer)
    return prepared(step, network, xs, versions)


def summed(
    sizes: Sizes, network: nn.Module, outputs: Callable, versions: dict[str, str]
) -> Prepared:
    """The gradient of the sum of all spikes to the weights."""
    place(network)
    xs, _ = time_major(sizes)

    def step():
        network.zero_grad(set_to_none=True)
        value = outputs(xs).sum()
        value.backward()
        return value.detach()

    return prepared(synchronised(step), network, xs, versions)


def synchronised(step: Callable) -> Callable[[], float]:
    """A step that ends when the device has ended."""

    def ended():
        value = step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return float(value)

    return ended


@torch.no_grad()
def place(network: nn.Module) -> None:
    """The weights of every library, onto the device."""
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for index, layer in enumerate(layers):
        layer.weight.copy_(torch.from_numpy(weights(index, tuple(layer.weight.shape))))
        if layer.bias is not None:
            layer.bias.zero_()
    network.to(DEVICE)


def prepared(step, network, xs, versions) -> Prepared:
    """Return the figures that the worker asks for."""

    def peak():
        most = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return most

    tensors = [*network.parameters(), *network.buffers(), xs]
    cuda = DEVICE.type == "cuda"
    return Prepared(
        step,
        sum(p.numel() for p in network.parameters()),
        sum(t.numel() * t.element_size() for t in tensors),
        {"torch": torch.__version__} | versions,
        torch.cuda.get_device_name() if cuda else "cpu",
        device_peak=peak if cuda else None,
    )
