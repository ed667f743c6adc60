"""The command line: every flag explained, one line for an error, the cache."""

import ast
import dataclasses
import errno
import inspect
import io
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from benchmarks import neuron
from experiments import cifar10, digits, imagenet, predict
from spikejax.data import images
from spikejax.experiment import MultiThresholdOptions, SingleOptions, VGGOptions, cli
from spikejax.experiment.cli import flag_name, flatten, parse, run_cli
from spikejax.train import TrainConfig
from spikejax.train.processes import Processes

ROOT = Path(__file__).resolve().parents[1]


def command(monkeypatch, *flags, script=digits):
    """What `python -m experiments.NAME FLAGS` does, in this process."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
    if hasattr(script, "command"):
        return script.command()
    main = script.show if hasattr(script, "show") else script.main
    options = getattr(script, "OPTIONS", ())
    run_cli(main, parse(script.DEFAULT, script.__doc__, *options))


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


def test_a_narrow_terminal_gets_one_line_too(refused, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    refused(r"^flags: expected an integer after --steps, got 'many'", "--steps=many")
    refused(r"^flags: expected one of max, avg after --pool, .*\.$", "--pool", "min")


def test_a_file_in_the_place_of_the_folder(tmp_path, refused):
    file = tmp_path / "file"
    file.write_text("")
    refused(f"^{file}: File exists. Check the path", workdir=file)


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
    assert "Rerun the same command to resume" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_before_training_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(images, "load", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, "--workdir", tmp_path / "new", "--neuron", "lif")
    assert exit.value.code == 130
    assert capsys.readouterr().out.startswith("Stopped. Rerun the same command")


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO])
def test_a_closed_output_does_not_end_a_run(tmp_path, monkeypatch, number):
    """As after | head -1, and in a terminal that is gone."""
    said, path = [], tmp_path / "out"

    class Closed(io.TextIOWrapper):
        def write(self, text):
            raise OSError(number, os.strerror(number))

    def script(flags):
        print("one")
        print("two", flush=True)
        said.append(flags)

    with path.open("wb") as file:
        monkeypatch.setattr(sys, "stdout", Closed(file, "utf-8"))
        run_cli(script, digits.DEFAULT)
        os.write(file.fileno(), b"dropped")
    assert said == [digits.DEFAULT] and path.read_bytes() == b""


def test_other_errors_of_the_output_are_one_line(monkeypatch, capsys):
    def write(text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=write))
    with pytest.raises(SystemExit) as exit:
        run_cli(lambda _: print("one"), digits.DEFAULT)
    assert exit.value.code == 1
    said = "No space left on device. Check the path, its permissions, and the space on"
    assert capsys.readouterr().err == said + " its disk.\n"


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
    text = re.sub(r"\s+", "", capsys.readouterr().out)
    default = script.DEFAULT
    configs = (default, default.inputs, default.network, default.activation)
    configs = (*map(type, configs), TrainConfig, Processes)
    lines = {name: line for c in configs for name, line in documented(c).items()}
    assert set(lines) >= set(flatten(default))
    for name in flatten(default):
        assert re.sub(r"\s+", "", lines[name]) in text, name
        assert flag_name(name) in text
    assert re.sub(r"\s+", "", script.__doc__.split("\n")[0]) in text


@pytest.mark.parametrize(
    ("words", "usage"),
    [([], "[plan] [RECIPE] [-h]"), (["plan", "lif-resnet34"], "[plan] [RECIPE] [-h]")],
)
def test_usage_is_what_is_typed(words, usage, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/x/experiments/imagenet.py", *words, "--help"])
    with pytest.raises(SystemExit):
        imagenet.command()
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"usage: python -m experiments.imagenet {usage}")


def test_a_flag_of_another_group_starts_from_the_options_of_the_script(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["x", "--model", "resnet20", "--neuron=mt-cascade"]
    )
    chosen = parse(cifar10.DEFAULT, None, MultiThresholdOptions(num_thresholds=7))
    assert chosen.network == cifar10.DEFAULT.network
    assert chosen.activation == MultiThresholdOptions("mt-cascade", 4)
    monkeypatch.setattr(sys, "argv", ["x", "--model", "vgg11", "--neuron", "lif"])
    chosen = parse(cifar10.DEFAULT, None, VGGOptions(pool="avg"))
    assert chosen.network == VGGOptions("vgg11", pool="avg")
    assert chosen.activation == SingleOptions("lif")


def test_a_group_keeps_the_flags_that_it_shares_with_the_one_before(monkeypatch):
    for model in ("efficientnet-lite0", "transformer-small"):
        monkeypatch.setattr(sys, "argv", ["x", "--model", model])
        found = flatten(parse(imagenet.DEFAULT, None))
        assert (found["model"], found["dtype"]) == (model, "bfloat16")


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


@pytest.mark.parametrize(
    ("default", "words", "expected"),
    [
        (imagenet.DEFAULT, "--augment none --image-size None", {"image_size": None}),
        (imagenet.DEFAULT, "--profile --clip 2", {"profile": True, "clip": 2.0}),
        (imagenet.DEFAULT, "--no-profile --steps=3", {"profile": False, "steps": 3}),
        (neuron.Benchmark(), "--time-steps 1 4", {"time_steps": (1, 4)}),
        (predict.DEFAULT, "--picture=p R a b", {"network": "R", "files": ("a", "b")}),
        (predict.DEFAULT, "R --picture p a", {"files": ("a",), "picture": Path("p")}),
    ],
)
def test_words_become_values_of_the_type_of_their_field(
    default, words, expected, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["x", *words.split()])
    found = flatten(parse(default, None))
    assert {name: found[name] for name in expected} == expected


# Compiled programs


@pytest.fixture
def config():
    """JAX as a user has it: no cache; put back afterwards."""
    config: Any = jax.config
    before = config.jax_compilation_cache_dir
    config.update("jax_compilation_cache_dir", None)
    yield config
    config.update("jax_compilation_cache_dir", before)


def test_programs_are_cached_for_this_machine(config, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "spikejax" / f"programs-{platform.node()}"
    assert cli.cache_programs() == folder
    assert config.jax_compilation_cache_dir == str(folder)
    assert cli.cache_programs() is None  # said once


def test_a_folder_that_jax_was_given_stays(config, tmp_path):
    config.update("jax_compilation_cache_dir", str(tmp_path))
    assert cli.cache_programs() is None
    assert config.jax_compilation_cache_dir == str(tmp_path)


def test_nothing_is_cached_for_those_who_want_none(config):
    config.update("jax_enable_compilation_cache", False)
    try:
        assert cli.cache_programs() is None
    finally:
        config.update("jax_enable_compilation_cache", True)
    assert config.jax_compilation_cache_dir is None


def test_the_folder_of_the_user(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/ada")
    assert cli.cache_folder() == Path("/home/ada/.cache/spikejax")


def test_help_has_a_group_per_part_with_all_that_a_flag_selects(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["cifar10", "--model", "whitened", "--help"])
    with pytest.raises(SystemExit) as exit:
        parse(digits.DEFAULT, "Train.\n\n    python -m x\n")
    text = capsys.readouterr().out
    assert not exit.value.code and "Train.\n\n    python -m x\n" in text
    groups = re.findall(r"(\w+) options:", text)
    assert groups == ["inputs", "network", "activation", "train", "processes"]
    network = text[text.index("network options") : text.index("activation options")]
    assert "18, 19 and 20 are those for CIFAR" in " ".join(network.split())
    for words in ("resnet152", "general-lstm", "vggsnn", "--model VALUE --help has"):
        assert words in network
    assert "--pool" in network and "--residual" not in network
    # A text of several lines in the source is one paragraph.
    text = " ".join(text.split())
    assert "from whose weights the training starts: to train longer, with" in text
