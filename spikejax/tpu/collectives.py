"""What a compiled program sends between its devices, read from its text (HLO)."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal, cast

Kind = Literal[
    "all-reduce",
    "reduce-scatter",
    "all-gather",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
]


@dataclass(frozen=True)
class Collective:
    """Operations of one kind over groups of the same number of devices."""

    kind: Kind
    devices: int
    """In a group that exchanges data."""
    count: int
    """How often in a run of the program."""
    bytes: int
    """Data of one group in all of them, whole: what is reduced, or what was gathered
    in the end."""

    @property
    def sent(self) -> float:
        """Bytes that a device must send at least, whatever the algorithm.

        D (n - 1) / n to gather or to scatter data D over n devices, twice that to
        reduce it for all, D to hand it on.

        Reference: Chan et al. 2007, doi:10.1002/cpe.1206.
        """
        share = (self.devices - 1) / self.devices
        if self.kind in ("collective-permute", "collective-broadcast"):
            share = 1.0
        return self.bytes * (2 * share if self.kind == "all-reduce" else share)


# %name = TYPE kind(operands), channel_id=1, replica_groups=...; asynchronous ones are a
# start, which counts, and a done, which does not.
_OPERATION = re.compile(
    r"= (?P<type>.+?) (?:ragged-)?"
    r"(?P<kind>all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute|"
    r"collective-broadcast)(?P<start>-start)?\("
)
_COMPUTATION = re.compile(r"(?:ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_ARRAY = re.compile(r"\b(?P<dtype>pred|[a-z]+\d+\w*)\[(?P<shape>[\d,]*)\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_PARTITIONS = re.compile(r"^HloModule.*?num_partitions=(\d+)")


def collectives(hlo: str) -> tuple[Collective, ...]:
    """The collectives of a compiled program, summed up by kind and group.

    One that the compiler cut into pieces, so as to overlap them with other work, counts
    once; so does one in the body of a loop.

    Args:
        hlo: ``jax.jit(f).lower(...).compile().as_text()``.
    """
    found = _PARTITIONS.search(hlo)
    everyone = int(found[1]) if found else 1
    count: Counter = Counter()
    size: Counter = Counter()
    seen, computation = set(), ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header["name"]
        operation = _OPERATION.search(line)
        if not operation:
            continue
        channel = _CHANNEL.search(line)
        if channel and channel[1] in seen:  # another piece of the same
            continue
        if channel:
            seen.add(channel[1])
        kind, devices = operation["kind"], _group_size(line, everyone)
        data = _data(operation, devices)
        if computation.startswith("all-reduce-scatter"):  # TPU: of which a part is kept
            kind = "reduce-scatter"
        count[kind, devices] += 1
        size[kind, devices] += data
    return tuple(
        Collective(cast(Kind, kind), devices, count[kind, devices], n)
        for (kind, devices), n in sorted(size.items())
    )


def _data(operation, devices):
    """Bytes of the whole, from the type of the result."""
    arrays = [_bytes(array) for array in _ARRAY.finditer(operation["type"])]
    if operation["kind"] == "reduce-scatter":
        return sum(arrays) * devices
    if operation["start"] and operation["kind"] == "all-gather":  # (inputs, outputs)
        return sum(arrays[len(arrays) // 2 :])
    if operation["start"] and operation["kind"] == "collective-permute":
        return arrays[0]  # (input, output, two flags)
    return sum(arrays)


def _bytes(array):
    bits = re.search(r"\d+", array["dtype"])  # bf16, f32, s8, f8e4m3fn; pred is a byte
    elements = math.prod(int(n) for n in array["shape"].split(",") if n)
    return elements * int(bits[0] if bits else 8) // 8


def _group_size(line, everyone):
    """Devices in a group; XLA has three ways to write them."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(iota[1])
    mesh = re.search(r"replica_groups=mesh\[(.+?)\].*?\{(.+?)\}", line)
    if not mesh:  # {}: all of them
        return everyone
    axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])  # 'x', or part 'x':(1)2
    return math.prod(int(part or axes[axis]) for axis, part in used)
