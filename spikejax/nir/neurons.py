"""Neurons as nodes of NIR, which are differential equations, and back.

Time is in seconds here: ``dt`` is the length of one time step. With forward Euler

    tau dv/dt = v_leak - v + r I   becomes   u = v + (dt / tau) (v_leak - v + r I)
        dv/dt = r I                becomes   u = v + dt r I

so the first steps of our cells, ``charge``, are these nodes exactly:

    LIF, decay_input         tau = tau dt,  r = 1,    v_leak = v_reset or 0
    LIF, decay_input=False   tau = tau dt,  r = tau,  v_leak = v_reset or 0
    IF                       r = 1 / dt
    LI                       as LIF

NIR's LIF and IF then reset the membrane to v_reset: our hard reset, exactly. Soft reset
is ``loop``, exactly, or ``node``. NIR fires where v > v_threshold and we where v >=
v_threshold, which differs only where the two are equal.

Reference: Pedersen et al. 2024, arXiv:2311.14641.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import nir
import numpy as np

from spikejax import neurons
from spikejax.layers import IF, LI, LIF, Neuron
from spikejax.neurons import integrate
from spikejax.nir.layers import broadcastable
from spikejax.nodes import NodeParams, node_neuron


class Integration(NamedTuple):
    """How a time constant in seconds becomes a leak each time step, and back."""

    leak: Callable[[float, Any], Any]  # (dt, tau) -> leak
    tau: Callable[[float, Any], Any]  # (dt, leak) -> tau


def _decay_time(dt, leak):
    if not leak < 1:
        raise ValueError(
            f"to_nir: expected neurons of tau > 1, got {1 / leak}. Exponential decay "
            "never forgets all in one step; integration=EULER can."
        )
    return -dt / math.log1p(-leak)


# leak = dt / tau: SpikingJelly, snnTorch and Norse.
EULER = Integration(lambda dt, tau: dt / tau, lambda dt, leak: dt / leak)
# leak = 1 - exp(-dt / tau), exact for a constant current in each step: Sinabs.
EXPONENTIAL = Integration(lambda dt, tau: -np.expm1(-dt / tau), _decay_time)


class Spec(NamedTuple):
    """Neurons in numbers: u = v - leak (v - v_leak) + gain I, then N thresholds.

    Each threshold that u reaches adds its weight to the output; with soft reset
    (v_reset None) it takes its amount from u, where ``chained`` before the next one is
    compared. N = 0 is an integrator, whose output is u.
    """

    shape: tuple[int, ...]  # channels-first
    leak: float
    gain: float
    v_leak: float
    thresholds: tuple[float, ...]
    amounts: tuple[float, ...]
    weights: tuple[float, ...]
    chained: bool
    v_reset: float | None
    v_start: float

    def full(self, value: float) -> np.ndarray:
        """The value for every neuron."""
        return np.full(self.shape, value, np.float64)


class Part(NamedTuple):
    """Nodes of a graph: where currents enter, and the outputs with their weights."""

    nodes: dict[str, Any]
    edges: list[tuple[str, str]]
    entries: tuple[str, ...]
    outputs: tuple[tuple[str, float], ...]


def specs(
    path: str, layer: Neuron, shape: tuple[int, ...], factor: float
) -> list[Spec]:
    """The neurons of a layer in numbers: one Spec, or one a membrane.

    Args:
        path: names the layer in errors.
        layer: from ``spikejax.layers``, ``quant``, ``recurrent``, or ``nodes.LI``.
        shape: one example at one step, channels-first.
        factor: of the current that arrives.
    """
    params = layer.params
    leak, thresholds = float(params.leak), [float(t) for t in params.thresholds]
    unit = 1.0 if layer.unit is None else float(layer.unit[...])
    thresholds = [t * unit for t in thresholds]
    amounts, chained = thresholds, layer.cell is neurons.cascade
    if layer.cell is neurons.parallel:
        amounts = [b - a for a, b in zip([0.0, *thresholds], thresholds, strict=False)]
    if layer.cell is integrate:
        thresholds = amounts = []
    several = len(thresholds) > 1 and layer.cell is not neurons.independent
    if several and layer.options.v_reset is not None:
        raise ValueError(
            f"to_nir: expected soft reset for the {len(thresholds)} thresholds of "
            f"{path!r}, got v_reset={layer.options.v_reset}. NIR can subtract from a "
            "membrane what several thresholds say, and set it only in a node of one."
        )
    known = neurons.lif, neurons.parallel, neurons.cascade, neurons.independent
    if layer.cell not in (*known, integrate) or layer.kind is NodeParams:
        raise ValueError(
            f"to_nir: expected neurons of spikejax at {path!r}, got "
            f"{type(layer).__name__} with the cell {layer.cell.__name__}."
        )
    spec = Spec(
        shape=shape,
        leak=leak,
        gain=factor * (leak if layer.options.decay_input else 1.0),
        v_leak=layer.options.v_reset or 0.0,
        thresholds=tuple(thresholds),
        amounts=tuple(amounts),
        weights=tuple(a / amounts[0] * unit for a in amounts),
        chained=chained,
        v_reset=layer.options.v_reset,
        v_start=float(layer.v_start) * unit,
    )
    if layer.cell is not neurons.independent:
        return [spec]
    return [
        spec._replace(thresholds=(t,), amounts=(t,), weights=(1.0,)) for t in thresholds
    ]


def _membrane(spec, dt, integration, v_leak):
    """LI, or I where nothing leaks."""
    if not spec.leak:
        return nir.I(r=spec.full(spec.gain / dt))
    return nir.LI(
        tau=spec.full(integration.tau(dt, spec.leak)),
        r=spec.full(spec.gain / spec.leak),
        v_leak=spec.full(v_leak),
    )


def _fires(spec, dt, integration, metadata):
    """LIF, or IF where nothing leaks, of one threshold."""
    rest = {
        "v_threshold": spec.full(spec.thresholds[0]),
        "v_reset": spec.full(spec.v_reset or 0.0),
        "metadata": metadata,
    }
    if not spec.leak:
        return nir.IF(r=spec.full(spec.gain / dt), **rest)
    return nir.LIF(
        tau=spec.full(integration.tau(dt, spec.leak)),
        r=spec.full(spec.gain / spec.leak),
        v_leak=spec.full(spec.v_leak),
        **rest,
    )


def node(name: str, spec: Spec, dt: float, integration: Integration) -> Part:
    """Soft reset for readers that subtract: one LIF or IF, as for hard reset.

    Sinabs subtracts the threshold, whatever NIR's text says; others (SpikingJelly,
    Norse, snnTorch) set the membrane to 0 and answer something else. The node's
    metadata say {"reset": "subtract"} and, for neurons that do not start from 0, as
    those of ``convert``, {"v_start": value}; ``from_nir`` follows both, other readers
    neither.
    """
    if len(spec.thresholds) > 1:
        return loop(name, spec, dt, integration)
    metadata: dict[str, Any] = {"reset": "subtract"}
    if spec.v_start:
        metadata["v_start"] = spec.v_start
    made = _fires(spec, dt, integration, metadata)
    return Part({name: made}, [], (name,), ((name, spec.weights[0]),))


def loop(name: str, spec: Spec, dt: float, integration: Integration) -> Part:
    """Soft reset in NIR's own terms, with any number of thresholds on one membrane.

        membrane    LI or I: u[t] = v[t-1] - leak (v[t-1] - v_leak) + gain I
        threshold_k Threshold on u (cascade: on u - sum_(j<k) amount_j z_j): z_k
        reset_k     Scale by -(1 - leak) amount_k / gain, from threshold_k back to the
                    membrane, where it arrives one time step later

    so v[t] = u[t] - sum_k amount_k z_k[t], exactly. The output is the sum of z_k, each
    by a Scale if its weight is not that of the first. A membrane that starts from v0
    instead of 0 is written as v - v0, which moves its thresholds. All this is our
    choice: NIR has no node for it.
    """
    membrane = f"{name}.membrane"
    nodes: dict[str, Any] = {
        membrane: _membrane(spec, dt, integration, spec.v_leak - spec.v_start)
    }
    edges, outputs = [], []
    carried: list[str] = []
    for k, threshold in enumerate(spec.thresholds, 1):
        fires, resets = f"{name}.threshold_{k}", f"{name}.reset_{k}"
        amount = spec.amounts[k - 1]
        nodes[fires] = nir.Threshold(threshold=spec.full(threshold - spec.v_start))
        back = -(1 - spec.leak) * amount / spec.gain
        nodes[resets] = nir.Scale(scale=spec.full(back))
        edges += [(source, fires) for source in (membrane, *carried)]
        edges += [(fires, resets), (resets, membrane)]
        outputs.append((fires, spec.weights[k - 1]))
        if spec.chained and k < len(spec.thresholds):
            carried.append(f"{name}.carry_{k}")
            nodes[carried[-1]] = nir.Scale(scale=spec.full(-amount))
            edges.append((fires, carried[-1]))
    return Part(nodes, edges, (membrane,), tuple(outputs))


SoftReset = Callable[[str, Spec, float, Integration], Part]


def write(
    name: str,
    spec: Spec,
    dt: float,
    integration: Integration = EULER,
    soft_reset: SoftReset = loop,
) -> Part:
    """Nodes of NIR for neurons: LIF or IF, LI or I, or what ``soft_reset`` makes."""
    if not spec.thresholds:
        made = _membrane(spec, dt, integration, spec.v_leak)
        return Part({name: made}, [], (name,), ((name, 1.0),))
    if spec.v_reset is None:
        return soft_reset(name, spec, dt, integration)
    made = _fires(spec, dt, integration, {})
    return Part({name: made}, [], (name,), ((name, spec.weights[0]),))


class Dialect(NamedTuple):
    """What a library means by the IF, LIF, I and LI that it writes.

    integration: from its time constants to its leaks. soft_reset: the cell of neurons
    that subtract their threshold, or None where they set their membrane as NIR says.
    per_step: its r of IF and I counts a time step and not a second.
    """

    integration: Integration = EULER
    soft_reset: neurons.Cell | None = None
    per_step: bool = False


def read_neurons(name: str, node: Any, dt: float, dialect: Dialect) -> Neuron | None:
    """The neurons that I, LI, IF or LIF stands for; None for other nodes.

    IF, LIF or LI where these have the same equations, else a cell of its own, whose
    membrane is counted from its reset (hard reset) or rest (soft reset, LI).
    """
    if not isinstance(node, nir.I | nir.LI | nir.IF | nir.LIF):
        return None
    leak, gain = _step(name, node, dt, dialect)
    cell, soft = integrate, True
    if isinstance(node, nir.IF | nir.LIF):
        subtracts = node.metadata.get("reset") in ("subtract", b"subtract")
        cell = dialect.soft_reset or neurons.lif
        soft = subtracts or dialect.soft_reset is not None
    rest = np.asarray(getattr(node, "v_leak", 0.0), np.float64)
    base = rest if soft else np.asarray(getattr(node, "v_reset", 0.0), np.float64)
    threshold = np.asarray(getattr(node, "v_threshold", base + 1), np.float64)
    start = float(node.metadata.get("v_start", 0.0))
    decays = bool(np.allclose(gain, leak, rtol=1e-9, atol=0))
    if decays:
        gain, offset = 1.0, rest - base
    else:
        gain = np.where(np.isclose(gain, 1, rtol=1e-9, atol=0), 1.0, gain)
        offset = leak * (rest - base)
    numbers = {"leak": leak, "threshold": threshold - base, "gain": gain}
    numbers |= {"offset": offset, "base": base}
    numbers = {key: broadcastable(value) for key, value in numbers.items()}
    plain = _plain(cell, numbers, decays, soft) if not start else None
    if plain is not None:
        return plain
    if np.min(numbers["threshold"]) <= 0:
        raise ValueError(
            f"from_nir: expected thresholds above the reset and rest of {name!r}, got "
            f"one that is {np.min(numbers['threshold'])} above."
        )
    return node_neuron(
        cell,
        **numbers,
        v_reset=None if soft else 0.0,
        decay_input=decays,
        v_start=start,
    )


def _step(name, node, dt, dialect):
    """Leak a step, and what a step adds for a current of 1."""
    r = np.asarray(node.r, np.float64)
    if isinstance(node, nir.I | nir.IF):
        return np.float64(0), r * (1.0 if dialect.per_step else dt)
    tau = np.asarray(node.tau, np.float64)
    leak = dialect.integration.leak(dt, tau)
    if not ((leak > 0) & (leak <= 1)).all():
        raise ValueError(
            f"from_nir: expected a positive tau of at least dt={dt} s in {name!r}, got "
            f"{tau.min()} s. Give the dt of the library that wrote the graph."
        )
    return leak, leak * r


def _plain(cell, numbers, decays, soft) -> Neuron | None:
    """IF, LIF or LI, where they have the same equations."""
    if any(np.ndim(v) for v in numbers.values()) or numbers["gain"] != 1:
        return None
    leak, base = numbers["leak"], numbers["base"]
    if numbers["offset"] or (soft and base) or cell not in (integrate, neurons.lif):
        return None
    tau = 1 / leak if leak else math.inf
    if cell is integrate:
        return LI(tau, decay_input=decays)
    reset = None if soft else base
    threshold = numbers["threshold"] + base
    if not leak:
        return IF(threshold, v_reset=reset)
    return LIF(tau, threshold, v_reset=reset, decay_input=decays)
