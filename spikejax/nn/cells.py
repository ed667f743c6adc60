"""Neurons beyond those of ``spikejax.layers``: adaptive, synaptic, refractory, integer.

Each is a cell and a layer that holds its parameters, as there.
"""

from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spikejax import neurons
from spikejax.layers import LIF, Neuron, check_tau, hold, param
from spikejax.neurons import NeuronOptions, NeuronParams, Number, Trains
from spikejax.surrogate import Surrogate, rectangle

Two = tuple[jax.Array, jax.Array]


class AdaptiveParams(NamedTuple):
    """Parameters of an adaptive neuron.

    leak, thresholds: as in ``NeuronParams``.
    adaptation_leak: 1 / tau_adaptation in [0, 1].
    strength: b, what an adaptation of 1 adds to the thresholds.
    """

    leak: Number = 0.5
    thresholds: Any = (1.0,)
    adaptation_leak: Number = 0.05
    strength: Number = 1.0


def adaptive(
    params: AdaptiveParams,
    state: Two,
    x: jax.Array,
    options: NeuronOptions = neurons.DEFAULT,
) -> tuple[Two, Trains]:
    """Compute one step of a neuron whose thresholds rise with its own spikes.

    theta = v_threshold + b a,  u = charge(leak, v, x),  z = H(u - theta)
    v' = reset(u, z) by theta,  a' = a + (z - a) / tau_adaptation

    Args:
        params: see ``AdaptiveParams``.
        state: membrane and adaptation left by the previous step.
        x, options: as in ``neurons.lif``.

    Reference: Bellec et al. 2018, arXiv:1803.09574 (LSNN).
    """
    v, a = state
    raised = tuple(theta + params.strength * a for theta in params.thresholds)
    v, trains = neurons.parallel(NeuronParams(params.leak, raised), v, x, options)
    count = sum(trains[1:], trains[0])
    return (v, a + (count - a) * params.adaptation_leak), trains


class SynapticParams(NamedTuple):
    """Parameters of a neuron with a synaptic current.

    leak, thresholds: as in ``NeuronParams``.
    synaptic_leak: 1 / tau_synapse in [0, 1].
    """

    leak: Number = 0.5
    thresholds: Any = (1.0,)
    synaptic_leak: Number = 0.5


def synaptic(
    params: SynapticParams,
    state: Two,
    x: jax.Array,
    options: NeuronOptions = neurons.DEFAULT,
) -> tuple[Two, Trains]:
    """Compute one step of a neuron that is charged by a current, which leaks too.

    i' = i - i / tau_synapse + x;  then ``neurons.parallel`` with the input i'

    Args:
        params: see ``SynapticParams``.
        state: membrane and current left by the previous step.
        x, options: as in ``neurons.lif``.

    Reference: Zenke and Ganguli 2018, arXiv:1705.11146; NIR's CubaLIF, Pedersen et al.
    2024, arXiv:2311.14641.
    """
    v, current = state
    current = current - current * params.synaptic_leak + x
    given = NeuronParams(params.leak, params.thresholds)
    v, trains = neurons.parallel(given, v, current, options)
    return (v, current), trains


class RefractoryParams(NamedTuple):
    """Parameters of a neuron with a refractory period.

    leak, thresholds: as in ``NeuronParams``.
    period: time steps after a spike in which it ignores its input.
    """

    leak: Number = 0.5
    thresholds: Any = (1.0,)
    period: Number = 2


def refractory(
    params: RefractoryParams,
    state: Two,
    x: jax.Array,
    options: NeuronOptions = neurons.DEFAULT,
) -> tuple[Two, Trains]:
    """Compute one step of a neuron that rests for some time steps after a spike.

    r = 0: as ``neurons.lif``, and r' = period where z = 1
    r > 0: v' = v,  z = 0,  r' = r - 1

    Args:
        params: see ``RefractoryParams``.
        state: membrane, and time steps r that are left to rest.
        x, options: as in ``neurons.lif``.

    Reference: Gerstner and Kistler 2002, doi:10.1017/CBO9780511815706, section 4.1.
    """
    v, left = state
    awake = left <= 0
    after, trains = neurons.lif(
        NeuronParams(params.leak, params.thresholds), v, x, options
    )
    (z,) = (jnp.where(awake, z, 0) for z in trains)
    left = jnp.where(awake, params.period * jax.lax.stop_gradient(z), left - 1)
    return (jnp.where(awake, after, v), left), (z,)


def _hold_leak(layer: LIF, field: str, tau: Number) -> None:
    """Give a layer one more leak, learned if that of its membrane is."""
    learned = layer.leak_logit is not None
    leak = check_tau(type(layer).__name__, tau, learned=learned)
    setattr(layer, field, hold(leak))
    if learned:
        setattr(layer, f"{field}_logit", param(-np.log(1 / np.asarray(leak) - 1)))


