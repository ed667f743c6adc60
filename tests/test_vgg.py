"""VGG networks: a tiny one in all its parts, the known ones in their sizes."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax.encode import direct
from spikejax.layers import LIF, PLIF, MultiThreshold, neuron_layers
from spikejax.memory import keep_membranes
from spikejax.models import vgg
from spikejax.nn.norm import td_batch_norm

# One image at both steps: what differs between them is the membranes' doing.
XS = direct(jax.random.normal(jax.random.key(1), (2, 8, 8, 3)), 2)


def tiny(neuron=LIF, **options):
    # Inputs three thresholds wide, so that layers fire with the first statistics.
    options = {
        "norm": partial(td_batch_norm, v_threshold=3.0),
        "hidden": (6,),
    } | options
    model = vgg.VGG((4, vgg.POOL, 8), 5, neuron=neuron, rngs=nnx.Rngs(0), **options)
    for dense in model.dense[:-1]:
        dense.kernel[...] *= 4.0
    model.eval()
    return model


def whole(model):
    return model(XS)


def stepwise(model):
    keep_membranes(model, XS[:, :1])
    return jnp.concatenate([model(XS[:, t : t + 1]) for t in range(2)], 1)


def logits_and_gradient(model, run):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient(params):
        logits = run(nnx.merge(graphdef, params, rest))
        return logits.sum(), logits

    gradients, logits = gradient(params)
    return logits, gradients


@pytest.fixture(scope="module")
def results():
    learn = {"learn_tau": True, "learn_thresholds": True}
    model = tiny(partial(MultiThreshold, 2, decay_input=False, **learn))
    return {run: logits_and_gradient(model, run) for run in (whole, stepwise)}


def test_layer_by_layer_is_step_by_step(results):
    logits = results[whole][0]
    assert logits.shape == (2, 2, 5)
    assert not jnp.allclose(logits[:, 0], logits[:, 1], atol=1e-2)
    np.testing.assert_allclose(results[stepwise][0], logits, atol=1e-6)


def test_gradients_layer_by_layer_are_those_step_by_step(results):
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, results[whole][1], results[stepwise][1])


def test_all_parameters_get_a_gradient(results):
    for path, gradient in jax.tree.leaves_with_path(results[whole][1]):
        assert jnp.isfinite(gradient).all() and jnp.any(gradient != 0), path


def test_logits_stay_what_they_were(results):
    total = float(jnp.abs(results[whole][0]).sum())
    assert total == pytest.approx(8.261919, rel=1e-4)


def test_pool_is_the_function_given():
    seen = []

    def pool(xs, *options):
        seen.append((xs.shape, *options))
        return nnx.avg_pool(xs, *options)

    jax.eval_shape(tiny(pool=pool), XS)
    assert seen == [((2, 2, 8, 8, 4), (2, 2), (2, 2))]


def test_bfloat16_computes_on_float32_parameters():
    model = tiny(dtype=jnp.bfloat16)
    logits = nnx.jit(lambda model: model(XS))(model)
    assert logits.dtype == jnp.bfloat16
    assert jnp.isfinite(logits.astype(jnp.float32)).all()
    for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)):
        assert leaf.dtype == jnp.float32


def abstract(make, neuron=LIF, **options):
    """The model without any weights."""
    return nnx.eval_shape(lambda: make(neuron=neuron, rngs=nnx.Rngs(0), **options))


def number_of_parameters(*args, **options):
    state = nnx.state(abstract(*args, **options), nnx.Param)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))


def test_networks_for_events_have_the_layers_of_their_papers():
    options = {"num_classes": 10, "in_channels": 2}
    widths = (64, 128, 256, 256, 512, 512, 512, 512)
    norms_and_head = 2 * sum(widths) + 512 * 10 + 10
    convs = sum(9 * a * b for a, b in zip((2, *widths), widths, strict=False))
    assert number_of_parameters(vgg.vggsnn, **options) == convs + norms_and_head
    convs = 9 * 128 * (2 + 3 * 128)
    dense = 129 * 512 + 513 * 10
    plif = number_of_parameters(vgg.plif_net, PLIF, **options)
    assert plif == convs + 4 * 2 * 128 + dense + 5  # and five leaks
    for make in (vgg.vggsnn, vgg.plif_net):
        model, xs = abstract(make, **options), jnp.zeros((2, 1, 48, 48, 2))
        assert nnx.eval_shape(lambda m, xs=xs: m(xs), model).shape == (2, 1, 10)


def test_the_relu_twin_has_the_same_parameters():
    options = {"num_classes": 10, "hidden": (32,)}
    lif = number_of_parameters(vgg.vgg11, **options)
    assert number_of_parameters(vgg.vgg11, lambda: nnx.relu, **options) == lif
    assert number_of_parameters(vgg.vgg11, PLIF, **options) == lif + 8 + 1
    assert len(neuron_layers(abstract(vgg.vgg11, **options))) == 8 + 1


def test_logits_have_time_and_classes():
    model = abstract(vgg.vgg11, num_classes=7, in_channels=2)
    xs = jnp.zeros((2, 1, 32, 32, 2))
    assert nnx.eval_shape(lambda model: model(xs), model).shape == (2, 1, 7)
