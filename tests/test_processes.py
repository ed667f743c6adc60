"""Two real processes on this machine: they train as one, and leave and resume together.

Each has two virtual devices, and the parameters are cut over all four.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import forked
import jax
import numpy as np
import pytest
from flax import nnx

from spikejax import losses
from spikejax.data import images
from spikejax.layers import PLIF
from spikejax.train import TrainConfig, fit, processes, rendezvous, sharding
from spikejax.train.processes import Processes

ROOT = Path(__file__).resolve().parents[1]
CONFIG = TrainConfig(steps=40, batch_size=24, save_every=3, evaluate_every=100.0)
KILLED_AT, TERMINATED_AT = 8, 14
HEARTBEAT = 5  # seconds


class Net(nnx.Module):
    """Kernels that can be cut, batch statistics, a learned leak."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(64, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.neuron = PLIF(decay_input=False)
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, xs):
        xs = xs.reshape(*xs.shape[:2], -1)
        return self.head(self.neuron(self.norm(self.first(xs))))


class Data:
    """Training batches of this process; a signal reaches it before one of them."""

    def __init__(self, number=0, at=0):
        digits = images.load("digits").train
        index, count = processes.shard()
        self.batches = images.train_batches(
            digits, CONFIG.batch_size // count, seed=0, shard=(index, count)
        )
        self.get_state, self.set_state = self.batches.get_state, self.batches.set_state
        self.number, self.at = number, at

    def __next__(self):
        step = self.get_state()["next_index"] + 1
        if self.at and step == self.at:
            os.kill(os.getpid(), self.number)
        return next(self.batches)


def run(workdir, data=None, fsdp=1):
    """One process's part of the training."""
    index, count = processes.shard()
    test = images.load("digits").test
    return fit(
        CONFIG,
        Net(),
        losses.rate_cross_entropy,
        data or Data(),
        images.eval_batches(test, CONFIG.batch_size // count, shard=(index, count)),
        encode=lambda raw, rng: raw[:, None] / 255,
        steps_per_epoch=62,
        workdir=workdir,
        mesh=sharding.data_mesh(fsdp=fsdp),
    )


def child(workdir, address, index, number, at):
    """What each of two processes does; the signal is for the second."""
    flags = Processes(address, 2, index, heartbeat=HEARTBEAT)
    with processes.distributed(flags, {"workdir": workdir, "process_id": index}):
        data = Data(number, at if index == 1 else 0)
        fitted = run(workdir, data, fsdp=4)
    kernel = fitted.model.first.kernel[...]
    told = fitted.metrics | {"finished": fitted.finished, "shape": kernel.shape}
    print("result", json.dumps(told), flush=True)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def pair(workdir, number=0, at=0):
    """Two processes in a with statement, after which they are gone."""
    address = f"127.0.0.1:{free_port()}"
    arguments = ((workdir, address, index, int(number), at) for index in (0, 1))
    first, second = (forked.Child(child, *args, devices=2) for args in arguments)
    with first, second:
        yield first, second


def finish(both):
    """[(exit code, stdout, stderr)]"""
    return [process.finish() for process in both]


def results(ends):
    """What both processes told at their end."""
    told = []
    for code, out, err in ends:
        assert code == 0, err
        (line,) = [line for line in out.splitlines() if line.startswith("result ")]
        told.append(json.loads(line.removeprefix("result ")))
    return told


def metrics(workdir, name="loss"):
    """{step: value} of metrics.jsonl"""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return {entry["step"]: entry[name] for entry in entries if name in entry}


def saved(workdir):
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdecimal())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(folder, results) of two processes that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    with pair(workdir) as both:
        ends = finish(both)
    told = results(ends)
    first, second = (out for _, out, _ in ends)
    assert "step 1/40" in first and "step " not in second  # one of them prints
    return workdir, told


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(folder, metrics) of one process with all devices of this one."""
    workdir = tmp_path_factory.mktemp("alone")
    return workdir, run(workdir).metrics


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(folder, seconds, end of the other process) where the second one was killed."""
    workdir = tmp_path_factory.mktemp("killed")
    with pair(workdir, signal.SIGKILL, KILLED_AT) as both:
        both[1].process.join(forked.PATIENCE)
        began = time.monotonic()
        both[0].process.join(forked.PATIENCE)
        seconds = time.monotonic() - began
        end, other = finish(both)
    assert other[0] == -signal.SIGKILL
    return workdir, seconds, end


