"""spikejax: spikes of each kind, and the same network with ReLU.

A step is the one of ``spikejax.train``, which makes out the accuracy and the norm of
each gradient besides.
"""

from collections.abc import Callable
from functools import partial

import flax
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import spikejax
from benchmarks.sides import xla
from benchmarks.trainer import Recipe
from benchmarks.workloads import CLASSES, STRIDES, Prepared, Sizes, batch
from spikejax import LIF, MultiThreshold, encode, losses, neurons, surrogate
from spikejax._compat import List
from spikejax.models import resnet
from spikejax.models.whitened import WhitenedCNN
from spikejax.nn import cpu
from spikejax.nn.norm import fast_td_batch_norm, td_batch_norm
from spikejax.train import TrainConfig
from spikejax.train.loop import graphs
from spikejax.train.recipe import make_optimizer
from spikejax.train.step import initial_state, make_predict, make_train_step

OPTIONS = {"decay_input": False, "detach_reset": True}
NEURONS = {
    "LIF": partial(LIF, **OPTIONS),
    "multi-threshold": partial(MultiThreshold, 4, **OPTIONS),
    "cascade": partial(MultiThreshold, 4, neurons.cascade, **OPTIONS),
    "ReLU": lambda: nnx.relu,
}
# As the scripts do, before JAX starts its threads; not where ``turns`` measures memory.
cpu.keep_memory()
# What an experiment passes too: the kernels for a CPU, else those of Flax.
IS_CPU = jax.default_backend() == "cpu"
Conv = cpu.Conv if IS_CPU else nnx.Conv
Linear = cpu.Linear if IS_CPU else nnx.Linear
batch_norm = fast_td_batch_norm if IS_CPU else td_batch_norm
max_pool = cpu.max_pool if IS_CPU else nnx.max_pool
# Those of SpikingJelly's own benchmark.
OF_THEIRS = partial(LIF, v_reset=0.0, surrogate=surrogate.sigmoid(4.0))
VERSIONS = {
    "spikejax": spikejax.__version__,
    "jax": jax.__version__,
    "flax": flax.__version__,
}


class Convolutions(nnx.Module):
    """Three convolutions, two of them with stride 2."""

    def __init__(self, sizes, neuron, rngs, norm=batch_norm):
        widths = sizes.channels
        self.convs = List(
            Conv(a, b, (3, 3), (s, s), padding=1, use_bias=False, rngs=rngs)
            for a, b, s in zip((3, *widths), widths, STRIDES, strict=False)
        )
        self.norms = List(norm(width, rngs=rngs) for width in widths)
        self.neurons = List(neuron() for _ in widths)
        self.head = nnx.Linear(widths[-1], CLASSES, rngs=rngs)
        xla.give_weights([*self.convs, self.head])

    def __call__(self, xs):
        for conv, norm, neuron in zip(
            self.convs, self.norms, self.neurons, strict=True
        ):
            xs = neuron(norm(conv(xs)))
        return self.head(xs.mean((2, 3)))


class Pooled(nnx.Module):
    """Two convolutions with maxima of 2x2, and a layer that sees all of the map."""

    def __init__(self, sizes, neuron, rngs):
        first, second, hidden = sizes.channels
        place = sizes.side // 4
        self.convs = List(
            Conv(a, b, (3, 3), rngs=rngs) for a, b in ((3, first), (first, second))
        )
        self.norms = List(batch_norm(n, rngs=rngs) for n in (first, second))
        self.neurons = List(neuron() for _ in range(3))
        self.hidden = nnx.Linear(second * place**2, hidden, rngs=rngs)
        self.head = nnx.Linear(hidden, CLASSES, rngs=rngs)
        xla.give_weights([*self.convs, self.hidden, self.head])
        # The others flatten channels first.
        kernel = self.hidden.kernel[...].reshape(second, place, place, hidden)
        kernel = jnp.moveaxis(kernel, 0, 2).reshape(-1, hidden)
        self.hidden.kernel = nnx.Param(kernel)

    def __call__(self, xs):
        for conv, norm, neuron in zip(
            self.convs, self.norms, self.neurons, strict=False
        ):
            xs = max_pool(neuron(norm(conv(xs))), (2, 2), (2, 2))
        xs = self.neurons[2](self.hidden(xs.reshape(*xs.shape[:2], -1)))
        return self.head(xs)


class OneLinear(nnx.Module):
    """A linear layer and its neurons."""

    def __init__(self, sizes, neuron, rngs):
        (n,) = sizes.channels
        self.linear = Linear(n, n, rngs=rngs)
        self.neuron = neuron()
        xla.give_weights([self.linear])

    def __call__(self, xs):
        return self.neuron(self.linear(xs))


