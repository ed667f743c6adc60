"""Layers of spiking neurons for Flax NNX, over sequences [B, T, ...].

A layer starts from rest at every call, so nothing has to be reset, unless its state is
kept between calls: see ``keep_membranes`` and ``stepper``. Membranes are float32
whatever the type of the input.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.typing import ArrayLike

from spikejax import neurons, surrogate
from spikejax._compat import iter_modules
from spikejax.memory import Memory
from spikejax.neurons import (
    Cell,
    NeuronOptions,
    NeuronParams,
    Number,
    Params,
    State,
    Step,
)
from spikejax.surrogate import Surrogate
from spikejax.unroll import unroll_compiled

Layer = Callable[[jax.Array], jax.Array]  # xs -> ys, a module or a function
Factory = Callable[[], Layer]  # such as LIF, or lambda: nnx.relu
# A number, an array, a sequence of those, or a variable.
Parameter = Any


class Fixed(nnx.Variable):
    """Parameter of a neuron that is not trained."""


class Neuron(nnx.Module):
    """Layer of spiking neurons: a cell, its parameters, and its options.

    Other layers construct it; nothing overrides it. A neuron of
    your own is a function (params, state, x, options) -> (state, trains).

    Args:
        cell: one of ``spikejax.neurons``, or your own.
        params: a NamedTuple, such as NeuronParams, of numbers, arrays, or sequences of
            those. Arrays broadcast against the features; an nnx.Param is learned as it
            is.
        options: see ``NeuronOptions``.
        start: (params, shape of the currents, v_start) -> state at rest.
        v_start: membrane before the first step, by default v_reset, or 0.
        unit: size of one spike: currents are divided by it and outputs multiplied.
        learn_tau: learn the leak as sigmoid(leak_logit), in the shape of tau.
        learn_thresholds: learn the thresholds as exp(log_steps), summed up where they
            must rise, so they stay positive and in order.

    Raises:
        ValueError: a parameter is out of its range.
    """

    def __init__(
        self,
        cell: Cell,
        params: Params,
        options: NeuronOptions = neurons.DEFAULT,
        *,
        start: Callable[[Params, tuple[int, ...], Number], State] | None = None,
        v_start: Number | None = None,
        unit: Number | nnx.Param | None = None,
        learn_tau: bool = False,
        learn_thresholds: bool = False,
    ):
        if isinstance(params, NeuronParams):
            _check(type(self).__name__, cell, params, options)
        self.cell = cell
        self.options = options
        self.name = ""  # of its place in the model, where somebody asks for it
        self.memory = Memory()
        default = neurons.rest_each if cell is neurons.independent else neurons.rest
        self.rest = default if start is None else start
        self.v_start = hold(options.v_reset or 0.0 if v_start is None else v_start)
        self.unit = hold(unit)
        self.kind = type(params)
        for field, value in zip(params._fields, params, strict=True):
            setattr(self, field, hold(value))
        # Thresholds that stay in order are learned as the steps between them.
        self.rises = cell is neurons.parallel and getattr(params, "amounts", 0) is None
        # sigmoid(leak_logit) = 1 / tau
        leak = np.asarray(params.leak) if learn_tau else 0.5
        if not np.all((leak > 0) & (leak < 1)):
            raise ValueError(
                f"{type(self).__name__}: expected a leak of more than 0 and less than "
                f"1 where it is learned, got {params.leak}."
            )
        logit = -np.log(1 / leak - 1) if learn_tau else None
        self.leak_logit = None if logit is None else param(logit)
        steps = np.asarray(_stack(params.thresholds)) if learn_thresholds else None
        if steps is not None and self.rises:
            steps = np.diff(steps, axis=0, prepend=0)
        if steps is not None and not np.all(steps > 0):
            raise ValueError(
                f"{type(self).__name__}: expected positive thresholds where they are "
                f"learned, got {params.thresholds}."
            )
        self.log_steps = None if steps is None else param(np.log(steps))

    @property
    def params(self) -> Any:
        """Parameters as the cell takes them, learned or fixed."""
        values = {field: _read(getattr(self, field)) for field in self.kind._fields}
        learned = [f for f in values if getattr(self, f"{f}_logit", None) is not None]
        values |= {f: jax.nn.sigmoid(getattr(self, f"{f}_logit")[...]) for f in learned}
        if self.log_steps is not None:
            steps = jnp.exp(self.log_steps[...])
            values["thresholds"] = jnp.cumsum(steps, 0) if self.rises else steps
        return self.kind(**values)

    @property
    def num_thresholds(self) -> int:
        """Number N of thresholds, and of spike trains."""
        return len(self.params.thresholds)

    def start(self, shape: tuple[int, ...]) -> State:
        """Return the state before the first step, for currents of that shape."""
        return self.rest(self.params, shape, _read(self.v_start))

    def bind(self, *, trains: bool = False) -> tuple[Step, tuple[Any, Any]]:
        """Return ``self.step`` as a function (params, state, x), and the params."""
        params = self.params
        weights = neurons.fixed_weights(self.cell, params)
        step = Step(self.cell, self.options, self.name, trains, weights)
        return step, (params, _read(self.unit))

    def step(
        self, state: State, x: jax.Array, *, trains: bool = False
    ) -> tuple[State, jax.Array]:
        """Compute one step from a state that the caller keeps.

        Args:
            state: as from ``start(x.shape)``.
            x: currents of any shape; its axes do not see each other.
            trains: return the N binary trains on a new last axis.

        Returns:
            the state after it, and the spikes in the type of x.
        """
        step, params = self.bind(trains=trains)
        return step(params, state, x)

    def charge(self, v: jax.Array, x: jax.Array) -> jax.Array:
        """Return the membranes of such a step after charging, before it fires."""
        step, params = self.bind()
        return step.charge(params, v, x.astype(jnp.float32))

    def __call__(self, xs: jax.Array, *, trains: bool = False) -> jax.Array:
        """Return the spikes of the currents xs.

        Args:
            xs: input current [B, T, ...], floating point.
            trains: return the N binary spike trains on a new last axis.

        Returns:
            spikes [B, T, ...] in the type of xs: for N thresholds their weighted sum.

        Raises:
            ValueError: xs has no time axis, holds no floating point numbers, or has
                other features than the parameters.
        """
        check_sequence(type(self).__name__, xs)
        self._check_features(xs)
        self._check_bridge()
        step, params = self.bind(trains=trains)
        state = self.memory.load(self.start(xs[:, 0].shape))
        state, spikes = unroll_compiled(step, params, state, xs)
        self.memory.save(state)
        return spikes

    def _check_bridge(self) -> None:
        """Check that a Linen module around this one sees what is learned."""
        # Flax names the module around this one nowhere else.
        outer = linen.module._context.module_stack[-1]
        if outer is None or isinstance(outer, nnx.bridge.ToLinen):
            return
        if jax.tree.leaves(nnx.state(self, nnx.Param)):
            name = type(self).__name__
            raise ValueError(
                f"{name}: expected the bridge around a layer that learns in a Linen "
                f"module, got none. nnx.bridge.to_linen({name}, skip_rng=True)(x)."
            )

    def _check_features(self, xs: jax.Array) -> None:
        """Check that parameters broadcast against a step of xs."""
        held = (getattr(self, name, 0.0) for name in ("leak", "v_start", "thresholds"))
        leak, v_start, thresholds = (np.shape(_read(value)) for value in held)
        sizes = xs.shape[:1] + xs.shape[2:]
        for shape in (leak, v_start, thresholds[1:]):
            pairs = zip(reversed(shape), reversed(sizes), strict=False)
            if len(shape) > len(sizes) or any(n not in (1, size) for n, size in pairs):
                raise ValueError(
                    f"{type(self).__name__}: expected parameters that broadcast "
                    f"against the features {xs.shape[2:]}, got shape {shape}."
                )


def check_sequence(who: str, xs: jax.Array) -> None:
    """Check that xs is a sequence [B, T, ...] of floating point numbers.

    Raises:
        ValueError: it is not.
    """
    shape = getattr(xs, "shape", ())
    dtype = getattr(xs, "dtype", type(xs).__name__)
    if len(shape) > 1 and shape[1] and jnp.issubdtype(dtype, jnp.floating):
        return
    raise ValueError(
        f"{who}: expected a floating point sequence [B, T, ...] with T >= 1, got "
        f"{dtype} of shape {shape}. For one time step, add the time axis: x[:, None]. "
        "Convert integers: xs.astype(jnp.float32)."
    )


def check_lengths(who: str, lengths: ArrayLike | list[int], size: int) -> jax.Array:
    """Return the lengths of the sequences of a batch as an array [B].

    Raises:
        ValueError: they are not as many whole numbers.
    """
    found = jnp.asarray(lengths)
    if found.shape != (size,) or not jnp.issubdtype(found.dtype, jnp.integer):
        raise ValueError(
            f"{who}: expected lengths of {size} sequences, whole numbers, got "
            f"{found.dtype} of shape {found.shape}."
        )
    return found


def hold(value: Parameter) -> Any:
    """Return a value as a module stores it: numbers static, arrays in a variable."""
    if value is None or isinstance(value, nnx.Variable | str):
        return value
    if isinstance(value, Real):
        return float(value)  # in a loop parameters have gradients, not whole numbers
    if isinstance(value, Sequence) and all(isinstance(v, Real) for v in value):
        return tuple(map(float, value))
    return Fixed(jnp.asarray(_stack(value), jnp.float32))


def param(value: ArrayLike) -> nnx.Param:
    """Return a learned parameter, in float32."""
    return nnx.Param(jnp.asarray(value, jnp.float32))


def _stack(value: Parameter) -> Any:
    """Return a sequence of numbers and arrays as one array, [N, ...]."""
    if isinstance(value, Sequence):
        return np.stack(np.broadcast_arrays(*map(np.asarray, value)))
    return value


def _read(value: Parameter) -> Any:
    return value[...] if isinstance(value, nnx.Variable) else value


def _check(who: str, cell: Cell, params: NeuronParams, options: NeuronOptions) -> None:
    """Check the parameters of our own cells."""
    if not isinstance(options.surrogate, Surrogate):
        raise ValueError(
            f"{who}: expected a surrogate such as surrogate.ATAN or surrogate."
            f"Surrogate(derivative), got a {type(options.surrogate).__name__}."
        )
    if cell is neurons.integrate or isinstance(params.thresholds, nnx.Variable):
        return
    leak, count = np.asarray(params.leak), len(params.thresholds)
    if not np.all((leak >= 0) & (leak <= 1)):
        raise ValueError(f"{who}: expected a leak of 0 to 1, got {params.leak}.")
    amounts = params.amounts
    if amounts is not None and (
        len(amounts) != count or not np.all(np.asarray(amounts[:1]))
    ):
        raise ValueError(
            f"{who}: expected an amount for each of {count} thresholds, the first not "
            f"0, got {amounts}."
        )
    if params.amounts is None:
        rising = cell is neurons.parallel
        neurons.check_thresholds(who, params.thresholds, rising=rising)
    if cell is neurons.lif and len(params.thresholds) != 1:
        raise ValueError(
            f"{who}: expected one threshold for the cell lif, got {params.thresholds}. "
            "For several, give neurons.parallel, cascade or independent."
        )
    v_reset, lowest = options.v_reset, min(np.min(t) for t in params.thresholds)
    if v_reset is None or params.amounts is not None:
        return
    if not isinstance(v_reset, Real) or not v_reset < lowest:
        raise ValueError(
            f"{who}: expected v_reset below every threshold {lowest}, got {v_reset!r}. "
            "Give None for soft reset."
        )


def check_tau(
    who: str, tau: Number, *, scales_input: bool = False, learned: bool = False
) -> Any:
    """Return 1 / tau.

    Raises:
        ValueError: tau is out of its range.
    """
    with np.errstate(all="ignore"):
        # Text such as "2" is no number, though NumPy reads it as one.
        leak = 1 / np.asarray(math.nan if isinstance(tau, str) else tau, np.float64)
    finite = learned or scales_input  # at tau = inf no input would arrive
    right = (leak > 0 if finite else leak >= 0) & (leak < 1 if learned else leak <= 1)
    if not np.all(right):
        raise ValueError(
            f"{who}: expected tau >= 1, and > 1 and finite where it is learned, got "
            f"{tau}. The membrane keeps 1 - 1/tau of itself per time step; for "
            "integrate-and-fire take IF, or tau=math.inf with decay_input=False."
        )
    return leak.item() if leak.ndim == 0 else leak


class LIF(Neuron):
    """Layer of leaky integrate-and-fire neurons.

    u = v + (x - v) / tau  (decay_input)   or   u = v - v / tau + x
    z = H(u - v_threshold);   v' = u - v_threshold z  (soft)   or   v_reset where z = 1

    Args:
        tau: membrane time constant in time steps, >= 1; a number, or an array that
            broadcasts against the features.
        v_threshold: threshold, > 0; a number or an array like tau.
        v_reset: None for soft reset, else the value after a spike and at rest.
        decay_input: whether tau scales the input too.
        detach_reset: whether no gradient flows through the reset.
        surrogate: Heaviside step with a surrogate derivative.
        v_start: membrane before the first step; v_reset, or 0, where it is None.
        learn_tau: learn tau, in its own shape: one number is one tau per layer (PLIF).
        learn_thresholds: learn the threshold, in its own shape.

    Raises:
        ValueError: an argument is out of its range.

    Examples:
        >>> xs = jnp.full((1, 4, 1), 1.5)  # [B, T, features]
        >>> LIF()(xs).ravel().tolist()  # u = 0.75, 1.125, 0.8125, 1.15625
        [0.0, 1.0, 0.0, 1.0]

    Reference: Wu et al. 2018, arXiv:1706.02609.
    """

    def __init__(
        self,
        tau: Number = 2.0,
        v_threshold: Number = 1.0,
        *,
        v_reset: float | None = None,
        decay_input: bool = True,
        detach_reset: bool = False,
        surrogate: Surrogate = surrogate.ATAN,
        v_start: Number | None = None,
        learn_tau: bool = False,
        learn_thresholds: bool = False,
    ):
        options = NeuronOptions(v_reset, decay_input, detach_reset, surrogate)
        who = type(self).__name__
        leak = check_tau(who, tau, scales_input=decay_input, learned=learn_tau)
        super().__init__(
            neurons.lif,
            NeuronParams(leak, (v_threshold,)),
            options,
            v_start=v_start,
            learn_tau=learn_tau,
            learn_thresholds=learn_thresholds,
        )


class IF(LIF):
    """Layer of integrate-and-fire neurons: u = v + x.

    Arguments are those of LIF except tau and decay_input.
    """

    def __init__(self, v_threshold: Number = 1.0, **options: Any):
        super().__init__(math.inf, v_threshold, decay_input=False, **options)


class PLIF(LIF):
    """Layer of leaky integrate-and-fire neurons that learn tau.

    1 / tau = sigmoid(w). Arguments are those of LIF; tau is the initial value, > 1.

    Reference: Fang et al. 2021, arXiv:2007.05785.
    """

    def __init__(self, tau: Number = 2.0, v_threshold: Number = 1.0, **options: Any):
        super().__init__(tau, v_threshold, learn_tau=True, **options)


class LI(Neuron):
    """Layer of leaky integrators, such as a readout: v' = v + (x - v) / tau, output v'.

    tau=math.inf with decay_input=False adds up the input.
    """

    def __init__(self, tau: Number = 2.0, *, decay_input: bool = True):
        options = NeuronOptions(decay_input=decay_input)
        leak = check_tau(type(self).__name__, tau, scales_input=decay_input)
        super().__init__(neurons.integrate, NeuronParams(leak), options)


class MultiThreshold(Neuron):
    """Layer of neurons with N thresholds, which fire up to N spikes in one time step.

    The output is the sum of N binary spike trains, with weights that are 1 for equally
    spaced thresholds; ``layer(xs, trains=True)`` returns the trains. See the cell for
    the equations.

    Args:
        thresholds: their number N, for equal spacing of v_threshold, or the thresholds
            themselves, numbers or arrays: rising for ``parallel``, in the order of
            firing for ``cascade``.
        cell: neurons.parallel, neurons.cascade, or neurons.independent (one membrane
            per threshold).
        v_threshold: the spacing, where thresholds is a number.
        tau: as in LIF; math.inf with decay_input=False integrates without a leak.
        Other arguments are those of LIF. After a batch norm, v_threshold=0.5 and
        decay_input=False put four thresholds where the inputs are.

    Raises:
        ValueError: an argument is out of its range.

    Examples:
        >>> layer = MultiThreshold(4, v_threshold=0.5, decay_input=False)
        >>> xs = jnp.array([[[0.2, 0.7, 1.6]]])  # [B, T, features]
        >>> layer(xs).tolist()
        [[[0.0, 1.0, 3.0]]]
        >>> layer(xs, trains=True)[0, 0, 2].tolist()
        [1.0, 1.0, 1.0, 0.0]

    Reference: Wang, Zhang, Zhang 2023, arXiv:2303.11127.
    """

    def __init__(
        self,
        thresholds: int | Sequence[Number] = 4,
        cell: Cell = neurons.parallel,
        *,
        v_threshold: Number = 1.0,
        tau: Number = 2.0,
        v_reset: float | None = None,
        decay_input: bool = True,
        detach_reset: bool = False,
        surrogate: Surrogate = surrogate.ATAN,
        v_start: Number | None = None,
        learn_tau: bool = False,
        learn_thresholds: bool = False,
    ):
        who = type(self).__name__
        counts = isinstance(thresholds, int | np.integer)
        if isinstance(cell, type | Neuron | str) or not (
            counts or isinstance(thresholds, tuple | list | jax.Array | np.ndarray)
        ):
            raise ValueError(
                f"{who}: expected the number of thresholds or a sequence of them, and "
                "a cell such as neurons.parallel, got "
                f"{thresholds!r} and {getattr(cell, '__name__', type(cell).__name__)}."
            )
        if counts:
            repeats = cell is neurons.cascade
            equal = neurons.repeated_thresholds if repeats else neurons.equal_thresholds
            thresholds = equal(int(thresholds), v_threshold)
        elif np.ndim(v_threshold) or v_threshold != 1.0:
            raise ValueError(
                f"{who}: expected v_threshold with a number of thresholds, got it with "
                f"{thresholds}."
            )
        options = NeuronOptions(v_reset, decay_input, detach_reset, surrogate)
        leak = check_tau(who, tau, scales_input=decay_input, learned=learn_tau)
        super().__init__(
            cell,
            NeuronParams(leak, tuple(thresholds)),
            options,
            v_start=v_start,
            learn_tau=learn_tau,
            learn_thresholds=learn_thresholds,
        )


def neuron_layers(model: nnx.Module) -> dict[str, Neuron]:
    """Return the layers of neurons in a model, by path such as 'stages/0/neurons/1'."""
    modules = ((path, m) for path, m in iter_modules(model) if isinstance(m, Neuron))
    return {"/".join(map(str, path)): module for path, module in modules}
