import contextlib
import copy
import functools
import gc
import os
import re
import shutil
import threading
import warnings

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from spikejax.train import checkpoint, processes, sharding
from spikejax.train.checkpoint import Checkpoints, CheckpointWarning
from spikejax.train.checksum import SUMS, by_path, find_corruption

NOTES = "_CHECKPOINT_METADATA"


@functools.cache
def make_state(step, devices=8):
    """A state like that of a run: sharded kernel, optax's tuples, random keys."""
    mesh = sharding.data_mesh(jax.devices()[:devices])
    everywhere = NamedSharding(mesh, PartitionSpec())
    across = NamedSharding(mesh, PartitionSpec(None, None, None, "data"))
    kernel = jax.random.normal(jax.random.key(step), (3, 3, 8, 64))
    params = {"stem": {"kernel": kernel, "bias": jnp.ones(64, jnp.bfloat16)}}
    state = {
        "params": params,
        "opt": optax.chain(optax.clip(1.0), optax.adamw(0.1)).init(params),
        "keys": {"noise": jax.random.key(step), "old": jax.random.key(3, impl="rbg")},
        "step": jnp.int32(step),
        "nothing": {},
    }
    state = jax.device_put(state, everywhere)
    state["params"]["stem"]["kernel"] = jax.device_put(kernel, across)
    return state


