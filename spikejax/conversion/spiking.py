"""Trained networks turned into spiking ones: quantised activations become IF neurons.

    ann = calibrate(relu_network, images).model  # or train one with QuantReLU
    snn, swaps = convert(fold_norms(ann, images), images)

Both work on the traced function of the network, so it does not matter how its ReLUs are
called. Weights are not modified. Pooling acts on spikes, step by step: the mean is
exact; the maximum of spikes is their OR, which is the maximum of the rates only where
the strongest input covers the spikes of the others.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import unflatten_dict

from spikejax import trace
from spikejax._compat import List, iter_modules
from spikejax.conversion.relus import SIGNED, Relus, advise
from spikejax.conversion.rules import Rule, maximum
from spikejax.functions import Function, functional
from spikejax.memory import Membrane, evaluation_copy, has_held, keep_membranes
from spikejax.neurons import Number
from spikejax.nn.quant import QuantReLU, ScaledIF
from spikejax.trace import Site, Traced

BELOW = 1 - 1e-6  # see _threshold
ROUNDS = 3  # of a correction


class Swap(NamedTuple):
    """Activation that was replaced, and the threshold that it had or was given.

    In a scan over layers v_threshold is an array, one threshold per layer.
    """

    path: str
    levels: int
    v_threshold: Number


class Converted(NamedTuple):
    """New model in evaluation mode, and the activations that were replaced in it."""

    model: "Replaced"
    swaps: tuple[Swap, ...]


class Seen(NamedTuple):
    """Input and output of one activation, in a scan over layers [layers, ...]."""

    x: jax.Array
    y: jax.Array


class Replaced(nnx.Module):
    """Network over sequences whose ReLUs are computed by modules that are held here.

    ``sites[k]`` is the QuantReLU or ScaledIF in the place of the activation
    ``names[k]``, which was found in evaluation mode.

    Raises:
        ValueError: in a call, where the network has other ReLUs than before.
    """

    def __init__(
        self, model: nnx.Module, sites: Sequence[nnx.Module], found: Sequence[Site]
    ):
        self.model = model
        self.sites = List(sites)
        self.biases = List([])  # one per site after a correction, else none
        self.names = tuple(site.name for site in found)
        self.repeats = tuple(len(site.repeats) for site in found)
        self.currents = any(site.kind == SIGNED for site in found)
        self.places = tuple(site.where for site in found)

    def __call__(self, xs: jax.Array) -> jax.Array:
        """Return the answer [B, T, ...] to xs [B, T, ...]."""
        params, traced = self._trace(xs)
        pointwise = isinstance(self.sites[0], QuantReLU) or xs.shape[1] == 1
        if pointwise or self._has_time(traced, xs):
            return self._run(params, traced, xs)[0]
        # A network that folds time into the batch, or was made for images, has no axis
        # of time where its activations are: it runs step by step.
        if self.sites[0].memory.watch:  # of keep_membranes, which wants one step
            return self.observe(xs[:, :1])[0]
        held = has_held(self)
        model = self if held else keep_membranes(nnx.clone(self), xs[:, :1])
        graphdef, state, rest = nnx.split(model, Membrane, ...)

        def step(state: nnx.State, x: jax.Array) -> tuple[nnx.State, jax.Array]:
            model = nnx.merge(graphdef, state, rest)
            return nnx.state(model, Membrane), model(x[:, None])[:, 0]

        state, ys = jax.lax.scan(step, state, jnp.moveaxis(xs, 1, 0))
        if held:
            nnx.update(self, state)
        return jnp.moveaxis(ys, 0, 1)

    def observe(self, xs: jax.Array) -> tuple[jax.Array, dict[str, Seen]]:
        """Return the answer to one time step [B, 1, ...], and all activations in it."""
        return self._run(*self._trace(xs), xs)

    def _trace(self, xs: jax.Array) -> tuple[trace.Pytree, Traced]:
        f, params = functional(self.model)
        rule = Relus(self.places, currents=self.currents)
        traced = trace.trace(f, params, xs, rule)
        if len(traced.sites) != len(self.sites):
            raise ValueError(
                f"Replaced: expected the ReLUs {', '.join(self.places)}, got "
                f"{', '.join(site.where for site in traced.sites)}. Convert it again."
            )
        return params, traced

    def _has_time(self, traced: Traced, xs: jax.Array) -> bool:
        """Return whether neurons may be called with sequences, from rest."""
        if any(site.memory.watch or site.memory.held for site in self.sites):
            return False
        lead = self._lead(xs)
        # Where time and batch have one size, another batch shows which is which.
        if len(set(lead)) < len(lead) and xs.shape[1] > 1:
            shape = xs.shape[0] + 1, *xs.shape[1:]
            other: Any = jax.ShapeDtypeStruct(shape, xs.dtype)
            lead, traced = self._lead(other), self._trace(other)[1]
        shapes = {(*site.repeats, *_shape(site)[: len(lead)]) for site in traced.sites}
        return shapes == {lead}

    def _lead(self, xs: jax.Array) -> tuple[int, ...]:
        """Return the axes of batch and time, which a function of images has as one."""
        folds = isinstance(self.model, Function) and not self.model.time
        return (xs.shape[0] * xs.shape[1],) if folds else xs.shape[:2]

    def _run(
        self, params: trace.Pytree, traced: Traced, xs: jax.Array
    ) -> tuple[jax.Array, dict[str, Seen]]:
        biases = [bias[...] for bias in self.biases] or [None] * len(self.sites)
        held = map(_given, self.sites, traced.sites)
        given = dict(enumerate(zip(held, biases, strict=True)))
        spiking = isinstance(self.sites[0], ScaledIF)
        lead, whole = self._lead(xs), spiking and self._has_time(traced, xs)

        def handler(n: int, site: Site, values: list, given: tuple) -> tuple:
            x, module, state = _input(site, values), self.sites[n], None
            given, bias = given
            x = x if bias is None else x + bias.astype(x.dtype)
            if isinstance(module, QuantReLU):
                y = module.quantise(x, *given)
            elif whole:
                y = module(x.reshape(*xs.shape[:2], *x.shape[len(lead) :]))
                y = y.reshape(x.shape)
            else:
                unit, state = given  # of this layer, if the site is in a scan
                step, (params, _) = module.bind()
                state, y = step((params, unit), state, x)
            return _output(site, values, y), (state, Seen(x, y))

        (ys, after), kept = trace.run(traced, params, xs, handler, given)
        leaves = jax.tree_util.tree_leaves_with_path(after)
        pairs = zip(leaves, traced.same[1:], strict=True)  # the answer comes first
        changed = {tuple(k.key for k in p): v for (p, v), same in pairs if not same}
        if changed:  # statistics of norms in training
            nnx.update(self.model, unflatten_dict(changed))
        if spiking and not whole:
            for n, module in enumerate(self.sites):
                module.memory.save(kept[n][0])
        return ys, {name: kept[n][1] for n, name in enumerate(self.names)}


def _given(module: QuantReLU | ScaledIF, site: Site) -> tuple:
    """Return the arrays that a module needs at a site, [*repeats, ...]."""
    if isinstance(module, QuantReLU):
        key = module.key()
        if key is not None and site.repeats:
            key = jax.random.split(key, site.repeats)  # one per layer of the scan
        return module.scale[...], key
    start = module.start((*site.repeats, *_shape(site)))
    return module.unit[...], module.memory.load(start)


def _place(site: Site) -> int:
    """Return the place of the operand that depends on the input of the network."""
    return next(k for k, level in enumerate(site.levels) if level)


def _input(site: Site, values: list) -> jax.Array:
    return values[_place(site)]


def _shape(site: Site) -> tuple[int, ...]:
    """Return the shape of the neurons at a site."""
    return trace.aval(site.eqn.invars[_place(site)]).shape


def _output(site: Site, values: list, y: jax.Array) -> jax.Array:
    """Return the output of a site with activations y: of a product, that of y."""
    if site.kind != SIGNED:
        return y
    (out,) = trace.bind(site.eqn, [*values[: (k := _place(site))], y, *values[k + 1 :]])
    return out


def _sites(
    who: str, model: nnx.Module, xs: jax.Array, *, plain: bool, currents: bool = False
) -> tuple[nnx.Module, Traced, list[QuantReLU | None]]:
    """Return a copy of a network, its sites, and the QuantReLU that each one is."""
    if xs.ndim < 2 or 0 in xs.shape[:2]:
        raise ValueError(
            f"{who}: expected input [B, T, ...], B and T >= 1, got {xs.shape}."
        )
    model = evaluation_copy(who, model)
    found = []
    if isinstance(model, Replaced):
        if isinstance(model.sites[0], ScaledIF):
            raise ValueError(f"{who}: expected a network of ReLUs, got a spiking one.")
        currents = model.currents
        model, found = model.model, list(model.sites)
    rule = Relus(currents=currents)
    traced = trace.trace(*functional(model), xs, rule)
    modules = {"/".join(map(str, path)): module for path, module in iter_modules(model)}
    # A QuantReLU names its site; the name of a ReLU is that of the layer before it.
    found = found or [
        modules[site.name] if site.kind == "quantised_relu" else None
        for site in traced.sites
    ]
    problems = [f"{each[0]} at {each[1]}{advise(*each)}" for each in traced.others]
    for quant, site in zip(found, traced.sites, strict=True):
        at = f"{site.kind} at {site.where}"
        if site.custom:
            problems.append(f"{at} with a gradient of its own")
        elif quant is None and not plain:
            problems.append(f"a plain {at}: call calibrate(model, images) first")
    if not traced.sites:
        problems.append("no ReLU that depends on the input")
    shape = traced.closed.out_avals[0].shape
    if shape[:2] != xs.shape[:2]:
        problems.append(
            f"an answer of shape {shape} to an input {xs.shape}. Images get an axis of "
            "time, images[:, None], which the model keeps: x.mean((-3, -2))"
        )
    if problems:
        raise ValueError(
            f"{who}: expected a network [B, T, ...] to [B, T, K] of affine operations, "
            f"pooling and ReLUs, got {'; '.join(problems)}."
        )
    return model, traced._replace(sites=_unique(traced.sites)), found


def _unique(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Return sites whose names differ: a shared ReLU is several neurons."""
    names, unique = [site.name for site in sites], []
    for n, site in enumerate(sites):
        again = names[: n + 1].count(site.name)
        unique.append(site._replace(name=f"{site.name}#{again}") if again > 1 else site)
    return tuple(unique)


