"""Trained networks as two files: the same answers, and no others in their place."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import spikejax
from spikejax.data import images
from spikejax.experiment import (
    Experiment,
    open_images,
    run,
    train,
    trained,
)
from spikejax.experiment.trained import SHIPPED, load, round_weights, save
from spikejax.train import TrainConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    experiment = Experiment(
        tmp_path_factory.mktemp("run"), train=TrainConfig(steps=2, batch_size=8, seed=3)
    )
    run(experiment, open_images(experiment))
    return experiment.workdir


@pytest.fixture(scope="module")
def digits():
    test = open_images(Experiment(Path("unused"))).data.test
    return test.take(range(16))


def test_a_finished_run_is_loaded_without_its_data(folder, digits):
    model, card = load(folder)
    result = json.loads((folder / "result.json").read_text())
    assert card.result == result and card.flags["seed"] == 3
    with pytest.raises(ValueError, match=r"VGG: expected images \[B, T, H, W, 1\]"):
        model(digits["image"])  # [B, H, W, C], without time
    assert card.class_names == [str(k) for k in range(10)] and card.shape == [8, 8, 1]
    # The run's own network and input, made again from its flags.
    experiment = Experiment(folder, train=TrainConfig(steps=2, batch_size=8, seed=3))
    task = open_images(experiment)
    fitted = train(experiment, task)
    xs = task.encode(jnp.asarray(digits["image"]), None)
    np.testing.assert_array_equal(card.encode(digits["image"]), xs)
    np.testing.assert_array_equal(model(xs), fitted.model(xs))


def test_of_events_the_frames_are_the_input(folder):
    card = dataclasses.replace(load(folder).card, mean=None, std=None)
    frames = np.arange(128, dtype=np.uint8).reshape(1, 2, 8, 8, 1)
    np.testing.assert_array_equal(card.encode(frames), frames.astype(np.float32))
    surfaces = np.exp(-frames / 100)  # those of voxels and surfaces are no counts
    np.testing.assert_array_equal(card.encode(surfaces), surfaces.astype(np.float32))
    with pytest.raises(ValueError, match=r"frames \[B, T, 8, 8, 1\] as in training"):
        card.encode(frames[0])


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((8, 8, 1), np.uint8),
        np.zeros((1, 8, 8, 1)),
        np.zeros((1, 8, 8, 3), "u1"),
        np.zeros((1, 16, 8, 1), "u1"),
    ],
)
def test_images_are_raw_ones(folder, images):
    with pytest.raises(ValueError, match=r"expected uint8 images \[B, 8, 8, 1\] as in"):
        load(folder).card.encode(images)


def test_eight_bits_keep_rounded_weights_to_the_bit(folder, digits, tmp_path):
    model, card = load(folder)
    rounded = round_weights(model)
    save(tmp_path, rounded, card)
    with np.load(tmp_path / "weights.npz") as file:
        kinds = {path: file[path].dtype for path in file.files}
    assert kinds["convs/0/kernel"] == np.int8 and kinds["dense/0/kernel"] == np.int8
    assert kinds["convs/0/kernel:scale"] == kinds["norms/0/scale"] == np.float32
    xs = card.encode(digits["image"])
    np.testing.assert_array_equal(load(tmp_path).model(xs), rounded(xs))
    # Half a step of 127 per output is the largest change.
    for before, after in zip(model.convs, rounded.convs, strict=True):
        step = np.abs(before.kernel[...]).max((0, 1, 2)) / 127
        assert np.all(np.abs(before.kernel[...] - after.kernel[...]) <= 0.51 * step)
    again = round_weights(rounded).convs[0].kernel
    np.testing.assert_array_equal(again, rounded.convs[0].kernel)


def test_random_keys_are_kept(folder, tmp_path, monkeypatch):
    """Such as those of a General SNN, which draws spikes in evaluation too."""

    def build(*_, seed, **__):
        rngs = nnx.Rngs(seed)  # layer 10 is saved after layer 2, and not before it
        layers = [nnx.Linear(1, 1, rngs=rngs) for _ in range(12)]
        return nnx.Sequential(*layers, nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=seed)))

    card = load(folder).card
    monkeypatch.setattr(trained, "build_model", build)
    model = build(seed=5)
    model(jnp.ones((1, 1)))  # draws a number
    save(tmp_path, model, card)
    again = load(tmp_path).model
    kept, expected = (nnx.state(m) for m in (again, model))
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool(jnp.all(a == b)), kept, expected)
    )


def test_a_loaded_run_is_exported_for_any_number_of_images(folder, digits):
    """The recipe of docs/model.md."""
    model, card = load(folder)
    graphdef, state = nnx.split(model)

    @jax.jit
    def classify(raw):
        return nnx.merge(graphdef, state)(card.encode(raw)).mean(1)

    shape = export.symbolic_shape("b, 8, 8, 1")
    exported = export.export(classify)(jax.ShapeDtypeStruct(shape, jnp.uint8))
    raw = digits["image"]
    expected = model(card.encode(raw)).mean(1)
    np.testing.assert_allclose(exported.call(raw), expected, atol=1e-5)
    np.testing.assert_allclose(exported.call(raw[:3]), expected[:3], atol=1e-5)
    pytest.importorskip("flatbuffers")
    loaded = export.deserialize(bytearray(exported.serialize()))
    np.testing.assert_allclose(loaded.call(raw), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["card.json", "weights.npz"])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damaged_files_are_one_line(folder, tmp_path, name, damage):
    copy = tmp_path / "run"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("checkpoints"))
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 128
    damaged = {"cut": content[: len(content) // 2], "flip": content, "empty": b""}
    (copy / name).write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=f"load: expected the files .* in {copy}, got"):
        load(copy)


def test_weights_of_another_network(folder, tmp_path):
    model, card = load(folder)
    save(tmp_path, model, card)
    content = json.loads((tmp_path / "card.json").read_text())
    content["flags"]["model"] = "eventnet"
    (tmp_path / "card.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="got: arrays of another network. Copy it"):
        load(tmp_path)


def test_names_and_folders_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"load: .* spikejax\.pretrained\('cif"):
        spikejax.load(tmp_path)
    with pytest.raises(
        ValueError, match="one of cifar10-lif, cifar10-mt4, .*, got 'resnet'."
    ):
        spikejax.pretrained("resnet")
    with pytest.raises(AttributeError, match="'spikejax' has no attribute 'lode'"):
        spikejax.lode  # noqa: B018
    (tmp_path / "fit.json").write_text("{}")
    with pytest.raises(ValueError, match=r"of an experiment, got .* of fit\(\), which"):
        spikejax.load(tmp_path)


def test_a_package_that_is_missing_is_named_with_its_command(monkeypatch):
    monkeypatch.delitem(sys.modules, "spikejax.experiment.trained")
    monkeypatch.setitem(sys.modules, "spikejax.experiment.trained", None)
    message = r"spikejax\.load: expected the package .*, got none\. pip install 'spikej"
    with pytest.raises(ModuleNotFoundError, match=message):
        spikejax.load  # noqa: B018
    assert {"load", "pretrained", "LIF"} <= set(dir(spikejax))


def test_files_are_a_list_of_files(folder, tmp_path):
    read = load(folder).card.read
    with pytest.raises(ValueError, match="expected a list of files, got cat.jpg"):
        read("cat.jpg")
    with pytest.raises(ValueError, match=f"got the folder {tmp_path}, whose files"):
        read([tmp_path])


def test_the_shipped_network_gives_the_logits_that_it_was_shipped_with():
    model, card = spikejax.pretrained("cifar10-mt4")
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    expected = [
        *(-0.3072, -0.5449, 1.2817, 0.4103, 0.9908),
        *(-0.4391, 0.0925, -0.5514, -0.4717, -0.4599),
    ]
    np.testing.assert_allclose(model(card.encode(pixels))[0, 0], expected, atol=1e-3)
    assert card.notes["accuracy"] == {"float32": 0.922, "8 bits": 0.9231}
    assert card.result["accuracy"] == 0.9231 and card.notes["commit"] == "8c09212"
    files = (SHIPPED / "cifar10-mt4").iterdir()
    assert sum(path.stat().st_size for path in files) < 2 * 2**20


@pytest.mark.parametrize(
    "name, right", [("cifar10-mt4", 234), ("cifar10-lif", 225), ("cifar10-relu", 236)]
)
def test_shipped_networks_name_real_images(name, right, data_dir):
    model, card = spikejax.pretrained(name)
    batch = images.load("cifar10", data_dir).test.take(range(250))
    named = model(card.encode(batch["image"])).mean(1).argmax(-1)
    # Give or take an image whose logits are all but equal.
    assert abs(int((named == batch["label"]).sum()) - right) <= 1


@pytest.mark.parametrize("name, thresholds", [("cifar10-mt4", 4), ("cifar10-lif", 1)])
def test_behind_the_input_every_weight_of_a_shipped_network_meets_spikes(
    name, thresholds
):
    model, card = spikejax.pretrained(name)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    logits, report = spikejax.spike_driven(model, card.encode(pixels))
    assert [layer.trains for layer in report.layers] == [0] + 7 * [thresholds]
    assert report.layers[0].reason == "the input"
    np.testing.assert_allclose(logits, model(card.encode(pixels)), atol=1e-5)
