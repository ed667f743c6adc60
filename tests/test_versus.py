"""The comparison is fair where a test can tell; how fast anything is, no test asks.

Some tests need the other libraries: they look for an interpreter that has them in
.venv-peers (`make bench` makes it) or in $SPIKEJAX_PEERS, and are skipped without it.
"""

import ast
import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx

from benchmarks import turns, versus, worker
from benchmarks.sides import ours
from benchmarks.turns import Failed, Missing, Worker
from benchmarks.versus import Versus
from benchmarks.workloads import (
    WORKLOADS,
    Run,
    Sizes,
    Workload,
    batch,
    filters,
    weights,
)
from spikejax.models.whitened import patch_basis

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "convolutions": Sizes("convolutions", 4, 2, 8, (4, 6, 8)),
    "linear": Sizes("linear", 3, 7, 0, (12,)),
    "pooled": Sizes("pooled", 4, 3, 8, (4, 6, 24)),
    "resnet18": Sizes("resnet18", 4, 2, 8, (4, 6, 8, 10)),
    # One step: of more, one spike that rounding decides changes all behind it.
    "whitened": Sizes("whitened", 4, 1, 8, (4, 6)),
}
ONE, TWO = Run("spikejax", "LIF", 4), Run("SpikingJelly", "multi-step", 4)


class Scripted:
    """A worker that answers with given times, and notes when it was asked."""

    def __init__(self, name, times, asked):
        self.name, self.times, self.asked = name, iter(times), asked
        self.says = {"parameters": 5, "compiled_mib": None}
        self.is_closed = False

    def step(self):
        self.asked.append(self.name)
        ms = next(self.times)
        if ms is None:
            raise Failed("ended with exit code -9: out of memory")
        said = {"ms": ms, "cpu_ms": 2 * ms, "loss": 1.5, "peak_mib": 7 * ms}
        return said | {"compile_s": 3.0}

    def close(self):
        self.is_closed = True


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(turns, "PAUSE_S", 0)


def scripted(times):
    """Rows of runs that take those times, who was asked when, and the workers."""
    asked, workers = [], []

    def start(run):
        workers.append(Scripted(run.label, times[run], asked))
        return workers[-1]

    turns_taken = len(times[ONE]) - turns.UNTIMED
    rows = turns.take_turns(list(times), start, turns_taken, lambda line: None)
    return rows, asked, workers


def test_runs_take_turns_and_the_first_two_do_not_count():
    rows, asked, workers = scripted({ONE: [500, 90, 4, 2, 3], TWO: [100, 9, 8, 8, 3]})
    assert asked == [ONE.label, TWO.label] * 5
    assert rows[0]["steps_ms"] == [4, 2, 3] and rows[0]["median_ms"] == 3
    assert rows[0]["quartiles_ms"] == [2.5, 3.5] and rows[0]["cpu_ms"] == 6
    assert rows[0]["first_call_s"] == 3.5 and rows[0]["first_loss"] == 1.5
    assert all(worker.is_closed for worker in workers)


def test_the_ratio_is_taken_within_each_turn():
    rows, _, _ = scripted({ONE: [0, 0, 2, 20, 5], TWO: [0, 0, 1, 10, 10]})
    turns.compare(Workload("", TINY["linear"], (), 1), rows)
    # Ratios 2, 2, 0.5; that of the medians would be 0.5.
    assert rows[0]["ratio"] == 2 and rows[0]["ratio_quartiles"] == [1.25, 2]
    assert rows[1]["ratio"] == 1 and rows[0]["reference"] == TWO.label


def test_the_fastest_run_of_the_reference_library_is_the_reference():
    slow = Run("SpikingJelly", "step by step", 4)
    rows, _, _ = scripted({ONE: [0, 0, 6], slow: [0, 0, 4], TWO: [0, 0, 3]})
    turns.compare(Workload("", TINY["linear"], (), 1), rows)
    assert [row["ratio"] for row in rows] == [2, 4 / 3, 1]
    turns.compare(Workload("", TINY["linear"], (), 1, reference="Spyx"), rows)
    assert [row["ratio"] for row in rows] == [1, 4 / 6, 3 / 6]


def test_a_worker_that_ends_is_an_error_and_the_others_go_on():
    rows, asked, _ = scripted({ONE: [1, 1, 1, 1], TWO: [1, 1, None]})
    assert rows[1]["error"] == "ended with exit code -9: out of memory"
    assert "steps_ms" not in rows[1] and rows[0]["steps_ms"] == [1, 1]
    assert asked.count(TWO.label) == 3
    turns.compare(Workload("", TINY["linear"], (), 1), rows)
    assert rows[0]["reference"] == ONE.label


