"""Spiking neurons as pure cells: ``(params, state, x, options) -> (state, trains)``.

A cell computes one time step: it charges, fires and resets within the same step. It
knows nothing of time: ``spikejax.unroll`` repeats it. ``trains`` are its N binary spike
trains as a tuple; the layer weighs and sums them (``spike_weights``). ``state`` is any
pytree, for most cells the membrane. There is one rule for each of the three phases,
shared by all cells, so a cell with one threshold is the plain neuron.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spikejax import surrogate
from spikejax.surrogate import Surrogate

Number = float | jax.Array  # arrays broadcast against the membrane
State = Any  # a pytree of arrays
Params = Any  # a NamedTuple, such as NeuronParams
Trains = tuple[jax.Array, ...]
Cell = Callable[..., tuple[State, Trains]]


class NeuronParams(NamedTuple):
    """Parameters of a neuron; arrays broadcast against the membrane.

    leak: 1 / tau in [0, 1]; 0 makes an integrate-and-fire neuron.
    thresholds: N thresholds; an array has them on its first axis.
    amounts: what each of the N spikes takes away from the membrane, in the output
        relative to the first; None is the rule of the cell. Negative amounts belong to
        spikes that fire below their threshold (signed and ternary neurons).
    """

    leak: Number = 0.5
    thresholds: Sequence[Number] | jax.Array = (1.0,)
    amounts: Sequence[Number] | jax.Array | None = None


class NeuronOptions(NamedTuple):
    """Discrete choices of a neuron, the same for every cell.

    v_reset: None for soft reset (subtract the amounts), else the value after a spike.
    decay_input: whether the leak scales the input too.
    detach_reset: whether no gradient flows through the reset into the next step.
    surrogate: Heaviside step with a surrogate derivative.
    """

    v_reset: float | None = None
    decay_input: bool = True
    detach_reset: bool = False
    surrogate: Surrogate = surrogate.ATAN


DEFAULT = NeuronOptions()


def charge(leak: Number, v: Number, x: jax.Array, options: NeuronOptions) -> jax.Array:
    """Return the membrane u after one step of input, before it fires.

    decay_input: u = v + (x - (v - v_rest)) leak;  else: u = v - (v - v_rest) leak + x

    v_rest is v_reset, or 0 where v_reset is None.
    """
    above_rest = v - options.v_reset if options.v_reset else v
    if options.decay_input:
        return v + (x - above_rest) * leak
    return v - above_rest * leak + x


def uncharge(
    leak: Number, v: Number, u: jax.Array, options: NeuronOptions
) -> jax.Array:
    """Return the input x that charges v to u: the inverse of ``charge`` in x."""
    above_rest = v - options.v_reset if options.v_reset else v
    if options.decay_input:
        return (u - v) / leak + above_rest
    return u - v + above_rest * leak


def reset(u: jax.Array, z: Number, amount: Number, options: NeuronOptions) -> jax.Array:
    """Return the membrane after firing: u - amount (soft), or v_reset where z = 1.

    Args:
        u: membrane before the reset.
        z: whether the neuron fired, in {0, 1}.
        amount: what a soft reset takes away, z times the threshold.
        options: v_reset and detach_reset.
    """
    if options.detach_reset:
        z, amount = jax.lax.stop_gradient((z, amount))
    if options.v_reset is None:
        return u - amount
    return (1 - z) * u + options.v_reset * z


def lif(
    params: NeuronParams, v: jax.Array, x: jax.Array, options: NeuronOptions = DEFAULT
) -> tuple[jax.Array, Trains]:
    """Compute one step of a leaky integrate-and-fire neuron.

    u = charge(leak, v, x),  z = H(u - threshold),  v' = reset(u, z)

    IF is leak = 0 with decay_input=False; PLIF a leak that is learned.

    Args:
        params: leak and one threshold.
        v: membrane left by the previous step, any shape.
        x: input current, shape of v.
        options: see ``NeuronOptions``.

    Returns:
        v' in the shape of v, and one spike train in {0, 1} of the same shape.

    Reference: Fang et al. 2021, arXiv:2007.05785 (PLIF); Wu et al. 2018,
    arXiv:1706.02609.
    """
    return cascade(params, v, x, options)  # of one threshold


def parallel(
    params: NeuronParams, v: jax.Array, x: jax.Array, options: NeuronOptions = DEFAULT
) -> tuple[jax.Array, Trains]:
    """Compute one step of a multi-threshold neuron, all N thresholds compared together.

    u = charge(leak, v, x),  z_k = H(u - theta_k),  theta_1 < ... < theta_N
    o = sum_k (a_k / a_1) z_k,  a_k = theta_k - theta_(k-1),  theta_0 = 0
    soft: v' = u - sum_k a_k z_k;   hard: v' = v_reset where z_1 fired

    Equal spacing gives weights of 1: the output is the number of spikes, and with soft
    reset it is clip(floor(u / theta_1), 0, N).

    With ``amounts`` a_k of one's own the thresholds may have any value, and a spike of
    negative amount fires below its threshold: z_k = H(theta_k - u). So thresholds
    theta (k - 1/2) with amounts theta make an I-LIF neuron, whose levels
    are rounded and not cut.

    Args:
        params: leak and N thresholds; rising, and positive, unless amounts are given.
        v, x, options: as in ``lif``.

    Returns:
        v' in the shape of v, and N spike trains; the layer sums them up to o.

    Examples:
        >>> params = NeuronParams(leak=0.5, thresholds=(1.0, 2.0))
        >>> v, trains = parallel(params, jnp.zeros(3), jnp.array([1.0, 3.0, 5.0]))
        >>> [z.tolist() for z in trains]  # u = 0.5, 1.5, 2.5
        [[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]
        >>> v.tolist()
        [0.5, 0.5, 0.5]

    Reference: after Wang, Zhang, Zhang 2023, arXiv:2303.11127, which names the mode. We
    had no access to the paper's equations; these are our own. Amounts: Luo et al. 2024,
    arXiv:2407.20708 (I-LIF).
    """
    u = charge(params.leak, v, x, options)
    amounts = spike_amounts(parallel, params)
    if params.amounts is None:
        trains = tuple(options.surrogate(u - theta) for theta in params.thresholds)
        fired = trains[0]  # thresholds rise: no other fires without the first
    else:
        pairs = zip(params.thresholds, amounts, strict=True)
        trains = tuple(options.surrogate(jnp.sign(a) * (u - t)) for t, a in pairs)
        fired = 1 - math.prod(1 - z for z in trains)
    amount = sum(a * z for a, z in zip(amounts, trains, strict=True))
    return reset(u, fired, amount, options), trains


def cascade(
    params: NeuronParams, v: jax.Array, x: jax.Array, options: NeuronOptions = DEFAULT
) -> tuple[jax.Array, Trains]:
    """Compute one step of a multi-threshold neuron, one threshold after the other.

    u_0 = charge(leak, v, x),  z_k = H(u_(k-1) - theta_k),  u_k = reset(u_(k-1), z_k)
    o = sum_k (a_k / a_1) z_k,  a_k = theta_k,  v' = u_N

    Equal thresholds give weights of 1; dyadic ones (theta_k = theta 2^(1-k)) give 2^N
    levels from N spikes. With hard reset at most one of the N fires: take soft reset.

    Args:
        params: leak and N positive thresholds, in the order in which they act.
        v, x, options: as in ``lif``.

    Returns:
        v' in the shape of v, and N spike trains; the layer sums them up to o.

    Reference: as for ``parallel``.
    """
    u = left = charge(params.leak, v, x, options)
    trains: list[jax.Array] = []
    amounts = spike_amounts(cascade, params)
    for theta, amount in zip(params.thresholds, amounts, strict=True):
        z = options.surrogate(u - theta)
        left = reset(left, z, amount * z, options)
        trains.append(z)
        if len(trains) < len(amounts):
            u = _leave(u, z, theta, amount, options)
    return left, tuple(trains)


def _leave(
    u: jax.Array, z: jax.Array, theta: Number, amount: Number, options: NeuronOptions
) -> jax.Array:
    """Return what one threshold of a cascade leaves of u for the next.

    With detach_reset its slope is 1 - a H'(u - theta), at least 0: without the second
    term a neuron below the first of N equal thresholds would get N times the gradient.
    """
    if options.detach_reset:
        share = jnp.clip(amount * options.surrogate.slope(u - theta), 0, 1)
        u = _with_slope(u, 1 - share)
    return reset(u, z, amount * z, options)


@jax.custom_vjp
def _with_slope(u: jax.Array, slope: jax.Array) -> jax.Array:
    """Return u, whose gradient is multiplied by the slope."""
    return u


_with_slope.defvjp(
    lambda u, slope: (u, slope), lambda slope, g: (g * slope, jnp.zeros_like(slope))
)


def independent(
    params: NeuronParams,
    membranes: jax.Array,
    x: jax.Array,
    options: NeuronOptions = DEFAULT,
) -> tuple[jax.Array, Trains]:
    """Compute one step of N plain neurons that share their input.

    v_k', z_k = lif(leak, theta_k, v_k, x);   o = sum_k z_k

    Args:
        params: leak and N positive thresholds.
        membranes: one per threshold, on a new first axis: [N, *x.shape].
        x, options: as in ``lif``.

    Returns:
        the membranes, and N spike trains in the shape of x.

    Reference: the multi-level firing unit, Feng et al. 2022, arXiv:2210.06386.
    """
    steps = [
        lif(NeuronParams(params.leak, (theta,)), v, x, options)
        for theta, v in zip(params.thresholds, membranes, strict=True)
    ]
    return jnp.stack([v for v, _ in steps]), tuple(z for _, (z,) in steps)


def integrate(
    params: NeuronParams, v: jax.Array, x: jax.Array, options: NeuronOptions = DEFAULT
) -> tuple[jax.Array, Trains]:
    """Compute one step of a leaky integrator: v' = charge(leak, v, x).

    It never fires, so it has no spike trains; the output of its layer is v'.

    Args:
        params: leak; thresholds have no meaning.
        v, x, options: as in ``lif``.
    """
    return charge(params.leak, v, x, options), ()


def late_reset(
    params: NeuronParams, v: jax.Array, x: jax.Array, options: NeuronOptions = DEFAULT
) -> tuple[jax.Array, Trains]:
    """Compute one step of a neuron whose soft reset comes one step later.

    u = charge(leak, v, x),  z = H(u - threshold),  v' = u - threshold z / (1 - leak)

    The leak of the next step makes v' (1 - leak) = u (1 - leak) - threshold z: the
    default of snnTorch's Leaky.

    Args:
        params: leak < 1, and one threshold.
        v, x: as in ``lif``.
        options: as in ``lif``, without hard reset.
    """
    (theta,) = params.thresholds
    u = charge(params.leak, v, x, options)
    z = options.surrogate(u - theta)
    return reset(u, z, theta / (1 - params.leak) * z, options), (z,)


def spike_amounts(cell: Cell, params: NeuronParams) -> Sequence[Number] | jax.Array:
    """Return what each of the N spikes takes away from the membrane."""
    if params.amounts is not None:
        return params.amounts
    theta = params.thresholds
    if cell is not parallel:
        return theta
    steps = [b - a for a, b in zip(theta[:-1], theta[1:], strict=True)]
    return [theta[0], *steps]


def spike_weights(cell: Cell, params: NeuronParams) -> list[Number]:
    """Return what each of the N spikes adds to the output: a_k / a_1.

    Spikes of cells without a common membrane (``independent``) weigh 1 each. Of numbers
    these are numbers: 1 itself where thresholds are equally spaced.
    """
    if cell in (parallel, cascade) or getattr(params, "amounts", None) is not None:
        amounts = spike_amounts(cell, params)
        weights = [a / amounts[0] for a in amounts]
        # (0.3 - 0.2) / 0.1 is 1 in the type of the spikes, not in that of Python.
        return [float(np.float32(w)) if isinstance(w, float) else w for w in weights]
    return [1.0] * len(params.thresholds)


def fixed_weights(cell: Cell, params: Params) -> tuple[float, ...] | None:
    """Return the ``spike_weights`` if they are numbers, None if a tracer is in them."""
    thresholds = getattr(params, "thresholds", None)
    amounts = getattr(params, "amounts", None)
    for values in (thresholds, thresholds if amounts is None else amounts):
        if not isinstance(values, tuple):
            return None
        if not all(isinstance(value, float) for value in values):
            return None
    return tuple(map(float, spike_weights(cell, params)))


def rest(params: Params, shape: tuple[int, ...], v_start: Number) -> jax.Array:
    """Return membranes before the first step, for currents of that shape."""
    # float32 whatever the type of the currents: sums over time need the digits.
    return jnp.broadcast_to(jnp.asarray(v_start, jnp.float32), shape)


def rest_each(
    params: NeuronParams, shape: tuple[int, ...], v_start: Number
) -> jax.Array:
    """Return one membrane per threshold, [N, *shape], as ``independent`` keeps them."""
    return rest(params, (len(params.thresholds), *shape), v_start)


def rest_both(
    params: Params, shape: tuple[int, ...], v_start: Number
) -> tuple[jax.Array, jax.Array]:
    """Return membranes before the first step, and a second state of zeros."""
    return rest(params, shape, v_start), jnp.zeros(shape, jnp.float32)


# The tracer finds spikes in a jaxpr by this name: a jit of a function is one equation.
@jax.jit
def spiking_output(y: jax.Array, count: jax.Array, *v: jax.Array) -> jax.Array:
    """Return y, made of ``count`` binary spikes that leave the membranes v behind."""
    return y


class Step(NamedTuple):
    """Time step of a layer of neurons, (params, state, x) -> (state, output).

    It is hashable and closes over no arrays, so it compiles once. params is the pair of
    the cell's parameters and the size of a spike (None for 1). weights are those of the
    spikes where they are numbers: in a compiled function params are tracers.
    """

    cell: Cell
    options: NeuronOptions
    name: str = ""
    trains: bool = False
    weights: tuple[float, ...] | None = None

    def __call__(
        self, params: tuple[Params, Any], state: State, x: jax.Array
    ) -> tuple[State, jax.Array]:
        """Return the state after the currents x, and spikes in the type of x."""
        _, unit = params
        current = x.astype(jnp.float32)
        current = current if unit is None else current / unit
        return self._output(params, state, current, x.dtype)

    @property
    def has_phases(self) -> bool:
        """Tell if the step is ``charge``, then ``fire``; its state is one membrane."""
        return self.cell in (lif, parallel, cascade)

    def charge(
        self, params: tuple[NeuronParams, Any], v: jax.Array, x: jax.Array
    ) -> jax.Array:
        """Return the membrane u, charged by the currents x, before it fires."""
        values, unit = params
        return charge(values.leak, v, x if unit is None else x / unit, self.options)

    def uncharge(
        self, params: tuple[NeuronParams, Any], v: jax.Array, u: jax.Array
    ) -> jax.Array:
        """Return the currents x that charge v to u."""
        values, unit = params
        x = uncharge(values.leak, v, u, self.options)
        return x if unit is None else x * unit

    def fire(
        self, params: tuple[NeuronParams, Any], u: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return the membrane after the charged one has fired, and the spikes."""
        values, unit = params
        # Without a leak, a membrane of 0 is charged by u to exactly u.
        at_zero = self._replace(options=self.options._replace(decay_input=False))
        given = values._replace(leak=0.0), unit
        return at_zero._output(given, jnp.zeros_like(u), u, u.dtype)

    def _output(
        self, params: tuple[Params, Any], state: State, current: jax.Array, dtype: Any
    ) -> tuple[State, jax.Array]:
        """Return the state and the output after currents in units of a spike."""
        values, unit = params
        state, trains = self.cell(values, state, current, self.options)
        if not trains:  # an integrator: its membrane, its first state, is its output
            return state, jax.tree.leaves(state)[0].astype(dtype)
        if self.trains:
            return state, jnp.stack(trains, -1).astype(dtype)
        weights = self.weights or spike_weights(self.cell, values)
        y = count = sum(trains[1:], trains[0])
        if not all(isinstance(w, float) and w == 1 for w in weights[1:]):
            pairs = zip(trains[1:], weights[1:], strict=True)
            y = sum((z * w for z, w in pairs), trains[0])
        if unit is not None:
            y = y * unit
        is_count = y is count  # then both operands are one array, not two to write
        y = y.astype(dtype)
        v = jax.tree.leaves(state)[:1] if self.name else []  # who names it asks for it
        with jax.named_scope(self.name.replace("/", "|") or "neuron"):
            return state, spiking_output(y, y if is_count else count, *v)


def equal_thresholds(num_thresholds: int, v_threshold: Number = 1.0) -> tuple:
    """Return equally spaced thresholds for ``parallel``: v_threshold (1, 2, ..., N)."""
    return tuple(v_threshold * k for k in range(1, _check_number(num_thresholds) + 1))


def repeated_thresholds(num_thresholds: int, v_threshold: Number = 1.0) -> tuple:
    """Return one threshold N times, the equally spaced levels of ``cascade``."""
    return (v_threshold,) * _check_number(num_thresholds)


def dyadic_thresholds(num_thresholds: int, v_threshold: Number = 1.0) -> tuple:
    """Return halving thresholds for ``cascade``: v_threshold 2^(1-k), 2^N levels."""
    return tuple(v_threshold * 2.0**-k for k in range(_check_number(num_thresholds)))


def _check_number(num_thresholds: int) -> int:
    if not isinstance(num_thresholds, Integral) or num_thresholds < 1:
        raise ValueError(
            f"num_thresholds: expected a whole number >= 1, got {num_thresholds!r}. "
            "One threshold is the plain neuron."
        )
    return int(num_thresholds)


def check_thresholds(
    who: str, thresholds: Sequence[Number] | jax.Array, *, rising: bool
) -> None:
    """Check that there are thresholds, all positive (and rising).

    Raises:
        ValueError: they are not.
    """
    values = [np.asarray(t) for t in thresholds]
    numeric = all(np.issubdtype(v.dtype, np.number) for v in values)
    hint = ""
    if not values or not numeric or not all((v > 0).all() for v in values):
        problem = "positive thresholds"
    elif not all(np.isfinite(v).all() for v in values):
        problem = "finite thresholds"
    elif rising and any((a >= b).any() for a, b in zip(values, values[1:])):  # noqa: B905
        problem = "rising thresholds"
        hint = " A parallel neuron takes them sorted, without equal ones."
    else:
        return
    got = thresholds
    if any(v.ndim for v in values):
        got = f"arrays {[v.shape for v in values[:3]]}"
        hint += f" If these are currents, give them to the layer: {who}()(xs)."
    raise ValueError(
        f"{who}: expected at least one threshold, {problem}, got {got}.{hint}"
    )
