"""What a TPU chip does a second, holds and sends, and the slices that there are."""

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Figures of one chip."""

    name: str
    """As in the name of a topology: v5e of v5e:16x16."""
    flops: float
    """bfloat16 operations a second at best; a multiply and its sum count two."""
    hbm: float
    """Bytes of memory that a program may use."""
    hbm_bandwidth: float
    """Bytes a second between memory and chip."""
    link_bandwidth: float
    """Bytes a second that the link to one neighbour carries, each way."""
    largest: int
    """Chips of the largest slice."""
    shapes: tuple[tuple[int, ...], ...]
    """The slices, for v4 and v5p only those below a cube of 4x4x4."""
    cubes: bool = False
    """Whether slices are also built of whole cubes of 4x4x4, which close to rings."""
    config: str = "default"
    """Its name for the compiler: megacore makes one device of two cores."""


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))

# FLOP/s, HBM bandwidth, shapes and sizes: https://cloud.google.com/tpu/docs/v4, also
# /v5e, /v5p, /v6e. HBM: what the compiler (libtpu 0.0.42.1) says is available when a
# program is too large; 32, 16, 95 and 32 GB are on the label. Links: for v5e, v5p and
# v6e the documented ICI bandwidth of a chip (400, 1200 and 800 GB/s, both ways) over
# its 4 or 6 links; for v4 Austin et al. 2025, "How to Scale Your Model", chapter 2,
# which also says where links close to rings.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 30.75 * GIB, 1200e9, 45e9, 4096, _SMALL, True, "megacore"),
        Chip("v5e", 197e12, 15.75 * GIB, 819e9, 50e9, 256, _FLAT),
        Chip("v5p", 459e12, 95.74 * GIB, 2765e9, 100e9, 6144, _SMALL, True, "megacore"),
        Chip("v6e", 918e12, 31.25 * GIB, 1638e9, 100e9, 256, _FLAT),
    )
}


@dataclass(frozen=True)
class Slice:
    """Chips that are wired together: v5e:16x16 is a torus of 256."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """As the compiler knows it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Their number."""
        return math.prod(self.shape)

    @property
    def rings(self) -> tuple[bool, ...]:
        """Along which axes the last chip is linked to the first."""
        if self.chip.cubes:
            return (self._whole_cubes,) * len(self.shape)
        return tuple(size == 16 for size in self.shape)

    @property
    def _whole_cubes(self):
        return all(size % 4 == 0 for size in self.shape)

    @property
    def bandwidth(self) -> float:
        """Bytes a second that a chip at a corner sends over all of its links."""
        links = [
            1 + ring
            for size, ring in zip(self.shape, self.rings, strict=True)
            if size > 1
        ]
        return sum(links) * self.chip.link_bandwidth


def find_slice(topology: str) -> Slice:
    """The slice of a name such as v5e:16x16; ValueError where there is none."""
    named = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if not named or named[1] not in CHIPS:
        raise ValueError(
            f"topology: expected a chip ({', '.join(CHIPS)}) and a shape, such as "
            f"v5e:16x16, got {topology!r}."
        )
    chip = CHIPS[named[1]]
    found = Slice(chip, tuple(map(int, named[2].split("x"))))
    size, shape = found.chips, found.shape
    is_cubes = chip.cubes and len(shape) == 3 and found._whole_cubes
    if shape not in chip.shapes and not (is_cubes and 0 < size <= chip.largest):
        exist = ", ".join("x".join(map(str, shape)) for shape in chip.shapes)
        more = f" or multiples of 4, up to {chip.largest} chips" if chip.cubes else ""
        raise ValueError(
            f"topology: expected a slice that {chip.name} has, got {named[2]}. "
            f"Take {exist}{more}."
        )
    return found


# libtpu looks for the TPU that it runs on, and wants it for one process alone.
_COMPILE_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu_devices(where: Slice) -> list[Any]:
    """The devices of a slice, to compile for: they hold no data and run nothing."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "plan: expected the TPU compiler, libtpu, which is not installed. "
            "pip install 'spikejax[tpu]' (no TPU is needed)."
        )
    for name, value in _COMPILE_ONLY.items():
        os.environ.setdefault(name, value)
    axes = len(where.shape)
    try:
        description = topologies.get_topology_desc(
            platform="tpu",
            topology_name=where.name,
            chip_config_name=where.chip.config,
            chips_per_host_bounds=(1, 1, 1) if where.chips == 1 else (2, 2, 1),
            wrap=where.rings + (False,) * (3 - axes),
        )
    except jax.errors.JaxRuntimeError as error:
        said = str(error).splitlines()[0]
        raise ValueError(
            f"plan: expected libtpu to know {where.name}, got: {said}"
        ) from None
    return list(description.devices)
