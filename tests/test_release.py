"""Networks of runs as files of the package."""

import json

import numpy as np
import pytest

from experiments import release
from spikejax.experiment import Experiment, open_images, run, trained
from spikejax.train import TrainConfig


def test_a_run_becomes_a_network_of_the_package(tmp_path, monkeypatch, capsys):
    recipe = TrainConfig(steps=2, batch_size=8)
    experiment = Experiment(tmp_path / "run", train=recipe)
    run(experiment, open_images(experiment))
    for module in (release, trained):
        monkeypatch.setattr(module, "SHIPPED", tmp_path / "weights")
    flags = release.Release(str(tmp_path / "run"), "digits-mt4", "the command", "abc")
    release.main(flags)
    assert "Written: " in capsys.readouterr().out

    model, card = trained.pretrained("digits-mt4")
    digits = open_images(experiment).data
    right, count = trained.evaluate(trained.Trained(model, card), digits)
    assert card.result["accuracy"] == card.notes["accuracy"]["8 bits"] == right / count
    before = json.loads((tmp_path / "run/result.json").read_text())["accuracy"]
    assert card.notes["accuracy"]["float32"] == pytest.approx(before)
    assert set(card.notes["accuracy at more time steps"]) == {"T=2", "T=4"}
    assert card.notes["command"] == "the command" and card.notes["commit"] == "abc"
    with np.load(tmp_path / "weights/digits-mt4/weights.npz") as file:
        assert file["convs/0/kernel"].dtype == np.int8


def test_names_are_plain_words():
    with pytest.raises(ValueError, match="name: expected letters, digits and dashes"):
        release.Release("run", "../elsewhere")
    with pytest.raises(ValueError, match="network: expected the folder of a finished"):
        release.main(release.Release())
