"""A network computed with binary spikes alone: every weight meets 0 or 1.

A neuron with N thresholds hands on whole numbers, 0 to N. Hardware that only
accumulates sees its N binary trains one after the other, in N virtual steps. Weights
are linear, so the sum over trains is the answer to the whole numbers.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import JaxprEqn

from spikejax import neurons, trace
from spikejax.layers import Neuron
from spikejax.memory import drop_membranes, evaluation_copy
from spikejax.nn.operations import PRODUCTS, Layers, multiply, trace_operations
from spikejax.nn.recurrent import Recurrent
from spikejax.trace import Site

MAXIMA = ("max", "reduce_max", "reduce_window_max")
# Each train alone goes through these, and stays binary.
SHAPES = (
    *("reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "rev"),
    *("slice", "dynamic_slice", "gather", "concatenate", "stack", "split", "copy"),
    *("copy_p", "convert_element_type", "optimization_barrier", "reduce_precision"),
)
LOOPS = ("scan", "while", "cond")
MEANS = {"reduce_sum": "sum or mean", "reduce_window_sum": "average pooling"}
MOST = 255  # highest count in an input that is taken for spikes


class DrivenLayer(NamedTuple):
    """Operands of one layer with weights.

    path: as in ``energy.measure``.
    trains: number of binary trains that its weights meet, 0 where they meet analog
        values.
    acs: accumulates per image, one for each spike and nonzero weight that it meets.
    macs: multiply-accumulates per image, of nonzero analog values.
    reason: why the values are analog, else "".
    """

    path: str
    trains: int
    acs: float
    macs: float
    reason: str


@dataclass(frozen=True)
class DrivenReport:
    """Layers with weights, in the order of computation; printed, it is a table.

    difference: largest distance of a logit from the answer of the model itself, from
        rounding alone. It is 0 where sums are exact.
    """

    layers: tuple[DrivenLayer, ...]
    difference: float

    @property
    def virtual_steps(self) -> int:
        """Largest number of binary trains that a layer takes, for a time step."""
        return max((layer.trains for layer in self.layers), default=0)

    def __str__(self) -> str:
        width = max(len(layer.path) for layer in self.layers)
        lines = [f"{'layer':{width}}  trains         ACs        MACs"]
        for layer in self.layers:
            row = f"{layer.trains:6}  {layer.acs:10,.0f}  {layer.macs:10,.0f}"
            lines.append(f"{layer.path:{width}}  {row}  {layer.reason}".rstrip())
        return "\n".join([*lines, f"largest difference {self.difference:.3g}"])


class SpikeDriven(NamedTuple):
    """Answer of a network in binary spikes, and what each of its layers met."""

    logits: jax.Array
    report: DrivenReport


def spike_driven(model: nnx.Module, xs: jax.Array) -> SpikeDriven:
    """Run a network so that its weights meet binary spikes alone, train by train.

    W x = sum_k w_k (W z_k)  for x = sum_k w_k z_k,  z_k in {0, 1}

    A layer with weights is spike-driven where its input is made of spikes by reshaping,
    padding, concatenation, sums (of residual branches: more trains), a number as
    factor, or maximum pooling (whose result is encoded again). Elsewhere it computes
    with analog values, and the report says why: the input of the network, means. Inputs
    of whole numbers from 0 to 255 are taken for counts of spikes.

    Args:
        model: network over sequences. Not modified, and measured from rest.
        xs: input [B, T, ...] as the model takes it.

    Returns:
        the logits, and the report per image: the mean over B.

    Raises:
        ValueError: the model is no module, or neurons or weights are inside of a loop
            of the model's own.

    Examples:
        >>> from spikejax import MultiThreshold
        >>> head = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> model = nnx.Sequential(MultiThreshold(2, decay_input=False), head)
        >>> xs = jnp.array([[[0.5, 1.5, 9.0]]])  # 0, 1 and 2 spikes
        >>> logits, report = spike_driven(model, xs)
        >>> bool(jnp.allclose(logits, model(xs))), report.layers[0].trains
        (True, 2)
    """
    model = drop_membranes(evaluation_copy("spike_driven", model))
    traced, state, layers = trace_operations(model, xs, PRODUCTS)
    driver = _Driver(layers)
    (logits, _), _ = trace.run(traced, state, _encode_input(xs), driver.operation)
    logits = getattr(logits, "value", logits)
    if not driver.rows:
        raise ValueError(
            "spike_driven: expected a network with weights that its input meets, got "
            f"a {type(model).__name__} without any."
        )
    rows = (
        DrivenLayer(path, n, acs / len(xs), macs / len(xs), reason)
        for path, (n, acs, macs, reason) in driver.rows.items()
    )
    difference = jnp.abs(logits - model(xs)).max()
    return SpikeDriven(logits, DrivenReport(tuple(rows), float(difference)))


@dataclass(frozen=True)  # a NamedTuple would be a pytree, and a signal is a leaf
class _Signal:
    """Values that depend on the input, with the spikes that they are made of.

    trains: pairs (weight, binary values) whose weighted sum is the value, or none.
    reason: why there are none.
    """

    value: jax.Array
    trains: tuple[tuple[Any, jax.Array], ...] = ()
    reason: str = ""

    @property
    def weights(self) -> list[Any]:
        return [weight for weight, _ in self.trains]

    @property
    def is_driven(self) -> bool:
        """Return whether the weight of each train is one number for all places."""
        return bool(self.trains) and all(np.size(w) == 1 for w in self.weights)


def _encode(value: jax.Array, weights: Sequence[float]) -> _Signal | None:
    """Return values as spikes of these weights, the largest first; None if they differ.

    Of N equal weights a value of n takes the first n: the trains of a neuron again.
    """
    rest, trains = value, []
    for weight in sorted(weights, reverse=True):
        z = (rest >= weight).astype(value.dtype)
        rest = rest - weight * z
        trains.append((weight, z))
    return None if bool(jnp.any(rest != 0)) else _Signal(value, tuple(trains))


def _encode_input(xs: jax.Array) -> _Signal:
    most = float(xs.max())
    counts = _encode(xs, [1.0] * int(most)) if 1 <= most <= MOST else None
    return counts or _Signal(xs, reason="the input")


class _Driver:
    """Handler of the operations of a network, which counts what its weights meet."""

    def __init__(self, layers: Layers):
        self.layers = layers
        self.rows: dict[str, tuple[int, float, float, str]] = {}

    def operation(
        self, number: int, site: Site, inputs: list, given: None
    ) -> tuple[Any, None]:
        """Return the output of an equation: a handler of ``spikejax.trace``."""
        if site.kind == "neurons":
            return self.spikes(site.eqn.params["path"], inputs[0].value), None
        if site.kind in PRODUCTS:
            return self.product(site, inputs), None
        if site.kind in LOOPS:
            raise ValueError(
                f"spike_driven: expected layers one after the other, got a {site.kind} "
                f"at {site.where}. Write its steps out, or call it without the loop."
            )
        signals = [v for v in inputs if isinstance(v, _Signal)]
        values = [getattr(v, "value", v) for v in inputs]
        outs = trace.bind(site.eqn, values)
        made = [self.signal(site, k, y, inputs, signals) for k, y in enumerate(outs)]
        return made if len(made) > 1 else made[0], None

    def signal(
        self, site: Site, place: int, y: jax.Array, inputs: list, signals: list
    ) -> _Signal:
        """Return one output of an operation that is no product, with its trains."""
        kind, first = site.kind, signals[0]
        weights, spikes = first.weights, all(s.is_driven for s in signals)
        alike = all(s.weights == weights for s in signals) if spikes else False
        constants = [v for v in inputs if not isinstance(v, _Signal)]
        if y.dtype == jnp.bool:  # a comparison makes spikes of anything
            return _Signal(y, ((1.0, y),))
        shapes = kind in SHAPES
        if kind in ("pad", "concatenate", "stack"):  # a constant would count per train
            shapes = not any(map(np.any, constants))
        if alike and shapes:
            trains = []
            for k, weight in enumerate(weights):
                one = [v.trains[k][1] if isinstance(v, _Signal) else v for v in inputs]
                trains.append((weight, trace.bind(site.eqn, one)[place]))
            return _Signal(y, tuple(trains))
        # As in sum(parts), which begins with 0.
        if spikes and kind in ("add", "add_any") and not any(map(np.any, constants)):
            return _Signal(y, tuple(train for s in signals for train in s.trains))
        scales = kind == "mul" or kind == "div" and inputs[0] is first
        if spikes and scales and len(constants) == 1 and np.ptp(constants[0]) == 0:
            factor = float(np.ravel(constants[0])[0])
            factor = factor if kind == "mul" else 1 / factor
            return _Signal(y, tuple((w * factor, z) for w, z in first.trains))
        if spikes and kind == "mul" and len(signals) == 2:  # a spike where both fire
            pairs = itertools.product(*(s.trains for s in signals))
            return _Signal(y, tuple((a * b, p * q) for (a, p), (b, q) in pairs))
        if spikes and kind in MAXIMA and not constants:
            found = _encode(y, max((s.weights for s in signals), key=len))
            if found is not None:
                return found
        analog = [s.reason for s in signals if not s.trains]
        name = MEANS.get(kind, kind)
        return _Signal(y, reason=analog[0] if analog else f"{name} of spikes")

    def product(self, site: Site, inputs: list) -> _Signal:
        """Return the sum over trains of the products of each."""
        signals = [v for v in inputs if isinstance(v, _Signal)]
        name = site.name if len(signals) == 1 else site.where
        # Of two operands, as in attention, spikes of one add up values of the other.
        driven = any(s.is_driven for s in signals)
        whole = [s.trains if s.is_driven else ((1.0, s.value),) for s in signals]
        reasons = [s.reason or "spikes of other weights per channel" for s in signals]
        reason = "" if driven else reasons[0]
        total: Any = None
        for each in itertools.product(*whole):
            weight = float(np.prod([w for w, _ in each]))
            rest = iter([z for _, z in each])
            operands = [next(rest) if isinstance(v, _Signal) else v for v in inputs]
            (y,) = trace.bind(site.eqn, operands)
            y = y if weight == 1 else weight * y
            total = y if total is None else total + y
            self.count(name, site.eqn, operands, driven)
        number = max(len(s.trains) for s in signals if s.is_driven) if driven else 0
        self.note(name, number, 0.0, 0.0, reason)
        return _Signal(total, reason="currents")

    def count(self, name: str, eqn: JaxprEqn, operands: list, driven: bool) -> None:
        """Count the nonzero pairs of a product."""
        pairs = multiply(eqn, [jnp.asarray(v) != 0 for v in operands])
        total = np.asarray(pairs, np.float64).sum()
        self.note(name, 0, *((total, 0.0) if driven else (0.0, total)), "")

    def note(self, name: str, trains: int, acs: float, macs: float, why: str) -> None:
        """Add to the row of a layer."""
        n, a, m, reason = self.rows.get(name, (0, 0.0, 0.0, ""))
        self.rows[name] = max(n, trains), a + acs, m + macs, reason or why

    def spikes(self, path: str, x: jax.Array) -> _Signal:
        """Return the output of a layer of neurons."""
        layer = self.layers[path]
        if isinstance(layer, Recurrent):
            return self.recurrent(path, layer, x)
        y, trains = layer(x), layer(x, trains=True)
        if trains.shape == y.shape:
            return _Signal(y, reason="membranes")
        return _Signal(y, _weighed(layer, trains))

    def recurrent(self, path: str, layer: Recurrent, x: jax.Array) -> _Signal:
        """Return the output of recurrent neurons, whose own weights meet trains too."""
        kernel = layer.recurrent.kernel[...].astype(x.dtype)
        state, back, found = layer.neuron.start(x[:, 0].shape), 0.0, []
        for t in range(x.shape[1]):
            state, trains = layer.neuron.step(state, x[:, t] + back, trains=True)
            found.append(trains)
            parts = _weighed(layer.neuron, trains)
            back = sum(w * (z @ kernel) for w, z in parts)
            if t + 1 < x.shape[1]:
                pairs = sum(z.sum(0) for _, z in parts) @ (kernel != 0)
                name = f"{path}/recurrent"
                self.note(name, len(parts), float(pairs.sum()), 0.0, "")
        trains = jnp.stack(found, 1)
        parts = _weighed(layer.neuron, trains)
        y: Any = sum(w * z for w, z in parts)
        return _Signal(y, parts)


def _weighed(neuron: Neuron, trains: jax.Array) -> tuple[tuple[Any, jax.Array], ...]:
    """Return (weight, train) for each of the N trains on the last axis."""
    weights = neurons.spike_weights(neuron.cell, neuron.params)
    unit = 1.0 if neuron.unit is None else neuron.unit[...]
    weights = [_number(w * unit) for w in weights]
    return tuple((w, trains[..., k]) for k, w in enumerate(weights))


def _number(weight: neurons.Number) -> neurons.Number:
    # Thresholds per channel, equally spaced, have weights of 1 in every channel.
    return float(np.ravel(weight)[0]) if np.ptp(weight) == 0 else weight
