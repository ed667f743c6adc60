"""The loop around the step: what it reports, how it stops, how it goes on."""

import dataclasses
import functools
import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

from spikejax import keep_membranes, losses, neurons
from spikejax.data import images
from spikejax.layers import MultiThreshold
from spikejax.train import TrainConfig, loop
from spikejax.train.checksum import parameters_sha256
from spikejax.train.progress import NonFinite
from spikejax.train.workdir import locked, write

STEPS, EPOCH = 12, 5  # evaluations and checkpoints at 5, 10 and 12; saves at 3, ...
SHORT = {"steps": STEPS, "batch_size": 24, "save_every": 3}
SGD = TrainConfig(**SHORT)
ADAMW_EMA = TrainConfig(
    **SHORT, optimizer="adamw", learning_rate=0.01, clip=1.0, ema=0.8
)
RECIPES = {"sgd": SGD, "adamw-ema": ADAMW_EMA}
CE = losses.rate_cross_entropy
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


class Data:
    """Training batches; at one step something is done to, or before, the batch."""

    def __init__(self, config=SGD, at=0, act=None):
        made = images.train_batches(DIGITS.train, config.batch_size, seed=config.seed)
        self.batches, self.at, self.act = made, at, act
        self.get_state, self.set_state = made.get_state, made.set_state

    def __next__(self):
        if self.act is None or self.get_state()["next_index"] + 1 != self.at:
            return next(self.batches)
        return self.act(next(self.batches))


class Killed(Exception):
    pass


def die(batch):
    raise Killed


def send(*numbers):
    """Sends signals to this process before the batch."""

    def act(batch):
        for number in numbers:
            os.kill(os.getpid(), number)
        return batch

    return act


def mark(batch):
    return batch | {"label": np.zeros_like(batch["label"])}


def fit(workdir, config=SGD, data=None, loss=CE, model=None, **options):
    model, data = model or Net(config.seed), data or Data(config)
    eval_data = images.eval_batches(DIGITS.test, config.batch_size)
    options = {"encode": noisy, "steps_per_epoch": EPOCH, "workdir": workdir} | options
    return loop.fit(config, model, loss, data, eval_data, **options)


@pytest.fixture(autouse=True, scope="module")
def compiled_once():
    """Equal runs share the functions that they compile."""
    with pytest.MonkeyPatch.context() as patch:
        names = ("make_optimizer", "make_train_step", "make_predict", "make_eval_step")
        for owner, name in [(loop, n) for n in names] + [(loop.sharding, "replicate")]:
            patch.setattr(owner, name, functools.cache(getattr(owner, name)))
        yield


def lines(workdir):
    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def steps(workdir, name="loss"):
    """The steps that have a line with this number."""
    return [entry["step"] for entry in lines(workdir) if name in entry]


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
    config = TrainConfig(epochs=18, batch_size=64, evaluate_every=100)
    metrics = fit(tmp_path, config).metrics
    assert metrics["accuracy"] > 0.7 and metrics["steps"] == 18 * EPOCH


@pytest.mark.parametrize("recipe", RECIPES)
def test_metrics_are_complete_and_those_of_the_model(whole, recipe):
    _, fitted = whole[recipe]
    assert fitted.finished
    assert fitted.metrics["steps"] == STEPS and fitted.metrics["seconds"] > 0
    assert fitted.metrics["images_per_second"] > 0
    # 64x16 + 16, 2x16 of the norm, one leak, 16x10 + 10
    assert fitted.metrics["parameters"] == 1040 + 32 + 1 + 170
    json.dumps(fitted.metrics)
    params = nnx.to_pure_dict(nnx.state(fitted.model, nnx.Param))
    assert sha(fitted) == parameters_sha256(params)
    key = jax.random.key(RECIPES[recipe].seed)
    predict = jax.jit(lambda raw: fitted.model(noisy(raw, key)))
    right = loss = 0.0
    for batch in images.eval_batches(DIGITS.test, 24):
        size = len(batch["label"])
        raw = np.zeros((24, 8, 8, 1), np.uint8)  # the noise is that of a full batch
        raw[:size] = batch["image"]
        logits = predict(raw)[:size]
        right += float((logits.mean(1).argmax(-1) == batch["label"]).sum())
        loss += float(CE(logits, batch["label"]).sum())
    assert fitted.metrics["accuracy"] == pytest.approx(right / 297)
    assert fitted.metrics["loss"] == pytest.approx(loss / 297, rel=1e-5)


