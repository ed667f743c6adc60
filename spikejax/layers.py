"""Layers of spiking neurons for Flax NNX, over sequences [B, T, ...].

A layer starts from rest at every call, so nothing has to be reset, unless it holds its
membrane: see ``keep_membranes``. Membranes are float32 whatever the type of the input.
"""

import inspect
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax import neurons, surrogate
from spikejax.neurons import NeuronParams
from spikejax.surrogate import Spike, check_spike
from spikejax.unroll import unroll


class Membrane(nnx.Variable):
    """Membrane potential that a neuron layer keeps from one call to the next."""


class Neuron(nnx.Module):
    """What all layers of neurons share: a cell, its leak and thresholds, its membrane.

    Use IF, LIF, PLIF or MultiThreshold. ``cell`` is one of ``spikejax.neurons`` (lif,
    parallel, cascade, independent).
    """

    membrane: Membrane | None = None  # kept from call to call once it is set

    def __init__(
        self,
        cell: neurons.Cell,
        thresholds: Sequence[float],
        *,
        tau: float,
        v_reset: float | None = None,
        decay_input: bool,
        detach_reset: bool = False,
        surrogate: Spike = surrogate.ATAN,
        learn_tau: bool = False,
        learn_thresholds: bool = False,
    ):
        who = type(self).__name__
        check_spike(who, surrogate)
        neurons.check_thresholds(who, thresholds, rising=cell is neurons.parallel)
        if not tau >= 1 or (learn_tau and not 1 < tau < math.inf):
            raise ValueError(
                f"{who}: expected tau {'> 1 and finite' if learn_tau else '>= 1'}, got "
                f"{tau}. The membrane keeps 1 - 1/tau of itself each time step."
            )
        if decay_input and tau == math.inf:
            raise ValueError(
                f"{who}: expected a finite tau with decay_input, got {tau}, which "
                "keeps all input out. For integrate-and-fire, give decay_input=False."
            )
        if cell is neurons.lif and len(thresholds) != 1:
            raise ValueError(
                f"{who}: expected one threshold for the cell lif, got {thresholds}. "
                "For several, give neurons.parallel, cascade or independent."
            )
        if v_reset is not None and not v_reset < min(thresholds):
            raise ValueError(
                f"{who}: expected v_reset below every threshold {min(thresholds)}, got "
                f"{v_reset}. Give None for soft reset."
            )
        self.cell = cell
        self.v_reset = v_reset
        self.decay_input = decay_input
        self.detach_reset = detach_reset
        self.surrogate = surrogate
        self.num_thresholds = len(thresholds)
        self.tau = float(tau)
        self.thresholds = tuple(float(t) for t in thresholds)
        # sigmoid(leak_logit) = 1 / tau
        logit = jnp.asarray(-math.log(tau - 1), jnp.float32) if learn_tau else None
        self.leak_logit = nnx.Param(logit) if learn_tau else None
        self.log_steps = nnx.Param(self._log_steps()) if learn_thresholds else None

    def _log_steps(self):
        steps = jnp.asarray(self.thresholds, jnp.float32)
        if self.cell is neurons.parallel:
            steps = jnp.diff(steps, prepend=0)
        return jnp.log(steps)

    @property
    def params(self) -> NeuronParams:
        """Leak 1/tau and thresholds, learned or fixed, as the cell takes them.

        A learned leak is sigmoid(leak_logit). Learned thresholds are exp(log_steps),
        summed up where they must rise, so they stay positive and in order.
        """
        leak = 1 / self.tau
        if self.leak_logit is not None:
            leak = jax.nn.sigmoid(self.leak_logit[...])
        thresholds = self.thresholds
        if self.log_steps is not None:
            steps = jnp.exp(self.log_steps[...])
            if self.cell is neurons.parallel:
                steps = jnp.cumsum(steps)
            thresholds = tuple(steps[k] for k in range(self.num_thresholds))
        return NeuronParams(leak, thresholds)

    @property
    def v_start(self) -> float:
        """Membrane at rest, before the first step of a sequence."""
        return self.v_reset or 0.0

    def rest(self, shape: tuple[int, ...]) -> jax.Array:
        """Membranes at rest for currents of that shape."""
        if self.cell is neurons.independent:
            shape = (self.num_thresholds, *shape)
        return jnp.full(shape, self.v_start, jnp.float32)

    def _start(self, xs):
        """Membrane before the first step: held from the last call, or at rest."""
        rest = self.rest(xs[:, 0].shape)
        if self.membrane is None:
            return rest
        held, shape = self.membrane[...], rest.shape
        if held.shape not in ((), shape):
            raise ValueError(
                f"{type(self).__name__}: expected input for its membrane "
                f"{held.shape}, got {xs.shape}. Call keep_membranes(model) to start "
                "anew."
            )
        return jnp.broadcast_to(held, shape)

    def __call__(self, xs: jax.Array, *, trains: bool = False) -> jax.Array:
        """Spikes of the currents xs.

        Args:
            xs: input current [B, T, ...], floating point.
            trains: the N binary spike trains apart, on a new last axis.

        Returns:
            spikes [B, T, ...] in the type of xs; for N thresholds their weighted sum.
        """
        who = type(self).__name__
        if xs.ndim < 2 or xs.shape[1] == 0:
            raise ValueError(
                f"{who}: expected a sequence [B, T, ...] with T >= 1, got shape "
                f"{xs.shape}. For one time step, add the time axis: x[:, None]."
            )
        if not jnp.issubdtype(xs.dtype, jnp.floating):
            raise ValueError(
                f"{who}: expected floating point input, got {xs.dtype}. "
                "Convert it: xs.astype(jnp.float32)."
            )

        cell = partial(self._step, trains=trains)
        v, spikes = unroll(cell, self.params, self._start(xs), xs)
        if self.membrane is not None:
            self.membrane = Membrane(v)
        return spikes

    def step(
        self, v: jax.Array, xs: jax.Array, *, trains: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """One step for all currents xs at once, from membranes that the caller keeps.

        Args:
            v: membranes in the shape of xs, such as ``rest(xs.shape)``.
            xs: currents [B, T, ...], whose time steps do not see each other here.
            trains: as in a call of the layer.

        Returns:
            the membranes after it, and the spikes.
        """
        return self._step(self.params, v, xs, trains=trains)

    def _step(self, params, v, x, *, trains=False):
        v, z = self.cell(
            params,
            v,
            x.astype(jnp.float32),
            v_reset=self.v_reset,
            decay_input=self.decay_input,
            detach_reset=self.detach_reset,
            spike=self.surrogate,
            trains=trains,
        )
        return v, z.astype(x.dtype)

    def charge(self, v: jax.Array, xs: jax.Array) -> jax.Array:
        """Membranes of such a step after the currents xs and before the spikes."""
        return neurons.charge(
            self.params.leak,
            v,
            xs.astype(jnp.float32),
            v_reset=self.v_reset,
            decay_input=self.decay_input,
        )


class LIF(Neuron):
    """Leaky integrate-and-fire neurons.

    u = v + (x - v) / tau  (decay_input)   or   u = v - v / tau + x
    z = H(u - v_threshold);   v' = u - v_threshold z  (soft)   or   v_reset where z = 1

    Args:
        tau: membrane time constant in time steps, >= 1.
        v_threshold: threshold, > 0.
        v_reset: None for soft reset, else the value after a spike and at rest.
        decay_input: whether tau scales the input too.
        detach_reset: no gradient through the reset.
        surrogate: Heaviside step with a surrogate derivative.
        learn_tau: learn one tau for the layer (PLIF).
        learn_thresholds: learn the threshold.

    Reference: Wu et al. 2018, arXiv:1706.02609.
    """

    def __init__(
        self,
        tau: float = 2.0,
        v_threshold: float = 1.0,
        *,
        v_reset: float | None = None,
        decay_input: bool = True,
        detach_reset: bool = False,
        surrogate: Spike = surrogate.ATAN,
        learn_tau: bool = False,
        learn_thresholds: bool = False,
    ):
        super().__init__(
            neurons.lif,
            (v_threshold,),
            tau=tau,
            v_reset=v_reset,
            decay_input=decay_input,
            detach_reset=detach_reset,
            surrogate=surrogate,
            learn_tau=learn_tau,
            learn_thresholds=learn_thresholds,
        )


class IF(LIF):
    """Integrate-and-fire neurons: u = v + x. Arguments are those of LIF but tau."""

    def __init__(self, v_threshold: float = 1.0, **options):
        super().__init__(math.inf, v_threshold, decay_input=False, **options)


class PLIF(LIF):
    """Leaky integrate-and-fire neurons that learn one tau a layer.

    1 / tau = sigmoid(w). Arguments are those of LIF; tau is the start, > 1.

    Reference: Fang et al. 2021, arXiv:2007.05785.
    """

    def __init__(self, tau: float = 2.0, v_threshold: float = 1.0, **options):
        super().__init__(tau, v_threshold, learn_tau=True, **options)


class MultiThreshold(Neuron):
    """Neurons with N thresholds, which fire up to N spikes in one time step.

    The output is the sum of N binary spike trains, with weights that are 1 for equally
    spaced thresholds; ``layer(xs, trains=True)`` gives the trains. See the cell for the
    equations.

    Args:
        thresholds: their number N, for equal spacing of v_threshold, or the thresholds
            themselves: rising for ``parallel``, in the order of firing for ``cascade``.
        cell: neurons.parallel, neurons.cascade, or neurons.independent (one membrane a
            threshold).
        v_threshold: the spacing, where thresholds is a number.
        tau: membrane time constant in time steps, >= 1; math.inf with decay_input=False
            makes integrate-and-fire neurons.
        learn_tau: learn one tau for the layer.
        learn_thresholds: learn the thresholds.
        Other arguments are those of LIF. After a batch norm, v_threshold=0.5 and
        decay_input=False put four thresholds where the inputs lie.

    Reference: Wang, Zhang, Zhang 2023, arXiv:2303.11127.
    """

    def __init__(
        self,
        thresholds: int | Sequence[float] = 4,
        cell: neurons.Cell = neurons.parallel,
        *,
        v_threshold: float = 1.0,
        tau: float = 2.0,
        v_reset: float | None = None,
        decay_input: bool = True,
        detach_reset: bool = False,
        surrogate: Spike = surrogate.ATAN,
        learn_tau: bool = False,
        learn_thresholds: bool = False,
    ):
        super().__init__(
            cell,
            neurons.spaced(type(self).__name__, cell, thresholds, v_threshold),
            tau=tau,
            v_reset=v_reset,
            decay_input=decay_input,
            detach_reset=detach_reset,
            surrogate=surrogate,
            learn_tau=learn_tau,
            learn_thresholds=learn_thresholds,
        )


def neuron_layers(model: nnx.Module) -> dict[str, Neuron]:
    """The layers of neurons in a model, by path such as 'stages/0/neurons/1'."""
    return {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_graph(model)
        if isinstance(module, Neuron)
    }


def check_factory(who: str, neuron: Any) -> None:
    """A ValueError where ``neuron()`` cannot be called: it makes each activation."""
    try:
        inspect.signature(neuron).bind()
    except TypeError as error:
        raise ValueError(
            f"{who}: expected neuron() to make an activation, as with neuron=LIF, "
            f"partial(LIF, tau=4.0) or lambda: nnx.relu, got {type(neuron).__name__}: "
            f"{error}."
        ) from error


def keep_membranes(model: nnx.Module) -> nnx.Module:
    """Let every neuron of a model keep its membrane from now on, starting from rest.

    Then a sequence may be fed in slices, ``model(xs[:, t : t + 1])``, with the result
    of feeding it whole. Call it again to start anew. Changes and returns the model.
    """
    layers = neuron_layers(model)
    if not layers:
        raise ValueError(
            f"keep_membranes: expected a model with spiking neurons, found none in "
            f"{type(model).__name__}."
        )
    for layer in layers.values():
        layer.membrane = Membrane(jnp.float32(layer.v_start))
    return model
