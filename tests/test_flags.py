"""Every flag of every script changes the run, network or data, or is refused."""

import contextlib
import dataclasses
import functools
import re
from types import SimpleNamespace
from typing import get_args

import jax
import numpy as np
import pytest
from flax import nnx
from test_cli import command

from experiments import (
    cifar10,
    convert,
    digits,
    dvs_cifar10,
    general,
    imagenet,
    speech,
)
from spikejax.data import events, images, sequences
from spikejax.data.split import Arrays
from spikejax.experiment import build, config
from spikejax.experiment.cli import flag_name, flatten
from spikejax.train import TrainConfig, processes

# Other values of each flag, of which the first that is not the script's default is
# taken, and the flags without which it has no meaning.
TURNED = {
    "--workdir": "other",
    "--data": "digits",
    "--data-dir": "elsewhere",
    "--image-size": "16",
    "--augment": "none|crop-flip",
    "--model": "convnet|vgg11",
    "--residual": "sew --model resnet20",
    "--width": "0.5 --model resnet20",
    "--remat": "blocks --model resnet20",
    "--dtype": "bfloat16|float32 --model resnet20",
    "--pool": "avg|max --model convnet",
    "--binarise": "straight-through --model general-cnn --neuron lif",
    "--neuron": "plif",
    "--num-thresholds": "3 --neuron mt-cascade",
    "--surrogate": "rectangle --neuron lif --model convnet",
    "--time-steps": "3 --neuron lif",
    "--loss": "tet|rate --neuron lif --time-steps 2",
    "--label-smoothing": "0.3",
    "--from": "elsewhere",
    "--workers": "2",
    "--fsdp": "2",
    "--profile": "",
    "--coordinator-address": "h:1 --num-processes 2 --process-id 0",
    "--num-processes": "3 --coordinator-address h:1 --process-id 0",
    "--process-id": "1 --coordinator-address h:1 --num-processes 2",
    "--heartbeat": "7",
    "--join-timeout": "7",
    "--epochs": "3",
    "--steps": "7",
    "--batch-size": "32",
    "--seed": "5",
    "--optimizer": "adamw|sgd",
    "--learning-rate": "0.7",
    "--learning-rate-batch": "64",
    "--warmup": "0.4",
    "--weight-decay": "0.3",
    "--clip": "2",
    "--ema": "0.9",
    "--norm-groups": "2 --model convnet",
    "--evaluate-every": "2",
    "--save-every": "9",
    # Of single scripts
    "--network": "relu",
    "--drop": "0.5",
    "--sort": "",
    "--noise": "0.5",
    "--frames": "voxel",
    "--side": "5",
    "--window-ms": "20",
    "--stream": "RECORDINGS/left.npz --frames duration",
    "--layers": "3 --model dense",
    "--hidden": "16 --model dense",
    "--recurrent": " --model dense",
    "--delays": "4 --model dense",
    "--tau": "3 --model dense",
    "--readout": "max --model dense",
    "--hold-out": "jackson",
    "--coding": "delta",
    "--step-ms": "10",
    "--validation": "",
    "--relu": "elsewhere",
    "--bits": "3",
    "--quant-epochs": "3",
    "--quant-learning-rate": "0.5",
    "--sweep": "",
}
ALWAYS = {  # cifar100 and tinyimagenet are cifar10 with other defaults
    script: "--data fake --batch-size 16"
    for script in (cifar10, convert, digits, general, imagenet)
}
ALWAYS[dvs_cifar10] = "--data RECORDINGS --batch-size 16 --side 8 --time-steps 2"
ALWAYS[speech] = "--batch-size 16"
# They choose what is evaluated of a trained network: test_convert_script.py.
EVALUATION = {"--max-steps", "--test-images"}


def flags_of(script):
    """{flag: default} of a script and of the networks and neurons that it may take."""
    found = {flag_name(n): v for n, v in flatten(script.DEFAULT).items()}
    for kind in get_args(build.NetworkOptions) + get_args(build.ActivationOptions):
        found = {flag_name(n): v for n, v in flatten(kind()).items()} | found
    return {flag: v for flag, v in found.items() if flag not in EVALUATION}


