"""The loop around the step: what it reports, how it stops, how it goes on."""

import json
import os
import shutil
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax import losses, neurons, train
from spikejax.checkpoint import CheckpointWarning
from spikejax.checksum import parameters_sha256
from spikejax.data import images
from spikejax.layers import MultiThreshold
from spikejax.progress import NonFinite
from spikejax.recipe import TrainConfig

STEPS, EPOCH = (
    12,
    5,
)  # evaluations, and so checkpoints, at 5, 10 and 12; saves at 3, ...
SGD = TrainConfig(steps=STEPS, batch_size=24, save_every=3)
ADAMW_EMA = TrainConfig(
    steps=STEPS,
    batch_size=24,
    save_every=3,
    optimizer="adamw",
    learning_rate=0.01,
    clip=1.0,
    ema=0.8,
)
RECIPES = {"sgd": SGD, "adamw-ema": ADAMW_EMA}
DIGITS = images.load("digits")


class Net(nnx.Module):
    """Two layers, batch statistics, and a learned leak, which is a scalar."""

    def __init__(self, seed=0, width=16):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(64, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.neuron = MultiThreshold(4, neurons.parallel, learn_tau=True)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, xs):
        xs = xs.reshape(*xs.shape[:2], -1)
        return self.head(self.neuron(self.norm(self.first(xs))))


def noisy(raw, rng):
    """Two steps of the image, with noise that hangs on the random key."""
    xs = jnp.stack([raw, raw], 1) / 255
    return xs + 0.1 * jax.random.normal(rng, xs.shape)


def plain(raw, rng):
    return raw[:, None] / 255


class Data:
    """Training batches; at one step something is done to, or before, the batch."""

    def __init__(self, config=SGD, at=0, act=None):
        self.batches = images.train_batches(
            DIGITS.train, config.batch_size, seed=config.seed
        )
        self.get_state, self.at, self.act = self.batches.get_state, at, act
        self.set_state = self.batches.set_state

    def __next__(self):
        if self.act is None or self.get_state()["next_index"] + 1 != self.at:
            return next(self.batches)
        return self.act(next(self.batches))


class Killed(Exception):
    pass


def die(batch):
    raise Killed


def terminate(batch):
    os.kill(os.getpid(), signal.SIGTERM)
    return batch


def mark(batch):
    return batch | {"label": np.zeros_like(batch["label"])}


def fit(
    workdir,
    config=SGD,
    data=None,
    loss=losses.rate_cross_entropy,
    encode=noisy,
    model=None,
    **options,
):
    return train.fit(
        config,
        model or Net(config.seed),
        loss,
        data or Data(config),
        images.eval_batches(DIGITS.test, config.batch_size),
        encode=encode,
        steps_per_epoch=EPOCH,
        workdir=workdir,
        **options,
    )


def lines(workdir):
    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def train_steps(workdir):
    return [entry["step"] for entry in lines(workdir) if "loss" in entry]


def eval_steps(workdir):
    return [entry["step"] for entry in lines(workdir) if "eval_loss" in entry]


