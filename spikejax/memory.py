"""State between calls: a network over slices of a sequence, step by step."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax._compat import List, iter_modules
from spikejax.neurons import State

Model = TypeVar("Model", bound=nnx.Module)
Stepper = Callable[[Any, jax.Array], tuple[Any, jax.Array]]


class Membrane(nnx.Variable):
    """State that a layer keeps from one call to the next."""


class Memory(nnx.Module):
    """State of a layer between calls, held only after ``keep_membranes``."""

    # On the class: Flax fixes the kind of an attribute when an instance first gets it.
    held: Any = None  # leaves of the state
    watch: Callable[[State], Any] | None = None

    def load(self, start: State) -> State:
        """Return the state to begin with: ``start``, at rest, or what is held.

        Raises:
            ValueError: the held state is of another shape.
        """
        if self.watch is not None:
            self.watch(start)
        if self.held is None:
            return start
        leaves, structure = jax.tree.flatten(start)
        held = [leaf[...] for leaf in self.held]
        if [v.shape for v in held] != [v.shape for v in leaves]:
            more = held[0].ndim > leaves[0].ndim
            axis = "A slice keeps its time axis: xs[:, t : t + 1]. " if more else ""
            raise ValueError(
                f"membranes: expected input for membranes {held[0].shape}, got input "
                f"for {leaves[0].shape}. {axis}Call keep_membranes(model, xs) for the "
                "new shape, or drop_membranes(model)."
            )
        return jax.tree.unflatten(structure, held)

    def save(self, state: State) -> None:
        """Keep the state for the next call, if states are held."""
        if self.held is not None:
            for leaf, value in zip(self.held, jax.tree.leaves(state), strict=True):
                leaf[...] = value

    def extend(self, xs: jax.Array, steps: int) -> jax.Array:
        """Return xs [B, T, ...] after the steps before it, which are zeros at rest.

        Keep the last ones for the next call, in float32.
        """
        start = jnp.zeros((xs.shape[0], steps, *xs.shape[2:]), jnp.float32)
        seen = jnp.concatenate([self.load(start).astype(xs.dtype), xs], 1)
        self.save(seen[:, xs.shape[1] :].astype(jnp.float32))
        return seen


def _memories(model: nnx.Module) -> dict[tuple, Memory]:
    found = iter_modules(model)
    return {path: module for path, module in found if isinstance(module, Memory)}


def check_module(who: str, model: nnx.Module) -> None:
    """Check that a model is an instance of nnx.Module.

    Raises:
        ValueError: it is a class, a function, or a result that holds the model.
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(
            f"{who}: expected an nnx.Module, got a {type(model).__name__}. Make an "
            "instance of a class; take .model of a result; wrap a function or Linen's "
            "apply: Function(f, params)."
        )


def evaluation_copy(who: str, model: Model) -> Model:
    """Return a copy of a model, in evaluation mode.

    Raises:
        ValueError: it is a class, a function, or a result that holds the model.
    """
    check_module(who, model)
    model = nnx.clone(model)
    model.eval()
    return model


def keep_membranes(model: Model, xs: jax.Array) -> Model:
    """Keep the state of every neuron between calls from now on, starting from rest.

    Then a sequence may be fed in slices, ``model(xs[:, t : t + 1])``, with the result
    of feeding it whole. States have their full shape from the start. Call it again to
    start from rest. Changes and returns the model; ``drop_membranes`` is the way back.

    Args:
        model: with spiking neurons.
        xs: an example of the input [B, T, ...]; its batch size and shape count.

    Raises:
        ValueError: the model has no spiking neurons, or some at two places.
    """
    check_module("keep_membranes", model)
    drop_membranes(model)
    if not _memories(model):
        raise ValueError(
            "keep_membranes: expected a model with spiking neurons, got "
            f"{type(model).__name__} without any. Only they have membranes. A neuron "
            "that __call__ makes keeps none: make it an attribute."
        )
    graphdef, state = nnx.split(model)

    # Compiled, all but the states at rest is dead code: the network does not run. They
    # are committed to the device of the parameters, as the states of later slices are:
    # otherwise the second slice compiles again.
    @partial(jax.jit, keep_unused=True)
    def starts(state: nnx.State, xs: jax.Array) -> dict[tuple, list[jax.Array]]:
        found: dict[tuple, list[jax.Array]] = {}
        model = nnx.merge(graphdef, state)
        for path, memory in _memories(model).items():
            memory.watch = partial(_note, found, path)
        model(xs)
        return found

    found = starts(state, xs)
    for path, memory in _memories(model).items():
        if path in found:  # the neuron inside of a Recurrent keeps no state of its own
            memory.held = List([Membrane(leaf) for leaf in found[path]])
    return model


def _note(found: dict[tuple, list[jax.Array]], path: tuple, start: State) -> None:
    """Note the state at rest of the neurons at a path.

    Raises:
        ValueError: they are called again, at another place.
    """
    if path in found:
        raise ValueError(
            "keep_membranes: expected neurons that are called at one place, got "
            f"{'/'.join(map(str, path))} at two. Give each place neurons of its own."
        )
    found[path] = jax.tree.leaves(start)


def drop_membranes(model: Model) -> Model:
    """Let every layer start from rest at each call again; changes the model."""
    for memory in _memories(model).values():
        if memory.held is not None:
            del memory.held
    return model


def has_held(model: nnx.Module) -> bool:
    """Return whether a layer keeps its state between calls."""
    return any(memory.held is not None for memory in _memories(model).values())


@partial(jax.jit, static_argnums=0)
def _advance(
    graphdef: nnx.GraphDef, rest: nnx.State, state: nnx.State, xs: jax.Array
) -> tuple[nnx.State, jax.Array]:
    model = nnx.merge(graphdef, state, rest)
    ys = model(xs)
    return nnx.state(model, Membrane), ys


def stepper(model: nnx.Module, xs: jax.Array) -> tuple[nnx.State, Stepper]:
    """Return a model as a pure function of one slice of time, and its first state.

    The answers together are those of the whole sequence. The function is compiled once
    per length of a slice, and works inside ``jax.jit`` and ``jax.lax.scan``.

    Args:
        model: with spiking neurons; it runs in evaluation mode, and is not modified.
        xs: an example of the input [B, T, ...] with any T.

    Raises:
        ValueError: the model has no spiking neurons.

    Examples:
        >>> from spikejax import LIF
        >>> xs = jnp.full((1, 4, 1), 1.5)  # [B, T, features]
        >>> state, step = stepper(LIF(), xs)
        >>> for t in range(4):
        ...     state, spikes = step(state, xs[:, t : t + 1])
        ...     print(spikes.item())
        0.0
        1.0
        0.0
        1.0
    """
    model = evaluation_copy("stepper", model)
    graphdef, state, rest = nnx.split(keep_membranes(model, xs), Membrane, ...)
    return state, partial(_advance, graphdef, rest)
