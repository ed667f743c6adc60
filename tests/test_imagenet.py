"""The ImageNet script: its recipes, its flags, and a short run."""

import json
import sys

import jax
import pytest

from experiments import imagenet
from experiments.imagenet import DEFAULT
from spikejax.experiment import Images, config
from spikejax.experiment.cli import flatten, override


def call(monkeypatch, *flags):
    """What `python -m experiments.imagenet FLAGS` does, in this process."""
    monkeypatch.setattr(sys, "argv", ["imagenet", *map(str, flags)])
    imagenet.command()


@pytest.fixture
def ran(monkeypatch):
    """The experiments that the script would run."""
    found = []
    monkeypatch.setattr(imagenet, "main", found.append)
    return found


@pytest.mark.parametrize(
    ("name", "model", "neuron", "time_steps"),
    [
        ("mt-resnet34", "resnet34", "mt-parallel", 1),
        ("lif-resnet34", "resnet34", "lif", 4),
        ("relu-resnet34", "resnet34", "relu", 1),
        ("mt-resnet18", "resnet18-imagenet", "mt-parallel", 1),
        ("mt-resnet50", "resnet50", "mt-parallel", 1),
        ("mt-resnet101", "resnet101", "mt-parallel", 1),
    ],
)
def test_a_recipe_is_a_network_and_all_else_is_equal(
    ran, monkeypatch, name, model, neuron, time_steps
):
    call(monkeypatch, name)
    flags = flatten(ran[0])
    assert (flags["model"], flags["neuron"]) == (model, neuron)
    assert flags["time_steps"] == time_steps
    same = {"model": "resnet34", "neuron": "mt-parallel", "time_steps": 1}
    assert override(ran[0], same) == DEFAULT
    kept = {"residual": "ms", "dtype": "bfloat16", "image_size": 224}
    assert flags | kept == flags


def test_the_spiking_transformer_has_the_recipe_of_its_authors(ran, monkeypatch):
    call(monkeypatch, "e-spikeformer-19m", "--remat", "blocks")
    flags = flatten(ran[0])
    expected = {
        "model": "e-spikeformer-19m",
        "remat": "blocks",
        "dtype": "bfloat16",
        "neuron": "i-lif",
        "num_thresholds": 4,
        "time_steps": 1,
        "optimizer": "lamb",
        "epochs": 200.0,
        "batch_size": 2048,
    }
    assert flags | expected == flags
    rate = flags["learning_rate"] / flags["learning_rate_batch"]
    assert (rate, flags["warmup"] * flags["epochs"]) == (6e-4 / 256, 5)


def test_flags_change_a_recipe_and_the_default_needs_no_name(ran, monkeypatch):
    call(monkeypatch, "lif-resnet34", "--time-steps", 1, "--residual", "sew")
    call(monkeypatch, "--batch-size", 512)
    changes = {"neuron": "lif", "time_steps": 1, "residual": "sew"}
    assert ran[0] == override(DEFAULT, changes)
    assert ran[1] == override(DEFAULT, {"batch_size": 512})


def test_training_sees_random_parts_and_evaluation_the_middle():
    training, middle = config.make_crops(DEFAULT.inputs)
    assert "inception" in training.__qualname__ and "center" in middle.__qualname__
    assert config.make_augment(DEFAULT.inputs) is not None  # its mirror image
    one, other = config.make_crops(Images(image_size=16, augment="none"))
    assert "center" in one.__qualname__ and "center" in other.__qualname__


def test_a_run_on_made_up_photographs(monkeypatch, tmp_path, capsys):
    # Recomputed blocks are trained, and their energy is measured.
    flags = ["--model", "resnet20", "--width", 0.1, "--remat", "blocks", "--steps", 2]
    flags += ["--data", "fake", "--image-size", 8, "--batch-size", 16]
    flags += ["--dtype", "float32", "--fsdp", jax.device_count()]
    call(monkeypatch, "relu-resnet34", *flags, "--workdir", tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["steps"] == 2 and result["spikes_per_image"] == 0
    assert json.loads((tmp_path / "config.json").read_text())["image_size"] == 8
    assert capsys.readouterr().out.splitlines()[-1].startswith("accuracy ")
