"""Quantised ReLU: values, gradients, noise, and the neuron that it becomes."""

import copy
import math
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from spikejax import encode
from spikejax.layers import IF
from spikejax.losses import rate_cross_entropy
from spikejax.memory import keep_membranes
from spikejax.models.vgg import VGG
from spikejax.nn.quant import (
    QuantReLU,
    ScaledIF,
    half_up,
    quantise,
)
from spikejax.surrogate import rectangle
from spikejax.train import TrainConfig
from spikejax.train.step import (
    initial_state,
    make_eval_step,
    make_predict,
    make_train_step,
)


def lsq(x, scale, levels):
    """In numpy, as the equation stands."""
    return np.round(np.clip(x / scale, 0, levels)) * scale


def noisy(**options):
    return QuantReLU(**{"noise": 1.0, "rngs": nnx.Rngs(noise=0)} | options)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_without_noise_it_is_lsq_bit_for_bit(bits):
    x = np.float32(jax.random.normal(jax.random.key(0), (64, 33)) * 2)
    scale = np.float32(0.19)
    y = QuantReLU(bits, noise=0.0, scale=scale)(x)
    np.testing.assert_array_equal(y, lsq(x, scale, np.float32(2**bits - 1)))
    quiet = noisy(bits=bits, scale=scale)
    quiet.eval()
    np.testing.assert_array_equal(quiet(x), y)


def test_ties_go_to_even_or_up():
    x = jnp.array([[0.5, 1.5, 2.5]])
    assert QuantReLU(scale=1.0)(x).tolist() == [[0, 2, 2]]
    assert QuantReLU(scale=1.0, rounding=half_up)(x).tolist() == [[1, 2, 3]]


def test_gradient_of_the_input_is_one_inside_and_zero_outside():
    x = jnp.array([-0.1, 0.0, 0.01, 0.5, 1.49, 1.5, 2.0])
    g = jax.grad(lambda x: (quantise(x, 0.5, 0.0, 3.0) * jnp.arange(1, 8)).sum())(x)
    assert g.tolist() == [0, 0, 3, 4, 5, 0, 0]


def test_gradient_of_the_scale():
    """d = q - x/s inside, p above, 0 below; times 1 / sqrt(B p), B the first axis."""
    layer = QuantReLU(2, scale=0.5)
    x = jnp.array([[-1.0, 0.1, 0.4], [0.7, 1.2, 2.0]])
    d = np.array([[0, 0 - 0.2, 1 - 0.8], [1 - 1.4, 2 - 2.4, 3]])
    g = np.arange(6.0).reshape(2, 3)
    gradient = nnx.grad(lambda m: (m(x) * g).sum())(layer).scale[...]
    np.testing.assert_allclose(gradient, (d * g).sum() / math.sqrt(2 * 3), rtol=1e-5)
    by_scale = jax.grad(quantise, 1)
    assert [by_scale(x, 0.5, 0.0, 3.0) for x in (0.0, 1.5)] == [0, 3]  # the ends


def test_second_derivatives_reverse_over_reverse():
    def f(x):
        return (quantise(x, 0.5, 0.0, 3.0) ** 2).sum()

    x = jnp.array([-0.1, 0.2, 0.7, 2.0])
    np.testing.assert_array_equal(
        jax.jacrev(jax.grad(f))(x), 2 * jnp.diag(jnp.array([0.0, 1, 1, 0]))
    )


def test_it_can_be_copied_and_pickled():
    for layer in (noisy(rounding=half_up), QuantReLU(), ScaledIF(2.0, 3)):
        x = jnp.linspace(-1, 3, 12).reshape(4, 1, 3)
        copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        expected = layer(x)
        for other in copies:
            np.testing.assert_array_equal(other(x), expected)


