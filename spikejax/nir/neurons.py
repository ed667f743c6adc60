"""Neurons as nodes of NIR, which are differential equations, and back.

Time is in seconds here: ``dt`` is the length of one time step. With forward Euler

    tau dv/dt = v_leak - v + r I   becomes   u = v + (dt / tau) (v_leak - v + r I)
        dv/dt = r I                becomes   u = v + dt r I

so ``charge``, the first phase of our cells, is these nodes exactly:

    LIF, decay_input         tau = tau dt,  r = 1,    v_leak = v_reset or 0
    LIF, decay_input=False   tau = tau dt,  r = tau,  v_leak = v_reset or 0
    IF                       r = 1 / dt
    LI                       as LIF
    CubaLIF                  as LIF, with tau_syn = tau_synapse dt, w_in = tau_synapse

NIR's CubaLIF and CubaLI are an LI of w_in times the input, which rests at 0, before a
LIF or LI. The membrane sees the current of its own step, as in snnTorch, SpikingJelly
and Norse.

NIR's LIF and IF then reset the membrane to v_reset: our hard reset, exactly. Soft reset
is ``loop``, exactly, or ``node``. NIR fires where v > v_threshold and we where v >=
v_threshold, which differs only where the two are equal.

Reference: Pedersen et al. 2024, arXiv:2311.14641.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import nir
import numpy as np

from spikejax import neurons
from spikejax.layers import IF, LI, LIF, Neuron
from spikejax.neurons import Cell, NeuronOptions, NeuronParams
from spikejax.nir.layers import Node, broadcastable
from spikejax.nn.cells import CubaLIF, synaptic

Numbers = Any  # a number, or an array that broadcasts with the features


class Integration(NamedTuple):
    """Rule by which a time constant in seconds becomes a leak per step, and back."""

    leak: Callable[[float, Numbers], Numbers]  # (dt, tau) -> leak
    tau: Callable[[float, Numbers], Numbers]  # (dt, leak) -> tau


EULER = Integration(lambda dt, tau: dt / tau, lambda dt, leak: dt / leak)
"""leak = dt / tau: SpikingJelly, snnTorch and Norse."""
EXPONENTIAL = Integration(
    lambda dt, tau: -np.expm1(-dt / tau), lambda dt, leak: -dt / np.log1p(-leak)
)
"""leak = 1 - exp(-dt / tau), exact for a constant current in each step: Sinabs."""


LEAKY = nir.LI | nir.LIF | nir.CubaLI | nir.CubaLIF


class NodeParams(NamedTuple):
    """Parameters of ``node_step``: numbers, or arrays that broadcast with the features.

    leak: dt / tau, 0 without a leak. gain: of the current. v_leak: membrane at rest.
    thresholds: one, or none for an integrator.
    amounts: what a spike takes away (soft reset), or None.
    v_reset: the membrane after a spike (hard reset), or None.
    synaptic_leak: dt / tau_syn of a synaptic current, or None without one.
    """

    leak: Numbers
    gain: Numbers
    v_leak: Numbers = 0.0
    thresholds: tuple[Numbers, ...] = ()
    amounts: tuple[Numbers, ...] | None = None
    v_reset: Numbers = None
    synaptic_leak: Numbers = None


def node_step(
    params: NodeParams,
    state: Any,
    x: jax.Array,
    options: NeuronOptions = neurons.DEFAULT,
) -> tuple[Any, tuple[jax.Array, ...]]:
    """Compute one step of a neuron of NIR whose parameters have any value.

    i' = i - synaptic_leak i + x   (CubaLIF, CubaLI; else i' = x)
    u = v + leak (v_leak - v) + gain i',  z = H(u - threshold)
    v' = u - amount z  (soft)   or   v_reset where z = 1

    Args and results are those of ``neurons.lif``, with ``NodeParams`` and no spike
    train for an integrator; with a synaptic current the state is (v, i). Of the
    options, detach_reset and surrogate count.
    """
    v = state
    if params.synaptic_leak is not None:
        v, current = state
        x = current - params.synaptic_leak * current + x
    u = v + params.leak * (params.v_leak - v) + params.gain * x
    trains = ()
    if len(params.thresholds):
        z = options.surrogate(u - params.thresholds[0])
        amount = z if params.amounts is None else params.amounts[0] * z
        options = options._replace(v_reset=params.v_reset)
        u, trains = neurons.reset(u, z, amount, options), (z,)
    return (u if params.synaptic_leak is None else (u, x)), trains


class Spec(NamedTuple):
    """Neurons in numbers: u = v - leak (v - v_leak) + gain I, then N thresholds.

    Each threshold that u reaches adds its weight to the output; with soft reset
    (v_reset None) it takes its amount from u, where ``chained`` before the next one is
    compared. N = 0 is an integrator, whose output is u. With a synaptic_leak, I is a
    current that leaks: I = I - synaptic_leak I + input. Numbers may be arrays that
    broadcast with the shape of one example, channels-last.
    """

    shape: tuple[int, ...]
    leak: Numbers
    gain: Numbers
    v_leak: Numbers
    thresholds: tuple[Numbers, ...]
    amounts: tuple[Numbers, ...]
    weights: tuple[Numbers, ...]
    chained: bool
    v_reset: Numbers
    v_start: Numbers
    synaptic_leak: Numbers = None

    def full(self, value: Numbers) -> np.ndarray:
        """Return the value for every neuron, channels-first."""
        array = np.broadcast_to(np.asarray(value, np.float64), self.shape)
        return np.ascontiguousarray(np.moveaxis(array, -1, 0))


class Part(NamedTuple):
    """Nodes of a graph: where currents enter, and the outputs with their weights."""

    nodes: dict[str, nir.NIRNode]
    edges: list[tuple[str, str]]
    entry: str
    outputs: list[tuple[str, Numbers]]


def specs(
    path: str,
    layer: Neuron,
    shape: tuple[int, ...],
    factor: float,
    integration: Integration,
) -> list[Spec]:
    """Return the neurons of a layer in numbers, one Spec per membrane.

    Args:
        path: of the layer, for errors.
        layer: with a cell of ``spikejax.neurons``, ``synaptic``, or ``node_step``.
        shape: of one example at one step, channels-last.
        factor: of the current that arrives.
        integration: of the reader.

    Raises:
        ValueError: NIR has no nodes for these neurons.
    """
    found: list[Spec] = []
    problem = f"the cell {getattr(layer.cell, '__name__', layer.cell)!r}"
    if layer.cell in (node_step, *CELLS):
        found = _specs(layer, shape, factor)
        problem = _problem(found[0], integration)
    if problem:
        raise ValueError(
            f"to_nir: expected neurons that NIR has nodes for at {path!r}, got "
            f"{problem}. Take a cell of spikejax.neurons with soft reset, or CubaLIF, "
            "and integration=EULER."
        )
    return found


CELLS = (neurons.lif, neurons.parallel, neurons.cascade)
CELLS += (neurons.independent, neurons.late_reset, neurons.integrate, synaptic)


def _specs(layer: Neuron, shape: tuple[int, ...], factor: float) -> list[Spec]:
    cell, v_reset = layer.cell, layer.options.v_reset
    params: Any = layer.params
    unit = layer.bind()[1][1]
    unit = np.asarray(1.0 if unit is None else unit, np.float64)
    leak = np.asarray(params.leak, np.float64)
    gain, v_leak = leak if layer.options.decay_input else 1.0, v_reset or 0.0
    synaptic_leak = getattr(params, "synaptic_leak", None)
    if cell is synaptic:  # parallel neurons behind their current
        cell, params = neurons.parallel, NeuronParams(params.leak, params.thresholds)
    if cell is node_step:
        gain, v_leak, v_reset = params.gain, params.v_leak, params.v_reset
    numbers: tuple[Any, ...] = ((), (), ())
    if cell is neurons.integrate:
        gain = gain / unit  # its output is the membrane, in units of a spike
    else:
        amounts = neurons.spike_amounts(cell, params)
        weights = neurons.spike_weights(layer.cell, layer.params)
        numbers = params.thresholds, amounts, weights
    # The cell counts membranes in units of a spike.
    thresholds, amounts, weights = (
        tuple(np.asarray(n) * unit for n in ns) for ns in numbers
    )
    if cell is neurons.late_reset:  # the leak of the next step is in its amounts
        amounts = tuple(a / (1 - leak) for a in amounts)
    start = np.asarray(jax.tree.leaves(layer.start((1, *shape)))[0])
    spec = Spec(
        shape,
        leak,
        np.asarray(gain) * factor,
        np.asarray(v_leak) * unit,
        thresholds,
        amounts,
        weights,
        chained=cell is neurons.cascade,
        v_reset=None if v_reset is None else np.asarray(v_reset) * unit,
        v_start=start.reshape(-1, *shape)[0] * unit,
        synaptic_leak=None if synaptic_leak is None else np.asarray(synaptic_leak),
    )
    if cell is not neurons.independent:
        return [spec]
    return [
        spec._replace(thresholds=(t,), amounts=(t,), weights=(w,))
        for t, w in zip(thresholds, weights, strict=True)
    ]


def _problem(spec: Spec, integration: Integration) -> str:
    """Return the reason why NIR has no nodes for neurons, or nothing."""
    if len(spec.thresholds) > 1 and spec.v_reset is not None:
        return "hard reset of one membrane by several thresholds"
    if any((a < 0).any() for a in spec.amounts):
        return "spikes of negative amounts"
    for leak in (spec.leak, spec.synaptic_leak):
        if leak is None:
            continue
        if np.any(leak == 0) != np.all(leak == 0):
            return "only some neurons with a leak"
        with np.errstate(divide="ignore"):
            tau = integration.tau(1.0, leak)
        if not np.all(tau > 0):
            return "tau = 1, which exponential decay cannot have"
    return ""


def _node(
    spec: Spec, dt: float, integration: Integration, metadata: dict[str, Any]
) -> nir.NIRNode:
    """Return LIF or LI, IF or I where nothing leaks, or CubaLIF or CubaLI."""
    leaks, cuba = bool(np.any(spec.leak)), spec.synaptic_leak is not None
    numbers: dict[str, Any] = {"r": spec.full(spec.gain / (spec.leak if leaks else dt))}
    if leaks:
        tau = spec.full(integration.tau(dt, spec.leak))
        numbers["tau_mem" if cuba else "tau"] = tau
        numbers["v_leak"] = spec.full(spec.v_leak)
    if cuba:
        numbers["tau_syn"] = spec.full(integration.tau(dt, spec.synaptic_leak))
        numbers["w_in"] = spec.full(1 / spec.synaptic_leak)
    if spec.thresholds:
        numbers["v_threshold"] = spec.full(spec.thresholds[0])
        numbers["v_reset"] = spec.full(0.0 if spec.v_reset is None else spec.v_reset)
    # NIR has no membrane before the first step, and no name for it in its text. Readers
    # start from here, unless the metadata say more.
    rest = spec.v_reset if spec.v_reset is not None else spec.v_leak * leaks
    start = spec.full(spec.v_start)
    if (start != spec.full(rest)).any():
        uniform = (start == start.flat[0]).all()
        metadata = metadata | {"v_start": float(start.flat[0]) if uniform else start}
    fires = (nir.IF, nir.LIF, nir.CubaLIF)
    kinds = fires if spec.thresholds else (nir.I, nir.LI, nir.CubaLI)
    return kinds[leaks + cuba](**numbers, metadata=metadata)


def _single(
    name: str, spec: Spec, dt: float, integration: Integration, metadata: dict[str, Any]
) -> Part:
    """Return one node for neurons, or two where they have a current that NIR cannot."""
    if spec.synaptic_leak is not None and not np.all(spec.leak * spec.synaptic_leak):
        single = partial(_single, metadata=metadata)
        return _behind_synapse(single, name, spec, dt, integration)
    made = _node(spec, dt, integration, metadata)
    weight = spec.weights[0] if spec.weights else 1.0
    return Part({name: made}, [], name, [(name, weight)])


def _behind_synapse(
    write: "SoftReset", name: str, spec: Spec, dt: float, integration: Integration
) -> Part:
    """Return neurons behind a node of their own for the synaptic current, LI or I."""
    part = write(name, spec._replace(synaptic_leak=None), dt, integration)
    numbers = {"leak": spec.synaptic_leak, "gain": 1.0, "v_leak": 0.0, "v_start": 0.0}
    current = spec._replace(**numbers, thresholds=(), v_reset=None, synaptic_leak=None)
    entry = f"{name}.synapse"
    nodes = {entry: _node(current, dt, integration, {}), **part.nodes}
    return Part(nodes, [(entry, part.entry), *part.edges], entry, part.outputs)


def node(name: str, spec: Spec, dt: float, integration: Integration) -> Part:
    """Return soft reset for readers that subtract: one node, as for hard reset.

    Sinabs subtracts the threshold, in spite of NIR's text; others (SpikingJelly, Norse,
    snnTorch) set the membrane to 0 and answer something else. The node's metadata are
    {"reset": "subtract"} and, for neurons that do not start from rest, such as those of
    ``convert``, {"v_start": value}; ``from_nir`` follows both, other readers neither.

    Neurons with several thresholds, or that subtract something else, become a ``loop``.
    """
    subtracts = zip(spec.thresholds, spec.amounts, strict=True)
    if len(spec.thresholds) > 1 or any(np.any(t != a) for t, a in subtracts):
        return loop(name, spec, dt, integration)
    return _single(name, spec, dt, integration, {"reset": "subtract"})


def loop(name: str, spec: Spec, dt: float, integration: Integration) -> Part:
    """Return soft reset in NIR's own terms, with any number of thresholds.

        membrane    LI or I: u[t] = v[t-1] - leak (v[t-1] - v_leak) + gain I
        threshold_k Threshold on u (cascade: on u - sum_(j<k) amount_j z_j): z_k
        reset_k     Scale by -(1 - leak) amount_k / gain, from threshold_k back to the
                    membrane, where it arrives one time step later

    so v[t] = u[t] - sum_k amount_k z_k[t], exactly. The output is the sum of z_k, each
    with a Scale if its weight is not that of the first. A membrane that starts from v0
    instead of 0 is written as v - v0, which moves its thresholds. A synaptic current
    is an LI or I before the membrane, past which the resets come back. All this is our
    choice: NIR has no node for it.
    """
    if spec.synaptic_leak is not None:
        return _behind_synapse(loop, name, spec, dt, integration)
    # A chip has no node for a membrane that starts elsewhere than at 0.
    membrane, v0 = f"{name}.membrane", spec.v_start
    moved = spec._replace(v_leak=spec.v_leak - v0, thresholds=(), v_start=0.0)
    nodes: dict[str, Any] = {membrane: _node(moved, dt, integration, {})}
    edges, outputs, sources = [], [], [membrane]
    numbers = zip(spec.thresholds, spec.amounts, spec.weights, strict=True)
    for k, (threshold, amount, weight) in enumerate(numbers, 1):
        fires, resets, carry = (
            f"{name}.{x}_{k}" for x in ("threshold", "reset", "carry")
        )
        nodes[fires] = nir.Threshold(threshold=spec.full(threshold - v0))
        back = -(1 - spec.leak) * amount / spec.gain
        nodes[resets] = nir.Scale(scale=spec.full(back))
        edges += [(source, fires) for source in sources]
        edges += [(fires, resets), (resets, membrane)]
        outputs.append((fires, weight))
        if spec.chained and k < len(spec.thresholds):
            nodes[carry] = nir.Scale(scale=spec.full(-amount))
            edges.append((fires, carry))
            sources.append(carry)
    return Part(nodes, edges, membrane, outputs)


SoftReset = Callable[[str, Spec, float, Integration], Part]


def write(
    name: str, spec: Spec, dt: float, integration: Integration, soft_reset: SoftReset
) -> Part:
    """Return nodes for neurons: one of NIR's, or what ``soft_reset`` makes."""
    if spec.thresholds and spec.v_reset is None:
        return soft_reset(name, spec, dt, integration)
    return _single(name, spec, dt, integration, {})


