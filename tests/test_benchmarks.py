"""The benchmark measures what it says; how fast that is, no test asks."""

import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from benchmarks import general_step, pipeline
from benchmarks.pipeline import Pipeline


def test_each_crop_of_photographs_is_a_row(tmp_path):
    grey = Image.fromarray(np.full((40, 60), 99, np.uint8))
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        for i in range(3):
            with archive.open(f"{i}.JPEG", "w") as file:
                grey.save(file, "JPEG")
        archive.writestr("README", "no image")
    pipeline.main(Pipeline(tmp_path, photographs=tmp_path / "some.zip", seconds=0.01))
    rows = json.loads((tmp_path / "pipeline.json").read_text())
    assert len(rows) == 5 and "photographs, inception 224" in rows[0]["workload"]
    assert all(row["images"] >= 3 for row in rows)
    assert all(row["images_per_core_second"] > 0 for row in rows)


def test_a_pipeline_needs_a_set():
    with pytest.raises(ValueError, match="pipeline: expected --cifar10, .* got none"):
        pipeline.measure(Pipeline())


def test_each_layer_is_a_row(tmp_path, monkeypatch):
    names = ["two convolutions with ReLU", "windows overlapping, conv"]
    few = {name: general_step.LAYERS[name] for name in names}
    monkeypatch.setattr(general_step, "LAYERS", few)
    small = {"repeats": 2, "batch_size": 2, "side": 4, "channels": 2}
    general_step.main(general_step.Benchmark(tmp_path, **small))
    relu, windows = json.loads((tmp_path / "bench.json").read_text())
    assert relu["layer"] == names[0] and relu["ratio"] == 1
    assert 0 < windows["min_ms"] <= windows["median_ms"] <= windows["max_ms"]


def test_general_step_measures_at_least_one_step():
    with pytest.raises(ValueError, match="bench: expected repeats, batch_size, side"):
        general_step.measure(general_step.Benchmark(repeats=0))
