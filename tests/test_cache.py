"""Compiled programs are kept where JAX was not told otherwise, and the user is told."""

import platform
from pathlib import Path
from typing import Any

import jax
import pytest

from spikejax import cache


@pytest.fixture
def config():
    """JAX as a user has it: no cache; put back afterwards."""
    config: Any = jax.config
    before = config.jax_compilation_cache_dir
    config.update("jax_compilation_cache_dir", None)
    yield config
    config.update("jax_compilation_cache_dir", before)


def test_it_is_kept_for_this_machine_and_said_once(
    config, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache.keep_programs()
    kept = tmp_path / "spikejax" / f"programs-{platform.node()}"
    assert config.jax_compilation_cache_dir == str(kept)
    said = f"Compiled programs are kept in {kept} for the next run.\n"
    assert capsys.readouterr().out == said
    cache.keep_programs()
    assert capsys.readouterr().out == ""


def test_a_folder_that_jax_was_given_stays(config, tmp_path, capsys):
    config.update("jax_compilation_cache_dir", str(tmp_path))
    cache.keep_programs()
    assert config.jax_compilation_cache_dir == str(tmp_path)
    assert capsys.readouterr().out == ""


def test_nothing_is_kept_by_those_who_want_none(config, capsys):
    config.update("jax_enable_compilation_cache", False)
    try:
        cache.keep_programs()
    finally:
        config.update("jax_enable_compilation_cache", True)
    assert config.jax_compilation_cache_dir is None and capsys.readouterr().out == ""


def test_the_folder_of_the_user(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/ada")
    assert cache.folder() == Path("/home/ada/.cache/spikejax")
