"""What a compiled program moves to and from the memory of a TPU, read from its text.

The TPU compiler keeps what it can on the chip (VMEM), and says where each array lies.
"""

import math
import re

_INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.+?) (?P<kind>[a-z][\w-]*)"
    r"\((?P<operands>.*?)\)"
)
# bf16[64,56,56,64]{3,0,2,1:T(8,128)(2,1)S(1)}: shape, axes from the fastest on, tile,
# and memory space, which is HBM where none is named.
_ARRAY = re.compile(
    r"\b(?P<dtype>pred|[a-z]+\d+\w*)\[(?P<shape>[\d,]*)\]"
    r"(?:\{(?P<order>[\d,]*):?(?P<rest>[^}]*)\})?"
)
_COMPUTATION = re.compile(r"(?:ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_INSIDE = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
_RENAMED = 'custom_call_target="ConcatBitcast"'
_FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while")


def hbm_bytes(hlo: str) -> int:
    """Bytes that a run reads from and writes to HBM, each instruction whole.

    Every array that an instruction takes or gives counts once, with the padding of its
    tiles, unless it lies on the chip. The body of a loop counts once.

    Args:
        hlo: ``jax.jit(f).lower(...).compile().as_text()``; of a CPU all arrays count.
    """
    inside, total = set(_INSIDE.findall(hlo)), 0
    counts, types = False, {}
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):  # a fused one is an instruction
            counts, types = header["name"] not in inside, {}
        found = _INSTRUCTION.match(line) if counts else None
        if not found:
            continue
        kind = found["kind"]
        types[found["name"]] = found["type"]
        if kind in _FREE or kind.endswith("-done") or _RENAMED in line:
            continue
        arrays = _in_hbm(found["type"])
        if kind in (
            "copy-start",
            "slice-start",
        ):  # (from, to, flag) or (to, from, flag)
            total += min(size for size, _ in arrays[:2]) * sum(h for _, h in arrays[:2])
            continue
        for operand in re.findall(r"%([\w.-]+)", found["operands"]):
            arrays += _in_hbm(types.get(operand, ""))
        total += sum(size for size, is_hbm in arrays if is_hbm)
    return total


def cycles(hlo: str) -> int:
    """Clock cycles of a run by the TPU compiler's own model, or 0 where it names none.

    Waiting for memory and network is not in it.
    """
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', hlo)))


def _in_hbm(text):
    """(bytes, whether it lies in HBM) for each array of a type."""
    return [
        (_padded(array), "S(" not in (array["rest"] or ""))
        for array in _ARRAY.finditer(text)
    ]


def _padded(array):
    """Bytes, with the last axes in the order of the layout filled up to tiles."""
    shape = [int(n) for n in array["shape"].split(",") if n]
    order = [int(n) for n in (array["order"] or "").split(",") if n]
    tile = re.match(r"T\(([\d,]+)\)", array["rest"] or "")
    if tile and order:
        shape = [shape[axis] for axis in reversed(order)]
        sizes = [int(n) for n in tile[1].split(",")][-len(shape) :]
        for axis, size in enumerate(sizes, len(shape) - len(sizes)):
            shape[axis] = -(-shape[axis] // size) * size
    bits = re.search(r"\d+", array["dtype"])
    return math.prod(shape) * int(bits[0] if bits else 8) // 8
