"""The contract of a run, from flags to result.json, and what it says of bad input."""

import ast
import dataclasses
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sources import write

from experiments import cifar10, cifar100, digits
from spikejax import experiment
from spikejax.data import images
from spikejax.experiment import Experiment
from spikejax.flags import parse, reported
from spikejax.processes import Processes
from spikejax.recipe import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
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
NAMES = ("lif", "plif", "if", "mt-parallel", "mt-cascade", "relu")


def command(monkeypatch, *flags, script=digits, main=digits.demo):
    """What `python -m experiments.NAME FLAGS` does, in this process."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
    reported(main, parse(script.DEFAULT, script.__doc__))


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """(folder, result) of a short run on made-up images."""
    folder = tmp_path_factory.mktemp("fake") / "runs" / "one"
    return folder, experiment.run(Experiment(folder, data="fake", train=SHORT))


# What a run leaves


def test_config_json_says_what_ran(fake):
    config = json.loads((fake[0] / "config.json").read_text())
    fields = {f.name for f in dataclasses.fields(Experiment)}
    fields |= {f.name for f in dataclasses.fields(TrainConfig)}
    assert set(config) == fields - {"train", *experiment.PLACES}
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
    # 3x3 convolutions 3-16-32-32, norms, leaks, 32 to 10 classes
    assert result["parameters"] == 9 * (48 + 512 + 1024) + 2 * 80 + 3 + 330


def test_no_half_written_file_stays(fake):
    assert not list(fake[0].glob("*.tmp"))


def test_the_same_run_again_gives_the_same_result(fake):
    folder, before = fake
    after = experiment.run(Experiment(folder, data="fake", train=SHORT))
    assert after == {name: before[name] for name in RESULT}


def test_a_run_ends_with_one_line_of_result(tmp_path, monkeypatch, capsys):
    result = {"accuracy": 0.9876, "seconds": 12.4, "energy_nj": 1234.5}
    result["spikes_per_image"] = 2345.6
    monkeypatch.setattr(experiment, "run", lambda *_: result)
    experiment.main(Experiment(tmp_path))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "accuracy 98.76%, 12 s, 2,346 spikes and 1,234 nJ an image"


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
    assert last == "Stopped at step 2, saved. The same command goes on from there."
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "config.json").exists()
    assert not (tmp_path / "result.json").exists()
    command(monkeypatch, *flags)
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 4


def test_sigterm_before_training_leaves_with_exit_code_0(tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)

    def load(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("SIGTERM was not heard")

    monkeypatch.setattr(images, "load", load)
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, "--workdir", tmp_path / "new", "--neuron", "lif")
    assert exit.value.code == 0
    assert "The same command goes on" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


# Bad input


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Runs a command that must end in exit code 1 and one line that matches."""

    def run(match, *flags, neuron="mt-parallel", workdir=tmp_path / "new"):
        flags = ["--neuron", neuron, "--batch-size", 48, *flags]
        flags += ["--workdir", workdir]
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            command(monkeypatch, *flags)
        assert exit.value.code == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "Traceback" not in err
        assert re.search(match, err), err
        assert not (tmp_path / "new").exists()

    return run


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--learning-rat", "--learning-rate"),
        ("--num-threshold", "--num-thresholds"),
        ("--timesteps", "--time-steps"),
        ("--batch", "--batch-size"),
    ],
)
def test_an_unknown_flag_is_told_from_the_one_meant(refused, flag, meant):
    refused(rf"^flags: .*, got {flag}\. Did you mean {meant}\?$", flag, 4)
    refused(rf"^flags: .*, got {flag}=4\. Did you mean {meant}\?$", f"{flag}=4")


@pytest.mark.parametrize("flag", ["--zzzzz", "surplus"])
def test_a_flag_like_no_other_points_at_help(refused, flag):
    refused(rf"got {flag}\. --help lists them\.$", flag)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--steps", "many"], r"--steps.*'many'"),
        (["--time-steps", "1.5"], r"--time-steps.*'1.5'"),
        (["--learning-rate", "fast"], r"--learning-rate.*'fast'"),
        (["--neuron", "lfi"], r"'lfi' for argument '--neuron'.*'lif'"),
        (["--optimizer", "adam"], r"'adam' for argument '--optimizer'.*'adamw'"),
        (["--augment", "all"], r"'all' for argument '--augment'.*'crop-flip'"),
        (["--steps"], r"Missing value for argument '--steps'"),
        (["--time-steps", "0"], r"time_steps: expected at least 1, got 0\.$"),
        (["--num-thresholds", "0"], r"num_thresholds: expected at least 1, got 0\.$"),
        (["--learning-rate", "-0.1"], r"learning_rate: .* more than 0, got -0.1\.$"),
        (["--label-smoothing", "1"], r"label_smoothing: .* 0 <= p < 1, got 1.0\.$"),
        (["--steps", "0"], r"steps: expected at least 1, got 0\.$"),
        (["--epochs", "0"], r"epochs: expected more than 0, got 0.0\.$"),
        (["--seed", "-1"], r"train_batches: expected seed .* >= 0, got -1"),
        (["--model", "vgg"], r"^model: expected one of convnet, .*got 'vgg'\.$"),
        (["--batch-size", "1600"], r"no larger than the set, got batch_size 1600"),
        (["--data", "cifar1O"], r"^data: .*got 'cifar1O'\. Did you mean cifar10"),
    ],
)
def test_bad_input_is_one_line(refused, flags, match):
    refused(match, *flags)


