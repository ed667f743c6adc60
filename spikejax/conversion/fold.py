"""Batch norms folded into the weights of the layers before them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import JaxprEqn

from spikejax import neurons, trace
from spikejax._compat import iter_modules
from spikejax.functions import functional
from spikejax.layers import neuron_layers
from spikejax.memory import drop_membranes, evaluation_copy
from spikejax.nn.quant import QuantReLU
from spikejax.trace import Match, Value


class Folded(nnx.Module):
    """Identity in the place of a norm that was folded into weights."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return x."""
        return x


def fold_norms(model: nnx.Module, xs: jax.Array) -> nnx.Module:
    """Return a copy of a model with each BatchNorm folded into the layer before it.

    g = scale / sqrt(var + eps),  w' = w g,  b' = (b - mean) g + bias

    The answers are those of evaluation mode, up to rounding.

    Args:
        model: network in which every nnx.BatchNorm takes the output of an nnx.Conv or
            nnx.Linear, that nothing else uses; not modified.
        xs: input [B, T, ...], on which the two networks are compared.

    Raises:
        ValueError: a norm has no such layer before it, or the answers differ.
    """
    model = evaluation_copy("fold_norms", model)
    order = _Order()
    trace.trace(*functional(model), xs, order)
    folded = nnx.clone(model)
    modules = {"/".join(map(str, path)): (path, m) for path, m in iter_modules(folded)}
    left = []
    for name, (path, norm) in modules.items():
        if isinstance(norm, nnx.BatchNorm):
            # Functions in between do not show, so the result has to be tried.
            before = order.before.get(name, ())
            found = [modules[p][1] for p in before if p in modules]
            if len(found) == 1 and isinstance(found[0], nnx.Conv | nnx.Linear):
                _fold(found[0], norm)
                _put(folded, path, Folded())
            else:
                left.append(name)
    if left or not _agree(model, folded, xs):
        raise ValueError(
            "fold_norms: expected one convolution or linear layer right before each "
            "norm, and used by it alone, got "
            f"{'none before ' + ', '.join(left) if left else 'other answers'}. Leave "
            "the norms in place: convert takes them too."
        )
    return folded


class _Order:
    """Rule of the tracer without sites, which notes which parameters follow which.

    before: path of a layer -> paths of the layers whose outputs it takes.
    """

    def __init__(self) -> None:
        self.before: dict[str, set[str]] = {}

    def match(self, eqn: JaxprEqn, values: Sequence[Value]) -> Match | None:
        """Return no site."""

    def level(self, eqn: JaxprEqn, values: Sequence[Value]) -> int:
        """Note whose output meets the parameters of an equation; return 1."""
        data = {str(v.label) for v in values if v.level}
        for v in values:
            if not v.level and v.label is not None:
                self.before.setdefault(v.label, set()).update(data - {v.label})
        return 1


def _put(model: nnx.Module, path: tuple, value: nnx.Module) -> None:
    """Replace the module at a path."""
    *outer, last = path
    node: Any = model
    for key in outer:
        node = node[key] if hasattr(node, "__getitem__") else getattr(node, key)
    if hasattr(node, "__setitem__"):
        node[last] = value
    else:
        setattr(node, last, value)


def _fold(layer: nnx.Conv | nnx.Linear, norm: nnx.BatchNorm) -> None:
    gain = jax.lax.rsqrt(norm.var[...] + norm.epsilon)
    if norm.scale is not None:
        gain = gain * norm.scale[...]
    bias = -norm.mean[...] * gain
    if layer.bias is not None:
        bias = bias + layer.bias[...] * gain
    if norm.bias is not None:
        bias = bias + norm.bias[...]
    layer.kernel = nnx.Param(layer.kernel[...] * gain)  # outputs are the last axis
    layer.bias = nnx.data(nnx.Param(bias))  # where it was None, Flax expects no data
    layer.use_bias = True


def _agree(model: nnx.Module, folded: nnx.Module, xs: jax.Array) -> bool:
    """Return whether two networks of the same neurons agree up to rounding."""
    # GPUs and TPUs round products by default, to fewer digits than the tolerance has.
    with jax.default_matmul_precision("highest"):
        expected, got = (_smooth(m)(xs).astype(jnp.float32) for m in (model, folded))
    # Half of the digits: rounding grows with depth, a wrong fold is far above it.
    tolerance = float(jnp.finfo(xs.dtype).eps) ** 0.5
    difference = jnp.abs(got - expected).max()
    return bool(difference <= tolerance * jnp.abs(expected).max())


def _smooth(model: nnx.Module) -> nnx.Module:
    """Return a copy without thresholds, where rounding makes a spike more or less."""
    model = nnx.clone(model)
    for neuron in neuron_layers(model).values():
        neuron.cell, neuron.rest = _pass_current, neurons.rest
    for _, module in iter_modules(model):
        if isinstance(module, QuantReLU):
            module.rounding = None
    return drop_membranes(model)


def _pass_current(
    params: object, v: jax.Array, x: jax.Array, options: neurons.NeuronOptions
) -> tuple[jax.Array, tuple]:
    return x, ()
