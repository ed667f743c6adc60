"""Repeat a cell over the time axis: the one file that knows about time."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spikejax import neurons

Pytree = Any
Cell = Callable[[Pytree, Pytree, Pytree], tuple[Pytree, Pytree]]

UNROLLED = 4  # up to so many steps are written out, so that XLA fuses them
# On a TPU. There a loop copies its arrays into another layout and back: two MS blocks
# at T = 10 take 15.4 million cycles with loops, whose bodies the compiler's model
# counts once, and 11.8 without.
UNROLLED_ON_TPU = 16


def unroll(
    cell: Cell, params: Pytree, state: Pytree, xs: Pytree
) -> tuple[Pytree, Pytree]:
    """Run ``cell(params, state, x) -> (state, y)`` over the time steps of xs.

    Up to 4 steps, on a TPU 16, are written out one by one; more run in a
    ``jax.lax.scan``. Its backward pass keeps one array of the size of xs: the charged
    membranes of a ``neurons.Step`` with phases, in place of xs; of all else xs itself,
    and it computes the states again. All give one answer.

    Args:
        cell: one step, a pure function.
        params: handed to every step.
        state: pytree before the first step; keeps shapes and dtypes.
        xs: array [B, T, ...] with T >= 1, or a pytree of them.

    Returns:
        state after the last step, and the outputs [B, T, ...].

    Raises:
        ValueError: xs has no time axis, or no steps.

    Examples:
        >>> leaky = lambda leak, v, x: ((1 - leak) * v + x, v)
        >>> last, before = unroll(leaky, 0.5, jnp.zeros(1), jnp.ones((1, 3)))
        >>> before.tolist(), last.tolist()
        ([[0.0, 1.0, 1.5]], [1.75])
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
    is_step = isinstance(cell, neurons.Step) and cell.has_phases
    if is_step and xs.dtype == state.dtype:
        return _membrane_loop(cell, params, state, xs)
    # Arrays that the cell closes over become arguments: a function with a derivative of
    # its own has gradients for its arguments alone.
    step, weights = jax.closure_convert(partial(cell, params), state, _at(xs, 0))
    return _loop(step, weights, state, xs)


@partial(jax.jit, static_argnums=0, inline=True)
def unroll_compiled(
    cell: Cell, params: Pytree, state: Pytree, xs: Pytree
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
    step: Callable, weights: Pytree, state: Pytree, xs: Pytree
) -> tuple[Pytree, Pytree]:
    """Run steps (state, x, *weights) -> (state, y), the last of which are arrays."""
    return _compute(step, weights, state, xs)


def _compute(
    step: Callable, weights: Pytree, state: Pytree, xs: Pytree
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
    step: Callable, weights: Pytree, state: Pytree, xs: Pytree
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
    step: Callable, weights: Pytree, state: Pytree, xs: Pytree
) -> tuple[tuple[Pytree, Pytree], tuple]:
    return _loop(step, weights, state, xs), (weights, state, xs)


def _backward(step: Callable, kept: tuple, cotangents: tuple[Pytree, Pytree]) -> tuple:
    def written(*given: Pytree) -> tuple:
        return jax.vjp(partial(_write, step), *given[:3])[1](given[3:])

    return _by_platform(written, partial(_pull, step), (*kept, *cotangents))


def _pull(
    step: Callable,
    weights: Pytree,
    state: Pytree,
    xs: Pytree,
    d_state: Pytree,
    d_ys: Pytree,
) -> tuple:
    """Return the gradients of the loop's arguments, step by step from the last."""
    _, states = _run(step, weights, state, xs)
    leaves, tree = jax.tree.flatten(xs)
    # Masks and counts have no gradient; JAX has a type for that, not for arrays of it.
    is_float = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]

    def body(carry: tuple, given: tuple[jax.Array, Pytree]) -> tuple[tuple, None]:
        d_weights, d_state, d_xs = carry
        t, before = given
        _, pull = jax.vjp(step, before, _at(xs, t), *weights)
        d_state, d_x, *more = pull((d_state, _at(d_ys, t)))
        d_weights = jax.tree.map(jnp.add, d_weights, more)
        floats = list(itertools.compress(jax.tree.leaves(d_x), is_float))
        return (d_weights, d_state, _put(d_xs, floats, t)), None

    zeros = jax.tree.map(
        jnp.zeros_like, (weights, list(itertools.compress(leaves, is_float)))
    )
    steps = jnp.arange(leaves[0].shape[1])
    first = (zeros[0], d_state, zeros[1])
    last = jax.lax.scan(body, first, (steps, states), reverse=True)[0]
    d_weights, d_state, found = *last[:2], iter(last[2])
    d_leaves = [
        next(found) if floats else np.zeros(x.shape, jax.dtypes.float0)
        for x, floats in zip(leaves, is_float, strict=True)
    ]
    return d_weights, d_state, jax.tree.unflatten(tree, d_leaves)


