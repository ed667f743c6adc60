"""The demo: five networks side by side, or one."""

import json
import re

import pytest
from test_flags import command

from experiments import digits
from spikejax.experiment import config as experiment

RESULT = {"seconds": 12.4, "spikes_per_image": 2345.6, "energy_nj": 1234.5}
RESULT |= {"ann_energy_nj": 9876.5}


@pytest.fixture
def trained(monkeypatch):
    """The experiments that the demo would run."""
    ran = []

    def run(flags, *_):
        ran.append(flags)
        return RESULT | {"accuracy": len(ran) / 8}

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
    assert all(row.items() >= RESULT.items() for row in rows)
    assert [row["accuracy"] for row in rows] == [1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8]
    assert (tmp_path / "digits.png").read_bytes()[:4] == b"\x89PNG"
    folders = ["lif-t1", "mt-parallel-t1", "mt-cascade-t1", "lif-t4", "relu-t1"]
    assert [flags.workdir for flags in trained] == [tmp_path / f for f in folders]
    for flags, row in zip(trained, rows, strict=True):
        activation, steps = flags.activation, flags.time_steps
        assert (activation.neuron, steps) == (row["neuron"], row["time_steps"])
        assert getattr(activation, "num_thresholds", 1) == row["num_thresholds"]
        assert flags.train.seed == 5
    out = capsys.readouterr().out
    assert "digits, 297 test images" in out
    for name, row in zip(digits.NETWORKS, rows, strict=True):
        assert re.search(rf"{re.escape(name)} .*{row['accuracy']:.2%}", out)


def test_with_a_neuron_the_demo_trains_that_one(trained, tmp_path, monkeypatch, capsys):
    command(monkeypatch, "--workdir", tmp_path, "--neuron", "mt-cascade")
    (flags,) = trained
    assert flags.activation.neuron == "mt-cascade" and flags.workdir == tmp_path
    assert not (tmp_path / "summary.json").exists()
    assert "accuracy 12.50%" in capsys.readouterr().out


def test_the_networks_of_the_demo_have_their_own_time_steps(tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        command(monkeypatch, "--workdir", tmp_path, "--time-steps", 2)
    assert not any(tmp_path.iterdir())


def test_a_demo_that_was_stopped_writes_no_summary(tmp_path, monkeypatch):
    (tmp_path / "left").mkdir()
    monkeypatch.setattr(digits, "run", lambda *_: None)
    command(monkeypatch, "--workdir", tmp_path)
    assert not (tmp_path / "summary.json").exists()
