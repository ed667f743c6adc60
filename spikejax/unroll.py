"""Repeat a cell over the time axis: the one file that knows about time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

UNROLLED = 4  # up to so many steps are written out, so that XLA fuses them


@jax.custom_vjp
def _gathered(xs):
    """xs, whose gradient is summed over thresholds and steps once, if on a CPU.

    XLA would write down each of the summands there, and sum them for each use.
    """
    return xs


def _gather_gradient(_, g):
    once = jax.lax.optimization_barrier
    return (jax.lax.platform_dependent(g, cpu=once, default=lambda g: g),)


_gathered.defvjp(lambda xs: (xs, None), _gather_gradient)


def unroll(
    cell: Callable, params: Any, state: Any, xs: jax.Array
) -> tuple[Any, jax.Array]:
    """Run ``cell(params, state, x) -> (state, spikes)`` over the steps of xs.

    Up to 4 steps are written out one by one; more run in a ``jax.lax.scan``, whose
    backward pass keeps xs alone, and computes the states again. Both give one answer.

    Args:
        cell: one step, a pure function.
        params: handed to every step.
        state: pytree before the first step; keeps shapes and dtypes.
        xs: [B, T, ...], T >= 1.

    Returns:
        state after the last step, and the spikes [B, T, ...].
    """
    if xs.ndim < 2 or xs.shape[1] == 0:
        raise ValueError(
            f"unroll: expected xs [B, T, ...] with T >= 1, got shape {xs.shape}. "
            "For one time step, add the time axis: x[:, None]."
        )
    steps = xs.shape[1]
    if steps <= UNROLLED:
        xs, spikes = _gathered(xs), []
        for t in range(steps):
            state, z = cell(params, state, xs[:, t])
            spikes.append(z)
        return state, jnp.stack(spikes, 1)
    # What has a gradient must be an argument of a function with its own derivative.
    step, weights = jax.closure_convert(partial(cell, params), state, xs[:, 0])
    return _loop(step, weights, state, xs)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loop(step, weights, state, xs):
    """The steps in a loop, which reads and writes in place: no axis is moved."""
    (state, spikes), _ = _run(step, weights, state, xs)
    return state, spikes


def _run(step, weights, state, xs):
    """((last state, spikes), the states before each step [T, ...])."""
    _, z = jax.eval_shape(step, state, xs[:, 0], *weights)
    spikes = jnp.zeros((z.shape[0], xs.shape[1], *z.shape[1:]), z.dtype)

    def body(carry, t):
        before, spikes = carry
        after, z = step(before, _at(xs, t), *weights)
        return (after, _put(spikes, z, t)), before

    return jax.lax.scan(body, (state, spikes), jnp.arange(xs.shape[1]))


def _forward(step, weights, state, xs):
    return _loop(step, weights, state, xs), (weights, state, xs)


def _backward(step, kept, cotangents):
    weights, state, xs = kept
    d_state, d_spikes = cotangents
    _, states = _run(step, weights, state, xs)

    def body(carry, given):
        d_weights, d_state, d_xs = carry
        t, before = given
        _, pull = jax.vjp(step, before, _at(xs, t), *weights)
        d_state, d_x, *more = pull((d_state, _at(d_spikes, t)))
        d_weights = jax.tree.map(jnp.add, d_weights, more)
        return (d_weights, d_state, _put(d_xs, d_x, t)), None

    zeros = jax.tree.map(jnp.zeros_like, (weights, xs))
    first, given = (zeros[0], d_state, zeros[1]), (jnp.arange(xs.shape[1]), states)
    carry, _ = jax.lax.scan(body, first, given, reverse=True)
    return carry


_loop.defvjp(_forward, _backward)


def _at(xs, t):
    return jax.lax.dynamic_index_in_dim(xs, t, 1, keepdims=False)


def _put(xs, x, t):
    return jax.lax.dynamic_update_index_in_dim(xs, x, t, 1)