def quantised(who: str, model: nnx.Module, xs: jax.Array) -> Replaced:
    """Return a copy with its QuantReLUs as sites; ValueError if others are in it."""
    biases = model.biases if isinstance(model, Replaced) else ()
    biases = [nnx.Param(bias[...]) for bias in biases]
    model, traced, found = _sites(who, model, xs, plain=False)
    made = Replaced(model, [quant for quant in found if quant], traced.sites)
    made.biases = List(biases)
    return made


def _swap(path: str, levels: int, v_threshold: jax.Array) -> Swap:
    """Return the row of an activation, whose threshold must be positive."""
    if not bool(((v_threshold > 0) & jnp.isfinite(v_threshold)).all()):
        raise ValueError(
            f"conversion: expected a positive threshold at {path!r}, got {v_threshold}."
            " The model is untrained, diverged, or this layer is dead."
        )
    return Swap(path, levels, v_threshold if v_threshold.ndim else float(v_threshold))


def convert(
    model: nnx.Module,
    xs: jax.Array,
    num_thresholds: int = 1,
    *,
    neuron: Callable[..., ScaledIF] = ScaledIF,
) -> Converted:
    """Return a spiking copy of a model: each QuantReLU becomes a ``ScaledIF``.

    v_threshold = s p,  V[0] = v_threshold / 2,  soft reset, spikes of v_threshold

    Norms act at every step; ``fold_norms`` folds them into the weights before. Show the
    network the same image at every step; its answer is the mean of its logits. At T = p
    its levels are those of the quantised network.

    Args:
        model: from ``calibrate``, or with QuantReLU for activations; not modified.
        xs: an example of the input [B, T, ...]; its values do not count.
        num_thresholds: N thresholds do in T / N steps what one does in T.
        neuron: makes the neurons from v_threshold and N, such as
            ``partial(ScaledIF, dyadic=True, lowest=0.0)``.

    Returns:
        the spiking model, and one row per activation.

    Raises:
        ValueError: something in the model is neither affine nor a QuantReLU, with file
            and line, or a scale is not positive.

    Reference: Li et al. 2024, arXiv:2411.17431; Bu et al. 2023, arXiv:2303.04347.
    """
    ann = quantised("convert", model, xs)
    swaps, neurons = [], []
    for path, quant in zip(ann.names, ann.sites, strict=True):
        swap = _swap(path, quant.levels, quant.scale[...] * quant.levels)
        options = {"lowest": -math.inf} if quant.signed else {}
        made = neuron(swap.v_threshold, num_thresholds, **options)
        made.name = path
        swaps.append(swap)
        neurons.append(made)
    ann.sites = List(neurons)
    return Converted(ann, tuple(swaps))


