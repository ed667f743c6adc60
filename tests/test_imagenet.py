"""The ImageNet script: its recipes, its flags, a short run, and what it plans."""

import dataclasses
import json
import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from experiments import imagenet
from experiments.imagenet import RECIPES, ImageNet, Planned
from spikejax.plan import Plan


def call(monkeypatch, *flags):
    """What `python -m experiments.imagenet FLAGS` does, in this process."""
    monkeypatch.setattr(sys, "argv", ["imagenet", *map(str, flags)])
    imagenet.command()


@pytest.fixture
def ran(monkeypatch):
    """The experiments that the script would run."""
    found = []
    monkeypatch.setattr(imagenet, "main", lambda flags, source: found.append(flags))
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
    (flags,) = ran
    assert (flags.model, flags.neuron) == (model, neuron)
    assert (flags.time_steps, flags.num_thresholds) == (time_steps, 4)
    same = {"model": "resnet34", "neuron": "mt-parallel", "time_steps": 1}
    assert dataclasses.replace(flags, **same) == RECIPES["mt-resnet34"] == ImageNet()
    assert (flags.residual, flags.dtype, flags.image_size) == ("ms", "bfloat16", 224)


def test_flags_change_a_recipe_and_the_default_needs_no_name(ran, monkeypatch):
    call(monkeypatch, "lif-resnet34", "--time-steps", 1, "--residual", "sew")
    call(monkeypatch, "--batch-size", 512)
    assert (ran[0].neuron, ran[0].time_steps, ran[0].residual) == ("lif", 1, "sew")
    train = dataclasses.replace(ImageNet.train, batch_size=512)
    assert ran[1] == ImageNet(train=train)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["resnet34"], r"^recipe: expected plan or one of mt-res.*, got 'resnet34'\.$"),
        (["--image-size", "0"], r"image_size: expected at least 1, got 0\.$"),
        (
            ["--fsdp", "3"],
            r"^fsdp: expected a divisor of the \d device.*, got 3\. Take",
        ),
        (["--process-id", "1"], r"coordinator_address: expected HOST:PORT beside"),
        (["--norm-groups", "3"], r"norm_groups: expected a divisor of the batch size"),
        (
            ["plan", "--topology", "v5e:3x3"],
            r"^topology: .*v5e has, got 3x3\. Take 1x1",
        ),
        (["plan", "--image-siz", "64"], r"Did you mean --image-size\?$"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path, flags, match):
    workdir = tmp_path / "new"
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, *flags, "--data", "fake", "--workdir", workdir)
    err = capsys.readouterr().err
    assert exit.value.code == 1 and err.count("\n") == 1
    assert re.search(match, err), err
    assert not workdir.exists()


def test_training_sees_random_parts_and_evaluation_the_middle():
    flags = ImageNet(image_size=16, data="fake")
    training, middle = imagenet.crops(flags)
    assert training is not middle and "inception" in training.__qualname__
    assert imagenet.PHOTOGRAPHS.augment(flags) is not None
    plain = dataclasses.replace(flags, augment="none")
    one, other = imagenet.crops(plain)
    assert one is other and "center" in one.__qualname__
    assert imagenet.PHOTOGRAPHS.augment(plain) is None


def test_images_travel_as_bytes_and_are_normalised_on_the_device():
    flags = ImageNet()
    mean, std = (0.5, 0.25, 0.0), (0.5, 0.25, 1.0)
    encode = imagenet.PHOTOGRAPHS.encode(flags, SimpleNamespace(mean=mean, std=std))
    raw = jnp.full((2, 4, 4, 3), 255, jnp.uint8)
    xs = jax.jit(encode)(raw, jax.random.key(0))
    assert xs.shape == (2, 1, 4, 4, 3)
    assert jnp.allclose(xs, jnp.array([1.0, 3.0, 1.0]))


def test_a_run_on_made_up_photographs(monkeypatch, tmp_path, capsys):
    flags = ["--data", "fake", "--image-size", 16, "--model", "convnet", "--steps", 2]
    flags += ["--batch-size", 16, "--dtype", "float32", "--fsdp", jax.device_count()]
    call(monkeypatch, "relu-resnet34", *flags, "--workdir", tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["steps"] == 2 and result["spikes_per_image"] == 0
    assert json.loads((tmp_path / "config.json").read_text())["image_size"] == 16
    assert capsys.readouterr().out.splitlines()[-1].startswith("accuracy ")


@pytest.fixture
def planned(monkeypatch):
    """Plans are made up: what needs more than 16 images a chip does not fit."""
    asked = []

    def plan_training(config, build, loss, encode, where, *, image_shape, **options):
        flags, image_set = build.args
        asked.append((flags, image_shape, options))
        assert encode(jnp.zeros((1, 2, 2, 3), jnp.uint8), None).ndim == 5
        images = config.batch_size / where.chips / (2 if flags.remat != "none" else 1)
        numbers = {f.name: 1 for f in dataclasses.fields(Plan)}
        numbers |= {"where": where, "batch_size": config.batch_size, "collectives": ()}
        numbers["temporaries"] = int(images * 2**30)
        return Plan(**numbers)

    monkeypatch.setattr(imagenet, "plan_training", plan_training)
    return asked


def test_the_plan_compares_the_network_its_twin_and_lif(planned, monkeypatch, capsys):
    call(monkeypatch, "plan", "--topology", "v5e:2x2", "--batch-size", 16)
    nets = [(f.model, f.neuron, f.time_steps) for f, _, _ in planned]
    assert nets == [
        ("resnet34", "mt-parallel", 1),
        ("resnet34", "relu", 1),
        ("resnet34", "lif", 4),
    ]
    for _, shape, options in planned:
        assert shape == (224, 224, 3)
        assert options == {"train_images": 90 * 1_281_167, "fsdp": 1}
    out = capsys.readouterr().out
    assert "resnet34 on v5e:2x2, 16 images a step" in out
    assert out.count("fits: ") == 3 and "not" not in out


def test_where_a_plan_does_not_fit_it_says_what_would(planned, monkeypatch, capsys):
    call(monkeypatch, "plan", "--topology", "v5e:2x2", "--batch-size", 96)
    out = capsys.readouterr().out
    assert out.count("does not fit: 24") == 3
    assert out.count("with --remat blocks it fits: 12") == 3
    assert out.count("with --fsdp 4 it does not fit") == 3
    assert re.search(r"with --batch-size \d+ it fits", out)
    tried = {(f.remat, f.fsdp, f.train.batch_size) for f, _, _ in planned}
    assert len(tried) == 4 and len(planned) == 3 * 4


def test_the_planned_recipe_is_that_of_the_default():
    same = dataclasses.replace(Planned().train, batch_size=ImageNet.train.batch_size)
    assert same == ImageNet.train
