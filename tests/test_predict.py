"""Trained networks from the command line: accuracy of a set, names of images."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from experiments import evaluate, predict
from spikejax.experiment import Experiment, open_images, run, trained
from spikejax.experiment.cli import parse, run_cli
from spikejax.experiment.trained import Trained, load
from spikejax.train import TrainConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    recipe = TrainConfig(steps=20, batch_size=48)
    experiment = Experiment(tmp_path_factory.mktemp("run"), train=recipe)
    run(experiment, open_images(experiment))
    return experiment.workdir


def command(script, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words)])
    run_cli(script.main, parse(script.DEFAULT, script.__doc__))


def test_the_accuracy_is_that_of_the_run(folder, monkeypatch, capsys):
    command(evaluate, monkeypatch, folder)
    accuracy = load(folder).card.result["accuracy"]
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"its card says {accuracy:.2%}"
    assert last == f"accuracy {accuracy:.2%} of 297 images"


def test_flip_is_the_mean_with_the_mirror_image(folder, monkeypatch, capsys):
    command(evaluate, monkeypatch, folder, "--flip")
    (line,) = capsys.readouterr().out.splitlines()
    model, card = load(folder)
    batch = open_images(Experiment(folder)).data.test.take(range(297))
    logits = sum(
        np.asarray(model(card.encode(images)).mean(1))
        for images in (batch["image"], batch["image"][:, :, ::-1])
    )
    assert f"{(logits.argmax(-1) == batch['label']).mean():.2%} of 297" in line


def test_images_are_named_with_their_cost(folder, tmp_path, monkeypatch, capsys):
    """An image of another size is cut to its middle square and resized."""
    digit = open_images(Experiment(folder)).data.test.take([0])["image"][0, ..., 0]
    Image.fromarray(digit).save(tmp_path / "same.png")
    wide = np.pad(np.kron(digit, np.ones((4, 4), np.uint8)), [(0, 0), (16, 16)])
    Image.fromarray(wide).convert("RGB").save(tmp_path / "wide.png")
    files = tmp_path / "same.png", tmp_path / "wide.png"
    command(predict, monkeypatch, folder, *files, "--picture", tmp_path / "a.png")
    same, larger, written = capsys.readouterr().out.splitlines()
    model, card = load(folder)
    best = int(model(card.encode(digit[None, ..., None])).mean(1).argmax())
    assert same.startswith(f"{files[0]}: {best} ") and "spikes, " in same
    assert larger.startswith(f"{files[1]}: ") and written.endswith("a.png")
    seen, rows = predict.predict(load(folder), [str(file) for file in files])
    np.testing.assert_array_equal(seen[0, ..., 0], digit)
    assert np.corrcoef(seen[1].ravel(), seen[0].ravel())[0, 1] > 0.95
    assert [len(row.names) for row in rows] == [3, 3]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (624, 420)


def test_a_run_on_something_else_says_what_to_do(folder, monkeypatch):
    card = load(folder).card
    other = Trained(None, replace(card, mean=None, flags={"data": "nmnist"}))
    monkeypatch.setattr(trained, "load", lambda _: other)
    line = r"/run\d, of nmnist\. Its accuracy is in result\.json; in Python, .*load"
    with pytest.raises(ValueError, match=line):
        trained.load_images(str(folder))
    with pytest.raises(ValueError, match="read: expected a network of images"):
        other.card.read(["a.png"])


CHANNELS = "10 classes and 1 channels, as the network has, got fake, which has"


@pytest.mark.parametrize(
    ("script", "words", "line"),
    [
        (predict, [], "network: expected the folder of a finished run"),
        (predict, ["RUN"], "images: expected files of images, got none."),
        (predict, ["RUN", "no.png"], "expected files of images, got no file no.png."),
        (predict, ["nowhere", "a.png"], "cifar10-relu, got nowhere. Rerun the"),
        (predict, ["RUN", __file__], "expected a readable image (JPEG, "),
        (predict, ["RUN", "a.png", "--pictures", "b"], "got --pictures. Did you mean"),
        (evaluate, ["RUN", "--data", "fake"], CHANNELS),
        (evaluate, ["RUN", "--data", "cifar11"], "data: expected digits, fake, "),
        (evaluate, ["."], "network: expected the folder of a finished run, with card"),
    ],
)
def test_wrong_words_are_one_line(script, words, line, folder, monkeypatch, capsys):
    words = [str(folder) if word == "RUN" else word for word in words]
    with pytest.raises(SystemExit):
        command(script, monkeypatch, *words)
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
