"""ANN to SNN: calibrate a ReLU network, convert it, and count its steps."""

from spikejax.conversion.fold import fold_norms
from spikejax.conversion.rules import least_error, least_squares, maximum, percentile
from spikejax.conversion.spiking import Converted, Replaced, calibrate, convert

__all__ = [
    "Converted",
    "Replaced",
    "calibrate",
    "convert",
    "fold_norms",
    "least_error",
    "least_squares",
    "maximum",
    "percentile",
]
