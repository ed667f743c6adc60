"""The real command, killed and started again, ends with the bits of a run left alone.

``test_loop.py`` has the finer cases, inside of one process.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STEPS, EPOCH = 60, 5  # 1,500 images in batches of 300
PATIENCE = 300  # seconds until a child counts as hanging


def command(workdir):
    return [
        *(sys.executable, "-m", "experiments.digits", "--neuron", "mt-parallel"),
        *("--workdir", str(workdir), "--steps", str(STEPS), "--save-every", "7"),
        *("--batch-size", "300", "--warmup", "0.2"),
    ]


def surroundings(cache):
    """No cache of compiled code but where it is given: a kill could tear entries."""
    ours = {"JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    cached = {"JAX_COMPILATION_CACHE_DIR": str(cache)} if cache else {}
    flags = os.environ["XLA_FLAGS"].replace("count=8", "count=1")
    kept |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    return kept | cached


class Child:
    """The command as a process group of its own, which is gone after the with."""

    def __init__(self, workdir, cache=None):
        self.workdir, self.cache = workdir, cache

    def __enter__(self):
        self.process = subprocess.Popen(
            command(self.workdir),
            cwd=ROOT,
            env=surroundings(self.cache),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.send(signal.SIGKILL)
        self.process.communicate(timeout=PATIENCE)

    def send(self, number):
        os.killpg(self.process.pid, number)

    def wait_for(self, condition):
        """Stops the process where the condition holds."""
        end = time.monotonic() + PATIENCE
        while True:
            while not condition(self.workdir):
                if self.process.poll() is not None:
                    pytest.fail(f"ended too early: {self.process.communicate()}")
                assert time.monotonic() < end, "the condition never held"
                time.sleep(0.0005)
            self.send(signal.SIGSTOP)
            time.sleep(0.01)
            if condition(self.workdir):  # it may have passed meanwhile
                return
            self.send(signal.SIGCONT)

    def finish(self):
        """(exit code, stdout, stderr)"""
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out, err


def complete(workdir):
    """Runs the command to its end; returns (result, stdout, stderr)."""
    with Child(workdir, workdir.parent / "cache") as child:
        code, out, err = child.finish()
    assert code == 0, err
    assert "Traceback" not in err
    return json.loads((workdir / "result.json").read_text()), out, err


def kill(workdir, condition):
    with Child(workdir) as child:
        child.wait_for(condition)
        child.send(signal.SIGKILL)
        assert child.finish()[0] == -signal.SIGKILL


def train_steps(workdir):
    """Steps in metrics.jsonl, without the last line where it is half written."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    entries = [json.loads(line) for line in lines]
    return [entry["step"] for entry in entries if "loss" in entry]


def saved(workdir):
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdecimal())


def first_step(workdir):
    """Everything is set up, and the first step compiles."""
    return (workdir / "metrics.jsonl").exists() and not train_steps(workdir)


def saving(workdir):
    found = [*workdir.glob("checkpoints/*.orbax-checkpoint-tmp*")]
    return bool(found) and len(saved(workdir)) > 0


def amid_an_epoch(workdir):
    steps = train_steps(workdir)
    late = len(steps) > 2 * EPOCH and len(saved(workdir)) > 0
    return late and steps[-1] % EPOCH in (2, 3)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(folder, result) of a run left alone; work on copies."""
    folder = tmp_path_factory.mktemp("resume") / "undisturbed"
    result, _, err = complete(folder)
    assert result["steps"] == STEPS and "Warning" not in err
    return folder, result


def assert_same(workdir, result, undisturbed):
    folder, expected = undisturbed
    for name in ("parameters_sha256", "accuracy", "loss", "spikes_per_image", "steps"):
        assert result[name] == expected[name], name
    assert train_steps(workdir) == list(range(1, STEPS + 1))
    config = (folder / "config.json").read_text()
    assert (workdir / "config.json").read_text() == config


@pytest.fixture
def workdir(undisturbed, request):
    """A new folder beside that of the undisturbed run."""
    return undisturbed[0].with_name(re.sub(r"\W+", "-", request.node.name))


@pytest.mark.parametrize("condition", [first_step, saving])
def test_killed_the_command_goes_on(undisturbed, workdir, condition):
    kill(workdir, condition)
    assert not (workdir / "result.json").exists()
    unfinished = list(workdir.glob("checkpoints/*.orbax-checkpoint-tmp*"))
    assert bool(unfinished) == (condition is saving)
    result, _, err = complete(workdir)
    assert "Warning" not in err
    assert_same(workdir, result, undisturbed)
    assert not list(workdir.glob("checkpoints/*.orbax-checkpoint-tmp*"))


def test_killed_and_terminated_amid_an_epoch_the_command_goes_on(undisturbed, workdir):
    kill(workdir, amid_an_epoch)
    killed_at, start = train_steps(workdir)[-1], saved(workdir)[-1]
    assert 2 * EPOCH < killed_at < STEPS and start < killed_at
    old = (workdir / "metrics.jsonl").stat().st_ino

    def going_on(workdir):
        rewritten = (workdir / "metrics.jsonl").stat().st_ino != old
        return rewritten and train_steps(workdir)[-1] > start

    with Child(workdir) as child:
        child.wait_for(going_on)
        child.send(signal.SIGTERM)
        child.send(signal.SIGCONT)
        code, out, err = child.finish()
    stopped_at = saved(workdir)[-1]
    assert code == 0 and "Traceback" not in err and "Warning:" not in err
    assert f"Stopped and saved at step {stopped_at}. Rerun the same command" in out
    assert start < stopped_at < STEPS and train_steps(workdir)[-1] == stopped_at
    assert not (workdir / "result.json").exists()
    result, _, _ = complete(workdir)
    assert_same(workdir, result, undisturbed)


def test_corruption_is_reported_on_stderr_and_costs_no_bits(undisturbed, workdir):
    shutil.copytree(undisturbed[0], workdir)
    before, newest = saved(workdir)[-2:]
    (leaves,) = (workdir / f"checkpoints/{newest}/state/d").iterdir()
    content = bytearray(leaves.read_bytes())
    content[len(content) // 2] ^= 1
    leaves.write_bytes(content)
    result, _, err = complete(workdir)
    assert f"CheckpointWarning: checkpoint {newest} in " in err
    assert "is corrupted (" in err and f"resuming from checkpoint {before};" in err
    assert_same(workdir, result, undisturbed)