def test_gradients_take_the_noise_for_a_part_of_the_input():
    x, noise = jnp.array([-0.1, 0.4, 1.4]), jnp.array([0.4, 0.3, 0.4])
    u = x / 0.5 + noise  # 0.2, 1.1, 3.2
    assert quantise(x, 0.5, noise, 3.0).tolist() == [0, 0.5, 1.5]
    by_x, by_scale = jax.grad(lambda x, s: quantise(x, s, noise, 3.0).sum(), (0, 1))(
        x, 0.5
    )
    assert by_x.tolist() == [1, 1, 0]
    np.testing.assert_allclose(by_scale, (0 - u[0]) + (1 - u[1]) + 3, rtol=1e-5)
    assert not jax.grad(lambda n: quantise(x, 0.5, n, 3.0).sum())(noise).any()


def test_gradient_of_the_literal_formula_is_that_of_the_clip():
    x = jnp.array([-0.1, 0.4, 2.0])
    by_x, by_scale = jax.grad(
        lambda x, s: quantise(x, s, 0.4, 3.0, None).sum(), argnums=(0, 1)
    )(x, 0.5)
    assert by_x.tolist() == [1, 1, 0] and by_scale == 3


def test_noise_of_amplitude_one_is_unbiased():
    """E[y] = clip(x, 0, s p), within four standard errors of a million draws."""
    x = np.array([-0.3, 0.1, 0.25, 0.7, 1.3, 1.45, 2.0])
    draws = 1_000_000
    xs = jnp.broadcast_to(jnp.float32(x)[:, None], (len(x), draws))
    y = np.asarray(noisy(scale=0.5)(xs))
    error = y.std(1, dtype=np.float64) / math.sqrt(draws)
    mean = y.mean(1, dtype=np.float64)
    assert (abs(mean - np.clip(x, 0, 1.5)) <= 4 * error).all()


def test_spikes_that_should_not_be_need_an_amplitude_above_one():
    x = jnp.full((10_000,), -0.1)
    assert not noisy(scale=1.0)(x).any()
    assert 0.01 < noisy(noise=2.0, scale=1.0)(x).mean() < 0.4


def test_literal_formula_is_not_rounded_in_training_but_in_evaluation():
    layer = noisy(round_noise=False, scale=0.5)
    x = jax.random.uniform(jax.random.key(1), (1000,)) * 1.5
    y = layer(x)
    assert not jnp.allclose(y / 0.5, jnp.round(y / 0.5))
    assert jnp.abs(y - x).max() <= 0.25 + 1e-6 and y.min() >= 0 and y.max() <= 1.5
    layer.eval()
    np.testing.assert_array_equal(layer(x), lsq(x, np.float32(0.5), 3))


def test_noise_differs_by_call_and_layer_and_stops_in_evaluation():
    rngs = nnx.Rngs(noise=0)
    first, second = QuantReLU(noise=1.0, rngs=rngs), QuantReLU(noise=1.0, rngs=rngs)
    x = jnp.full((1000,), 0.7)
    a, b, c = first(x), first(x), second(x)
    assert (a != b).any() and (a != c).any() and (b != c).any()
    first.eval()
    assert (first(x) == first(x)).all()
    first.train()
    assert (first(x) != first(x)).any()


@pytest.mark.parametrize(
    "layer", [QuantReLU(), ScaledIF(), lambda xs: ScaledIF()(xs, trains=True)]
)
def test_the_type_of_the_input_is_kept(layer):
    ys, backward = jax.vjp(layer, jnp.ones((2, 3), jnp.bfloat16))
    assert ys.dtype == backward(ys)[0].dtype == jnp.bfloat16


def test_what_stands_where_nothing_is_given():
    for bits in (1, 2, 4):
        assert QuantReLU(bits).scale[...] * (2**bits - 1) == pytest.approx(1.5)
    assert QuantReLU().levels == 3
    assert QuantReLU(rngs=nnx.Rngs(0)).rngs is None  # without noise nothing is drawn
    assert ScaledIF().unit[...] == 1


