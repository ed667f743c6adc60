"""What a model computes: its layers, and the operations that join them.

The model is traced once, as ``jax.jit`` does. Its layers stay whole in the trace; what
its methods do between them (sums, pooling, means, reshaping) are primitives of JAX.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.core import ShapedArray
from jax.extend import source_info_util
from jax.extend.core import Literal, Primitive

from spikejax.conversion.surgery import places
from spikejax.layers import Neuron

INLINED = {  # calls of functions, and the parameter that holds what they compute
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}

_layer = Primitive("layer")
_layer.def_abstract_eval(lambda x, *, place, shape, dtype: ShapedArray(shape, dtype))


class Operation(NamedTuple):
    """One operation of a model.

    name: "layer", or the primitive. inputs: the numbers of its inputs, or arrays where
    they do not depend on the input of the model. output: the number of what it gives.
    shape: the output's. params: the primitive's, or path and layer. where: file and
    line.
    """

    name: str
    inputs: tuple[Any, ...]
    output: int
    shape: tuple[int, ...]
    params: dict[str, Any]
    where: str


class Traced(NamedTuple):
    """The operations of a model in order; values are numbers, and 0 is the input."""

    operations: tuple[Operation, ...]
    output: int


class _Opaque(nnx.Module):
    """Stands for a layer, and appears in a trace as one operation."""

    def __init__(self, inner, place):
        self.inner, self.place = inner, place

    def __call__(self, x, *args, **options):
        if args or options:
            raise ValueError(
                f"trace: expected the layer {self.place!r} to be called with its input "
                f"alone, got {len(args) + len(options)} arguments more."
            )
        y = jax.eval_shape(self.inner, x)
        return _layer.bind(x, place=self.place, shape=y.shape, dtype=y.dtype)


def trace(
    model: nnx.Module, xs: jax.Array, layers: tuple[type, ...], who: str = "trace"
) -> Traced:
    """What a model in evaluation mode computes.

    Args:
        model: stays as it is. Layers must hang in attributes, lists or dicts of it.
        xs: an input of the model; only its shape and type count.
        layers: the modules that stay whole, besides neurons.
        who: the name that errors start with.
    """
    top = nnx.Sequential(nnx.clone(model))  # so that the model itself may be a layer
    top.eval()
    whole = {}
    for place in list(places(top)):
        if isinstance(place.value, (Neuron, *layers)):
            path = place.path.removeprefix("layers/0").removeprefix("/")
            whole[path] = place.value
            place.put(_Opaque(place.value, path))
    jaxpr = jax.make_jaxpr(top)(xs)
    return _Reader(who, whole).read(jaxpr)


class _Reader:
    """Numbers the values of a jaxpr, and works out those that are constant."""

    def __init__(self, who: str, layers: dict[str, nnx.Module]):
        self.who, self.layers = who, layers
        self.count = 0

    def read(self, closed) -> Traced:
        env: dict[Any, Any] = {}
        outputs = closed.jaxpr.outvars
        if len(closed.jaxpr.invars) != 1 or len(outputs) != 1:
            raise ValueError(
                f"{self.who}: expected a model with one input and one output, got "
                f"{len(closed.jaxpr.invars)} and {len(outputs)}."
            )
        env[closed.jaxpr.invars[0]] = 0
        env |= zip(closed.jaxpr.constvars, closed.consts, strict=True)
        operations = tuple(self._walk(closed.jaxpr, env))
        output = env.get(outputs[0]) if not isinstance(outputs[0], Literal) else None
        if not isinstance(output, int):
            raise ValueError(
                f"{self.who}: expected an output that depends on the input, got a "
                "constant."
            )
        return Traced(operations, output)

    def _walk(self, jaxpr, env) -> Iterator[Operation]:
        for eqn in jaxpr.eqns:
            inputs = [
                np.asarray(v.val) if isinstance(v, Literal) else env[v]
                for v in eqn.invars
            ]
            name = eqn.primitive.name
            if name in INLINED:
                yield from self._inline(eqn.params[INLINED[name]], inputs, eqn, env)
            elif not any(isinstance(value, int) for value in inputs):
                answers = eqn.primitive.bind(*inputs, **eqn.params)
                answers = answers if eqn.primitive.multiple_results else [answers]
                env.update(zip(eqn.outvars, answers, strict=True))
            else:
                yield self._operation(eqn, inputs, env)

    def _inline(self, inner, inputs, eqn, env):
        jaxpr = getattr(inner, "jaxpr", inner)
        inside = dict(zip(jaxpr.constvars, getattr(inner, "consts", ()), strict=True))
        inside.update(zip(jaxpr.invars, inputs, strict=True))
        yield from self._walk(jaxpr, inside)
        for outer, var in zip(eqn.outvars, jaxpr.outvars, strict=True):
            literal = isinstance(var, Literal)
            env[outer] = np.asarray(var.val) if literal else inside[var]

    def _operation(self, eqn, inputs, env):
        numbers = []
        for var in eqn.outvars:
            self.count += 1
            env[var] = self.count
            numbers.append(self.count)
        params = eqn.params
        if eqn.primitive is _layer:
            path = params["place"]
            params = {"path": path, "layer": self.layers[path]}
        return Operation(
            eqn.primitive.name,
            tuple(inputs),
            numbers[0],
            eqn.outvars[0].aval.shape,
            params,
            source_info_util.summarize(eqn.source_info).rpartition("/")[-1],
        )
