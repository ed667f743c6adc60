"""The contract of a run, from settings to result.json, and what it refuses."""

import dataclasses
import json
import os
import re
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_flags import command

from spikejax import losses
from spikejax.data import augment, images
from spikejax.experiment import (
    Experiment,
    Images,
    MultiThresholdOptions,
    ReLUOptions,
    ResNetOptions,
    SingleOptions,
)
from spikejax.experiment import config as experiment
from spikejax.experiment.cli import flatten, override
from spikejax.train import TrainConfig

SHORT = TrainConfig(steps=3, batch_size=64, evaluate_every=100)
RESULT = {
    "accuracy",
    "loss",
    "steps",
    "seconds",
    "images_per_second",
    "parameters",
    "parameters_sha256",
    "spikes_per_image",
    "energy_nj",
    "mac_nj",
    "ann_energy_nj",
    "seed",
    "versions",
    "device",
}


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """(folder, result) of a short run on made-up images."""
    folder = tmp_path_factory.mktemp("fake") / "runs" / "one"
    return folder, run(Experiment(folder, Images("fake"), train=SHORT))


def run(flags):
    return experiment.run(flags, experiment.open_images(flags))


# What a run leaves


def test_config_json_says_what_ran(fake):
    config = json.loads((fake[0] / "config.json").read_text())
    flags = flatten(Experiment(fake[0]))
    seen = {"train_examples", "class_names_crc"}  # of the data
    assert set(config) == set(flags) - {*experiment.NOT_IDENTITY} | seen
    assert config["data"] == "fake" and config["neuron"] == "mt-parallel"
    assert config["steps"] == 3 and config["num_thresholds"] == 4


def test_metrics_jsonl_has_one_object_a_line(fake):
    text = (fake[0] / "metrics.jsonl").read_text()
    entries = [json.loads(line) for line in text.splitlines()]
    assert [e["step"] for e in entries if "loss" in e] == [1, 2, 3]
    assert [e["step"] for e in entries if "eval_accuracy" in e] == [3]
    assert (fake[0] / "checkpoints/3").is_dir()
    assert list((fake[0] / "tensorboard").iterdir())


def test_result_json_is_complete(fake):
    folder, returned = fake
    result = json.loads((folder / "result.json").read_text())
    assert result == returned and set(result) == RESULT
    assert 0 <= result["accuracy"] <= 1 and result["loss"] > 0
    assert result["steps"] == 3 and result["seed"] == 0
    assert re.fullmatch("[0-9a-f]{64}", result["parameters_sha256"])
    for name in ("seconds", "images_per_second", "spikes_per_image", "energy_nj"):
        assert result[name] > 0, name
    assert result["ann_energy_nj"] > result["energy_nj"]
    assert {"spikejax", "jax", "flax"} <= set(result["versions"])
    # 3x3 convolutions 3-16-32-32, norms, 32 to 10 classes
    assert result["parameters"] == 9 * (48 + 512 + 1024) + 2 * 80 + 330


def test_the_same_run_again_gives_the_same_result(fake):
    folder, before = fake
    after = run(Experiment(folder, Images("fake"), train=SHORT))
    assert after == {name: before[name] for name in RESULT}


def test_a_run_ends_with_one_line_of_result(tmp_path, monkeypatch, capsys):
    result = {"accuracy": 0.9876, "seconds": 12.4, "energy_nj": 1234.5}
    result["spikes_per_image"] = 2345.6
    monkeypatch.setattr(experiment, "run", lambda *_: result)
    experiment.main(Experiment(tmp_path))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "accuracy 98.76%, 12 s, 2,346 spikes and 1,234 nJ per image"


def test_a_run_does_not_resume_with_other_data(tmp_path):
    recipe = TrainConfig(steps=1, batch_size=8)
    flags = Experiment(tmp_path, train=recipe)
    task = experiment.open_images(flags)
    experiment.run(flags, task)
    data = task.data
    fewer = dataclasses.replace(data, train=data.test)
    with pytest.raises(ValueError, match="train_examples was 1500 and is 297"):
        experiment.run(flags, task._replace(data=fewer))
    names = tuple(reversed(data.class_names))
    renamed = dataclasses.replace(data, class_names=names)
    with pytest.raises(ValueError, match="class_names_crc was"):
        experiment.run(flags, task._replace(data=renamed))


