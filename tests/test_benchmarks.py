"""The benchmark measures what it says; how fast that is, no test asks."""

import json

import pytest

from benchmarks import training_step
from benchmarks.training_step import Benchmark
from spikejax import LIF


def test_each_network_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(
        training_step,
        "NETWORKS",
        {"ReLU, T=1": training_step.NETWORKS["ReLU, T=1"], "LIF, T=2": (LIF, 2)},
    )
    training_step.main(Benchmark(tmp_path, repeats=2, batch_size=2))
    relu, lif = json.loads((tmp_path / "bench.json").read_text())
    assert relu["workload"] == "training step, ReLU, T=1" and relu["ratio_to_relu"] == 1
    assert lif["peak_mib"] > relu["peak_mib"] > 5  # 4.3 MiB are weights and momentum
    assert 0 < lif["min_ms"] <= lif["median_ms"] <= lif["max_ms"]


def test_it_measures_at_least_one_step():
    with pytest.raises(ValueError, match="bench: expected repeats and batch_size >= 1"):
        training_step.measure(Benchmark(repeats=0))
