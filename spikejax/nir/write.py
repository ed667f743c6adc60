"""Networks to NIR, the neuromorphic intermediate representation that chips read.

    graph = to_nir(model, xs, dt=1e-3)
    nir.write("network.nir", graph)

``dt``, the length of a time step in seconds, is all that NIR knows of our steps.
``spikejax.nir.neurons`` says how neurons become equations, and what is exact.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NoReturn

import jax
import nir
import numpy as np
from flax import nnx
from jax.extend.core import JaxprEqn
from jax.typing import ArrayLike

from spikejax.memory import evaluation_copy
from spikejax.nir import layers
from spikejax.nir.graph import reachable
from spikejax.nir.neurons import EULER, Integration, SoftReset, loop, specs, write
from spikejax.nn.operations import Layers, trace_operations
from spikejax.nn.recurrent import Recurrent
from spikejax.trace import Site, aval, run, where

PRODUCT = "a product of two values or a division by one"
HINTS = {
    "max": "For a ReLU network, first convert(calibrate(model, xs).model, xs).",
    "scan": "For recurrent neurons, use spikejax.nn.recurrent.Recurrent.",
}


def to_nir(
    model: nnx.Module,
    xs: jax.Array,
    *,
    dt: float,
    soft_reset: SoftReset = loop,
    integration: Integration = EULER,
    sum_pool: bool = False,
) -> nir.NIRGraph:
    """Return a spiking network as a graph of NIR, with its answer at each time step.

    The model is traced, so its methods may do anything between its layers that NIR has
    nodes for: sums (edges that meet), factors, sum and mean pooling, means over the
    image, flattening, channels side by side; a maximum of spikes is their OR, for each
    threshold, written as SumPool2d and Threshold. Factors move into the weights that
    follow, norms into those before. Images are channels-first in NIR: kernels, and
    weights after a flattened image, are reordered.

    Not possible, with an error that names the line: time in the model's own code (a
    mean of the logits over T, a ``lax.scan``), products of two values, attention,
    grouped or transposed convolutions, kernels that zeros at the edges cannot make
    square with the same padding on all sides, such as (3, 2).

    Args:
        model: network of convolutions, linear layers and neurons; it is not modified.
        xs: an input [B, T, H, W, C] or [B, T, C]; only its shape counts.
        dt: seconds per time step, > 0. It fixes NIR's time constants and nothing else.
        soft_reset: ``loop`` is exact; ``node`` is for readers that subtract, as Sinabs
            does. Neurons with several thresholds are loops in any case.
        integration: EULER, or EXPONENTIAL for readers that integrate so.
        sum_pool: write a mean over windows as SumPool2d, with its factor in the weights
            that follow, for readers without AvgPool2d, as Sinabs and Norse.

    Raises:
        ValueError: an argument is out of its range, or NIR cannot say what the model
            computes.
    """
    rules = callable(soft_reset) and isinstance(integration, Integration)
    if not 0 < dt < math.inf or xs.ndim not in (3, 4, 5) or not rules:
        raise ValueError(
            "to_nir: expected dt > 0 in seconds, an input [B, T, H, W, C] or "
            "[B, T, C], soft_reset=spikejax.nir.loop or node, and "
            "integration=spikejax.nir.EULER or EXPONENTIAL, got "
            f"{dt}, {xs.shape}, a {type(soft_reset).__name__} and a "
            f"{type(integration).__name__}."
        )
    model = evaluation_copy("to_nir", model)
    traced, state, neurons = trace_operations(model, xs)
    writer = _Writer(neurons, dt, soft_reset, integration, sum_pool)
    shape = xs.shape[2:]
    node = nir.Input({"input": np.array(_channels_first(shape))})
    value = _Value((writer.add("input", node),), shape)
    (output, _), _ = run(traced, state, value, writer.operation)
    if not isinstance(output, _Value):
        refuse("an output that is not one array, made from the input")
    if output.unflat is not None:  # NIR would have it in another order
        refuse("an output that is a flattened image")
    node = nir.Output({"output": np.array(_channels_first(output.shape))})
    return writer.graph(writer.add("output", node, writer.plain(output)))


@dataclass(frozen=True)  # a NamedTuple would be a pytree, and a value is a leaf
class _Value:
    """Value in the network: the sum of the outputs of some nodes, times a factor.

    shape: of one example at one step, channels-last.
    unflat: shape that it was flattened from.
    nested: nodes are spike trains, each of which fires only where the one before does.
    """

    sources: tuple[int, ...]  # numbers of nodes
    shape: tuple[int, ...]
    factor: float = 1.0
    unflat: tuple[int, ...] | None = None
    nested: bool = False


def _channels_first(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[-1], *shape[:-1])


def refuse(
    what: str, eqn: JaxprEqn | None = None, hint: str = "Move it out of the model."
) -> NoReturn:
    """Raise an error with the line of the model that NIR has no nodes for."""
    at = ""
    if eqn is not None:
        at = f" at {where(eqn)}" if where(eqn) else ""  # inside of a library
        hint = HINTS.get(eqn.primitive.name, hint)
    raise ValueError(f"to_nir: expected what NIR can say, got {what}{at}. {hint}")


def _shapes(eqn: JaxprEqn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the first input and of the output."""
    return aval(eqn.invars[0]).shape, aval(eqn.outvars[0]).shape


