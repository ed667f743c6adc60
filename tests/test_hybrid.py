"""A converted network trained on as a spiking one."""

import json
from types import SimpleNamespace

import pytest

from experiments import convert, hybrid
from spikejax.experiment import open_images, train
from spikejax.experiment.cli import override


@pytest.fixture(scope="module")
def relu(tmp_path_factory):
    """Train a ReLU network on digits for a few steps, and return its folder."""
    folder = tmp_path_factory.mktemp("relu")
    changes = {"workdir": folder, "steps": 20, "batch_size": 16}
    flags = override(convert.DEFAULT.experiment, changes)
    train(flags, open_images(flags))
    return folder


def test_it_starts_from_the_converted_network(relu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hybrid, "SAMPLE", 32)
    seen = []

    def watched(experiment, task, *, model=None, **more):
        before = model and [float(site.unit[...]) for site in model.sites]
        seen.append((before, train(experiment, task, model=model, **more)))
        return seen[-1][1]

    monkeypatch.setattr(hybrid, "train", watched)
    flags = hybrid.Hybrid(relu, tmp_path, 2, time_steps=2, epochs=0.2)
    hybrid.main(flags)
    first = (tmp_path / "result.json").read_text()
    result = json.loads(first)
    assert result["converted_accuracy"] > 0.2 < result["relu_accuracy"]
    assert result["accuracy"] > 0.2 and result["spikes_per_image"] > 0
    (_, ann), (before, snn) = seen
    after = [float(site.unit[...]) for site in snn.model.sites]
    changes = [abs(a / b - 1) for a, b in zip(after, before, strict=True)]
    assert 0 < min(changes) <= max(changes) < 0.5
    kernels = (net.convs[0].kernel[...] for net in (ann.model, snn.model.model))
    assert abs(next(kernels) - next(kernels)).max() > 0
    out = capsys.readouterr().out
    assert f"converted {result['converted_accuracy']:.2%}" in out

    # The same command finds it trained; another number of steps is another run.
    converted = SimpleNamespace(accuracy=[result["converted_accuracy"]])
    monkeypatch.setattr(hybrid, "evaluate_steps", lambda *_: converted)
    hybrid.main(flags)
    assert (tmp_path / "result.json").read_text() == first
    with pytest.raises(ValueError, match="time_steps"):
        hybrid.main(hybrid.Hybrid(relu, tmp_path, 2, time_steps=1, epochs=0.2))
    with pytest.raises(ValueError, match="a run with --neuron relu, got .*, which has"):
        hybrid.main(hybrid.Hybrid(tmp_path, tmp_path / "again"))


def test_a_stop_while_the_relu_run_is_finished_converts_nothing(
    relu, tmp_path, monkeypatch
):
    stopped = SimpleNamespace(finished=False, model=None, metrics={})
    monkeypatch.setattr(hybrid, "train", lambda *_, **__: stopped)
    hybrid.main(hybrid.Hybrid(relu, tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"time_steps": 0}, "time_steps: expected 1 to 10000, got 0"),
        ({"epochs": 0.0}, "epochs: expected more than 0, got 0.0"),
        ({"num_thresholds": 0}, "num_thresholds: expected"),
    ],
)
def test_flags_have_ranges(changes, text):
    with pytest.raises(ValueError, match=text):
        hybrid.Hybrid(**changes)