@pytest.mark.parametrize(
    "v_threshold, steps", [(1.0, 1), (0.565, 2), (3.0, 3), (1.0, 7), (0.565, 32)]
)
def test_rate_at_constant_input(v_threshold, steps):
    """clip(floor(z T / v_threshold + 1/2), 0, T) v_threshold / T, below, in, above."""
    # Odd eighths of a step: never near a tie.
    z = (np.arange(-2 * steps, 6 * steps) + 0.5) / 4 / steps * v_threshold
    xs = jnp.broadcast_to(jnp.float32(z)[:, None], (len(z), steps))
    rates = ScaledIF(v_threshold)(xs).mean(1)
    counts = np.clip(np.floor(z * steps / v_threshold + 0.5), 0, steps)
    np.testing.assert_allclose(rates, counts * v_threshold / steps, rtol=1e-5)


def test_ties_fire():
    """Where floats are exact: z T / v_threshold + 1/2 is a whole number."""
    z = jnp.array([0.0, 0.125, 0.375, 0.625, 0.875, 1.0])
    rates = ScaledIF(1.0)(jnp.broadcast_to(z[:, None], (6, 4))).mean(1)
    assert rates.tolist() == [0, 0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_one_layer_at_p_steps_is_the_quantised_one(bits):
    levels = 2**bits - 1
    x = jax.random.normal(jax.random.key(0), (50, 20))
    quant = QuantReLU(bits, scale=0.3)
    xs = jnp.broadcast_to(x[:, None], (50, levels, 20))
    rates = ScaledIF(0.3 * levels)(xs).mean(1)
    np.testing.assert_allclose(rates, quant(x), atol=1e-6)


@pytest.mark.parametrize("several, steps", [(2, 8), (4, 4), (3, 6)])
def test_several_thresholds_make_several_steps_in_one(several, steps):
    z = np.float32((np.arange(-40, 240) + 0.5) / 160 * 0.7)
    one, many = ScaledIF(0.7), ScaledIF(0.7, several)
    few = jnp.broadcast_to(z[:, None], (len(z), steps // several))
    all_steps = jnp.broadcast_to(z[:, None], (len(z), steps))
    counts = many(few, trains=True).sum((1, 2))
    assert counts.tolist() == one(all_steps, trains=True).sum((1, 2)).tolist()
    np.testing.assert_allclose(many(few).mean(1), one(all_steps).mean(1), rtol=1e-5)


def test_membranes_start_at_half_the_threshold_when_kept():
    layer = ScaledIF(2.0)
    xs = jax.random.uniform(jax.random.key(0), (3, 6, 4)) * 2
    whole = layer(xs)
    for _ in range(2):  # the second time it starts from rest
        keep_membranes(layer, xs)
        pieces = [layer(xs[:, t : t + 1]) for t in range(6)]
        np.testing.assert_array_equal(jnp.concatenate(pieces, 1), whole)


def test_in_one_step_it_learns_as_the_quantised_relu_does():
    # Clear of the thresholds, where the derivative jumps.
    x = jnp.array([[-0.4, 0.1, 0.29], [0.3, 0.71, 1.6]])
    quant = QuantReLU(2, scale=0.25, rounding=half_up)
    spiking = ScaledIF(0.75, 3)

    def gradients(layer, xs, name):
        def total(xs, value):
            model = nnx.clone(layer)
            getattr(model, name)[...] = value
            return (model(xs) * jnp.arange(1.0, 7).reshape(xs.shape)).sum()

        return jax.grad(total, (0, 1))(xs, getattr(layer, name)[...])

    dx, dscale = gradients(quant, x, "scale")
    du, dunit = gradients(spiking, x[:, None], "unit")
    assert dx.tolist() == du[:, 0].tolist() == [[0, 2, 3], [4, 5, 0]]
    # QuantReLU scales the gradient of its threshold by 1 / sqrt(B p).
    np.testing.assert_allclose(dunit, dscale * math.sqrt(2 * 3), rtol=1e-5)


def test_it_is_the_if_neuron_started_at_half():
    """The plain IF neuron, given half a threshold more in the first step."""
    xs = jax.random.normal(jax.random.key(0), (5, 9, 7))

    def spikes(layer, xs):
        spikes = layer(xs)
        return (spikes * jnp.arange(9.0)[:, None]).sum(), spikes

    plain = IF(surrogate=rectangle(), detach_reset=True)
    one, other = (
        jax.grad(partial(spikes, layer), has_aux=True)(given)
        for layer, given in ((plain, xs.at[:, 0].add(0.5)), (ScaledIF(1.0), xs))
    )
    np.testing.assert_array_equal(other[1], one[1])
    np.testing.assert_allclose(other[0], one[0], rtol=1e-5)
    assert set(nnx.to_pure_dict(nnx.state(ScaledIF(), nnx.Param))) == {"unit"}


STEPS = 4


@pytest.fixture(scope="module")
def run():
    """A tiny network of noisy QuantReLU in the pure step of training."""

    def neuron():
        return QuantReLU(bits=2, noise=1.0, rngs=nnx.Rngs(noise=7))

    rngs = nnx.Rngs(0)
    model = VGG((2, 0), 3, hidden=(5,), neuron=neuron, in_channels=1, rngs=rngs)
    config = TrainConfig(steps=STEPS)

    def to_input(images, rng):
        return encode.direct(images, 1)

    optimizer = optax.sgd(0.0)
    model.eval()
    predict = make_predict(nnx.graphdef(model), to_input)
    model.train()
    step = make_train_step(nnx.graphdef(model), rate_cross_entropy, to_input, optimizer)
    state = initial_state(model, optimizer, config)
    images = jax.random.normal(jax.random.key(0), (6, 4, 4, 1))
    batch = {"image": images, "label": jnp.arange(6) % 3}
    return (
        state,
        jax.jit(step),
        jax.jit(make_eval_step(predict, rate_cross_entropy)),
        batch,
    )


def test_the_training_step_draws_other_noise_each_time(run):
    state, step, _, batch = run
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        assert all(g > 0 for g in jax.tree.leaves(metrics["gradient_norms"]["neurons"]))
    assert len(set(losses)) == STEPS  # the learning rate is 0: only noise differs
    counts = [int(n["rngs"]["count"]) for n in state["rest"]["neurons"].values()]
    assert counts == [STEPS, STEPS]


def test_evaluation_has_no_noise(run):
    state, step, eval_step, batch = run
    batch = batch | {"weight": jnp.ones(6)}
    before = eval_step(state, batch)
    after = eval_step(step(state, batch)[0] | {"rest": state["rest"]}, batch)
    assert float(before["loss"]) == float(after["loss"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bits": 0}, "QuantReLU: expected 1 to 8 bits, got 0"),
        ({"bits": 9}, "QuantReLU: expected 1 to 8 bits, got 9"),
        ({"bits": 2.5}, "QuantReLU: expected 1 to 8 bits, got 2.5"),
        ({"noise": -1.0}, "QuantReLU: expected noise of 0 or more, got -1.0"),
        ({"noise": math.nan}, "QuantReLU: expected noise of 0 or more, got nan"),
        ({"noise": math.inf}, "QuantReLU: expected noise of 0 or more, got inf"),
        (
            {"noise": 1.0},
            r"expected rngs=nnx.Rngs\(noise=seed\) with noise 1.0, got None",
        ),
        ({"scale": 0.0}, "QuantReLU: expected a positive scale, got 0.0"),
        ({"scale": math.nan}, "QuantReLU: expected a positive scale, got nan"),
        ({"scale": math.inf}, "QuantReLU: expected a positive scale, got inf"),
    ],
)
def test_bad_input_of_the_quantised_relu(options, message):
    with pytest.raises(ValueError, match=message):
        QuantReLU(**options)


def test_bad_input_of_the_neuron():
    with pytest.raises(ValueError, match="ScaledIF: expected .* positive thresholds"):
        ScaledIF(-1.0)
    with pytest.raises(
        ValueError, match="num_thresholds: expected a whole number .*got 0"
    ):
        ScaledIF(1.0, 0)
