"""The training step and the evaluation step: optimiser, state, purity, counting."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from spikejax import encode, sharding
from spikejax.checksum import by_path
from spikejax.layers import LIF, MultiThreshold
from spikejax.losses import rate_cross_entropy
from spikejax.models.resnet import ResNet
from spikejax.norm import td_batch_norm
from spikejax.step import (
    CPU_OPTIONS,
    TrainConfig,
    _accepted,
    compiler_options,
    initial_state,
    make_eval_step,
    make_optimizer,
    make_predict,
    make_train_step,
)
from spikejax.train import evaluate

ALL, ONE = sharding.data_mesh(), sharding.data_mesh(jax.devices()[:1])
BATCH, FEATURES, CLASSES, STEPS = 8, 12, 3, 5
CONFIG = TrainConfig(steps=STEPS, warmup=0.2, clip=1e-3, seed=3)
direct = partial(encode.direct, time_steps=2)


def to_sequence(images, rng):
    return direct(images)


class Net(nnx.Module):
    """One leaf of every kind of parameter: kernels, biases, scale, leak, thresholds."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.hidden = nnx.Linear(FEATURES, 16, rngs=rngs)
        self.norm = td_batch_norm(16, rngs=rngs)
        self.neurons = MultiThreshold(2, learn_tau=True, learn_thresholds=True)
        self.head = nnx.Linear(16, CLASSES, rngs=rngs)

    def __call__(self, xs):
        return self.head(self.neurons(self.norm(self.hidden(xs))))


class Echo(nnx.Module):
    """Keeps the sequence that it was given."""

    def __init__(self, shape):
        self.scale = nnx.Param(jnp.ones(()))
        self.seen = nnx.BatchStat(jnp.zeros(shape))

    def __call__(self, xs):
        self.seen = nnx.BatchStat(xs)
        return self.scale[...] * xs


class Run(NamedTuple):
    """What ``fit`` makes of a model and a configuration, on one device."""

    graphdef: Any
    predict: Any
    state: Any
    pure_step: Any
    step: Any


def make_run(model, config, encode=to_sequence):
    """The step compiled as in ``fit``: the state is donated, the outputs replicated."""
    optimizer = make_optimizer(config, config.steps)
    model.eval()
    predict = make_predict(nnx.graphdef(model), encode)
    model.train()
    graphdef = nnx.graphdef(model)
    state = initial_state(model, optimizer, config)
    pure = make_train_step(graphdef, rate_cross_entropy, encode, optimizer, config.ema)
    everywhere = sharding.replicated(ONE)
    step = jax.jit(pure, donate_argnums=0, out_shardings=(everywhere, everywhere))
    return Run(graphdef, jax.jit(predict), state, pure, step)


def examples(count, seed=0):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, count).astype(np.int32)
    image = rng.normal(size=(count, FEATURES)).astype(np.float32)
    image[np.arange(count), label] += 3  # so that there is something to learn
    return {"image": image, "label": label}


def train(run, batches):
    """Yields (state on the host, metrics) after each of the steps."""
    state = sharding.place_state(run.state, ONE)
    for batch in batches:
        state, metrics = run.step(state, sharding.place_batch(batch, ONE))
        yield copied(state), jax.device_get(metrics)


def copied(state):
    """A copy that outlives the donation of the state."""
    return jax.tree.map(jnp.copy, state)


def equal(a, b):
    return all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture(scope="module")
def run():
    return make_run(Net(), CONFIG)


@pytest.fixture(scope="module")
def trained(run):
    """(state, metrics) after each of five steps on five batches."""
    return list(train(run, [examples(BATCH, seed) for seed in range(STEPS)]))


@pytest.fixture(scope="module")
def averaged():
    """The same with AdamW, a moving average of the parameters and one batch."""
    config = TrainConfig(
        steps=STEPS, optimizer="adamw", learning_rate=0.05, warmup=0.0, ema=0.75
    )
    run = make_run(Net(), config)
    return run, list(train(run, [examples(BATCH)] * STEPS))


# TrainConfig


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", 0.0, "more than 0"),
        ("epochs", math.nan, "more than 0"),
        ("steps", 0, "at least 1"),
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


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_touches_kernels_alone(run, optimizer):
    config = TrainConfig(steps=1, optimizer=optimizer, warmup=0, weight_decay=0.5)
    params = jax.tree.map(jnp.ones_like, run.state["params"])
    zeros = jax.tree.map(jnp.zeros_like, params)
    after = by_path(optimise(config, params, [zeros]))
    assert set(after) == {
        "hidden/kernel",
        "hidden/bias",
        "norm/scale",
        "norm/bias",
        "neurons/leak_logit",
        "neurons/log_steps",
        "head/kernel",
        "head/bias",
    }
    for path, leaf in after.items():
        assert jnp.all((leaf < 1) == path.endswith("kernel")), path


