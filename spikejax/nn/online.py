"""Online training: a gradient in each time step, in memory that does not grow with T.

    value, gradients = online.value_and_grad(model, losses.rate_cross_entropy, xs, y)

Gradients flow through the layers of one time step and not through time: SLTT. Layers in
``Traced`` remember their inputs: OTTT.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax.layers import check_lengths, check_sequence, check_tau
from spikejax.memory import Memory, drop_membranes, keep_membranes
from spikejax.nn.penalty import penalty
from spikejax.unroll import unroll_compiled

Loss = Callable[[jax.Array, jax.Array], jax.Array]  # (logits, labels) -> [B]


def value_and_grad(
    model: nnx.Module,
    loss: Loss,
    xs: jax.Array,
    labels: jax.Array,
    lengths: jax.Array | None = None,
) -> tuple[jax.Array, nnx.State]:
    """Return the mean loss of single time steps, and its gradient without time.

    L = 1/T sum_t loss(o[t], y),  with v[t-1] constant in the gradient of each step

    Costs of ``Penalised`` layers are added to the loss of each step.
    It runs the model from rest. Batch statistics are those of each step, and are saved
    in the model, as are random states; use it inside of ``nnx.jit``, or merge the model
    inside of ``jax.jit``.

    Args:
        model: network over sequences with spiking neurons, in training mode.
        loss: (logits [B, 1, K], labels) -> [B], as in ``spikejax.losses``.
        xs: input [B, T, ...].
        labels: as the loss takes them.
        lengths: [B], steps of each sequence, where those after them do not count.

    Returns:
        the loss, and gradients as ``nnx.value_and_grad`` has them, for an
        ``nnx.Optimizer``.

    Raises:
        ValueError: xs has no time axis, the model no spiking neurons, or lengths are
            not B whole numbers.

    Reference: Meng et al. 2023, arXiv:2302.14311 (SLTT).
    """
    check_sequence("online.value_and_grad", xs)
    ends = [xs.shape[1]] * len(xs) if lengths is None else lengths
    ends = check_lengths("online.value_and_grad", ends, len(xs))
    running, steps = nnx.clone(model), xs.shape[1]
    keep_membranes(running, xs[:, :1])
    graphdef, params, rest = nnx.split(running, nnx.Param, ...)

    def step(params: nnx.State, rest: dict, t: jax.Array) -> tuple[jax.Array, dict]:
        model = nnx.merge(graphdef, params, rest)
        logits = model(jax.lax.dynamic_slice_in_dim(xs, t, 1, 1))
        rest = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))
        counts = jnp.where(t < ends, 1 / ends, 0)
        return (loss(logits, labels) * counts).mean() + penalty(model) / steps, rest

    def add(t: jax.Array, carry: tuple) -> tuple:
        value, gradients, rest = carry
        # The membranes are in ``rest``, and no gradient leaves this step by them.
        more, d_params = jax.value_and_grad(step, has_aux=True)(params, rest, t)
        gradients = jax.tree.map(jnp.add, gradients, d_params)
        return value + more[0], gradients, more[1]

    zeros = jax.tree.map(jnp.zeros_like, params)
    first = jnp.zeros(()), zeros, nnx.to_pure_dict(rest)
    value, gradients, rest = jax.lax.fori_loop(0, steps, add, first)
    after = drop_membranes(nnx.merge(graphdef, params, rest))
    nnx.update(model, nnx.state(after, nnx.Not(nnx.Param)))
    return value, gradients


class Traced(nnx.Module):
    """Layer whose weights have their gradient at a trace of the input (OTTT).

    y[t] = W x[t] + b,  a[t] = (1 - 1/tau) a[t-1] + x[t],  dL/dW = sum_t g[t] a[t]

    a replaces x in the gradient of W alone, while states are kept between calls, as
    ``value_and_grad`` does. Everywhere else the layer is as without it. The trace is
    that of a membrane behind the layer, so it does not pass norms or pooling.

    Args:
        layer: linear in its input and its parameters, such as nnx.Linear or nnx.Conv.
        tau: time constant of the neurons behind it, in time steps, >= 1.

    Raises:
        ValueError: tau is out of its range.

    Reference: Xiao et al. 2022, arXiv:2210.04195; biases have the gradient of their own
    step, as in the authors' code.
    """

    def __init__(self, layer: nnx.Module, tau: float = 2.0):
        self.layer = layer
        self.decay = 1 - check_tau("Traced", tau)
        self.memory = Memory()

    def __call__(self, xs: jax.Array) -> jax.Array:
        """Return the layer's answer to xs [B, T, ...]."""
        trace = self.memory.load(jnp.zeros(xs[:, 0].shape, jnp.float32))
        layer: Any = self.layer
        if self.memory.held is None:
            return layer(xs)
        trace, traces = unroll_compiled(_follow, self.decay, trace, xs)
        self.memory.save(trace)
        graphdef, state = nnx.split(layer)
        return _apply(graphdef, nnx.to_pure_dict(state), xs, traces)


def _follow(
    decay: float, trace: jax.Array, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    trace = decay * trace + x
    return trace, trace.astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(
    graphdef: nnx.GraphDef, state: dict, xs: jax.Array, traces: jax.Array
) -> jax.Array:
    """Return the layer's answer to xs, with the gradient of its state at traces."""
    return nnx.merge(graphdef, state)(xs)


def _forward(
    graphdef: nnx.GraphDef, state: dict, xs: jax.Array, traces: jax.Array
) -> tuple[jax.Array, tuple]:
    return _apply(graphdef, state, xs, traces), (state, xs, traces)


def _backward(graphdef: nnx.GraphDef, kept: tuple, g: jax.Array) -> tuple:
    state, xs, traces = kept
    d_state = jax.vjp(lambda s: nnx.merge(graphdef, s)(traces), state)[1](g)[0]
    d_xs = jax.vjp(lambda xs: nnx.merge(graphdef, state)(xs), xs)[1](g)[0]
    return d_state, d_xs, jnp.zeros_like(traces)


_apply.defvjp(_forward, _backward)
