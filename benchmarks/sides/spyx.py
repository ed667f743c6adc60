"""Spyx: convolutions and norms fold the time steps into the batch, by hand.

Its own driver cannot: ``spyx.nn.run`` over a whole network raises an error with batch
norm, and a convolution inside of its scan is some twenty times slower. So it runs the
neurons alone. They fire on the membrane of the step before, and the reset acts one step
later, with a gradient; the leak, which Spyx always counts as a parameter, is not
trained here. The step is compiled, and its state donated, as on the side of spikejax.
"""

import importlib.metadata

import jax
import jax.numpy as jnp
import optax
import spyx
from flax import nnx

from benchmarks.sides import xla
from benchmarks.workloads import CLASSES, STRIDES, Prepared, Sizes, batch

VERSIONS = {name: importlib.metadata.version(name) for name in ("spyx", "jax", "flax")}
ATAN = spyx.axn.custom(lambda x: 1 / (1 + (jnp.pi * x) ** 2))  # arctan() is 1/pi of it


def _neurons(*shape):
    return spyx.nn.LIF(shape, beta=0.5, activation=ATAN, rngs=nnx.Rngs(0))


class Convolutions(nnx.Module):
    """Three convolutions, two of them with stride 2, over [T, B, H, W, C]."""

    def __init__(self, sizes, rngs):
        widths, places = sizes.channels, [sizes.side]
        for stride in STRIDES[1:]:
            places.append(places[-1] // stride)
        self.convs = nnx.List(
            nnx.Conv(a, b, (3, 3), (s, s), padding=1, use_bias=False, rngs=rngs)
            for a, b, s in zip((3, *widths), widths, STRIDES, strict=False)
        )
        self.norms = nnx.List(nnx.BatchNorm(n, momentum=0.9, rngs=rngs) for n in widths)
        self.neurons = nnx.List(
            _neurons(p, p, n) for p, n in zip(places, widths, strict=True)
        )
        self.head = nnx.Linear(widths[-1], CLASSES, rngs=rngs)
        xla.give_weights([*self.convs, self.head])

    def __call__(self, xs):
        time_steps = xs.shape[0]
        for conv, norm, neuron in zip(
            self.convs, self.norms, self.neurons, strict=True
        ):
            xs = norm(conv(xs.reshape(-1, *xs.shape[2:])))
            xs, _ = spyx.nn.run(neuron, xs.reshape(time_steps, -1, *xs.shape[1:]))
        return self.head(xs.mean((2, 3)))


class OneLinear(nnx.Module):
    """A linear layer and its neurons, over [T, B, n]."""

    def __init__(self, sizes, rngs):
        (n,) = sizes.channels
        self.linear = nnx.Linear(n, n, rngs=rngs)
        self.neuron = _neurons(n)
        xla.give_weights([self.linear])

    def __call__(self, xs):
        return spyx.nn.run(self.neuron, self.linear(xs))[0]


NETWORKS = {"convolutions": Convolutions, "linear": OneLinear}


def _is_trained(path, value):
    return isinstance(value, nnx.Param) and "beta" not in path


def prepare(sizes: Sizes, mode: str) -> Prepared:
    """The mode is folded."""
    network = NETWORKS[sizes.network](sizes, nnx.Rngs(0))
    network.train() if sizes.trains else network.eval()
    graphdef, params, rest = nnx.split(network, _is_trained, ...)
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
    xs, labels = batch(sizes)
    if sizes.network == "linear":
        xs = xs.swapaxes(0, 1)
    xs, labels = jax.device_put((xs, labels))
    optimizer = optax.sgd(0.1, momentum=0.9)
    learns = sizes.trains and sizes.network != "linear"
    opt = optimizer.init(params) if learns else ()

    def objective(params, rest, xs, labels):
        network = nnx.merge(graphdef, params, rest)
        if sizes.network == "linear":
            return network(xs).sum(), rest
        xs = jnp.broadcast_to(xs, (sizes.time_steps, *xs.shape))
        logits = network(xs).mean(0)
        rest = nnx.to_pure_dict(nnx.split(network, _is_trained, ...)[2])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return loss.mean(), rest

    def step(state, given):
        params, rest, opt = state
        if not sizes.trains:
            return state, (objective(params, rest, *given)[0], ())
        (loss, rest), gradient = jax.value_and_grad(objective, has_aux=True)(
            params, rest, *given
        )
        if not learns:
            return state, (loss, gradient)
        updates, opt = optimizer.update(gradient, opt, params)
        return (optax.apply_updates(params, updates), rest, opt), (loss, ())

    state = params, rest, opt
    return xla.prepared(step, state, (xs, labels), params, VERSIONS)
