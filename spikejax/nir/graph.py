"""Networks as graphs of named modules, which may hold loops."""

from collections.abc import Hashable, Iterable, Sequence
from graphlib import TopologicalSorter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax._compat import List
from spikejax.layers import Memory, Neuron
from spikejax.unroll import unroll

Edge = tuple[str, str]
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

    def __init__(
        self,
        nodes: dict[str, nnx.Module],
        edges: Sequence[Edge],
        source: str,
        target: str,
    ):
        self.edges, self.source, self.target = tuple(edges), source, target
        self.groups = _groups(tuple(nodes), edges)
        # One part per group. A list, since Flax 0.11 has no dict of modules.
        self.parts = List(
            Loop({name: nodes[name] for name in group}, edges)
            if len(group) > 1 or (group[0], group[0]) in self.edges
            else nodes[group[0]]
            for group in self.groups
        )

    def __call__(self, xs: jax.Array) -> jax.Array:
        """Return outputs [B, T, ...] for inputs [B, T, ...]."""
        values = {self.source: xs}
        for group, part in zip(self.groups, self.parts, strict=True):
            currents = {name: _total(name, self.edges, values) for name in group}
            if isinstance(part, Loop):
                values |= part({k: x for k, x in currents.items() if x is not None})
            else:
                values[group[0]] = part(currents[group[0]])
        return _total(self.target, self.edges, values)


def _total(name: str, edges: Iterable[Edge], *values: Values) -> Any:
    """Return the sum of the values with an edge to a node, None if there are none."""
    found = [given[a] for given in values for a, b in edges if b == name and a in given]
    return sum(found[1:], found[0]) if found else None


class Loop(nnx.Module):
    """Modules that feed each other, run step by step.

    Values take one time step along an edge that closes a loop, as seen from where
    currents enter. Before the first step no neuron has fired.

    Args:
        nodes: modules over [B, T, ...] by name.
        edges: (from, to); those from and to other nodes say where currents enter.
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

    def _step(self, params: None, state: tuple, currents: Values) -> tuple:
        """Return ((states, late values), values of all nodes) of one time step.

        Without states neurons start, and do not fire.
        """
        states, late = state
        after, values = {}, {}
        for name, module in zip(self.names, self.modules, strict=True):
            parts = [
                currents.get(name),
                _total(name, self.early, values),
                _total(name, self.late, late),
            ]
            parts = [part for part in parts if part is not None]
            x = sum(parts[1:], parts[0])
            if not isinstance(module, Neuron):
                values[name] = module(x[:, None])[:, 0]
            elif states is None:
                after[name], values[name] = module.start(x.shape), jnp.zeros_like(x)
            else:
                after[name], values[name] = module.step(states[name], x)
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
    seen: dict[Any, None] = {}
    todo = [start]
    while todo:
        name = todo.pop()
        new = [b for a, b in edges if a == name and b not in seen]
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
    before: dict[Any, list] = {own: [] for own in group.values()}
    for a, b in edges:
        if group[a] != group[b]:
            before[group[b]].append(group[a])
    return tuple(TopologicalSorter(before).static_order())


def _closing(entries: Sequence[str], edges: Sequence[Edge]) -> tuple[Edge, ...]:
    """Return the edges that lead back to a node on the path from an entry to them."""
    # Depth first: from the first entry, the last edge of each loop is the late one.
    closing, done = [], set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        for a, b in edges:
            if a == name and b in path:
                closing.append((a, b))
            elif a == name and b not in done:
                visit(b, (*path, b))
        done.add(name)

    for entry in dict.fromkeys(entries):
        if entry not in done:
            visit(entry, (entry,))
    return tuple(closing)