# SIGTERM


def sent_at(batch_number):
    """train_batches whose iterator sends SIGTERM before a batch."""

    class Terminating(images.TrainBatches):
        def __next__(self):
            if self.get_state()["next_index"] + 1 == batch_number:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    def train_batches(*args, **options):
        made = original(*args, **options)
        return Terminating(made._dataset)

    original = images.train_batches
    return train_batches


def test_sigterm_saves_and_leaves_with_exit_code_0(tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    flags = ["--workdir", tmp_path, "--neuron", "lif", "--steps", 4]
    flags += ["--batch-size", 48, "--evaluate-every", 100]
    with monkeypatch.context() as patch:
        patch.setattr(images, "train_batches", sent_at(2))
        command(patch, *flags)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "Stopped and saved at step 2. Rerun the same command to resume."
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "config.json").exists()
    assert not (tmp_path / "result.json").exists()
    command(monkeypatch, *flags)
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 4


# What is refused


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"time_steps": 0}, r"time_steps: expected 1 to 10000, got 0\.$"),
        ({"label_smoothing": 1.0}, r"label_smoothing: .* 0 <= p < 1, got 1.0\.$"),
        (
            {"activation": ReLUOptions(), "time_steps": 4},
            r"time_steps: expected 1 for --neuron relu: .* Take --time-steps 1\.$",
        ),
        ({"loss": "tett"}, "loss: expected one of rate, tet, got 'tett'"),
        ({"activation": SingleOptions("lfi")}, "neuron: expected one of lif, .*"),
    ],
)
def test_settings_out_of_range_are_refused(flags, match):
    with pytest.raises(ValueError, match=match):
        Experiment(Path(), **flags)


@pytest.mark.parametrize(
    ("options", "flags", "match"),
    [
        (
            MultiThresholdOptions,
            {"num_thresholds": 0},
            r"num_thresholds: expected 1 to 64, got 0\.$",
        ),
        (Images, {"augment": "inception"}, r"image_size: expected a number .*, got no"),
        (Images, {"augment": "flip"}, r"augment: expected one of none, .*, got 'flip'"),
        (ResNetOptions, {"model": "vgg"}, r"model: expected one of resnet18, .*'vgg'"),
        (
            ResNetOptions,
            {"width": 0.0},
            r"width: expected more than 0, .* got 0\.0\.$",
        ),
    ],
)
def test_options_out_of_range_are_refused(options, flags, match):
    with pytest.raises(ValueError, match=match):
        options(**flags)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"data": "mnist"}, r"^mnist: .*Run: python -m experiments.prepare mnist --da"),
        ({"batch_size": 1600}, "at least 1600 ex.*, got .* 1600"),
        ({"model": "vgg11"}, r"sides of at least 32, got shape .*, 8, 8, 1\)"),
        ({"model": "general-cnn"}, r"multiples of 32, got shape .*, 8, 8, 1\)"),
        ({"batch_size": 9}, r"multiple of the 8 device.*Take 8\.$"),
    ],
)
def test_a_run_that_cannot_be_leaves_no_folder(flags, match, tmp_path):
    if "8 device" in match and jax.device_count() != 8:
        pytest.skip("other devices may share it")
    workdir = tmp_path / "new"
    flags = override(Experiment(workdir), flags | {"data_dir": tmp_path})
    with pytest.raises(ValueError, match=match):
        run(flags)
    assert not workdir.exists()


def test_a_folder_of_a_run_with_another_seed(fake):
    folder, _ = fake
    before = (folder / "config.json").read_text()
    train = dataclasses.replace(SHORT, seed=1)
    with pytest.raises(ValueError, match="another: seed was 0 and is 1"):
        run(Experiment(folder, Images("fake"), train=train))
    assert (folder / "config.json").read_text() == before


