"""Multi-threshold spiking neural networks in JAX and Flax."""

from importlib import import_module
from typing import TYPE_CHECKING

from spikejax import encode, losses, neurons, surrogate
from spikejax.conversion import calibrate, convert, fold_norms
from spikejax.functions import Function
from spikejax.layers import IF, LI, LIF, PLIF, MultiThreshold, neuron_layers
from spikejax.memory import drop_membranes, keep_membranes, stepper
from spikejax.neurons import NeuronParams, cascade, independent, lif, parallel
from spikejax.nn import online
from spikejax.nn.balance import balance
from spikejax.nn.cells import ALIF, ILIF, CubaLIF, RefractoryLIF
from spikejax.nn.delay import Delay, DelayedLinear
from spikejax.nn.driven import spike_driven
from spikejax.nn.norm import td_batch_norm
from spikejax.nn.penalty import Penalised
from spikejax.nn.quant import QuantReLU
from spikejax.nn.recurrent import Recurrent
from spikejax.unroll import unroll

if TYPE_CHECKING:  # for editors
    from spikejax.experiment.trained import load as load
    from spikejax.experiment.trained import pretrained as pretrained

__version__ = "0.2.0"


def __getattr__(name: str) -> object:
    # Trained networks need the models and their flags, which take a second to import.
    if name in ("load", "pretrained"):
        try:
            return getattr(import_module("spikejax.experiment.trained"), name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"spikejax.{name}: expected the package {error.name}, got none. "
                "pip install 'spikejax[experiments]'."
            ) from error
    raise AttributeError(f"module 'spikejax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "load", "pretrained"])


__all__ = [
    "ALIF",
    "IF",
    "ILIF",
    "LI",
    "LIF",
    "PLIF",
    "CubaLIF",
    "Delay",
    "DelayedLinear",
    "Function",
    "MultiThreshold",
    "NeuronParams",
    "Penalised",
    "QuantReLU",
    "Recurrent",
    "RefractoryLIF",
    "balance",
    "calibrate",
    "cascade",
    "convert",
    "drop_membranes",
    "encode",
    "fold_norms",
    "independent",
    "keep_membranes",
    "lif",
    "losses",
    "neuron_layers",
    "neurons",
    "online",
    "parallel",
    "spike_driven",
    "stepper",
    "surrogate",
    "td_batch_norm",
    "unroll",
]
