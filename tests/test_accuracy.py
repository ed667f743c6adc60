"""All sides train alike; how long it takes, no test asks.

One test needs SpikingJelly: see tests/test_versus.py.
"""

import ast
import dataclasses
import json
import os
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest

from benchmarks import accuracy, trainer, turns
from benchmarks.accuracy import OURS, Accuracy, reached
from benchmarks.sides import ours
from benchmarks.trainer import Recipe, batches, correct, trained
from benchmarks.workloads import Run

ROOT = Path(__file__).resolve().parents[1]
TINY = dataclasses.replace(
    accuracy.SIZES, batch_size=4, time_steps=2, side=8, channels=(4, 6, 8)
)
RECIPE = Recipe(steps=5, evaluate_every=2, test_images=6, seed=3, warmup=0.4)


@pytest.fixture
def images(tmp_path):
    """Ten images to train on, seven to test, and the labels of both."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"mean": np.full(3, 0.5), "std": np.full(3, 0.25)}
    for name, count in (("train", 10), ("test", 7)):
        arrays[name] = rng.integers(0, 256, (count, 8, 8, 3), np.uint8)
        arrays[f"{name}_labels"] = rng.integers(0, 10, count).astype(np.int32)
    np.savez(tmp_path / "images.npz", **arrays)
    return tmp_path / "images.npz"


def told(which):
    return json.dumps(dataclasses.asdict(which))


@pytest.mark.parametrize("steps", [1, 7, 100])
def test_the_rate_is_that_of_our_training(steps):
    recipe = Recipe(steps, 1, 1, 0, learning_rate=0.3, warmup=0.21)
    rising = int(0.21 * steps)
    schedule = optax.warmup_cosine_decay_schedule(
        0.3 / max(1, rising), 0.3, rising, steps
    )
    rates = [recipe.rate(step) for step in range(steps + 1)]
    expected = [np.asarray(schedule(step)) for step in range(steps + 1)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-7)


def test_an_epoch_has_each_image_once_in_a_new_order():
    pixels = np.arange(11, dtype=np.uint8).reshape(11, 1, 1, 1)
    pixels = np.broadcast_to(pixels, (11, 9, 9, 1))  # the middle stays in the crop
    labels = np.arange(11)
    epochs = []
    stream = batches(pixels, labels, 5, seed=1)
    for _ in range(2):
        seen = list(islice(stream, 2))
        for xs, classes in seen:
            assert xs.shape == (5, 9, 9, 1) and xs.dtype == np.uint8
            np.testing.assert_array_equal(xs[:, 4, 4, 0], classes)
        epochs.append(np.concatenate([classes for _, classes in seen]).tolist())
    assert len(set(epochs[0])) == len(set(epochs[1])) == 10
    assert epochs[0] != epochs[1]


def test_images_are_shifted_and_mirrored_at_random_and_as_the_seed_says():
    image = np.arange(1, 76, dtype=np.uint8).reshape(1, 5, 5, 3)
    padded = np.pad(image[0], ((4, 4), (4, 4), (0, 0)))
    corners = [(y, x) for y in range(9) for x in range(9)]
    parts = {padded[y : y + 5, x : x + 5].tobytes() for y, x in corners}
    parts |= {padded[y : y + 5, x : x + 5][:, ::-1].tobytes() for y, x in corners}
    many, labels = np.repeat(image, 4000, 0), np.zeros(4000)
    xs, _ = next(batches(many, labels, 4000, seed=0))
    assert {x.tobytes() for x in xs} == parts
    again, _ = next(batches(many, labels, 4000, seed=0))
    other, _ = next(batches(many, labels, 4000, seed=1))
    np.testing.assert_array_equal(xs, again)
    assert not np.array_equal(xs, other)


def test_what_fills_the_last_batch_does_not_count(monkeypatch):
    monkeypatch.setattr(trainer, "EVALUATED", 4)
    images = np.eye(10, dtype=np.float32)[[3, 1, 4, 1, 5, 9]].reshape(6, 1, 1, 10)
    labels, sizes = np.array([3, 1, 4, 0, 5, 0]), []

    def answer(xs):
        sizes.append(len(xs))
        return xs[:, 0, 0]

    assert correct(answer, images, labels) == 4 / 6
    assert sizes == [4, 4]


def test_training_learns_what_it_is_shown(images):
    recipe = dataclasses.replace(RECIPE, steps=60, evaluate_every=30)
    ready, *rows = trained(
        "ours", "multi-threshold", 1, told(TINY), told(recipe), images
    )
    assert ready == {}
    assert [row["step"] for row in rows] == [30, 60]
    assert rows[1]["loss"] < rows[0]["loss"] < np.log(10) + 0.5
    assert rows[0]["seconds"] < rows[1]["seconds"]
    assert rows[0]["cpu_seconds"] < rows[1]["cpu_seconds"]
    assert rows[0]["first_step_s"] > rows[0]["median_ms"] / 1000 > 0


def test_evaluation_has_the_statistics_of_training():
    recipe = dataclasses.replace(RECIPE, steps=100)
    step, answer = ours.train(TINY, "LIF", recipe)
    rng = np.random.default_rng(0)
    xs = rng.standard_normal((4, 8, 8, 3)).astype(np.float32)
    before = answer(xs)
    for _ in range(100):
        step(xs, np.arange(4))
    assert before.shape == (4, 10)
    assert answer(xs).argmax(-1).tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(answer(xs)[:1], answer(xs[:1]), rtol=1e-4, atol=1e-5)


def test_thresholds_are_half_a_standard_deviation_apart(monkeypatch):
    made = []
    graphs = ours.graphs
    monkeypatch.setattr(ours, "graphs", lambda n: made.append(n) or graphs(n))
    for mode in ("multi-threshold", "LIF"):
        ours.train(TINY, mode, RECIPE)
    scales = [[float(n.scale[...].max()) for n in each.norms] for each in made]
    assert scales == [[2.0] * 3, [1.0] * 3]


def test_targets_are_reached_at_an_evaluation():
    rows = [
        {"step": 10 * n, "seconds": 3 * n, "cpu_seconds": 5 * n, "median_ms": 100 * n}
        | {"accuracy": a}
        for n, a in ((1, 0.3), (2, 0.5), (3, 0.4))
    ]
    expected = {"step": 20, "seconds": 6, "cpu_seconds": 10, "quiet_seconds": 6}
    assert reached(rows, 0.5) == reached(rows, 0.31) == expected
    assert reached(rows, 0.51) is None


def test_a_run_that_was_broken_off_is_not_shown(tmp_path):
    given = Accuracy(workdir=tmp_path)
    recipe = dataclasses.replace(RECIPE, steps=20)
    about = {"recipe": dataclasses.asdict(recipe), "device": given.device}
    for name, last in (("whole", 20), ("broken", 10)):
        rows = [about | row("spikejax", name, step, 1, 0.5) for step in (5, last)]
        text = "".join(json.dumps(each) + "\n" for each in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    assert list(accuracy.evaluations(given, recipe)) == ["whole"]


def row(library, label, step, seconds, hit):
    return {
        "library": library,
        "label": label,
        "step": step,
        "seconds": seconds,
        "cpu_seconds": 2 * seconds,
        "median_ms": 500,
        "accuracy": hit,
    }


def test_ratios_are_to_spikingjelly(capsys):
    theirs = [row("SpikingJelly", "SpikingJelly compiled, T=4", 40, 100, 0.6)]
    mine = [row("spikejax", "spikejax LIF, T=4", 20, 25, 0.65)]
    found = {rows[0]["label"]: rows for rows in (theirs, mine)}
    accuracy.show(found, 0.6)
    said = capsys.readouterr().out
    for cell in ("To 60.0%", "100 (1.00)", "25 (0.25)", "50 (0.25)", "10 (0.50)"):
        assert cell in said, said
    accuracy.show(found, 0.62)
    said = capsys.readouterr().out
    assert "not reached: 60.00%" in said and "(" not in said


def test_one_command_writes_tables_lines_and_a_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accuracy, "DATA", "fake")
    sizes = dataclasses.replace(TINY, batch_size=512)
    monkeypatch.setattr(accuracy, "SIZES", sizes)
    given = Accuracy(
        tmp_path / "new",
        peers=tmp_path / "none",
        epochs=0.75,
        target=(0.01, 1.0),
        test_images=50,
        threads=1,
    )
    accuracy.main(given)
    said = capsys.readouterr().out
    assert f"Left out, as there is no {given.peers}: SpikingJelly." in said
    assert "spikejax multi-threshold, T=1: step 3 of 3" in said
    assert "To 1.0%" in said and "not reached" in said
    path = tmp_path / "new/spikejax-multi-threshold-T1.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["recipe"]["test_images"] == 50 and rows[0]["time_steps"] == 1
    assert (tmp_path / "new/accuracy.png").stat().st_size > 5000
    # What was trained with the same recipe stays; with another it is no comparison.
    accuracy.main(dataclasses.replace(given, train="theirs"))
    assert "spikejax multi-threshold, T=1" in capsys.readouterr().out
    accuracy.main(dataclasses.replace(given, train="theirs", seed=1))
    assert "spikejax" not in capsys.readouterr().out.replace(str(tmp_path), "")


def test_a_loss_that_is_no_number_ends_the_run(images):
    recipe = dataclasses.replace(RECIPE, learning_rate=1e30, warmup=0.0)
    rows = trained("ours", "LIF", 2, told(TINY), told(recipe), images)
    with pytest.raises(FloatingPointError, match="the loss became (nan|inf) at step"):
        list(rows)


def test_a_run_that_ends_says_why_in_a_line(tmp_path, capsys):
    env = turns.environment(1, "cpu")  # there are no images in the folder
    accuracy.train(OURS[1], Accuracy(tmp_path), RECIPE, env)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "spikejax LIF, T=4: starts, 5 steps"
    assert said[1].startswith("spikejax LIF, T=4: FileNotFoundError: [Errno 2] No such")
    assert len(said) == 2


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("epochs", 0.0, "more than 0"),
        ("target", (), "accuracies, more than 0 and at most 1"),
        ("target", (0.5, 60.0), "accuracies, more than 0 and at most 1"),
        ("evaluate_every", 0.0, "more than 0 epochs"),
        ("test_images", 0, "at least 1"),
        ("threads", -1, f"0 (all) to {turns.processors()}, the processors here"),
        ("threads", 999, f"0 (all) to {turns.processors()}, the processors here"),
        ("seed", -1, "0 or more"),
    ],
)
def test_flags_that_cannot_be(name, value, wanted):
    with pytest.raises(ValueError) as error:
        Accuracy(**{name: value})
    assert str(error.value) == f"{name}: expected {wanted}, got {value}."


def test_the_other_interpreter_needs_neither_jax_nor_spikejax():
    tree = ast.parse((ROOT / "benchmarks/trainer.py").read_text())
    found = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    found |= {str(n.module) for n in tree.body if isinstance(n, ast.ImportFrom)}
    roots = {name.split(".")[0] for name in found} - set(sys.stdlib_module_names)
    assert roots == {"numpy", "benchmarks"}


def test_spikingjelly_trains_alike(images, tmp_path, monkeypatch):
    peers = Path(os.environ.get("SPIKEJAX_PEERS", ROOT / ".venv-peers/bin/python"))
    if not peers.exists():
        pytest.skip(f"no SpikingJelly at {peers}: make bench installs it")
    monkeypatch.setattr(accuracy, "SIZES", TINY)
    given = Accuracy(tmp_path, peers=peers)
    theirs = Run("SpikingJelly", "multi-step", 2)
    accuracy.train(theirs, given, RECIPE, turns.environment(1, "cpu"))
    path = tmp_path / "SpikingJelly-multi-step-T2.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    _, *mine = trained("ours", "LIF", 2, told(TINY), told(RECIPE), images)
    assert [row["step"] for row in rows] == [row["step"] for row in mine] == [2, 4, 5]
    # Of steps 1 and 2, 3 and 4, and 5: momentum, decay and rate are the same.
    losses = [row["loss"] for row in rows]
    np.testing.assert_allclose(losses, [row["loss"] for row in mine], rtol=1e-4)