def test_weight_decay_of_a_resnet_is_that_of_its_kernels():
    def params():
        model = ResNet((1, 1), (2, 4), 3, neuron=MultiThreshold, rngs=nnx.Rngs(0))
        return initial_state(model, optax.identity(), CONFIG)["params"]

    shapes = jax.eval_shape(params)
    params = jax.tree.map(lambda p: np.ones(p.shape, p.dtype), shapes)
    zeros = jax.tree.map(np.zeros_like, params)
    config = TrainConfig(steps=1, warmup=0, weight_decay=0.5)
    after = by_path(optimise(config, params, [zeros]))
    decayed = {path for path, leaf in after.items() if jnp.any(leaf != 1)}
    assert decayed == {path for path in after if path.endswith("kernel")}
    assert len(decayed) == 7  # stem, two blocks of two, shortcut, head


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


# State


def types_of(tree):
    if isinstance(tree, dict):
        return {type(tree)}.union(*(types_of(branch) for branch in tree.values()))
    return {type(tree)}


def test_initial_state_is_plain_dicts_of_arrays(run):
    array = type(jnp.zeros(()))
    assert set(run.state) == {"step", "params", "rest", "opt", "key"}
    assert types_of(run.state["params"]) == types_of(run.state["rest"]) == {dict, array}
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(run.state))
    assert run.state["step"] == 0 and run.state["step"].dtype == jnp.int32
    assert set(by_path(run.state["rest"])) == {"norm/mean", "norm/var"}


def test_initial_state_holds_the_model(run):
    model = Net()
    xs = direct(jnp.asarray(examples(4)["image"]))
    merged = nnx.merge(run.graphdef, run.state["params"], run.state["rest"])
    np.testing.assert_array_equal(merged(xs), model(xs))


def test_the_random_key_is_the_seed_s(run):
    expected = jax.random.key_data(jax.random.key(3))
    np.testing.assert_array_equal(jax.random.key_data(run.state["key"]), expected)


def test_a_moving_average_starts_from_the_parameters(averaged):
    run, _ = averaged
    assert equal(run.state["ema"], run.state["params"])


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_no_leaf_changes_its_type_in_a_step(optimizer, ema):
    config = TrainConfig(steps=1, optimizer=optimizer, ema=ema, clip=1.0)
    run = make_run(Net(), config)
    after, metrics = jax.eval_shape(run.pure_step, run.state, examples(BATCH))

    before = jax.eval_shape(lambda state: state, run.state)

    def kind(leaf):
        return leaf.shape, leaf.dtype, leaf.weak_type

    assert jax.tree.map(kind, after) == jax.tree.map(kind, before)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((after, metrics)))


# Training step


def test_a_step_is_pure(run, trained):
    batches = [examples(BATCH, seed) for seed in range(2)]
    again = list(train(run, batches))
    for (state, metrics), (other, others) in zip(trained, again, strict=False):
        assert equal(metrics, others)
        assert equal(state["params"], other["params"])
        assert equal(state["rest"], other["rest"]) and equal(state["opt"], other["opt"])


def test_the_model_does_not_change_under_the_step():
    model = Net()
    before = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))
    run = make_run(model, CONFIG)
    jax.eval_shape(run.pure_step, run.state, examples(BATCH))
    after = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_five_steps_compile_once(run, trained):
    assert len(trained) == 5 and run.step._cache_size() == 1


def test_a_step_compiles_once_with_a_moving_average_too(averaged):
    run, trained = averaged
    assert len(trained) == 5 and run.step._cache_size() == 1


def test_a_step_takes_its_state_and_leaves_the_batch(run):
    state = sharding.place_state(run.state, ONE)
    batch = sharding.place_batch(examples(BATCH), ONE)
    run.step(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(batch))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(run.state))


def test_the_step_is_counted_and_the_key_stays(run, trained):
    assert [int(state["step"]) for state, _ in trained] == [1, 2, 3, 4, 5]
    key = jax.random.key_data(run.state["key"])
    assert all(equal(jax.random.key_data(state["key"]), key) for state, _ in trained)


def test_every_parameter_moves(run, trained):
    before, after = by_path(run.state["params"]), by_path(trained[-1][0]["params"])
    assert all(jnp.any(before[path] != leaf) for path, leaf in after.items())


def test_training_lowers_the_loss(averaged):
    losses = [metrics["loss"] for _, metrics in averaged[1]]
    assert losses[-1] < 0.8 * losses[0]


