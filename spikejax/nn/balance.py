"""Scales of initial weights by which every layer of neurons fires at a wanted rate.

    model = balance(model, xs).model  # then train it

In a deep network without norms each layer is driven by the spikes of the one before, so
rates fade within a few layers, or saturate, and silent layers do not learn.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx

from spikejax import trace
from spikejax._compat import iter_modules
from spikejax.functions import functional
from spikejax.layers import Neuron
from spikejax.memory import check_module, drop_membranes
from spikejax.nn.driven import MAXIMA, MEANS, SHAPES
from spikejax.nn.operations import PRODUCTS, Layers, trace_operations
from spikejax.nn.recurrent import Recurrent
from spikejax.trace import Site

# Parameters in which a layer with weights, or a norm, is linear.
LINEAR = ("kernel", "bias", "scale")
SUMS = ("add", "add_any", "sub", "neg", "pad", "cumsum", "select_n", "max", *MEANS)
MOST = 0.9  # of the highest rate of a layer
OCTAVES = 10  # of a scale, up and down
HALVINGS = 14  # of these octaves, to a thousandth of an octave


class BalancedLayer(NamedTuple):
    """Call of a layer of neurons.

    path: of the neurons.
    before, rate: spikes per neuron and time step with the weights as they were, and as
        they are; both behind earlier layers that are balanced.
    weights: paths of what was scaled; none where nothing could be.
    scale: factor of their parameters.
    """

    path: str
    before: float
    rate: float
    weights: tuple[str, ...]
    scale: float


class Balanced(NamedTuple):
    """New model, and its layers of neurons in the order of computation."""

    model: Any
    layers: tuple[BalancedLayer, ...]


def balance(model: nnx.Module, xs: jax.Array, rate: float = 0.1) -> Balanced:
    """Return a copy of a model whose neurons fire at a rate, by scaled weights.

    g_k: mean of neurons_k(g_k x_k) = rate,  x_k the currents behind balanced layers

    One pass through the model, layer after layer. g_k multiplies what the currents were
    last multiplied by, kernel and bias: the norm before the neurons, or the convolution
    or linear layer. So the currents scale as a whole, with norms and without, and
    neurons that share thresholds keep them. Where residual connections add currents of
    earlier layers or spikes, and where there are no weights, as in the products of
    attention, nothing is scaled. Recurrent weights are not modified.

    Args:
        model: before training, in the mode in which it will be trained. Not modified.
        xs: a batch of its input [B, T, ...]; its values count.
        rate: spikes per neuron and time step, above 0, for N thresholds up to N.

    Returns:
        the model, and one row per call of neurons. A rate that no scale reaches, such
        as one near 1 where half of the currents are negative, is in its row.

    Raises:
        ValueError: the rate is not positive; the model has no neurons that are called
            on sequences, or has them in a loop of its own.

    Reference: Mishkin and Matas 2016, arXiv:1511.06422 (LSUV), which scales layer after
    layer to outputs of variance 1. Rates in place of variances are our choice.
    """
    check_module("balance", model)
    if not rate > 0:
        raise ValueError(f"balance: expected a rate above 0, got {rate}.")
    model = drop_membranes(nnx.clone(model))
    traced, state, layers = trace_operations(model, xs, PRODUCTS)
    if not any(site.kind == "neurons" for site in traced.sites):
        raise ValueError(
            "balance: expected a model with spiking neurons that are called on "
            f"sequences, got a {type(model).__name__} without any."
        )
    modules = {"/".join(map(str, path)): m for path, m in iter_modules(model)}
    balancer = _Balancer(layers, modules, rate)
    trace.run(traced, state, _Currents(xs), balancer.operation)
    for path, scale in balancer.scales.items():
        for name in _linear(modules[path]):
            variable = getattr(modules[path], name)
            variable[...] = variable[...] * scale
    rates = partial(_rates, layers)
    _, after = trace.run(traced, functional(model)[1], xs, rates)
    rows = [row._replace(rate=float(after[n])) for n, row in balancer.rows.items()]
    return Balanced(model, tuple(rows))


def _rates(
    layers: Layers, number: int, site: Site, values: list, given: None
) -> tuple[Any, float | None]:
    """Compute an operation, and keep the rate of neurons."""
    if site.kind != "neurons":
        ys = trace.bind(site.eqn, values)
        return ys if len(ys) > 1 else ys[0], None
    layer = layers[site.eqn.params["path"]]
    return layer(values[0]), _rate(layer, values[0])


def _rate(layer: Neuron | Recurrent, xs: jax.Array) -> float | None:
    """Return the spikes per neuron and time step, None of an integrator."""
    trains = layer(xs, trains=True)
    return None if trains.shape == xs.shape else float(trains.sum(-1).mean())


def _linear(module: nnx.Module | None) -> list[str]:
    """Return the names of the parameters that scale the output of a module."""
    found = vars(module) if module is not None else {}
    return [name for name in LINEAR if isinstance(found.get(name), nnx.Param)]


@dataclass(frozen=True)  # a NamedTuple would be a pytree, and currents are a leaf
class _Currents:
    """Values that depend on the input, and the layers whose output they are a sum of.

    layers: paths, none for the input, for spikes, and behind anything not linear.
    whole: whether there is no summand but the outputs of these layers.
    number: of the operation that made them so.
    scale: of the layers, which is in the value already.
    """

    value: Any
    layers: frozenset[str] = frozenset()
    whole: bool = False
    number: int = -1
    scale: float = 1.0


class _Balancer:
    """Handler of the operations of a network, which scales the currents of neurons."""

    def __init__(self, layers: Layers, modules: dict[str, nnx.Module], rate: float):
        self.layers, self.modules, self.rate = layers, modules, rate
        self.rows: dict[int, BalancedLayer] = {}
        self.scales: dict[str, float] = {}  # of the layers that charge neurons

    def operation(
        self, number: int, site: Site, inputs: list, given: None
    ) -> tuple[Any, None]:
        """Return the output of an equation: a handler of ``spikejax.trace``."""
        inputs = [self.scaled(v) if isinstance(v, _Currents) else v for v in inputs]
        if site.kind == "neurons":
            return self.neurons(number, site.eqn.params["path"], inputs[0]), None
        currents = [v for v in inputs if isinstance(v, _Currents)]
        outs = trace.bind(site.eqn, [getattr(v, "value", v) for v in inputs])
        source = self.source(number, site, currents)
        made = [replace(source, value=y) for y in outs]
        return made if len(made) > 1 else made[0], None

    def scaled(self, currents: _Currents) -> _Currents:
        """Return currents with the scale of their layers, found since they were made.

        A residual connection uses those that charge neurons again.
        """
        scales = {self.scales.get(path, 1.0) for path in currents.layers}
        if not currents.whole or len(scales) > 1:
            return currents
        scale = scales.pop()
        value = currents.value * (scale / currents.scale)
        return replace(currents, value=value, scale=scale)

    def source(self, number: int, site: Site, currents: list[_Currents]) -> _Currents:
        """Return the layers that the output of an operation is a sum of."""
        kind, modules, nothing = site.kind, self.modules, _Currents(None, number=number)
        is_layer = bool(_linear(modules.get(site.name)))
        own = frozenset((site.name,) if is_layer else ())
        last = max(currents, key=lambda v: v.number)
        if kind in ("mul", "div", *PRODUCTS):
            if own and len(currents) == 1:
                return replace(nothing, layers=own, whole=True)
            # The later factor counts: in x (rsqrt(var) scale) of a norm, its scale.
            divides = kind == "div" and last is not currents[0]
            return nothing if kind in PRODUCTS or divides else last
        if kind not in (*SUMS, *SHAPES, *MAXIMA):
            return nothing
        # Such as a position that is learned, or neurons' own.
        other = kind in SUMS and not own and site.name != "weights"
        whole = all(v.whole for v in currents) and not other
        layers = own.union(*(v.layers for v in currents))
        return replace(last, layers=layers, whole=whole)

    def neurons(self, number: int, path: str, currents: _Currents) -> _Currents:
        """Return the spikes of neurons, whose currents are scaled if they can be."""
        layer, xs, found = self.layers[path], currents.value, currents.layers
        before, scale = _rate(layer, xs), 1.0
        if before is None:
            return _Currents(layer(xs), number=number)
        if found and currents.whole and not found & set(self.scales):
            scale = self.search(layer, xs, before)
        self.scales |= {path: scale for path in found if path not in self.scales}
        weights = tuple(sorted(found)) if scale != 1 else ()
        self.rows[number] = BalancedLayer(path, before, before, weights, scale)
        return _Currents(layer(xs * scale), number=number)

    def search(self, layer: Neuron | Recurrent, xs: jax.Array, before: float) -> float:
        """Return the least scale of currents with the rate, 1 if none is better."""

        def rate(octaves: float) -> float:
            return _rate(layer, xs * 2.0**octaves) or 0.0

        low, high = -float(OCTAVES), float(OCTAVES)
        # Where few currents are positive, no scale has the rate.
        wanted = min(self.rate, MOST * rate(high))
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            reached = rate(middle) >= wanted
            low, high = (low, middle) if reached else (middle, high)
        better = abs(rate(high) - self.rate) < abs(before - self.rate)
        return 2.0**high if better else 1.0
