"""Conversion: what is swapped, what it answers, calibration, norms folded away."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax import energy
from spikejax.conversion import (
    calibrate,
    convert,
    fold_norms,
    least_error,
    maximum,
    percentile,
)
from spikejax.conversion.surgery import places
from spikejax.layers import neuron_layers
from spikejax.models import resnet, vgg
from spikejax.nn.quant import QuantReLU, ScaledIF

XS = jax.random.normal(jax.random.key(0), (4, 1, 8, 8, 1))


def relu():
    return nnx.relu


def small_vgg(neuron=QuantReLU):
    plan = (4, vgg.POOL, 4)
    options = {"hidden": (4,), "in_channels": 1, "rngs": nnx.Rngs(0)}
    return vgg.VGG(plan, 3, neuron=neuron, **options)


def small_resnet(residual, neuron=QuantReLU):
    options = {"residual": residual, "in_channels": 1, "rngs": nnx.Rngs(0)}
    return resnet.ResNet((1, 1), (4, 4), 3, neuron=neuron, **options)


@partial(jax.jit, static_argnums=0)
def merged(graphdef, state, xs):
    return nnx.merge(graphdef, state)(xs)


def answer(model, xs):
    """What the model answers, compiled as a whole."""
    return merged(*nnx.split(model), xs)


def with_statistics(model):
    """Norms that do something: statistics and parameters away from 0 and 1."""
    rng = np.random.default_rng(0)
    for place in places(model):
        if isinstance(norm := place.value, nnx.BatchNorm):
            shape = norm.mean[...].shape
            norm.mean = nnx.BatchStat(jnp.array(rng.normal(0, 0.1, shape), "f4"))
            norm.var = nnx.BatchStat(jnp.array(rng.uniform(0.5, 2, shape), "f4"))
            norm.bias = nnx.Param(jnp.array(rng.normal(0, 0.1, shape), "f4"))
            norm.scale = nnx.Param(jnp.array(rng.uniform(0.5, 2, shape), "f4"))
    model.eval()
    return model


def weights(model):
    state = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState)))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def test_each_quantised_relu_becomes_a_neuron_and_nothing_else_changes():
    model = with_statistics(small_resnet(resnet.sew))
    model.stage_neuron.scale = nnx.Param(jnp.float32(0.4))
    before = weights(model)
    snn, swaps = convert(model)
    paths = {path for path, layer in neuron_layers(snn).items()}
    assert paths == {swap.path for swap in swaps} and len(swaps) == 6
    by_path = {swap.path: swap for swap in swaps}
    assert by_path["stage_neuron"].levels == 3
    assert by_path["stage_neuron"].v_threshold == pytest.approx(1.2)
    assert float(snn.stage_neuron.unit[...]) == pytest.approx(1.2)
    after = weights(snn)
    kept = {path for path in before if "neuron" not in path}
    assert {path for path in after if "neuron" not in path} == kept
    for path in kept:
        np.testing.assert_array_equal(after[path], before[path])
    assert {p: v.shape for p, v in weights(model).items()} == {
        p: v.shape for p, v in before.items()
    }


def test_a_network_of_one_layer_at_p_steps_is_the_quantised_network():
    model = with_statistics(
        vgg.VGG((4,), 3, neuron=QuantReLU, in_channels=1, rngs=nnx.Rngs(0))
    )
    snn, _ = convert(model)
    logits = answer(snn, jnp.repeat(XS, 3, 1)).mean(1)
    np.testing.assert_allclose(logits, answer(model, XS)[:, 0], atol=1e-5)


@pytest.mark.parametrize("residual", [resnet.plain, resnet.sew, resnet.ms])
def test_a_deep_network_comes_near_to_the_clipped_one_with_time(residual):
    """The limit is the network of clipped ReLUs, without quantisation."""
    relu_net = with_statistics(small_resnet(residual, relu))
    ann = calibrate(relu_net, XS).model
    logits = answer(convert(ann).model, jnp.repeat(XS, 256, 1)).mean(1)
    expected = answer(relu_net, XS)[:, 0]
    assert jnp.abs(logits - expected).max() < 0.15 * jnp.abs(expected).max()


@pytest.mark.parametrize("bits", [1, 4])
def test_the_threshold_is_scale_times_levels(bits):
    swaps = convert(small_vgg(partial(QuantReLU, bits, scale=0.5))).swaps
    assert {swap.v_threshold for swap in swaps} == {0.5 * (2**bits - 1)}
    assert {swap.levels for swap in swaps} == {2**bits - 1}


def test_noise_leaves_no_trace():
    rngs = nnx.Rngs(noise=0)
    model = small_vgg(lambda: QuantReLU(noise=1.0, rngs=rngs))
    model.train()
    snn, _ = convert(model)
    assert not jax.tree.leaves(nnx.state(snn, nnx.RngState))
    assert not model.neurons[0].deterministic  # the model stays as it was
    assert snn.norms[0].use_running_average and not model.norms[0].use_running_average


def test_several_thresholds_answer_in_fewer_steps():
    model = vgg.VGG((4,), 3, neuron=QuantReLU, in_channels=1, rngs=nnx.Rngs(0))
    one = answer(convert(model).model, jnp.repeat(XS, 8, 1)).mean(1)
    four = answer(convert(model, 4).model, jnp.repeat(XS, 2, 1)).mean(1)
    np.testing.assert_allclose(four, one, atol=1e-5)


@pytest.mark.parametrize("num_thresholds", [1, 4])
def test_spikes_cost_accumulates(num_thresholds):
    """The amplitude of a spike does not make a multiplication of it."""
    snn, _ = convert(small_vgg(), num_thresholds)
    report = energy.measure(snn, jnp.repeat(XS, 2, 1))
    by_path = {row.path: row for row in report.connections}
    assert by_path["convs/0"].macs > 0  # the image
    assert by_path["convs/1"].macs == 0 < by_path["convs/1"].acs
    assert report.spikes_per_image > 0


DEPTHS = {
    "resnet18": (resnet.resnet18, 17),
    "resnet34": (resnet.resnet34, 33),
    "resnet50": (resnet.resnet50, 49),
    "resnet101": (resnet.resnet101, 100),
    "resnet152": (resnet.resnet152, 151),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_residual_networks_convert_at_every_depth(name):
    """In full size without weights: structure, and shapes of a run."""
    build, layers = DEPTHS[name]
    model = nnx.eval_shape(lambda: build(7, neuron=QuantReLU, rngs=nnx.Rngs(0)))
    for place in places(model):
        if isinstance(place.value, QuantReLU):
            place.value.scale = nnx.Param(jnp.float32(0.5))
    snn, swaps = convert(model)
    assert len(swaps) == layers
    assert {swap.v_threshold for swap in swaps} == {1.5}
    assert all(isinstance(n, ScaledIF) for n in neuron_layers(snn).values())
    if name in ("resnet34", "resnet101"):
        return  # like their neighbours, and tracing takes seconds
    graphdef, state = nnx.split(snn)
    xs = jax.ShapeDtypeStruct((1, 2, 32, 32, 3), jnp.float32)
    out = jax.eval_shape(lambda s, xs: nnx.merge(graphdef, s)(xs), state, xs)
    assert out.shape == (1, 2, 7)


def test_bottlenecks_and_the_imagenet_stem_run():
    model = resnet.resnet50.func(
        (1, 1),
        (2, 2),
        3,
        neuron=QuantReLU,
        bottleneck=True,
        imagenet_stem=True,
        in_channels=1,
        rngs=nnx.Rngs(0),
    )
    snn, swaps = convert(model)
    assert len(swaps) == 7
    logits = answer(snn, jnp.repeat(XS, 2, 1))
    assert logits.shape == (4, 2, 3) and jnp.isfinite(logits).all()


def test_rules():
    x = jnp.arange(1001.0)
    assert maximum(x, 3) == 1000
    for q, expected in ((50.0, 500), (99.0, 990), (99.9, 999), (100, 1000)):
        assert percentile(q)(x, 3) == pytest.approx(expected)
    assert percentile()(x, 3) == percentile(99.9)(x, 3)
    spread = jnp.concatenate([jnp.linspace(0, 1, 1000), jnp.array([100.0])])
    assert least_error(jnp.linspace(0, 1, 1000), 255) > 0.95
    assert 0.9 < least_error(spread[:-1] * 10, 15) / 10 <= 1
    # 1.01 would do better, for the many at half of it
    assert least_error(jnp.array([0.505] * 99 + [1.0]), 2) == 1
    assert least_error(jnp.full(20_000, 0.01).at[0].set(1), 1) == pytest.approx(0.01)

    def error(top):
        step = top / 3
        return ((step * np.clip(np.round(spread / step), 0, 3) - spread) ** 2).mean()

    best = float(least_error(spread, 3))
    assert error(best) <= min(error(k) for k in range(1, 101)) + 1e-6


@pytest.mark.parametrize("rule", [maximum, percentile(90.0)])
def test_calibration_finds_the_thresholds_of_the_relu_network(rule):
    model = with_statistics(small_vgg(relu))
    ann, swaps = calibrate(model, XS, rule=rule)
    first = nnx.relu(model.norms[0](model.convs[0](XS)))
    second = nnx.relu(model.norms[1](model.convs[1](model.pool(first))))
    third = nnx.relu(model.dense[0](second.mean((2, 3))))
    for swap, ys in zip(swaps, (first, second, third), strict=True):
        assert swap.v_threshold == pytest.approx(float(rule(ys, 3)), rel=1e-5)
    assert [swap.path for swap in swaps] == [f"neurons/{k}" for k in range(3)]
    assert model.neurons[0] is nnx.relu
    assert all(isinstance(neuron, QuantReLU) for neuron in ann.neurons)


def test_layerwise_calibration_sees_quantised_inputs():
    model = with_statistics(small_vgg(relu))
    rule = percentile(80.0)
    ann, swaps = calibrate(model, XS, rule=rule, layerwise=True)
    first = ann.neurons[0](model.norms[0](model.convs[0](XS)))
    second = nnx.relu(model.norms[1](model.convs[1](model.pool(first))))
    assert swaps[1].v_threshold == pytest.approx(float(rule(second, 3)), rel=1e-5)
    assert swaps[1].v_threshold != calibrate(model, XS, rule=rule).swaps[1].v_threshold


def test_calibration_takes_the_neurons_that_it_is_given():
    rngs = nnx.Rngs(noise=0)
    make = partial(QuantReLU, 4, noise=1.0, rngs=rngs)
    ann, swaps = calibrate(small_vgg(relu), XS, neuron=make)
    assert [swap.levels for swap in swaps] == [15] * 3
    assert ann.neurons[0].deterministic and ann.neurons[0].rngs is not None
    _, again = calibrate(ann, 2 * XS)
    assert again[0].v_threshold > 1.5 * swaps[0].v_threshold


@pytest.mark.parametrize("residual", [resnet.plain, resnet.sew, resnet.ms])
def test_folded_norms_give_equal_answers(residual):
    model = with_statistics(small_resnet(residual, relu))
    folded = fold_norms(model, XS)
    assert not any(isinstance(p.value, nnx.BatchNorm) for p in places(folded))
    expected = answer(model, XS)
    np.testing.assert_allclose(answer(folded, XS), expected, rtol=1e-4, atol=1e-5)


def test_norms_fold_into_layers_with_a_bias_and_without_scale():
    rngs = nnx.Rngs(0)
    model = with_statistics(
        nnx.Sequential(
            nnx.Linear(8, 4, rngs=rngs, bias_init=nnx.initializers.ones),
            nnx.BatchNorm(4, rngs=rngs),
            nnx.relu,
            nnx.Linear(4, 4, use_bias=False, rngs=rngs),
            nnx.BatchNorm(4, use_scale=False, use_bias=False, rngs=rngs),
        )
    )
    model.layers[4].scale = model.layers[4].bias = nnx.data(None)
    model.layers[1].var = nnx.BatchStat(jnp.full(4, 1e-4))  # epsilon is a tenth of it
    xs = XS[:, :, 0, :, 0]
    folded = fold_norms(model, xs)
    np.testing.assert_allclose(folded(xs), model(xs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("between", [nnx.relu, nnx.BatchNorm(4, rngs=nnx.Rngs(0))])
def test_a_norm_without_a_layer_before_it_does_not_fold(between):
    rngs = nnx.Rngs(0)
    layers = nnx.Linear(8, 4, rngs=rngs), between, nnx.BatchNorm(4, rngs=rngs)
    message = (
        "fold_norms: expected one convolution or linear layer right before the norm "
        "'layers/2', found none in 1 calls. Leave its norms"
    )
    with pytest.raises(ValueError, match=message):
        fold_norms(nnx.Sequential(*layers), XS[:, :, 0, :, 0])


def test_bad_input():
    with pytest.raises(ValueError, match="convert: expected a model with QuantReLU, f"):
        convert(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="a plain ReLU at 'neurons/0'. Call calibrate"):
        convert(small_vgg(relu))
    with pytest.raises(ValueError, match="got gelu at 'neurons/0', which cannot be c"):
        convert(small_vgg(lambda: nnx.gelu))
    with pytest.raises(ValueError, match="calibrate: expected at least one image, got"):
        calibrate(small_vgg(relu), XS[:0])
    for rule in ("max", percentile):
        with pytest.raises(ValueError, match="or percentile.99.9., got ('max'|<func)"):
            calibrate(small_vgg(relu), XS, rule=rule)
    for neuron, got in ((QuantReLU(2), "one made already"), (relu, "<")):
        with pytest.raises(ValueError, match=rf"as with partial\(.*, 8\), got {got}"):
            calibrate(small_vgg(relu), XS, neuron=neuron)
    made = convert(small_vgg())
    for function in (convert, partial(calibrate, xs=XS), partial(fold_norms, xs=XS)):
        with pytest.raises(ValueError, match="a model, got Converted. .* take .model"):
            function(made)
    with pytest.raises(ValueError, match="num_thresholds: expected at least 1, got 0"):
        convert(small_vgg(), 0)
    for q in (0, 0.999, 100.5):
        with pytest.raises(ValueError, match=f"< q <= 100, in percent.*, got {q}."):
            percentile(q)


@pytest.mark.parametrize("scale", [np.nan, 0.0, -1.0, np.inf])
def test_a_scale_that_is_not_positive(scale):
    model = small_vgg()
    model.neurons[1].scale = nnx.Param(jnp.float32(scale))
    with pytest.raises(ValueError, match="a positive scale at 'neurons/1', got"):
        convert(model)


def test_a_dead_layer():
    model = small_vgg(relu)
    model.convs[1].kernel = nnx.Param(jnp.zeros_like(model.convs[1].kernel[...]))
    with pytest.raises(ValueError, match="positive threshold at 'neurons/1', got 0.0"):
        calibrate(model, XS)


class Twice(nnx.Module):
    """A ReLU in an attribute, and once more: the same one, or one called by name."""

    def __init__(self, again):
        self.dense = nnx.Linear(1, 4, rngs=nnx.Rngs(0))
        self.relu, self.again = nnx.relu, again

    def __call__(self, xs):
        ys = self.relu(self.dense(xs))
        return nnx.relu(-ys) if self.again == "by name" else self.relu(-ys)


@pytest.mark.parametrize("again", ["by name", "shared"])
def test_each_relu_has_an_attribute_of_its_own(again):
    message = (
        "expected every ReLU in an attribute of its own, got 2 that act and 1 such"
    )
    with pytest.raises(ValueError, match=message):
        calibrate(Twice(again), XS)