@pytest.fixture(scope="module")
def terminated(killed, tmp_path_factory):
    """(folder, results) of the killed run, resumed until SIGTERM to the second one."""
    workdir = tmp_path_factory.mktemp("terminated")
    shutil.copytree(killed[0], workdir, dirs_exist_ok=True)
    with pair(workdir, signal.SIGTERM, TERMINATED_AT) as both:
        return workdir, results(finish(both))


# Two as one


def test_both_processes_tell_the_same(undisturbed):
    _, (one, other) = undisturbed
    for name in ("parameters_sha256", "accuracy", "loss", "steps", "shape"):
        assert one[name] == other[name], name
    assert one["finished"] and one["shape"] == [64, 16]  # whole, from its four parts


def test_two_processes_give_the_losses_of_one(undisturbed, alone):
    two, one = metrics(undisturbed[0]), metrics(alone[0])
    assert list(two) == list(one) == list(range(1, CONFIG.steps + 1))
    np.testing.assert_allclose(list(two.values()), list(one.values()), atol=1e-4)
    assert max(one.values()) - min(one.values()) > 0.5


def test_evaluation_counts_each_example_once_though_shards_differ(undisturbed, alone):
    (two, _), one = undisturbed[1], alone[1]
    assert two["accuracy"] == pytest.approx(one["accuracy"], abs=1e-6)
    assert round(two["accuracy"] * 297, 3) % 1 == 0
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)


# The end of one


def disagree(workdir, address, index):
    """A child whose seed is that of nobody else."""
    flags = Processes(address, 2, index, heartbeat=HEARTBEAT)
    with processes.distributed(flags, {"epochs": 3, "seed": index}):
        run(workdir)


def test_processes_with_other_settings_do_not_train_together(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    first, second = (
        forked.Child(disagree, tmp_path, address, index, devices=1) for index in (0, 1)
    )
    with first, second:
        ends = finish((first, second))
    for index, (code, _, err) in enumerate(ends):
        assert code == 1 and err.splitlines()[-1] == (
            f"process {index}: seed: expected the same in all processes, got 0 in "
            "process 0 and 1 in process 1. Start all alike."
        )
    assert not list(tmp_path.iterdir())


def test_a_dead_process_ends_the_other_with_one_clear_line(killed):
    workdir, seconds, (code, out, err) = killed
    assert code in (1, -signal.SIGABRT) and "result" not in out
    assert seconds < 30
    if processes.RESUME in err:
        last = err.splitlines()[-1]
        assert last.startswith("process 0: JAX failed") and "process dies" in last
        assert last.endswith(processes.RESUME)
    else:  # JAX has noticed it first, and aborts with a message of its own
        assert any(w in err for w in ("died", "heartbeat", "task", "PollForError"))
    assert set(saved(workdir)) & {3, 6}


def test_sigterm_to_one_saves_the_same_step_of_both(killed, terminated):
    workdir, (one, other) = terminated
    assert not one["finished"] and not other["finished"]
    assert one["steps"] == other["steps"] == saved(workdir)[-1]
    assert one["parameters_sha256"] == other["parameters_sha256"]
    assert TERMINATED_AT <= one["steps"] < CONFIG.steps
    assert max(metrics(workdir)) == one["steps"]


def signalled(address):
    with processes.distributed(Processes(address, 1, 0)):
        os.kill(os.getpid(), signal.SIGTERM)  # as it loads data
        with processes.Terminated() as training:
            print("requested", training.requested, flush=True)


def test_a_signal_before_the_training_counts_for_it():
    with forked.Child(signalled, f"127.0.0.1:{free_port()}", devices=1) as process:
        code, out, err = process.finish()
    assert code == 0 and out == "requested True\n", err


def leave_alone(address):
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(7))
    signal.alarm(2)
    with processes.distributed(Processes(address, 2, 0)):
        pass