def test_a_network_without_state_takes_one_step(refused):
    match = r"time_steps: expected 1 for --neuron relu, .*, got 4\.$"
    refused(match, "--time-steps", 4, neuron="relu")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # of frames around errors
def test_a_narrow_terminal_gets_one_line_too(refused, monkeypatch, encoding):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    refused(r"^flags: [^─╭|]*--steps: .*'many'[^─╭|]*$", "--steps", "many")
    refused(r"^flags: .*--neuron.*mt-parallel.*\)\.$", neuron="lfi")


def test_a_batch_that_the_devices_cannot_share(refused):
    many = jax.device_count()
    if many == 1:
        pytest.skip("one device takes any batch")
    match = rf"^batch size: expected a multiple of the {many} device.*Take {many}\.$"
    refused(match, "--batch-size", many + 1)


def test_a_folder_of_another_run(fake, refused):
    folder, _ = fake
    before = (folder / "config.json").read_text()
    match = (
        rf"^workdir: .*, got {folder}, which holds another: data is 'fake' there and "
        r"'digits' here\. Take another --workdir, or delete it\.$"
    )
    refused(match, workdir=folder)
    assert (folder / "config.json").read_text() == before


def test_a_folder_of_a_run_with_another_seed(fake):
    train = dataclasses.replace(SHORT, seed=1)
    with pytest.raises(ValueError, match="another: seed is 0 there and 1 here"):
        experiment.run(Experiment(fake[0], data="fake", train=train))


def test_a_file_in_the_place_of_the_folder(tmp_path, refused):
    file = tmp_path / "file"
    file.write_text("")
    refused(rf"'{file}'", workdir=file)


def test_a_set_that_is_not_prepared(refused, tmp_path):
    match = rf"^mnist: .*Run: python -m experiments.prepare mnist --data-dir {tmp_path}"
    refused(match, "--data", "mnist", "--data-dir", tmp_path)


