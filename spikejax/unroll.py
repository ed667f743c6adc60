"""Repeat a cell over the time axis: the one file that knows about time."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

UNROLLED = 4  # up to so many steps are written out, so that XLA fuses them
REMATERIALISED = 64  # from so many steps on the backward pass computes them again


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

    Up to 4 steps are written out one by one; more run in ``jax.lax.scan``; from 64
    steps on, the scan is cut in pieces of about sqrt(T) steps which the backward pass
    computes again, so that memory grows with sqrt(T). All three give one answer.

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

    def scan(state, xs):
        return jax.lax.scan(lambda v, x: cell(params, v, x), state, xs)

    xs = jnp.moveaxis(xs, 1, 0)
    if steps < REMATERIALISED:
        state, spikes = scan(state, xs)
    else:
        state, spikes = _scan_in_pieces(scan, state, xs)
    return state, jnp.moveaxis(spikes, 0, 1)


def _scan_in_pieces(scan, state, xs):
    """Scan over pieces of sqrt(T) steps, each rematerialised, then over the rest."""
    steps = xs.shape[0]
    length = math.isqrt(steps)
    pieces = steps // length
    body, rest = xs[: pieces * length], xs[pieces * length :]
    body = body.reshape(pieces, length, *xs.shape[1:])
    state, spikes = jax.lax.scan(jax.checkpoint(scan), state, body)
    spikes = spikes.reshape(pieces * length, *spikes.shape[2:])
    if rest.shape[0]:
        state, last = scan(state, rest)
        spikes = jnp.concatenate([spikes, last])
    return state, spikes