class ALIF(LIF):
    """Layer of leaky integrate-and-fire neurons whose threshold adapts.

    theta = v_threshold + b a;   a' = a + (z - a) / tau_adaptation;   else as ``LIF``

    Args:
        tau: membrane time constant in time steps, >= 1.
        v_threshold: threshold without adaptation, > 0.
        tau_adaptation: time constant of the adaptation in time steps, >= 1.
        strength: b >= 0. At one spike per step the threshold becomes v_threshold + b.
        learn_strength: learn b, in its own shape.
        options: the others of ``LIF``; learn_tau learns tau_adaptation too.

    Numbers may be arrays, one value per channel.

    Raises:
        ValueError: an argument is out of its range.

    Reference: Bellec et al. 2018, arXiv:1803.09574.
    """

    def __init__(
        self,
        tau: Number = 20.0,
        v_threshold: Number = 1.0,
        *,
        tau_adaptation: Number = 200.0,
        strength: Number = 1.0,
        learn_strength: bool = False,
        **options: Any,
    ):
        super().__init__(tau, v_threshold, **options)
        if not np.all(np.asarray(strength) >= 0):
            raise ValueError(f"ALIF: expected strength >= 0, got {strength}.")
        self.cell, self.kind, self.rest = adaptive, AdaptiveParams, neurons.rest_both
        _hold_leak(self, "adaptation_leak", tau_adaptation)
        self.strength = param(strength) if learn_strength else hold(strength)


class CubaLIF(LIF):
    """Layer of leaky integrate-and-fire neurons that are charged by a leaking current.

    i' = i - i / tau_synapse + x;   else as ``LIF`` with the input i'

    ``LI(tau_synapse, decay_input=False)`` gives any other neuron such a current.

    Args:
        tau: membrane time constant in time steps, >= 1.
        v_threshold: threshold, > 0.
        tau_synapse: time constant of the current in time steps, >= 1.
        options: the others of ``LIF``; learn_tau learns tau_synapse too.

    Numbers may be arrays, one value per channel.

    Raises:
        ValueError: an argument is out of its range.

    Reference: Zenke and Ganguli 2018, arXiv:1705.11146.
    """

    def __init__(
        self,
        tau: Number = 2.0,
        v_threshold: Number = 1.0,
        *,
        tau_synapse: Number = 2.0,
        **options: Any,
    ):
        super().__init__(tau, v_threshold, **options)
        self.cell, self.kind, self.rest = synaptic, SynapticParams, neurons.rest_both
        _hold_leak(self, "synaptic_leak", tau_synapse)


class RefractoryLIF(LIF):
    """Layer of leaky integrate-and-fire neurons that rest after a spike.

    Args:
        period: time steps after a spike without input, leak and spike, >= 0.
        tau, v_threshold, options: as in ``LIF``.

    Raises:
        ValueError: an argument is out of its range.

    Reference: Gerstner and Kistler 2002, doi:10.1017/CBO9780511815706, section 4.1.
    """

    def __init__(
        self,
        period: int = 2,
        tau: Number = 2.0,
        v_threshold: Number = 1.0,
        **options: Any,
    ):
        super().__init__(tau, v_threshold, **options)
        if not isinstance(period, Integral) or period < 0:
            raise ValueError(
                f"RefractoryLIF: expected a period of 0 or more time steps, got "
                f"{period!r}."
            )
        self.cell, self.kind = refractory, RefractoryParams
        self.rest = neurons.rest_both
        self.period = float(period)


class ILIF(Neuron):
    """Layer of integer leaky integrate-and-fire neurons, which round their membrane.

    u = (1 - 1 / tau) v + x,  o = round(clip(u / v_threshold, 0, D)),
    v' = u - v_threshold o

    They are D thresholds at v_threshold (k - 1/2), so ``trains=True`` gives D binary
    trains. In one time step after a norm,
    ``MultiThreshold(D)`` differs by a shift of v_threshold / 2 alone.

    Args:
        num_thresholds: D, the largest number of spikes per time step.
        v_threshold: size of a level, > 0.
        tau: membrane time constant in time steps, >= 1.
        detach_reset: whether no gradient flows through the reset.
        surrogate: Heaviside step with a surrogate derivative; rectangles that fill the
            space between the thresholds by default, as the authors'.

    Raises:
        ValueError: an argument is out of its range.

    Reference: Luo et al. 2024, arXiv:2407.20708 (SpikeYOLO), whose ties go to even
    where these go up.
    """

    def __init__(
        self,
        num_thresholds: int = 4,
        v_threshold: float = 1.0,
        *,
        tau: Number = 4 / 3,
        detach_reset: bool = True,
        surrogate: Surrogate | None = None,
    ):
        levels = neurons.equal_thresholds(num_thresholds, v_threshold)
        neurons.check_thresholds("ILIF", levels, rising=True)
        if np.ndim(v_threshold):
            raise ValueError(
                "ILIF: expected one v_threshold, got an array of shape "
                f"{np.shape(v_threshold)}. MultiThreshold takes one per channel."
            )
        params = NeuronParams(
            check_tau("ILIF", tau),
            tuple(level - v_threshold / 2 for level in levels),
            (v_threshold,) * num_thresholds,
        )
        spike = surrogate or rectangle(1 / v_threshold)
        options = NeuronOptions(None, False, detach_reset, spike)
        super().__init__(neurons.parallel, params, options)