@dataclass
class _Writer:
    """Nodes and edges of a graph, written operation by operation."""

    neurons: Layers
    dt: float
    soft_reset: SoftReset
    integration: Integration
    sum_pool: bool
    # Nodes with the names that they want; edges between their numbers.
    nodes: list[tuple[str, nir.NIRNode]] = field(default_factory=list)
    edges: list[tuple[int, int]] = field(default_factory=list)

    def add(self, name: str, node: nir.NIRNode, value: _Value | None = None) -> int:
        """Add a node that takes a value without its factor, and return its number."""
        self.nodes.append((name, node))
        number = len(self.nodes) - 1
        self.edges += [(source, number) for source in value.sources] if value else []
        return number

    def graph(self, output: int) -> nir.NIRGraph:
        """Return the nodes that lead to the output, each with a name of its own."""
        # Nodes that were changed have copies, so the first of them has no use left.
        used = reachable(output, [(b, a) for a, b in self.edges])
        names: dict[int, str] = {}
        for number, (name, _) in enumerate(self.nodes):
            if number in (0, output) or number in used:
                taken, count = set(names.values()), 1
                names[number] = name
                while names[number] in taken:
                    count += 1
                    names[number] = f"{name}_{count}"
        return nir.NIRGraph(
            {name: self.nodes[number][1] for number, name in names.items()},
            [(names[a], names[b]) for a, b in self.edges if {a, b} <= set(names)],
        )

    def plain(self, value: _Value, scale: float | np.ndarray = 1.0) -> _Value:
        """Return the value times a scale, channels-first, without a factor."""
        scale = np.asarray(value.factor * np.asarray(scale), np.float32)
        if np.all(scale == 1):
            return value
        scale = np.broadcast_to(scale, _channels_first(value.shape))
        name = self.add("scale", nir.Scale(np.ascontiguousarray(scale)), value)
        return replace(value, sources=(name,), factor=1.0, nested=False)

    def operation(
        self, number: int, site: Site, inputs: list, given: None
    ) -> tuple[_Value, None]:
        """Return the output of an equation: a handler of ``spikejax.trace``."""
        eqn, first = site.eqn, inputs[0]
        name = eqn.primitive.name
        linear = sum(isinstance(value, _Value) for value in inputs) == 1
        if name in ("copy", "convert_element_type", "optimization_barrier"):
            value = first
        elif name == "neurons":
            value = self.spikes(eqn, first)
        elif name in ("reshape", "squeeze", "expand_dims"):
            value = self.reshaped(eqn, first)
        elif name.startswith("reduce_") and name.endswith(("sum", "max")):
            value = self.pooled(eqn, first)
        elif name == "concatenate":
            value = self.joined(eqn, inputs)
        elif name == "neg":
            value = replace(first, factor=-first.factor)
        elif name in ("conv_general_dilated", "dot_general") and linear:
            value = self.weighted(eqn, first, inputs[1], site.name.replace("/", "."))
        elif name in ("mul", "div", "add", "add_any", "sub") and linear:
            value = self.affine(eqn, *inputs)
        elif name in ("add", "add_any", "sub"):
            value = self.total(eqn, *inputs)
        else:
            product = name in ("mul", "div", "dot_general", "conv_general_dilated")
            refuse(PRODUCT if product else f"the operation {name}", eqn)
        return value, None

    def weighted(
        self, eqn: JaxprEqn, value: Any, weights: ArrayLike, name: str
    ) -> _Value:
        """Return the output of a convolution or a linear layer."""
        if not isinstance(value, _Value):
            refuse("weights on the left of a product", eqn)
        kernel = np.asarray(weights, np.float32) * np.float32(value.factor)
        before, after = _shapes(eqn)
        node: nir.NIRNode | None = None
        if eqn.primitive.name == "conv_general_dilated":
            node = layers.convolution(kernel, value.shape[:-1], eqn.params)
            what = (
                f"a convolution of kernel {kernel.shape[:-2]}, padding "
                f"{eqn.params['padding']}, {eqn.params['feature_group_count']} groups "
                "(NIR 1.0 has one group, kernels over 1 or 2 axes that zeros can make "
                "square, and the same padding with zeros on both sides)"
            )
        else:
            if len(value.shape) == 1:
                node = layers.linear(kernel, len(before), value.unflat, eqn.params)
            what = (
                f"a linear layer of an input {value.shape}, not of the last axis of a "
                "vector (for an image, take a convolution with a kernel of (1, 1))"
            )
        if node is None:
            refuse(what, eqn)
        shape = after[len(before) - len(value.shape) :]
        return _Value((self.add(name, node, value),), shape)

    def affine(self, eqn: JaxprEqn, a: Any, b: Any) -> _Value:
        """Return a value times or plus constants: a factor, or changed weights."""
        value, constant = (a, b) if isinstance(a, _Value) else (b, a)
        name = eqn.primitive.name
        if name == "div" and value is b:
            refuse(PRODUCT, eqn)
        each = np.broadcast_to(np.asarray(constant, np.float64), _shapes(eqn)[1])
        number = each[(0,) * (each.ndim - len(value.shape))]
        if not (each == number).all():
            refuse("constants that differ from step to step", eqn)
        number = np.moveaxis(number, -1, 0)
        gain, shift = np.ones_like(number), number
        if name in ("mul", "div"):
            gain, shift = number if name == "mul" else 1 / number, None
        elif name == "sub":
            gain, shift = (gain, -number) if value is a else (-gain, number)
        if value.unflat is None:  # of a sum, one node takes the shift
            own = None if shift is None else shift / value.factor
            first, *others = value.sources
            changed = [self.absorbed(first, gain, own)]
            changed += [self.absorbed(other, gain, None) for other in others]
            if None not in changed:
                return replace(value, sources=tuple(changed))
        uniform = (gain == gain.flat[0]).all()
        flattened = value.unflat is not None and not uniform
        if flattened or (shift is not None and shift.any()):
            refuse("the addition of a constant, or factors of a flattened image", eqn)
        if not uniform or not gain.any():  # a factor of 0 could not be divided out
            return self.plain(value, gain)
        return replace(value, factor=value.factor * float(gain.flat[0]))

    def absorbed(
        self, number: int, gain: np.ndarray, shift: np.ndarray | None
    ) -> int | None:
        """Return the number of a node for gain y + shift, None if no node does it."""
        label, node = self.nodes[number]
        before = [a for a, b in self.edges if b == number]
        changed = layers.absorb(node, gain, shift, mean=not self.sum_pool)
        if isinstance(node, nir.Flatten):  # of a sum over the image, before its factor
            is_sum = isinstance(self.nodes[before[0]][1], nir.SumPool2d)
            pool = self.absorbed(before[0], gain, shift) if is_sum else None
            changed, before = (None, []) if pool is None else (node, [pool])
        if changed is None:
            return None
        copy = self.add(label, changed)  # a copy: the value may have another use
        self.edges += [(a, copy) for a in before]
        return copy

    def total(self, eqn: JaxprEqn, a: _Value, b: _Value) -> _Value:
        """Return the sum of two values: edges that meet."""
        if a.unflat != b.unflat or a.shape != b.shape:
            refuse("a sum of an image and a flattened image", eqn)
        if eqn.primitive.name == "sub":
            b = replace(b, factor=-b.factor)
        if a.factor != b.factor:
            a, b = self.plain(a), self.plain(b)
        if set(a.sources) & set(b.sources):  # NIR has no two edges between two nodes
            node = nir.Scale(np.ones(_channels_first(b.shape), np.float32))
            b = replace(b, sources=(self.add("scale", node, b),))
        return replace(a, sources=(*a.sources, *b.sources), nested=False)

    def joined(self, eqn: JaxprEqn, values: list) -> _Value:
        """Return channels side by side: the sum of values, each moved to its place."""
        shape, sources, first = _shapes(eqn)[1], [], 0
        known = all(isinstance(v, _Value) and v.unflat is None for v in values)
        size = values[0].shape[:-1] if known else ()
        if not known or eqn.params["dimension"] != len(shape) - 1 or len(size) == 1:
            refuse("values side by side that are not the channels of images", eqn)
        for value in values:
            count = value.shape[-1]
            place = np.zeros((shape[-1], count), np.float32)
            place[range(first, first + count), range(count)] = value.factor
            first += count
            node: nir.NIRNode = nir.Linear(place)
            if size:
                kernel, bias = place[:, :, None, None], np.zeros(len(place), np.float32)
                node = nir.Conv2d(size, kernel, (1, 1), (0, 0), (1, 1), 1, bias)
            sources.append(self.add("join", node, value))
        return _Value(tuple(sources), (*size, first))

    def reshaped(self, eqn: JaxprEqn, value: _Value) -> _Value:
        """Return the same for each example, or an image that is flattened."""
        before, after = _shapes(eqn)
        rank, size = len(value.shape), math.prod(value.shape)
        if after[len(after) - rank :] == value.shape:
            return value
        lead = before[: len(before) - rank]
        if after[-1] != size or math.prod(after[:-1]) != math.prod(lead):
            refuse(f"a change of shape from {before} to {after}", eqn)
        image = np.array(_channels_first(value.shape))
        node = nir.Flatten({"input": image}, start_dim=0, end_dim=-1)
        number = self.add("flatten", node, value)
        unflat = value.shape if size > value.shape[-1] else None
        flat = replace(value, sources=(number,), shape=(size,), unflat=unflat)
        return replace(flat, nested=False)

    def pooled(self, eqn: JaxprEqn, value: _Value) -> _Value:
        """Return sums over windows or over the image, or the OR of spikes."""
        name, p = eqn.primitive.name, eqn.params
        before, after = _shapes(eqn)
        lead = len(before) - 3
        if len(value.shape) != 3:
            refuse(f"the operation {name} on an input that is not an image", eqn)
        size = stride = value.shape[:2]
        padding, shape = [0, 0], (1, 1, value.shape[-1])
        if "window" in name:
            windows, image = p["window_dimensions"], slice(lead, lead + 2)
            size, stride = windows[image], p["window_strides"][image]
            padding, shape = [low for low, _ in p["padding"][image]], after[lead:]
            others = (*range(lead), -1)
            if (
                any(windows[k] != 1 or after[k] != before[k] for k in others)
                or {*p["base_dilation"], *p["window_dilation"]} != {1}
                or any(low != high for low, high in p["padding"][image])
            ):
                refuse(
                    "pooling with uneven padding, dilated or not of the image",
                    eqn,
                    hint="Take the same padding on both sides, or none.",
                )
        elif tuple(p["axes"]) != (lead, lead + 1):
            what = "a sum" if name.endswith("sum") else "a maximum"
            refuse(f"{what} over the axes {tuple(p['axes'])}", eqn)
        node = nir.SumPool2d(np.array(size), np.array(stride), np.array(padding))

        def pool(*sources: int) -> _Value:
            one = replace(value, sources=sources)
            return replace(one, sources=(self.add("pool", node, one),), shape=shape)

        if name.endswith("sum"):
            pooled = replace(pool(*value.sources), nested=False)
        elif not value.nested or value.factor < 0:
            refuse(
                "a maximum over windows of what is not spikes",
                eqn,
                hint="Pool by the mean (--pool avg, pool=nnx.avg_pool) and train "
                "again, or pool the spikes of neurons.",
            )
        else:  # a sum of 0s and 1s is above 1/2 where one of them is 1
            half = nir.Threshold(np.full(_channels_first(shape), 0.5))
            ors = [self.add("or", half, pool(source)) for source in value.sources]
            pooled = replace(value, sources=tuple(ors), shape=shape)
        return pooled if "window" in name else self.reshaped(eqn, pooled)

    def spikes(self, eqn: JaxprEqn, value: _Value) -> _Value:
        """Return the output of a layer of neurons."""
        path = eqn.params["path"]
        layer, name = self.neurons[path], path.replace("/", ".")
        neuron = layer.neuron if isinstance(layer, Recurrent) else layer
        found = specs(path, neuron, value.shape, value.factor, self.integration)
        entries: list[int] = []
        outputs: list[tuple[int, np.ndarray]] = []
        for k, spec in enumerate(found, 1):
            label = f"{name}.{k}" if len(found) > 1 else name
            part = write(label, spec, self.dt, self.integration, self.soft_reset)
            number = {key: self.add(key, node) for key, node in part.nodes.items()}
            self.edges += [(number[a], number[b]) for a, b in part.edges]
            entries.append(number[part.entry])
            outputs += [(number[o], spec.full(weight)) for o, weight in part.outputs]
        if isinstance(layer, Recurrent) and len(entries) > 1:
            # One place where currents and spikes that come back meet: the loops close
            # there, and all membranes see the spikes of the step before.
            ones = nir.Scale(scale=found[0].full(1.0))
            common = self.add(f"{name}.input", ones)
            self.edges += [(common, entry) for entry in entries]
            entries = [common]
        self.edges += [(a, entry) for entry in entries for a in value.sources]
        # The factor of all outputs is that of the first; the others get a Scale.
        weight = outputs[0][1]
        unit = float(weight.flat[0]) if (weight == weight.flat[0]).all() else 1.0
        fired = replace(value, factor=1.0, nested=False)
        ones = [self.plain(replace(fired, sources=(o,)), w / unit) for o, w in outputs]
        fired = replace(fired, sources=tuple(one.sources[0] for one in ones))
        if isinstance(layer, Recurrent):
            if value.unflat is not None:
                refuse("a flattened image before recurrent neurons", eqn)
            # Spikes come without their factor, and r holds that of the currents.
            weights = np.asarray(layer.recurrent.kernel[...]).T * unit / value.factor
            back = nir.Linear(weight=weights.astype(np.float32))
            number = self.add(f"{name}.recurrent", back, fired)
            self.edges += [(number, entry) for entry in entries]
        (*more, spec), weights = found, [np.asarray(w) for _, w in outputs]
        rising = all(np.all(a <= b) for a, b in pairwise(spec.thresholds))
        same = all(np.all(w == weights[0]) for w in weights)
        nested = not more and bool(spec.thresholds) and rising and same
        return replace(fired, factor=unit, nested=nested)
