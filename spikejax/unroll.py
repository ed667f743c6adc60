"""Repeat a cell over the time axis: the one file that knows about time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

Pytree = Any
Step = Callable[[Pytree, Pytree, Pytree], tuple[Pytree, Pytree]]

UNROLLED = 4  # up to so many steps are written out, so that XLA fuses them
# On a TPU. There a loop over 10 steps copies its arrays into another layout and back:
# by the compiler's model, twice the cycles.
UNROLLED_ON_TPU = 16


def unroll(
    cell: Step, params: Pytree, state: Pytree, xs: Pytree
) -> tuple[Pytree, Pytree]:
    """Run ``cell(params, state, x) -> (state, y)`` over the time steps of xs.

    Up to 4 steps, on a TPU 16, are written out one by one; more run in a
    ``jax.lax.scan``, whose backward pass keeps xs alone, and computes the states again.
    Both give one answer.

    Args:
        cell: one step, a pure function.
        params: handed to every step.
        state: pytree before the first step; keeps shapes and dtypes.
        xs: array [B, T, ...] with T >= 1, or a pytree of them.

    Returns:
        state after the last step, and the outputs [B, T, ...].

    Raises:
        ValueError: xs has no time axis, or no steps.
    """
    leaves = jax.tree.leaves(xs)
    if not all(x.ndim > 1 and x.shape[1] for x in leaves):
        raise ValueError(
            "unroll: expected xs [B, T, ...] with T >= 1, got shape "
            f"{leaves[0].shape}. For one time step, add the time axis: x[:, None]."
        )
    steps = leaves[0].shape[1]
    if steps <= UNROLLED:
        return _write(partial(cell, params), (), state, xs)
    # Arrays that the cell closes over become arguments: a function with a derivative of
    # its own has gradients for its arguments alone.
    step, weights = jax.closure_convert(partial(cell, params), state, _at(xs, 0))
    return _loop(step, weights, state, xs)


@partial(jax.jit, static_argnums=0, inline=True)
def unroll_compiled(
    cell: Step, params: Pytree, state: Pytree, xs: Pytree
) -> tuple[Pytree, Pytree]:
    """Run ``unroll``, compiled once per cell and shape where it is called eagerly.

    Args:
        cell: as in ``unroll``, hashable, closing over no arrays.
        params, state, xs: as in ``unroll``.
    """
    return unroll(cell, params, state, xs)


# A plain scan would keep every intermediate of every step for its backward pass: twice
# the memory of this one for a cascade of two thresholds at T = 256.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loop(
    step: Step, weights: Pytree, state: Pytree, xs: Pytree
) -> tuple[Pytree, Pytree]:
    """Run the steps in a loop that reads and writes in place: no axis is moved."""
    return _by_platform(
        partial(_write, step),
        lambda *given: _run(step, *given)[0],
        (weights, state, xs),
    )


def _by_platform(written: Callable, loop: Callable, given: tuple) -> Pytree:
    """Return the function of (weights, state, xs, ...) that is faster on a platform."""
    if jax.tree.leaves(given[2])[0].shape[1] > UNROLLED_ON_TPU:
        return loop(*given)
    return jax.lax.platform_dependent(*given, tpu=written, default=loop)


def _write(
    step: Callable, weights: Pytree, state: Pytree, xs: Pytree
) -> tuple[Pytree, Pytree]:
    """Run the steps one by one, without a loop in the program."""
    outputs = []
    for t in range(jax.tree.leaves(xs)[0].shape[1]):
        now = jax.tree.map(lambda x, t=t: x[:, t], xs)
        state, y = step(state, now, *weights)
        outputs.append(y)
    return state, jax.tree.map(lambda *ys: jnp.stack(ys, 1), *outputs)


def _run(
    step: Step, weights: Pytree, state: Pytree, xs: Pytree
) -> tuple[tuple[Pytree, Pytree], Pytree]:
    """Return ((last state, outputs), the states before each step [T, ...])."""
    steps = jax.tree.leaves(xs)[0].shape[1]
    _, y = jax.eval_shape(step, state, _at(xs, 0), *weights)
    ys = jax.tree.map(
        lambda y: jnp.zeros((y.shape[0], steps, *y.shape[1:]), y.dtype), y
    )

    def body(carry: tuple, t: jax.Array) -> tuple:
        before, ys = carry
        after, y = step(before, _at(xs, t), *weights)
        return (after, _put(ys, y, t)), before

    return jax.lax.scan(body, (state, ys), jnp.arange(steps))


def _forward(
    step: Step, weights: Pytree, state: Pytree, xs: Pytree
) -> tuple[tuple[Pytree, Pytree], tuple]:
    return _loop(step, weights, state, xs), (weights, state, xs)


def _backward(step: Step, kept: tuple, cotangents: tuple[Pytree, Pytree]) -> tuple:
    def written(*given: Pytree) -> tuple:
        return jax.vjp(partial(_write, step), *given[:3])[1](given[3:])

    return _by_platform(written, partial(_pull, step), (*kept, *cotangents))


def _pull(
    step: Step,
    weights: Pytree,
    state: Pytree,
    xs: Pytree,
    d_state: Pytree,
    d_ys: Pytree,
) -> tuple:
    """Return the gradients of the loop's arguments, step by step from the last."""
    _, states = _run(step, weights, state, xs)

    def body(carry: tuple, given: tuple[jax.Array, Pytree]) -> tuple[tuple, None]:
        d_weights, d_state, d_xs = carry
        t, before = given
        _, pull = jax.vjp(step, before, _at(xs, t), *weights)
        d_state, d_x, *more = pull((d_state, _at(d_ys, t)))
        d_weights = jax.tree.map(jnp.add, d_weights, more)
        return (d_weights, d_state, _put(d_xs, d_x, t)), None

    zeros = jax.tree.map(jnp.zeros_like, (weights, xs))
    steps = jnp.arange(jax.tree.leaves(xs)[0].shape[1])
    first = (zeros[0], d_state, zeros[1])
    return jax.lax.scan(body, first, (steps, states), reverse=True)[0]


_loop.defvjp(_forward, _backward)


def _at(xs: Pytree, t: jax.Array | int) -> Pytree:
    at = partial(jax.lax.dynamic_index_in_dim, index=t, axis=1, keepdims=False)
    return jax.tree.map(at, xs)


def _put(xs: Pytree, x: Pytree, t: jax.Array) -> Pytree:
    put = partial(jax.lax.dynamic_update_index_in_dim, index=t, axis=1)
    return jax.tree.map(put, xs, x)
