"""ReLUs in a jaxpr, and all else that is not affine: the tracer's rule for conversion.

A ReLU is found by what it computes, min(max(x, 0), c), and not by its name: nnx.relu,
jax.nn.relu6, jnp.clip(x, 0, 1) and jnp.maximum(x, 0) are all the same to it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.extend.core import JaxprEqn, Literal, Var

from spikejax import trace
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
AFFINE, OTHER = 1, 2  # levels: affine in x since the last site, or not
SMALL = 8  # equations of a call that may be a ReLU; jax.nn.relu6 has 2, jnp.clip 4


class _Clip(NamedTuple):
    """Result of min(max(x, 0), cap), or only min(x, cap) where not yet rectified."""

    cap: float
    rectified: bool


class Relus:
    """Rule of the tracer: sites are ReLUs, clips from zero, and QuantReLUs.

    Args:
        places: files and lines of the ReLUs, where they are known. A network in
            training mode has norms that are not affine, and that take maxima, such as
            max(variance, 0), so its ReLUs are those that it had in evaluation mode.
    """

    def __init__(self, places: Sequence[str] | None = None):
        self.places = places

    def match(self, eqn: JaxprEqn, values: Sequence[Value]) -> Match | None:
        """Return the kind of ReLU that an equation is, if it is one."""
        name, called = eqn.primitive.name, trace.call_name(eqn)
        data = [v for v in values if v.level]
        if not data or name not in (*CALLS, "max"):
            return None
        label = trace.last_label(values)
        if called == "quantised_relu":
            return Match(called, label)
        known = self.places is None or trace.where(eqn) in self.places
        affine = self.places is not None or name in CALLS or data[0].level == AFFINE
        if len(data) != 1 or not known or not affine:
            return None
        clip = _symbol(eqn, ["x" if v.level else v.const for v in values])
        if isinstance(clip, _Clip) and clip.rectified:
            return Match(called, label, clip.cap)
        return None

    def level(self, eqn: JaxprEqn, values: Sequence[Value]) -> int:
        """Return whether the output is affine in the input."""
        name = eqn.primitive.name
        data = [v.level > 0 for v in values]
        affine = name in LINEAR.split() or name in MAXIMA
        affine |= name in BILINEAR and sum(data) == 1
        affine |= name == "div" and not data[1]
        affine |= name == "select_n" and not data[0]
        return max(v.level for v in values) if affine else OTHER


Symbol = str | float | _Clip | None  # "x", a number, a clip of x, or anything else


def _symbol(eqn: JaxprEqn, operands: Sequence[Symbol]) -> Symbol:
    """Return an equation's output as a function of x, if it is a simple one."""
    name = eqn.primitive.name
    if name in CALLS:
        inner = eqn.params[CALLS[name]]
        jaxpr = getattr(inner, "jaxpr", inner)
        if len(jaxpr.outvars) != 1 or len(jaxpr.eqns) > SMALL:
            return None
        known = dict(zip(jaxpr.invars, operands, strict=False))

        def read(v: Var | Literal) -> Symbol:
            if isinstance(v, Literal):
                return float(v.val) if np.ndim(v.val) == 0 else None
            return known.get(v)

        for inner_eqn in jaxpr.eqns:
            made = _symbol(inner_eqn, [read(v) for v in inner_eqn.invars])
            known[inner_eqn.outvars[0]] = made
        return read(jaxpr.outvars[0])
    numbers = [v for v in operands if isinstance(v, float)]
    others = [v for v in operands if not isinstance(v, float)]
    if name in ("convert_element_type", "broadcast_in_dim", "copy"):
        return operands[0]
    if len(numbers) != 1 or len(others) != 1 or others[0] is None:
        return None
    (number,), (other,) = numbers, others
    clip = other if isinstance(other, _Clip) else _Clip(math.inf, False)
    if name == "max" and number == 0:
        return clip._replace(rectified=True)
    if name == "min" and number > 0:
        return clip._replace(cap=min(clip.cap, number))
    return None
