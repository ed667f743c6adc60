"""Every network by name: its size, copies of it, and derivatives of a plain one."""

import copy
import math
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax import LIF, MultiThreshold
from spikejax.models import MODELS, general, resnet
from spikejax.nn import cpu

# Parameters with as many classes; torchvision's and the papers' where they have them.
KNOWN = {
    "vgg11": (10, 9_228_362),
    "vgg16": (10, 14_724_042),
    "whitened": (10, 1_972_528),
    "resnet18": (10, 11_173_962),
    "resnet19": (10, 12_630_858),
    "resnet20": (10, 272_474),
    "resnet18-imagenet": (1000, 11_689_512),
    "resnet34": (1000, 21_797_672),
    "resnet50": (1000, 25_557_032),
    "resnet101": (1000, 44_549_160),
    "resnet152": (1000, 60_192_808),
    "efficientnet-lite0": (1000, 4_652_008),  # of efficientnet-lite-pytorch
    "efficientnet-lite1": (1000, 5_416_680),
    "efficientnet-lite2": (1000, 6_092_072),
    "efficientnet-lite3": (1000, 8_197_096),
    "efficientnet-lite4": (1000, 13_006_568),
    "general-cnn": (10, 13_885_402),
    "general-lstm": (10, 14_925_466),
}


@pytest.mark.parametrize("name", MODELS)
def test_each_model_has_its_size_and_can_be_copied_and_pickled(name):
    classes, number = KNOWN.get(name, (10, None))
    neuron = partial(MultiThreshold, 2)
    make = partial(MODELS[name], classes, neuron=neuron, conv=cpu.Conv)
    model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert number in (None, sum(math.prod(leaf.shape) for leaf in leaves))
    # Slow, and the code of resnet50 or efficientnet-lite0.
    if name in ("resnet101", "resnet152") or name[-1] in "1234" and "lite" in name:
        return
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert nnx.graphdef(other) == nnx.graphdef(model)


def test_copies_have_the_same_numbers_and_random_keys():
    model = general.lstm(3, depths=(1,), width=1 / 12, neuron=LIF, rngs=nnx.Rngs(0))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for a, b in zip(
            *(jax.tree.leaves(nnx.state(m)) for m in (model, other)), strict=True
        ):
            a, b = (jax.random.key_data(x) if is_key(x) else x for x in (a, b))
            np.testing.assert_array_equal(a, b)


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def test_a_relu_network_has_derivatives_of_forward_mode_and_second_order():
    model = resnet.ResNet((1,), (2,), 3, neuron=lambda: nnx.relu, rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
    xs = jax.random.normal(jax.random.key(0), (4, 1, 6, 6, 3))

    def loss(params):
        logits = nnx.merge(graphdef, params, rest)(xs)  # in training: norms of batches
        return jnp.square(logits - 1).mean()

    def of_bias(bias):
        stem = params["stem_norm"] | {"bias": bias}
        return loss(params | {"stem_norm": stem})

    bias = params["stem_norm"]["bias"]
    hessian = jax.jit(jax.hessian(of_bias))(bias)  # forward over reverse
    reverse = jax.jit(jax.jacrev(jax.grad(of_bias)))(bias)
    np.testing.assert_allclose(hessian, reverse, rtol=1e-3, atol=1e-5)
    assert jnp.any(hessian != 0)
    slope, gradient = jax.jit(
        lambda p: (jax.jvp(loss, (p,), (p,))[1], jax.grad(loss)(p))
    )(params)
    expected = sum(map(jnp.vdot, *map(jax.tree.leaves, (gradient, params))))
    np.testing.assert_allclose(slope, expected, rtol=1e-3, atol=1e-6)
