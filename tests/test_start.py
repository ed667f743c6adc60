"""A training that starts from the weights of another run, and what does not fit."""

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_cli import command

from spikejax.experiment import Experiment, ReLUOptions, SingleOptions, open_images, run
from spikejax.experiment.build import (
    MultiThresholdOptions,
    VGGOptions,
    build_model,
)
from spikejax.experiment.start import start_from
from spikejax.experiment.trained import find, load, save
from spikejax.train import TrainConfig

LIF, SEVERAL = SingleOptions("lif"), MultiThresholdOptions("mt-cascade", 7)
PLIF = SingleOptions("plif")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A finished run of two steps, with a checkpoint after each."""
    recipe = TrainConfig(steps=2, batch_size=8, ema=0.5, save_every=1)
    folder = tmp_path_factory.mktemp("source")
    experiment = Experiment(folder, activation=LIF, train=recipe)
    run(experiment, open_images(experiment))
    return folder


@pytest.fixture
def stopped(source, tmp_path):
    """The same run, as if it had been stopped before its end."""
    folder = tmp_path / "stopped"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("card.json"))
    return folder


def built(activation=LIF, network=None, num_classes=10, in_channels=1):
    return build_model(
        network or VGGOptions(),
        activation,
        num_classes=num_classes,
        in_channels=in_channels,
        seed=5,
    )


def weights(model):
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    return nnx.to_pure_dict(state)


def equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize("neuron", [LIF, SEVERAL], ids=["lif", "mt-cascade"])
def test_weights_are_those_of_the_run_and_neurons_its_own(source, neuron):
    model, trained = built(neuron), load(source).model
    before = [layer.thresholds for layer in model.neurons]
    assert not equal(weights(model), weights(trained))
    assert start_from(model, str(source), 10) == []
    assert equal(weights(model), weights(trained))
    assert [layer.thresholds for layer in model.neurons] == before
    if neuron is LIF:
        xs = jnp.ones((2, 1, 8, 8, 1))
        model.eval()
        np.testing.assert_array_equal(model(xs), trained(xs))


def test_a_stopped_run_gives_its_newest_intact_checkpoint(source, stopped):
    model, trained = built(), load(source).model
    start_from(model, str(stopped), 10)  # the moving average, as in evaluation
    assert equal(weights(model), weights(trained))
    (leaves,) = (stopped / "checkpoints/2/state/d").iterdir()
    content = bytearray(leaves.read_bytes())
    content[len(content) // 2] ^= 1
    leaves.write_bytes(content)
    start_from(model, str(stopped), 10)
    assert not equal(weights(model), weights(trained))
    found = {path.name for path in (stopped / "checkpoints").iterdir()}
    assert {"1", "2"} <= found and not any("corrupt" in name for name in found)


def test_a_head_of_other_classes_is_new(source):
    model, fresh = built(num_classes=5), built(num_classes=5)
    assert start_from(model, str(source), 5) == ["dense/0/bias", "dense/0/kernel"]
    new, old, taken = map(weights, (model, fresh, load(source).model))
    assert equal(new["dense"], old["dense"])
    assert equal(new["convs"], taken["convs"]) and equal(new["norms"], taken["norms"])


@pytest.mark.parametrize(
    ("kind", "options", "different"),
    [
        (
            "stopped",
            {"in_channels": 3},
            r"convs/0/kernel was float32\[3, 3, 1, 16\] and is float32\[3, 3, 3, 16\]",
        ),
        ("finished", {"activation": PLIF}, "0/leak_logit was absent and is float32"),
        (
            "finished",
            {"network": VGGOptions("plifnet"), "num_classes": 32},
            r"convs/0/kernel was float32\[3, 3, 1, 16\] and is float32\[3, 3, 1, 128\]",
        ),
    ],
    ids=["channels", "learned tau", "wider"],
)
def test_what_does_not_fit_is_named(source, stopped, kind, options, different):
    folder = source if kind == "finished" else stopped
    model = built(**options)
    before = weights(model)
    with pytest.raises(
        ValueError, match=f"^from: expected .* of {folder}: .*"
    ) as error:
        start_from(model, str(folder), options.get("num_classes", 10))
    assert re.search(different, str(error.value))
    assert equal(weights(model), before)


def test_a_learned_tau_is_not_dropped(source, tmp_path):
    """Of a run with plif, for a network of lif."""
    card = load(source).card
    card = dataclasses.replace(card, flags=card.flags | {"neuron": "plif"})
    save(tmp_path, built(PLIF), card)
    with pytest.raises(ValueError, match="leak_logit was .* and is absent. Take the"):
        start_from(built(), str(tmp_path), 10)


def test_a_network_of_the_package_by_its_name():
    options = VGGOptions("whitened"), ReLUOptions()
    model = build_model(*options, num_classes=100, in_channels=3, seed=0)
    assert start_from(model, "cifar10-mt4", 100) == ["head/kernel"]
    theirs = load(find("cifar10-mt4")).model
    np.testing.assert_array_equal(model.convs[5].kernel, theirs.convs[5].kernel)
    np.testing.assert_array_equal(model.norms[5].mean, theirs.norms[5].mean)
    assert find(".").resolve() == find("").resolve()  # here, and nothing of the package


def test_a_folder_without_a_run(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=f"^from: .* checkpoint, got {folder}"):
            start_from(built(), str(folder), 10)


def test_the_command_trains_on_from_there(source, tmp_path, monkeypatch, capsys):
    """Where nothing is learned, the weights are those of the start."""
    flags = ["--from", source, "--neuron", "lif", "--steps", 1, "--batch-size", 8]
    flags += ["--learning-rate", 1e-30, "--weight-decay", 0]
    command(monkeypatch, *flags, "--workdir", tmp_path / "new")
    assert f"Starts from the weights of {source}.\n" in capsys.readouterr().out
    after, before = load(tmp_path / "new"), load(source)
    name = "parameters_sha256"
    assert after.card.result[name] == before.card.result[name]
    assert after.card.flags["from_"] == str(source)
    # The same command resumes, also without the source; another start is another run.
    moved = source.rename(source.with_name("moved"))
    command(monkeypatch, *flags, "--workdir", tmp_path / "new")
    moved.rename(source)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        command(monkeypatch, *flags[2:], "--workdir", tmp_path / "new")
    assert f"from_ was {source} and is None" in capsys.readouterr().err
