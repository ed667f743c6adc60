"""Neurons and weights of SpikingJelly and snnTorch, in layers of spikejax.

neuron = partial(spikingjelly_neuron, tau=2.0, v_reset=None)
model = resnet18(1000, neuron=neuron, residual=sew, rngs=nnx.Rngs(0))
load_resnet(model, torch.load("sew18.pth"))
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from spikejax import neurons, surrogate
from spikejax.layers import IF, LIF, Neuron
from spikejax.models.resnet import ResNet, ms
from spikejax.neurons import NeuronOptions, NeuronParams, late_reset
from spikejax.surrogate import Spike

SIGMOID = surrogate.sigmoid(4.0)


def spikingjelly_neuron(
    *,
    tau: float | None = 2.0,
    decay_input: bool = True,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    detach_reset: bool = False,
    surrogate: Spike = SIGMOID,
) -> LIF:
    """The layer that does what SpikingJelly's LIFNode does, with its defaults.

    Args:
        tau: membrane time constant in steps; None for IFNode.
        decay_input, v_threshold, v_reset, detach_reset: as there. v_reset=None is soft
            reset.
        surrogate: of the gradient; as there, Sigmoid with alpha 4 by default.
    """
    options: dict[str, Any] = {"v_reset": v_reset, "detach_reset": detach_reset}
    options |= {"surrogate": surrogate}
    if tau is None:
        return IF(v_threshold, **options)
    return LIF(tau, v_threshold, decay_input=decay_input, **options)


def snntorch_neuron(
    beta: Any,
    threshold: Any = 1.0,
    *,
    reset_mechanism: str = "subtract",
    reset_delay: bool = True,
) -> Neuron:
    """The layer that does what snnTorch's Leaky does, with its defaults.

    u = beta v + x,  z = H(u - threshold),  leak = 1 - beta,  tau = 1 / (1 - beta)

    "zero" is our hard reset to 0. "subtract" is our soft reset where reset_delay=False,
    as long as membranes stay below two thresholds; by default it comes a step later,
    after the leak: ``neurons.late_reset``.

    Args:
        beta: part of the membrane that is kept, 0 < beta <= 1 (0 too, but for the late
            reset); a number, or an array that broadcasts with the layer.
        threshold: likewise.
        reset_mechanism: "subtract" or "zero".
        reset_delay: as in snnTorch.
    """
    beta, threshold = np.asarray(beta, np.float64), np.asarray(threshold, np.float64)
    if not ((beta >= 0) & (beta <= 1)).all():
        raise ValueError(f"snntorch_neuron: expected 0 <= beta <= 1, got {beta}.")
    if reset_mechanism not in ("subtract", "zero"):
        raise ValueError(
            "snntorch_neuron: expected reset_mechanism 'subtract' or 'zero', got "
            f"{reset_mechanism!r}. For a readout that never resets, take layers.LI."
        )
    late = reset_mechanism == "subtract" and reset_delay
    if late and not beta.all():
        raise ValueError(
            "snntorch_neuron: expected beta > 0 with a reset that comes one step "
            "later, got 0. Give reset_delay=False."
        )
    v_reset = None if reset_mechanism == "subtract" else 0.0
    if beta.size == 1 and threshold.size == 1 and not late:
        leak = 1 - beta.item()
        tau = 1 / leak if leak else math.inf
        return LIF(tau, threshold.item(), v_reset=v_reset, decay_input=False)
    cell = late_reset if late else neurons.lif
    leak, threshold = (n.item() if n.size == 1 else n for n in (1 - beta, threshold))
    params = NeuronParams(leak, (threshold,))
    return Neuron(cell, params, NeuronOptions(v_reset, decay_input=False))


def load_resnet(model: ResNet, state: Mapping[str, Any]) -> ResNet:
    """Fills a residual network with weights by the names of torchvision.

    SpikingJelly's sew_resnet18 to 152 and spiking_resnet18 to 152 have them. Kernels
    [out, in, H, W] become [H, W, in, out]. Where the state has w of ParametricLIFNode,
    or beta and threshold of snnTorch's Leaky, the neurons get these too; all else of
    neurons is in the factory ``neuron`` that the model was made with.

    Args:
        model: from ``spikejax.models.resnet``, plain or sew, with imagenet_stem and as
            many classes; it is changed and returned, in evaluation mode.
        state: the state dict: tensors or arrays by name, all of them for this model.
    """
    if model.residual is ms or not model.imagenet_stem or model.has_hidden:
        raise ValueError(
            "load_resnet: expected a residual network, plain or sew, with "
            "imagenet_stem and no hidden layer, got another. Take models.resnet18."
        )
    left = {
        name: np.asarray(value)
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }
    _fill(left, "conv1", "bn1", model.stem_conv, model.stem_norm)
    model.stage_neuron = _neuron(left, "sn1", model.stage_neuron)
    for block, name in zip(model.blocks, _block_names(left, model), strict=True):
        units = zip(block.convs, block.norms, strict=True)
        for k, (conv, norm) in enumerate(units, 1):
            _fill(left, f"{name}.conv{k}", f"{name}.bn{k}", conv, norm)
            neuron = block.neurons[k - 1]
            block.neurons[k - 1] = _neuron(left, f"{name}.sn{k}", neuron)
        if block.projects:
            down = f"{name}.downsample"
            convolution = block.shortcut_conv
            _fill(left, f"{down}.0", f"{down}.1", convolution, block.shortcut_norm)
        if hasattr(block, "shortcut_neuron"):
            neuron = block.shortcut_neuron
            block.shortcut_neuron = _neuron(left, f"{name}.downsample_sn", neuron)
    kernel = _take(left, "fc.weight", model.head.kernel.shape[::-1])
    model.head.kernel = nnx.Param(kernel.T)
    bias = _take(left, "fc.bias", kernel.shape[:1])
    model.head.bias = nnx.Param(bias)
    if left:
        raise ValueError(
            f"load_resnet: expected the weights of this model, got {len(left)} more: "
            f"{', '.join(sorted(left)[:4])}. Make the model as deep as theirs."
        )
    model.eval()
    return model


def _block_names(state, model):
    """layer1.0, layer1.1, layer2.0, ...: as many as the model has blocks."""
    found = {tuple(n.split(".")[:2]) for n in state if n.startswith("layer")}
    names = [".".join(pair) for pair in sorted(found, key=lambda p: (p[0], int(p[1])))]
    if len(names) != len(model.blocks):
        raise ValueError(
            f"load_resnet: expected {len(model.blocks)} blocks, got {len(names)}. Make "
            "the model as deep as theirs."
        )
    return names


def _take(state, name, shape):
    if name not in state:
        raise ValueError(
            f"load_resnet: expected {name!r} in the state dict, got none of that name. "
            "Give model.state_dict() of torchvision's or SpikingJelly's network."
        )
    value = state.pop(name)
    if value.shape != tuple(shape):
        raise ValueError(
            f"load_resnet: expected shape {tuple(shape)} for {name!r}, got "
            f"{value.shape}. Make the model as wide as theirs, with as many classes."
        )
    return jnp.asarray(value, jnp.float32)


def _fill(state, conv_name, norm_name, conv, norm):
    """A convolution and the norm after it."""
    height, width, inputs, outputs = conv.kernel.shape
    kernel = _take(state, f"{conv_name}.weight", (outputs, inputs, height, width))
    conv.kernel = nnx.Param(kernel.transpose(2, 3, 1, 0))
    kinds: list[tuple[str, str, Callable]] = [
        ("scale", "weight", nnx.Param),
        ("bias", "bias", nnx.Param),
        ("mean", "running_mean", nnx.BatchStat),
        ("var", "running_var", nnx.BatchStat),
    ]
    for ours, theirs, kind in kinds:
        setattr(norm, ours, kind(_take(state, f"{norm_name}.{theirs}", (outputs,))))


def _neuron(state, name, neuron):
    """The neuron, with what the state says of it."""
    given = {key: state.pop(key) for key in list(state) if key.startswith(f"{name}.")}
    given = {key.removeprefix(f"{name}."): value for key, value in given.items()}
    if "w" in given:
        if neuron.leak_logit is None:
            raise ValueError(
                f"load_resnet: expected neurons that learn tau at {name!r}, got "
                f"{type(neuron).__name__}. Give neuron=PLIF."
            )
        neuron.leak_logit = nnx.Param(jnp.asarray(given["w"], jnp.float32))
    if "beta" in given:
        return snntorch_neuron(
            given["beta"],
            given.get("threshold", 1.0),
            reset_mechanism="subtract" if neuron.options.v_reset is None else "zero",
            reset_delay=neuron.cell is late_reset,
        )
    return neuron
