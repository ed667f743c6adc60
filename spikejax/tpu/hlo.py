"""Communication and memory traffic of a compiled program, read from its text (HLO).

The text is that of ``jax.jit(f).lower(...).compile().as_text()``.
"""

# JAX reports operations and bytes of a program, but neither its collectives nor, on
# TPU, which arrays stay in on-chip memory (VMEM). The text has both.

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

# %name = TYPE kind(operands), channel_id=1, replica_groups=...; an asynchronous one is
# a start, which counts, and a done, which does not.
OPERATION = re.compile(
    r"= (?P<type>.+?) (?:ragged-)?"
    r"(?P<kind>all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute|"
    r"collective-broadcast)(?P<start>-start)?\("
)
# bf16[64,56,56,64]{3,0,2,1:T(8,128)(2,1)S(1)}: shape, axes from the fastest on, tile,
# and memory space, which is HBM unless one is named.
ARRAY = re.compile(
    r"\b(?P<dtype>pred|[a-z]+\d+\w*)\[(?P<shape>[\d,]*)\]"
    r"(?:\{(?P<order>[\d,]*):?(?P<rest>[^}]*)\})?"
)
_INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.+?) (?P<kind>[a-z][\w-]*)"
    r"\((?P<operands>.*?)\)"
)
_COMPUTATION = re.compile(r"(?:ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
# Instructions that move nothing: they rename arrays, or their bodies are read instead.
_FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while")
_RENAMED = 'custom_call_target="ConcatBitcast"'


@dataclass(frozen=True)
class Collective:
    """Operations of one kind over groups of the same number of devices."""

    kind: str  # all-reduce, reduce-scatter, all-gather, all-to-all, collective-...
    devices: int  # per group that exchanges data
    count: int  # operations per run of the program
    bytes: int  # of one group's whole arrays, before a reduction or after a gather

    @property
    def sent(self) -> float:
        """Return the bytes that a device must send at least, by any algorithm.

        D (n - 1) / n to gather or scatter data D over n devices, twice that to
        all-reduce it, D to permute or broadcast it.

        Reference: Chan et al. 2007, doi:10.1002/cpe.1206.
        """
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.bytes
        times = 2 if self.kind == "all-reduce" else 1
        return times * self.bytes * (self.devices - 1) / self.devices


def collectives(hlo: str) -> tuple[Collective, ...]:
    """Return the collectives of a compiled program, summed by kind and group size.

    An operation in the body of a loop counts once.
    """
    partitions = re.match(r"HloModule.*?num_partitions=(\d+)", hlo)
    everyone = int(partitions[1]) if partitions else 1
    found: dict[tuple[str, int], list[int]] = defaultdict(list)  # bytes of operations
    seen, computation = set(), ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header["name"]
        operation = OPERATION.search(line)
        if not operation:
            continue
        # The compiler may cut one operation into pieces, to overlap them with other
        # work. They share a channel and count once.
        if channel := re.search(r"channel_id=(\d+)", line):
            if channel[1] in seen:
                continue
            seen.add(channel[1])
        devices = _group_size(line, everyone)
        # TPU writes a reduce-scatter as an all-reduce of which a part is kept.
        scatters = computation.startswith("all-reduce-scatter")
        kind = "reduce-scatter" if scatters else operation["kind"]
        found[kind, devices].append(_group_bytes(operation, devices))
    return tuple(Collective(*k, len(n), sum(n)) for k, n in sorted(found.items()))


def _group_bytes(operation: re.Match[str], devices: int) -> int:
    """Return the bytes of a group's whole array, from the type of the result."""
    arrays = [_bytes(d, _ints(s)) for d, s, *_ in ARRAY.findall(operation["type"])]
    if operation["kind"] == "reduce-scatter":
        return sum(arrays) * devices
    if operation["start"] and operation["kind"] == "all-gather":  # (inputs, outputs)
        return sum(arrays[len(arrays) // 2 :])
    if operation["start"] and operation["kind"] == "collective-permute":
        return arrays[0]  # (input, output, two flags)
    return sum(arrays)


def _group_size(line: str, everyone: int) -> int:
    """Return the number of devices per group; XLA writes groups in three ways."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(iota[1])
    mesh = re.search(r"replica_groups=mesh\[(.+?)\].*?\{(.+?)\}", line)
    if not mesh:  # {}: one group of all
        return everyone
    axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])  # 'x', or part 'x':(1)2
    return math.prod(int(part or axes[axis]) for axis, part in used)


def hbm_bytes(hlo: str) -> int:
    """Return the bytes that a run reads from and writes to HBM.

    Every array that an instruction takes or gives counts once, with the padding of its
    tiles, unless it is in on-chip memory. The body of a loop counts once. CPU programs
    name no memory space, so all their arrays count.
    """
    called, total = set(_CALLED.findall(hlo)), 0
    counts, types = False, {}
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            # The inside of a fusion or a reduction stays in registers.
            counts, types = header["name"] not in called, {}
        found = _INSTRUCTION.match(line) if counts else None
        if not found:
            continue
        kind = found["kind"]
        types[found["name"]] = found["type"]
        if kind in _FREE or kind.endswith("-done") or _RENAMED in line:
            continue
        arrays = list(_padded_arrays(found["type"]))
        if kind in ("copy-start", "slice-start"):
            # Types are (from, to, flag) or (to, from, flag): the smaller one is moved.
            sizes, are_hbm = zip(*arrays[:2], strict=True)
            total += min(sizes) * sum(are_hbm)
            continue
        for operand in re.findall(r"%([\w.-]+)", found["operands"]):
            arrays += _padded_arrays(types.get(operand, ""))
        total += sum(size for size, is_hbm in arrays if is_hbm)
    return total


def cycles(hlo: str) -> int:
    """Return the clock cycles of a run by the TPU compiler's model, 0 if not given.

    The model leaves out waiting for memory and network.
    """
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', hlo)))


def _padded_arrays(text: str) -> Iterator[tuple[int, bool]]:
    """Yield (bytes with padding, True if in HBM) for each array of a type."""
    for dtype, axes, fastest_first, rest in ARRAY.findall(text):
        shape, order = _ints(axes), _ints(fastest_first)
        tile = re.match(r"T\(([\d,]+)\)", rest)
        if tile and order:
            # Tiles cover the fastest axes, which are the last ones of the layout. 64
            # channels in tiles of 128 take twice their bytes.
            shape = [shape[axis] for axis in reversed(order)]
            sizes = _ints(tile[1])[-len(shape) :]
            for axis, size in enumerate(sizes, len(shape) - len(sizes)):
                shape[axis] = -(-shape[axis] // size) * size
        yield _bytes(dtype, shape), "S(" not in rest


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _bytes(dtype: str, shape: list[int]) -> int:
    bits = re.search(r"\d+", dtype)  # bf16, f32, s8, f8e4m3fn; pred is a byte
    return math.prod(shape) * int(bits[0] if bits else 8) // 8
