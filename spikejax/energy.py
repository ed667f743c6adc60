"""Spikes, effective operations and energy of a network for an image, by layer.

An operation is effective where a weight and an activation are both nonzero. A spike
that meets a weight is an accumulate (AC), any other activation a multiply-accumulate
(MAC).
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import JaxprEqn

from spikejax import trace
from spikejax.layers import neuron_layers
from spikejax.nn.memory import drop_membranes
from spikejax.trace import Match, Site, Value

# Of float32 in 45 nm: Horowitz 2014, doi:10.1109/ISSCC.2014.6757323
AC_PJ, MAC_PJ = 0.9, 4.6
PRODUCTS = ("dot_general", "conv_general_dilated")
REAL = 2  # level of values that are no spikes, even where they are whole numbers


@dataclass(frozen=True)
class Firing:
    """Spikes of one layer of neurons; every one of N thresholds counts."""

    path: str
    rate: float
    """Spikes per neuron and time step, 0 to N."""
    spikes: float
    """Spikes per image, over all time steps."""


@dataclass(frozen=True)
class Operations:
    """Operations per image of one convolution or linear layer."""

    path: str
    acs: float
    macs: float
    dense_macs: float
    """MACs of one time step if no activation and no weight were zero."""


@dataclass(frozen=True)
class Report:
    """Cost of a network per image, one row per layer in the order of computation."""

    neurons: tuple[Firing, ...]
    connections: tuple[Operations, ...]

    @property
    def spikes_per_image(self) -> float:
        """Spikes of all neurons over all time steps."""
        return sum(row.spikes for row in self.neurons)

    @property
    def acs(self) -> float:
        """Effective accumulates."""
        return sum(row.acs for row in self.connections)

    @property
    def macs(self) -> float:
        """Effective multiply-accumulates."""
        return sum(row.macs for row in self.connections)

    @property
    def dense_macs(self) -> float:
        """MACs of the same network without spikes: one time step, nothing zero."""
        return sum(row.dense_macs for row in self.connections)

    @property
    def ac_nj(self) -> float:
        """0.9 pJ an AC."""
        return AC_PJ * self.acs / 1000

    @property
    def mac_nj(self) -> float:
        """4.6 pJ a MAC."""
        return MAC_PJ * self.macs / 1000

    @property
    def energy_nj(self) -> float:
        """0.9 pJ an AC and 4.6 pJ a MAC."""
        return self.ac_nj + self.mac_nj

    @property
    def ann_energy_nj(self) -> float:
        """4.6 pJ a dense MAC: the network without spikes, on dense hardware."""
        return MAC_PJ * self.dense_macs / 1000


def measure(model: nnx.Module, xs: jax.Array) -> Report:
    """Count the spikes and effective operations of a model in evaluation mode.

    ACs = sum over spikes of the nonzero weights that each meets
    MACs = the same sum over nonzero activations that are not spikes

    Counted are all matrix products and convolutions that depend on the input, wherever
    the model computes them. All N binary trains of a neuron count, whatever their
    weights, through sums of layers and max-pooling (which takes the largest count). An
    input counts as spikes where it holds whole numbers only: averages of spikes cost
    MACs. In a product of two activations, such as attention, spikes meet the nonzero
    values of the other operand. Norms (they fold into weights), biases, elementwise
    products and the neurons' own updates are not counted.

    Args:
        model: module over sequences; for Linen or a function of your own,
            ``trace.Function(net.apply, variables)``. Not modified. Membranes that it
            keeps between calls are ignored: it is measured from rest.
        xs: input [B, T, ...] as the model takes it; the report is the mean over B.

    Returns:
        one row per layer of neurons and per product, in the order of the computation.
        A product is named by the path of its parameters, or else by file and line.

    Raises:
        ValueError: xs has no batch or no time steps; a product is inside of a loop of
            unknown length.

    Reference: Yik et al. 2023, arXiv:2304.04640 (NeuroBench), where a binary activation
    is the only spike; energies Horowitz 2014, doi:10.1109/ISSCC.2014.6757323.
    """
    if xs.ndim < 2 or 0 in xs.shape[:2]:
        raise ValueError(
            f"measure: expected input [B, T, ...], B and T >= 1, got {xs.shape}. "
            "For images without time, add the axis: images[:, None]."
        )
    model = _named(model)
    f, state = trace.functional(model)
    traced = trace.trace(f, state, xs, _Operations())
    if not traced.sites:
        warnings.warn(
            "measure: expected matrix products, convolutions or spiking neurons that "
            "depend on the input, found none: there is nothing to count.",
            stacklevel=2,
        )
    dense: dict[int, tuple[float, float]] = {}
    counts = jax.jit(partial(_count, traced, dense))(state, xs)
    return _report(traced.sites, jax.device_get(counts), dense, *xs.shape[:2])


def _named(model: nnx.Module) -> nnx.Module:
    """Return a copy in evaluation mode, at rest, whose neurons have their paths."""
    model = nnx.clone(model)
    model.eval()
    for path, neuron in neuron_layers(model).items():
        neuron.name = neuron.name or trace.as_scope(path)
    return drop_membranes(model)


class _Operations:
    """Rule of the tracer: sites are products, and the outputs of spiking neurons.

    The level is 1 where values may be spikes, and REAL where they cannot be.
    """

    def match(self, eqn: JaxprEqn, values: Sequence[Value]) -> Match | None:
        """Return the kind of operation."""
        name, called = eqn.primitive.name, trace.call_name(eqn)
        data = [v for v in values if v.level]
        if called == "spiking_output":
            return Match(called, trace.scope(eqn))
        if (
            called == "quantised_relu" and data
        ):  # levels at a scale of 1 look like spikes
            return Match(called, None, level=REAL)
        if name not in PRODUCTS or not data:
            return None
        # Products of spike counts are whole numbers too.
        level = 1 if len(data) == 1 else REAL
        return Match(
            name, trace.last_label(values) if level == 1 else None, level=level
        )

    def level(self, eqn: JaxprEqn, values: Sequence[Value]) -> int:
        """Return 1 for comparisons, which make spikes of anything."""
        is_comparison = trace.aval(eqn.outvars[0]).dtype == jnp.bool
        return 1 if is_comparison else max(v.level for v in values)


def _count(
    traced: trace.Traced, dense: dict, state: trace.Pytree, xs: jax.Array
) -> tuple[trace.Kept, trace.Kept]:
    """Run the model with its own outputs, then with spike counts in their place."""

    def real(
        n: int, site: Site, values: list, given: None, eqn: JaxprEqn
    ) -> tuple[jax.Array, jax.Array | None]:
        (y,) = trace.bind(eqn, values)
        if site.kind == "spiking_output":
            return y, values[1]
        if site.kind not in PRODUCTS:
            return y, None
        dense[n] = _dense(site, eqn)
        return y, _product(eqn, [v != 0 for v in values])

    def counted(
        n: int, site: Site, values: list, given: jax.Array, eqn: JaxprEqn
    ) -> tuple[jax.Array, Any]:
        if site.kind == "spiking_output":
            return given.astype(values[0].dtype), _rows(given)
        (y,) = trace.bind(eqn, values)
        if site.kind not in PRODUCTS:
            return y, None
        whole = [
            (level == 1) & jnp.all(v == jnp.round(v))
            for v, level in zip(values, site.levels, strict=True)
        ]
        pairs = zip(values, whole, strict=True)
        met = [jnp.where(spikes, abs(v), v != 0) for v, spikes in pairs]
        return y, (whole[0] | whole[1], _product(eqn, met))

    kept = trace.run(traced, state, xs, real)[1]
    return kept, trace.run(traced, state, xs, counted, kept)[1]


def _rows(values: jax.Array) -> jax.Array:
    # Float32 is exact up to 16 million: sum up rows here, and all of them on the host.
    return values.astype(jnp.float32).reshape(len(values), -1).sum(1)


def _product(eqn: JaxprEqn, operands: Sequence[jax.Array]) -> jax.Array:
    """Return the sums over each row of a product of numbers of spikes or nonzeros."""
    # JAX 0.10.2 on CPU computes nonsense from a kernel that it knows to be constant.
    operands = jax.lax.optimization_barrier([v.astype(jnp.float32) for v in operands])
    params = eqn.params | {"preferred_element_type": jnp.dtype("float32")}
    return _rows(eqn.primitive.bind(*operands, **params))


def _dense(site: Site, eqn: JaxprEqn) -> tuple[float, float]:
    """Return the MACs of a product of which nothing is zero, and its number of calls.

    A call is one time step of an image, or one token of it. Shapes alone count.
    """
    lhs, rhs, out = map(trace.aval, (*eqn.invars, *eqn.outvars))
    if site.kind == "dot_general":
        contracted, _ = eqn.params["dimension_numbers"]
        size = math.prod(lhs.shape[k] for k in contracted[0])
        return out.size * size, (lhs if site.levels[0] else rhs).size / size
    dims = eqn.params["dimension_numbers"]
    calls, *_ = (lhs.shape[k] for k in dims.lhs_spec)
    outputs, inputs, *kernel = (rhs.shape[k] for k in dims.rhs_spec)
    macs = calls * outputs * inputs / eqn.params["batch_group_count"]
    for k, size in enumerate(kernel):  # padding meets no weight
        pixels, positions = (
            array.shape[spec[k + 2]]
            for array, spec in ((lhs, dims.lhs_spec), (out, dims.out_spec))
        )
        stride, (pad, _), holes, spread = (
            eqn.params[name][k]
            for name in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
        )
        at = stride * np.arange(positions)[:, None] + spread * np.arange(size) - pad
        macs *= ((at >= 0) & (at % holes == 0) & (at <= holes * (pixels - 1))).sum()
    return float(macs), calls


def _report(
    sites: Sequence[Site], counts: tuple, dense: dict, batch: int, steps: int
) -> Report:
    """Return the report: the sites of one name make one row."""

    def per_image(values: np.ndarray) -> float:
        return np.sum(values, dtype=np.float64) / batch

    neurons: dict[str, np.ndarray] = {}
    products: dict[str, np.ndarray] = {}
    for n, site in enumerate(sites):
        repeats = math.prod(site.repeats) / batch
        if site.kind == "spiking_output":
            row = [per_image(counts[1][n]), math.prod(site.shape) * repeats]
            neurons[site.name] = neurons.get(site.name, np.zeros(2)) + row
        elif site.kind in PRODUCTS:
            spikes, acs = counts[1][n]
            is_ac = bool(np.all(spikes))
            macs, calls = dense[n]
            row = [
                per_image(acs) * is_ac,
                per_image(counts[0][n]) * (not is_ac),
                macs * repeats,
                calls * repeats,
            ]
            products[site.name] = products.get(site.name, np.zeros(4)) + row
    firing = [
        # neurons: of all time steps, as a loop over time has a site for each
        Firing(name, float(spikes / neurons), float(spikes))
        for name, (spikes, neurons) in neurons.items()
    ]
    operations = [
        # A layer behind a mean over time is called once, others once per time step.
        Operations(name, float(acs), float(macs), float(all_ / min(steps, calls)))
        for name, (acs, macs, all_, calls) in products.items()
    ]
    return Report(tuple(firing), tuple(operations))