@pytest.fixture(scope="module")
def first_step(run):
    """(loss, logits), gradients of the first step, without spikejax.step."""
    batch = examples(BATCH, 0)

    def objective(params):
        model = nnx.merge(run.graphdef, params, run.state["rest"])
        logits = model(direct(jnp.asarray(batch["image"])))
        return rate_cross_entropy(logits, jnp.asarray(batch["label"])).mean(), logits

    gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))
    return gradient(run.state["params"])


def test_metrics_are_of_the_parameters_before_the_step(trained, first_step):
    (loss, logits), _ = first_step
    right = logits.mean(1).argmax(-1) == examples(BATCH, 0)["label"]
    metrics = trained[0][1]
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(float(right.mean()))


def test_gradient_norms_are_of_each_leaf_and_before_the_clip(trained, first_step):
    gradients = by_path(first_step[1])
    norms = by_path(trained[0][1]["gradient_norms"])
    assert set(norms) == set(gradients)
    for path, gradient in gradients.items():
        expected = math.sqrt(float(np.square(gradient).sum()))
        assert norms[path] == pytest.approx(expected, rel=1e-4, abs=1e-6), path
    assert math.hypot(*norms.values()) > 10 * CONFIG.clip


def test_moving_average_is_the_weighted_sum_of_the_past(averaged):
    run, trained = averaged
    states = [run.state, *(state for state, _ in trained)]
    past = [state["params"] for state in states]
    weights = [0.75**STEPS, *(0.25 * 0.75 ** (STEPS - k) for k in range(1, STEPS + 1))]
    assert math.isclose(sum(weights), 1)
    expected = jax.tree.map(
        lambda *leaves: sum(w * p for w, p in zip(weights, leaves, strict=True)), *past
    )
    for path, leaf in by_path(states[-1]["ema"]).items():
        np.testing.assert_allclose(leaf, by_path(expected)[path], atol=1e-6)


def test_each_step_draws_other_spikes_and_all_from_the_key():
    config = TrainConfig(steps=3, seed=7)
    image = np.full((4, 3), 0.5, np.float32)
    batch = {"image": image, "label": np.zeros(4, np.int32)}

    def poisson(images, rng):
        return encode.poisson(images, 5, rng=rng)

    run = make_run(Echo((4, 5, 3)), config, poisson)
    seen = [state["rest"]["seen"] for state, _ in train(run, [batch] * 3)]
    for step, spikes in enumerate(seen):
        rng = jax.random.fold_in(jax.random.key(7), step)
        np.testing.assert_array_equal(spikes, poisson(jnp.asarray(image), rng))
    assert not equal(seen[0], seen[1]) and not equal(seen[1], seen[2])


def test_a_bfloat16_model_trains_with_float32_parameters():
    model = ResNet(
        (1,), (4,), CLASSES, neuron=MultiThreshold, rngs=nnx.Rngs(0), dtype=jnp.bfloat16
    )
    run = make_run(model, TrainConfig(steps=4, learning_rate=0.05, warmup=0))
    images = np.random.default_rng(0).normal(size=(BATCH, 4, 4, 3)).astype(np.float32)
    batch = examples(BATCH) | {"image": images}
    steps = list(train(run, [batch] * 4))
    state, metrics = steps[-1]
    assert jax.eval_shape(run.predict, state, images).dtype == jnp.bfloat16
    floats = jax.tree.leaves((state["params"], state["rest"], metrics))
    assert all(leaf.dtype == jnp.float32 for leaf in floats)
    assert metrics["loss"] < steps[0][1]["loss"]
    assert run.step._cache_size() == 1


# Batch statistics, evaluation


def test_batch_statistics_move_in_training(run, trained):
    states = [run.state, *(state for state, _ in trained)]
    for before, after in zip(states[:-1], states[1:], strict=True):
        assert not np.array_equal(
            before["rest"]["norm"]["mean"], after["rest"]["norm"]["mean"]
        )
        assert not np.array_equal(
            before["rest"]["norm"]["var"], after["rest"]["norm"]["var"]
        )


def test_batch_statistics_are_a_moving_average_over_batch_and_time(run, trained):
    batch, hidden = examples(BATCH, 0), run.state["params"]["hidden"]
    currents = batch["image"] @ hidden["kernel"] + hidden["bias"]
    norm = trained[0][0]["rest"]["norm"]
    np.testing.assert_allclose(norm["mean"], 0.1 * currents.mean(0), atol=1e-5)
    np.testing.assert_allclose(norm["var"], 0.9 + 0.1 * currents.var(0), rtol=1e-4)


@pytest.fixture(scope="module")
def eval_step(run):
    return jax.jit(make_eval_step(run.predict, rate_cross_entropy))


