"""Spikes, effective operations and energy of a network for an image, by layer.

An operation is effective where a weight and an activation are both nonzero. A spike
that meets a weight is an accumulate (AC), any other activation a multiply-accumulate
(MAC).
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import JaxprEqn

from spikejax import trace
from spikejax.functions import functional
from spikejax.layers import check_lengths, neuron_layers
from spikejax.memory import Membrane, drop_membranes, evaluation_copy, keep_membranes
from spikejax.nn.delay import OVER_TIME
from spikejax.nn.operations import PRODUCTS, multiply, sum_rows
from spikejax.trace import Match, Pytree, Site, Value

# Of float32 in 45 nm: Horowitz 2014, doi:10.1109/ISSCC.2014.6757323
AC_PJ, MAC_PJ = 0.9, 4.6
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
class Silent:
    """Channels of one layer of neurons that never fired, and how close they came."""

    path: str
    channels: tuple[int, ...]
    """Numbers of these channels, on the last axis."""
    of: int
    """Channels of the layer."""
    threshold: float = math.nan
    """Lowest threshold of these channels, nan where the layer has none."""
    mean: float = math.nan
    """Mean of the membranes of these channels over images, time steps and places."""
    deviation: float = math.nan
    """Standard deviation of these membranes."""
    highest: float = math.nan
    """Highest of these membranes."""

    @property
    def reason(self) -> str:
        """Membranes and threshold in words, or nothing where a layer has none."""
        if math.isnan(self.mean + self.threshold):  # such as PSN
            return ""
        return (
            f"membranes {self.mean:.3g} ± {self.deviation:.3g}, at most "
            f"{self.highest:.3g}; threshold {self.threshold:.3g}"
        )

    def __str__(self) -> str:
        reason = f"; {self.reason}" if self.reason else ""
        return f"{self.path}: {len(self.channels)} of {self.of} channels{reason}"


@dataclass(frozen=True)
class Report:
    """Cost of a network per image, one row per layer; printed, it is a table."""

    neurons: tuple[Firing, ...]
    connections: tuple[Operations, ...]
    silent: tuple[Silent, ...] = ()
    """Layers with channels that never fired on the given input."""

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

    def __str__(self) -> str:
        rows = (*self.neurons, *self.connections)
        width = max((len(row.path) for row in rows), default=0)
        lines = [f"{'neurons':{width}}        rate      spikes"]
        for row in self.neurons:
            lines.append(f"{row.path:{width}}  {row.rate:10.4f}  {row.spikes:10,.0f}")
        lines.append(f"{'weights':{width}}         ACs        MACs  dense MACs")
        for row in self.connections:
            numbers = (row.acs, row.macs, row.dense_macs)
            columns = "".join(f"  {number:10,.0f}" for number in numbers)
            lines.append(f"{row.path:{width}}{columns}")
        lines.append(
            f"{self.spikes_per_image:,.0f} spikes, {self.energy_nj:.4g} nJ; dense "
            f"without spikes {self.ann_energy_nj:.4g} nJ"
        )
        return "\n".join([*lines, *(f"silent {row}" for row in self.silent)])


def measure(
    model: nnx.Module, xs: jax.Array, lengths: jax.Array | None = None
) -> Report:
    """Count the spikes and effective operations of a model in evaluation mode.

    ACs = sum over spikes of the nonzero weights that each meets
    MACs = the same sum over nonzero activations that are not spikes

    Counted are all matrix products and convolutions that depend on the input. All N
    binary trains of a neuron count, whatever their weights, through sums of layers and
    max-pooling (which takes the largest count). An input counts as spikes where it
    holds whole numbers only: averages of spikes cost MACs. In a product of two
    activations, such as attention, spikes meet the nonzero values of the other operand.
    Norms (they fold into weights), biases, elementwise products and the neurons' own
    updates are not counted.

    Args:
        model: module over sequences; for Linen or a function of your own,
            ``Function(net.apply, variables)``, with time=True if it spikes. Not
            modified; measured from rest, whatever membranes it keeps.
        xs: input [B, T, ...] as the model takes it; the report is the mean over B.
        lengths: [B], steps of each sequence, 1 to T; the rest does not count. The model
            runs step by step then: its layers keep their state, as in ``stepper``.

    Returns:
        one row per layer of neurons and per product, in the order of the computation.
        A product is named by the path of its parameters, or else by file and line.
        Channels that never fire are in ``silent``, with the reason.

    Raises:
        ValueError: xs has no batch or no time steps; a product is inside of a loop of
            unknown length; lengths are out of range, or no layer keeps a state.

    Examples:
        >>> layer = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
        >>> report = measure(layer, jnp.array([[[0.0, 1.0, 2.0]]]))  # counts of spikes
        >>> report.acs, report.macs
        (15.0, 0.0)

    Reference: Yik et al. 2023, arXiv:2304.04640 (NeuroBench), where a binary activation
    is the only spike; energies Horowitz 2014, doi:10.1109/ISSCC.2014.6757323.
    """
    if xs.ndim < 2 or 0 in xs.shape[:2]:
        raise ValueError(
            f"measure: expected input [B, T, ...], B and T >= 1, got {xs.shape}. "
            "For images without time, add the axis: images[:, None]."
        )
    ends = None if lengths is None else _ends(lengths, xs)
    model = _named(model)
    traced, count, given = _traced(model, xs, ends)
    if not traced.sites:
        warnings.warn(
            "measure: expected matrix products, convolutions or spiking neurons that "
            "depend on the input, found none: there is nothing to count.",
            stacklevel=2,
        )
    kept, counted = jax.device_get(jax.jit(partial(count, traced))(*given))
    times = (xs.shape[1], 1.0) if ends is None else (1, float(np.mean(ends)))
    report = _report(traced.sites, kept, counted, len(xs), *times)
    return replace(report, silent=_silent(traced.sites, kept, model))


def _ends(lengths: jax.Array, xs: jax.Array) -> jax.Array:
    """Return the lengths, each of at least one step and at most all of xs."""
    ends = check_lengths("measure", lengths, len(xs))
    low, high = int(ends.min()), int(ends.max())
    if not 1 <= low <= high <= xs.shape[1]:
        raise ValueError(
            f"measure: expected lengths of 1 to {xs.shape[1]} steps, got {low} to "
            f"{high}."
        )
    return ends


def _traced(
    model: nnx.Module, xs: jax.Array, lengths: jax.Array | None
) -> tuple[trace.Traced, Callable[..., Any], tuple]:
    """Return a model, or one step of it, traced; what counts it, and the arguments."""
    if lengths is None:
        f, state = functional(model)
        return trace.trace(f, state, xs, _Costs()), _count, (state, xs)
    f, state, held = _one_step(model, xs)
    traced = trace.trace(f, state, (held, xs[:, :1]), _Costs())
    return traced, _count_steps, (state, held, xs, lengths)


def _named(model: nnx.Module) -> nnx.Module:
    """Return a copy in evaluation mode, at rest, whose neurons have their paths."""
    model = evaluation_copy("measure", model)
    for path, neuron in neuron_layers(model).items():
        neuron.name = neuron.name or path
    return drop_membranes(model)


class _Costs:
    """Rule of the tracer: sites are products, and the outputs of spiking neurons.

    The level is 1 where values may be spikes, and REAL where they cannot be.
    """

    def match(self, eqn: JaxprEqn, values: Sequence[Value]) -> Match | None:
        """Return the kind of operation."""
        name, called = eqn.primitive.name, trace.call_name(eqn)
        data = [v for v in values if v.level]
        if called == "spiking_output":
            return Match(called, trace.scope(eqn))
        if called == "quantised_relu" and data:
            # Its levels at a scale of 1 look like spikes.
            return Match(called, None, level=REAL)
        if name not in PRODUCTS or not data:
            return None
        if len(data) == 1:
            return Match(name, trace.last_label(values))
        return Match(name, None, level=REAL)  # products of counts are whole numbers too

    def level(self, eqn: JaxprEqn, values: Sequence[Value]) -> int:
        """Return 1 for comparisons, which make spikes of anything."""
        is_comparison = trace.aval(eqn.outvars[0]).dtype == jnp.bool
        return 1 if is_comparison else max(v.level for v in values)


def _one_step(
    model: nnx.Module, xs: jax.Array
) -> tuple[Callable[..., Pytree], Pytree, Pytree]:
    """Return a model as (state, (held, x)) -> (held, y), its state, and held at rest.

    What is held is data: a product with it counts.
    """
    graphdef, held, state = nnx.split(keep_membranes(model, xs), Membrane, ...)

    def f(state: Pytree, given: tuple[Pytree, jax.Array]) -> tuple[Pytree, Pytree]:
        held, x = given
        model = nnx.merge(graphdef, held, state)
        ys = model(x)
        return nnx.to_pure_dict(nnx.state(model, Membrane)), ys

    return f, nnx.to_pure_dict(state), nnx.to_pure_dict(held)


def _real(n: int, site: Site, values: list, given: None) -> tuple[jax.Array, Any]:
    """Compute a site as it is; keep the count of spikes, or of nonzero operations."""
    if site.kind == "spiking_output":
        y, count, *membranes = values
        return y, (count, _by_channel(count, *membranes))
    (y,) = trace.bind(site.eqn, values)
    is_product = site.kind in PRODUCTS
    return y, multiply(site.eqn, [v != 0 for v in values]) if is_product else None


def _counted(
    n: int, site: Site, values: list, given: tuple[jax.Array, tuple]
) -> tuple[jax.Array, Any]:
    """Compute a site with counts for spikes; keep their sums, and if they are whole."""
    if site.kind == "spiking_output":
        count, _ = given
        return count.astype(values[0].dtype), sum_rows(count)
    (y,) = trace.bind(site.eqn, values)
    if site.kind not in PRODUCTS:
        return y, None
    met, is_ac = [v != 0 for v in values], jnp.array(False)
    for k, v in enumerate(values):
        whole = (site.levels[k] == 1) & jnp.all(v == jnp.round(v))
        met[k] = jnp.where(whole, abs(v), met[k])
        is_ac |= whole
    return y, (is_ac, multiply(site.eqn, met))


def _count(
    traced: trace.Traced, state: Pytree, xs: jax.Array
) -> tuple[trace.Kept, trace.Kept]:
    """Run the model with its own outputs, then with spike counts in their place."""
    kept = trace.run(traced, state, xs, _real)[1]
    counts = trace.run(traced, state, xs, _counted, kept)[1]
    return _without_spikes(kept), counts


def _without_spikes(kept: trace.Kept) -> trace.Kept:
    # The spikes themselves stay on the device.
    return {n: v[1] if isinstance(v, tuple) else v for n, v in kept.items()}


def _count_steps(
    traced: trace.Traced, state: Pytree, held: Pytree, xs: jax.Array, lengths: jax.Array
) -> tuple[trace.Kept, trace.Kept]:
    """Run ``_count`` for one time step after the other, up to the end of each example.

    Returns:
        as ``_count``, with an axis of the time steps first; rows after the end are 0.
    """

    def step(carry: tuple, now: tuple) -> tuple[tuple, tuple]:
        t, x = now
        valid = (t < lengths)[:, None]

        def masked(rows: jax.Array) -> jax.Array:
            flat = rows.reshape(len(lengths), -1)
            return jnp.where(valid, flat, 0).reshape(rows.shape)

        def real(n: int, site: Site, values: list, given: None) -> tuple:
            y, kept = _real(n, site, values, given)
            if site.kind == "spiking_output":
                return y, (kept[0], _by_channel(masked(kept[0])))
            return y, None if kept is None else masked(kept)

        def counted(n: int, site: Site, values: list, given: tuple) -> tuple:
            y, kept = _counted(n, site, values, given)
            if isinstance(kept, tuple):
                return y, (kept[0], masked(kept[1]))
            return y, None if kept is None else masked(kept)

        # Padding may be anything, and is not to turn spikes into real values.
        x = masked(x)[:, None]
        (after, _), kept = trace.run(traced, state, (carry[0], x), real)
        # Layers that keep spikes have counts in their place here.
        (counts, _), rows = trace.run(traced, state, (carry[1], x), counted, kept)
        return (after, counts), (_without_spikes(kept), rows)

    steps = jnp.arange(xs.shape[1]), jnp.moveaxis(xs, 1, 0)
    return jax.lax.scan(step, (held, held), steps)[1]


def _by_channel(count: jax.Array, *membranes: jax.Array) -> tuple[jax.Array, ...]:
    """Return spikes by channel, and mean, mean square and maximum of membranes."""
    channels = count.shape[-1] if count.ndim > 1 else 1
    spikes = count.astype(jnp.float32).reshape(-1, channels).sum(0)
    v = [v.reshape(-1, channels) for v in membranes]
    return spikes, *(f(0) for v in v for f in (v.mean, jnp.square(v).mean, v.max))


def _dense(site: Site) -> tuple[float, float]:
    """Return the MACs of a product of which nothing is zero, and its number of calls.

    A call is one time step of an image, or one token of it. Shapes alone count.
    """
    params = site.eqn.params
    lhs, rhs, out = map(trace.aval, (*site.eqn.invars, *site.eqn.outvars))
    dims = params["dimension_numbers"]
    if site.kind == "dot_general":
        size = math.prod(lhs.shape[k] for k in dims[0][0])
        return out.size * size, (lhs if site.levels[0] else rhs).size / size
    calls, _, *pixels = (lhs.shape[k] for k in dims.lhs_spec)
    outputs, inputs, *kernel = (rhs.shape[k] for k in dims.rhs_spec)
    macs = calls * outputs * inputs / params["batch_group_count"]
    names = "window_strides", "padding", "lhs_dilation", "rhs_dilation"
    axes = zip(*(params[name] for name in names), strict=True)
    for k, (stride, (pad, _), holes, spread) in enumerate(axes):
        at = stride * np.arange(out.shape[dims.out_spec[k + 2]])[:, None] - pad
        at = at + spread * np.arange(kernel[k])
        # Padding and holes meet no weight.
        inside = (at >= 0) & (at % holes == 0) & (at <= holes * (pixels[k] - 1))
        macs *= inside.sum()
    # The first axis is time, as in nn.tpu, or all there is.
    if len(kernel) == 3 and kernel[0] == 1:
        calls *= pixels[0]
    elif OVER_TIME in str(site.eqn.source_info.name_stack):
        calls *= out.shape[dims.out_spec[2]]
    return float(macs), calls


def _silent(
    sites: Sequence[Site], real: trace.Kept, model: nnx.Module
) -> tuple[Silent, ...]:
    """Return the channels of each layer that never fired."""
    layers = neuron_layers(model)
    # By width as well, as one layer may act on several values.
    found: dict[tuple[str, int], list[tuple[np.ndarray, ...]]] = {}
    for n, site in enumerate(sites):
        if site.kind == "spiking_output":
            channels = real[n][0].shape[-1]
            parts = tuple(part.reshape(-1, channels) for part in real[n])
            found.setdefault((site.name, channels), []).append(parts)
    rows = []
    for (path, channels), sites_of in found.items():
        spikes, *membranes = map(np.concatenate, zip(*sites_of, strict=True))
        silent = np.flatnonzero(spikes.sum(0) == 0)
        numbers = []
        if silent.size and membranes and path in layers:
            mean, square, highest = (part[:, silent] for part in membranes)
            deviation = np.sqrt(max(square.mean() - mean.mean() ** 2, 0))
            levels = [np.asarray(t) for t in layers[path].params.thresholds]
            own = [t[..., silent] if t.shape[-1:] == (channels,) else t for t in levels]
            lowest = min(np.abs(t).min() for t in own)
            numbers = map(float, (lowest, mean.mean(), deviation, highest.max()))
        if silent.size:
            rows.append(Silent(path, tuple(silent.tolist()), channels, *numbers))
    return tuple(rows)


def _report(
    sites: Sequence[Site],
    real: trace.Kept,
    counted: trace.Kept,
    batch: int,
    steps: int,
    times: float,
) -> Report:
    """Return the report: the sites of one name make one row.

    Args:
        sites, real, counted: as they were traced and counted.
        batch, steps: of the input. times: how many times it ran, on average.
    """
    neurons: dict[str, np.ndarray] = {}
    products: dict[str, np.ndarray] = {}

    def add(rows: dict[str, np.ndarray], name: str, *sums: Any) -> None:
        row = np.array([np.sum(v, dtype=np.float64) for v in sums]) / batch
        rows[name] = rows.get(name, 0.0) + row

    for n, site in enumerate(sites):
        repeats = math.prod(site.repeats)
        if site.kind == "spiking_output":
            add(neurons, site.name, counted[n], math.prod(site.shape) * repeats * times)
        elif site.kind in PRODUCTS:
            is_ac, acs = counted[n]
            acs, macs = (acs, 0) if np.all(is_ac) else (0, real[n])
            add(products, site.name, acs, macs, *(repeats * v for v in _dense(site)))
    # Neurons of all time steps, as a loop over time has a site for each.
    firing = [Firing(k, float(n / size), float(n)) for k, (n, size) in neurons.items()]
    operations = [
        # A layer behind a mean over time is called once, others once per time step.
        Operations(name, float(acs), float(macs), float(dense / min(steps, calls)))
        for name, (acs, macs, dense, calls) in products.items()
    ]
    return Report(tuple(firing), tuple(operations))
