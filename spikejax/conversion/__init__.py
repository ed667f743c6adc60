"""ANN to SNN: calibrate a ReLU network, convert it, and count its steps."""

from spikejax.conversion.spiking import (
    Converted,
    calibrate,
    convert,
    fold_norms,
    least_error,
    maximum,
    percentile,
)

__all__ = [
    "Converted",
    "calibrate",
    "convert",
    "fold_norms",
    "least_error",
    "maximum",
    "percentile",
]