def test_evaluation_takes_each_example_by_itself(run, trained):
    state, images = trained[-1][0], examples(BATCH)["image"]
    others = np.concatenate([images[:1], 5 * examples(BATCH, 8)["image"][1:]])
    logits, beside_others = run.predict(state, images), run.predict(state, others)
    np.testing.assert_array_equal(logits[0], beside_others[0])
    assert not np.allclose(logits[1:], beside_others[1:])


def test_evaluation_uses_the_statistics_of_training(run, trained):
    state, images = trained[-1][0], examples(BATCH)["image"]
    moved = state | {"rest": run.state["rest"]}
    assert not np.allclose(run.predict(state, images), run.predict(moved, images))


def test_examples_of_weight_0_do_not_count(trained, eval_step):
    state, batch, other = trained[-1][0], examples(BATCH), examples(BATCH, seed=9)
    state = sharding.place_state(state, ALL)

    def sums(images, labels, weights):
        batch = {"image": images, "label": labels, "weight": np.float32(weights)}
        return jax.device_get(eval_step(state, sharding.place_batch(batch, ALL)))

    weights = [1, 1, 0, 1, 0, 1, 1, 0]
    some, every = (sums(*batch.values(), w) for w in (weights, [1] * BATCH))
    keep = np.array(weights) == 1
    images = np.where(keep[:, None], batch["image"], other["image"])
    labels = np.where(keep, batch["label"], (batch["label"] + 1) % CLASSES)
    assert equal(sums(images, labels, weights), some)
    assert not equal(every, some) and not equal(sums(images, labels, [1] * 8), every)


@pytest.fixture(scope="module")
def scores(run, trained):
    """(loss, accuracy) of each of 19 examples, without spikejax.step."""
    state, data = trained[-1][0], examples(19, seed=5)
    logits = run.predict(state, data["image"])
    right = logits.mean(1).argmax(-1) == data["label"]
    return rate_cross_entropy(logits, jnp.asarray(data["label"])), right


@pytest.mark.parametrize("count", [3, 16, 19])
def test_evaluate_counts_each_example_once(trained, eval_step, scores, count):
    data = {name: a[:count] for name, a in examples(19, seed=5).items()}
    batches = [
        {name: a[k : k + BATCH] for name, a in data.items()}
        for k in range(0, count, BATCH)
    ]
    state = sharding.place_state(trained[-1][0], ALL)
    result = evaluate(eval_step, state, batches, BATCH, ALL)
    loss, right = (np.asarray(score[:count]) for score in scores)
    assert result["loss"] == pytest.approx(loss.mean(), rel=1e-5)
    assert result["accuracy"] == pytest.approx(right.mean())
    assert all(type(score) is float for score in result.values())
    assert len(batches[-1]["label"]) == (count - 1) % BATCH + 1  # not filled up


def test_evaluation_takes_the_moving_average(averaged):
    run, trained = averaged
    images, state = examples(BATCH)["image"], trained[-1][0]
    plain = {name: value for name, value in state.items() if name != "ema"}
    logits = run.predict(state, images)
    np.testing.assert_array_equal(
        logits, run.predict(plain | {"params": state["ema"]}, images)
    )
    assert not np.allclose(logits, run.predict(plain, images))


def compiled_step(options):
    """A step of a small residual network, as it is compiled with the options."""
    model = ResNet((2, 2), (4, 8), 3, neuron=LIF, rngs=nnx.Rngs(0))
    config = TrainConfig(steps=10)
    optimizer = make_optimizer(config, 10)
    state = initial_state(model, optimizer, config)
    step = make_train_step(
        nnx.graphdef(model),
        rate_cross_entropy,
        lambda images, rng: encode.direct(images, 4),
        optimizer,
    )
    images = jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
    batch = {"image": images, "label": jnp.arange(16) % 3}
    jitted = jax.jit(step, compiler_options=options)
    return jitted.lower(state, batch).compile(), state, batch


def test_options_of_the_compiler_spare_memory_and_change_nothing():
    options = compiler_options("cpu")
    accepted = [name for name, o in CPU_OPTIONS.items() if _accepted({name: o})]
    assert list(options) == accepted
    if len(accepted) < len(CPU_OPTIONS):
        pytest.skip(f"this XLA has {accepted} of {list(CPU_OPTIONS)} only")
    plain, state, batch = compiled_step({})
    spared, _, _ = compiled_step(options)

    def memory(compiled):
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(spared) < 0.7 * memory(plain)
    one, other = plain(state, batch), spared(state, batch)
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_other_platforms_and_other_compilers_have_no_options():
    assert compiler_options("tpu") == {}
    assert not _accepted({"xla_cpu_nobody_has_this": True})
    assert _accepted({"xla_disable_hlo_passes": "nobody_has_this"})
