"""The script for speech, from flags to result.json and a network that loads."""

import json

import numpy as np
import pytest

import spikejax
from experiments import speech as script
from spikejax import energy, losses
from spikejax.data import sequences
from spikejax.experiment.cli import checked, override


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Sequences of 2 to 6 steps whose class is the largest of three numbers."""
    rng = np.random.default_rng(0)

    def split(count):
        labels = rng.integers(0, 3, count)
        rows = [
            2 * np.eye(3)[label] + rng.normal(size=(n, 3))
            for n, label in zip(rng.integers(2, 7, count), labels, strict=True)
        ]
        return sequences.pad([np.float32(row) for row in rows], labels, 6)

    made = sequences.SequenceSet(split(64), split(24), ("a", "b", "c"), "made up")
    monkeypatch.setattr(script, "load", lambda *_: made)
    return made


def flags(**changes):
    options = {"time_steps": 6, "hidden": 16, "layers": 1, "batch_size": 16}
    options["learning_rate"] = 0.03
    return checked(override(script.DEFAULT, options | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"recurrent": True, "delays": 2, "neuron": "mt-parallel", "readout": "max"},
        {"model": "linear", "neuron": "relu"},
    ],
    ids=["recurrent", "linear"],
)
def test_it_trains_and_reports_and_the_network_loads(tmp_path, tiny, changes, capsys):
    script.main(flags(workdir=tmp_path, epochs=10.0, evaluate_every=10.0, **changes))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["accuracy"] > 0.6 and result["split"] == "made up"  # by chance 1/3
    out = capsys.readouterr().out
    assert f"{result['accuracy']:.2%} of 24" in out and "made up" in out

    model, card = spikejax.load(tmp_path)
    test = tiny.test
    logits = model(card.encode(test.values))
    takes_max = changes.get("readout") == "max"
    readout = losses.max_over_time if takes_max else losses.mean_over_time
    right = readout(logits, test.lengths).argmax(-1) == test.labels
    assert float(right.mean()) == pytest.approx(result["accuracy"])
    spent = energy.measure(model, card.encode(test.values), test.lengths)
    assert spent.spikes_per_image == pytest.approx(result["spikes_per_image"])
    assert spent.energy_nj == pytest.approx(result["energy_nj"])
    assert (spent.spikes_per_image > 0) == ("delays" in changes)
    with pytest.raises(ValueError, match=r"sequences \[B, T, 3\] as in training"):
        card.encode(test.values[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "gru"}, "neuron: expected relu for a network without neurons"),
        ({"model": "linear"}, "neuron: expected relu for a network without neurons"),
        ({"readout": "max", "loss": "tet"}, "loss: expected rate for --readout max"),
        ({"norm_groups": 2}, "norm_groups: expected 1 for a network without norms"),
        ({"data": "shd", "hold_out": "theo"}, "hold_out: expected no such flag for"),
        ({"data": "mnist-1d", "step_ms": 8.0}, "step_ms: expected no such flag for"),
        ({"tau": 0.5}, "tau: expected at least 1, got 0.5"),
        ({"delays": 6}, "delays: expected fewer than the 6 time steps, got 6"),
        ({"layers": 0}, "layers: expected 1 to 100, got 0"),
    ],
)
def test_flags_that_do_not_fit_together(changes, message):
    with pytest.raises(ValueError, match=message):
        flags(**changes)


def test_networks_of_images_refuse_sequences(tmp_path):
    changed = override(script.DEFAULT, {"workdir": tmp_path, "model": "convnet"})
    with pytest.raises(ValueError, match="network over sequences, got convnet, which"):
        checked(changed)
