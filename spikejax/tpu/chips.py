"""Peak compute, memory and bandwidth of TPU chips, and the available slices."""

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from jax.experimental import topologies

GIB = 2**30

Device = Any  # jax.Device, which is no type to a type checker


@dataclass(frozen=True)
class Chip:
    """Data sheet of a chip, and the slices built of it."""

    name: str  # prefix of a topology: v5e of v5e:16x16
    flops: float  # peak bfloat16 FLOP/s; a multiply-add counts two
    hbm: float  # bytes of memory available to a program
    hbm_bandwidth: float  # bytes/s between memory and chip
    link_bandwidth: float  # bytes/s of the link to one neighbour, each way
    largest: int  # chips of the largest slice
    shapes: tuple[tuple[int, ...], ...]  # of v4 and v5p only those below 4x4x4
    cubes: bool = False  # slices are also built of whole 4x4x4, which close to rings


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))

# FLOP/s, HBM bandwidth, shapes and sizes: https://cloud.google.com/tpu/docs/v4, also
# /v5e, /v5p, /v6e. HBM: what the compiler (libtpu 0.0.42.1) reports as available when a
# program is too large; 32, 16, 95 and 32 GB are on the label. Links: for v5e, v5p and
# v6e the documented ICI bandwidth of a chip (400, 1200 and 800 GB/s, both ways) over
# its 4 or 6 links; for v4 Austin et al. 2025, "How to Scale Your Model", chapter 2,
# which also says where links close to rings.
_ALL = (
    Chip("v4", 275e12, 30.75 * GIB, 1200e9, 45e9, 4096, _SMALL, True),
    Chip("v5e", 197e12, 15.75 * GIB, 819e9, 50e9, 256, _FLAT),
    Chip("v5p", 459e12, 95.74 * GIB, 2765e9, 100e9, 6144, _SMALL, True),
    Chip("v6e", 918e12, 31.25 * GIB, 1638e9, 100e9, 256, _FLAT),
)
CHIPS = {chip.name: chip for chip in _ALL}


@dataclass(frozen=True)
class Slice:
    """Chips that are wired together: v5e:16x16 is a torus of 256."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """Return the topology name, as the compiler knows it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Return the number of chips."""
        return math.prod(self.shape)

    @property
    def exists(self) -> bool:
        """Tell if the slice can be had."""
        # libtpu itself would compile for v5e:32x32 and 2x2x2, which nobody can rent.
        is_cubes = self.chip.cubes and self.rings == (True,) * 3
        fits = is_cubes and 0 < self.chips <= self.chip.largest
        return fits or self.shape in self.chip.shapes

    @property
    def rings(self) -> tuple[bool, ...]:
        """Tell for each axis if its last chip is linked to its first."""
        # v5e and v6e close only an axis of all 16 chips, v4 and v5p only whole cubes.
        if not self.chip.cubes:
            return tuple(size == 16 for size in self.shape)
        return (all(size % 4 == 0 for size in self.shape),) * len(self.shape)

    @property
    def bandwidth(self) -> float:
        """Return the bytes per second that a corner chip sends over all its links."""
        # The corner has the fewest links of all chips, and a collective ends with its
        # slowest chip. An axis of one chip has no link.
        axes = zip(self.shape, self.rings, strict=True)
        links = sum(1 + ring for size, ring in axes if size > 1)
        return links * self.chip.link_bandwidth


def find_slice(topology: str) -> Slice:
    """Return the slice of a topology name.

    Args:
        topology: chip and shape, such as v5e:16x16.

    Raises:
        ValueError: no such chip, or the chip has no slice of that shape.
    """
    known, hint = f"a chip ({', '.join(CHIPS)}) and a shape, such as v5e:16x16", ""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if match and (chip := CHIPS.get(match[1])):
        found = Slice(chip, tuple(map(int, match[2].split("x"))))
        if found.exists:
            return found
        known = f"a slice that {chip.name} has"
        shapes = ", ".join("x".join(map(str, shape)) for shape in chip.shapes)
        cubes = f" or multiples of 4, up to {chip.largest} chips" if chip.cubes else ""
        hint = f" Take {shapes}{cubes}."
    raise ValueError(f"topology: expected {known}, got {topology!r}.{hint}")


# libtpu looks for the TPU of its host and claims it for one process. These say that
# there is none, so that it compiles on any Linux, also next to another libtpu.
_COMPILE_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu_devices(target: Slice) -> list[Device]:
    """Return the devices of a slice, to compile for; they hold no data and run nothing.

    Raises:
        ValueError: libtpu, which holds the TPU compiler, is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "plan: expected the TPU compiler, libtpu, which is not installed. "
            "In a clone: pip install -e '.[tpu]' (no TPU is needed)."
        )
    for name, value in _COMPILE_ONLY.items():
        os.environ.setdefault(name, value)
    description = topologies.get_topology_desc(
        platform="tpu",
        topology_name=target.name,
        # v4 and v5p have two cores, which JAX programs as one device.
        chip_config_name="megacore" if target.chip.cubes else "default",
        # Hosts have four chips; by default libtpu assumes as much for a single chip.
        chips_per_host_bounds=(1, 1, 1) if target.chips == 1 else (2, 2, 1),
        wrap=target.rings + (False,) * (3 - len(target.shape)),  # three axes always
    )
    return list(description.devices)
