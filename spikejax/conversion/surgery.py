"""Where modules and functions hang in a model, and how to hang others there."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax.layers import Neuron
from spikejax.nn.quant import QuantReLU


class Place(NamedTuple):
    """Where a module or a function hangs in a model: ``node.key`` or ``node[key]``."""

    path: str
    node: Any
    key: Any
    value: Any

    def put(self, value: nnx.Module) -> None:
        """Hang something else there."""
        if isinstance(self.node, list | dict):
            self.node[self.key] = value
        elif isinstance(self.node, tuple):
            raise ValueError(
                f"convert: expected activations in attributes or lists, got one in a "
                f"tuple at {self.path!r}. Hold it in an nnx.List."
            )
        else:
            setattr(self.node, self.key, nnx.data(value))


def places(model: nnx.Module) -> Iterator[Place]:
    """Yields where modules and functions hang in a model, not those inside of Flax's.

    A module that hangs in two places is entered once.
    """
    seen = set()

    def enter(path, node):
        if id(node) in seen:
            return
        seen.add(id(node))
        for key, value in _children(node):
            place = Place(f"{path}{key}", node, key, value)
            if isinstance(value, nnx.Module) or callable(value):
                yield place
            if _is_open(value):
                yield from enter(f"{place.path}/", value)

    yield from enter("", model)


def _children(node):
    if isinstance(node, list | tuple):
        return list(enumerate(node))
    items = node.items() if isinstance(node, dict) else vars(node).items()
    return [(k, v) for k, v in items if not str(k).startswith("_pytree__")]


def _is_flaxs(value):
    """Whether it is a module of Flax; the norm of td_batch_norm counts as one."""
    own = type(value).__module__.startswith("flax.")
    return own or isinstance(value, nnx.BatchNorm)


def _is_open(value):
    """Whether other modules may hang in it: a container, or a module of the user's."""
    if isinstance(value, QuantReLU | Neuron | nnx.Variable):
        return False
    containers = (nnx.Sequential, getattr(nnx, "List", list), list, tuple, dict)
    is_module = isinstance(value, nnx.Pytree) and not _is_flaxs(value)
    return is_module or isinstance(value, containers)


def _is_activation(value):
    """Whether it maps an array to one of its shape, and is not linear."""
    if isinstance(value, (Neuron, getattr(nnx, "PReLU", Neuron))):  # not in Flax 0.11
        return True
    if _is_flaxs(value) or isinstance(value, type):
        return False
    if isinstance(value, nnx.Pytree) and any(map(_is_open, _values(value))):
        return False
    x = jnp.linspace(-3, 3, 63).reshape(1, 1, 3, 7, 3)
    try:
        y, twice, negative = value(x), value(2 * x), value(-x)
        if y.shape != x.shape:
            return False
        return not (jnp.allclose(twice, 2 * y) and jnp.allclose(negative, -y))
    except Exception:  # takes something else than one array
        return False


def _values(node):
    return [value for _, value in _children(node)]


def activations(who: str, model: nnx.Module, *, relu: bool) -> list[Place]:
    """The places of QuantReLU (and of nnx.relu); ValueError for other activations."""
    found = []
    for place in places(model):
        kinds = isinstance(place.value, QuantReLU), place.value is nnx.relu
        if kinds[0] or (relu and kinds[1]):
            found.append(place)
        elif kinds[1]:
            raise ValueError(
                f"{who}: expected QuantReLU, got a plain ReLU at {place.path!r}. "
                "Call calibrate(model, images) first."
            )
        elif _is_activation(place.value):
            name = getattr(place.value, "__name__", type(place.value).__name__)
            raise ValueError(
                f"{who}: expected {'nnx.relu or ' if relu else ''}QuantReLU for every "
                f"activation, got {name} at {place.path!r}, which cannot be converted."
            )
    if not found:
        raise ValueError(
            f"{who}: expected a model with {'nnx.relu or ' if relu else ''}QuantReLU, "
            f"found none in {type(model).__name__}. Activations must be attributes of "
            "modules; those called by name inside of a method are not seen."
        )
    return found


def check_model(who: str, model: Any) -> None:
    """ValueError for what is no model, as a model together with its swaps."""
    if not isinstance(model, nnx.Module):
        raise ValueError(
            f"{who}: expected a model, got {type(model).__name__}. Of what convert and "
            "calibrate return, take .model."
        )


def check_answer(who: str, shape: tuple[int, ...], of: tuple[int, ...]) -> None:
    """ValueError unless the answer to an input ``of`` a shape keeps batch and time."""
    if shape[:2] != of[:2]:
        raise ValueError(
            f"{who}: expected an answer [B, T, K] to an input {of}, got {shape}. "
            "Images get an axis of time, images[:, None], which the model keeps: "
            "x.reshape(*x.shape[:2], -1), x.mean((-3, -2))."
        )


def check_run(who: str, model: nnx.Module, xs: jax.Array) -> None:
    """ValueError unless the answer to xs keeps batch and time, and each ReLU that acts
    is an attribute, used once.
    """
    named = sum(place.value is nnx.relu for place in places(model))
    graphdef, state = nnx.split(model)
    run = jax.make_jaxpr(lambda state, xs: nnx.merge(graphdef, state)(xs))
    traced = run(state, xs)
    check_answer(who, traced.out_avals[0].shape, xs.shape)
    acting = _relus(traced.jaxpr)
    if acting > named:
        raise ValueError(
            f"{who}: expected every ReLU in an attribute of its own, got {acting} that "
            f"act and {named} such attributes. One that is called by name, or in two "
            "places, would stay a ReLU or mix their membranes."
        )


def _relus(jaxpr) -> int:
    """How often a program calls jax.nn.relu."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.params.get("name") == "relu":
            count += 1
            continue
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            count += _relus(inner) if hasattr(inner, "eqns") else 0
    return count


class Spy(nnx.Module):
    """Stands for a module and notes what goes in and out, in ``log``."""

    def __init__(self, inner, path: str, log: Callable[[tuple], None]):
        self.inner, self.path, self.log = inner, path, log

    def __call__(self, x: jax.Array, *args, **options) -> jax.Array:
        y = self.inner(x, *args, **options)
        self.log((self.path, x, y))
        return y
