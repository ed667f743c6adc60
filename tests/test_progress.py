import contextlib
import gc
import io
import json
import os
import re
import resource
import struct
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from spikejax.train import loop, progress
from spikejax.train.progress import (
    NonFinite,
    Progress,
    check_finite,
    table,
    tracing,
)


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test sets its `now`."""
    clock = SimpleNamespace(now=1000.0)
    fake = SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now)
    monkeypatch.setattr(progress, "time", fake)
    return clock


@pytest.fixture
def terminal(monkeypatch):
    """What a terminal of 80 columns is sent, without its control sequences."""
    sent = io.StringIO()

    def text():
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent.getvalue())

    def console():
        return Console(file=sent, force_terminal=True, width=80, color_system=None)

    monkeypatch.setattr(progress, "_console", console)
    return text


def entries(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def train(workdir, steps, **options):
    with Progress(workdir, 100, **options) as shown:
        for step in steps:
            shown.train(step, {"loss": 1 / step, "accuracy": 0.5})


def events(workdir):
    """The events of all TensorBoard files, in order."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def test_metrics_are_a_json_object_a_line(tmp_path):
    train(tmp_path / "new", [1, 2])
    assert entries(tmp_path / "new") == [
        {"step": 1, "loss": 1.0, "accuracy": 0.5},
        {"step": 2, "loss": 0.5, "accuracy": 0.5},
    ]


def test_metrics_are_on_the_disk_at_once(tmp_path):
    with Progress(tmp_path, 100) as shown:
        shown.train(1, {"loss": 3.0})
        assert entries(tmp_path) == [{"step": 1, "loss": 3.0}]


def test_evaluation_metrics_have_their_own_names(tmp_path):
    with Progress(tmp_path, 100) as shown:
        shown.evaluate(7, {"loss": 2.0, "accuracy": 0.25, "seconds": 1.5})
    assert entries(tmp_path) == [
        {"step": 7, "eval_loss": 2.0, "eval_accuracy": 0.25, "seconds": 1.5}
    ]


def test_numbers_that_json_lacks_become_null(tmp_path):
    with Progress(tmp_path, 100) as shown:
        shown.evaluate(1, {"loss": float("nan"), "accuracy": float("inf")})
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert entries(tmp_path) == [{"step": 1, "eval_loss": None, "eval_accuracy": None}]


def test_a_resumed_run_drops_what_came_after(tmp_path):
    train(tmp_path, [1, 2, 3, 4])
    train(tmp_path, [3], start=2)
    assert [entry["step"] for entry in entries(tmp_path)] == [1, 2, 3]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_from_the_start_drops_all(tmp_path):
    train(tmp_path, [1, 2, 3])
    train(tmp_path, [1])
    assert [entry["step"] for entry in entries(tmp_path)] == [1]


@pytest.mark.parametrize("line", ['{"step": 3, "lo', "5", "[]", "{}", '{"step": "1"}'])
def test_a_line_half_written_is_dropped(tmp_path, line):
    train(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line)
    train(tmp_path, [3], start=2)
    assert [entry["step"] for entry in entries(tmp_path)] == [1, 2, 3]


def test_the_old_metrics_are_replaced_in_one_go(tmp_path, monkeypatch):
    train(tmp_path, [1, 2, 3])

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, [2], start=1)
    assert [entry["step"] for entry in entries(tmp_path)] == [1, 2, 3]


def test_tensorboard_gets_every_metric(tmp_path):
    with Progress(tmp_path, 100) as shown:
        shown.train(3, {"loss": 0.5})
        shown.evaluate(3, {"loss": 0.25, "accuracy": 1.0})
    values = {
        (event.step, value.tag): value.simple_value
        for event in events(tmp_path)
        for value in event.summary.value
    }
    expected = {"train/loss": 0.5, "eval/loss": 0.25, "eval/accuracy": 1.0}
    assert values == {(3, tag): value for tag, value in expected.items()}


def test_without_tensorboardx_there_is_metrics_jsonl_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX.event_file_writer", None)
    train(tmp_path, [1, 2])
    assert [entry["step"] for entry in entries(tmp_path)] == [1, 2]
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_is_told_where_a_resumed_run_goes_on(tmp_path):
    train(tmp_path, [1, 2, 3])
    train(tmp_path, [3], start=2)
    starts = [e.step for e in events(tmp_path) if e.HasField("session_log")]
    assert starts[-1] == 3


