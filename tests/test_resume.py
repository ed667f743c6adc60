"""The real command, killed and started again, ends with the bits of a run left alone.

``test_loop.py`` has the finer cases, inside of one process.
"""

import contextlib
import json
import os
import runpy
import signal
import sys
import time

import forked
import pytest

STEPS, EPOCH = 60, 5  # evaluated every 5 steps; 30 steps see all 1,500 images
FLAGS = ["--neuron", "mt-parallel", "--steps", str(STEPS), "--save-every", "7"]
FLAGS += ["--batch-size", "50", "--warmup", "0.2", "--evaluate-every", str(5 / 30)]


def command(workdir):
    """What ``python -m experiments.digits`` does."""
    sys.argv = ["experiments.digits", *FLAGS, "--workdir", str(workdir)]
    os.chdir(forked.ROOT)
    runpy.run_module("experiments.digits", run_name="__main__", alter_sys=True)


@contextlib.contextmanager
def started(workdir):
    with forked.Child(command, workdir, devices=1) as child:
        yield child


def wait_for(child, condition, workdir):
    """Stops the process where the condition holds."""
    end = time.monotonic() + forked.PATIENCE
    while True:
        while not condition(workdir):
            if not child.process.is_alive():
                pytest.fail(f"ended too early: {child.finish()}")
            assert time.monotonic() < end, "the condition never held"
            time.sleep(0.0005)
        child.send(signal.SIGSTOP)
        time.sleep(0.01)
        if condition(workdir):  # it may have passed meanwhile
            return
        child.send(signal.SIGCONT)


def complete(workdir):
    """Runs the command to its end; returns (result, stderr)."""
    with started(workdir) as child:
        code, _, err = child.finish()
    assert code == 0, err
    assert "Traceback" not in err
    return json.loads((workdir / "result.json").read_text()), err


def kill(workdir, condition):
    with started(workdir) as child:
        wait_for(child, condition, workdir)
        child.send(signal.SIGKILL)
        code, _, err = child.finish()
    assert code == -signal.SIGKILL and "Warning:" not in err and "Traceback" not in err
    assert not (workdir / "result.json").exists()


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
    """(folder, result) of a run left alone."""
    folder = tmp_path_factory.mktemp("resume") / "undisturbed"
    result, err = complete(folder)
    assert result["steps"] == STEPS and "Warning:" not in err
    return folder, result


def unfinished(workdir):
    return list(workdir.glob("checkpoints/*.orbax-checkpoint-tmp*"))


def flip(workdir, step):
    """Flips a bit of a checkpoint."""
    (leaves,) = (workdir / f"checkpoints/{step}/state/d").iterdir()
    content = bytearray(leaves.read_bytes())
    content[len(content) // 2] ^= 1
    leaves.write_bytes(content)


def test_killed_terminated_and_corrupted_the_run_ends_with_the_same_bits(
    undisturbed, tmp_path
):
    """Each start resumes what the one before it left, and costs no bits."""
    kill(tmp_path, first_step)
    assert not unfinished(tmp_path)
    kill(tmp_path, saving)
    assert unfinished(tmp_path)
    kill(tmp_path, amid_an_epoch)
    killed_at, start = train_steps(tmp_path)[-1], saved(tmp_path)[-1]
    assert 2 * EPOCH < killed_at < STEPS and start < killed_at

    old = (tmp_path / "metrics.jsonl").stat().st_ino

    def going_on(workdir):
        rewritten = (workdir / "metrics.jsonl").stat().st_ino != old
        return rewritten and train_steps(workdir)[-1] > start

    with started(tmp_path) as child:
        wait_for(child, going_on, tmp_path)
        child.send(signal.SIGTERM)
        child.send(signal.SIGCONT)
        code, out, err = child.finish()
    before, stopped_at = saved(tmp_path)[-2:]
    assert code == 0 and "Traceback" not in err and "Warning:" not in err
    assert f"Stopped and saved at step {stopped_at}. Rerun the same command" in out
    assert start < stopped_at < STEPS and train_steps(tmp_path)[-1] == stopped_at
    assert not (tmp_path / "result.json").exists() and not unfinished(tmp_path)

    flip(tmp_path, stopped_at)
    result, err = complete(tmp_path)
    assert f"CheckpointWarning: checkpoint {stopped_at} in " in err
    assert "is corrupted (" in err and f"resuming from checkpoint {before};" in err

    folder, expected = undisturbed
    for name in ("parameters_sha256", "accuracy", "loss", "spikes_per_image", "steps"):
        assert result[name] == expected[name], name
    assert train_steps(tmp_path) == list(range(1, STEPS + 1))
    config = (folder / "config.json").read_text()
    assert (tmp_path / "config.json").read_text() == config