_loop.defvjp(_forward, _backward)


# Where a membrane is charged and then fires, all that the backward pass needs is the
# charged membrane u. It takes the place of x, and later the gradient by x that of u. So
# there is no scratch memory, where the loop above needs an array or two; the CPU time
# is the same for small arrays, and 0.6 of it for large ones. An associative scan over
# time gives the same gradient in up to 6 times the time: benchmarks/parallel.py.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _membrane_loop(
    cell: neurons.Step, params: Pytree, v: jax.Array, xs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Run a cell with the phases ``charge`` and ``fire``; forward it is ``_loop``."""
    return _compute(lambda v, x, params: cell(params, v, x), (params,), v, xs)


def _membrane_write(
    cell: neurons.Step, params: Pytree, v: jax.Array, xs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _write(lambda v, x: cell(params, v, x), (), v, xs)


def _membrane_run(
    cell: neurons.Step, params: Pytree, v: jax.Array, xs: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Return ((last membrane, outputs), the charged membranes)."""
    _, y = jax.eval_shape(cell.fire, params, v)
    ys = jnp.zeros((y.shape[0], xs.shape[1], *y.shape[1:]), y.dtype)

    def body(carry: tuple, t: jax.Array) -> tuple[tuple, None]:
        v, x, us, ys = carry
        u = cell.charge(params, v, x)
        us = _put(us, u, t)
        v, y = cell.fire(params, u)
        # x of the next step is read from the array that has u in it. Read in its own
        # step it would be live while u overwrites it, and XLA would copy all of xs.
        return (v, _at(us, t + 1), us, _put(ys, y, t)), None

    first = v, _at(xs, 0), xs, ys
    (v, _, us, ys), _ = jax.lax.scan(body, first, jnp.arange(xs.shape[1]))
    return (v, ys), us


def _membrane_forward(
    cell: neurons.Step, params: Pytree, v: jax.Array, xs: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    # Steps that are written out keep xs itself, which has the shape and type of us.
    outputs, kept = _by_platform(
        lambda params, v, xs: (_membrane_write(cell, params, v, xs), xs),
        partial(_membrane_run, cell),
        (params, v, xs),
    )
    return outputs, (params, v, kept)


def _membrane_backward(
    cell: neurons.Step, kept: tuple, cotangents: tuple[jax.Array, jax.Array]
) -> tuple:
    def written(*given: Pytree) -> tuple:
        return jax.vjp(partial(_membrane_write, cell), *given[:3])[1](given[3:])

    return _by_platform(written, partial(_membrane_pull, cell), (*kept, *cotangents))


def _membrane_pull(
    cell: neurons.Step,
    params: Pytree,
    start: jax.Array,
    us: jax.Array,
    d_v: jax.Array,
    d_ys: jax.Array,
) -> tuple:
    """Return the gradients of parameters, first membrane and input from membranes."""

    def body(carry: tuple, t: jax.Array) -> tuple[tuple, None]:
        d_params, d_v, u, last, us = carry
        v = jnp.where(t > 0, cell.fire(params, last)[0], start)
        d_fire, d_u = jax.vjp(cell.fire, params, u)[1]((d_v, _at(d_ys, t)))
        x = cell.uncharge(params, v, u)
        d_charge, d_v, d_x = jax.vjp(cell.charge, params, v, x)[1](d_u)
        d_params = jax.tree.map(lambda *d: sum(d), d_params, d_fire, d_charge)
        us = _put(us, d_x, t)  # then read, as above
        return (d_params, d_v, last, _at(us, jnp.maximum(t - 2, 0)), us), None

    steps = us.shape[1]
    zeros = jax.tree.map(jnp.zeros_like, params)
    first = zeros, d_v, _at(us, steps - 1), _at(us, steps - 2), us
    last = jax.lax.scan(body, first, jnp.arange(steps), reverse=True)[0]
    return last[0], last[1], last[-1]


_membrane_loop.defvjp(_membrane_forward, _membrane_backward)


def _at(xs: Pytree, t: jax.Array | int) -> Pytree:
    at = partial(jax.lax.dynamic_index_in_dim, index=t, axis=1, keepdims=False)
    return jax.tree.map(at, xs)


def _put(xs: Pytree, x: Pytree, t: jax.Array) -> Pytree:
    put = partial(jax.lax.dynamic_update_index_in_dim, index=t, axis=1)
    return jax.tree.map(put, xs, x)
