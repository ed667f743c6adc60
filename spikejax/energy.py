"""Spikes, effective operations and energy of a network for an image, by layer.

An operation is effective where a weight and an activation are both nonzero. A spike
that meets a weight is an accumulate (AC), any other activation a multiply-accumulate
(MAC).
"""

import warnings
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spikejax._compat import iter_modules
from spikejax.layers import Neuron
from spikejax.nn.memory import drop_membranes

# Of float32 in 45 nm: Horowitz 2014, doi:10.1109/ISSCC.2014.6757323
AC_PJ, MAC_PJ = 0.9, 4.6
CONNECTIONS = (nnx.Conv, nnx.Linear)
KNOWN = (*CONNECTIONS, nnx.Embed)  # which looks its rows up and multiplies nothing


@dataclass(frozen=True)
class Firing:
    """Spikes of one layer of neurons; every one of N thresholds counts."""

    path: str
    rate: float
    """Spikes per neuron and time step, 0 to N."""
    spikes: float
    """Spikes per image, over all time steps."""


@dataclass(frozen=True)
class Operations:
    """Operations per image of one convolution or linear layer."""

    path: str
    acs: float
    macs: float
    dense_macs: float
    """MACs of one time step if no activation and no weight were zero."""


@dataclass(frozen=True)
class Report:
    """What a network costs for an image, in the order in which it computes."""

    neurons: tuple[Firing, ...]
    connections: tuple[Operations, ...]

    @property
    def spikes_per_image(self) -> float:
        """Spikes of all neurons over all time steps."""
        return sum(row.spikes for row in self.neurons)

    @property
    def acs(self) -> float:
        """Effective accumulates."""
        return sum(row.acs for row in self.connections)

    @property
    def macs(self) -> float:
        """Effective multiply-accumulates."""
        return sum(row.macs for row in self.connections)

    @property
    def dense_macs(self) -> float:
        """MACs of the same network without spikes: one time step, nothing zero."""
        return sum(row.dense_macs for row in self.connections)

    @property
    def ac_nj(self) -> float:
        """0.9 pJ an AC."""
        return AC_PJ * self.acs / 1000

    @property
    def mac_nj(self) -> float:
        """4.6 pJ a MAC."""
        return MAC_PJ * self.macs / 1000

    @property
    def energy_nj(self) -> float:
        """0.9 pJ an AC and 4.6 pJ a MAC."""
        return self.ac_nj + self.mac_nj

    @property
    def ann_energy_nj(self) -> float:
        """4.6 pJ a dense MAC: the network without spikes, on dense hardware."""
        return MAC_PJ * self.dense_macs / 1000