def abstract(state):
    def struct(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(struct, state)


def make_data(steps=0):
    data = grain.MapDataset.range(100).seed(1).shuffle().repeat().batch(4)
    iterator = iter(data.to_iter_dataset())
    for _ in range(steps):
        next(iterator)
    return iterator


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        assert (one.dtype, one.sharding) == (other.dtype, other.sharding)
    expected = by_path(expected)
    for path, leaf in by_path(found).items():
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, expected[path] = map(jax.random.key_data, (leaf, expected[path]))
        np.testing.assert_array_equal(leaf, expected[path])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints 1, 2 and 3; tests work on copies."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step), make_data(step))
    checkpoints.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def restore(folder, like=None, data=None):
    """What is found there: (step, state), or None."""
    like = make_state(0) if like is None else like
    with contextlib.closing(Checkpoints(folder, keep=3)) as checkpoints:
        return checkpoints.restore(abstract(like), data or make_data())


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    data = make_data(2)
    assert restore(tmp_path / "new" / "folder", data=data) is None
    assert data.get_state() == make_data(2).get_state()


@pytest.mark.parametrize("devices", [8, 2])
def test_state_and_data_come_back_as_they_were(folder, devices):
    data = make_data()
    step, state, _ = restore(folder, make_state(0, devices), data=data)
    assert step == 3
    assert_same(state, make_state(3, devices))
    np.testing.assert_array_equal(next(data), next(make_data(3)))


def test_the_state_may_be_donated_while_it_is_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    step_on = jax.jit(lambda kernel: kernel + 1, donate_argnums=0)
    kernel = jax.device_put(jnp.zeros((256, 256)), jax.devices()[0])
    for step in range(1, 4):
        kernel = step_on(kernel)
        checkpoints.save(step, {"kernel": kernel}, make_data())
    checkpoints.close()
    step, state, _ = restore(tmp_path, like={"kernel": kernel})
    assert step == 3 and bool((state["kernel"] == 3).all())


def save_all(folder, metrics, keep=2, first=1):
    """The steps that are left when steps with these metrics were saved."""
    checkpoints = Checkpoints(folder, keep=keep)
    state = {"x": jax.device_put(jnp.zeros(3), jax.devices()[0])}
    data = make_data()
    for step, metric in enumerate(metrics, first):
        checkpoints.save(step, state, data, metric=metric)
    checkpoints.close()
    assert sorted(map(str, checkpoints.steps)) == sorted(os.listdir(folder))
    return checkpoints.steps


@pytest.mark.parametrize(
    ("metrics", "left"),
    [
        ([0.1, 0.9, 0.3, 0.4, 0.5], [2, 4, 5]),
        ([0.1, 0.2, 0.3, 0.4, 0.5], [4, 5]),
        ([0.9, 0.9, 0.3, 0.4, 0.5], [2, 4, 5]),
        ([None, -3.0, None, None, None], [2, 4, 5]),
        ([float("nan"), 0.2, float("nan"), 0.1, None], [2, 4, 5]),
        ([None] * 5, [4, 5]),
    ],
)
def test_the_best_and_the_last_few_are_kept(tmp_path, metrics, left):
    assert save_all(tmp_path, metrics) == left
    assert save_all(tmp_path / "all", metrics, keep=5) == [1, 2, 3, 4, 5]


def test_the_best_is_known_after_a_new_start(tmp_path):
    assert save_all(tmp_path, [0.1, 0.9, 0.3, 0.4]) == [2, 3, 4]
    assert save_all(tmp_path, [0.5, None, 0.6], first=5) == [2, 6, 7]
    assert save_all(tmp_path, [0.95, None, 0.6], first=8) == [8, 9, 10]


def test_a_checkpoint_that_a_kill_left_unfinished_is_removed(folder):
    """Orbax has finished it, but the checksums were not yet written."""
    (folder / "3" / SUMS).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert restore(folder)[0] == 2
    assert sorted(os.listdir(folder)) == ["1", "2"]


def test_a_checkpoint_half_removed_does_no_harm(tmp_path):
    save_all(tmp_path, [None, None])
    shutil.rmtree(tmp_path / "1" / "state")
    assert save_all(tmp_path, [None], first=3) == [2, 3]


def test_the_next_save_and_closing_raise_what_the_last_save_raised(
    tmp_path, monkeypatch
):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), make_data(1))
    checkpoints.close()
    assert (tmp_path / "1" / SUMS).exists()

    def fail(folder):
        raise OSError(f"no space for {folder.name}")

    monkeypatch.setattr(checkpoint, "write_checksums", fail)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, make_state(2), make_data(2))
    with pytest.raises(OSError, match="no space for 2"):
        checkpoints.save(3, make_state(3), make_data(3))
    with pytest.raises(OSError, match="no space for 2"):
        checkpoints.close()
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("checkpoint") for name in names)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = {
    "flipped": lambda path: flip(path, path.stat().st_size // 2),
    "truncated": truncate,
    "missing": lambda path: path.unlink(),
}


def files_of(saved):
    files = [path for path in (saved / "3").rglob("*") if path.is_file()]
    assert len(files) > 10
    return [path.relative_to(saved) for path in sorted(files)]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_of_any_file_gives_the_checkpoint_before(
    saved, tmp_path, damage, capfd, caplog
):
    """Every file of a checkpoint, the checksums among them; nothing is printed."""
    for number, file in enumerate(files_of(saved)):
        folder, data = shutil.copytree(saved, tmp_path / str(number)), make_data()
        DAMAGE[damage](folder / file)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            restored = restore(folder, data=data)
        assert restored[0] == 2, file
        assert_same(restored[1], make_state(2))
        assert data.get_state() == make_data(2).get_state()
        if (damage, file.name) == ("missing", SUMS):
            assert not caught and not list(folder.glob("corrupt-*"))
            continue
        (warning,), (kept,) = caught, folder.glob("corrupt-3-*")
        assert warning.category is CheckpointWarning
        pattern = r"checkpoint 3 in .* is corrupted \((.*) is not .*\): resuming from "
        match = re.match(pattern + "checkpoint 2; it is now (.*)", str(warning.message))
        name = "/".join(file.parts)
        assert match and match[2] == kept.name
        assert match[1] == name or file.name == SUMS
    gc.collect()  # asyncio reports what failed unseen when it is collected
    printed = "".join(capfd.readouterr()) + caplog.text
    assert "Traceback" not in printed and "Error" not in printed


def test_another_run_reads_the_newest_that_is_intact(folder):
    expected = make_state(3)["params"]["stem"]["kernel"]
    found = checkpoint.read_newest(folder)
    np.testing.assert_array_equal(found["params/stem/kernel"], expected)
    assert len(found["params/stem/kernel"].devices()) == 1
    truncate(folder / "3" / SUMS)
    found = checkpoint.read_newest(folder)
    expected = make_state(2)["params"]["stem"]["kernel"]
    np.testing.assert_array_equal(found["params/stem/kernel"], expected)
    assert sorted(os.listdir(folder)) == ["1", "2", "3"]
    assert checkpoint.read_newest(folder / "none") == {}


def test_no_flipped_byte_goes_unseen(saved, tmp_path):
    folder = shutil.copytree(saved / "3", tmp_path / "3")
    assert not find_corruption(folder)
    random = np.random.default_rng(0)
    for file in files_of(saved):
        path = tmp_path / file
        content = path.read_bytes()
        for place in random.integers(len(content), size=20):
            flip(path, int(place))
            assert find_corruption(folder), (file, place)
            path.write_bytes(content)
    (folder / "more").write_text("")
    assert find_corruption(folder) == "3/more is not as it was saved"


@pytest.mark.parametrize("what", ["", NOTES])
def test_parts_of_another_step_are_corruption(folder, what):
    """A whole checkpoint under another number, or the data position of another."""
    if what:
        shutil.copy(folder / "2" / what, folder / "3" / what)
    else:
        shutil.copytree(folder / "2", folder / "4")
    data = make_data()
    with pytest.warns(
        CheckpointWarning, match="is corrupted .* is not as it was saved"
    ):
        step, state, _ = restore(folder, data=data)
    assert step == (2 if what else 3)
    assert_same(state, make_state(step))
    assert data.get_state() == make_data(step).get_state()


def test_a_step_is_saved_again_after_its_checkpoint_was_corrupted(folder):
    flip(folder / "3" / NOTES, 5)
    with pytest.warns(CheckpointWarning):
        checkpoints = Checkpoints(folder, keep=3)
    checkpoints.save(3, make_state(3), make_data(3), clock={"seconds": 1.5})
    checkpoints.close()
    step, state, clock = restore(folder)
    assert step == 3 and clock == {"seconds": 1.5}
    assert_same(state, make_state(3))


def test_each_corrupted_checkpoint_has_its_warning(folder):
    flip(folder / "3" / "state/_METADATA", 9)
    (folder / "2" / NOTES).unlink()
    with pytest.warns(CheckpointWarning) as caught:
        assert restore(folder)[0] == 1
    newest, before = (str(warning.message) for warning in caught)
    assert newest.startswith("checkpoint 3 in ") and "(3/state/_METADATA is" in newest
    assert before.startswith("checkpoint 2 in ") and f"(2/{NOTES} is not" in before


def test_damage_of_an_old_checkpoint_does_no_harm(folder):
    for path in (folder / "1").rglob("*METADATA"):
        path.write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert restore(folder)[0] == 3
    assert sorted(os.listdir(folder)) == ["2", "3"]


def test_only_corrupted_checkpoints_are_an_error(folder):
    for step in "123":
        (folder / step / NOTES).unlink()
    data = make_data(5)
    message = r"only corrupted ones \(3: .*; 2: .*; 1: .*\)\. Put a copy of one back"
    with pytest.raises(ValueError, match=message):
        restore(folder, data=data)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]
    assert data.get_state() == make_data(5).get_state()


