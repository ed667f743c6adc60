"""ReLUs in a jaxpr, and all else that is not affine: the tracer's rule for conversion.

A ReLU is found by what it computes, min(max(x, 0), c), and not by its name: nnx.relu,
jax.nn.relu6, jnp.clip(x, 0, 1) and jnp.maximum(x, 0) are all the same to it.
"""

import math
from collections.abc import Sequence

import numpy as np
from jax.extend.core import JaxprEqn, Literal, Var

from spikejax import trace
from spikejax.nn.operations import PRODUCTS
from spikejax.trace import CALLS, Match, Value

# Linear in the operands together.
LINEAR = """
    add add_any sub neg real reshape transpose squeeze expand_dims broadcast_in_dim rev
    copy copy_p concatenate split slice dynamic_slice dynamic_update_slice gather pad
    scatter-add reduce_sum reduce_window_sum cumsum psum psum_invariant stop_gradient
    convert_element_type reduce_precision optimization_barrier sharding_constraint
    device_put layout_constraint mesh_cast reshard
"""
# Maxima of spikes are spikes; the network stays convertible, if not exactly.
MAXIMA = frozenset(("reduce_window_max", "reduce_max"))
# Linear in each operand: affine if one of them depends on parameters alone.
BILINEAR = frozenset(("mul", "dot_general", "conv_general_dilated"))
# Parts of a ReLU; those of one number return it.
EXTREMES = ("max", "min", "convert_element_type", "broadcast_in_dim", "copy")
# Levels: affine in x since the last site, its output or sums of such, not affine.
CURRENT, SPIKES, OTHER = 1, 2, 3
SIGNED = "current"  # kind of the sites that are products


class Relus:
    """Rule of the tracer: sites are ReLUs, clips from zero, and QuantReLUs.

    Args:
        places: files and lines of the ReLUs, where they are known. A network in
            training mode has norms that are not affine, and that take maxima, such as
            max(variance, 0), so its ReLUs are those that it had in evaluation mode.
        currents: whether products of weights and currents are sites too: those whose
            operand is neither the input nor made of spikes.
    """

    def __init__(self, places: Sequence[str] | None = None, *, currents: bool = False):
        self.places, self.currents = places, currents

    def match(self, eqn: JaxprEqn, values: Sequence[Value]) -> Match | None:
        """Return the kind of ReLU that an equation is, if it is one."""
        name, called = eqn.primitive.name, trace.call_name(eqn)
        data = [v for v in values if v.level]
        label = trace.last_label(values)
        # The input has no label yet: it meets the first weights as it is.
        met = [v.level for v in data if v.label is not None]
        if self.currents and called in PRODUCTS and len(met) == len(data) == 1:
            return None if met[0] == SPIKES else Match(SIGNED, label, level=CURRENT)
        if not data or name not in (*CALLS, "max"):
            return None
        if called == "quantised_relu":
            return Match(called, label, level=SPIKES)
        known = self.places is None or trace.where(eqn) in self.places
        affine = self.places is not None or name in CALLS or data[0].level < OTHER
        if len(data) != 1 or not known or not affine:
            return None
        # Maxima and minima with numbers clip x to the range of their results.
        low, high = (
            _extreme(eqn, [x if v.level else v.const for v in values])
            for x in (-math.inf, math.inf)
        )
        if low != 0 or high is None or high <= 0:
            return None
        return Match(called, label, high, SPIKES)

    def level(self, eqn: JaxprEqn, values: Sequence[Value]) -> int:
        """Return whether the output is affine in the input, and made of spikes."""
        name = eqn.primitive.name
        data = [v.level > 0 for v in values]
        affine = name in LINEAR.split() or name in MAXIMA
        affine |= name in BILINEAR and sum(data) == 1
        affine |= name == "div" and not data[1]
        affine |= name == "select_n" and not data[0]
        levels = [v.level for v in values if v.level]
        if not affine or OTHER in levels:
            return OTHER
        # A mean multiplies by a number, a norm by a parameter.
        scaled = name == "mul" and any(v.label and not v.level for v in values)
        return CURRENT if name in PRODUCTS or scaled else min(levels)


def advise(name: str, line: str) -> str:
    """Return what to do about an operation that is not affine, if we know it."""
    if line.startswith(("normalization.py", "norm.py")):
        return " (statistics of the input: BatchNorm has none in evaluation mode)"
    if name in ("softmax", "exp", "max", "reduce_max"):
        return " (a softmax? leave it out: the largest logit is the answer)"
    if name in ("gelu", "silu", "tanh", "logistic", "erf", "integer_pow", "pow"):
        return " (an activation that has no spiking twin: train with ReLU)"
    return ""


def _extreme(eqn: JaxprEqn, operands: Sequence[float | None]) -> float | None:
    """Return the output of maxima and minima of numbers, None of anything else."""
    name = eqn.primitive.name
    if name in CALLS and len(eqn.outvars) == 1:
        jaxpr, _ = trace.body(eqn)
        known = dict(zip(jaxpr.invars, operands, strict=True))

        def read(v: Var | Literal) -> float | None:
            if isinstance(v, Literal):
                return float(v.val) if np.ndim(v.val) == 0 else None
            return known.get(v)

        for inner in jaxpr.eqns:
            made = _extreme(inner, [read(v) for v in inner.invars])
            known |= dict.fromkeys(inner.outvars, made)  # a debug.print has none
        return read(jaxpr.outvars[0])
    numbers = [v for v in operands if v is not None]
    if name not in EXTREMES or len(numbers) < len(operands):
        return None
    return min(numbers) if name == "min" else max(numbers)
