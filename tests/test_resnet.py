"""Residual networks: tiny ones run, the known ones have the known sizes."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax import neurons
from spikejax.encode import direct
from spikejax.layers import IF, LIF, PLIF, MultiThreshold, neuron_layers
from spikejax.memory import keep_membranes
from spikejax.models import resnet
from spikejax.nn.norm import td_batch_norm

# One image at both steps: what differs between them is the membranes' doing.
XS = direct(jax.random.normal(jax.random.key(1), (2, 8, 8, 3)), 2)
# Inputs three thresholds wide, so that layers fire with the statistics of the start.
wide_norm = partial(td_batch_norm, v_threshold=3.0)
TINY = {
    "plain": (resnet.plain, partial(LIF, decay_input=False)),
    "sew": (resnet.sew, partial(PLIF, v_reset=0.0, decay_input=False)),
    "ms": (resnet.ms, partial(MultiThreshold, 2, neurons.cascade, learn_tau=True)),
}


def tiny(residual, neuron, **options):
    options = {"norm": wide_norm, "rngs": nnx.Rngs(0)} | options
    model = resnet.ResNet(
        (1, 1), (4, 8), 5, residual=residual, neuron=neuron, **options
    )
    for block in model.blocks:
        # MS starts with scale 0, which keeps gradients from the rest of the block.
        scale = block.norms[-1].scale
        scale[...] = jnp.where(scale[...] == 0, 1.0, scale[...])
    model.eval()
    return model


def pieces(model):
    """(graph, parameters, rest), the latter two as plain dicts of arrays."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def logits_and_gradient(model, run):
    graphdef, params, rest = pieces(model)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient(params):
        logits = run(nnx.merge(graphdef, params, rest))
        return logits.sum(), logits

    gradients, logits = gradient(params)
    return logits, gradients


def whole(model):
    return model(XS)


def stepwise(model):
    keep_membranes(model, XS[:, :1])
    return jnp.concatenate([model(XS[:, t : t + 1]) for t in range(2)], 1)


@pytest.fixture(scope="module", params=TINY)
def network(request):
    return tiny(*TINY[request.param])


@pytest.fixture(scope="module")
def results(network):
    return logits_and_gradient(network, whole)


def test_layer_by_layer_is_step_by_step(network, results):
    graphdef, params, rest = pieces(network)
    steps = jax.jit(lambda p: stepwise(nnx.merge(graphdef, p, rest)))(params)
    assert results[0].shape == (2, 2, 5)
    assert not jnp.allclose(results[0][:, 0], results[0][:, 1], atol=1e-2)
    np.testing.assert_allclose(steps, results[0], atol=1e-6)


def test_all_parameters_get_a_gradient(results):
    for path, gradient in jax.tree.leaves_with_path(results[1]):
        assert jnp.isfinite(gradient).all() and jnp.any(gradient != 0), path


def test_gradients_layer_by_layer_are_those_step_by_step():
    model = tiny(resnet.ms, LIF, imagenet_stem=True)
    once, steps = (logits_and_gradient(model, run) for run in (whole, stepwise))
    np.testing.assert_allclose(once[0], steps[0], atol=1e-6)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        *(result[1] for result in (once, steps)),
    )


GOLDEN = {"plain": 8.065504, "sew": 17.323719, "ms": 21.572695}


def test_logits_stay_what_they_were(request, network, results):
    name = network.residual.__name__
    assert float(jnp.abs(results[0]).sum()) == pytest.approx(GOLDEN[name], rel=1e-4)


def test_bfloat16_computes_on_float32_parameters():
    model = tiny(resnet.sew, LIF, hidden=6, dtype=jnp.bfloat16)
    logits = nnx.jit(lambda model: model(XS))(model)
    assert logits.dtype == jnp.bfloat16 and logits.shape == (2, 2, 5)
    assert jnp.isfinite(logits.astype(jnp.float32)).all()
    for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)):
        assert leaf.dtype == jnp.float32


def make_block(residual, neuron=IF, **options):
    options = {"inputs": 4, "width": 4, "stride": 1, "bottleneck": False} | options
    block = resnet.Block(
        residual=residual,
        neuron=neuron,
        conv=partial(nnx.Conv, rngs=nnx.Rngs(0)),
        norm=partial(wide_norm, rngs=nnx.Rngs(0)),
        **options,
    )
    block.eval()
    return block