def test_a_process_that_is_told_to_leave_while_it_joins_leaves():
    with forked.Child(leave_alone, f"127.0.0.1:{free_port()}", devices=1) as process:
        code, _, err = process.finish()
    assert code == 7 and not err


def test_killed_and_terminated_both_end_with_the_same_bits(
    undisturbed, terminated, tmp_path
):
    workdir = shutil.copytree(terminated[0], tmp_path, dirs_exist_ok=True)
    with pair(workdir) as both:
        one, other = results(finish(both))
    expected = undisturbed[1][0]
    for name in ("parameters_sha256", "accuracy", "loss", "steps"):
        assert one[name] == other[name] == expected[name], name
    assert metrics(workdir) == metrics(undisturbed[0])


def test_one_process_goes_on_where_two_stopped(undisturbed, terminated, tmp_path):
    workdir = shutil.copytree(terminated[0], tmp_path, dirs_exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that the data start anew
        fitted = run(workdir)
    assert fitted.finished
    two, one = metrics(undisturbed[0]), metrics(workdir)
    np.testing.assert_allclose(list(one.values()), list(two.values()), atol=1e-4)
    assert fitted.metrics["accuracy"] == pytest.approx(
        undisturbed[1][0]["accuracy"], abs=1e-6
    )


# Flags, and one process


ADDRESS = "10.0.0.1:1234"


@pytest.mark.parametrize(
    ("flags", "got"),
    [
        ({"num_processes": 2}, "None, 2 and None"),
        ({"coordinator_address": "auto", "process_id": 0}, "auto, None and 0"),
        ({"coordinator_address": "10.0.0.1"}, "10.0.0.1, None and None"),
        ({"coordinator_address": "host:port"}, "host:port, None and None"),
        (
            {"coordinator_address": ADDRESS, "num_processes": 2},
            f"{ADDRESS}, 2 and None",
        ),
    ],
)
def test_flags_that_do_not_fit_together_are_an_error(flags, got):
    message = f"--num-processes and --process-id, or auto without them, got {got}."
    with pytest.raises(ValueError, match=re.escape(message)):
        Processes(**flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"process_id": 2}, "process_id: expected 0 to 1, got 2."),
        ({"process_id": -1}, "process_id: expected 0 to 1, got -1."),
        ({"num_processes": 0}, "num_processes: expected at least 1, got 0."),
        ({"heartbeat": 0}, "heartbeat: expected 1 to 3600 seconds, got 0."),
        ({"join_timeout": 0}, "join_timeout: expected 1 to 86400 seconds, got 0."),
        (
            {"coordinator_address": "h:70000"},
            "coordinator_address: expected a port up to 65535, got 'h:70000'.",
        ),
    ],
)
def test_flags_out_of_range_are_an_error(flags, message):
    good = {"coordinator_address": ADDRESS, "num_processes": 2, "process_id": 0}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Processes(**good | flags)


# The meeting before JAX starts: processes played by threads


def meet(*places, seconds=20.0, port=None):
    """What processes (index, count) get: "" or the text of an error, in order."""
    port = port or free_port()

    def one(place):
        index, count = place
        try:
            rendezvous.meet(f"127.0.0.1:{port}", count, index, seconds)
        except ValueError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, places))


def test_processes_meet_in_any_order_and_leave_the_port_free():
    port = free_port()
    for _ in range(2):
        assert meet((2, 3), (0, 3), (1, 3), port=port) == ["", "", ""]