def test_a_truncated_file_of_a_set(refused, tmp_path):
    folder = Path(write(tmp_path / "data"))
    file = next(folder.glob("*train.array_record*"))
    os.truncate(file, file.stat().st_size // 2)
    match = rf"^tiny_pets: expected 20 examples in {file}, got 0: .* truncated"
    refused(match, "--data", "tiny_pets", "--data-dir", tmp_path / "data")


def test_the_shell_sees_exit_code_1_and_one_line(tmp_path):
    child = subprocess.run(
        [sys.executable, "-m", "experiments.cifar10", "--learning-rat", "1"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 1 and child.stdout == ""
    lines = [x for x in child.stderr.splitlines() if "absl" not in x]  # old Grain's
    assert len(lines) == 1 and lines[0].endswith("Did you mean --learning-rate?")


# Help


def documented(config):
    """{field: its docstring} of a dataclass."""
    (tree,) = ast.parse(inspect.getsource(config)).body
    pairs = zip(tree.body, tree.body[1:], strict=False)
    return {
        field.target.id: text.value.value
        for field, text in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


@pytest.mark.parametrize("script", [digits, cifar10, cifar100])
def test_help_explains_every_flag(script, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, "--help", script=script)
    assert exit.value.code == 0
    text = re.sub(r"[\s│]+", "", capsys.readouterr().out)
    configs = (Experiment, TrainConfig, Processes)
    lines = {name: line for c in configs for name, line in documented(c).items()}
    if script is digits:
        lines |= documented(digits.Digits)
    fields = {f.name for c in configs for f in dataclasses.fields(c)}
    assert set(lines) == fields
    for name, line in lines.items():
        assert re.sub(r"\s+", "", line) in text, name
        assert (
            name in ("train", "processes") or f"--{name.replace('_', '-')}" in text
        ), name
    assert re.sub(r"\s+", "", script.__doc__.split("\n")[0]) in text


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--learning-rate", "0.3"], "learning_rate", 0.3),
        (["--steps", "7"], "steps", 7),
        (["--batch-size=16"], "batch_size", 16),
    ],
)
def test_flags_of_the_recipe_need_no_prefix(monkeypatch, flags, name, value):
    monkeypatch.setattr(sys, "argv", ["cifar10", *flags])
    parsed = parse(cifar10.DEFAULT, None)
    assert getattr(parsed.train, name) == value
    rest = dataclasses.replace(parsed, train=cifar10.DEFAULT.train)
    assert rest == cifar10.DEFAULT


# From flags to parts


def test_the_input_is_normalised_and_the_same_every_step():
    digits_set = images.load("digits")
    flags = Experiment(Path("x"), time_steps=3)
    raw = digits_set.train.images
    xs = experiment.make_encode(flags, digits_set)(raw, jax.random.key(0))
    assert xs.shape == (1500, 3, 8, 8, 1)
    assert jnp.array_equal(xs[:, 0], xs[:, 1]) and jnp.array_equal(xs[:, 0], xs[:, 2])
    assert abs(float(xs.mean())) < 1e-4 and abs(float(xs.std()) - 1) < 1e-4


def test_the_loss_is_that_of_the_flags():
    logits = jax.random.normal(jax.random.key(0), (4, 3, 10))
    labels = jnp.arange(4)

    def value(**flags):
        loss = experiment.make_loss(Experiment(Path("x"), **flags))
        return np.asarray(loss(logits, labels))

    assert value().shape == (4,)
    assert not np.allclose(value(), value(loss="tet"))
    assert not np.allclose(value(), value(label_smoothing=0.1))


@pytest.mark.parametrize("name", ["crop-flip", "autoaugment"])
def test_augmentation_keeps_shape_and_type(name):
    flags = Experiment(Path("x"), augment=name)
    raw = images.load("fake").train.images[:4]
    made = experiment.make_augment(flags)(raw, np.random.default_rng(0))
    assert made.shape == raw.shape and made.dtype == np.uint8
    assert not np.array_equal(made, raw)


def test_no_augmentation_is_none():
    assert experiment.make_augment(Experiment(Path("x"))) is None


# The demo


@pytest.fixture
def trained(monkeypatch, fake):
    """The experiments that the demo would run."""
    ran = []

    def run(flags, *_):
        ran.append(flags)
        return fake[1] | {"accuracy": len(ran) / 8}

    monkeypatch.setattr(digits, "run", run)
    monkeypatch.setattr(experiment, "run", run)
    return ran


def test_the_demo_compares_five_networks(trained, tmp_path, monkeypatch, capsys):
    command(monkeypatch, "--workdir", tmp_path, "--num-thresholds", 3, "--seed", 5)
    rows = json.loads((tmp_path / "summary.json").read_text())
    settings = [(r["neuron"], r["num_thresholds"], r["time_steps"]) for r in rows]
    assert settings == [
        ("lif", 1, 1),
        ("mt-parallel", 3, 1),
        ("mt-cascade", 3, 1),
        ("lif", 1, 4),
        ("relu", 1, 1),
    ]
    assert all(set(row) >= RESULT for row in rows)
    assert [row["accuracy"] for row in rows] == [1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8]
    assert (tmp_path / "digits.png").read_bytes()[:4] == b"\x89PNG"
    folders = ["lif-t1", "mt-parallel-t1", "mt-cascade-t1", "lif-t4", "relu-t1"]
    assert [flags.workdir for flags in trained] == [tmp_path / f for f in folders]
    for flags, row in zip(trained, rows, strict=True):
        assert (flags.neuron, flags.time_steps) == (row["neuron"], row["time_steps"])
        assert flags.train.seed == 5 and flags.num_thresholds == 3
        assert type(flags) is Experiment
    out = capsys.readouterr().out
    for name, row in zip(digits.NETWORKS, rows, strict=True):
        assert re.search(rf"{re.escape(name)} .*{row['accuracy']:.2%}", out)


def test_with_a_neuron_the_demo_trains_that_one(trained, tmp_path, monkeypatch, capsys):
    command(monkeypatch, "--workdir", tmp_path, "--neuron", "mt-cascade")
    (flags,) = trained
    assert flags.neuron == "mt-cascade" and flags.workdir == tmp_path
    assert not (tmp_path / "summary.json").exists()
    assert "accuracy 12.50%" in capsys.readouterr().out


def test_a_demo_that_was_stopped_writes_no_summary(tmp_path, monkeypatch):
    (tmp_path / "left").mkdir()
    monkeypatch.setattr(digits, "run", lambda flags: None)
    command(monkeypatch, "--workdir", tmp_path)
    assert not (tmp_path / "summary.json").exists()
