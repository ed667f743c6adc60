"""The command line: every flag explained, and one line for what is wrong."""

import ast
import dataclasses
import inspect
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import cifar10, digits
from spikejax.data import images
from spikejax.experiment import Experiment
from spikejax.experiment.cli import parse, reported
from spikejax.train import TrainConfig
from spikejax.train.processes import Processes

ROOT = Path(__file__).resolve().parents[1]


def command(monkeypatch, *flags, script=digits, main=digits.demo):
    """What `python -m experiments.NAME FLAGS` does, in this process."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
    reported(main, parse(script.DEFAULT, script.__doc__))


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Runs a command that must end in exit code 1 and one line that matches."""

    def run(match, *flags, neuron="mt-parallel", workdir=tmp_path / "new"):
        flags = ["--neuron", neuron, "--batch-size", 48, *flags]
        flags += ["--workdir", workdir]
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            command(monkeypatch, *flags)
        assert exit.value.code == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "Traceback" not in err
        assert re.search(match, err), err
        assert not (tmp_path / "new").exists()

    return run


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--learning-rat", "--learning-rate"),
        ("--num-threshold", "--num-thresholds"),
        ("--timesteps", "--time-steps"),
        ("--batch", "--batch-size"),
    ],
)
def test_an_unknown_flag_is_told_from_the_one_meant(refused, flag, meant):
    refused(rf"^flags: .*, got {flag}\. Did you mean {meant}\?$", flag, 4)
    refused(rf"^flags: .*, got {flag}=4\. Did you mean {meant}\?$", f"{flag}=4")


@pytest.mark.parametrize("flag", ["--zzzzz", "surplus"])
def test_a_flag_like_no_other_points_at_help(refused, flag):
    refused(rf"got {flag}\. --help lists them\.$", flag)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--steps", "many"], r"^flags: .*--steps.*'many'"),
        (["--neuron", "lfi"], r"^flags: .*'lfi' for argument '--neuron'.*'lif'"),
        (["--steps"], r"^flags: .*Missing value for argument '--steps'"),
        (["--time-steps", "0"], r"time_steps: expected at least 1, got 0\.$"),
        (["--learning-rate", "-1"], r"learning_rate: .* more than 0, got -1.0\.$"),
        (["--data", "cifar1O"], r"^data: .*got 'cifar1O'\. Did you mean cifar10"),
    ],
)
def test_bad_input_is_one_line(refused, flags, match):
    refused(match, *flags)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # of frames around errors
def test_a_narrow_terminal_gets_one_line_too(refused, monkeypatch, encoding):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    refused(r"^flags: [^─╭|]*--steps: .*'many'[^─╭|]*$", "--steps", "many")
    refused(r"^flags: .*--neuron.*mt-parallel.*\)\.$", neuron="lfi")


def test_a_file_in_the_place_of_the_folder(tmp_path, refused):
    file = tmp_path / "file"
    file.write_text("")
    refused(rf"'{file}'", workdir=file)


def test_the_shell_sees_exit_code_1_and_one_line(tmp_path):
    child = subprocess.run(
        [sys.executable, "-m", "experiments.cifar10", "--learning-rat", "1"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 1 and child.stdout == ""
    lines = [x for x in child.stderr.splitlines() if "absl" not in x]  # old Grain's
    assert len(lines) == 1 and lines[0].endswith("Did you mean --learning-rate?")


def test_sigterm_before_training_leaves_with_exit_code_0(tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)

    def load(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("SIGTERM was not heard")

    monkeypatch.setattr(images, "load", load)
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, "--workdir", tmp_path / "new", "--neuron", "lif")
    assert exit.value.code == 0
    assert "The same command goes on" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


def documented(config):
    """{field: its docstring} of a dataclass."""
    (tree,) = ast.parse(inspect.getsource(config)).body
    pairs = zip(tree.body, tree.body[1:], strict=False)
    return {
        field.target.id: text.value.value
        for field, text in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


@pytest.mark.parametrize("script", [digits, cifar10])
def test_help_explains_every_flag(script, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, "--help", script=script)
    assert exit.value.code == 0
    text = re.sub(r"[\s│]+", "", capsys.readouterr().out)
    configs = (Experiment, TrainConfig, Processes)
    lines = {name: line for c in configs for name, line in documented(c).items()}
    if script is digits:
        lines |= documented(digits.Digits)
    fields = {f.name for c in configs for f in dataclasses.fields(c)}
    assert set(lines) == fields
    for name, line in lines.items():
        assert re.sub(r"\s+", "", line) in text, name
        if name not in ("train", "processes"):
            assert f"--{name.replace('_', '-')}" in text
    assert re.sub(r"\s+", "", script.__doc__.split("\n")[0]) in text


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--learning-rate", "0.3"], "learning_rate", 0.3),
        (["--steps", "7"], "steps", 7),
        (["--batch-size=16"], "batch_size", 16),
    ],
)
def test_flags_of_the_recipe_need_no_prefix(monkeypatch, flags, name, value):
    monkeypatch.setattr(sys, "argv", ["cifar10", *flags])
    parsed = parse(cifar10.DEFAULT, None)
    assert getattr(parsed.train, name) == value
    rest = dataclasses.replace(parsed, train=cifar10.DEFAULT.train)
    assert rest == cifar10.DEFAULT