def test_networks_of_other_sizes_are_not_compared():
    rows, _, _ = scripted({ONE: [0, 0, 6], TWO: [0, 0, 3]})
    rows[1]["parameters"] = 6
    turns.compare(Workload("", TINY["linear"], (), 1), rows)
    assert rows[1]["error"] == "6 parameters, spikejax LIF, T=4 has 5"
    assert "ratio" not in rows[1] and rows[0]["ratio"] == 1


def test_peak_memory_is_that_of_a_second_step_of_a_new_worker():
    rows, asked, _ = scripted({ONE: [0, 0, 6], TWO: [0, None]})
    workers = []

    def start(run):
        workers.append(Scripted(run.label, [50, 2], asked))
        return workers[-1]

    turns.add_peaks(rows, [ONE, TWO], start)
    assert rows[0]["peak_mib"] == 14 and "peak_mib" not in rows[1]
    assert len(workers) == 1 and workers[0].is_closed


def spoken(tmp_path, script):
    return Worker([sys.executable, "-c", script], tmp_path / "log", dict(os.environ))


def test_a_worker_answers_a_line_for_a_line(tmp_path):
    worker = spoken(
        tmp_path,
        "import sys\nprint('{\"parameters\": 1}', flush=True)\n"
        "for line in sys.stdin: print('{\"ms\": 2}', flush=True)",
    )
    assert worker.says == {"parameters": 1}
    assert worker.step() == worker.step() == {"ms": 2}
    worker.close()


@pytest.mark.parametrize(
    ("script", "error", "text"),
    [
        ("raise SystemExit('no\\nroom\\n')", Failed, "ended with exit code 1: room"),
        ("", Failed, "ended with exit code 0: it said nothing"),
        ('print(\'{"missing": "spyx"}\')', Missing, "spyx"),
        ('print(\'{"error": "OSError: x"}\')', Failed, "OSError: x"),
    ],
)
def test_a_worker_that_cannot_start_says_why(tmp_path, script, error, text):
    with pytest.raises(error) as caught:
        spoken(tmp_path, script)
    assert str(caught.value) == text


def test_steps_in_a_row_are_timed_as_their_mean(monkeypatch):
    losses, wall, cpu = iter(range(9)), iter([10.0, 18.0]), iter([1.0, 5.0])
    clock = {"perf_counter": lambda: next(wall), "process_time": lambda: next(cpu)}
    monkeypatch.setattr(worker, "time", SimpleNamespace(**clock))
    prepared = SimpleNamespace(step=lambda: next(losses), device_peak=lambda: 2**20)
    row = worker.timed(prepared, 0.0, 4)
    assert row == {"ms": 2000, "cpu_ms": 1000, "peak_mib": 1, "loss": 3}


def test_the_command_from_end_to_end(tmp_path, monkeypatch, capsys):
    runs = Run("spikejax", "LIF", 3), Run("snnTorch", "folded", 3)
    workload = Workload("Tiny", TINY["linear"], runs, 3, "Spyx", peak=True)
    monkeypatch.setattr(versus, "WORKLOADS", {"linear": workload})
    kept = {"workload": "step", "label": "of another day"}
    (tmp_path / "bench.json").write_text(json.dumps([kept]))
    versus.main(Versus(tmp_path, tmp_path / "none", neurons=5, threads=1))
    out = capsys.readouterr().out
    assert f"as there is no {tmp_path / 'none'}: snnTorch. `make bench`" in out
    assert "Tiny, n=5. Ratio: to spikejax LIF, T=3" in out
    other, row, missing = json.loads((tmp_path / "bench.json").read_text())
    assert other == kept and missing["library"] == "snnTorch"
    assert row["parameters"] == 30 and row["threads"] == 1 and row["device"] == "cpu"
    assert len(row["steps_ms"]) == 3 and row["first_call_s"] > row["median_ms"] / 1000
    assert row["ratio"] == 1 and row["peak_mib"] > 0 and row["compiled_mib"] > 0
    assert set(row["versions"]) == {"spikejax", "jax", "flax"}
    assert (tmp_path / "bench.png").stat().st_size > 5000


def test_what_cannot_be_measured_is_one_line():
    with pytest.raises(ValueError, match="repeats: expected at least 1, got 0"):
        Versus(repeats=0)


def test_workloads_name_runs_that_there_are():
    for workload in WORKLOADS.values():
        labels = [run.label for run in workload.runs]
        assert len(set(labels)) == len(labels)
        assert {label for pair in workload.pairs for label in pair} <= set(labels)
        assert {run.library for run in workload.runs} <= set(turns.SIDES)
        mine = {run.mode for run in workload.runs if run.library == "spikejax"}
        assert mine <= {*ours.NEURONS, "LIF recomputed"}
    choices = versus.Versus.__annotations__["workload"].__args__
    assert choices == ("all", *WORKLOADS)


