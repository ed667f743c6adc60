"""Networks as graphs of named modules, which may hold loops."""

from collections.abc import Hashable, Iterable, Sequence
from graphlib import TopologicalSorter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax._compat import List
from spikejax.layers import Neuron
from spikejax.memory import Memory
from spikejax.unroll import unroll

Edge = tuple[str, str]
Nodes = dict[str, nnx.Module]
Values = dict[str, jax.Array]  # by the name of the node that they come from


class Graph(nnx.Module):
    """Network of named modules and edges; values that meet at a module are summed.

    Modules on a common loop run step by step, see ``Loop``, all others over the whole
    sequence.

    Args:
        nodes: modules over [B, T, ...] by name, in any order.
        edges: (from, to), where ``source`` stands for the input.
        source, target: names of input and output, which are not among the nodes.
    """

    def __init__(self, nodes: Nodes, edges: Sequence[Edge], source: str, target: str):
        self.source, self.target = source, target
        self.groups = _groups(tuple(nodes), edges)
        inner = {(a, b) for group in self.groups for a in group for b in group}
        self.edges = tuple(edge for edge in edges if edge not in inner)
        # One part per group. A list, since Flax 0.11 has no dict of modules.
        self.parts = List(
            Loop({name: nodes[name] for name in group}, edges)
            if any(set(edge) <= set(group) for edge in edges)
            else nodes[group[0]]
            for group in self.groups
        )

    def __call__(self, xs: jax.Array) -> jax.Array:
        """Return outputs [B, T, ...] for inputs [B, T, ...]."""
        sums = _sums(self.edges, {self.source: xs})
        for group, part in zip(self.groups, self.parts, strict=True):
            x = {name: sums[name] for name in group if name in sums}
            values = part(x) if isinstance(part, Loop) else jax.tree.map(part, x)
            sums = _sums(self.edges, values, sums)
        return sums[self.target]


def _sums(edges: Iterable[Edge], values: Values, sums: Values | None = None) -> Values:
    """Return the sums of the values that edges lead to, by node, added to others."""
    sums = dict(sums or {})
    for a, b in edges:
        if a in values:
            sums[b] = sums[b] + values[a] if b in sums else values[a]
    return sums


class Loop(nnx.Module):
    """Modules that feed each other, run step by step.

    Values take one time step along an edge that closes a loop, as seen from where
    currents enter. Before the first step no neuron has fired.

    Args:
        nodes: modules over [B, T, ...] by name.
        edges: (from, to); those from and to other nodes say where currents enter.
    """

    def __init__(self, nodes: Nodes, edges: Sequence[Edge]):
        inner = [edge for edge in edges if set(edge) <= set(nodes)]
        entries = [b for a, b in edges if b in nodes and a not in nodes]
        self.names, self.late = _ordered(entries, inner)
        self.early = tuple(edge for edge in inner if edge not in self.late)
        self.modules = List(nodes[name] for name in self.names)
        self.memory = Memory()

    def _step(self, params: None, state: tuple, currents: Values) -> tuple:
        """Return ((states, late values), values of all nodes) of one time step.

        Without states neurons start, and do not fire.
        """
        states, late = state
        after, values = {}, {}
        sums = _sums(self.late, late, currents)
        for name, module in zip(self.names, self.modules, strict=True):
            x = sums[name]
            if not isinstance(module, Neuron):
                values[name] = module(x[:, None])[:, 0]
            elif states is None:
                after[name], values[name] = module.start(x.shape), jnp.zeros_like(x)
            else:
                after[name], values[name] = module.step(states[name], x)
            sums = _sums(self.early, {name: values[name]}, sums)
        return (after, {a: values[a] for a, _ in self.late}), values

    def __call__(self, currents: Values) -> Values:
        """Return the values [B, T, ...] of all nodes for the currents from outside."""
        # A bias in the loop acts from the first step: late values are those that the
        # modules give for an input of zero, not zeros.
        zeros = {name: jnp.zeros_like(xs[:, 0]) for name, xs in currents.items()}
        state = self.memory.load(self._step(None, (None, {}), zeros)[0])
        state, values = unroll(self._step, None, state, currents)
        self.memory.save(state)
        return values


def reachable(start: Hashable, edges: Iterable[tuple]) -> dict[Any, None]:
    """Return the nodes that edges lead to; the start itself only from a loop."""
    after: dict[Any, list] = {}
    for a, b in edges:
        after.setdefault(a, []).append(b)
    seen: dict[Any, None] = {}
    todo = [start]
    while todo:
        new = [b for b in after.get(todo.pop(), ()) if b not in seen]
        seen |= dict.fromkeys(new)
        todo += new
    return seen


def _groups(names: tuple[str, ...], edges: Sequence[Edge]) -> tuple[Any, ...]:
    """Return the nodes in an order that can run, those on a common loop as one."""
    edges = [(a, b) for a, b in edges if a in names and b in names]
    after = {name: reachable(name, edges) for name in names}
    group = {
        a: tuple(b for b in names if b == a or (a in after[b] and b in after[a]))
        for a in names
    }
    # Lists, not sets: the order names the parameters, so it must not depend on hashes.
    before = {
        own: [group[a] for a, b in edges if b in own and a not in own]
        for own in group.values()
    }
    return tuple(TopologicalSorter(before).static_order())


def _ordered(
    entries: Sequence[str], edges: Sequence[Edge]
) -> tuple[tuple[str, ...], tuple[Edge, ...]]:
    """Return the nodes of a loop in the order of a step, and the edges against it."""
    # Depth first: from the first entry, the last edge of each loop is the late one.
    order: list[str] = []
    late = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        for a, b in edges:
            if a == name and b in path:
                late.append((a, b))
            elif a == name and b not in order:
                visit(b, (*path, b))
        order.insert(0, name)

    for entry in entries:
        if entry not in order:
            visit(entry, (entry,))
    return tuple(order), tuple(late)
