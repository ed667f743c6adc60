"""Functions looked into and computed again: one walk over a jaxpr, one interpreter.

``trace`` follows a function's equations and finds its sites, the equations that a
transformation replaces or observes: ReLUs, or products and spikes. ``run`` computes the
function with each site handed to a handler: energy, calibration, conversion, NIR.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import jax
import numpy as np
from jax.core import ShapedArray, Tracer, eval_jaxpr
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

Pytree = Any
Pure = Callable[[Pytree, Any], Any]  # (params, xs) -> ys
# Number of an equation -> number of its site, or the plan of the jaxpr inside of it.
Plan: TypeAlias = "dict[int, int | Plan]"

# Calls, and the parameter that holds what they compute, by all versions of JAX.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
REMAT = ("remat2", "checkpoint")
PLATFORM = -1.0  # the index of the platform in a cond, whose last branch is the default


class Value(NamedTuple):
    """Static knowledge about a value in a jaxpr.

    level: 0 where it depends on parameters alone; above, the rule says what it means.
    label: path of the last parameter that took part in it.
    const: the number that it is everywhere.
    site: number of the site that it is the output of.
    """

    level: int
    label: str | None = None
    const: float | None = None
    site: int | None = None


class Match(NamedTuple):
    """Verdict of a rule on an equation that is a site.

    kind: name for the handler. name: label of the site. cap: c of min(max(x, 0), c).
    level: of the site's outputs.
    """

    kind: str
    name: str | None
    cap: float = np.inf
    level: int = 1


class Rule(Protocol):
    """Definition of sites, and of levels."""

    def match(self, eqn: JaxprEqn, values: Sequence[Value]) -> Match | None:
        """Return a verdict if the equation is a site."""
        ...

    def level(self, eqn: JaxprEqn, values: Sequence[Value]) -> int:
        """Return the level of the outputs of any other primitive with data in it."""
        ...


class Site(NamedTuple):
    """Equation that a transformation replaces or observes.

    name: path of the last parameter before it, its scope, or file and line.
    kind, cap: see ``Match``. where: file, line and function. shape: of its output.
    levels: of its operands. repeats: lengths of the scans around it. custom: whether it
    is inside of a function with a gradient of its own.
    """

    name: str
    kind: str
    where: str
    shape: tuple[int, ...]
    cap: float
    levels: tuple[int, ...]
    eqn: JaxprEqn
    repeats: tuple[int, ...]
    custom: bool


class Traced(NamedTuple):
    """Function as a jaxpr, with its sites in the order in which they are computed.

    others: (name, file and line) of the equations whose output has a higher level than
    their inputs, such as what is not affine where the sites are ReLUs.
    same: for each output, whether it is an input handed through.
    """

    closed: ClosedJaxpr
    plan: Plan
    sites: tuple[Site, ...]
    others: tuple[tuple[str, str], ...]
    out_tree: Any
    same: tuple[bool, ...]


Kept = dict[int, Any]  # number of a site -> pytree
Handler = Callable[[int, Site, list, Any], tuple[Any, Any]]


def trace(
    f: Pure, params: Pytree, xs: Pytree, rule: Rule, *, enter: bool = False
) -> Traced:
    """Return f(params, xs) as a jaxpr, and its sites.

    Args:
        f: pure function.
        params: its parameters, whose paths name the sites.
        xs: its input; only shapes and types count.
        rule: says what a site is.
        enter: enter all calls on data, for handlers whose values are no arrays.

    Raises:
        ValueError: a site is inside of a loop of unknown length, or a branch.
    """
    closed, out = jax.make_jaxpr(f, return_shape=True)(params, xs)
    walk, inputs = _Walk(rule, enter), set(closed.jaxpr.invars)
    paths = [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    known = [Value(0, path.rpartition("/")[0] or path) for path in paths]
    known += [Value(1)] * len(jax.tree.leaves(xs))
    plan, _ = walk.jaxpr(closed.jaxpr, known, _Around())
    same = [isinstance(v, Var) and v in inputs for v in closed.jaxpr.outvars]
    sites, others = tuple(walk.sites), tuple(walk.others)
    return Traced(closed, plan, sites, others, jax.tree.structure(out), tuple(same))


def run(
    traced: Traced,
    params: Pytree,
    xs: Pytree,
    handler: Handler,
    given: Mapping[int, Any] | None = None,
) -> tuple[Pytree, Kept]:
    """Compute a traced function with its sites handed to a handler.

    Differentiable, and works under jit. Equations without sites inside are computed as
    they are, with their own gradients.

    Args:
        traced: from ``trace``, for the same shapes.
        params, xs: as in ``trace``.
        handler: (number, site, operands, given) -> (output or list of them, kept).
        given: number of a site -> pytree for its handler. In scans each step gets its
            slice: leaves [*site.repeats, ...].

    Returns:
        the output of the function, and what the handler kept: number of a site ->
        pytree with leaves [*site.repeats, ...].
    """
    flat = jax.tree.leaves((params, xs))
    given = dict.fromkeys(range(len(traced.sites))) | dict(given or {})
    jaxpr, consts = traced.closed.jaxpr, traced.closed.consts
    computer = _Run(traced.sites, handler)
    outs, kept = computer.jaxpr(jaxpr, consts, flat, traced.plan, given)
    return jax.tree.unflatten(traced.out_tree, outs), kept


def bind(eqn: JaxprEqn, values: Sequence[jax.Array]) -> list[jax.Array]:
    """Compute one equation as it is."""
    # As a jaxpr of one equation: Primitive.get_bind_params, the other way to do it,
    # differs between JAX 0.7.2 and 0.10.
    pairs = zip(eqn.invars, values, strict=True)
    known = {v: value for v, value in pairs if not isinstance(v, Literal)}
    parts = {"invars": list(known), "outvars": list(eqn.outvars), "eqns": [eqn]}
    one = _empty().replace(**parts, effects=eqn.effects)
    return eval_jaxpr(one, (), *known.values())


@cache
def _empty() -> Jaxpr:
    return jax.make_jaxpr(lambda: ())().jaxpr  # a Jaxpr made by hand lacks debug_info


def aval(v: Var | Literal) -> ShapedArray:
    """Return shape and type of a value."""
    return cast(ShapedArray, v.aval)


def scope(eqn: JaxprEqn) -> str:
    """Return the path of the innermost jax.named_scope of an equation, or nothing."""
    # A scope must not have a slash: ``neurons.Step`` writes its path with bars.
    return str(eqn.source_info.name_stack).rpartition("/")[-1].replace("|", "/")


def where(eqn: JaxprEqn) -> str:
    """Return file, line and function of an equation, as 'net.py:12 (__call__)'."""
    return source_info_util.summarize(eqn.source_info).rpartition("/")[-1]


def body(eqn: JaxprEqn) -> tuple[Jaxpr, Sequence[jax.Array]]:
    """Return the jaxpr of a call, a scan or a cond by platform, and its constants."""
    name, params = eqn.primitive.name, eqn.params
    if name == "cond":
        inner = params["branches"][-1]  # the default comes last
    else:
        inner = params[CALLS.get(name, "jaxpr")]
    return getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())


def call_name(eqn: JaxprEqn) -> str:
    """Return the name of the function that an equation calls, or of its primitive."""
    name = eqn.primitive.name
    info = body(eqn)[0].debug_info if name in CALLS else None
    return eqn.params.get("name") or getattr(info, "func_name", None) or name


def leaf_path(path: tuple) -> str:
    """Return the path of a leaf of a pytree, such as "conv/kernel"."""
    keys = (getattr(k, "key", getattr(k, "idx", getattr(k, "name", ""))) for k in path)
    return "/".join(str(key) for key in keys if key != "params")


class _Around(NamedTuple):
    """Surroundings of a jaxpr: lengths of the scans, whether gradients are custom."""

    repeats: tuple[int, ...] = ()
    custom: bool = False


class _Walk:
    """Search for the sites of a function, by what is known of its values."""

    def __init__(self, rule: Rule, enter: bool):
        self.rule, self.enter = rule, enter
        self.sites: list[Site] = []
        self.others: list[tuple[str, str]] = []

    def jaxpr(
        self, jaxpr: Jaxpr, inputs: Sequence[Value], around: _Around
    ) -> tuple[Plan, list[Value]]:
        """Return the plan of a jaxpr, and what is known of its outputs."""
        known = dict(zip(jaxpr.invars, inputs, strict=True))
        operands = [*(v for e in jaxpr.eqns for v in e.invars), *jaxpr.outvars]
        uses = Counter(v for v in operands if not isinstance(v, Literal))
        # A minimum caps a site only where nothing else sees the site's output.
        for var in [var for var in known if uses[var] > 1]:
            known[var] = known[var]._replace(site=None)

        def read(v: Var | Literal) -> Value:
            if isinstance(v, Literal):
                return Value(0, None, float(v.val) if np.ndim(v.val) == 0 else None)
            return known.get(v, Value(0))  # else a constant of the jaxpr

        plan: Plan = {}
        for k, eqn in enumerate(jaxpr.eqns):
            values = [read(v) for v in eqn.invars]
            match = self.rule.match(eqn, values)
            if match:
                plan[k] = len(self.sites)
                outs = [self.site(eqn, values, match, around)] * len(eqn.outvars)
            elif inner_jaxprs(eqn):
                inner, outs = self.inner(eqn, values, around)
                if inner or (self.enter and any(v.level for v in values)):
                    plan[k] = inner
            else:
                outs = [self.primitive(eqn, values)] * len(eqn.outvars)
            for var, value in zip(eqn.outvars, outs, strict=True):
                known[var] = value if uses[var] < 2 else value._replace(site=None)
        return plan, [read(v) for v in jaxpr.outvars]

    def site(
        self, eqn: JaxprEqn, values: list[Value], match: Match, around: _Around
    ) -> Value:
        """Note a site, and return what is known of its output."""
        at, shape = where(eqn), aval(eqn.outvars[0]).shape
        levels = tuple(v.level for v in values)
        found = match.name or at, match.kind, at, shape, match.cap, levels, eqn
        self.sites.append(Site(*found, *around))
        return Value(match.level, match.name, None, len(self.sites) - 1)

    def primitive(self, eqn: JaxprEqn, values: list[Value]) -> Value:
        """Return what is known of the output of a primitive."""
        name, label = eqn.primitive.name, last_label(values)
        if not any(v.level for v in values):
            if name == "platform_index":
                return Value(0, None, PLATFORM)
            kept = name in ("broadcast_in_dim", "convert_element_type")
            return Value(0, label, values[0].const if kept else None)
        # A minimum right behind a site: min(max(x, 0), c) without a call around it.
        for value, other in (values, values[::-1]) if name == "min" else ():
            if other.const and value.site is not None:
                site = self.sites[value.site]
                cap = min(site.cap, float(other.const))
                self.sites[value.site] = site._replace(cap=cap)
                return value
        level = self.rule.level(eqn, values)
        if level > max(v.level for v in values):
            self.others.append((name, where(eqn)))
        return Value(level, label)

    def inner(
        self, eqn: JaxprEqn, values: list[Value], around: _Around
    ) -> tuple[Plan, list[Value]]:
        """Return the plan of the jaxprs in an equation, and its outputs."""
        name = eqn.primitive.name
        if name in CALLS:
            return self.call(eqn, values, around)
        if name == "scan":
            return self.scan(eqn, values, around)
        if name == "cond" and values[0].const == PLATFORM:
            return self.jaxpr(body(eqn)[0], values[1:], around)
        found = len(self.sites)
        for jaxpr in inner_jaxprs(eqn):
            self.jaxpr(jaxpr, [Value(1)] * len(jaxpr.invars), around)
        if len(self.sites) > found:
            site = self.sites[found]
            raise ValueError(
                f"trace: expected {site.kind} at {site.where} outside of {name}, which "
                "runs it an unknown number of times. Use jax.lax.scan or a Python loop."
            )
        return {}, [Value(max(v.level for v in values))] * len(eqn.outvars)

    def call(
        self, eqn: JaxprEqn, values: list[Value], around: _Around
    ) -> tuple[Plan, list[Value]]:
        """Walk the function of a call."""
        first = len(self.others)
        # jax.nn.relu has a gradient of its own too, but the rule matches all of it.
        custom = around.custom or eqn.primitive.name.startswith("custom_")
        plan, outs = self.jaxpr(body(eqn)[0], values, around._replace(custom=custom))
        # Report silu, and not the logistic in it, which is on the same line.
        lines = {line for _, line in self.others[first:]}
        if lines and not plan and lines <= {"", where(eqn)}:
            self.others[first:] = [(call_name(eqn), where(eqn))]
        return plan, outs

    def scan(
        self, eqn: JaxprEqn, values: list[Value], around: _Around
    ) -> tuple[Plan, list[Value]]:
        """Walk the body of a scan until what is known of the carry is stable."""
        first, last = _carry(eqn)
        around = around._replace(repeats=(*around.repeats, eqn.params["length"]))
        while True:
            marks = len(self.sites), len(self.others)
            plan, outs = self.jaxpr(body(eqn)[0], values, around)
            carry = [
                Value(max(before.level, after.level), before.label or after.label)
                for before, after in zip(values[first:last], outs, strict=False)
            ]
            if [v.level for v in carry] == [v.level for v in values[first:last]]:
                return plan, [v._replace(site=None) for v in outs]
            values = [*values[:first], *carry, *values[last:]]
            del self.sites[marks[0] :], self.others[marks[1] :]


def last_label(values: Sequence[Value]) -> str | None:
    """Return the label of the parameters among operands, else that of the data."""
    labels = [v.label for v in values if v.label is not None and not v.level]
    labels += [v.label for v in values if v.label is not None]
    return labels[0] if labels else None


def inner_jaxprs(eqn: JaxprEqn) -> list[Jaxpr]:
    """Return the jaxprs in the parameters of an equation."""
    params = list(eqn.params.values())
    leaves = jax.tree.leaves(params, is_leaf=lambda v: hasattr(v, "eqns"))
    found = [getattr(leaf, "jaxpr", leaf) for leaf in leaves]
    return [jaxpr for jaxpr in found if hasattr(jaxpr, "eqns")]


class _Run(NamedTuple):
    """Interpreter of jaxprs."""

    sites: tuple[Site, ...]
    handler: Handler

    def jaxpr(
        self, jaxpr: Jaxpr, consts: Sequence, inputs: Sequence, plan: Plan, given: Kept
    ) -> tuple[list, Kept]:
        """Return the outputs of a jaxpr, and what its sites keep."""
        known = dict(zip(jaxpr.constvars, consts, strict=True))
        known |= zip(jaxpr.invars, inputs, strict=True)

        def read(v: Var | Literal) -> jax.Array:
            return v.val if isinstance(v, Literal) else known[v]

        kept: Kept = {}
        for k, eqn in enumerate(jaxpr.eqns):
            values, item = [read(v) for v in eqn.invars], plan.get(k)
            if item is None:
                outs = bind(eqn, values)
            elif isinstance(item, dict):
                outs, more = self.inner(eqn, values, item, given)
                kept |= more
            else:
                site = self.sites[item]
                y, kept[item] = self.handler(item, site, values, given[item])
                outs = y if isinstance(y, list) else [y]
            known.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars], kept

    def inner(
        self, eqn: JaxprEqn, values: list, plan: Plan, given: Kept
    ) -> tuple[list[jax.Array], Kept]:
        """Compute a call, scan or branch that has sites inside."""
        name, params = eqn.primitive.name, eqn.params
        jaxpr, consts = body(eqn)

        def compute(values: list, given: Kept) -> tuple[list[jax.Array], Kept]:
            return self.jaxpr(jaxpr, consts, values, plan, given)

        # Only the sites inside have the axis of the scan, or are inputs of the remat.
        given = {n: given[n] for n in _numbers(plan)}
        if name == "scan":
            return _scan(eqn, compute, values, given)
        leaves = jax.tree.leaves((values, given))
        # A quantised network keeps its rematerialisation; values of NIR have none.
        if name in REMAT and any(isinstance(v, Tracer) for v in leaves):
            policy, cse = params["policy"], params["prevent_cse"]
            compute = jax.checkpoint(compute, policy=policy, prevent_cse=cse)
        return compute(values[1:] if name == "cond" else values, given)


def _numbers(plan: Plan) -> Iterator[int]:
    for item in plan.values():
        yield from _numbers(item) if isinstance(item, dict) else (item,)


def _carry(eqn: JaxprEqn) -> tuple[int, int]:
    """Return the first and last place of a scan's carry among its operands."""
    # By the axis that the body lacks: JAX 0.12 has no num_consts and num_carry.
    inner = body(eqn)[0]
    sides = (eqn.invars, inner.invars), (eqn.outvars, inner.outvars)
    pairs: Any = (zip(*side, strict=True) for side in sides)
    last, carried = (sum(a.aval.ndim == b.aval.ndim for a, b in p) for p in pairs)
    return last - carried, last


def _scan(
    eqn: JaxprEqn, compute: Callable, values: list, given: Kept
) -> tuple[list[jax.Array], Kept]:
    first, last = _carry(eqn)

    def step(carry: list, now: tuple[list, Kept]) -> tuple[list, tuple[list, Kept]]:
        outs, kept = compute([*values[:first], *carry, *now[0]], now[1])
        return outs[: last - first], (outs[last - first :], kept)

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    now = (values[last:], given)
    carry, (ys, kept) = jax.lax.scan(step, values[first:last], now, **options)
    return [*carry, *ys], kept
