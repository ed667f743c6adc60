"""SpikingJelly: time in a loop around the network, or inside of each layer; compiled.

Step by step, each time step has batch statistics of its own; multi-step, as elsewhere,
they are of all steps. Its own benchmark has hard reset, an input that decays, the
sigmoid surrogate, biases and Adam. The ResNet is its SEW-ResNet-18 with a stem for
small images, made here of its layers, since its own file of it needs torchvision.
"""

import importlib.metadata
import os
import shutil
from collections.abc import Callable

import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

from benchmarks.sides import pytorch
from benchmarks.trainer import Recipe
from benchmarks.workloads import CLASSES, Prepared, Sizes, filters

VERSIONS = {"spikingjelly": importlib.metadata.version("spikingjelly")}
LIF = {
    "tau": 2.0,
    "decay_input": False,
    "v_reset": None,
    "detach_reset": True,
    "surrogate_function": surrogate.ATan(2.0),
}
OF_THEIRS = {"tau": 2.0, "surrogate_function": surrogate.Sigmoid(4.0)}


def prepare(sizes: Sizes, mode: str) -> Prepared:
    """Modes: step by step, multi-step, compiled (multi-step)."""
    network = NETWORKS[sizes.network](sizes)
    outputs = _outputs(network, mode)
    if sizes.network == "linear":
        return pytorch.summed(sizes, network, outputs, VERSIONS)
    adam = (lambda p: torch.optim.Adam(p, lr=1e-3)) if _is_theirs(sizes) else None
    return pytorch.classifier(
        sizes, network, lambda xs: outputs(xs).mean(0), VERSIONS, adam
    )


def train(sizes: Sizes, mode: str, recipe: Recipe) -> tuple[Callable, Callable]:
    """(images, labels) -> loss, a step of the recipe, and images -> logits [B, K]."""
    network = NETWORKS[sizes.network](sizes)
    outputs = _outputs(network, mode)
    evaluated = _outputs(network, "multi-step" if mode == "compiled" else mode)
    pytorch.place(network)
    parameters = list(network.parameters())
    kernels = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": kernels, "weight_decay": recipe.weight_decay}, {"params": others}],
        lr=1.0,
        momentum=recipe.momentum,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate)

    def over_time(images):
        xs = torch.from_numpy(images).to(pytorch.DEVICE).permute(0, 3, 1, 2)
        return xs.repeat(sizes.time_steps, 1, 1, 1, 1)

    def update(images, labels):
        network.train()
        logits = outputs(over_time(images)).mean(0)
        loss = nn.functional.cross_entropy(
            logits, torch.from_numpy(labels).to(pytorch.DEVICE)
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.detach()

    @torch.inference_mode()
    def answer(images):
        network.eval()
        return evaluated(over_time(images)).mean(0).cpu().numpy()

    def step(images, labels):
        return pytorch.synchronised(lambda: update(images, labels))()

    return step, answer


def _outputs(network, mode):
    """Spikes over time, from rest; it sets the network's step mode."""
    functional.set_step_mode(network, "s" if mode == "step by step" else "m")
    compiled = network
    if mode == "compiled":
        _need_compiler()
        compiled = torch.compile(network)

    def outputs(xs):
        functional.reset_net(network)
        if mode == "step by step":
            return torch.stack([compiled(x) for x in xs])
        return compiled(xs)

    return outputs


def _is_theirs(sizes):
    return sizes.network == "pooled"


def _need_compiler():
    names = [os.environ.get("CXX", "g++"), "c++", "clang++"]
    if pytorch.DEVICE.type == "cpu" and not any(map(shutil.which, names)):
        raise RuntimeError("torch.compile needs a C++ compiler (g++), found none.")


def _convolutions(sizes):
    return pytorch.convolutions(sizes, layer, lambda: neuron.LIFNode(**LIF))


def _linear(sizes):
    (n,) = sizes.channels
    return nn.Sequential(layer.Linear(n, n), neuron.LIFNode(**LIF))


def _pooled(sizes):
    first, second, hidden = sizes.channels
    modules, inputs = [], 3
    for outputs in (first, second):
        modules += [
            layer.Conv2d(inputs, outputs, 3, padding=1),
            layer.BatchNorm2d(outputs),
            neuron.LIFNode(**OF_THEIRS),
            layer.MaxPool2d(2),
        ]
        inputs = outputs
    return nn.Sequential(
        *modules,
        layer.Flatten(),
        layer.Linear(second * (sizes.side // 4) ** 2, hidden),
        neuron.LIFNode(**OF_THEIRS),
        layer.Linear(hidden, CLASSES),
    )


class Block(nn.Module):
    """Two convolutions with neurons, and the shortcut's spikes added to theirs."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.body = nn.Sequential(
            *_unit(inputs, outputs, 3, stride), *_unit(outputs, outputs, 3, 1)
        )
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(*_unit(inputs, outputs, 1, stride))

    def forward(self, xs):
        return self.body(xs) + self.shortcut(xs)


def _unit(inputs, outputs, size, stride):
    return [
        layer.Conv2d(inputs, outputs, size, stride, size // 2, bias=False),
        layer.BatchNorm2d(outputs),
        neuron.LIFNode(**LIF),
    ]


def _resnet18(sizes):
    inputs = sizes.channels[0]
    modules = _unit(3, inputs, 3, 1)
    for stage, outputs in enumerate(sizes.channels):
        modules += [
            Block(inputs, outputs, 2 if stage else 1),
            Block(outputs, outputs, 1),
        ]
        inputs = outputs
    return nn.Sequential(
        *modules,
        layer.AdaptiveAvgPool2d(1),
        layer.Flatten(),
        layer.Linear(inputs, CLASSES),
    )


class Filters(nn.Module):
    """The fixed filters before the first layer, with both signs, at each time step."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", torch.from_numpy(filters()))

    def forward(self, xs):
        ys = nn.functional.conv2d(xs.flatten(0, -4), self.kernel)
        return torch.cat([ys, -ys], 1).unflatten(0, xs.shape[:-3])


class Ninth(nn.Module):
    """A ninth of the logits."""

    def forward(self, xs):
        return xs / 9


def _whitened(sizes):
    inputs = 24
    modules = [Filters(), layer.BatchNorm2d(inputs), neuron.LIFNode(**LIF)]
    for outputs in sizes.channels:
        for before, pool in ((inputs, [layer.MaxPool2d(2)]), (outputs, [])):
            modules += [
                layer.Conv2d(before, outputs, 3, padding=1, bias=False),
                *pool,
                layer.BatchNorm2d(outputs),
                neuron.LIFNode(**LIF),
            ]
        inputs = outputs
    left = (sizes.side - 1) // 2 ** len(sizes.channels)
    modules += [layer.MaxPool2d(left), layer.Flatten()]
    return nn.Sequential(*modules, layer.Linear(inputs, CLASSES, bias=False), Ninth())


NETWORKS = {
    "convolutions": _convolutions,
    "linear": _linear,
    "pooled": _pooled,
    "resnet18": _resnet18,
    "whitened": _whitened,
}