def measure(model: nnx.Module, xs: jax.Array) -> Report:
    """Count the spikes and effective operations of a model, in evaluation mode.

    ACs = sum over spikes of the nonzero weights that each meets
    MACs = the same sum over nonzero activations that are not spikes

    All N binary trains of a neuron count, whatever their weights, through sums of
    layers and max-pooling (which takes the largest count). An input counts as spikes
    where it holds whole numbers only: averages of spikes cost MACs. Norms (they fold
    into weights), biases and the neurons' own updates are not counted. A layer that
    holds an nnx.Linear named ``recurrent`` feeds its own output back: each element of
    its sequence [..., L, features] but the last meets those weights.

    Args:
        model: nnx model of nnx.Conv, nnx.Linear and spikejax neurons; stays as it is.
        xs: input [B, T, ...] as the model takes it; the report is the mean over B.

    Reference: Yik et al. 2023, arXiv:2304.04640 (NeuroBench), where a binary activation
    is the only spike; energies Horowitz 2014, doi:10.1109/ISSCC.2014.6757323.
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(
            "measure: expected a module of Flax NNX, whose layers can be found, got "
            f"{type(model).__name__}. A network of Linen has to be written in NNX."
        )
    if xs.ndim < 2 or 0 in xs.shape[:2]:
        raise ValueError(
            f"measure: expected input [B, T, ...], B and T >= 1, got {xs.shape}. "
            "For images without time, add the axis: images[:, None]."
        )
    _warn_of_uncounted(model)
    model = drop_membranes(nnx.clone(model))  # kept ones have another batch size
    graphdef, state = nnx.split(model)
    found = jax.device_get(jax.jit(partial(_count, graphdef))(state, xs))
    batch, steps = xs.shape[:2]

    def per_image(values):
        return float(np.sum(values, dtype=np.float64)) / batch

    neurons = []
    for path, (spikes, places) in found["neurons"].items():
        spikes = per_image(spikes)
        neurons.append(Firing(path, spikes / (steps * float(places)), spikes))
    connections = [
        Operations(path, per_image(acs), per_image(macs), float(dense))
        for path, (acs, macs, dense) in found["connections"].items()
    ]
    return Report(tuple(neurons), tuple(connections))


def _count(graphdef, state, xs):
    """Runs the model with its own outputs, then with spike counts in their place."""
    real, counted, trains = OrderedDict(), OrderedDict(), OrderedDict()
    _listen(nnx.merge(graphdef, state), real, _recorded_spikes, trains)(xs)
    replay = {path: iter(calls) for path, calls in trains.items()}
    _listen(nnx.merge(graphdef, state), counted, _replayed_spikes, replay)(xs)

    layers = dict(_named_modules(nnx.merge(graphdef, state)))
    neurons, connections = OrderedDict(), OrderedDict()
    for path, calls in trains.items():
        spikes = sum(_sum_rows(z) for z in calls)
        neurons[path] = spikes, sum(z[0, 0, ..., 0].size for z in calls)
    for path, calls in real.items():
        counts = [
            _operations(layers[path], *inputs, time_steps=xs.shape[:2])
            for inputs in zip(calls, counted[path], strict=True)
        ]
        connections[path] = tuple(sum(values) for values in zip(*counts, strict=True))
    return {"neurons": neurons, "connections": connections}


def _operations(layer, x, counts, *, time_steps):
    """(ACs, MACs) of each row, and dense MACs, for one call of a layer.

    x is the input, counts the same with spike counts for the outputs of neurons.
    """
    axes = 1 + (len(layer.kernel_size) if isinstance(layer, nnx.Conv) else 0)
    shape = x.shape[-axes:]
    weights = layer.kernel[...]
    meets = _fan_out(layer, weights != 0, shape)
    spikes = jnp.all(counts == jnp.round(counts))
    acs = _sum_rows(jnp.abs(counts) * meets)
    macs = _sum_rows((x != 0) * meets)
    calls = x.size / np.prod(shape) / np.prod(time_steps)  # 1, or more for tokens
    dense = _fan_out(layer, jnp.ones_like(weights), shape).sum() * max(1, calls)
    return jnp.where(spikes, acs, 0), jnp.where(spikes, 0, macs), dense


def _fan_out(layer, weights, shape):
    """How many of the weights (0 or 1) each element of an input meets: a gradient."""
    # JAX 0.10.2 on CPU computes nonsense from a kernel that it knows to be constant.
    weights = jax.lax.optimization_barrier(weights.astype(jnp.float32))
    kernel, layer.kernel = layer.kernel, nnx.Param(weights)
    layer.dtype = jnp.float32
    meets = jax.grad(lambda x: layer(x).sum())(jnp.zeros(shape))
    layer.kernel = kernel
    return meets


def _sum_rows(values):
    return values.astype(jnp.float32).reshape(values.shape[0], -1).sum(1)


# A layer is made to listen by a subclass of its own class, on a copy of the model:
# nothing to pay for when off, and it reaches layers in lists and shared layers.


def _note(layer, value):
    log, path = layer.listener
    log.setdefault(path, []).append(value)


def _recorded_input(kind):
    """Connections that note their inputs."""

    def call(self, x, *args, **options):
        _note(self, x)
        return kind.__call__(self, x, *args, **options)

    return {"__call__": call}


def _recorded_spikes(kind):
    """Neurons that note their binary trains."""

    def call(self, xs, *, trains=False):
        _note(self, kind.__call__(self, xs, trains=True))
        return kind.__call__(self, xs, trains=trains)

    def step(self, v, xs, *, trains=False):
        _note(self, kind.step(self, v, xs, trains=True)[1])
        return kind.step(self, v, xs, trains=trains)

    return {"__call__": call, "step": step}


def _replayed_spikes(kind):
    """Neurons that ignore their input and give the number of spikes noted before."""

    def call(self, xs, *, trains=False):
        log, path = self.listener
        spikes = next(log[path])
        return spikes if trains else spikes.sum(-1)

    def step(self, v, xs, *, trains=False):
        return v, call(self, xs, trains=trains)

    return {"__call__": call, "step": step}


def _recorded_output(kind):
    """Layers with recurrent weights, which all outputs but the last one meet."""

    def call(self, xs, *args, **options):
        ys = kind.__call__(self, xs, *args, **options)
        log, path = self.loop
        log.setdefault(path, []).append(ys[..., :-1, :])
        return ys

    return {"__call__": call}


@cache
def _subclass(listener, kind):
    return type(kind.__name__, (kind,), listener(kind))


def _listen(model, inputs, neuron, trains):
    """The model in evaluation mode, its layers noting what they get and give."""
    model.eval()
    for path, module in list(_named_modules(model)):
        kind = type(module)
        if isinstance(module, Neuron):
            kind = _subclass(neuron, kind)
            object.__setattr__(module, "listener", (trains, path))
        elif isinstance(module, CONNECTIONS):
            kind = _subclass(_recorded_input, kind)
            object.__setattr__(module, "listener", (inputs, path))
        if isinstance(getattr(module, "recurrent", None), nnx.Linear):
            kind = _subclass(_recorded_output, kind)
            inner = f"{path}/recurrent".lstrip("/")
            object.__setattr__(module, "loop", (inputs, inner))
        if kind is not type(module):
            object.__setattr__(module, "__class__", kind)
    return model


def _named_modules(model):
    for path, module in iter_modules(model):
        yield "/".join(map(str, path)), module


def _warn_of_uncounted(model):
    found = [
        f"{type(module).__name__} at {path!r}"
        for path, module in _named_modules(model)
        if not isinstance(module, KNOWN)
        and any(isinstance(v, nnx.Param) and v.ndim > 1 for v in vars(module).values())
    ]
    if found:
        warnings.warn(
            "measure: expected only nnx.Conv and nnx.Linear to hold matrices, got "
            f"{', '.join(found)}. Their operations, and products of activations as in "
            "attention, are not counted: the energy is too low.",
            stacklevel=3,
        )