class Dialect(NamedTuple):
    """Meaning of the neurons that a library writes.

    integration: from its time constants to its leaks.
    soft_reset: lif or late_reset for neurons that subtract their threshold; None where
        they set their membrane, as NIR says.
    per_step: r of IF and I, and w_in of CubaLIF and CubaLI, count per time step.
    gain: of the input of LIF, LI, CubaLIF and CubaLI in a step, of (dt, node); None is
        leak r, and for the latter two leak r synaptic_leak w_in.
    """

    integration: Integration = EULER
    soft_reset: Cell | None = None
    per_step: bool = False
    gain: Callable[[float, Node], Numbers] | None = None


def read_neurons(name: str, node: Node, dt: float, dialect: Dialect) -> Neuron | None:
    """Return the neurons for a node with a membrane, or None for any other node.

    IF, LIF, LI, CubaLIF or ``late_reset`` if these have the same equations, else
    ``node_step``.

    Args:
        name: of the node, for errors.
        node: from a graph; its arrays are channels-first.
        dt: seconds per time step.
        dialect: of the library that wrote it.

    Raises:
        ValueError: a time constant or a threshold is out of its range.
    """
    if not isinstance(node, nir.I | nir.IF | LEAKY):
        return None
    params = _read(node, dt, dialect)
    rest = params.v_leak if params.v_reset is None else params.v_reset
    leaks = [params.leak] if isinstance(node, LEAKY) else []
    leaks += [] if params.synaptic_leak is None else [params.synaptic_leak]
    in_range = all(((leak > 0) & (leak <= 1)).all() for leak in leaks)
    # A threshold at or below rest fires at every step, whatever comes in.
    levels = (*params.thresholds, *(params.amounts or ()))
    above = all(((level > rest) & np.isfinite(level)).all() for level in levels)
    if not (in_range and above):
        taus = [getattr(node, key, np.inf) for key in ("tau", "tau_mem", "tau_syn")]
        raise ValueError(
            f"from_nir: expected neurons {name!r} with a positive tau of at least "
            f"dt={dt} s, and thresholds above reset and rest, got tau "
            f"{min(map(np.min, taus))} s and thresholds from "
            f"{np.min(params.thresholds or 0.0)}. Give the dt of the library that "
            "wrote the graph."
        )
    start = np.asarray(node.metadata.get("v_start", rest))
    plain = _plain(params, start, dialect.soft_reset is neurons.late_reset)
    if plain is not None:
        return plain
    params = jax.tree.map(broadcastable, params)
    state = None if params.synaptic_leak is None else neurons.rest_both
    return Neuron(node_step, params, start=state, v_start=broadcastable(start))