# Groups that arrive as a whole; one flag of each will do in all scripts but one.
WHOLE = set(map(flag_name, (*flatten(TrainConfig()), *flatten(processes.Processes()))))
WHOLE -= {"--seed", "--heartbeat"}
CASES = [
    (script, flag)
    for script in ALWAYS
    for flag in flags_of(script)
    if script is cifar10 or flag not in WHOLE
]


ROW = {"name": "", "ann_accuracy": 1.0, "accuracy": [1.0]}
ROW["early_exit"] = {"accuracy": 1.0, "mean_steps": 1.0}
RESULT = dict.fromkeys(("accuracy", "seconds", "spikes_per_image", "energy_nj"), 1.0)
RESULT |= {"mac_nj": 1.0, "ann_energy_nj": 1.0}

load = functools.cache(images.load)
BEFORE = {}  # (script, what a flag needs) -> effect without the flag


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A folder of two recordings, which are cut into samples."""
    path, rng = tmp_path_factory.mktemp("recordings"), np.random.default_rng(0)
    for name in ("left", "right"):
        x, y, p = (rng.integers(0, n, 400) for n in (16, 16, 2))
        t = np.linspace(0, 1_000_000, 400).astype(int)
        np.savez(path / f"{name}.npz", x=x, y=y, t=t, p=p, width=16, height=16)
    return path


def stand_ins(note):
    """Yields (module, name, function in its place) for all that takes long.

    What they are called with goes to note, as far as it reaches training.
    """

    def fit(recipe, model, loss, train_data, eval_data, *, encode, mesh, **more):
        batch, held_out = next(train_data), next(iter(eval_data))
        logits = jax.random.normal(jax.random.key(0), (4, 2, 10))
        note(recipe, model, np.asarray(loss(logits, np.arange(4))).tolist())
        note(*(a[0].tobytes() for a in (batch["image"], held_out["image"])))
        note(jax.eval_shape(encode, batch["image"], None), mesh.shape, more)
        return SimpleNamespace(model=None, metrics=RESULT | {"steps": 1}, finished=True)

    def train_batches(*args, workers, **options):
        return note(workers) or original(*args, workers=0, **options)

    def load_events(name, framing, data_dir, **cache):
        note(data_dir, framing.sort)  # these recordings are in order
        return events.load(name, framing, None, **cache)

    ones, twos = np.ones((16, 2, 3), "f4"), np.full(16, 2, "i4")
    split = Arrays(ones, np.arange(16, dtype="i4"), twos)
    spoken = sequences.SequenceSet(split, split, ("", ""), "")
    original = images.train_batches
    yield config, "fit", fit
    yield config, "report", lambda *_: RESULT
    yield config, "build_model", lambda *options, **more: (options, more)
    yield images, "load", lambda name, folder=None: note(folder) or load(name)
    yield images, "train_batches", train_batches
    nothing = contextlib.nullcontext
    yield processes, "distributed", lambda flags, _: note(flags) or nothing()
    yield dvs_cifar10, "load_events", load_events
    yield dvs_cifar10, "by_class", lambda *_: {}
    yield dvs_cifar10, "report", lambda *_, **more: RESULT
    yield dvs_cifar10, "run_stream", lambda *_: note("streamed")
    yield speech.speech, "spoken_digit", lambda *a, **more: note(a, more) or spoken
    yield speech, "report", lambda *_, **more: RESULT | more | {"parameters": 1}
    yield convert, "calibrate", lambda *_, **more: SimpleNamespace(model=None)
    yield convert.Conversions, "row", lambda self, *args: note(args) or ROW
    picture = SimpleNamespace(savefig=lambda *_, **more: None)
    yield convert, "figure", lambda _: picture
    yield digits, "show", lambda *_: None
    yield general, "table", lambda *_: None


@pytest.fixture
def effect(monkeypatch, recordings, tmp_path, capsys):
    """(script, words) -> all that reaches training, or the error's line."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(recordings))
    monkeypatch.chdir(tmp_path)
    found = []
    for owner, name, function in stand_ins(lambda *words: found.extend(words)):
        monkeypatch.setattr(owner, name, function)

    def run(script, words):
        found.clear()
        words = words.replace("RECORDINGS", str(recordings)).split()
        try:
            command(monkeypatch, *words, script=script)
        except SystemExit:
            return "error: " + capsys.readouterr().err
        return re.sub(" at 0x[0-9a-f]+", "", repr(found))

    return run


