"""The benchmark measures what it says; how fast that is, no test asks."""

import dataclasses
import json
import zipfile
from functools import partial

import numpy as np
import pytest
from PIL import Image

from benchmarks import devices, general_step, growth, neuron, parallel, pipeline, turns
from benchmarks.pipeline import Pipeline
from benchmarks.workloads import Sizes


def test_each_crop_of_photographs_is_a_row(tmp_path):
    grey = Image.fromarray(np.full((40, 60), 99, np.uint8))
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        for i in range(3):
            with archive.open(f"{i}.JPEG", "w") as file:
                grey.save(file, "JPEG")
        archive.writestr("README", "no image")
    pipeline.main(Pipeline(tmp_path, photographs=tmp_path / "some.zip", seconds=0.01))
    rows = json.loads((tmp_path / "pipeline.json").read_text())
    assert len(rows) == 5
    assert any("photographs, inception 224" in row["workload"] for row in rows)
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
    low, high = windows["quartiles_ms"]
    assert 0 < low <= windows["median_ms"] <= high
    assert windows["ratio"] == turns.ratio(windows, relu)[1]


def test_general_step_measures_at_least_one_step():
    with pytest.raises(ValueError, match="repeats: expected at least 1, got 0"):
        general_step.Benchmark(repeats=0)