def test_elsewhere_a_line_about_every_ten_seconds(tmp_path, capsys, clock):
    with Progress(tmp_path, 100, batch_size=32) as shown:
        for step in range(1, 26):
            shown.train(step, {"loss": 0.5})
            clock.now += 1
    assert capsys.readouterr().out.splitlines() == [
        "step 1/100  loss 0.500",
        "step 11/100  loss 0.500  1 steps/s  32 images/s  0:01:29 left",
        "step 21/100  loss 0.500  1 steps/s  32 images/s  0:01:19 left",
    ]


@pytest.mark.parametrize("start, more", [(40, ""), (100, "; nothing is left to train")])
def test_a_run_that_is_resumed_says_so(tmp_path, capsys, start, more):
    train(tmp_path, [], start=start)
    line = f"step {start}/100  resumed from {tmp_path}{more}\n"
    assert capsys.readouterr().out == line


def test_the_last_step_has_its_line(tmp_path, capsys, clock):
    with Progress(tmp_path, 3) as shown:
        for step in (1, 2, 3):
            shown.train(step, {"loss": 0.5})
            clock.now += 0.25
    assert capsys.readouterr().out.splitlines() == [
        "step 1/3  loss 0.500",
        "step 3/3  loss 0.500  4 steps/s  4 images/s  0:00:00 left",
    ]


def test_the_rate_leaves_evaluations_out(tmp_path, capsys, clock):
    with Progress(tmp_path, 10) as shown:
        shown.train(1, {"loss": 0.5})
        clock.now += 100
        shown.evaluate(1, {"accuracy": 0.123456})
        for step in (8, 9, 10):
            shown.train(step, {"loss": 0.5})
            clock.now += 0.5
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "step 1/10  evaluation: accuracy 0.1235"
    assert lines[-1] == "step 10/10  loss 0.500  2 steps/s  2 images/s  0:00:00 left"