def test_a_new_flag_has_its_default_in_folders_of_before(fake):
    config = json.loads((fake[0] / "config.json").read_text())
    for name in ("augment", "pool", "num_thresholds", "label_smoothing", "ema"):
        del config[name]
    folder = fake[0].parent / "old"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    flags = Experiment(folder, Images("fake"), train=SHORT)
    settings = experiment.identity(flags)
    experiment.workdir.check(folder, settings, experiment.defaults(flags))
    other = experiment.identity(override(flags, {"pool": "avg"}))
    with pytest.raises(ValueError, match="pool was max and is avg"):
        experiment.workdir.check(folder, other, experiment.defaults(flags))


def test_a_folder_is_read_as_its_experiment(tmp_path):
    flags = Experiment(
        tmp_path,
        Images("fake", image_size=16),
        ResNetOptions("resnet20", width=0.5),
        SingleOptions("lif"),
        time_steps=2,
        train=SHORT,
    )
    saved = experiment.identity(flags)
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert experiment.read(str(tmp_path)) == flags
    inputs = dataclasses.replace(flags.inputs, data_dir=Path("x"))
    other = dataclasses.replace(flags, inputs=inputs)
    assert experiment.read(tmp_path, data_dir=Path("x")) == other
    with pytest.raises(ValueError, match="folder with the config.json of a run, got"):
        experiment.read(tmp_path / "none")


@pytest.mark.parametrize("text", ["", "5", "[]", '{"steps": "many"}'])
def test_a_folder_with_other_settings_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="^read: expected the settings of a run"):
        experiment.read(tmp_path)


def test_the_settings_of_a_folder_are_checked(tmp_path):
    (tmp_path / "config.json").write_text('{"model": "resnet20", "width": -1.0}')
    with pytest.raises(
        ValueError, match="got: width: expected more than 0, .* got -1.0"
    ):
        experiment.read(tmp_path)


# From flags to parts


def test_the_input_is_normalised_and_the_same_every_step():
    task = experiment.open_images(Experiment(Path("x"), time_steps=3))
    xs = task.encode(task.data.train.values, jax.random.key(0))
    assert xs.shape == (1500, 3, 8, 8, 1)
    assert jnp.array_equal(xs[:, 0], xs[:, 1]) and jnp.array_equal(xs[:, 0], xs[:, 2])
    assert abs(float(xs.mean())) < 1e-4 and abs(float(xs.std()) - 1) < 1e-4


def test_the_loss_is_that_of_the_flags():
    logits = jax.random.normal(jax.random.key(0), (4, 3, 10))
    labels = jnp.arange(4)

    def value(**flags):
        loss = experiment.make_loss(Experiment(Path("x"), time_steps=3, **flags))
        return np.asarray(loss(logits, labels))

    for name, loss in (("rate", losses.rate_cross_entropy), ("tet", losses.tet)):
        expected = loss(logits, labels, label_smoothing=0.1)
        np.testing.assert_array_equal(value(loss=name, label_smoothing=0.1), expected)


CROP, FLIP = augment.random_crop(4), augment.random_flip()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("crop-flip", (CROP, FLIP)),
        ("reflect-flip", (augment.random_crop(4, mirror=True), FLIP)),
        (
            "autoaugment",
            (CROP, FLIP, augment.autoaugment_cifar(), augment.cutout(16)),
        ),
    ],
)
def test_the_augmentation_is_that_of_the_flags(name, parts):
    raw = images.load("fake").train.values[:8]
    rngs = (np.random.default_rng(0) for _ in range(2))
    made = experiment.make_augment(Images(augment=name))(raw, next(rngs))
    assert made.shape == raw.shape and made.dtype == np.uint8
    np.testing.assert_array_equal(made, augment.compose(*parts)(raw, next(rngs)))


def test_no_augmentation_is_none():
    assert experiment.make_augment(Images()) is None