def test_a_step_is_traced_once(whole, tmp_path):
    traced = []

    @functools.wraps(CE)  # by its name a loss is another
    def loss(logits, labels):
        traced.append(logits.shape)
        return CE(logits, labels)

    shutil.copytree(whole["sgd"][0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints/12")
    fit(tmp_path, loss=loss)  # from a checkpoint, evaluations at 12
    assert traced == [(24, 2, 10)] * 2  # one training step, one evaluation step


# metrics.jsonl and the checkpoints


def test_evaluations_come_as_often_as_is_asked(tmp_path):
    fit(tmp_path, dataclasses.replace(SGD, evaluate_every=0.4))
    assert steps(tmp_path, "eval_loss") == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_step_has_its_line(whole, recipe):
    folder, fitted = whole[recipe]
    assert steps(folder) == list(range(1, STEPS + 1))
    assert steps(folder, "eval_loss") == [5, 10, 12]
    for entry in lines(folder):
        if "loss" in entry:
            assert set(entry) == {"step", "loss", "accuracy", "gradient_norm", "epoch"}
            assert entry["epoch"] == entry["step"] / EPOCH
            assert entry["gradient_norm"] > 0
    last = lines(folder)[-1]
    assert last["eval_accuracy"] == fitted.metrics["accuracy"]
    assert last["eval_loss"] == fitted.metrics["loss"]
    assert 0 < last["seconds"] <= fitted.metrics["seconds"]


def test_a_checkpoint_knows_its_accuracy(whole):
    folder, fitted = whole["sgd"]
    with ocp.training.Checkpointer(folder / "checkpoints") as checkpointer:
        metadata = checkpointer.checkpointables_metadata(12)
    assert metadata.metrics == {"metric": fitted.metrics["accuracy"]}
    clock = metadata.custom_metadata["clock"]
    assert 0 < clock["seconds"] <= fitted.metrics["seconds"]


# Stopped, and going on


@pytest.mark.parametrize(
    ("recipe", "broken"),
    [
        ("sgd", [(1, 0), (8, 6)]),
        ("adamw-ema", [(2, 0), (4, 3), (5, 3), (12, 10)]),
    ],
)
def test_a_run_broken_off_goes_on_bit_for_bit(whole, tmp_path, recipe, broken):
    folder, undisturbed = whole[recipe]
    config = RECIPES[recipe]
    for at, last in broken:
        with pytest.raises(Killed):
            fit(tmp_path, config, Data(config, at, die))
        assert max(saved(tmp_path), default=0) == last
    fitted = fit(tmp_path, config)
    assert fitted.finished and sha(fitted) == sha(undisturbed)
    assert fitted.metrics["accuracy"] == undisturbed.metrics["accuracy"]
    assert steps(tmp_path) == list(range(1, STEPS + 1))
    assert steps(tmp_path, "eval_loss") == [5, 10, 12]
    there, here = lines(folder), lines(tmp_path)
    for entry in there + here:
        for name in ("seconds", "eval_images_per_second"):
            entry.pop(name, None)
    assert here == there


@pytest.mark.parametrize(
    "at, number",
    [(5, signal.SIGTERM), (8, signal.SIGINT), (STEPS, signal.SIGHUP)],
)
def test_a_signal_saves_the_step_and_leaves(whole, tmp_path, at, number):
    before = signal.getsignal(number)
    stopped = fit(tmp_path, data=Data(SGD, at, send(number)))
    assert signal.getsignal(number) is before
    assert not stopped.finished and stopped.metrics["steps"] == at
    assert max(saved(tmp_path)) == at and steps(tmp_path)[-1] == at
    fitted = fit(tmp_path)
    assert fitted.finished and sha(fitted) == sha(whole["sgd"][1])
    assert steps(tmp_path) == list(range(1, STEPS + 1))


def test_a_second_ctrl_c_interrupts(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, data=Data(SGD, 5, send(signal.SIGINT, signal.SIGINT)))
    assert saved(tmp_path) == [3]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigterm_again_while_saving_loses_nothing(tmp_path, monkeypatch):
    class Checkpoints(loop.Checkpoints):
        def close(self):
            os.kill(os.getpid(), signal.SIGTERM)
            super().close()

    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("outside"))
    monkeypatch.setattr(loop, "Checkpoints", Checkpoints)
    try:
        stopped = fit(tmp_path, data=Data(SGD, 4, send(signal.SIGTERM)))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not heard and not stopped.finished and saved(tmp_path) == [3, 4]
    again = fit(tmp_path)  # a signal while the last step is saved counts too
    assert not again.finished and again.metrics["steps"] == STEPS


def test_it_runs_in_another_thread(whole, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        fitted = pool.submit(fit, tmp_path).result()
    assert sha(fitted) == sha(whole["sgd"][1])


def test_a_finished_run_trains_no_further(whole, tmp_path):
    folder, undisturbed = whole["adamw-ema"]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    again = fit(tmp_path, ADAMW_EMA, Data(ADAMW_EMA, STEPS + 1, die))
    assert again.finished and sha(again) == sha(undisturbed)
    for name in ("accuracy", "loss", "steps", "images_per_second"):
        assert again.metrics[name] == undisturbed.metrics[name]
    assert again.metrics["seconds"] >= lines(folder)[-1]["seconds"]
    assert lines(tmp_path) == lines(folder)


@pytest.mark.parametrize("at", [EPOCH, STEPS])
def test_a_signal_breaks_off_an_evaluation_which_the_next_run_repeats(
    whole, tmp_path, monkeypatch, at
):
    seen = []

    def evaluate(step, state, batches, *args, **options):
        def sent():
            for k, batch in enumerate(batches):
                if k == 2 and int(state["step"]) == at:
                    os.kill(os.getpid(), signal.SIGTERM)
                seen.append(int(state["step"]))
                yield batch

        return loop_evaluate(step, state, sent(), *args, **options)

    loop_evaluate = loop.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", evaluate)
        for repeats in (1, 2):
            stopped = fit(tmp_path)
            assert not stopped.finished and seen.count(at) == 3 * repeats
            assert max(saved(tmp_path)) == at and at not in steps(tmp_path, "eval_loss")
    fitted = fit(tmp_path)
    assert fitted.finished and sha(fitted) == sha(whole["sgd"][1])
    assert fitted.metrics["accuracy"] == whole["sgd"][1].metrics["accuracy"]
    folder = whole["sgd"][0]
    for name in ("eval_loss", "eval_accuracy"):
        assert steps(tmp_path, name) == steps(folder, name)
        got, expected = ([x.get(name) for x in lines(f)] for f in (tmp_path, folder))
        assert got == expected


def test_a_checkpoint_of_another_network_is_told_from_damage(whole, tmp_path):
    shutil.copytree(whole["sgd"][0], tmp_path, dirs_exist_ok=True)
    message = r"checkpoint 12 in .* got another one: .*\[16\] and is float32\[24\]"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, model=Net(width=24))


def test_elapsed_time_goes_on_without_the_log(whole, tmp_path):
    folder, undisturbed = whole["sgd"]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "metrics.jsonl").unlink()
    again = fit(tmp_path, data=Data(SGD, STEPS + 1, die))
    for name in ("seconds", "images_per_second"):
        assert again.metrics[name] == undisturbed.metrics[name]