def _read(node: Node, dt: float, dialect: Dialect) -> NodeParams:
    """Return the numbers of a node, channels-first."""

    def get(name: str, default: float | np.ndarray = 0.0) -> np.ndarray:
        return np.asarray(getattr(node, name, default), np.float64)

    leak, gain = np.zeros(()), get("r") * (1.0 if dialect.per_step else dt)
    current, cuba = None, isinstance(node, nir.CubaLI | nir.CubaLIF)
    if isinstance(node, LEAKY):
        leak = dialect.integration.leak(dt, get("tau_mem" if cuba else "tau"))
        gain = leak * get("r")
    if cuba:
        current = dialect.integration.leak(dt, get("tau_syn"))
        gain = gain * get("w_in") * (1.0 if dialect.per_step else current)
    if isinstance(node, LEAKY) and dialect.gain is not None:
        gain = dialect.gain(dt, node)
    v_leak = get("v_leak")
    if isinstance(node, nir.I | nir.LI | nir.CubaLI):
        return NodeParams(leak, gain, v_leak, synaptic_leak=current)
    threshold = amount = get("v_threshold")
    subtracts = node.metadata.get("reset") in ("subtract", b"subtract")
    if not subtracts and dialect.soft_reset is None:
        v_reset = get("v_reset")
        v_leak = get("v_leak", v_reset)  # IF has none
        return NodeParams(leak, gain, v_leak, (threshold,), None, v_reset, current)
    if dialect.soft_reset is neurons.late_reset:
        with np.errstate(divide="ignore"):  # beta = 0 is out of range
            amount = threshold / (1 - leak)
    return NodeParams(leak, gain, v_leak, (threshold,), (amount,), None, current)


