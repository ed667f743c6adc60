"""The script for event cameras, from flags to result.json and a stream."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import dvs_cifar10 as script
from spikejax.experiment.cli import override


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One recording of a bar that goes right, and one of a bar that goes left."""
    path = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    for name, sign in (("left", -1), ("right", 1)):
        t = np.sort(rng.integers(0, 160_000, 4000))
        x = (sign * t // 500 + rng.integers(0, 2, 4000)) % 16
        y, p = rng.integers(0, 16, 4000), rng.integers(0, 2, 4000)
        np.savez(path / f"{name}.npz", x=x, y=y, t=t, p=p, width=16, height=16)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def flags(folder, workdir, **changes):
    options = {
        "data": str(folder),
        "model": "convnet",
        "neuron": "plif",
        "time_steps": 2,
        "frames": "duration",
        "side": 8,
        "window_ms": 8.0,
        "drop": 0.2,
        "noise": 0.01,
        "steps": 2,
        "batch_size": 8,
        "workdir": workdir,
    }
    made = override(script.DEFAULT, options | changes)
    return dataclasses.replace(made, inputs=dataclasses.replace(made.inputs))


def test_it_trains_reports_by_class_and_streams(folder, tmp_path, capsys, monkeypatch):
    chosen, opened, load = flags(folder, tmp_path / "run"), [], script.load_events
    monkeypatch.setattr(
        script, "load_events", lambda *a, **more: opened.append(a) or load(*a, **more)
    )
    script.main(chosen)
    assert len(opened) == 1
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["split"] == "the last fifth of each recording"
    assert result["sensor"] == [16, 16]
    classes = result["accuracy_by_class"]
    assert list(classes) == ["left", "right"]  # with as many recordings each
    assert np.isclose(result["accuracy"], np.mean(list(classes.values())))
    assert "test split: the last fifth" in capsys.readouterr().out

    # The same command with a recording goes on from what is there.
    script.main(override(chosen, {"stream": folder / "right.npz"}))
    said = capsys.readouterr().out
    assert "step 1/" not in said and "latency: median" in said
    lines = (tmp_path / "run/stream.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert f"{len(rows)} steps of 4 ms" in said and len(rows) in (39, 40)
    assert [row["seconds"] for row in rows[:3]] == [0.004, 0.008, 0.012]
    assert {row["class"] for row in rows} <= {"left", "right"}
    assert min(row["latency_ms"] for row in rows) > 0
    assert all(0.5 <= row["probability"] <= 1 for row in rows)  # of two classes


def test_a_stream_that_is_too_short_is_refused(folder, tmp_path):
    chosen = flags(folder, tmp_path)
    short = tmp_path / "short.npz"
    np.savez(short, x=[1, 2], y=[1, 2], t=[5, 99], p=[0, 1])
    event_set = script.load(chosen.inputs, chosen.time_steps)
    with pytest.raises(ValueError, match="at least 4000 us, got .*short.npz of 94 us"):
        script.read_stream(short, 4000, event_set)
    np.savez(short, x=[1, 2], y=[1, 2], t=[5, 9999], p=[0, 1], height=8, width=8)
    message = r"of a camera \(16, 16\), as in training, got .*short.npz of \(8, 8\)"
    with pytest.raises(ValueError, match=message):  # before it trains
        script.main(override(chosen, {"stream": short}))
    np.savez(short, x=[1, 20], y=[1, 2], t=[5, 9999], p=[0, 1])  # no size, but events
    with pytest.raises(ValueError, match=r"got .*short.npz of \[16, 21\]"):
        script.read_stream(short, 4000, event_set)
    np.savez(short, x=[1, 2], y=[1, 2], t=[5, 19999], p=[0, 1], height=16, width=16)
    with pytest.raises(ValueError, match="no more windows than events, got 4 of 4000"):
        script.read_stream(short, 4000, event_set)
    with pytest.raises(ValueError, match="got one of whole recordings. Train with --w"):
        script.read_stream(short, 0, event_set)


def test_a_flag_sorts_events(folder, tmp_path):
    shuffled = tmp_path / "right.npz"
    with np.load(folder / "right.npz") as arrays:
        columns = {name: arrays[name][::-1] for name in "xytp"}
        np.savez(shuffled, width=16, height=16, **columns)
    event_set = script.load(flags(folder, tmp_path).inputs, 2)
    with pytest.raises(ValueError, match=r"right\.npz: expected .* \(--sort\)"):
        script.read_stream(shuffled, 4000, event_set)
    parts = script.read_stream(shuffled, 4000, event_set, sort=True)
    assert (np.diff(np.concatenate(parts)["t"]) >= 0).all()
    assert all(0 <= np.ptp(part["t"]) < 4000 for part in parts if len(part))
    assert override(script.DEFAULT, {"sort": True}).inputs.sort


def test_a_stream_needs_frames_of_a_duration(folder, tmp_path):
    with pytest.raises(ValueError, match="of --frames duration, .* got number"):
        flags(folder, tmp_path, frames="number", stream=folder / "left.npz")


@pytest.mark.parametrize("frames", ["voxel", "surface"])
def test_only_counts_are_thinned(folder, tmp_path, frames):
    chosen = flags(folder, tmp_path, frames=frames)
    with pytest.raises(ValueError, match="expected counts of events, uint8"):
        script.main(chosen)


def test_flags_become_augmentations(folder, tmp_path):
    def steps(side=8, **changes):
        chosen = flags(folder, tmp_path, **changes)
        augment = script.make_augment(chosen.inputs, (side, side, 2))
        images = np.zeros((4, 2, 8, 8, 2), np.uint8)
        images[:, :, 4, 2] = 9
        if augment is None:
            return None
        return augment(images, np.random.default_rng(0)).sum((1, 4))

    assert steps(augment="none", drop=0.0, noise=0.0) is None
    lost = steps(augment="none", drop=0.9, noise=0.0)
    assert lost[:, 4, 2].min() < 36 and lost.sum() == lost[:, 4, 2].sum()
    assert steps(augment="none", drop=0.0, noise=0.5)[:, 0, 0].any()
    flipped = steps(augment="flip-roll", drop=0.0, noise=0.0, side=9)
    assert set(np.argwhere(flipped)[:, 2]) == {2, 5}  # a ninth rolls by no pixel
