"""A model as the operations that it computes, with neurons whole and constants known.

The model is traced as ``jax.jit`` does. A layer of neurons is one operation of the
trace, since NIR has nodes for it; all else is primitives of JAX, so layers and
functions of any library come out alike.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive, Var

from spikejax._compat import iter_modules
from spikejax.layers import Neuron
from spikejax.nn.recurrent import Recurrent
from spikejax.trace import CALLS

Layers = dict[str, Neuron | Recurrent]  # by path in the model

_neurons = Primitive("neurons")
_neurons.def_abstract_eval(lambda xs, *, path: xs)  # spikes have the type of currents


class Constant(NamedTuple):
    """Value that does not depend on the input, and the path of a parameter in it."""

    value: jax.Array | np.ndarray
    path: str = ""


Handler = Callable[[JaxprEqn, list], Any]


def trace(
    model: nnx.Module, xs: jax.Array
) -> tuple[ClosedJaxpr, list[Constant], Layers]:
    """Return a model in evaluation mode as a jaxpr, its parameters, and its neurons.

    The jaxpr takes the parameters and then xs. A layer of neurons is an equation of the
    primitive ``neurons``, with its path in the model.

    Args:
        model: it is not modified.
        xs: an input of the model; only its shape and type count.
    """
    model = nnx.clone(model)
    model.eval()
    layers: Layers = {}
    # The longest path first: a Recurrent holds a Neuron, and gives it its own path.
    for path, module in sorted(iter_modules(model), key=lambda item: -len(item[0])):
        if isinstance(module, Neuron | Recurrent):
            name = "/".join(map(str, path)) or type(module).__name__
            _neuron(module).name = name
            layers[name] = module
    graphdef, state = nnx.split(model)
    leaves, structure = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))

    def run(values: list[jax.Array], xs: jax.Array) -> Any:
        return nnx.merge(graphdef, jax.tree.unflatten(structure, values))(xs)

    with _whole(layers):
        closed = jax.make_jaxpr(run)([value for _, value in leaves], xs)
    keys = [[str(key.key) for key in path[:-1]] for path, _ in leaves]
    params = [
        Constant(leaf[1], ".".join(k)) for leaf, k in zip(leaves, keys, strict=True)
    ]
    return closed, params, layers


def _neuron(layer: Neuron | Recurrent) -> Neuron:
    return layer.neuron if isinstance(layer, Recurrent) else layer


@contextmanager
def _whole(layers: Layers) -> Iterator[None]:
    """Make each of the layers one operation in what is traced meanwhile."""
    # Nothing overrides a call of these two classes. Replacing modules in the model
    # would miss those in tuples and dicts, and Flax 0.11 has no function for it.
    calls: dict[Any, Callable] = {k: k.__call__ for k in (Neuron, Recurrent)}

    def call(self: Neuron | Recurrent, xs: jax.Array, **options: Any) -> jax.Array:
        path = _neuron(self).name
        if options or path not in layers:  # other models run in other threads
            kind = Recurrent if isinstance(self, Recurrent) else Neuron
            return calls[kind](self, xs, **options)
        return _neurons.bind(xs, path=path)

    try:
        for kind in calls:
            kind.__call__ = call
        yield
    finally:
        for kind, original in calls.items():
            kind.__call__ = original


def evaluate(
    jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Any], handler: Handler
) -> list[Any]:
    """Return the outputs of a jaxpr, equation by equation.

    What depends on constants alone is computed; calls are entered.

    Args:
        jaxpr: of a model.
        consts: arrays.
        inputs: constants and values of the handler's own.
        handler: (equation, inputs) -> value of its first output.
    """
    env: dict[Any, Any] = dict(zip(jaxpr.invars, inputs, strict=True))
    env.update(zip(jaxpr.constvars, map(Constant, consts), strict=True))

    def read(var: Var | Literal) -> Any:
        return Constant(np.asarray(var.val)) if isinstance(var, Literal) else env[var]

    for eqn in jaxpr.eqns:
        values, name = [read(var) for var in eqn.invars], eqn.primitive.name
        known = [value for value in values if isinstance(value, Constant)]
        if name == "platform_index":
            outputs = [Constant(np.asarray(-1))]  # the last branch is the default
        elif name in CALLS:  # of a jaxpr, closed or not
            inner = eqn.params[CALLS[name]]
            body, inside = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
            outputs = evaluate(body, inside, values, handler)
        elif name == "cond" and isinstance(values[0], Constant):
            branch = eqn.params["branches"][int(values[0].value)]
            outputs = evaluate(branch.jaxpr, branch.consts, values[1:], handler)
        elif len(known) == len(values):
            path = next((path for _, path in known if path), "")
            ys = eqn.primitive.bind(*(value for value, _ in known), **eqn.params)
            ys = ys if eqn.primitive.multiple_results else [ys]
            outputs = [Constant(y, path) for y in ys]
        else:
            outputs = [handler(eqn, values)] * len(eqn.outvars)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(var) for var in jaxpr.outvars]


def shape_of(eqn: JaxprEqn) -> tuple[int, ...]:
    """Return the shape of the first output of an equation."""
    aval: Any = eqn.outvars[0].aval
    return aval.shape