def test_the_model_is_not_modified(tmp_path):
    model = Net()
    model.eval()
    before = nnx.to_pure_dict(nnx.state(model))
    loop.graphs(model)
    assert model.norm.use_running_average
    fit(tmp_path, TrainConfig(steps=1, batch_size=24), model=model)
    after = nnx.to_pure_dict(nnx.state(model))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
    assert model.norm.use_running_average


# What stops a run


def steep(logits, labels):
    """A loss whose gradient is not finite once all labels of the batch are 0."""
    value = CE(logits, labels)
    flat = value - jax.lax.stop_gradient(value)  # zero, whose root is too steep
    return value + jnp.sqrt(jnp.where((labels == 0).all(), flat, 1.0))


def unknown(label):
    """Labels without a logit, of which the loss is NaN."""
    return lambda batch: batch | {"label": np.r_[label, batch["label"][1:]]}


SAID = {
    "loss": r"the loss became nan at step {}; first non-finite gradients: first/bias, "
    r"first/kernel, head/bias and \d more\. Lower the learning rate",
    "gradient": r"gradients became nan \(loss \d.*\) at step {}; .*first/bias",
}


@pytest.mark.parametrize(
    ("kind", "act", "loss", "at", "last"),
    [
        ("loss", unknown(10), CE, 1, 0),
        ("loss", unknown(-1), CE, 8, 6),
        ("loss", unknown(10), CE, 12, 10),
        ("gradient", mark, steep, 2, 0),
    ],
)
def test_nan_stops_the_run_and_the_next_goes_on(
    whole, tmp_path, kind, act, loss, at, last
):
    with pytest.raises(NonFinite, match="^train: " + SAID[kind].format(at)):
        fit(tmp_path, data=Data(SGD, at, act), loss=loss)
    assert max(saved(tmp_path), default=0) == last
    assert steps(tmp_path) == list(range(1, at))
    assert sha(fit(tmp_path)) == sha(whole["sgd"][1])