def test_other_processes_neither_record_nor_print(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    train(tmp_path, [1, 2])
    assert "".join(capsys.readouterr()) == "" and not list(tmp_path.iterdir())


def test_a_terminal_shows_a_bar_in_one_row(tmp_path, terminal, clock):
    with Progress(tmp_path, 40000, batch_size=128) as shown:
        assert "0/40000" in terminal() and "compiling" in terminal()
        for step in (1, 2, 3):
            shown.train(step, {"loss": 2.25})
            clock.now += 0.25
    rows = [row for row in re.split(r"[\r\n]+", terminal()) if row.strip()]
    assert max(map(len, rows)) <= 80
    assert "3/40000 loss 2.250  4 steps/s  512 images/s  2:46:39 left" in rows[-1]


def test_a_bar_goes_on_where_the_run_does(tmp_path, terminal):
    with Progress(tmp_path, 100, start=40):
        pass
    assert " 40/100 compiling" in terminal() and "━━━" in terminal()


def test_evaluations_stand_above_the_bar(tmp_path, terminal):
    with Progress(tmp_path, 100) as shown:
        shown.train(1, {"loss": 2.25})
        shown.evaluate(1, {"accuracy": 0.5, "note[red]": 1.0})
    line = "step 1/100  evaluation: accuracy 0.5, note[red] 1\n"
    assert line in terminal()
    assert "1/100 loss 2.250" in terminal().split(line)[1]


def test_an_error_closes_the_bar_and_the_files(tmp_path, terminal):
    shown = Progress(tmp_path, 100)
    with pytest.raises(NonFinite), shown:
        shown.train(1, {"loss": 1.0})
        check_finite(2, float("nan"), {}, np.zeros(1))
    assert terminal().endswith("\n")
    with pytest.raises(ValueError, match="closed file"):
        shown.train(2, {"loss": 1.0})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_an_error(tmp_path):
    """And not a wait for the thread that writes TensorBoard's files."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, kept[1]))
        with pytest.raises(OSError, match="File too large"):
            train(tmp_path, range(1, 100))
    finally:
        gc.collect()  # of files that cannot be closed
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)


@pytest.mark.parametrize(
    ("loss", "norms", "message"),
    [
        (float("nan"), {}, r"the loss became nan at step 120\. Lower the learning"),
        (float("inf"), {"a": 1.0}, r"the loss became inf at step 120\. Lower"),
        (
            float("nan"),
            {"head": 1.0, "stem/kernel": float("nan"), "stem/tau": float("inf")},
            "nan at step 120; first non-finite gradients: stem/kernel, stem/tau. Lower",
        ),
        (
            0.5,
            {"stem/kernel": float("inf")},
            r"gradients became inf \(loss 0.5\) at step 120; .*: stem/kernel\. Lower",
        ),
        (0.5, dict.fromkeys("abcdef", float("nan")), r": a, b, c and 3 more\. Lower"),
    ],
)
def test_numbers_that_are_not_finite_stop_the_run(loss, norms, message):
    with pytest.raises(NonFinite, match=message) as caught:
        check_finite(120, loss, norms, np.zeros((2, 3), np.uint8))
    said = str(caught.value)
    assert "(--learning-rate) or clip gradients (--clip)." in said
    assert ("Labels have to be 0 to K - 1 for K logits." in said) == (loss != loss)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_data_that_are_not_finite_are_told_from_divergence(bad):
    message = (
        "train: the loss became nan at step 3, as the images of its batch are not "
        "finite. Remove NaN and infinity from the data."
    )
    with pytest.raises(NonFinite) as caught:
        check_finite(3, float("nan"), {"a": float("nan")}, np.array([1.0, bad]))
    assert str(caught.value) == message


def test_finite_numbers_pass():
    check_finite(1, 1e30, {"a": 0.0, "b": 1e-38}, np.full(2, np.nan))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(3, []), (4, ["start", "stop"]), (8, ["start", "stop"]), (20, ["start", "stop"])],
)
def test_a_profile_is_of_steps_4_to_8(tmp_path, monkeypatch, steps, expected):
    calls = []

    @contextlib.contextmanager
    def profile(folder):
        calls.append(("start", step, folder))
        yield
        calls.append(("stop", step))

    monkeypatch.setattr(jax, "profiler", SimpleNamespace(trace=profile))
    with tracing(tmp_path) as before:
        for step in range(1, steps + 1):
            before(step, {})
    assert [call[0] for call in calls] == expected
    if calls:
        assert calls[0] == ("start", 4, str(tmp_path))
        assert calls[1] == ("stop", min(steps, 9))  # before the ninth


def test_without_a_folder_nothing_is_profiled(monkeypatch):
    monkeypatch.setattr(jax, "profiler", None)
    with tracing(None) as before:
        for step in range(1, 20):
            before(step, {})


def test_a_table_has_its_numbers_to_the_right(capsys):
    table("Digits [T=1]", ["neuron", "accuracy"], [["LIF [/x]", "9%"], ["MT", "99%"]])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "Digits [T=1]"
    assert lines[4:6] == ["│ LIF [/x] │       9% │", "│ MT       │      99% │"]


def test_a_table_in_a_log_is_not_cut(capsys):
    table("", [f"column number {i}" for i in range(6)], [["x" * 15] * 6])
    assert capsys.readouterr().out.count("x" * 15) == 6


def test_the_rate_is_that_of_training_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    clock = loop._Clock(24)
    for now[0] in (10.0, 11.0, 13.0):  # the first compiles
        clock.tick()
    now[0] = 50.0  # an evaluation
    assert clock.pause() == {"seconds": 50.0, "images_per_second": 24 * 2 / 3}
    for now[0] in (60.0, 61.0):
        clock.tick()
    now[0] = 62.0
    assert clock.pause() == {"seconds": 62.0, "images_per_second": 24 * 3 / 4}


def test_the_norm_of_the_gradient_is_that_of_all_parameters(tmp_path):
    norms = {"a": {"kernel": np.float32(3)}, "b": np.float32(4)}
    metrics = {"loss": np.float32(1), "gradient_norms": norms}
    logged = SimpleNamespace(train=lambda step, found: seen.append((step, found)))
    seen, stop = [], SimpleNamespace(read=lambda metrics: None)
    loop._report(logged, stop, {7: (metrics, np.zeros(1))})
    assert seen == [(7, {"loss": 1.0, "gradient_norm": 5.0})]