def _plain(params: NodeParams, start: np.ndarray, late: bool) -> Neuron | None:
    """Return a layer of spikejax, or a late reset, if it has these equations."""
    v_reset = np.zeros(()) if params.v_reset is None else params.v_reset
    # gain is leak r, so it equals leak up to float64's rounding where r is 1.
    decays = np.allclose(params.gain, params.leak, rtol=1e-9, atol=0)
    same = np.ptp(v_reset) == 0  # options have one for all neurons
    same &= (params.v_leak == v_reset).all() and (start == v_reset).all()
    if not same or not (decays or np.allclose(params.gain, 1, rtol=1e-9, atol=0)):
        return None
    leak = broadcastable(params.leak)
    tau = 1 / leak if np.any(leak) else np.inf
    cuba = params.synaptic_leak is not None
    if cuba and (late or not params.thresholds):
        return None
    if not params.thresholds:
        return LI(tau, decay_input=decays)
    threshold = broadcastable(params.thresholds[0])
    if late:
        late_params, options = (
            NeuronParams(leak, (threshold,)),
            NeuronOptions(None, decays),
        )
        return Neuron(neurons.late_reset, late_params, options)
    reset = None if params.v_reset is None else float(v_reset.flat[0])
    layer = partial(LIF, tau, decay_input=decays) if np.any(leak) else IF
    if cuba:
        tau_synapse = 1 / broadcastable(params.synaptic_leak)
        layer = partial(CubaLIF, tau, tau_synapse=tau_synapse, decay_input=decays)
    return layer(v_threshold=threshold, v_reset=reset)
