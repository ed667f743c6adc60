"""The folder of a run: its files, and the check that it is this run's."""

import json

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
    folder.write(path, [])
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_of_several_processes_the_first_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "is_primary", lambda: False)
    folder.write(tmp_path / "result.json", {})
    assert not list(tmp_path.iterdir())


def test_a_folder_belongs_to_one_run(tmp_path):
    settings = {"seed": 0, "model": "vgg11"}
    folder.check(tmp_path, settings, {})
    assert folder.claim(tmp_path, settings) == tmp_path
    folder.check(tmp_path, settings, {})
    match = r"holds another: seed was 0 and is 1\. Take another --workdir"
    with pytest.raises(ValueError, match=match):
        folder.check(tmp_path, settings | {"seed": 1}, {})
    newer = {"width": 1.0}
    folder.check(tmp_path, settings | newer, newer)  # a flag that was added since
    folder.check(tmp_path, {"seed": 0}, {})  # one that was removed
    with pytest.raises(ValueError, match="width was 1.0 and is 2.0"):
        folder.check(tmp_path, settings | {"width": 2.0}, newer)


def test_a_folder_that_a_process_does_not_see_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "all_gather", lambda value: [value, False])
    match = (
        rf"^workdir: expected a folder that all processes share, got {tmp_path}, where "
        "process 1 does not see what process 0 wrote"
    )
    with pytest.raises(ValueError, match=match):
        folder.claim(tmp_path, {})


@pytest.mark.parametrize("text", ["", "[]", '{"seed": 0'])
def test_damaged_settings_are_an_error_that_names_the_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    match = r"holds another: config\.json is corrupted\. Take another --workdir"
    with pytest.raises(ValueError, match=match):
        folder.check(tmp_path, {"seed": 0}, {})