def test_ms_block_is_the_identity_at_the_start():
    xs = XS[..., [0, 1, 2, 0]]
    np.testing.assert_array_equal(make_block(resnet.ms)(xs), xs)


def test_sew_block_adds_spikes_to_its_input():
    xs = (XS[..., [0, 1, 2, 0]] > 0).astype(jnp.float32)
    added = np.array(make_block(resnet.sew)(xs) - xs)
    assert set(np.unique(added)) == {0, 1}


def test_plain_block_fires_on_the_sum():
    block = make_block(resnet.plain)
    xs = jnp.full((1, 1, 2, 2, 4), 1.0)
    for norm in block.norms:  # nothing comes from the convolutions
        norm.scale[...] = jnp.zeros(4)
    np.testing.assert_array_equal(block(xs), xs)
    np.testing.assert_array_equal(block(0.9 * xs), 0 * xs)


@pytest.mark.parametrize("residual", [resnet.plain, resnet.sew, resnet.ms])
def test_blocks_with_stride_and_bottleneck_project_the_shortcut(residual):
    block = make_block(residual, stride=2, bottleneck=True)
    assert jax.eval_shape(block, XS[..., [0, 1, 2, 0]]).shape == (2, 2, 4, 4, 16)
    assert [conv.strides for conv in block.convs] == [(1, 1), (2, 2), (1, 1)]
    assert block.shortcut_conv.strides == (2, 2)
    spiking = hasattr(block, "shortcut_neuron")
    assert spiking == (residual is resnet.sew)  # in SEW both summands are spikes


@pytest.mark.parametrize(
    ("residual", "last"), [(resnet.plain, 3 / 2**0.5), (resnet.sew, 3), (resnet.ms, 0)]
)
def test_norms_start_with_the_scale_of_the_residual(residual, last):
    first, second = make_block(residual, inputs=2).norms
    np.testing.assert_allclose(first.scale[...], 3.0)
    np.testing.assert_allclose(second.scale[...], last, rtol=1e-6)


def abstract(make, **options):
    """The model without any weights."""
    options = {"neuron": LIF} | options
    return nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0), **options))


def number_of_parameters(make, **options):
    state = nnx.state(abstract(make, **options), nnx.Param)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))


def test_the_relu_twin_has_the_same_parameters():
    twin, spiking = (
        nnx.to_pure_dict(nnx.state(abstract(resnet.resnet20, num_classes=10, neuron=n)))
        for n in (lambda: nnx.relu, LIF)
    )
    shapes = partial(jax.tree.map, jnp.shape)
    assert shapes(twin) == shapes(spiking)
    assert not neuron_layers(
        abstract(resnet.resnet20, num_classes=10, neuron=lambda: nnx.relu)
    )


@pytest.mark.parametrize(("residual", "layers"), [(resnet.ms, 19), (resnet.sew, 21)])
def test_plif_adds_one_parameter_a_layer(residual, layers):
    options = {"num_classes": 10, "residual": residual}
    lif, plif = (
        number_of_parameters(resnet.resnet20, neuron=n, **options) for n in (LIF, PLIF)
    )
    assert plif - lif == layers


@pytest.mark.parametrize(
    ("name", "size"), [("resnet20", 32), ("resnet18", 64), ("resnet50", 64)]
)
def test_logits_have_time_and_classes(name, size):
    model = abstract(getattr(resnet, name), num_classes=7)
    logits = nnx.eval_shape(
        lambda model: model(jnp.zeros((2, 1, size, size, 3))), model
    )
    assert logits.shape == (2, 1, 7)


def test_recomputed_blocks_give_the_same_loss_gradient_and_statistics():
    xs = jax.random.normal(jax.random.key(0), (4, 2, 6, 6, 3))
    found = []
    for remat in (False, True):
        model = resnet.ResNet(
            (1, 1), (4, 6), 3, neuron=LIF, rngs=nnx.Rngs(0), remat=remat
        )
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

        def loss(params, graphdef=graphdef, rest=rest):
            model = nnx.merge(graphdef, params, rest)
            value = jnp.square(model(xs)).mean()
            return value, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))

        step = jax.value_and_grad(loss, has_aux=True)
        found.append(jax.jit(step)(params))
        text = str(jax.make_jaxpr(step)(params))
        assert ("remat" in text or "checkpoint" in text) == remat
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        assert jnp.allclose(one, other, rtol=1e-4, atol=1e-6)
    (_, rest), _ = found[1]
    assert any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(rest))