def test_workers_of_others_need_neither_jax_nor_spikejax():
    benchmarks = ROOT / "benchmarks"
    sides = [benchmarks / "sides" / f"{name}.py" for name in ("pytorch", "snntorch")]
    sides.append(benchmarks / "sides/spikingjelly.py")
    for path in (benchmarks / "worker.py", benchmarks / "workloads.py", *sides):
        tree = ast.parse(path.read_text())
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Import)]
        names = {alias.name for node in nodes for alias in node.names}
        froms = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        names |= {str(node.module) for node in froms}
        roots = {name.split(".")[0] for name in names}
        assert not roots & {"jax", "flax", "spikejax"}, path


def test_pooled_networks_flatten_channels_first_like_the_others():
    network = ours.Pooled(TINY["pooled"], lambda: nnx.relu, nnx.Rngs(0))
    theirs = weights(2, (24, 6 * 2 * 2)).reshape(24, 6, 2, 2)  # [out, C, H, W]
    maps = np.random.default_rng(0).standard_normal((2, 2, 6))  # [H, W, C]
    expected = np.einsum("ochw,hwc->o", theirs, maps)
    actual = maps.reshape(-1) @ np.asarray(network.hidden.kernel[...])
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_weights_and_data_are_the_same_every_time():
    np.testing.assert_array_equal(weights(1, (4, 3, 3, 3)), weights(1, (4, 3, 3, 3)))
    assert not np.array_equal(weights(1, (4, 4)), weights(2, (4, 4)))
    for sizes in TINY.values():
        first, second = batch(sizes), batch(sizes)
        np.testing.assert_array_equal(first[0], second[0])
        np.testing.assert_array_equal(first[1], second[1])


def test_the_filters_of_the_other_side_are_ours():
    np.testing.assert_allclose(
        filters(), patch_basis(3).transpose(3, 2, 0, 1), atol=1e-6
    )


def told(python, run, sizes, tmp_path, steps=3):
    """Number of parameters and the losses of a real worker."""
    env = turns.environment(1, "cpu")
    command = turns.command(run, sizes, python, 1)
    worker = Worker(command, tmp_path / f"{run.mode}.log", env)
    losses = [worker.step()["loss"] for _ in range(steps)]
    worker.close()
    return worker.says["parameters"], losses


@pytest.fixture(scope="session")
def peers():
    given = os.environ.get("SPIKEJAX_PEERS", ROOT / ".venv-peers/bin/python")
    if not Path(given).exists():
        pytest.skip(f"no other libraries at {given}: make bench installs them")
    return Path(given)


@pytest.mark.parametrize("network", TINY)
def test_spikingjelly_takes_the_same_steps(network, peers, tmp_path):
    sizes = TINY[network]
    mine = ours.prepare(sizes, "LIF")
    theirs = Run("SpikingJelly", "multi-step", sizes.time_steps)
    parameters, losses = told(peers, theirs, sizes, tmp_path)
    assert parameters == mine.parameters
    # The second and third loss come after updates: the gradients are the same.
    np.testing.assert_allclose([mine.step() for _ in range(3)], losses, rtol=1e-4)
    if network != "linear":
        assert len({round(loss, 4) for loss in losses}) == 3


def test_pytorch_takes_the_same_steps(peers, tmp_path):
    sizes = TINY["convolutions"]
    mine = ours.prepare(sizes, "ReLU")
    parameters, losses = told(peers, Run("PyTorch", "ReLU", 2), sizes, tmp_path)
    assert parameters == mine.parameters
    np.testing.assert_allclose([mine.step() for _ in range(3)], losses, rtol=1e-4)


def test_spyx_and_snntorch_have_the_same_shapes(peers, tmp_path):
    sizes = dataclasses.replace(TINY["convolutions"], time_steps=3)
    count = ours.prepare(sizes, "LIF").parameters
    found = {}
    for library, mode in (
        ("Spyx", "folded"),
        ("snnTorch", "folded"),
        ("snnTorch", "step by step"),
    ):
        parameters, losses = told(peers, Run(library, mode, 3), sizes, tmp_path)
        assert parameters == count and all(np.isfinite(losses))
        found[library, mode] = losses
    # Statistics of each step differ from those of all, except in the first layer.
    assert found["snnTorch", "folded"] != found["snnTorch", "step by step"]


def test_a_worker_computes_where_it_is_told_to_or_fails(monkeypatch):
    """Neither JAX nor PyTorch falls back to a processor where a GPU is asked for."""
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    names = "JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"
    for device, expected in (("cpu", ("cpu", "")), ("gpu", ("cuda", "0"))):
        env = turns.environment(1, device)
        assert tuple(env[name] for name in names) == expected
