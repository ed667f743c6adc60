"""Networks from NIR, written here or by another library.

    model = from_nir("network.nir", dt=1e-4, dialect=SNNTORCH)

NIR's text leaves open how its equations become steps and how neurons reset, and the
libraries differ: a ``Dialect`` says how a library means its nodes.
"""

import math
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import h5py
import jax
import nir
import numpy as np

from spikejax import neurons
from spikejax.nir.graph import Edge, Graph, reachable
from spikejax.nir.layers import Node, read_layer
from spikejax.nir.neurons import EXPONENTIAL, Dialect, read_neurons

STANDARD = Dialect()
"""As in NIR's text, and as to_nir and SpikingJelly write it."""
SNNTORCH = Dialect(soft_reset=neurons.late_reset)
"""Leaky and Synaptic with reset_mechanism="subtract", which acts one step later; its dt
is 1e-4."""
NORSE = Dialect(per_step=True)
"""LIF, LIFBox, LIBox and IAF. to_nir(..., dt=1.0) of Norse 1.1 writes true time
constants; its default writes them 1000 times too small, and needs dt=1e-6 here."""
SINABS = Dialect(EXPONENTIAL, neurons.lif, per_step=True)
"""IAF, LIF and ExpLeak with one spike per step. Its unit of time is the step: dt=1."""


def _after_decay(dt: float, node: Node) -> np.ndarray:
    """Return the gain of Rockpool, whose r is tau exp(-dt / tau) / dt.

    It fits its LI, where a current decays in its own step, but not its LIF and CubaLIF,
    where the current comes after the decay. The synaptic current decays in its own.
    """
    cuba = isinstance(node, nir.CubaLIF)
    tau = np.asarray(node.tau_mem if cuba else node.tau, np.float64)
    late = np.exp(dt / tau) if cuba or isinstance(node, nir.LIF) else 1.0
    synapse = node.w_in * np.exp(-dt / node.tau_syn) if cuba else 1.0
    return np.asarray(node.r) * dt / tau * late * synapse


ROCKPOOL = Dialect(EXPONENTIAL, neurons.lif, gain=_after_decay)
"""LIFNeuronTorch and LIFTorch with max_spikes_per_dt=1, and ExpSynTorch; dt is its
own."""

# What HDF5, NIR and JAX raise for damaged files, and for graphs that do not fit.
DAMAGE = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError)
DAMAGE += (OSError, RuntimeError, TypeError, ValueError, zlib.error)
UNPACKED = 2**26  # bytes
GZIP, SHUFFLE, SUMS = 1, 2, 3  # HDF5's numbers of filters


def from_nir(
    graph: nir.NIRGraph | str | Path, *, dt: float, dialect: Dialect = STANDARD
) -> Graph:
    """Return the network [B, T, H, W, C] -> [B, T, K] that a graph describes.

    Images are channels-last here, also where the graph's input is [C, H, W]. Neurons
    become IF, LIF, LI or CubaLIF where these have their equations; parameters may
    differ from neuron to neuron. They start from their reset value or from rest. Where
    edges close a loop, values take one time step. A graph inside of a graph becomes
    part of it.

    Args:
        graph: with one input and one output, or the file that holds it.
        dt: seconds per time step, > 0; that of the library that wrote the graph.
        dialect: STANDARD, SNNTORCH, NORSE, SINABS, ROCKPOOL, or your own for another
            writer.

    Raises:
        ValueError: an argument is out of its range, the graph has nodes, edges, shapes
            or numbers that spikejax cannot run, or the file is damaged.
    """
    right = isinstance(dialect, Dialect)
    if not (0 < dt < math.inf and right):
        raise ValueError(
            "from_nir: expected dt > 0 in seconds, and a dialect such as "
            f"spikejax.nir.SINABS, got dt={dt} and "
            f"dialect={type(dialect).__name__ if right else repr(dialect)}."
        )
    where = "from_nir: " if isinstance(graph, nir.NIRGraph) else f"from_nir: {graph}: "
    try:
        # NaN and numbers that are too large raise here, in place of a warning. A tau of
        # 0 is out of range, as is said below.
        with np.errstate(invalid="raise", over="raise", divide="ignore"):
            return _network(_read(graph), dt, dialect)
    except DAMAGE as error:
        reason = " ".join(str(error).split())
        if not reason.startswith("from_nir: "):
            reason = (
                "expected a graph that is whole and whose shapes fit, got "
                f"{type(error).__name__}: {reason[:200]}. Write or copy it again."
            )
        raise ValueError(where + reason.removeprefix("from_nir: ")) from error


def _read(graph: nir.NIRGraph | str | Path) -> nir.NIRGraph:
    if isinstance(graph, nir.NIRGraph):
        return graph
    data = Path(graph).read_bytes()
    _check_heaps(data)
    with h5py.File(graph, "r") as file:
        # Weights hardly shrink; zeros do to a thousandth.
        _check_objects(file, UNPACKED + 32 * len(data))
    # Its check of types refuses graphs of other libraries, and loops.
    return nir.read(graph, type_check=False)


def _check_objects(file: h5py.File, most: int) -> None:
    """Check that a file holds all of its data, nothing twice, and not too much."""
    root: Any = file["/"]
    todo, seen, size = [root], {root.id}, 0  # identifiers are equal if objects are
    while todo:
        group = todo.pop()
        for name in group:
            hard = isinstance(group.get(name, getlink=True), h5py.HardLink)
            item = group[name] if hard else None
            if isinstance(item, h5py.Group):
                todo.append(item)
            # Data outside of the file could be any that this process can read.
            elif item is None or item.external or item.is_virtual:
                raise ValueError(f"a link out of the file at {name!r}")
            else:
                size += _unpacked(item, most)
            if item.id in seen or size > most:
                raise ValueError(f"a loop, or more than {most} bytes, at {name!r}")
            seen.add(item.id)