def test_layers_of_neurons_stand_against_copies_of_the_same_arrays(
    tmp_path, capsys, monkeypatch
):
    few = {name: neuron.LAYERS[name] for name in ("ReLU", "LIF", "adaptive")}
    monkeypatch.setattr(neuron, "LAYERS", few)
    small = {"repeats": 2, "time_steps": (1, 6), "maps": 6, "side": 2, "channels": 2}
    neuron.main(neuron.Benchmark(tmp_path, **small))
    rows = json.loads((tmp_path / "neuron.json").read_text())
    found = {(row["layer"], row["pass"], row["time_steps"]): row for row in rows}
    assert len(found) == len(rows) == 4 * 2 * 2
    for row in rows:
        assert row["shape"] == [6 // row["time_steps"], row["time_steps"], 2, 2, 2]
        low, high = row["ratio_quartiles"]
        assert 0 < low <= row["ratio"] <= high and row["cpu_ratio"] > 0
        assert len(row["steps_ms"]) == len(row["cpu_steps_ms"]) == 2
    for which in ("forward", "gradient"):
        for layer in ("copy", "ReLU"):
            assert found[layer, which, 6]["bytes_to_least"] == 1
        assert found["copy", which, 6]["ratio"] == 1
        assert found["LIF", which, 1]["bytes_to_least"] >= 1
        assert found["LIF", which, 1]["scratch_arrays"] == 0
        assert found["LIF", which, 6]["bytes_to_least"] is None
    said = capsys.readouterr().out
    assert "Forward of 6 maps of 2x2x2" in said and "Gradient of 6" in said


def test_the_gradient_of_a_benchmark_is_by_the_currents():
    xs, gs = np.array([[[-2.0], [3.0]]]), np.array([[[5.0], [7.0]]])
    made = neuron.functions()
    np.testing.assert_array_equal(made["ReLU", "gradient"](xs, gs), [[[0.0], [7.0]]])
    np.testing.assert_array_equal(made["copy", "gradient"](xs, gs), xs / 2 + 2 * gs)
    assert made["LIF", "gradient"](xs, gs).all()


def test_three_ways_through_time_have_one_answer(tmp_path, capsys):
    """The script itself compares spikes and gradients, and stops where they differ."""
    small = {"repeats": 1, "time_steps": (6,), "widths": (3,), "batch_size": 2}
    parallel.main(parallel.Benchmark(tmp_path, **small))
    rows = json.loads((tmp_path / "parallel.json").read_text())
    assert {row["way"] for row in rows} == {"loop", "membrane", "scan"}
    assert len(rows) == 3 * 2 * 2 and all(row["cpu_ratio"] > 0 for row in rows)
    assert "membrane" in capsys.readouterr().out
    with pytest.raises(ValueError, match="time_steps: expected above 4, .* got"):
        parallel.Benchmark(time_steps=(4,))


def test_steps_take_turns_of_two_and_the_second_counts():
    taken = []
    steps = {name: partial(taken.append, name) for name in "ab"}
    times = turns.in_turns(steps, 3)
    assert "".join(taken) == "aabb" * 3
    low, high = times["a"]["quartiles_ms"]
    assert 0 < low <= times["a"]["median_ms"] <= high
    assert len(times["b"]["steps_ms"]) == len(times["b"]["cpu_steps_ms"]) == 3


def test_neuron_needs_time_steps_that_divide_the_maps():
    with pytest.raises(ValueError, match="repeats: expected at least 1, got 0"):
        neuron.Benchmark(repeats=0)
    message = r"time_steps: expected divisors of the 8 maps, got \(4, 3\)\."
    with pytest.raises(ValueError, match=message):
        neuron.Benchmark(time_steps=(4, 3), maps=8)


def test_each_size_is_a_row_and_each_sweep_a_panel(tmp_path, monkeypatch, capsys):
    small = Sizes("convolutions", 2, 1, 8, (2, 2, 4))
    sweep = growth.Sweep(
        "tiny", "LIF", {t: dataclasses.replace(small, time_steps=t) for t in (1, 3)}
    )
    monkeypatch.setattr(growth, "SWEEPS", {"time steps": sweep, "again": sweep})
    growth.main(growth.Growth(tmp_path, repeats=1))
    rows = json.loads((tmp_path / "growth.json").read_text())
    assert [(r["grows"], r["size"]) for r in rows[:3]] == [
        ("time steps", 1),
        ("time steps", 3),
        ("again", 1),
    ]
    one, three = rows[:2]
    assert one["unit"] == one["cpu_unit"] == 1
    assert three["operations"] == 3 * one["operations"]
    assert three["unit"] == pytest.approx(three["median_ms"] / one["median_ms"] / 3)
    assert three["peak_mib"] > one["peak_mib"] > 0
    said = capsys.readouterr().out
    assert "Time steps: tiny" in said and "operations 1.00" in said
    assert len(growth.draw(rows).axes) == 2
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_a_step_on_more_devices_exchanges_sums_and_nothing_else(tmp_path, capsys):
    with pytest.raises(ValueError, match="batch_size: expected multiples of 8, got 12"):
        devices.Benchmark(batch_size=12)
    devices.main(devices.Benchmark(tmp_path, repeats=1, batch_size=16))
    rows = json.loads((tmp_path / "devices.json").read_text())
    assert [row["devices"] for row in rows] == [1, 2, 4, 8]
    kinds = [{(c["kind"], c["devices"]) for c in row["exchanges"]} for row in rows]
    assert kinds == [set(), *({("all-reduce", n)} for n in (2, 4, 8))]
    for row in rows[1:]:
        # Sums in another order: rounding moves a spike here and there.
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=2e-3)
        assert row["exchanges"][0]["bytes"] > 4 * 400_000  # all gradients
    assert "CPU, to one" in capsys.readouterr().out


def test_operations_are_those_of_the_convolutions_and_slopes_their_exponent():
    sizes = Sizes("convolutions", 5, 2, 8, (4, 6, 7))
    by_hand = 9 * (3 * 4 * 64 + 4 * 6 * 16 + 6 * 7 * 4)
    assert growth.operations(sizes) == 5 * 2 * by_hand
    rows = [{"size": n, "ms": 7 * n**1.5} for n in (1, 2, 8)]
    assert growth.slope(rows, "ms") == pytest.approx(1.5)
    wide = growth.SWEEPS["width"].sizes
    assert wide[2].channels == (128, 256, 512) and wide[0.25].channels == (16, 32, 64)


def test_growth_measures_at_least_one_step():
    with pytest.raises(ValueError, match="repeats: expected at least 1, got 0"):
        growth.Growth(repeats=0)