@pytest.mark.parametrize(
    ("leaf", "now"),
    [
        (jnp.ones(32, jnp.bfloat16), r"is bfloat16\[32\]"),
        (jnp.ones(64), r"is float32\[64\]"),
        (jax.random.key(0), r"is key<fry>\[\]"),
        (None, "is absent"),
    ],
)
def test_another_state_is_told_from_damage(folder, leaf, now):
    state = copy.deepcopy(make_state(0))
    state["params"]["stem"]["bias"] = jax.device_put(leaf, state["step"].sharding)
    message = rf"another one: params/stem/bias was bfloat16\[64\] and {now}\. Take"
    with pytest.raises(ValueError, match=message):
        restore(folder, state)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]


class Positions:
    """Data whose position differs in each process, unless the number is given."""

    def __init__(self, number=None):
        self.number = number

    def get_state(self):
        return {"next_index": self.number or processes.shard()[0]}

    def set_state(self, state):
        self.number = state["next_index"]


@pytest.mark.parametrize("count", [1, 2])
def test_each_process_gets_its_own_position(tmp_path, monkeypatch, count):
    """One process plays several: the positions of all are in the checkpoint."""
    states = [{"next_index": 10 + index} for index in range(count)]
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(processes, "all_gather", lambda value: states)
    checkpoints.save(1, make_state(1), Positions())
    checkpoints.close()
    monkeypatch.undo()
    data = Positions()
    if count == 1:
        assert restore(tmp_path, data=data)[0] == 1 and data.number == 10
        return
    message = r"is of 2 processes with .* there are 1: the order of the data starts ag"
    with pytest.warns(CheckpointWarning, match=message):
        assert restore(tmp_path, data=data)[0] == 1
    assert data.number is None
    monkeypatch.setattr(processes, "shard", lambda: (1, 2))
    restore(tmp_path, data=data)
    assert data.number == 11


def test_the_position_of_others_is_known_if_they_agree(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(processes, "all_gather", lambda value: [value] * 3)
    checkpoints.save(1, make_state(1), Positions(7))
    checkpoints.close()
    monkeypatch.undo()
    data = Positions()
    restore(tmp_path, data=data)
    assert data.number == 7


@pytest.mark.parametrize("fsdp", [1, 4, 8])
def test_leaves_are_resharded_for_any_mesh(tmp_path, fsdp):
    state = {"kernel": jnp.arange(256.0).reshape(8, 32), "key": jax.random.key(3)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, sharding.place_state(state, sharding.data_mesh()), Positions(1))
    checkpoints.close()
    like = sharding.place_state(state, sharding.data_mesh(fsdp=fsdp))
    _, found, _ = restore(tmp_path, like, Positions())
    assert_same(found, like)
