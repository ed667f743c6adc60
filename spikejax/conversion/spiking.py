"""Turns trained networks into spiking ones: quantised activations become IF neurons.

    ann = calibrate(relu_network, images).model  # or train one with QuantReLU
    snn, swaps = convert(fold_norms(ann, images))

Weights stay as they are. Pooling stays too and acts on spikes, step by step: the mean
is exact; the maximum of spikes is their OR, which is the maximum of the rates only
where the strongest input covers the spikes of the others.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax.conversion.surgery import Spy, activations, check_model, check_run, places
from spikejax.nn.quant import QuantReLU, ScaledIF

Rule = Callable[[jax.Array, int], jax.Array]  # (ReLU activations, levels) -> threshold


class Swap(NamedTuple):
    """One activation that was replaced, and the threshold that it had or was given."""

    path: str
    levels: int
    v_threshold: float


class Converted(NamedTuple):
    """A new model, in evaluation mode, and what was swapped in it."""

    model: Any
    swaps: tuple[Swap, ...]


def _copy(who, model):
    check_model(who, model)
    model = nnx.clone(model)
    model.eval()
    return model


def convert(model: nnx.Module, num_thresholds: int = 1) -> Converted:
    """Spiking copy of a model: each QuantReLU becomes a ``ScaledIF``.

    v_threshold = s p,  V[0] = v_threshold / 2,  soft reset, spikes of v_threshold

    Norms stay, in inference form, and act at every step; ``fold_norms`` folds them into
    the weights before. Show the network the same image at every step; its answer is the
    mean of its logits. At T = p its levels are those of the quantised network.

    Args:
        model: of modules whose activations are QuantReLU attributes; stays as it is.
        num_thresholds: N thresholds do in T / N steps what one does in T.

    Returns:
        the spiking model, and one row for each activation.

    Reference: Li et al. 2024, arXiv:2411.17431; Bu et al. 2023, arXiv:2303.04347.
    """
    model = _copy("convert", model)
    swaps = []
    for place in activations("convert", model, relu=False):
        quant = place.value
        scale = _checked("convert", place.path, "scale", quant.scale[...])
        v_threshold = scale * quant.levels
        place.put(ScaledIF(v_threshold, num_thresholds))
        swaps.append(Swap(place.path, quant.levels, v_threshold))
    return Converted(model, tuple(swaps))


def _checked(who, path, what, value):
    value = float(value)
    if not 0 < value < float("inf"):
        raise ValueError(
            f"{who}: expected a positive {what} at {path!r}, got {value}. The model is "
            "untrained, diverged, or this layer is dead."
        )
    return value


def maximum(x: jax.Array, levels: int) -> jax.Array:
    """The largest activation. Diehl et al. 2015, doi:10.1109/IJCNN.2015.7280696."""
    return x.max()


def percentile(q: float = 99.9) -> Rule:
    """The q-th percentile of the activations. Rueckauer et al. 2017,
    doi:10.3389/fnins.2017.00682.
    """
    if not 1 < q <= 100:
        raise ValueError(
            f"percentile: expected 1 < q <= 100, in percent, as 99.9, got {q}."
        )
    return lambda x, levels: jnp.percentile(x, q)


def least_error(x: jax.Array, levels: int) -> jax.Array:
    """The threshold, in hundredths of the maximum, of least squared error at p levels.

    Our choice, in the spirit of Li et al. 2021, arXiv:2106.06984.
    """
    candidates = x.max() * jnp.arange(1, 101) / 100

    def error(v_threshold):
        step = v_threshold / levels
        return ((step * jnp.clip(jnp.round(x / step), 0, levels) - x) ** 2).mean()

    return candidates[jax.lax.map(error, candidates).argmin()]


class _Calibrated(nnx.Module):
    """Stands for an activation during calibration, and sets its scale."""

    def __init__(self, path, quant, rule, layerwise):
        self.path, self.quant, self.rule = path, quant, rule
        self.layerwise = layerwise

    def __call__(self, xs):
        ys = nnx.relu(xs)
        v_threshold = self.rule(ys, self.quant.levels)
        _checked("calibrate", self.path, "threshold", v_threshold)
        self.quant.scale = nnx.Param(jnp.float32(v_threshold / self.quant.levels))
        return self.quant(xs) if self.layerwise else ys


def calibrate(
    model: nnx.Module,
    xs: jax.Array,
    *,
    rule: Rule = maximum,
    layerwise: bool = False,
    neuron: Callable[[], QuantReLU] = QuantReLU,
) -> Converted:
    """Quantised copy of a ReLU network, its thresholds found on a batch, no training.

    ``convert`` it for the training-free baseline, or train on from it. Layers that are
    QuantReLU already stay, and get a new scale.

    Args:
        model: network with nnx.relu or QuantReLU for attributes; stays as it is.
        xs: input [B, T, ...] as the model takes it.
        rule: from the activations of a layer to its threshold: maximum,
            percentile(99.9), least_error.
        layerwise: each layer sees what the quantised layers before it give, instead of
            what the ReLU network does.
        neuron: makes the QuantReLU that takes the place of nnx.relu.

    Returns:
        the quantised model, and one row for each activation.
    """
    if 0 in xs.shape:
        raise ValueError(f"calibrate: expected at least one image, got {xs.shape}.")
    if not callable(rule) or rule is percentile:
        raise ValueError(
            "calibrate: expected a rule such as conversion.maximum or percentile(99.9),"
            f" got {rule!r}."
        )
    model = _copy("calibrate", model)
    swapped = activations("calibrate", model, relu=True)
    check_run("calibrate", model, xs)
    found = []
    for place in swapped:
        quant = place.value if isinstance(place.value, QuantReLU) else _made(neuron)
        quant.deterministic = True
        place.put(_Calibrated(place.path, quant, rule, layerwise))
        found.append((place, quant))
    model(xs)
    for place, quant in found:
        place.put(quant)
    swaps = [
        Swap(place.path, quant.levels, float(quant.scale[...]) * quant.levels)
        for place, quant in found
    ]
    return Converted(model, tuple(swaps))


def _made(neuron) -> QuantReLU:
    quant = "one made already" if isinstance(neuron, nnx.Module) else neuron()
    if not isinstance(quant, QuantReLU):
        raise ValueError(
            "calibrate: expected neuron() to make a QuantReLU, as with "
            f"partial(QuantReLU, 8), got {quant}."
        )
    return quant


class Folded(nnx.Module):
    """What is left of a norm that was folded into weights: y = x."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """The input."""
        return x


def fold_norms(model: nnx.Module, xs: jax.Array) -> nnx.Module:
    """Copy of a model, each BatchNorm folded into the layer whose output it takes.

    g = scale / sqrt(var + eps),  w' = w g,  b' = (b - mean) g + bias

    The answers are those of evaluation mode, up to rounding. Nothing but the norm may
    use the output of its convolution.

    Args:
        model: network in which an nnx.Conv or nnx.Linear stands before every
            nnx.BatchNorm; stays as it is.
        xs: input [B, T, ...], to see what follows what; only its shape counts.
    """
    pairs = _layers_before_norms(_copy("fold_norms", model), xs)
    model = _copy("fold_norms", model)
    by_path = {place.path: place for place in places(model)}
    for norm_path, layer_path in pairs.items():
        _fold(by_path[layer_path].value, by_path[norm_path].value)
        by_path[norm_path].put(Folded())
    return model


def _layers_before_norms(model, xs):
    """{path of a norm: path of the layer whose output it takes}."""
    calls: list[tuple] = []
    norms = []
    for place in list(places(model)):
        if isinstance(place.value, nnx.BatchNorm):
            norms.append(place.path)
        if isinstance(place.value, nnx.BatchNorm | nnx.Conv | nnx.Linear):
            place.put(Spy(place.value, place.path, calls.append))
    jax.eval_shape(model, xs)
    pairs = {}
    for path in norms:
        inputs = [x for p, x, _ in calls if p == path]
        before = [
            p for p, _, y in calls if p not in norms and any(y is i for i in inputs)
        ]
        if len(inputs) != 1 or len(before) != 1:
            raise ValueError(
                f"fold_norms: expected one convolution or linear layer right before "
                f"the norm {path!r}, found {', '.join(before) or 'none'} in "
                f"{len(inputs)} calls. Leave its norms: convert takes them too."
            )
        pairs[path] = before[0]
    return pairs


def _fold(layer, norm):
    gain = jax.lax.rsqrt(norm.var[...] + norm.epsilon)
    if norm.scale is not None:
        gain = gain * norm.scale[...]
    bias = -norm.mean[...] * gain
    if layer.bias is not None:
        bias = bias + layer.bias[...] * gain
    if norm.bias is not None:
        bias = bias + norm.bias[...]
    layer.kernel = nnx.Param(layer.kernel[...] * gain)
    layer.bias = nnx.data(nnx.Param(bias))
    layer.use_bias = True
