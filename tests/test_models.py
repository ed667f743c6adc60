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

from spikejax import IF, LIF, Function, MultiThreshold
from spikejax.models import MODELS, efficientnet, general, resnet, spikformer, vgg
from spikejax.models.transformer import Transformer
from spikejax.models.whitened import WhitenedCNN
from spikejax.nn import cpu
from spikejax.nn.norm import td_batch_norm

# Parameters with as many classes; torchvision's and the papers' where they have them.
KNOWN = {
    "vgg11": (10, 9_228_362),
    "vgg16": (10, 14_724_042),
    "whitened": (10, 1_972_528),
    "whitened-small": (10, 497_840),
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
    # Those of the authors' code, less 64 weights per block of SDT that it never uses.
    "spikformer-4-256": (10, 4_155_178),
    "spikformer-2-384": (10, 5_765_050),
    "spikformer-4-384": (10, 9_324_730),
    "spikformer-8-384": (1000, 16_816_024),
    "spikformer-8-512": (1000, 29_689_384),
    "spikformer-8-768": (1000, 66_338_632),
    "sdt-2-256": (10, 2_567_082 - 2 * 64),
    "sdt-2-512": (10, 10_233_546 - 2 * 64),
    "sdt-8-384": (1000, 16_816_536 - 8 * 64),
    "sdt-6-512": (1000, 23_373_736 - 6 * 64),
    "sdt-8-512": (1000, 29_689_896 - 8 * 64),
    "sdt-10-512": (1000, 36_006_056 - 10 * 64),
    "sdt-8-768": (1000, 66_339_144 - 8 * 64),
    "qkformer-4-384": (10, 6_706_234),
    "qkformer-10-384": (1000, 16_473_688),
    "qkformer-10-512": (1000, 29_079_336),
    "qkformer-10-768": (1000, 64_962_760),
    "e-spikeformer-3m": (1000, 2_702_048),
    "e-spikeformer-5m": (1000, 5_105_608),
    "e-spikeformer-10m": (1000, 10_023_112),
    "e-spikeformer-19m": (1000, 18_987_504),
    "transformer-small": (10, 1_560_250),
}
# Slow, and the code of smaller ones.
LARGE = {"resnet101", "resnet152"} | {
    name for name in KNOWN if "former" in name or "lite" in name or "sdt" in name
}


class OneKey:
    """Random keys for layers that are only counted: Flax's take most of the time."""

    def params(self):
        return jax.random.key(0)


@pytest.mark.parametrize("name", MODELS)
def test_each_model_has_its_size_and_can_be_copied_and_pickled(name):
    classes, number = KNOWN.get(name, (10, None))
    neuron = partial(MultiThreshold, 2)
    make = partial(MODELS[name], classes, neuron=neuron, conv=cpu.Conv)
    splits = name.startswith("general")  # its layers keep streams of keys
    model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0) if splits else OneKey()))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert number in (None, sum(math.prod(leaf.shape) for leaf in leaves))
    if name in LARGE - {"transformer-small", "sdt-2-256", "efficientnet-lite0"}:
        return
    for other in copies(model):
        assert nnx.graphdef(other) == nnx.graphdef(model)


def copies(model):
    yield copy.deepcopy(model)
    if not hasattr(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), "kernel_init"):
        # Layers of Flax 0.11 keep their initialiser, which cannot be pickled.
        yield pickle.loads(pickle.dumps(model))


def test_copies_have_the_same_numbers_and_random_keys():
    model = general.lstm(3, depths=(1,), width=1 / 12, neuron=LIF, rngs=nnx.Rngs(0))
    for other in copies(model):
        for a, b in zip(
            *(jax.tree.leaves(nnx.state(m)) for m in (model, other)), strict=True
        ):
            a, b = (jax.random.key_data(x) if is_key(x) else x for x in (a, b))
            np.testing.assert_array_equal(a, b)


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


SIZES = {"norm": partial(td_batch_norm, v_threshold=3.0)}
TINY = {
    "vgg": partial(vgg.VGG, (4, vgg.POOL, 6), 3, hidden=(8,), **SIZES),
    "efficientnet": partial(efficientnet.EfficientNet, 0.01, 0.1, 3, **SIZES),
    "whitened": partial(WhitenedCNN, (4,), 3, **SIZES),
    **{
        residual.__name__: partial(
            resnet.ResNet, (1, 1), (4, 6), 3, residual=residual, **SIZES
        )
        for residual in (resnet.plain, resnet.sew, resnet.ms)
    },
    **{
        f"general-{make.__name__}": partial(make, 3, depths=(2,), width=1 / 12)
        for make in (general.cnn, general.lstm, general.plain)
    },
    **{
        # The last neurons of so small networks fire always, or never.
        name: partial(Transformer, design._replace(fires_last=False), 3, **SIZES)
        for name, design in {
            "spikformer": spikformer.spikformer(8, 1, heads=2),
            "sdt": spikformer.sdt(8, 1, halve=(3,)),
            "qkformer": spikformer.qkformer(8, (1, 1, 1), heads=1),
            "e-spikeformer": spikformer.e_spikeformer(
                (8, 8, 8, 8), depths=(1, 1), heads=2
            ),
            "small": spikformer.small(8, 1, heads=2),
        }.items()
    },
}


@pytest.mark.parametrize("name", TINY)
def test_logits_depend_on_their_own_image_and_its_past_alone(name):
    # Without a leak, membranes that should not meet would differ for long; but so tiny,
    # these fall silent.
    leaky = name in ("efficientnet", "whitened", "e-spikeformer")
    lif = partial(LIF, 2.0, 0.5, decay_input=False)
    neuron = lif if leaky else partial(IF, 0.5)
    model = TINY[name](neuron=neuron, rngs=nnx.Rngs(0))
    model.eval()
    graphdef, state = nnx.split(model)
    rng = np.random.default_rng(0)

    def alive(path, leaf):  # some heads start at zero, and small networks fire little
        is_kernel = jax.tree_util.keystr(path).endswith("'kernel']")
        return leaf + np.float32(rng.normal(0, 0.3, leaf.shape)) if is_kernel else leaf

    state = jax.tree_util.tree_map_with_path(alive, nnx.to_pure_dict(state))
    run = jax.jit(lambda xs: nnx.merge(graphdef, state)(xs))
    side = 32 if name == "e-spikeformer" else 8  # which halves it four times
    xs = jax.random.normal(jax.random.key(0), (2, 3, side, side, 3))
    logits = run(xs)
    changed = False
    for image, mate in ((0, 1), (1, 0)):  # another image, from its second step on
        other = run(xs.at[image, 1:].multiply(-2))
        np.testing.assert_array_equal(other[mate], logits[mate])
        np.testing.assert_array_equal(other[image, 0], logits[image, 0])
        changed |= bool(jnp.any(other[image, 1:] != logits[image, 1:]))
    assert changed


def test_every_model_has_a_tiny_one_of_its_code():
    code = {getattr(model, "func", model) for model in MODELS.values()}
    assert code == {model.func for model in TINY.values()}


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


def test_params_of_a_function_have_paths_of_their_own():
    params = {"params": {"w": jnp.eye(2)}, "w": jnp.ones(2)}
    with pytest.raises(ValueError, match="paths differ without 'params', got w, w"):
        Function(lambda p, x: x @ p["params"]["w"] + p["w"], params)
