"""The check of a machine: what passes here, and what each row notices."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments import selfcheck
from spikejax.experiment.cli import override
from spikejax.train.sharding import data_mesh, place_state

SMALL = {
    "model": "convnet",
    "neuron": "relu",
    "image_size": 8,
    "dtype": "float32",
    "batch_size": 8,
}


def test_a_machine_that_works_passes(tmp_path, capsys):
    flags = override(selfcheck.DEFAULT, SMALL | {"workdir": tmp_path})
    selfcheck.main(flags)
    out = capsys.readouterr().out
    assert "FAIL" not in out and out.count("pass  ") == 9
    for text in ("8 x cpu, 1 process(es)", "all-reduce of", "8 here", "apart, at most"):
        assert text in out
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_what_fails_is_named_and_the_exit_code_is_1(monkeypatch, capsys):
    rows = [selfcheck.Row("devices", "none", False), selfcheck.Row("time", "1", True)]
    monkeypatch.setattr(selfcheck, "check", lambda flags: iter(rows))
    with pytest.raises(SystemExit) as exit:
        selfcheck.main(selfcheck.DEFAULT)
    assert exit.value.code == 1
    assert "selfcheck: failed: devices." in capsys.readouterr().err


def test_each_process_tells_what_failed_there(monkeypatch, capsys):
    rows = [selfcheck.Row("devices", "none", False), selfcheck.Row("time", "1", True)]
    monkeypatch.setattr(selfcheck, "check", lambda flags: iter(rows))
    monkeypatch.setattr(selfcheck.processes, "shard", lambda: (1, 2))
    with pytest.raises(SystemExit):
        selfcheck.main(selfcheck.DEFAULT)
    assert capsys.readouterr().out == "FAIL  process 1: devices: none\n"


def test_a_folder_that_is_not_shared_is_a_row(monkeypatch, tmp_path):
    def all_gather(value):
        return [value, False if value is True else value]

    monkeypatch.setattr(selfcheck.processes, "all_gather", all_gather)
    monkeypatch.setattr(selfcheck.workdir, "PATIENCE", 0)
    row = selfcheck.check_folder(tmp_path)
    assert not row.passed and "where process 1 does not see" in row.found
    assert not list(tmp_path.iterdir())


class TooLarge:
    """A compiled step for which there is no memory."""

    def lower(self, *_):
        return self

    compile, as_text = lower, lambda self: ""

    def __call__(self, state, batch):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 37 GB\nmore")


def test_a_step_that_does_not_fit_is_a_row(monkeypatch):
    monkeypatch.setattr(selfcheck, "make_step", lambda *_: ({}, TooLarge()))
    monkeypatch.setattr(selfcheck, "check_memory", lambda *_: None)
    *_, last = selfcheck.check(override(selfcheck.DEFAULT, SMALL))
    assert last == ("a step runs", "RESOURCE_EXHAUSTED: 37 GB", False)


def test_devices_are_as_many_as_the_slice_has():
    assert selfcheck.check_devices(None).passed
    assert selfcheck.check_devices("v5e:2x4").passed
    assert not selfcheck.check_devices("v5e:2x2").passed


def test_gradients_that_differ_are_noticed(monkeypatch):
    monkeypatch.setattr(selfcheck, "CLOSE", 1e-12)
    assert not selfcheck.check_numbers().passed


@pytest.mark.parametrize(
    ("fsdp", "kind", "passed"),
    [
        (1, "all-reduce", True),
        (1, "all-gather", False),
        (2, "all-gather", True),
        (2, "all-to-all", False),
    ],
)
def test_gathers_are_noticed(fsdp, kind, passed):
    hlo = f"  %x = f32[8,4]{{1,0}} {kind}(%y), replica_groups={{{{0,1}}}}"
    row = selfcheck.check_communication(hlo, data_mesh(fsdp=fsdp))
    assert row.passed == passed and row.found == f"1 {kind} of 0.0 MB"


@pytest.mark.parametrize(("limit", "passed"), [(None, True), (70, True), (69, False)])
def test_a_step_that_does_not_fit_is_noticed(limit, passed):
    sizes = {"argument": 40, "temp": 25, "output": 41, "alias": 40}
    sizes["generated_code"] = 4
    sizes = {f"{name}_size_in_bytes": size for name, size in sizes.items()}
    compiled = SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**sizes))
    stats = {} if limit is None else {"bytes_limit": limit}
    assert selfcheck.check_memory(compiled, stats).passed == passed


@pytest.mark.parametrize(
    ("bound", "passed"),
    [(None, True), (0.05, True), (0.02, True), (0.019, False), (0.2, False)],
)
def test_steps_that_are_slow_or_were_not_waited_for_are_noticed(bound, passed):
    row = selfcheck.check_time(0.1, bound, 64)
    assert row.passed == passed and row.found.startswith("100.0 ms, 640 images/s")


def test_copies_that_differ_are_noticed():
    mesh = data_mesh(jax.devices()[:2])
    everywhere = NamedSharding(mesh, PartitionSpec())
    first, second = mesh.devices.flat
    one = [jax.device_put(1.0, first), jax.device_put(1.0, second)]
    other = [one[0], jax.device_put(1.0000001, second)]
    make = jax.make_array_from_single_device_arrays
    for parts, passed in ((one, True), (other, False)):
        row = selfcheck.check_copies({"kernel": make((), everywhere, list(parts))})
        assert row.passed == passed and row.found == "2 here, 1 process(es)"


@pytest.mark.parametrize("moves", [True, False])
def test_a_position_in_the_data_that_is_not_restored_is_noticed(
    moves, monkeypatch, tmp_path
):
    def step(state, batch):
        kernel = state["params"]["kernel"] + batch["image"].sum()
        return {"params": {"kernel": kernel}}, {}

    if not moves:
        monkeypatch.setattr(selfcheck._Images, "set_state", lambda self, state: None)
    experiment = override(selfcheck.DEFAULT.experiment, SMALL)
    images = selfcheck._Images(experiment, mesh := data_mesh())
    next(images)
    state = place_state({"params": {"kernel": jnp.ones(3)}}, mesh)
    row = selfcheck.check_resume(tmp_path, step, state, images)
    assert row.passed == moves