def test_all_are_told_who_did_not_join():
    ends = meet((0, 4), (2, 4), seconds=0.5)
    assert ends == 2 * [
        "num_processes: expected 4 within 0.5 s, got none with --process-id 1, 3. "
        "Start it, or raise --join-timeout."
    ]


def test_without_process_0_its_address_is_named():
    (end,) = meet((1, 2), seconds=0.2)
    assert re.fullmatch(
        r"coordinator_address: expected process 0 at 127\.0\.0\.1:\d+ within 0\.2 s, "
        r"got no answer \(Connection refused\)\. Start it, or raise --join-timeout\.",
        end,
    )


@pytest.mark.parametrize(
    "others, got", [([(1, 3), (1, 3)], "1 of 3"), ([(2, 2)], "2 of 2")]
)
def test_a_process_that_is_there_twice_ends_all(others, got):
    ends = meet((0, 3), *others)
    assert set(ends) == {
        f"process_id: expected 0 to 2 once each, got another {got}. Start each process "
        "once."
    }


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        (end,) = meet((0, 2), port=port)
    assert end.startswith(
        f"coordinator_address: expected a free port, got 127.0.0.1:{port} (Address "
        "already in use). Take another port, or another --process-id"
    )


def test_what_is_no_process_of_a_run_is_ignored():
    port = free_port()

    def strangers():
        for word in (b"GET / HTTP/1.1", b"[]", b"7"):
            while True:
                try:
                    with socket.create_connection(("127.0.0.1", port)) as link:
                        link.sendall(word)
                    break
                except OSError:
                    time.sleep(0.01)
        return meet((1, 2), port=port)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(strangers)
        assert meet((0, 2), port=port) == [""] and other.result() == [""]


def test_an_address_of_another_program_is_named():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        end = pool.submit(meet, (1, 2), seconds=0.05, port=server.getsockname()[1])
        with server.accept()[0] as link:
            link.recv(64)
            link.sendall(b"HTTP/1.1 400 Bad Request")
        (line,) = end.result()
    assert re.search(
        r"expected process 0 at 127\.0\.0\.1:\d+ within 0\.05 s, got no answer "
        r"\(another program says 'HTTP/1\.1 400 Bad Request'\)\. Start it",
        line,
    )


def test_auto_says_where_it_works(monkeypatch):
    def initialize(*_, **options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    line = "Slurm or a TPU pod, where auto finds the processes, got neither. Take HOST:"
    with pytest.raises(ValueError, match=line):
        processes._initialize(None, None, None, 20)


def test_processes_agree_on_their_settings(monkeypatch):
    def all_gather(value):
        return [value, value, value | {"seed": "1"}]

    processes.agree({"seed": 0, "workdir": ROOT})
    monkeypatch.setattr(processes, "all_gather", all_gather)
    message = (
        "seed: expected the same in all processes, got 0 in process 0 and 1 in pro"
    )
    with pytest.raises(ValueError, match=f"^{message}cess 2\\. Start all alike\\.$"):
        processes.agree({"epochs": 3.0, "seed": 0, "workers": 2})
    monkeypatch.setattr(processes, "all_gather", lambda value: [{}, value])
    processes.agree(dict.fromkeys(("workers", "process_id", "data_dir"), 5))


def test_processes_with_other_numbers_of_devices(monkeypatch):
    devices = [SimpleNamespace(process_index=k) for k in (0, 1, 1)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(
        ValueError, match="^devices: expected as many in every .* got 1"
    ):
        processes.agree({})


def test_one_process_needs_no_word_with_others():
    assert processes.all_gather(7) == [7]
    assert processes.is_primary() and processes.shard() == (0, 1)
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(KeyError),
        processes.distributed(Processes()),
        processes.Terminated() as terminated,
    ):
        assert not jax.distributed.is_initialized()
        assert not terminated.now and terminated.flag(4) == {}
        os.kill(os.getpid(), signal.SIGTERM)
        assert terminated.now
        raise KeyError  # is not caught
    assert signal.getsignal(signal.SIGTERM) is before
