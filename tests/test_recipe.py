"""The settings of a training: their ranges, and the optimiser that they make."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from spikejax.layers import MultiThreshold
from spikejax.models.resnet import ResNet
from spikejax.nn.delay import DelayedLinear
from spikejax.train import TrainConfig, make_optimizer
from spikejax.train.checksum import by_path
from spikejax.train.step import initial_state


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", 0.0, "more than 0, at most a million"),
        ("epochs", math.nan, "a finite number"),
        ("epochs", math.inf, "a finite number"),
        ("clip", math.inf, "a finite number"),
        ("steps", 0, "1 to 2147483647"),
        ("steps", 10**20, "1 to 2147483647"),
        ("seed", -1, r"0 to 2\*\*32 - 1"),
        ("seed", 2**32, r"0 to 2\*\*32 - 1"),
        ("batch_size", 0, "at least 1"),
        ("learning_rate", 0.0, "more than 0"),
        ("learning_rate", -0.1, "more than 0"),
        ("learning_rate_batch", 0, "at least 1 image"),
        ("norm_groups", 0, "a divisor of the batch size"),
        ("norm_groups", 3, "a divisor of the batch size"),
        ("warmup", 1.0, "a part of the training, 0 <= warmup < 1"),
        ("warmup", -0.1, "a part of the training, 0 <= warmup < 1"),
        ("weight_decay", -1e-4, "0 or more"),
        ("clip", -1.0, r"0 \(off\) or more"),
        ("ema", 1.0, r"0 \(off\) <= ema < 1"),
        ("ema", -0.5, r"0 \(off\) <= ema < 1"),
        ("evaluate_every", 0.0, "more than 0 epochs"),
        ("save_every", 0, "at least 1 step"),
    ],
)
def test_a_setting_out_of_range_is_an_error(name, value, expected):
    with pytest.raises(ValueError, match=f"^{name}: expected {expected}, got {value}"):
        TrainConfig(**{name: value})


def test_a_misspelled_choice_is_an_error():
    with pytest.raises(
        ValueError, match="^optimizer: expected one of sgd, adamw, lamb, got"
    ):
        TrainConfig(optimizer="adam")  # type: ignore


def test_settings_at_the_edge_of_their_range_are_good():
    TrainConfig(steps=1, batch_size=1, warmup=0, weight_decay=0, clip=0, ema=0)
    TrainConfig(epochs=0.01, evaluate_every=0.01, save_every=1, warmup=0.99, ema=0.99)


# Optimiser


def random_like(params, seed):
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=p.shape).astype(np.float32) for k, p in params.items()}


def optimise(config, params, gradients):
    """The parameters after the steps of the optimiser with the gradients."""
    optimizer = make_optimizer(config, config.steps)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def cosine(config, k):
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * k / config.steps))


TWO = {"kernel": np.ones((3, 2), np.float32), "bias": np.ones(2, np.float32)}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb"])
def test_weight_decay_touches_kernels_alone(optimizer):
    learned = partial(MultiThreshold, 2, learn_tau=True, learn_thresholds=True)

    def params():
        model = ResNet((1, 1), (2, 4), 3, neuron=learned, rngs=nnx.Rngs(0))
        return initial_state(model, optax.identity(), TrainConfig())["params"]

    config = TrainConfig(steps=1, optimizer=optimizer, warmup=0, weight_decay=0.5)
    shapes = jax.eval_shape(params)
    ones = jax.tree.map(lambda p: np.ones(p.shape, p.dtype), shapes)
    zeros = jax.tree.map(np.zeros_like, ones)
    after = by_path(optimise(config, ones, [zeros]))
    decayed = {path for path, leaf in after.items() if jnp.any(leaf != 1)}
    assert decayed == {path for path in after if path.endswith("kernel")}
    assert len(decayed) == 7  # stem, two blocks of two, shortcut, head
    others = {path.rpartition("/")[2] for path in set(after) - decayed}
    assert others == {"scale", "bias", "leak_logit", "log_steps"}


def test_weight_decay_goes_by_name_and_not_by_rank():
    """Layers stacked for a scan have biases of two axes."""
    flat = {"kernel": np.ones(4, np.float32), "bias": np.ones((3, 4), np.float32)}
    config = TrainConfig(steps=1, warmup=0, learning_rate=0.1, weight_decay=0.5)
    after = optimise(config, flat, [jax.tree.map(np.zeros_like, flat)])
    np.testing.assert_array_equal(after["bias"], flat["bias"])
    np.testing.assert_allclose(after["kernel"], 1 - 0.1 * 1.9 * 0.5, rtol=1e-6)


def test_weights_with_delays_decay_and_delays_do_not():
    layer = DelayedLinear(3, 2, 4, width=0.5, rngs=nnx.Rngs(0))
    params = initial_state(layer, optax.identity(), TrainConfig())["params"]
    config = TrainConfig(steps=1, optimizer="adamw", warmup=0, weight_decay=0.5)
    after = optimise(config, params, [jax.tree.map(np.zeros_like, params)])
    assert np.all(after["kernel"] != params["kernel"])
    np.testing.assert_array_equal(after["delays"], params["delays"])


def test_sgd_is_nesterov_momentum_with_l2_decay():
    config = TrainConfig(steps=4, warmup=0, learning_rate=0.2, weight_decay=0.1)
    gradients = [random_like(TWO, seed) for seed in range(4)]
    after = optimise(config, TWO, gradients)
    for name, w in TWO.items():
        momentum = 0.0
        for k, gradient in enumerate(gradients):
            g = gradient[name] + (0.1 * w if name == "kernel" else 0.0)
            momentum = 0.9 * momentum + g
            w = w - cosine(config, k) * (g + 0.9 * momentum)
        np.testing.assert_allclose(after[name], w, rtol=1e-5, atol=1e-6)


def test_adamw_decays_apart_from_the_gradient():
    config = TrainConfig(
        steps=4, optimizer="adamw", warmup=0, learning_rate=0.2, weight_decay=0.1
    )
    gradients = [random_like(TWO, seed) for seed in range(4)]
    after = optimise(config, TWO, gradients)
    for name, w in TWO.items():
        m = v = 0.0
        for k, gradient in enumerate(gradients):
            m = 0.9 * m + 0.1 * gradient[name]
            v = 0.999 * v + 0.001 * gradient[name] ** 2
            adam = m / (1 - 0.9 ** (k + 1))
            adam = adam / (np.sqrt(v / (1 - 0.999 ** (k + 1))) + 1e-8)
            decay = 0.1 * w if name == "kernel" else 0.0
            w = w - cosine(config, k) * (adam + decay)
        np.testing.assert_allclose(after[name], w, rtol=1e-4, atol=1e-5)


def test_lamb_scales_the_step_of_adamw_to_the_norm_of_a_parameter():
    config = TrainConfig(
        steps=1, optimizer="lamb", warmup=0, learning_rate=0.2, weight_decay=0.1
    )
    gradient = random_like(TWO, 0)
    after = optimise(config, TWO, [gradient])
    for name, w in TWO.items():
        g = gradient[name]  # of the first step: m / sqrt(v) is its sign
        step = g / (abs(g) + 1e-6) + (0.1 * w if name == "kernel" else 0.0)
        step = step * np.linalg.norm(w) / np.linalg.norm(step)
        np.testing.assert_allclose(after[name], w - 0.2 * step, rtol=1e-4)


def learning_rate(config, step):
    """The learning rate at a step, from the first update of zero momentum."""
    optimizer = make_optimizer(config, config.steps)
    one = jnp.ones(())
    state = optax.tree_utils.tree_set(optimizer.init(one), count=jnp.int32(step))
    updates, _ = optimizer.update(one, state, one)
    return -float(updates) / 1.9  # g + 0.9 * momentum


@pytest.mark.parametrize(
    ("warmup", "step", "expected"),
    [
        (0.1, 0, 0.1),
        (0.1, 5, 0.55),
        (0.1, 10, 1.0),
        (0.1, 55, 0.5),
        (0.1, 40, 0.75),  # a third of the cosine: (1 + cos(pi / 3)) / 2
        (0.1, 100, 0.0),
        (0.0, 0, 1.0),
        (0.0, 50, 0.5),
    ],
)
def test_learning_rate_warms_up_and_falls_along_a_cosine(warmup, step, expected):
    config = TrainConfig(steps=100, warmup=warmup, learning_rate=0.4)
    assert learning_rate(config, step) == pytest.approx(0.4 * expected, abs=1e-6)


@pytest.mark.parametrize(
    ("batch_size", "factor"), [(256, 1.0), (1024, 4.0), (64, 0.25)]
)
def test_learning_rate_grows_with_the_batch_where_it_is_told_to(batch_size, factor):
    config = TrainConfig(
        *(1.0, 100, batch_size), learning_rate=0.2, learning_rate_batch=256, warmup=0.1
    )
    assert learning_rate(config, 10) == pytest.approx(0.2 * factor, abs=1e-6)
    assert learning_rate(config, 0) == pytest.approx(0.02 * factor, abs=1e-6)


@pytest.mark.parametrize(
    ("clip", "norm", "scale"), [(1.0, 5.0, 0.2), (1.0, 0.5, 1.0), (0.0, 5.0, 1.0)]
)
def test_clip_is_of_the_global_norm_and_before_the_decay(clip, norm, scale):
    config = TrainConfig(steps=1, warmup=0, learning_rate=0.1, clip=clip)
    gradient = {"kernel": TWO["kernel"], "bias": TWO["bias"]}
    length = math.sqrt(8)  # of eight ones
    gradient = {k: g * (norm / length) for k, g in gradient.items()}
    after = optimise(config, TWO, [gradient])
    for name in TWO:
        g = gradient[name] * scale + (5e-4 if name == "kernel" else 0.0)
        np.testing.assert_allclose(after[name], 1 - 0.19 * g, rtol=1e-6)
