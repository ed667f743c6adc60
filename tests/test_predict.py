"""Trained networks from the command line: accuracy of a set, names of images."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from experiments import evaluate, predict, speech
from spikejax import energy
from spikejax.data import sequences
from spikejax.data.speech import log_mel
from spikejax.experiment import Experiment, open_images, run, trained
from spikejax.experiment.cli import checked, override, parse, run_cli
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
    rows = predict.predict(load(folder), [str(file) for file in files])
    np.testing.assert_array_equal(rows[0].seen[..., 0], digit)
    assert np.corrcoef(rows[1].seen.ravel(), rows[0].seen.ravel())[0, 1] > 0.95
    assert [len(row.names) for row in rows] == [3, 3]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (624, 420)


@pytest.mark.parametrize("readout", ["mean", "max"])
def test_recordings_are_named(readout, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(n, 40)).astype("f4") for n in (8, 5, 9, 7) * 2]
    split = sequences.pad(rows, [0, 1, 1, 0] * 2, 9)
    mean, std = (tuple(rng.uniform(1, 2, 40).tolist()) for _ in range(2))
    made = sequences.SequenceSet(split, split, ("no", "yes"), "", mean=mean, std=std)
    monkeypatch.setattr(speech, "load", lambda *_: made)
    options = {"workdir": tmp_path / "run", "readout": readout, "hidden": 8}
    options |= {"batch_size": 8, "epochs": 2.0, "time_steps": 9, "step_ms": 10.0}
    speech.main(checked(override(speech.DEFAULT, options)))

    files = tmp_path / "long.wav", tmp_path / "short.wav"
    for file, count in zip(files, (16000, 3000), strict=True):
        wavfile.write(file, 16000, np.int16(rng.integers(-9000, 9000, count)))
    capsys.readouterr()
    words = tmp_path / "run", *files, "--picture", tmp_path / "a.png"
    command(predict, monkeypatch, *words)
    *lines, _ = capsys.readouterr().out.splitlines()
    model, card = load(tmp_path / "run")
    for file, line in zip(files, lines, strict=True):
        frames = log_mel(wavfile.read(file)[1] / 32768, 16000, step_ms=10.0)
        assert len(frames) > 9  # the steps of the training
        xs = ((frames[:9] - np.float32(mean)) / np.float32(std))[None]
        logits = getattr(np, readout)(model(xs)[0], 0)
        chance = np.exp(logits).max() / np.exp(logits).sum()
        spent = energy.measure(model, xs)
        best = card.class_names[logits.argmax()]
        assert line.startswith(f"{file}: {best} {chance:.1%}, ")
        cost = f"({spent.spikes_per_image:,.0f} spikes, {spent.energy_nj:,.0f} nJ)"
        assert line.endswith(cost)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (624, 420)
    with pytest.raises(ValueError, match="one recording at a time, .* got 2"):
        card.read(files)


@pytest.mark.parametrize(
    ("shape", "page"), [((8, 8, 2), "events"), ((3,), "sequences")]
)
def test_a_run_on_something_else_says_what_to_do(shape, page, folder, monkeypatch):
    flags = {"data": "nmnist"}
    card = replace(load(folder).card, mean=None, shape=shape, flags=flags)
    monkeypatch.setattr(trained, "load", lambda _: Trained(None, card))
    with pytest.raises(ValueError, match=f"one of nmnist. See docs/{page}.md for"):
        predict.main(predict.Prediction(str(folder), ("a.png",)))
    with pytest.raises(ValueError, match=r"run\d, of nmnist. Its accuracy is in its"):
        evaluate.main(evaluate.Evaluation(str(folder)))


CHANNELS = "10 classes and 1 channels, as the network has, got fake, which has"


@pytest.mark.parametrize(
    ("script", "words", "line"),
    [
        (predict, [], "network: expected the folder of a finished run"),
        (predict, ["RUN"], "files: expected photographs or recordings, got"),
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
