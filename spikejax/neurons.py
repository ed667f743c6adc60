"""Spiking neurons as pure cells: ``(params, v, x) -> (v, spikes)``, one time step.

Every cell charges, fires and resets within the same step. A cell knows nothing of time:
``spikejax.unroll`` repeats it. There is one rule for each of the three phases, shared
by all cells, so that a multi-threshold neuron with one threshold is the plain neuron.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spikejax import surrogate
from spikejax.surrogate import Spike

Cell = Callable[..., tuple[jax.Array, jax.Array]]


class NeuronParams(NamedTuple):
    """Parameters of a neuron; arrays broadcast against the membrane.

    leak: 1 / tau in [0, 1]; 0 makes an integrate-and-fire neuron.
    thresholds: the N thresholds, each a scalar or an array that broadcasts.
    """

    leak: Any = 0.5
    thresholds: Any = (1.0,)


def charge(leak, v, x, *, v_reset: float | None, decay_input: bool) -> jax.Array:
    """Membrane after one step of input, before it fires: u.

    decay_input: u = v + (x - (v - v_rest)) leak;  else: u = v - (v - v_rest) leak + x

    v_rest is v_reset, or 0 where v_reset is None.
    """
    above_rest = v - v_reset if v_reset else v
    if decay_input:
        return v + (x - above_rest) * leak
    return v - above_rest * leak + x


def reset(u, z, amount, *, v_reset: float | None, detach_reset: bool) -> jax.Array:
    """Membrane after firing: u - amount (soft, v_reset None), or v_reset where z = 1.

    Args:
        u: membrane before the reset.
        z: whether the neuron fired, in {0, 1}.
        amount: what a soft reset takes away, z times the threshold.
        detach_reset: no gradient flows through z and amount.
    """
    if detach_reset:
        z, amount = jax.lax.stop_gradient((z, amount))
    if v_reset is None:
        return u - amount
    return (1 - z) * u + v_reset * z


def _gather(spikes, steps, trains):
    """Weighted sum of binary trains (weights steps / steps[0]), or the trains alone."""
    if trains:
        return jnp.stack(spikes, -1)
    total = spikes[0]
    for z, step in zip(spikes[1:], steps[1:], strict=True):
        total = total + z * (step / steps[0])
    return total


def lif(
    params: NeuronParams,
    v: jax.Array,
    x: jax.Array,
    *,
    v_reset: float | None = None,
    decay_input: bool = True,
    detach_reset: bool = False,
    spike: Spike = surrogate.ATAN,
    trains: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """One step of a leaky integrate-and-fire neuron.

    u = charge(leak, v, x),  z = H(u - threshold),  v' = reset(u, z)

    IF is leak = 0 with decay_input=False; PLIF a leak that is learned.

    Args:
        params: leak and one threshold.
        v: membrane left by the previous step, any shape.
        x: input current, shape of v.
        v_reset: None for soft reset (subtract the threshold), else the reset value.
        decay_input: whether the leak scales the input too.
        detach_reset: no gradient through the reset.
        spike: Heaviside step with a surrogate derivative.
        trains: add a last axis of size 1 to the spikes, as the cells below do.

    Returns:
        v' and the spikes in {0, 1}, both in the shape of v.

    Reference: Fang et al. 2021, arXiv:2007.05785 (PLIF); Wu et al. 2018,
    arXiv:1706.02609.
    """
    (threshold,) = params.thresholds
    u = charge(params.leak, v, x, v_reset=v_reset, decay_input=decay_input)
    z = spike(u - threshold)
    v = reset(u, z, threshold * z, v_reset=v_reset, detach_reset=detach_reset)
    return v, _gather([z], [threshold], trains)


def parallel(
    params: NeuronParams,
    v: jax.Array,
    x: jax.Array,
    *,
    v_reset: float | None = None,
    decay_input: bool = True,
    detach_reset: bool = False,
    spike: Spike = surrogate.ATAN,
    trains: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """One step of a multi-threshold neuron, all N thresholds compared at once.

    u = charge(leak, v, x),  z_k = H(u - theta_k),  theta_1 < ... < theta_N
    o = sum_k (d_k / d_1) z_k,  d_k = theta_k - theta_(k-1),  theta_0 = 0
    soft: v' = u - sum_k d_k z_k;   hard: v' = v_reset where z_1 fired

    Equal spacing gives weights of 1: the output is the number of spikes, and with soft
    reset it is clip(floor(u / theta_1), 0, N).

    Args:
        params: leak and N rising thresholds.
        trains: the N binary trains on a new last axis instead of their weighted sum.
        Other arguments are those of ``lif``.

    Returns:
        v' in the shape of v, and the output o.

    Reference: after Wang, Zhang, Zhang 2023, arXiv:2303.11127, which names the mode;
    the equations are our choice, as the paper's could not be had.
    """
    u = charge(params.leak, v, x, v_reset=v_reset, decay_input=decay_input)
    thresholds = params.thresholds
    spikes = [spike(u - threshold) for threshold in thresholds]
    steps = [thresholds[0]]
    steps += [b - a for a, b in zip(thresholds[:-1], thresholds[1:], strict=True)]
    amount = sum(step * z for step, z in zip(steps, spikes, strict=True))
    v = reset(u, spikes[0], amount, v_reset=v_reset, detach_reset=detach_reset)
    return v, _gather(spikes, steps, trains)


def cascade(
    params: NeuronParams,
    v: jax.Array,
    x: jax.Array,
    *,
    v_reset: float | None = None,
    decay_input: bool = True,
    detach_reset: bool = False,
    spike: Spike = surrogate.ATAN,
    trains: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """One step of a multi-threshold neuron, each threshold after the reset of the last.

    u_0 = charge(leak, v, x),  z_k = H(u_(k-1) - theta_k),  u_k = reset(u_(k-1), z_k)
    o = sum_k (theta_k / theta_1) z_k,  v' = u_N

    Equal thresholds give weights of 1; dyadic ones (theta_k = theta 2^(1-k)) give 2^N
    levels from N spikes. With hard reset at most one of the N fires: take soft reset.

    Args:
        params: leak and N positive thresholds, in the order in which they act.
        trains: the N binary trains on a new last axis instead of their weighted sum.
        Other arguments are those of ``lif``.

    Returns:
        v' in the shape of v, and the output o.

    Reference: after Wang, Zhang, Zhang 2023, arXiv:2303.11127, which names the mode;
    the equations are our choice, as the paper's could not be had.
    """
    u = charge(params.leak, v, x, v_reset=v_reset, decay_input=decay_input)
    spikes = []
    for threshold in params.thresholds:
        z = spike(u - threshold)
        u = reset(u, z, threshold * z, v_reset=v_reset, detach_reset=detach_reset)
        spikes.append(z)
    return u, _gather(spikes, params.thresholds, trains)


def independent(
    params: NeuronParams, v: jax.Array, x: jax.Array, *, trains: bool = False, **options
) -> tuple[jax.Array, jax.Array]:
    """One step of N plain neurons that share their input, one membrane a threshold.

    v_k', z_k = lif(leak, theta_k, v_k, x);   o = sum_k z_k

    Args:
        params: leak and N positive thresholds.
        v: membranes, one a threshold on a new first axis: [N, *x.shape].
        trains: the N binary trains on a new last axis instead of their sum.
        Other arguments are those of ``lif``.

    Returns:
        v' in the shape of v, and the output o in the shape of x.

    Reference: the multi-level firing unit, Feng et al. 2022, arXiv:2210.06386.
    """
    membranes, spikes = [], []
    for k, threshold in enumerate(params.thresholds):
        one = NeuronParams(params.leak, (threshold,))
        membrane, z = lif(one, v[k], x, **options)
        membranes.append(membrane)
        spikes.append(z)
    return jnp.stack(membranes), _gather(spikes, [1.0] * len(spikes), trains)


def equal_thresholds(num_thresholds: int, v_threshold: float = 1.0) -> tuple:
    """Equally spaced thresholds for ``parallel``: v_threshold * (1, 2, ..., N)."""
    _check_number(num_thresholds)
    return tuple(v_threshold * k for k in range(1, num_thresholds + 1))


def repeated_thresholds(num_thresholds: int, v_threshold: float = 1.0) -> tuple:
    """The same threshold N times, for ``cascade``: its equally spaced levels."""
    _check_number(num_thresholds)
    return (v_threshold,) * num_thresholds


def dyadic_thresholds(num_thresholds: int, v_threshold: float = 1.0) -> tuple:
    """Halving thresholds for ``cascade``: v_threshold * 2^(1-k), 2^N output levels."""
    _check_number(num_thresholds)
    return tuple(v_threshold * 2.0**-k for k in range(num_thresholds))


def spaced(
    who: str, cell: Cell, thresholds: int | Sequence[float], v_threshold: float
) -> Sequence[float]:
    """The thresholds of a cell: as they are, or as many at the spacing v_threshold."""
    is_layer = isinstance(cell, type) or hasattr(cell, "cell")  # LIF, LIF()
    if is_layer or not callable(cell):
        got = repr(cell).split("(")[0]
        raise ValueError(f"{who}: expected a cell such as neurons.parallel, got {got}.")
    if isinstance(thresholds, float | str):
        raise ValueError(
            f"{who}: expected the number of thresholds, or the thresholds themselves, "
            f"got {thresholds!r}."
        )
    if isinstance(thresholds, int | np.integer):
        equal = repeated_thresholds if cell is cascade else equal_thresholds
        return equal(int(thresholds), v_threshold)
    if v_threshold != 1.0:
        raise ValueError(
            f"{who}: expected v_threshold beside a number of thresholds, got it beside "
            f"{thresholds}."
        )
    return thresholds


def _check_number(num_thresholds):
    if num_thresholds < 1:
        raise ValueError(
            f"num_thresholds: expected at least 1, got {num_thresholds}. "
            "One threshold is the plain neuron."
        )


def check_thresholds(who: str, thresholds: Sequence[float], *, rising: bool) -> None:
    """ValueError unless there is a threshold and all are positive (and rising)."""
    if any(isinstance(t, str | bool) for t in thresholds):
        raise ValueError(f"{who}: expected numbers for thresholds, got {thresholds}.")
    values = [float(t) for t in thresholds]
    if not values:
        raise ValueError(f"{who}: expected at least 1 threshold, got none.")
    if not all(math.isfinite(t) and t > 0 for t in values):
        raise ValueError(f"{who}: expected positive thresholds, got {values}.")
    if rising and any(a >= b for a, b in zip(values[:-1], values[1:], strict=True)):
        raise ValueError(
            f"{who}: expected rising thresholds, got {values}. "
            "Sort them, and drop those that are equal; a cascade takes falling ones."
        )
