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
    assert [path.name[:2] for path in FILES] == ["01", "02", "03", "04", "05", "06"]


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
def test_notebook_is_tidy_and_has_its_badge(path):
    text = path.read_text("utf-8")
    tidy = runpy.run_path(str(NOTEBOOKS / "tidy.py"))
    assert text == tidy["tidy"](text), "run python notebooks/tidy.py"
    first = "".join(json.loads(text)["cells"][0]["source"])
    place = f"github/{tidy['address']()}/blob/main/notebooks/{path.name}"
    assert f"(https://colab.research.google.com/{place})" in first


def test_tidy_takes_outputs_and_the_old_address_away():
    tidy = runpy.run_path(str(NOTEBOOKS / "tidy.py"))
    source = ["x  # https://github.com/somebody-else/spikejax"]
    cell = {"cell_type": "code", "execution_count": 3, "outputs": [1], "id": "a"}
    cell |= {"metadata": {"scrolled": True}, "source": source}
    notebook = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (kept,) = json.loads(tidy["tidy"](json.dumps(notebook)))["cells"]
    assert kept["outputs"] == [] and kept["execution_count"] is None
    assert kept["source"] == [f"x  # https://github.com/{tidy['address']()}"]
