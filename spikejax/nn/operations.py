"""A model as the operations that it computes, with neurons whole and constants known.

``spikejax.trace`` with another rule: each operation on the input is a site. A layer of
neurons is one operation, since NIR has nodes for it; all else is primitives of JAX, so
layers and functions of any library come out alike.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import JaxprEqn, Primitive

from spikejax import trace
from spikejax._compat import iter_modules
from spikejax.functions import functional
from spikejax.layers import Neuron
from spikejax.nn.recurrent import Recurrent
from spikejax.trace import Match, Pytree, Traced, Value

Layers = dict[str, Neuron | Recurrent]  # by path in the model
# Products with weights. The last is nn.cpu's convolution, which is linear as a whole.
PRODUCTS = ("dot_general", "conv_general_dilated", "_convolve")

_neurons = Primitive("neurons")
_neurons.def_abstract_eval(lambda xs, *, path: xs)  # spikes have the type of currents


class _Operations(NamedTuple):
    """Rule by which all that depends on the input is a site; calls are entered.

    whole: names of functions whose calls are not entered.
    """

    whole: tuple[str, ...] = ()

    def match(self, eqn: JaxprEqn, values: Sequence[Value]) -> Match | None:
        """Return the operation, and the path of its parameters or "weights"."""
        kind = trace.call_name(eqn)
        kind = kind if kind in self.whole else eqn.primitive.name
        chosen = kind == "cond" and values[0].const == trace.PLATFORM
        if kind in trace.CALLS or chosen or not any(v.level for v in values):
            return None
        labels = [v.label for v in values if v.label and not v.level]
        return Match(kind, labels[0] if labels else "weights")

    def level(self, eqn: JaxprEqn, values: Sequence[Value]) -> int:
        """Return 1: nothing but calls is left."""
        return 1


def trace_operations(
    model: nnx.Module, xs: jax.Array, whole: tuple[str, ...] = ()
) -> tuple[Traced, Pytree, Layers]:
    """Return a model in its mode as a jaxpr, its state, and its neurons.

    A layer of neurons is an equation of the primitive ``neurons``, with its path in the
    model.

    Args:
        model: it is not modified.
        xs: an input of the model; only its shape and type count.
        whole: names of functions that are one operation, as nn.cpu's convolution.
    """
    model = nnx.clone(model)
    layers: Layers = {}
    # The longest path first: a Recurrent holds a Neuron, and gives it its own path.
    for path, module in sorted(iter_modules(model), key=lambda item: -len(item[0])):
        if isinstance(module, Neuron | Recurrent):
            name = "/".join(map(str, path)) or type(module).__name__
            _neuron(module).name = name
            layers[name] = module
    f, state = functional(model)
    with _whole(layers):
        traced = trace.trace(f, state, xs, _Operations(whole), enter=True)
    return traced, state, layers


def sum_rows(values: jax.Array) -> jax.Array:
    """Return the sum of each row [B] of [B, ...], in float32."""
    # Exact up to 16 million: sum up rows on the device, and all of them on the host.
    return values.astype(jnp.float32).reshape(len(values), -1).sum(1)


def multiply(eqn: JaxprEqn, operands: Sequence[jax.Array]) -> jax.Array:
    """Return the sums [B] of a product, a site of ``PRODUCTS``, of other operands."""
    operands = [jnp.asarray(v).astype(jnp.float32) for v in operands]
    # JAX 0.10.2 on CPU computes nonsense from a kernel that it knows to be constant.
    operands = jax.lax.optimization_barrier(operands)
    if eqn.primitive.name in PRODUCTS:
        params = eqn.params | {"preferred_element_type": jnp.dtype("float32")}
        return sum_rows(eqn.primitive.bind(*operands, **params))
    return sum_rows(trace.bind(eqn, operands)[0])


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
