"""The training step and the evaluation step: state, purity, counting."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax import encode
from spikejax.layers import MultiThreshold
from spikejax.losses import rate_cross_entropy
from spikejax.models.resnet import ResNet
from spikejax.nn.norm import td_batch_norm
from spikejax.train import TrainConfig, make_optimizer, sharding
from spikejax.train.checksum import by_path
from spikejax.train.loop import evaluate, graphs, jit_train_step
from spikejax.train.step import (
    initial_state,
    make_eval_step,
    make_predict,
    make_train_step,
)

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
    """The steps compiled as in ``fit``."""
    optimizer = make_optimizer(config, config.steps)
    state = initial_state(model, optimizer, config)
    graphdef, evaluation = graphs(model)
    predict = make_predict(evaluation, encode)
    parts = graphdef, rate_cross_entropy, encode, optimizer
    pure = make_train_step(*parts, config.ema)
    step = jit_train_step(config, *parts, state, ONE)
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
        state, metrics = run.step(state, sharding.shard_batch(batch, ONE))
        copy = jax.tree.map(jnp.copy, state)  # that outlives its donation
        yield copy, jax.device_get(metrics)


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


# State


def test_initial_state_is_plain_dicts_of_arrays(run):
    assert set(run.state) == {"step", "params", "rest", "opt", "key"}
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(run.state))
    assert run.state["step"] == 0 and run.state["step"].dtype == jnp.int32
    assert set(by_path(run.state["rest"])) == {"norm/mean", "norm/var"}
    expected = nnx.to_pure_dict(nnx.state(Net(), nnx.Param))
    assert jax.tree.structure(run.state["params"]) == jax.tree.structure(expected)
    assert equal(run.state["params"], expected)


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
    again = train(run, [examples(BATCH, seed) for seed in range(2)])
    for (state, metrics), (other, others) in zip(again, trained, strict=False):
        assert equal(metrics, others)
        assert all(equal(state[n], other[n]) for n in ("params", "rest", "opt"))


def test_the_model_does_not_change_under_the_step():
    model = Net()
    before = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))
    run = make_run(model, CONFIG)
    jax.eval_shape(run.pure_step, run.state, examples(BATCH))
    after = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_five_steps_compile_once(run, trained, averaged):
    for made, steps in ((run, trained), averaged):
        assert len(steps) == 5 and made.step._cache_size() == 1


def test_a_step_takes_its_state_and_leaves_the_batch(run):
    state = sharding.place_state(run.state, ONE)
    batch = sharding.shard_batch(examples(BATCH), ONE)
    run.step(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(batch))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(run.state))


def test_the_step_is_counted_and_the_key_stays(run, trained):
    assert [int(state["step"]) for state, _ in trained] == [1, 2, 3, 4, 5]
    key = jax.random.key_data(run.state["key"])
    assert all(equal(jax.random.key_data(state["key"]), key) for state, _ in trained)


def test_every_parameter_moves(run, trained):
    before, after = run.state["params"], trained[-1][0]["params"]
    assert not any(map(equal, jax.tree.leaves(before), jax.tree.leaves(after)))


@pytest.fixture(scope="module")
def first_step(run):
    """(loss, logits), gradients of the first step, without spikejax.train.step."""
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
        rng = jax.random.fold_in(jax.random.key(7), 2**32 - 1 - step)
        np.testing.assert_array_equal(spikes, poisson(jnp.asarray(image), rng))
        assert (rng != nnx.Rngs(7).params()).all()  # which the first step once took
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


class Noisy(nnx.Module):
    """Dropout, and of a stack of two layers too, as for a scan over depth."""

    def __init__(self):
        self.scale = nnx.Param(jnp.ones(()))
        self.one = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def stacked(rngs):
            return nnx.Dropout(0.5, rngs=rngs)

        self.two = stacked(nnx.Rngs(2))

    def __call__(self, xs):
        deep = nnx.vmap(lambda layer, xs: layer(xs), in_axes=(0, None))(self.two, xs)
        return self.scale[...] * (self.one(xs) + 10 * deep[0] + 100 * deep[1])


def test_groups_of_the_batch_draw_random_numbers_of_their_own():
    seen = []

    def loss(logits, labels):
        jax.debug.callback(lambda logits: seen.append(np.asarray(logits)), logits)
        return logits.mean((1, 2))

    model, config = Noisy(), TrainConfig(steps=2, learning_rate=1e-9)
    optimizer = make_optimizer(config, 2)
    state = initial_state(model, optimizer, config)
    step = make_train_step(
        nnx.graphdef(model), loss, to_sequence, optimizer, norm_groups=2
    )
    keys = {path for path in by_path(state["rest"]) if path.endswith("key")}
    assert len(keys) >= 2
    batch = {"image": np.ones((8, 64), np.float32), "label": np.zeros(8, np.int32)}
    after, _ = step(state, batch)
    step(after, batch)
    jax.effects_barrier()
    sums = [np.rint(logits).astype(int) for logits in seen]
    for mask in [x // base % 10 for x in sums for base in (1, 10, 100)]:
        assert set(np.unique(mask)) == {0, 2}  # at every layer and step
        assert (mask[:4] != mask[4:]).mean() > 0.3
    assert (seen[0] != seen[1]).mean() > 0.3
    before, after = by_path(state["rest"]), by_path(after["rest"])
    for path in keys:
        assert jax.random.key_data(before[path]).tolist() == (
            jax.random.key_data(after[path]).tolist()
        )


# Batch statistics, evaluation


def test_batch_statistics_are_a_moving_average_over_batch_and_time(run, trained):
    batch, hidden = examples(BATCH, 0), run.state["params"]["hidden"]
    currents = batch["image"] @ hidden["kernel"] + hidden["bias"]
    norm = trained[0][0]["rest"]["norm"]
    np.testing.assert_allclose(norm["mean"], 0.1 * currents.mean(0), atol=1e-5)
    np.testing.assert_allclose(norm["var"], 0.9 + 0.1 * currents.var(0), rtol=1e-4)


@pytest.fixture(scope="module")
def eval_step(run):
    return jax.jit(make_eval_step(run.predict, rate_cross_entropy))


def test_evaluation_uses_the_statistics_of_training_and_not_of_its_batch(run, trained):
    state, images = trained[-1][0], examples(BATCH)["image"]
    others = np.concatenate([images[:1], 5 * examples(BATCH, 8)["image"][1:]])
    logits, beside_others = run.predict(state, images), run.predict(state, others)
    np.testing.assert_array_equal(logits[0], beside_others[0])
    assert not np.allclose(logits[1:], beside_others[1:])
    moved = state | {"rest": run.state["rest"]}
    assert not np.allclose(logits, run.predict(moved, images))


def test_examples_of_weight_0_do_not_count(trained, eval_step):
    state, batch, other = trained[-1][0], examples(BATCH), examples(BATCH, seed=9)
    state = sharding.place_state(state, ALL)

    def sums(images, labels, weights):
        batch = {"image": images, "label": labels, "weight": np.float32(weights)}
        return jax.device_get(eval_step(state, sharding.shard_batch(batch, ALL)))

    weights = [1, 1, 0, 1, 0, 1, 1, 0]
    some, every = (sums(*batch.values(), w) for w in (weights, [1] * BATCH))
    keep = np.array(weights) == 1
    images = np.where(keep[:, None], batch["image"], other["image"])
    labels = np.where(keep, batch["label"], (batch["label"] + 1) % CLASSES)
    assert equal(sums(images, labels, weights), some)
    assert not equal(every, some) and not equal(sums(images, labels, [1] * 8), every)


def test_padding_is_selected_and_not_multiplied():
    """Black images, divided by their sum, are NaN: as padding they do not count."""

    def predict(state, images):
        return (images / images.sum(1, keepdims=True))[:, None]

    step, rows = make_eval_step(predict, rate_cross_entropy), np.eye(3, dtype="f4")[:2]
    batch = {"image": rows, "label": np.array([0, 0], np.int32)}
    result = evaluate(step, {}, [batch], BATCH, ALL)
    # Logits 1, 0, 0 of class 0, then 0, 1, 0 of class 0: the losses differ by 1.
    loss = math.log(math.e + 2) - 0.5
    assert result == {"loss": pytest.approx(loss), "accuracy": 0.5}


def test_a_batch_that_is_too_large_for_an_evaluation():
    batch = {"image": np.zeros((9, 3)), "label": np.zeros(9)}
    line = "evaluate: expected batches of up to 8 images, as in training, got one of 9."
    with pytest.raises(ValueError, match=line):
        evaluate(lambda *_: {}, {}, [batch], 8, ALL)


@pytest.fixture(scope="module")
def scores(run, trained):
    """(loss, accuracy) of each of 19 examples, without spikejax.train.step."""
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
    averages = run.predict(plain | {"params": state["ema"]}, images)
    np.testing.assert_array_equal(logits, averages)
    assert not np.allclose(logits, run.predict(plain, images))
