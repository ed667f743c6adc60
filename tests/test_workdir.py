"""The folder of a run: its files, and the check that it is this run's."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spikejax.train import processes
from spikejax.train import workdir as folder


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "runs" / "one" / "result.json"
    folder.write(path, {"accuracy": 0.5})
    assert json.loads(path.read_text()) == {"accuracy": 0.5}
    with pytest.raises(TypeError):
        folder.write(path, {"accuracy": {0.5}})
    assert json.loads(path.read_text()) == {"accuracy": 0.5}
    folder.write(path, [{"loss": float("nan"), "rows": (float("inf"), 0.5)}])
    text = "".join(path.read_text().split())
    assert text == '[{"loss":null,"rows":[null,0.5]}]'
    folder.write(path, [])
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_of_several_processes_the_first_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "is_primary", lambda: False)
    folder.write(tmp_path / "result.json", {})
    assert not list(tmp_path.iterdir())


def test_a_folder_belongs_to_one_run(tmp_path):
    settings = {"seed": 0, "model": "vgg11"}
    folder.check(tmp_path, settings, {})
    assert folder.claim(tmp_path, settings, {}) == tmp_path
    folder.check(tmp_path, settings, {})
    match = r"holds another: seed was 0 and is 1\. Take another --workdir"
    with pytest.raises(ValueError, match=match):
        folder.check(tmp_path, settings | {"seed": 1}, {})
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        folder.claim(tmp_path, settings | {"seed": 1}, {})  # claimed since the check
    newer = {"width": 1.0}
    folder.check(tmp_path, settings | newer, newer)  # a flag that was added since
    folder.check(tmp_path, {"seed": 0}, {})  # one that was removed
    with pytest.raises(ValueError, match="width was 1.0 and is 2.0"):
        folder.check(tmp_path, settings | {"width": 2.0}, newer)


def test_a_folder_that_a_process_does_not_see_is_an_error(tmp_path, monkeypatch):

    def all_gather(value):
        return [value, False if value is True else value]

    naps = []
    monkeypatch.setattr(processes, "all_gather", all_gather)
    monkeypatch.setattr(folder.time, "sleep", naps.append)
    match = (
        rf"^workdir: expected a folder that all processes share, got {tmp_path}, where "
        "process 1 does not see what process 0 wrote"
    )
    with pytest.raises(ValueError, match=match):
        folder.claim(tmp_path, {}, {})
    assert sum(naps) == folder.PATIENCE


def test_a_file_that_is_seen_late_is_waited_for(tmp_path, monkeypatch):
    naps, other = [], iter([False, False, True])

    def all_gather(value):
        return [value, next(other) if value is True else value]

    monkeypatch.setattr(processes, "all_gather", all_gather)
    monkeypatch.setattr(folder.time, "sleep", naps.append)
    assert folder.claim(tmp_path, {}, {}) == tmp_path
    assert naps == [1, 1]


@pytest.mark.parametrize("text", ["", "[]", '{"seed": 0'])
def test_damaged_settings_are_an_error_that_names_the_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    match = r"holds another: config\.json is corrupted\. Take another --workdir"
    with pytest.raises(ValueError, match=match):
        folder.check(tmp_path, {"seed": 0}, {})


def test_a_folder_is_of_one_process_at_a_time(tmp_path):
    """A lock is of an open file: a second one in this process is refused too."""
    match = (
        rf"^workdir: expected a folder that no other run is using, got {tmp_path}, "
        rf"which process {os.getpid()} on .*, since 20.*, uses\. Wait for it, or take"
    )
    with folder.locked(tmp_path):
        with pytest.raises(ValueError, match=match), folder.locked(tmp_path):
            pytest.fail("locked twice")
        with pytest.raises(ValueError, match=match):
            folder.claim(tmp_path, {}, {})
        assert not (tmp_path / "config.json").exists()
    with folder.locked(tmp_path):
        pass


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_the_kernel_drops_the_lock_of_a_process_that_was_killed(tmp_path):
    command = [sys.executable, "-S", "-c", HOLD, tmp_path / "lock"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as child:
        assert child.stdout.readline() == b"locked\n"
        with pytest.raises(ValueError, match="which another process uses"):
            folder.claim(tmp_path, {}, {})
        child.kill()
        child.wait()
        folder.claim(tmp_path, {}, {})


def test_a_disk_without_locks_is_used_without(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(folder.fcntl, "flock", flock)
    with folder.locked(tmp_path), folder.locked(tmp_path):
        pass


@pytest.mark.parametrize("name", ["net[4]", "what?", "*", "a#b", "10%", "a\\b"])
def test_a_path_that_cannot_be_read_back_is_refused(name):
    with pytest.raises(ValueError, match="^workdir: expected a path without .*another"):
        folder.check_path(Path("runs") / name / "one")
    folder.check_path(Path("runs/é ü,+=:;~$&'\"!(1)"))
