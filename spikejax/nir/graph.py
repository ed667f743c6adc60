"""A network as a graph of named modules, in which there may be loops."""

from collections.abc import Sequence
from graphlib import TopologicalSorter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax._compat import List
from spikejax.layers import Memory, Neuron
from spikejax.unroll import unroll

Edge = tuple[str, str]


class Graph(nnx.Module):
    """Network of named modules and edges; what arrives at a module is summed.

    Modules on a common loop are run step by step, all others over the whole sequence:
    see ``Loop``.

    Args:
        nodes: modules over [B, T, ...] by name, in any order.
        edges: (from, to), where ``source`` stands for the input.
        source, target: the names of input and output, which are not among the nodes.
    """

    def __init__(
        self,
        nodes: dict[str, nnx.Module],
        edges: Sequence[Edge],
        source: str,
        target: str,
    ):
        self.edges, self.source, self.target = tuple(edges), source, target
        groups = _groups(nodes, edges)
        looped = [g for g in groups if len(g) > 1 or (g[0], g[0]) in self.edges]
        self.loops = List(
            Loop({name: nodes[name] for name in group}, edges) for group in looped
        )
        self.plan = tuple((group, group in looped) for group in groups)
        self.names = tuple(g[0] for g in groups if g not in looped)
        self.modules = List(nodes[name] for name in self.names)

    def __call__(self, xs: jax.Array) -> jax.Array:
        """Outputs [B, T, ...] for inputs [B, T, ...]."""
        nodes, loops = (
            dict(zip(self.names, self.modules, strict=True)),
            iter(self.loops),
        )
        values = {self.source: xs}
        for group, is_loop in self.plan:
            arriving = {b: _arriving(b, self.edges, values) for b in group}
            arriving = {b: x for b, x in arriving.items() if x is not None}
            if is_loop:
                values |= next(loops)(arriving)
            else:
                values[group[0]] = nodes[group[0]](arriving[group[0]])
        return _arriving(self.target, self.edges, values)


def _arriving(name, edges, values) -> Any:
    """Sum of the values that are there and have an edge to the node, else None."""
    found = [values[a] for a, b in edges if b == name and a in values]
    return sum(found[1:], found[0]) if found else None


class Loop(nnx.Module):
    """Modules that feed each other, run step by step.

    Along an edge that closes a loop, seen from where currents come in, values take one
    time step. Before the first step no neuron has fired.

    Args:
        nodes: modules over [B, T, ...] by name.
        edges: (from, to); those from and to other nodes say where currents come in.
    """

    def __init__(self, nodes: dict[str, nnx.Module], edges: Sequence[Edge]):
        inner = [edge for edge in edges if set(edge) <= set(nodes)]
        entries = [b for a, b in edges if b in nodes and a not in nodes]
        self.late = _closing(entries, inner)
        self.early = tuple(edge for edge in inner if edge not in self.late)
        before = {name: [a for a, b in self.early if b == name] for name in nodes}
        self.names = tuple(TopologicalSorter(before).static_order())
        self.modules = List(nodes[name] for name in self.names)
        self.memory = Memory()

    def _run(self, arriving, late, run):
        """Values of all nodes at one step; run(name, module, x) gives that of one."""
        values: dict[str, Any] = {}
        for name, module in zip(self.names, self.modules, strict=True):
            parts = [
                arriving.get(name),
                _arriving(name, self.early, values),
                _arriving(name, self.late, late),
            ]
            parts = [part for part in parts if part is not None]
            values[name] = run(name, module, sum(parts[1:], parts[0]))
        return values

    def _start(self, arriving):
        """Membranes and late values before the first step, when input was zero."""
        membranes = {}

        def run(name, module, x):
            if isinstance(module, Neuron):
                membranes[name] = module.start(x.shape)
                return jnp.zeros_like(x)
            return module(x[:, None])[:, 0]

        zeros = {name: jnp.zeros_like(xs[:, 0]) for name, xs in arriving.items()}
        values = self._run(zeros, {}, run)
        return membranes, {a: values[a] for a, _ in self.late}

    def __call__(self, arriving: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Values [B, T, ...] of all nodes, for the currents from outside."""

        def step(_, state, x):
            membranes, late = state
            membranes = dict(membranes)

            def run(name, module, x):
                if isinstance(module, Neuron):
                    membranes[name], z = module.step(membranes[name], x)
                    return z
                return module(x[:, None])[:, 0]

            values = self._run(x, late, run)
            return (membranes, {a: values[a] for a, _ in self.late}), values

        state = self.memory.load(self._start(arriving))
        state, values = unroll(step, None, state, arriving)
        self.memory.save(state)
        return values


def _groups(names, edges) -> tuple[Any, ...]:
    """The nodes in an order in which they can run; those on a common loop together."""
    edges = [(a, b) for a, b in edges if a in names and b in names]
    after = {name: [b for a, b in edges if a == name] for name in names}
    reached = {name: _reached(name, after) for name in names}
    group = {
        name: tuple(m for m in names if m == name or _meet(name, m, reached))
        for name in names
    }
    before: dict[Any, set] = {g: set() for g in group.values()}
    for a, b in edges:
        if group[a] != group[b]:
            before[group[b]].add(group[a])
    return tuple(TopologicalSorter(before).static_order())


def _reached(name, after):
    seen, todo = set(), [name]
    while todo:
        new = [b for b in after[todo.pop()] if b not in seen]
        seen.update(new)
        todo += new
    return seen


def _meet(a, b, reached):
    return a in reached[b] and b in reached[a]


def _closing(entries, edges) -> tuple[Edge, ...]:
    """The edges that lead back to a node on the way from an entry to them."""
    closing, done = [], set()

    def visit(name, way):
        for a, b in edges:
            if a == name and b in way:
                closing.append((a, b))
            elif a == name and b not in done:
                visit(b, (*way, b))
        done.add(name)

    for entry in dict.fromkeys(entries):
        if entry not in done:
            visit(entry, (entry,))
    return tuple(closing)
