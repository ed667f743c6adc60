"""NIR, the neuromorphic intermediate representation that simulators and chips read."""

from spikejax.nir.neurons import EULER, EXPONENTIAL, Dialect, loop, node
from spikejax.nir.read import NORSE, ROCKPOOL, SINABS, SNNTORCH, STANDARD, from_nir
from spikejax.nir.write import to_nir

__all__ = [
    "EULER",
    "EXPONENTIAL",
    "NORSE",
    "ROCKPOOL",
    "SINABS",
    "SNNTORCH",
    "STANDARD",
    "Dialect",
    "from_nir",
    "loop",
    "node",
    "to_nir",
]
