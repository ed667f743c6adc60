"""Modules as pure functions, and pure functions, such as Linen's, as modules."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from spikejax.trace import leaf_path

Pytree = Any
Pure = Callable[[Pytree, jax.Array], jax.Array]  # (params, x) -> y


def functional(model: nnx.Module) -> tuple[Callable, Pytree]:
    """Return a module as a pure function (state, xs) -> (ys, state), and its state."""
    graphdef, state = nnx.split(model)

    def f(state: Pytree, xs: jax.Array) -> tuple[jax.Array, Pytree]:
        merged = nnx.merge(graphdef, state)
        ys = merged(xs)
        return ys, nnx.to_pure_dict(nnx.state(merged))

    return f, nnx.to_pure_dict(state)


class Function(nnx.Module):
    """Pure function f(params, x), of Linen or your own, as a module over sequences.

    Args:
        f: (params, x [B, ...]) -> y [B, ...], in evaluation mode.
        params: pytree of arrays. In a dict with 'params', such as Linen's variables,
            only that part is trained.
        time: whether f takes sequences [B, T, ...] itself, as a spiking network does.
            Otherwise every time step is one more image of the batch.

    Raises:
        ValueError: leaves of params have one path where 'params' is left out.
    """

    def __init__(self, f: Pure, params: Pytree, *, time: bool = False):
        self.f, self.time = f, time
        self.structure = jax.tree.structure(params)
        leaves = jax.tree_util.tree_leaves_with_path(params)
        self.paths = tuple(leaf_path(path) for path, _ in leaves)
        if len(set(self.paths)) < len(leaves):
            raise ValueError(
                "Function: expected params whose paths differ without 'params', got "
                f"{', '.join(self.paths)}. Rename one."
            )
        trained = not isinstance(params, dict) or "params" not in params
        self.params = nnx.data({})
        for name, (path, leaf) in zip(self.paths, leaves, strict=True):
            is_param = trained or getattr(path[0], "key", None) == "params"
            self.params[name] = (nnx.Param if is_param else nnx.Variable)(leaf)

    def __call__(self, xs: jax.Array) -> jax.Array:
        """Return f of the sequence xs [B, T, ...], as [B, T, ...]."""
        leaves = [self.params[path][...] for path in self.paths]
        params = jax.tree.unflatten(self.structure, leaves)
        if self.time:
            return self.f(params, xs)
        images = xs.reshape(-1, *xs.shape[2:])
        try:
            ys = self.f(params, images)
        except Exception as error:
            error.add_note(
                f"Function: f was given {images.shape}, of {xs.shape} [B, T, ...]. "
                "Images without time get the axis by images[:, None]."
            )
            raise
        if not isinstance(ys, jax.Array):
            raise ValueError(
                f"Function: expected f to return an array, got a {type(ys).__name__}. "
                "In Linen, call apply without mutable, in evaluation mode."
            )
        return ys.reshape(*xs.shape[:2], *ys.shape[1:])
