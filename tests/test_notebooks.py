"""Every notebook runs from top to bottom, and is kept without outputs."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
FILES = sorted(NOTEBOOKS.glob("*.ipynb"))
TIDY = runpy.run_path(str(NOTEBOOKS / "tidy.py"))

# Here the notebooks train for less: every cell runs, for 60 % of the CPU time. All of
# it with SPIKEJAX_NOTEBOOKS=whole.
SHORTER = {
    "02_train": {"epochs=4, batch_size=48, evaluate_every=2": "steps=2, batch_size=48"},
    "03_convert": {
        "epochs=6, batch_size=48, evaluate_every=3": "steps=2, batch_size=48",
        "epochs=3, batch_size=48, learning_rate=0.03, evaluate_every=3": "steps=2",
    },
    "04_events": {"epochs=20": "epochs=1", "evaluate_every=10": "evaluate_every=1"},
    "05_own_model": {"range(100)": "range(2)"},
}

# Runs the cells of the notebook in one namespace; an error names the cell.
RUN = """
import json, sys, warnings
warnings.simplefilter("error")
cells = json.loads(sys.stdin.read())["cells"]
namespace = {"__name__": "__main__"}
for number, cell in enumerate(cells):
    if cell["cell_type"] == "code":
        code = compile("".join(cell["source"]), f"cell {number}", "exec")
        exec(code, namespace)
"""


def test_the_notebooks_are_found():
    assert [path.name[:2] for path in FILES] == [f"0{n}" for n in range(1, 8)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    pytest.importorskip("matplotlib")
    # One device, as a user has it, but quick to compile: 47 s of CPU time instead of 67
    # for 05_own_model. The notebook must import this checkout, also where another one
    # is installed.
    flags = os.environ["XLA_FLAGS"].replace("count=8", "count=1")
    environment = os.environ | {"MPLBACKEND": "Agg", "XLA_FLAGS": flags}
    environment["PYTHONPATH"] = str(NOTEBOOKS.parent)
    notebook = path.read_text("utf-8")
    if os.environ.get("SPIKEJAX_NOTEBOOKS") != "whole":
        for text, shorter in SHORTER.get(path.stem, {}).items():
            assert notebook.count(text) == 1
            notebook = notebook.replace(text, shorter)
    run = subprocess.run(
        [sys.executable, "-c", RUN],
        input=notebook,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_notebook_is_tidy(path):
    text = path.read_text("utf-8")
    assert text == TIDY["tidy"](text, path.name, TIDY["address"]()), (
        "run python notebooks/tidy.py"
    )


def tidied(notebook: dict, address: str | None) -> dict:
    return json.loads(TIDY["tidy"](json.dumps(notebook), "01_x.ipynb", address))


def untidy() -> dict:
    return {
        "cells": [
            {"cell_type": "markdown", "source": ["# Title\n", "\n", "Text."]},
            {"cell_type": "code", "source": ["# spikejax[experiments,events]"]},
            {"cell_type": "code", "execution_count": 3, "outputs": [1], "source": ["x"]}
            | {"metadata": {"scrolled": True}},
        ]
    }


def test_tidy_takes_outputs_away():
    cell = tidied(untidy(), None)["cells"][2]
    assert cell["outputs"] == [] and cell["execution_count"] is None
    assert cell["metadata"] == {} and cell["source"] == ["x"]


def test_badge_and_address_are_there_only_with_an_address():
    files_only = tidied(untidy(), None)
    assert "github.com" not in json.dumps(files_only)
    assert "Colab]" not in json.dumps(files_only)
    known = tidied(files_only, "someone/spikejax")
    title, install = ("".join(cell["source"]) for cell in known["cells"][:2])
    place = "github/someone/spikejax/blob/main/notebooks/01_x.ipynb"
    assert f"(https://colab.research.google.com/{place})\n\nText." in title
    package = "spikejax[experiments,events] @ git+https://github.com/someone/spikejax"
    assert f'"{package}"' in install
    assert tidied(known, "someone/spikejax") == known
    assert tidied(known, None) == files_only


def installed(folder: Path, address: str | None, monkeypatch) -> str:
    """Run the first cell of code in a folder; return what it gives to pip."""
    given = []
    monkeypatch.chdir(folder)
    monkeypatch.setattr("importlib.metadata.distributions", lambda name: iter(()))
    monkeypatch.setattr("subprocess.run", lambda command, check: given.append(command))
    exec("".join(tidied(untidy(), address)["cells"][1]["source"]), {})
    ((python, *_, package),) = given
    assert python == sys.executable
    return package


def test_first_cell_installs_a_wheel_a_clone_or_from_github(tmp_path, monkeypatch):
    (tmp_path / "spikejax").mkdir()  # a folder of that name, not yet a clone
    with pytest.raises(FileNotFoundError, match=r"upload spikejax-\*\.whl"):
        installed(tmp_path, None, monkeypatch)
    package = installed(tmp_path, "someone/spikejax", monkeypatch)
    assert package.endswith(
        "[experiments,events] @ git+https://github.com/someone/spikejax"
    )
    extras = "[experiments,events]"
    assert installed(NOTEBOOKS, None, monkeypatch) == f"{NOTEBOOKS.parent}{extras}"
    (tmp_path / "spikejax/spikejax").mkdir()
    (tmp_path / "spikejax/spikejax/layers.py").touch()
    assert installed(tmp_path, None, monkeypatch) == f"{tmp_path / 'spikejax'}{extras}"
    wheel = tmp_path / "spikejax-0.2.0-py3-none-any.whl"
    wheel.touch()
    assert installed(tmp_path, None, monkeypatch) == f"{wheel}{extras}"