def saved(workdir):
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdecimal())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nothing disturbed: {recipe: (folder, Fitted)}; work on copies."""
    made = {}
    for name, config in RECIPES.items():
        folder = tmp_path_factory.mktemp(name)
        made[name] = folder, fit(folder, config)
    return made


def sha(fitted):
    return fitted.metrics["parameters_sha256"]


# What a run gives


def test_it_learns(tmp_path):
    config = TrainConfig(steps=90, batch_size=64, evaluate_every=100)
    assert fit(tmp_path, config, encode=plain).metrics["accuracy"] > 0.7


@pytest.mark.parametrize("recipe", RECIPES)
def test_metrics_are_complete(whole, recipe):
    _, fitted = whole[recipe]
    assert fitted.finished
    assert set(fitted.metrics) == {
        "accuracy",
        "loss",
        "steps",
        "seconds",
        "images_per_second",
        "parameters",
        "parameters_sha256",
    }
    assert 0 <= fitted.metrics["accuracy"] <= 1 and fitted.metrics["loss"] > 0
    assert fitted.metrics["steps"] == STEPS and fitted.metrics["seconds"] > 0
    assert fitted.metrics["images_per_second"] > 0
    # 64x16 + 16, 2x16 of the norm, one leak, 16x10 + 10
    assert fitted.metrics["parameters"] == 1040 + 32 + 1 + 170
    json.dumps(fitted.metrics)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_model_is_the_one_that_was_measured(whole, recipe):
    _, fitted = whole[recipe]
    params = nnx.to_pure_dict(nnx.state(fitted.model, nnx.Param))
    assert sha(fitted) == parameters_sha256(params)
    key = jax.random.key(RECIPES[recipe].seed)
    predict = jax.jit(lambda raw: fitted.model(noisy(raw, key)).mean(1))
    right = 0
    for batch in images.eval_batches(DIGITS.test, 24):
        size = len(batch["label"])
        raw = np.zeros((24, 8, 8, 1), np.uint8)  # the noise is that of a full batch
        raw[:size] = batch["image"]
        classes = np.argmax(predict(raw)[:size], -1)
        right += int((classes == batch["label"]).sum())
    assert fitted.metrics["accuracy"] == pytest.approx(right / 297)


def test_the_model_is_in_evaluation_mode(whole):
    _, fitted = whole["sgd"]
    assert fitted.model.norm.use_running_average
    assert float(jnp.abs(fitted.model.norm.mean[...]).max()) > 0


def test_the_same_seed_gives_the_same_bits(whole, tmp_path):
    assert sha(fit(tmp_path)) == sha(whole["sgd"][1])


def test_another_seed_gives_others(whole, tmp_path):
    config = TrainConfig(steps=STEPS, batch_size=24, save_every=3, seed=1)
    assert sha(fit(tmp_path, config)) != sha(whole["sgd"][1])


def test_a_seed_is_more_than_the_weights(whole, tmp_path):
    config = TrainConfig(steps=STEPS, batch_size=24, save_every=3, seed=1)
    same_data, same_model = Data(SGD), Net(SGD.seed)
    noise = fit(tmp_path, config, same_data, model=same_model)
    assert sha(noise) != sha(whole["sgd"][1])


def test_the_averaged_parameters_are_other_than_the_last(whole, tmp_path):
    config = TrainConfig(
        steps=STEPS, batch_size=24, optimizer="adamw", learning_rate=0.01, clip=1.0
    )
    assert sha(fit(tmp_path, config)) != sha(whole["adamw-ema"][1])


def test_epochs_are_turned_into_steps(tmp_path):
    config = TrainConfig(epochs=0.6, batch_size=24)
    assert fit(tmp_path, config).metrics["steps"] == 3


def test_a_step_is_traced_once(whole, tmp_path):
    traced = []

    def loss(logits, labels):
        traced.append(logits.shape)
        return losses.rate_cross_entropy(logits, labels)

    shutil.copytree(whole["sgd"][0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints/12")
    fit(tmp_path, loss=loss)  # from a checkpoint, evaluations at 12
    assert traced == [(24, 2, 10)] * 2  # one training step, one evaluation step


# metrics.jsonl and the checkpoints


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_step_has_its_line(whole, recipe):
    folder, fitted = whole[recipe]
    assert train_steps(folder) == list(range(1, STEPS + 1))
    assert eval_steps(folder) == [5, 10, 12]
    for entry in lines(folder):
        if "loss" in entry:
            assert set(entry) == {"step", "loss", "accuracy", "gradient_norm", "epoch"}
            assert entry["epoch"] == entry["step"] / EPOCH
            assert entry["gradient_norm"] > 0
    last = lines(folder)[-1]
    assert last["eval_accuracy"] == fitted.metrics["accuracy"]
    assert last["eval_loss"] == fitted.metrics["loss"]
    assert 0 < last["seconds"] <= fitted.metrics["seconds"]


def test_the_best_and_the_last_two_checkpoints_stay(whole):
    folder, _ = whole["sgd"]
    scores = {e["step"]: e["eval_accuracy"] for e in lines(folder) if "eval_loss" in e}
    best = max(scores, key=lambda step: (scores[step], step))
    assert saved(folder) == sorted({best, 10, 12})


# Stopped, and going on


@pytest.mark.parametrize(
    ("recipe", "at", "last"),
    [
        ("sgd", 1, 0),
        ("sgd", 8, 6),
        ("adamw-ema", 2, 0),
        ("adamw-ema", 5, 3),
        ("adamw-ema", 12, 10),
    ],
)
def test_a_run_broken_off_goes_on_bit_for_bit(whole, tmp_path, recipe, at, last):
    folder, undisturbed = whole[recipe]
    config = RECIPES[recipe]
    with pytest.raises(Killed):
        fit(tmp_path, config, Data(config, at, die))
    assert max(saved(tmp_path), default=0) == last
    fitted = fit(tmp_path, config)
    assert fitted.finished and sha(fitted) == sha(undisturbed)
    assert fitted.metrics["accuracy"] == undisturbed.metrics["accuracy"]
    assert train_steps(tmp_path) == list(range(1, STEPS + 1))
    assert eval_steps(tmp_path) == [5, 10, 12]
    there, here = lines(folder), lines(tmp_path)
    for entry in there + here:
        for name in ("seconds", "eval_images_per_second"):
            entry.pop(name, None)
    assert here == there


def test_a_run_broken_off_again_and_again_goes_on(whole, tmp_path):
    for at in (4, 5, 11):
        with pytest.raises(Killed):
            fit(tmp_path, ADAMW_EMA, Data(ADAMW_EMA, at, die))
    assert sha(fit(tmp_path, ADAMW_EMA)) == sha(whole["adamw-ema"][1])
    assert train_steps(tmp_path) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("at", [5, 8])
def test_sigterm_saves_the_step_and_leaves(whole, tmp_path, at):
    before = signal.getsignal(signal.SIGTERM)
    stopped = fit(tmp_path, data=Data(SGD, at, terminate))
    assert signal.getsignal(signal.SIGTERM) is before
    assert not stopped.finished and stopped.metrics["steps"] == at
    assert max(saved(tmp_path)) == at and train_steps(tmp_path)[-1] == at
    fitted = fit(tmp_path)
    assert fitted.finished and sha(fitted) == sha(whole["sgd"][1])
    assert train_steps(tmp_path) == list(range(1, STEPS + 1))


def test_sigterm_in_the_last_step_finishes(whole, tmp_path):
    fitted = fit(tmp_path, data=Data(SGD, STEPS, terminate))
    assert fitted.finished and sha(fitted) == sha(whole["sgd"][1])
    assert fitted.metrics["accuracy"] == whole["sgd"][1].metrics["accuracy"]


def test_sigterm_again_while_saving_loses_nothing(tmp_path, monkeypatch):
    class Checkpoints(train.Checkpoints):
        def close(self):
            os.kill(os.getpid(), signal.SIGTERM)
            super().close()

    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("outside"))
    monkeypatch.setattr(train, "Checkpoints", Checkpoints)
    try:
        stopped = fit(tmp_path, data=Data(SGD, 4, terminate))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not heard and not stopped.finished and saved(tmp_path) == [3, 4]


def test_it_runs_in_another_thread(whole, tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(fit(tmp_path)))
    thread.start()
    thread.join()
    assert sha(found[0]) == sha(whole["sgd"][1])


def test_a_finished_run_trains_no_further(whole, tmp_path):
    folder, undisturbed = whole["adamw-ema"]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    again = fit(tmp_path, ADAMW_EMA, Data(ADAMW_EMA, STEPS + 1, die))
    assert again.finished and sha(again) == sha(undisturbed)
    for name in ("accuracy", "loss", "steps", "images_per_second"):
        assert again.metrics[name] == undisturbed.metrics[name]
    assert again.metrics["seconds"] >= lines(folder)[-1]["seconds"]
    assert lines(tmp_path) == lines(folder)


def test_sigterm_before_a_finished_run_does_not_cost_its_metrics(
    whole, tmp_path, monkeypatch
):
    class Progress(train.Progress):
        def __enter__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().__enter__()

    shutil.copytree(whole["sgd"][0], tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(train, "Progress", Progress)
    again = fit(tmp_path)
    assert again.finished and "accuracy" in again.metrics


# Damage


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "missing": lambda path: path.unlink(),
    "flipped": flip,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_costs_steps_and_no_bits(whole, tmp_path, damage):
    folder, undisturbed = whole["adamw-ema"]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (leaves,) = (tmp_path / "checkpoints/12/state/d").iterdir()
    DAMAGE[damage](leaves)
    with pytest.warns(CheckpointWarning, match="12 in .* is damaged.*checkpoint 10;"):
        fitted = fit(tmp_path, ADAMW_EMA)
    assert fitted.finished and sha(fitted) == sha(undisturbed)
    assert train_steps(tmp_path) == list(range(1, STEPS + 1))
    assert {10, 12} <= set(saved(tmp_path))


def test_a_checkpoint_of_another_network_is_told_from_damage(whole, tmp_path):
    shutil.copytree(whole["sgd"][0], tmp_path, dirs_exist_ok=True)
    message = (
        r"12 was saved by another configuration: .*\[16\] there and float32\[24\] here"
        r".*; of the settings, width is absent there and 24 here"
    )
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, model=Net(width=24), settings={"width": 24})


# What stops a run


def spoiled(kind):
    """A loss that is sound until all labels of the batch are 0."""

    def loss(logits, labels):
        value = losses.rate_cross_entropy(logits, labels)
        bad = (labels == 0).all()
        if kind == "loss":
            return value * jnp.where(bad, jnp.nan, 1.0)
        flat = value - jax.lax.stop_gradient(
            value
        )  # zero: its root is infinitely steep
        return value + jnp.sqrt(jnp.where(bad, flat, 1.0))

    return loss


@pytest.mark.parametrize(
    ("at", "last"),
    [(1, 0), (5, 3), (6, 5), (12, 10)],  # steps that save, but for 1
)
def test_nan_stops_the_run_and_is_not_saved(tmp_path, at, last):
    data = Data(SGD, at, mark)
    message = (
        rf"train: the loss became nan at step {at}; first non-finite gradients: "
        r"first/bias, first/kernel, head/bias and \d more\. Lower the learning rate"
    )
    with pytest.raises(NonFinite, match=message):
        fit(tmp_path, data=data, loss=spoiled("loss"))
    assert max(saved(tmp_path), default=0) == last
    assert train_steps(tmp_path) == list(range(1, at))


def test_after_nan_the_run_goes_on_from_sound_parameters(whole, tmp_path):
    with pytest.raises(NonFinite, match="at step 8;"):
        fit(tmp_path, data=Data(SGD, 8, mark), loss=spoiled("loss"))
    assert sha(fit(tmp_path)) == sha(whole["sgd"][1])


def test_a_gradient_of_nan_under_a_finite_loss_stops_the_run(tmp_path):
    data = Data(SGD, 2, mark)
    message = r"train: gradients became nan \(loss \d.*\) at step 2; .*first/bias"
    with pytest.raises(NonFinite, match=message):
        fit(tmp_path, data=data, loss=spoiled("gradient"))
    assert saved(tmp_path) == []


@pytest.mark.parametrize("label", [10, -1])
def test_a_label_out_of_range_is_an_error(tmp_path, label):
    def relabel(batch):
        return batch | {"label": np.where(batch["label"] == 3, label, batch["label"])}

    message = (
        f"fit: expected labels from 0 to 9, as the model has 10 logits, got {label}. "
        "Give the model a logit a class."
    )
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, data=Data(SGD, 4, relabel))
    assert saved(tmp_path) == [3]


def test_a_batch_that_the_devices_cannot_share_is_an_error(tmp_path):
    many = jax.device_count()
    if many == 1:
        pytest.skip("one device takes any batch")
    config = TrainConfig(steps=2, batch_size=many + 1)
    message = f"expected a multiple of the {many} device.*, got {many + 1}. Take {many}"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path / "new", config)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["net[4]", "what?", "*"])
def test_a_folder_that_orbax_takes_for_a_pattern_is_an_error(tmp_path, name):
    with pytest.raises(ValueError, match=r"without \*, \? and \[, .*, got .*another"):
        fit(tmp_path / name)
    assert not (tmp_path / name).exists()
