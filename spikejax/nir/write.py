"""Networks to NIR, the neuromorphic intermediate representation that chips read.

    graph = to_nir(model, xs, dt=1e-3)
    nir.write("network.nir", graph)

``dt``, the length of a time step in seconds, is all that NIR knows of our steps; how
neurons become equations, and what is exact, stands in ``spikejax.nir.neurons``.
"""

import math
from typing import Any, NamedTuple, NoReturn

import jax
import nir
import numpy as np
from flax import nnx

from spikejax._compat import iter_modules
from spikejax.conversion.spiking import fold_norms
from spikejax.layers import Neuron
from spikejax.nir.graph import Graph
from spikejax.nir.layers import convolution, linear
from spikejax.nir.neurons import EULER, Integration, SoftReset, loop, specs, write
from spikejax.nir.trace import Operation, trace
from spikejax.nn.quant import QuantReLU
from spikejax.nn.recurrent import Recurrent

WHOLE = (nnx.Conv, nnx.Linear, QuantReLU, Graph)  # besides neurons
UNCHANGED = ("copy", "convert_element_type", "sharding_constraint")


def to_nir(
    model: nnx.Module,
    xs: jax.Array,
    *,
    dt: float,
    soft_reset: SoftReset = loop,
    integration: Integration = EULER,
    sum_pool: bool = False,
) -> nir.NIRGraph:
    """A spiking network as a graph of NIR, which answers each time step as it does.

    The model is traced, so its methods may do what they like between its layers, as
    long as NIR can say it: sums (edges that meet), factors, sum and mean pooling,
    means over the image, flattening; a maximum of spikes is their OR, written as
    SumPool2d and Threshold. Norms are folded first. Factors move into the weights that
    follow. Images are channels-first in NIR: kernels, and weights after a flattened
    image, are reordered.

    Not possible, with an error that names the place: time in the model's own code (a
    mean of the logits over T, a ``lax.scan``), products of two values, attention,
    grouped or transposed convolutions, kernels that are not square.

    Args:
        model: network of nnx.Conv, nnx.Linear and neurons; stays as it is.
        xs: an input [B, T, H, W, C] or [B, T, C]; only its shape counts.
        dt: seconds in a time step, > 0. It fixes NIR's time constants and nothing else.
        soft_reset: ``loop`` is exact; ``node`` is for readers that subtract, as Sinabs
            does.
        integration: EULER, or EXPONENTIAL for readers that integrate so.
        sum_pool: write a mean over windows as SumPool2d, with its factor in the weights
            that follow, for readers without AvgPool2d, as Sinabs and Norse.
    """
    if not 0 < dt < math.inf:
        raise ValueError(f"to_nir: expected dt > 0 in seconds, got {dt}.")
    if not callable(soft_reset):
        raise ValueError(
            f"to_nir: expected soft_reset nir.loop or nir.node, got {soft_reset!r}."
        )
    if xs.ndim not in (3, 4, 5):
        raise ValueError(
            f"to_nir: expected an input [B, T, H, W, C] or [B, T, C], got {xs.shape}."
        )
    if any(isinstance(m, nnx.BatchNorm) for _, m in iter_modules(model)):
        model = fold_norms(model, xs)
    traced = trace(model, xs, WHOLE, "to_nir")
    return _Writer(dt, soft_reset, integration, sum_pool).write(traced, xs.shape)


