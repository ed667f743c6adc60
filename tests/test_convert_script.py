"""The script of the Noise Adaptor, from flags to summary.json, in a few steps."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import convert as script
from spikejax.experiment.cli import checked, override
from spikejax.nn.quant import QuantReLU


def numbers(model):
    """The weights and statistics of a network."""
    return jax.tree.leaves(nnx.state(model, nnx.Not(nnx.RngState)))


def test_the_script_leaves_a_summary_and_a_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "SAMPLE", 32)
    evaluate, evaluated = script.Conversions.row, []

    def row_of(nets, name, ann, *more):
        """Evaluate the first network, of which the others must be copies."""
        if not evaluated:
            evaluated.append((evaluate(nets, name, ann, *more), nets.sample, ann))
        row, sample, first = evaluated[0]
        assert all(map(np.array_equal, numbers(first), numbers(ann)))
        np.testing.assert_array_equal(nets.sample, sample)
        return dict(row)

    monkeypatch.setattr(script.Conversions, "row", row_of)
    changes = {"workdir": tmp_path, "bits": 3, "max_steps": 2, "test_images": 100}
    flags = override(script.DEFAULT, changes | {"steps": 2, "batch_size": 16})
    script.main(flags)
    (row,) = json.loads((tmp_path / "summary.json").read_text())
    assert row["name"] == "3 bits, noise 1" and row["bits"] == 3
    assert len(row["accuracy"]) == len(row["spikes_per_image"]) == 2
    assert min(row["accuracy"]) >= 0 and max(row["accuracy"]) <= 1
    assert len(row["v_thresholds"]) == len(row["agreement"]) == 3
    assert list(row["energy_nj"]) == ["1", "2"]
    assert 0 < row["energy_nj"]["1"] < row["energy_nj"]["2"]
    exits = row["early_exit"]
    assert 0 <= exits["accuracy"] <= 1 <= exits["mean_steps"] <= 2
    assert (tmp_path / "convert.png").stat().st_size > 1000
    assert "T=2" in capsys.readouterr().out

    # The same command finds both networks trained; another one starts from the first.
    script.main(flags)
    assert json.loads((tmp_path / "summary.json").read_text()) == [row]
    out = capsys.readouterr().out
    assert out.count("nothing is left to train") == 2 and "  loss " not in out
    changes = {"workdir": tmp_path / "later", "relu": tmp_path / "relu"}
    with pytest.raises(ValueError, match="data: expected digits, as in .*, got fake"):
        script.main(override(flags, changes | {"data": "fake"}))
    script.main(override(flags, changes | {"workers": 1}))
    (again,) = json.loads((tmp_path / "later" / "summary.json").read_text())
    assert again == row
    assert not (tmp_path / "later" / "relu").exists()


def test_what_cannot_be_converted_is_refused_before_it_trains():
    for name in ("transformer-small", "general-cnn"):
        with pytest.raises(ValueError, match=f"expected --model .* got '{name}'"):
            override(script.DEFAULT, {"model": name})
    assert override(script.DEFAULT, {"model": "efficientnet-lite0"})
    with pytest.raises(ValueError, match="quant_epochs: expected none with --steps"):
        checked(override(script.DEFAULT, {"steps": 100, "quant_epochs": 5.0}))


def test_a_training_that_is_stopped_ends_the_script_without_an_exit(
    tmp_path, monkeypatch, capsys
):
    """An exit inside of `distributed` could abort the other processes."""
    stopped = SimpleNamespace(finished=False)
    monkeypatch.setattr(script, "train", lambda *_, **__: stopped)
    flags = override(script.DEFAULT, {"workdir": tmp_path})
    script.main(flags)
    assert capsys.readouterr().out == f"{tmp_path}/relu\n"
    assert not (tmp_path / "summary.json").exists()
    monkeypatch.setattr(script.processes, "is_primary", lambda: False)
    script.main(flags)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(("bits", "noise"), [(0, 1), (9, 1), (2, -0.1)])
def test_bits_and_noise_are_those_of_a_quantised_relu(bits, noise):
    def message(make):
        with pytest.raises(ValueError) as error:
            make()
        return str(error.value)

    changes = {"bits": bits, "noise": noise}
    ours = message(lambda: checked(override(script.DEFAULT, changes)))
    rngs = nnx.Rngs(0)
    assert ours == message(lambda: QuantReLU(bits, noise=noise, rngs=rngs))


def test_a_sweep_without_noise_has_each_row_once(tmp_path, monkeypatch):
    class Nets:
        start = sample = None

        def fit(self, _):
            return SimpleNamespace(model=None, metrics={"accuracy": 0.5})

        def quantised(self, *_):
            return self.fit(None)

        def row(self, name, *_):
            return {"name": name}

    monkeypatch.setattr(script, "Conversions", lambda _: Nets())
    made = SimpleNamespace(model=None)
    monkeypatch.setattr(script, "calibrate", lambda *_, **__: made)
    flags = override(script.DEFAULT, {"sweep": True, "noise": 0.0})
    names = [row["name"] for row in script.rows(flags)]
    assert names == ["no training", "2 bits, noise 0", "3 bits, noise 0"]


def test_the_start_must_be_a_relu_network(tmp_path):
    with pytest.raises(ValueError, match="folder with the config.json of a run, got"):
        script.main(dataclasses.replace(script.DEFAULT, relu=tmp_path))
    settings = {"neuron": "lif", "steps": 3}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="a run with --neuron relu, got .* has lif"):
        script.main(dataclasses.replace(script.DEFAULT, relu=tmp_path))