def calibrate(
    model: nnx.Module,
    xs: jax.Array,
    *,
    rule: Rule = maximum,
    neuron: Callable[[], QuantReLU] = QuantReLU,
    per_channel: bool = False,
    correct: bool = False,
    currents: bool = False,
) -> Converted:
    """Return a quantised copy of a ReLU network, thresholds found on a batch.

    ``convert`` it for the training-free baseline, or train on from it. The activations
    are those of the ReLU network, not of the quantised one.

    Args:
        model: network of ReLUs, however they are called; for Linen or a function of
            your own, ``Function(net.apply, variables)``. A QuantReLU in it gets a
            new scale. Not modified.
        xs: input [B, T, ...] as the model takes it.
        rule: from activations to a threshold, as a function that ``jax.jit`` takes:
            maximum, percentile(99.9), least_error, least_squares.
        neuron: makes the QuantReLU in the place of a ReLU.
        per_channel: whether each channel, the last axis, has a threshold.
        correct: whether each channel gets a bias, layer by layer, with which its
            quantised activations have the mean of the ReLU network's.
        currents: whether sums of weighted spikes, as behind a linear bottleneck, are
            quantised before they meet weights. All layers but the first see spikes.

    Returns:
        the quantised model, and one row per activation.

    Raises:
        ValueError: something in the model is neither affine nor a ReLU, with file and
            line, or a layer is dead.
    """
    if isinstance(neuron, QuantReLU) or not (callable(rule) and callable(neuron)):
        raise ValueError(
            "calibrate: expected a rule such as maximum and a factory such as "
            "partial(QuantReLU, 4), got a "
            f"{type(rule).__name__} and a {type(neuron).__name__}."
        )
    if correct:  # the first half passes through ReLUs, the second is quantised
        xs = jnp.concatenate([xs, xs])
    model, traced, found = _sites("calibrate", model, xs, plain=True, currents=currents)
    quants = _apart(found, neuron)
    for quant, site in zip(quants, traced.sites, strict=True):
        quant.signed, quant.deterministic = site.kind == SIGNED, True
    handler = _calibrating(quants, rule, per_channel, correct)
    # Compiled as a whole, or the activations of all layers would be held.
    run = jax.jit(partial(trace.run, traced, handler=handler))
    _, kept = run(functional(model)[1], xs)
    swaps, made = [], Replaced(model, quants, traced.sites)
    for n, (quant, site) in enumerate(zip(quants, traced.sites, strict=True)):
        threshold, bias = kept[n]
        swaps.append(_swap(site.name, quant.levels, threshold))
        quant.scale = nnx.Param(threshold / quant.levels)
        if correct:
            made.biases.append(nnx.Param(bias))
    return Converted(made, tuple(swaps))