class _Value(NamedTuple):
    """A value in the network: the sum of what some nodes give, times a factor.

    shape: of one example at one step, channels-last. full: with the leading axes.
    unflat: the shape that it was flattened from. window: of a sum over windows, its
    node and size. binary: whether it is either 0 or the factor.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    full: tuple[int, ...]
    factor: float = 1.0
    unflat: tuple[int, ...] | None = None
    window: tuple[str, int] | None = None
    binary: bool = False


def _channels_first(shape):
    return (shape[-1], *shape[:-1])


class _Writer:
    """Writes operations as nodes, and keeps what each value has become."""

    def __init__(self, dt, soft_reset, integration, sum_pool):
        self.dt, self.soft_reset, self.integration = dt, soft_reset, integration
        self.sum_pool = sum_pool
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []

    def write(self, traced, shape) -> nir.NIRGraph:
        """The graph."""
        example = shape[2:]
        self.nodes["input"] = nir.Input({"input": np.array(_channels_first(example))})
        values = {0: _Value(("input",), example, shape)}
        self.uses = [i for op in traced.operations for i in op.inputs if type(i) is int]
        for op in traced.operations:
            inputs = [values[i] if type(i) is int else i for i in op.inputs]
            values[op.output] = self._operation(op, inputs)
        output = values[traced.output]
        if output.unflat is not None:
            raise ValueError(
                f"to_nir: expected an output that is no flattened image, got one of "
                f"{output.unflat}, whose order NIR would change. Leave it unflattened."
            )
        final = nir.Output({"output": np.array(_channels_first(output.shape))})
        self._drop_unused(self._add("output", final, self._plain(output)))
        return nir.NIRGraph(self.nodes, self.edges)

    def _drop_unused(self, output):
        used, todo = {"input", output}, [output]
        while todo:
            name = todo.pop()
            new = {a for a, b in self.edges if b == name} - used
            used |= new
            todo += new
        self.nodes = {name: n for name, n in self.nodes.items() if name in used}
        self.edges = [edge for edge in self.edges if set(edge) <= used]

    def _add(self, name, made, value):
        """Adds a node that takes the value, whose factor is for the caller to use."""
        unique, count = name, 1
        while unique in self.nodes:
            count += 1
            unique = f"{name}_{count}"
        self.nodes[unique] = made
        self.edges += [(source, unique) for source in value.sources]
        return unique

    def _plain(self, value, scale=1.0):
        """The value times scale with no factor left, by a Scale where there was one."""
        scale = value.factor * np.asarray(scale, np.float32)
        if np.all(scale == 1):
            return value
        shape = _channels_first(value.shape)
        made = nir.Scale(scale=np.ascontiguousarray(np.broadcast_to(scale, shape)))
        name = self._add("scale", made, value)
        return value._replace(sources=(name,), factor=1.0, window=None, binary=False)

    def _operation(self, op: Operation, inputs) -> _Value:
        first = inputs[0]
        if op.name == "layer":
            return self._layer(op, first)
        if op.name in UNCHANGED:
            return first._replace(full=op.shape, window=None)
        if op.name in ("mul", "div"):
            return self._scaled(op, *inputs)
        if op.name in ("add", "add_any", "sub"):
            return self._sum(op, *inputs)
        if op.name in ("reshape", "squeeze"):
            return self._reshaped(op, first)
        if op.name in ("reduce_sum", "reduce_window_sum", "reduce_window_max"):
            return self._pooled(op, first)
        self._refuse(op, f"the operation {op.name}")

    def _refuse(self, op: Operation, what: str) -> NoReturn:
        hint = "Move it out of the model."
        if op.name in ("max", "custom_jvp_call"):
            hint = "For a ReLU network, call calibrate and convert first."
        if op.name in ("scan", "while"):
            hint = "For recurrent neurons, use spikejax.nn.recurrent.Recurrent."
        at = f" at {op.where}" if op.where else ""
        raise ValueError(f"to_nir: expected what NIR can say, got {what}{at}. {hint}")

    def _scaled(self, op, a, b) -> _Value:
        """A value times or by constants."""
        if isinstance(a, _Value) == isinstance(b, _Value) or (
            op.name == "div" and isinstance(b, _Value)
        ):
            self._refuse(op, "a product of two values or a division by one")
        value, other = (a, b) if isinstance(a, _Value) else (b, a)
        factor = np.asarray(other, np.float64)
        factor = 1 / factor if op.name == "div" else factor
        lead = len(value.full) - len(value.shape)
        factor = np.broadcast_to(factor, value.full)
        if not (factor == factor[(slice(0, 1),) * lead]).all():
            self._refuse(op, "constants that differ from step to step")
        factor = factor[(0,) * lead]
        if (factor != factor.flat[0]).any():
            if value.unflat is not None:
                self._refuse(op, "constants for a flattened image")
            return self._plain(value, np.moveaxis(factor, -1, 0))
        number = float(factor.flat[0])
        if not number:
            self._refuse(op, "a factor of 0")
        (used,) = (i for i in op.inputs if type(i) is int)
        name, size = ("", 0) if self.sum_pool else value.window or ("", 0)
        if math.isclose(number * size, 1, rel_tol=1e-6) and self.uses.count(used) == 1:
            pool = self.nodes[name]
            mean = nir.AvgPool2d(pool.kernel_size, pool.stride, pool.padding)
            self.nodes[name] = mean
            return value._replace(window=None)
        return value._replace(factor=value.factor * number, window=None)

    def _sum(self, op, a, b) -> _Value:
        """Two values that are added: edges that meet."""
        if not (isinstance(a, _Value) and isinstance(b, _Value)):
            self._refuse(op, "the addition of a constant")
        if a.unflat != b.unflat or a.shape != b.shape:
            self._refuse(op, "a sum of an image and a flattened image")
        if op.name == "sub":
            b = b._replace(factor=-b.factor)
        if a.factor != b.factor:
            a, b = self._plain(a), self._plain(b)
        if set(a.sources) & set(b.sources):  # NIR has no two edges between two nodes
            made = nir.Scale(scale=np.ones(_channels_first(b.shape), np.float32))
            b = b._replace(sources=(self._add("scale", made, b),))
        sources = (*a.sources, *b.sources)
        return a._replace(sources=sources, full=op.shape, window=None, binary=False)

    def _reshaped(self, op, value) -> _Value:
        """The same for each example, or an image that is flattened."""
        rank = len(value.shape)
        if op.shape[len(op.shape) - rank :] == value.shape:
            return value._replace(full=op.shape, window=None)
        lead = math.prod(value.full[: len(value.full) - rank])
        size = math.prod(value.shape)
        if op.shape[-1] != size or math.prod(op.shape[:-1]) != lead:
            self._refuse(op, f"a change of shape from {value.full} to {op.shape}")
        shape = _channels_first(value.shape)
        made = nir.Flatten({"input": np.array(shape)}, start_dim=0, end_dim=-1)
        name = self._add("flatten", made, value)
        unflat = value.shape if math.prod(value.shape[:-1]) > 1 else None
        flat = value._replace(sources=(name,), shape=(size,), full=op.shape)
        return flat._replace(unflat=unflat, window=None)

    def _pooled(self, op, value) -> _Value:
        """Sums over windows or over the image; the OR of spikes."""
        rank = len(value.shape)
        lead = len(value.full) - rank
        if rank != 3:
            self._refuse(op, f"the operation {op.name} on an input that is no image")
        if op.name == "reduce_sum":
            if tuple(op.params["axes"]) != (lead, lead + 1):
                self._refuse(op, f"a sum over the axes {tuple(op.params['axes'])}")
            size = stride = value.shape[:2]
            padding = (0, 0)
        else:
            size, stride, padding = self._window(op, lead)
        made = nir.SumPool2d(np.array(size), np.array(stride), np.array(padding))
        name = self._add("pool", made, value)
        window, binary = (name, math.prod(size)), False
        shape = op.shape[len(op.shape) - rank :]
        if op.name == "reduce_window_max":
            if not value.binary or value.factor < 0:
                self._refuse(op, "a maximum of what is no spikes (pool by the mean)")
            half = np.full(_channels_first(shape), 0.5)
            pooled = _Value((name,), shape, op.shape)
            name = self._add("or", nir.Threshold(threshold=half), pooled)
            window, binary = None, True
        pooled = value._replace(
            sources=(name,), shape=shape, full=op.shape, window=window, binary=binary
        )
        if op.name == "reduce_sum":
            whole = (1, 1, value.shape[-1])
            pooled = pooled._replace(shape=whole, full=(*op.shape[:lead], *whole))
            return self._reshaped(op, pooled)._replace(window=window)
        return pooled

    def _window(self, op, lead):
        """Size, stride and padding of a window in the image."""
        p = op.params
        image = slice(lead, lead + 2)
        sizes, strides = list(p["window_dimensions"]), list(p["window_strides"])
        pads = list(p["padding"])
        found = tuple(sizes[image]), tuple(strides[image]), pads[image]
        del sizes[image], strides[image], pads[image]
        dilations = (*p["base_dilation"], *p["window_dilation"])
        uneven = any(a != b for a, b in found[2])
        others = {*sizes, *strides, *dilations} != {1} or any(map(any, pads))
        if uneven or others:
            self._refuse(op, "pooling with uneven padding, dilated or not of the image")
        return found[0], found[1], tuple(a for a, _ in found[2])

    def _layer(self, op, value) -> _Value:
        layer, path = op.params["layer"], op.params["path"]
        name = path.replace("/", ".") or "layer"
        if isinstance(layer, Neuron):
            return self._neurons(op, name, layer, value)
        if isinstance(layer, nnx.Conv):
            made = convolution(path, layer, value.shape, value.factor)
        elif isinstance(layer, nnx.Linear):
            made = linear(path, layer, value.shape, value.unflat, value.factor)
        elif isinstance(layer, QuantReLU):
            raise ValueError(
                f"to_nir: expected spiking neurons, got QuantReLU at {path!r}. Call "
                "convert first."
            )
        else:
            raise ValueError(
                f"to_nir: expected layers, got a graph at {path!r} that from_nir read. "
                "Keep the graph that it was read from."
            )
        lead = len(value.full) - len(value.shape)
        return _Value((self._add(name, made, value),), op.shape[lead:], op.shape)

    def _neurons(self, op, name, layer, value) -> _Value:
        shape = _channels_first(value.shape)
        found = specs(op.params["path"], layer, shape, value.factor)
        entries, outputs = [], []
        for k, spec in enumerate(found, 1):
            label = f"{name}.{k}" if len(found) > 1 else name
            part = write(label, spec, self.dt, self.integration, self.soft_reset)
            renamed = {
                n: self._add(n, made, _NOTHING) for n, made in part.nodes.items()
            }
            self.edges += [(renamed[a], renamed[b]) for a, b in part.edges]
            entries += [renamed[entry] for entry in part.entries]
            outputs += [(renamed[output], weight) for output, weight in part.outputs]
        self.edges += [(a, entry) for entry in entries for a in value.sources]
        unit = outputs[0][1]
        ones = [value._replace(sources=(o,), factor=w / unit) for o, w in outputs]
        sources = tuple(self._plain(one).sources[0] for one in ones)
        if isinstance(layer, Recurrent):
            if value.unflat is not None:
                self._refuse(op, "a flattened image before recurrent neurons")
            weights = np.asarray(layer.recurrent.kernel[...]).T * unit / value.factor
            made = nir.Linear(weight=weights.astype(np.float32))
            back = self._add(f"{name}.recurrent", made, _Value(sources, (), ()))
            self.edges += [(back, entry) for entry in entries]
        return value._replace(
            sources=sources,
            factor=unit,
            window=None,
            binary=[len(s.thresholds) for s in found] == [1],
        )


_NOTHING = _Value((), (), ())