@pytest.mark.parametrize(
    ("script", "flag"), CASES, ids=[f"{s.__name__[12:]}{f}" for s, f in CASES]
)
def test_no_flag_is_silent(effect, script, flag):
    values, _, needed = TURNED[flag].partition(" ")
    default = str(flags_of(script)[flag])
    value = next((v for v in values.split("|") if v != default), values)
    if (script, needed) not in BEFORE:
        BEFORE[script, needed] = effect(script, f"{ALWAYS[script]} {needed}")
    before = BEFORE[script, needed]
    if before.startswith("error"):  # the script does not take what the flag needs
        needed, before = "", BEFORE.get((script, ""), "")
    assert not before.startswith("error"), before
    after = effect(script, f"{ALWAYS[script]} {needed} {flag} {value}")
    assert after != before and after.count("\n") <= 1, (flag, value)


def layout(network, activation, **more):
    """The modules of a network with their settings, and the shapes of its arrays."""
    factory = build.neuron_factory(activation, network)
    parts = {"num_classes": 10, "in_channels": 3, "neuron": factory}
    model = nnx.eval_shape(lambda: network.build(**parts, rngs=nnx.Rngs(0)))
    rows = [jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(model)))]
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            kept = {k: getattr(v, "__name__", v) for k, v in vars(node).items()}
            kinds = str | int | float | tuple | np.dtype
            rows.append((path, {k: v for k, v in kept.items() if isinstance(v, kinds)}))
    return re.sub(" at 0x[0-9a-f]+", "", repr(rows))


def options():
    small = {"width": 0.1}
    networks = (
        build.ResNetOptions("resnet20", **small),
        build.VGGOptions("convnet"),
        build.GeneralOptions(**small),
        build.TransformerOptions(),
        build.SequenceOptions(),
        build.BaselineOptions(),
    )
    other = {
        "model": "resnet18|vgg11|general-lstm|sdt-2-256|dense|linear",
        "layers": 3,
        "hidden": 16,
        "recurrent": True,
        "delays": 4,
        "tau": 3.0,
        "readout": "max",
        "residual": "plain",
        "width": 0.2,
        "remat": "blocks",
        "dtype": "bfloat16",
        "pool": "avg",
        "binarise": "straight-through",
    }
    found = [(n, f.name) for n in networks for f in dataclasses.fields(n)]
    # The readout is part of the loss, and there is one network of dense layers.
    kept = [(n, f) for n, f in found if f != "readout" and getattr(n, f) != "dense"]
    return [(n, f, other[f]) for n, f in kept]


@pytest.mark.parametrize(
    ("network", "name", "value"), options(), ids=lambda v: getattr(v, "model", None)
)
def test_every_option_changes_the_network(network, name, value):
    lif = build.SingleOptions("lif")
    if name == "model":
        place = ("resnet", "vgg", "general", "transformer", "sequence", "baseline")
        kind = type(network).__name__.removesuffix("Options").lower()
        value = value.split("|")[place.index(kind)]
    if name == "pool" and network.model == "resnet20":  # which has no pooling
        network = dataclasses.replace(network, model="resnet18-imagenet")
    other = dataclasses.replace(network, **{name: value})
    assert layout(other, lif) != layout(network, lif) == layout(network, lif)


def test_every_neuron_is_another():
    options = [build.SingleOptions(name) for name in ("lif", "plif", "if", "alif")]
    options += [build.ReLUOptions()]
    several = build.MultiThresholdOptions
    options += [several(), several(num_thresholds=3), several("mt-cascade")]
    options += [several("i-lif"), several(surrogate="rectangle")]
    made = {layout(build.VGGOptions(), option) for option in options}
    assert len(made) == len(options)