def resnet18(sizes, neuron, rngs, remat=False):
    """SEW-ResNet-18 for small images, which may compute its blocks again."""
    network = resnet.ResNet(
        (2, 2, 2, 2),
        sizes.channels,
        CLASSES,
        neuron=neuron,
        residual=resnet.sew,
        conv=Conv,
        norm=batch_norm,
        remat=remat,
        rngs=rngs,
    )
    layers = [network.stem_conv]
    for block in network.blocks:
        layers += [*block.convs, *([block.shortcut_conv] if block.projects else [])]
    xla.give_weights([*layers, network.head])
    return network


def whitened(sizes, neuron, rngs):
    """The network of CIFAR-10's fast recipe, whose filters are the other side's too."""
    network = WhitenedCNN(
        sizes.channels,
        CLASSES,
        neuron=neuron,
        conv=Conv,
        norm=batch_norm,
        pool=max_pool,
        rngs=rngs,
    )
    xla.give_weights([*network.convs, network.head])
    return network


NETWORKS = {
    "convolutions": Convolutions,
    "linear": OneLinear,
    "pooled": Pooled,
    "resnet18": resnet18,
    "whitened": whitened,
}


def prepare(sizes: Sizes, mode: str) -> Prepared:
    """Modes: LIF, multi-threshold (parallel, N=4), cascade (N=4), ReLU.

    "LIF recomputed" is LIF with the blocks of the resnet computed again.
    """
    kind, *recomputed = mode.split()
    neuron = OF_THEIRS if sizes.network == "pooled" else NEURONS[kind]
    options = {"remat": True} if recomputed else {}
    network = NETWORKS[sizes.network](sizes, neuron, nnx.Rngs(0), **options)
    network.train() if sizes.trains else network.eval()
    inputs, labels = jax.device_put(batch(sizes))

    def encoded(images, rng):
        return images if images.ndim == 5 else encode.direct(images, sizes.time_steps)

    # Adam where SpikingJelly's own benchmark has it.
    optimizer = optax.sgd(0.1, momentum=0.9)
    if sizes.network == "pooled":
        optimizer = optax.adam(1e-3)
    if sizes.network == "linear" or not sizes.trains:
        optimizer = optax.identity()
    state = initial_state(network, optimizer, TrainConfig(steps=1))
    graphdef = nnx.graphdef(network)
    given = {"image": inputs, "label": labels}
    if sizes.network == "linear":
        step = _summed(graphdef)
    elif sizes.trains:
        step = _training(graphdef, encoded, optimizer)
    else:
        step = _evaluation(graphdef, encoded)
    options = cpu.compiler_options(jax.default_backend())
    return xla.prepared(step, state, given, state["params"], VERSIONS, options)


def _summed(graphdef):
    """The gradient of the sum of all spikes to the weights."""

    def step(state, given):
        def spikes(params):
            return nnx.merge(graphdef, params, state["rest"])(given["image"]).sum()

        return state, jax.value_and_grad(spikes)(state["params"])

    return step


def _training(graphdef, encoded, optimizer):
    """The step of spikejax.train."""
    step = make_train_step(graphdef, losses.rate_cross_entropy, encoded, optimizer)

    def train(state, given):
        state, metrics = step(state, given)
        return state, (metrics["loss"], metrics)

    return train


def _evaluation(graphdef, encoded):
    """The loss of what the network answers."""
    predict = make_predict(graphdef, encoded)

    def answer(state, given):
        loss = losses.rate_cross_entropy(predict(state, given["image"]), given["label"])
        return state, (loss.mean(), ())

    return answer


def train(sizes: Sizes, mode: str, recipe: Recipe) -> tuple[Callable, Callable]:
    """(images, labels) -> loss, a step of the recipe, and images -> logits [B, K]."""
    # Several thresholds are half a standard deviation apart, as in the experiments.
    several = mode == "multi-threshold"
    norm = partial(batch_norm, v_threshold=2.0) if several else batch_norm
    network = Convolutions(sizes, NEURONS[mode], nnx.Rngs(0), norm)
    config = TrainConfig(
        steps=recipe.steps,
        batch_size=sizes.batch_size,
        learning_rate=recipe.learning_rate,
        warmup=recipe.warmup,
        weight_decay=recipe.weight_decay,
    )
    optimizer = make_optimizer(config, recipe.steps)
    state = initial_state(network, optimizer, config)
    training, evaluation = graphs(network)

    def encoded(images, rng):
        return encode.direct(images, sizes.time_steps)

    compiled = jax.jit(
        make_train_step(training, losses.rate_cross_entropy, encoded, optimizer),
        donate_argnums=0,
        compiler_options=cpu.compiler_options(jax.default_backend()),
    )
    predict = jax.jit(make_predict(evaluation, encoded))

    def step(images, labels):
        nonlocal state
        given = {"image": images, "label": labels.astype("int32")}
        state, metrics = jax.block_until_ready(compiled(state, given))
        return float(metrics["loss"])

    def answer(images):
        return jax.device_get(predict(state, images).mean(1))

    return step, answer
