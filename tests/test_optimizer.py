"""Optimisers of Optax in place of the recipe's, and labels that are probabilities."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from test_loop import SGD, Data, Killed, Net, die, fit, saved, sha

from spikejax.losses import rate_cross_entropy
from spikejax.train import TrainConfig, sharding
from spikejax.train.step import initial_state, make_train_step


class Linear(nnx.Module):
    """Without batch statistics, so that parts of a batch add up to the whole."""

    def __init__(self):
        self.head = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

    def __call__(self, xs):
        return self.head(xs)


def steps(optimizer, batches):
    """Return the parameters after each step."""
    model = Linear()
    state = initial_state(model, optimizer, TrainConfig())
    step = make_train_step(
        *(nnx.graphdef(model), rate_cross_entropy, lambda x, _: x[:, None], optimizer)
    )
    for batch in batches:
        state, metrics = jax.jit(step)(state, batch)
        yield state["params"], metrics


def batch_of(seed, count=8):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, count)
    return {"image": rng.normal(size=(count, 4)).astype("f4"), "label": label}


def test_accumulated_gradients_are_those_of_the_whole_batch():
    whole = [batch_of(0), batch_of(1)]
    parts = [
        {name: values[k : k + 2] for name, values in batch.items()}
        for batch in whole
        for k in range(0, 8, 2)
    ]
    once = [params for params, _ in steps(optax.adam(0.1), whole)]
    several = optax.MultiSteps(optax.adam(0.1), 4).gradient_transformation()
    after = [params for params, _ in steps(several, parts)]
    jax.tree.map(close, [after[3], after[7]], once)
    assert equal(after[3], after[6])  # nothing moves in between


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_a_run_that_accumulates_resumes_amid_it_bit_for_bit(tmp_path):
    """Its state is donated, and sharded where the devices are many."""
    count = jax.device_count()
    mesh = sharding.data_mesh(fsdp=4 if count % 4 == 0 else 1)
    several = optax.MultiSteps(optax.adam(0.01), 4).gradient_transformation()
    options = {"optimizer": several, "mesh": mesh}
    whole = fit(tmp_path / "whole", **options)
    with pytest.raises(Killed):
        fit(tmp_path / "killed", data=Data(SGD, 8, die), **options)
    assert max(saved(tmp_path / "killed")) == 6  # two gradients of four
    assert sha(fit(tmp_path / "killed", **options)) == sha(whole)


def test_the_recipe_has_no_part_in_another_optimizer(tmp_path):
    """Nothing moves, with any learning rate of the recipe."""
    config = TrainConfig(steps=2, batch_size=24, learning_rate=5.0)
    fitted = fit(tmp_path, config, optimizer=optax.set_to_zero())
    before = nnx.to_pure_dict(nnx.state(Net(), nnx.Param))
    after = nnx.to_pure_dict(nnx.state(fitted.model, nnx.Param))
    assert equal(before, after)


def test_accuracy_of_probabilities_is_of_the_most_probable_class():
    batch = batch_of(0)
    mixed = 0.7 * np.eye(3)[batch["label"]] + 0.3 / 3
    found = [
        next(steps(optax.sgd(0.1), [batch | {"label": label}]))[1]
        for label in (batch["label"], mixed.astype("f4"))
    ]
    assert found[0]["accuracy"] == found[1]["accuracy"]
    assert found[0]["loss"] != found[1]["loss"]


def test_fit_takes_probabilities(tmp_path):
    """Of one class each, they train as its number does."""

    def one_hot(batch):
        label = np.eye(10, dtype=np.float32)[batch["label"]]
        return batch | {"label": label}

    class Soft(Data):
        def __next__(self):
            return one_hot(next(self.batches))

    config = TrainConfig(steps=2, batch_size=24)
    soft = fit(tmp_path / "soft", config, Soft(config))
    hard = fit(tmp_path / "hard", config)
    pairs = (nnx.to_pure_dict(nnx.state(f.model, nnx.Param)) for f in (soft, hard))
    jax.tree.map(close, *pairs)