def test_data_that_are_not_finite_are_named(tmp_path):
    def spoil(batch):
        return batch | {"image": np.where(batch["image"] > 15, np.nan, batch["image"])}

    with pytest.raises(NonFinite, match="at step 1, as the images of its batch are no"):
        fit(tmp_path, data=Data(SGD, 1, spoil))


# What is refused


def test_a_folder_that_another_run_uses_is_refused(tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="no other run is using"):
        fit(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_folder_of_another_training_is_refused(whole, tmp_path):
    shutil.copytree(whole["sgd"][0], tmp_path, dirs_exist_ok=True)
    faster, other = dataclasses.replace(SGD, learning_rate=9.0), Net()
    for args, what in ((faster,), "rate was .* 9"), ((SGD, None, losses.tet), "loss"):
        with pytest.raises(ValueError, match=f"another: .*{what}"):
            fit(tmp_path, *args)
    numbers = r"model/neuron/thresholds was .* is \[9"
    for n, top, message in (2, 1.0, "model/neuron was .* of 2"), (4, 9.0, numbers):
        other.neuron = MultiThreshold(n, learn_tau=True, v_threshold=top)
        with pytest.raises(ValueError, match=message):
            fit(tmp_path, model=other)
    write(tmp_path / "new/fit.json", {"learning_rate": 9.0})  # it has no checkpoint
    assert fit(tmp_path / "new").finished


def test_more_steps_than_can_be_counted_are_refused(tmp_path):
    config = TrainConfig(epochs=1e6)
    with pytest.raises(ValueError, match="^epochs: expected at most 2147483647 steps"):
        fit(tmp_path / "new", config, steps_per_epoch=10**4)
    assert not (tmp_path / "new").exists()


def shorter(batch):
    return {name: values[:-8] for name, values in batch.items()}


BATCHES = "endless batches of 24 images and labels, got {}. Repeat a dataset of Grain"


@pytest.mark.parametrize(
    "act, got",
    [
        (lambda batch: {}, "no more"),
        (lambda batch: tuple(batch.values()), "tuple"),
        (lambda batch: {"x": 0} | {"label": 0}, "label, x"),
        (shorter, "one of 16"),
    ],
)
def test_a_batch_that_cannot_be_trained_on_is_an_error(tmp_path, act, got):
    with pytest.raises(ValueError, match=f"fit: expected {BATCHES.format(got)}"):
        fit(tmp_path, data=Data(SGD, 4, act))
    assert saved(tmp_path) == [3]


def test_a_batch_that_the_devices_cannot_share_is_an_error(tmp_path):
    if jax.device_count() != 8:
        pytest.skip("other devices may share it")
    with pytest.raises(ValueError, match="a multiple of the 8 device.*, got 9. Take 8"):
        fit(tmp_path / "new", TrainConfig(steps=2, batch_size=9))
    assert not (tmp_path / "new").exists()


def test_a_model_that_keeps_its_membranes_is_refused(tmp_path):
    model = keep_membranes(Net(), jnp.zeros((1, 1, 64)))
    with pytest.raises(ValueError, match=r"from rest, got .* Call drop_membranes"):
        fit(tmp_path / "new", model=model)
    assert not (tmp_path / "new").exists()


ORBAX = r"a path without .*, which Orbax cannot read back, got .*another"
GRAIN = "an iterator of Grain, as iter.dataset. gives, got list_iterator"


@pytest.mark.parametrize(
    "name, data, message",
    [
        *((name, None, ORBAX) for name in ("net[4]", "a#b", "10%", "a\\b")),
        ("", iter([]), GRAIN),
    ],
)
def test_folders_and_data_are_refused_before_any_work(tmp_path, name, data, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path / "new" / name, data=data)
    assert not (tmp_path / "new").exists()