def _unpacked(item: h5py.Dataset, most: int) -> int:
    """Return the bytes that reading a dataset takes; a chunk is read as a whole."""
    made: Any = item.id.get_create_plist()
    filters = [made.get_filter(n)[0] for n in range(made.get_nfilters())]
    packers = [n for n in filters if n not in (SHUFFLE, SUMS)]
    if len(packers) > 1:
        raise ValueError(f"data packed {len(packers)} times at {item.name!r}")
    chunk = math.prod(item.chunks or (0,)) * item.id.get_type().get_size()
    if GZIP in filters and chunk <= most:
        place = filters.index(GZIP)
        for n in range(item.id.get_num_chunks()):
            offset = item.id.get_chunk_info(n).chunk_offset
            skipped, raw = item.id.read_direct_chunk(offset)
            # HDF5 itself would unpack all, which can be 1,000 times the file.
            if not skipped >> place & 1:
                raw = zlib.decompressobj().decompress(raw, chunk + 5)
            if len(raw) > chunk + 4:  # with its checksum
                raise ValueError(f"a chunk of more than {chunk} bytes at {item.name!r}")
    return max(item.nbytes, chunk)


def _check_heaps(data: bytes) -> None:
    """Check the heaps of strings of a file: HDF5 never returns from a step of 0."""
    for heap in re.finditer(b"GCOL", data):
        at, end = heap.start() + 16, len(data)
        if at <= end:
            end = min(end, heap.start() + struct.unpack_from("<Q", data, at - 8)[0])
        while at + 16 <= end:
            index, size = struct.unpack_from("<HxxxxxxQ", data, at)
            step = 16 + -(-size // 8) * 8 if index else size
            if step < 16:
                raise ValueError("a damaged heap of strings")
            at += step


def _network(graph: nir.NIRGraph, dt: float, dialect: Dialect) -> Graph:
    nodes, edges = _flat(graph, "")
    source, target = (_only(kind, nodes) for kind in (nir.Input, nir.Output))
    named = {name for edge in edges for name in edge}
    lost = (set(nodes) | named) - ({source, *reachable(source, edges)} & set(nodes))
    if lost:
        raise ValueError(
            f"from_nir: expected edges that lead from {source!r} to every node and on "
            f"to {target!r}, got none to {', '.join(map(repr, sorted(lost)))}."
        )
    modules = {}
    for name, node in nodes.items():
        if name in (source, target):
            continue
        module = read_layer(node) or read_neurons(name, node, dt, dialect)
        if module is None:
            raise ValueError(
                f"from_nir: expected nodes that spikejax has, got {name!r}, a "
                f"{type(node).__name__}. It has Affine and Linear of a matrix, Scale, "
                "Conv1d, Conv2d, SumPool2d, AvgPool2d, Flatten of all axes, Threshold, "
                "I, IF, LI, LIF, CubaLI and CubaLIF."
            )
        modules[name] = module
    network = Graph(modules, edges, source, target)
    first = [source, *(b for a, b in edges if a == source)]
    _check_shapes(network, [nodes[name].input_type["input"] for name in first])
    return network


def _check_shapes(network: Graph, shapes: list[np.ndarray | None]) -> None:
    """Check that an input of one of these shapes, channels-first, can be run."""
    given, *others = shapes
    problem = None
    # Norse writes the input with its batch.
    for shape in (given, None if given is None else given[1:], *others):
        try:
            if shape is not None and min(shape.tolist(), default=0) > 0:
                channels, *size = shape.tolist()
                xs = jax.ShapeDtypeStruct((1, 1, *size, channels), np.float32)
                jax.eval_shape(lambda xs: network(xs), xs)
                return
        except DAMAGE as error:
            problem = problem or error
    if problem:
        raise problem


def _only(kind: type[nir.NIRNode], nodes: dict[str, nir.NIRNode]) -> str:
    found = [name for name, node in nodes.items() if isinstance(node, kind)]
    if len(found) != 1:
        raise ValueError(
            f"from_nir: expected a graph with one {kind.__name__} node, got "
            f"{len(found)}: {', '.join(found) or 'none'}."
        )
    return found[0]


def _flat(
    graph: nir.NIRGraph, prefix: str
) -> tuple[dict[str, nir.NIRNode], tuple[Edge, ...]]:
    """Return nodes and edges of a graph, those of the graphs in it in their place."""
    nodes: dict[str, nir.NIRNode] = {}
    edges = [(prefix + str(a), prefix + str(b)) for a, b in graph.edges]
    for key, node in graph.nodes.items():
        name = prefix + str(key)
        if not isinstance(node, nir.NIRGraph):
            nodes[name] = node
            continue
        inside, links = _flat(node, f"{name}.")
        first, last = (_only(kind, inside) for kind in (nir.Input, nir.Output))
        starts = [b for a, b in links if a == first]
        ends = [a for a, b in links if b == last]
        into = [(a, s) for a, b in edges if b == name for s in starts]
        out = [(e, b) for a, b in edges if a == name for e in ends]
        others = [edge for edge in edges if name not in edge]
        links = [edge for edge in links if first not in edge and last not in edge]
        edges = [*others, *links, *into, *out]
        nodes |= {k: n for k, n in inside.items() if k not in (first, last)}
    return nodes, tuple(dict.fromkeys(edges))