def _apart(
    found: Sequence[QuantReLU | None], neuron: Callable[[], QuantReLU]
) -> list[QuantReLU]:
    """Return a QuantReLU for each site: one at two places becomes two."""
    quants: list[QuantReLU] = []
    for quant in found:
        if quant and any(quant is other for other in quants):
            quant = nnx.clone(quant)
            if quant.rngs is not None:  # with noise of its own
                quant.rngs = quant.rngs.fork()
        quants.append(quant or neuron())
    return quants


def _calibrating(
    quants: Sequence[QuantReLU], rule: Rule, per_channel: bool, correct: bool
) -> trace.Handler:
    """Return a handler that finds (threshold, bias) of each site, one after another."""

    def handler(n: int, site: Site, values: list, given: None) -> tuple:
        x, quant = _input(site, values), quants[n]
        y = x if quant.signed else jnp.minimum(nnx.relu(x), site.cap)
        known = abs(y[: len(y) // 2] if correct else y)
        threshold = _threshold(rule, known, quant.levels, per_channel)
        bias = None
        if correct:
            y, bias = _corrected(quant, x, y, threshold / quant.levels)
        return _output(site, values, y), (threshold, bias)

    return handler


def _threshold(rule: Rule, y: jax.Array, levels: int, per_channel: bool) -> jax.Array:
    """Return the threshold of a layer, or those of its channels."""
    if not per_channel:
        threshold = jnp.asarray(rule(y, levels), jnp.float32)
    else:
        found = jax.vmap(lambda y: rule(y, levels), -1)(y).astype(jnp.float32)
        # A channel that is zero on these images may not be on others.
        mean = found.sum() / jnp.maximum((found > 0).sum(), 1)
        threshold = jnp.where(found == 0, mean, found)
    # The largest activation must not be at the clip exactly, where the last bit
    # decides on its gradient.
    return BELOW * threshold


def _corrected(
    quant: QuantReLU, x: jax.Array, y: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return activations, the second half quantised, and the bias of each channel."""
    half, axes = len(x) // 2, tuple(range(x.ndim - 1))
    exact, x, bias = y[:half], x[half:], jnp.zeros(x.shape[-1])
    # A step of the staircase is a slope of 1 on average, so this converges quickly.
    for _ in range(ROUNDS):
        bias = bias + (exact - quant.quantise(x + bias, scale, None)).mean(axes)
    return jnp.concatenate([exact, quant.quantise(x + bias, scale, None)]), bias
