"""Faults of runs on several processes: each ends in one line, and in time."""

import dataclasses
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
from test_processes import HEARTBEAT, finish, free_port

from experiments import convert_imagenet, digits, dvs_cifar10, general
from spikejax.experiment import Experiment, config, open_images
from spikejax.experiment.cli import override
from spikejax.train import TrainConfig, processes, workdir
from spikejax.train.processes import Processes

ROOT = Path(__file__).resolve().parents[1]

# What a script does until its flags are parsed.
PARSE = """
import runpy, sys
from jax._src import xla_bridge
from spikejax.experiment import cli

def run_cli(script, flags):
    found.append("coordinator_address" in cli.flatten(flags))

cli.run_cli = run_cli
for name in sys.argv[1:]:
    found, sys.argv = [], [name]
    runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
    print(name, *found, xla_bridge.backends_are_initialized(), flush=True)
"""


def test_no_script_starts_jax_before_the_processes_have_joined():
    paths = sorted((ROOT / "experiments").glob("*.py"))
    names = [path.stem for path in paths if "processes" in path.read_text()]
    names += ["cifar10", "cifar100", "imagenet", "tinyimagenet"]
    command = [sys.executable, "-c", PARSE, *names]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.stdout.splitlines() == [f"{name} True False" for name in names], (
        ended.stderr
    )
    assert {"convert", "digits", "selfcheck"} <= set(names)


def differ(folder, address, index):
    """A child that has more test images than the other, if it is the second."""
    recipe = TrainConfig(steps=1, batch_size=8)
    with processes.distributed(Processes(address, 2, index, heartbeat=HEARTBEAT)):
        flags = Experiment(folder, train=recipe)
        task = open_images(flags)
        if index:
            data = dataclasses.replace(task.data, test=task.data.train)
            task = task._replace(data=data)
        config.train(flags, task)


def test_processes_with_other_data_do_not_train_together(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    first, second = (
        forked.Child(differ, tmp_path, address, index, devices=1) for index in (0, 1)
    )
    with first, second:
        ends = finish((first, second))
    for index, (code, _, err) in enumerate(ends):
        assert code == 1 and err.splitlines()[-1] == (
            f"process {index}: test_examples: expected the same in all processes, got "
            "297 in process 0 and 1500 in process 1. Start all alike."
        )
    assert not list(tmp_path.iterdir())


def fail(address, text, worker):
    """A child that fails, with a worker that would outlive it."""
    with processes.distributed(Processes(address, 1, 0)):
        if worker:
            process = multiprocessing.Process(target=time.sleep, args=(600,))
            process.start()
            print(process.pid, flush=True)
        raise ValueError(text)


@pytest.mark.parametrize(
    ("text", "is_peer"),
    [
        ("UNKNOWN: Gloo AllGather failed: Connection closed by peer", True),
        ("UNAVAILABLE: no answer", True),
        ("seed: expected UNKNOWN: got 1", False),
        ("INVALID_ARGUMENT: shapes", False),
    ],
)
def test_a_status_of_jax_is_the_death_of_another_process(text, is_peer):
    assert processes._is_of_peer(ValueError(text)) == is_peer
    assert not processes._is_of_peer(KeyError(text))


def test_a_process_that_fails_says_how_to_resume_and_leaves_no_workers():
    text = "UNKNOWN: Gloo AllGather failed: Connection closed by peer"
    address = f"127.0.0.1:{free_port()}"
    with forked.Child(fail, address, text, True, devices=1) as process:
        code, out, err = process.finish()
    assert code == 1 and err.splitlines()[-1].endswith(processes.RESUME)
    end = time.monotonic() + 10
    while os.path.exists(f"/proc/{out.strip()}") and time.monotonic() < end:
        if "State:\tZ" in Path(f"/proc/{out.strip()}/status").read_text():
            break  # dead, and nobody has asked how it ended
        time.sleep(0.05)
    assert time.monotonic() < end, "the worker lives"


@pytest.mark.parametrize("is_primary", [True, False])
def test_one_process_names_the_networks(is_primary, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(processes, "is_primary", lambda: is_primary)
    for script, flags in (
        (digits, override(digits.DEFAULT, {"workdir": tmp_path})),
        (general, override(general.DEFAULT, {"workdir": tmp_path, "data": "fake"})),
    ):
        monkeypatch.setattr(script, "run", lambda *_: None)
        script.compare(flags)
        assert capsys.readouterr().out.startswith("1/5  ") == is_primary


def test_a_stream_is_of_one_process(monkeypatch):
    monkeypatch.setattr(processes, "shard", lambda: (0, 2))
    changes = {"stream": Path("x.npz"), "frames": "duration"}
    with pytest.raises(ValueError, match="^stream: expected one process, got 2\\. Tr"):
        dvs_cifar10.main(override(dvs_cifar10.DEFAULT, changes))


def test_a_folder_in_use_gets_no_summary(tmp_path, monkeypatch):
    monkeypatch.setattr(convert_imagenet, "load_network", lambda: None)
    monkeypatch.setattr(convert_imagenet, "Photographs", lambda _: SimpleNamespace())
    monkeypatch.setattr(convert_imagenet, "ann", lambda *_: pytest.fail("it ran"))
    with workdir.locked(tmp_path), pytest.raises(ValueError, match="no other run is u"):
        convert_imagenet.main(convert_imagenet.Flags(tmp_path))
