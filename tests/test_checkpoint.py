import contextlib
import copy
import functools
import gc
import os
import re
import shutil
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
from spikejax.train.checksum import checksums

CONFIG = {"width": 64, "neuron": "lif", "note": None}
DATA_FILE = "data/process_0-of-1.json"


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
    assert checksums(found) == checksums(expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints 1, 2 and 3; tests work on copies."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=3, config=CONFIG)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step), make_data(step))
    checkpoints.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def restore(folder, like=None, config=CONFIG, data=None):
    """What is found there: (step, state), or None."""
    like = make_state(0) if like is None else like
    with contextlib.closing(Checkpoints(folder, keep=3, config=config)) as checkpoints:
        return checkpoints.restore(abstract(like), data or make_data())


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    data = make_data(2)
    assert restore(tmp_path / "new" / "folder", data=data) is None
    assert data.get_state() == make_data(2).get_state()


@pytest.mark.parametrize("devices", [8, 2])
def test_state_and_data_come_back_as_they_were(folder, devices):
    data = make_data()
    step, state = restore(folder, make_state(0, devices), data=data)
    assert step == 3
    assert_same(state, make_state(3, devices))
    np.testing.assert_array_equal(next(data), next(make_data(3)))


def test_the_state_may_be_donated_while_it_is_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, config=CONFIG)
    step_on = jax.jit(lambda kernel: kernel + 1, donate_argnums=0)
    kernel = jax.device_put(jnp.zeros((256, 256)), jax.devices()[0])
    for step in range(1, 4):
        kernel = step_on(kernel)
        checkpoints.save(step, {"kernel": kernel}, make_data())
    checkpoints.close()
    step, state = restore(tmp_path, like={"kernel": kernel})
    assert step == 3 and bool((state["kernel"] == 3).all())


def save_all(folder, metrics, keep=2, first=1):
    """The steps that are left when steps with these metrics were saved."""
    checkpoints = Checkpoints(folder, keep=keep, config=CONFIG)
    state = {"x": jax.device_put(jnp.zeros(3), jax.devices()[0])}
    data = make_data()
    checkpoints.restore(abstract(state), data)
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


def test_a_checkpoint_half_removed_is_none(tmp_path, monkeypatch):
    def killed(path):
        (path / "_CHECKPOINT_METADATA").unlink()
        raise KeyboardInterrupt

    save_all(tmp_path, [None, None])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        save_all(tmp_path, [None], first=3)
    checkpoints = Checkpoints(tmp_path, config=CONFIG)
    assert checkpoints.steps == [2, 3]
    assert sorted(os.listdir(tmp_path)) == ["2", "3"]


def test_the_step_at_hand_is_not_saved_again(folder):
    checkpoints, state = Checkpoints(folder, keep=3, config=CONFIG), make_state(3)
    checkpoints.restore(abstract(state), make_data())
    before = (folder / "3").stat().st_mtime_ns
    for step in (3, 4, 4):
        checkpoints.save(step, state, make_data())
    checkpoints.close()
    assert (folder / "3").stat().st_mtime_ns == before
    assert checkpoints.steps == [2, 3, 4]


def test_saving_over_checkpoints_not_restored_is_an_error(folder):
    checkpoints = Checkpoints(folder, config=CONFIG)
    with pytest.raises(ValueError, match=r"expected a step after 3.*got 2. Restore"):
        checkpoints.save(2, make_state(2), make_data())
    checkpoints.close()


def largest_file(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = {
    "leaf flipped": lambda path: flip(largest_file(path), -9000),
    "leaf truncated": lambda path: truncate(largest_file(path)),
    "leaf missing": lambda path: largest_file(path).unlink(),
    "index missing": lambda path: (path / "state/manifest.ocdbt").unlink(),
    "tree truncated": lambda path: truncate(path / "state/_METADATA"),
    "notes missing": lambda path: (path / "_CHECKPOINT_METADATA").unlink(),
    "notes flipped": lambda path: flip(path / "_CHECKPOINT_METADATA", -6),
    "data truncated": lambda path: truncate(path / DATA_FILE),
    "data missing": lambda path: (path / DATA_FILE).unlink(),
    "data flipped": lambda path: flip(path / DATA_FILE, 27),
    "half deleted": lambda path: shutil.rmtree(path / "state"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_gives_way_to_the_checkpoint_before(folder, damage, capfd, caplog):
    DAMAGE[damage](folder / "3")
    data = make_data()
    checkpoints = Checkpoints(folder, keep=3, config=CONFIG)
    with pytest.warns(CheckpointWarning) as caught:
        step, state = checkpoints.restore(abstract(make_state(0)), data)
    (warning,), (kept,) = caught, folder.glob("damaged-3-*")
    pattern = r"checkpoint 3 in .* is damaged \(.*going on from checkpoint 2; .*"
    assert re.fullmatch(pattern + kept.name, str(warning.message))
    assert step == 2 and checkpoints.steps == [1, 2]
    assert_same(state, make_state(2))
    assert data.get_state() == make_data(2).get_state()

    checkpoints.save(3, make_state(3), make_data(3))
    checkpoints.close()
    step, state = restore(folder)
    assert step == 3
    assert_same(state, make_state(3))
    gc.collect()  # asyncio reports what failed unseen when it is collected
    printed = "".join(capfd.readouterr()) + caplog.text
    assert "Traceback" not in printed and "Error" not in printed


def test_no_flipped_byte_gives_a_wrong_state(saved, tmp_path):
    files = [path for path in (saved / "3").rglob("*") if path.is_file()]
    random = np.random.default_rng(0)
    sizes = np.array([path.stat().st_size for path in files], float)
    for trial in range(25):
        folder = shutil.copytree(saved, tmp_path / str(trial))
        file = files[random.choice(len(files), p=sizes / sizes.sum())]
        place = int(random.integers(file.stat().st_size))
        flip(folder / file.relative_to(saved), place)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)
            step, state = restore(folder)
        assert_same(state, make_state(step))


def test_each_damaged_checkpoint_has_its_warning(folder):
    DAMAGE["leaf flipped"](folder / "3")
    DAMAGE["data missing"](folder / "2")
    with pytest.warns(CheckpointWarning) as caught:
        assert restore(folder)[0] == 1
    leaf, data = (str(warning.message).split(" is damaged ") for warning in caught)
    assert leaf[0].startswith("checkpoint 3 in ") and data[0].startswith("checkpoint 2")
    what = r"\((params/stem/kernel|opt/.*) (has a wrong checksum|cannot be read)\)"
    assert re.match(what, leaf[1]) and "FileNotFoundError" in data[1]


def test_old_damage_and_other_settings_do_no_harm(folder):
    DAMAGE["notes missing"](folder / "1")
    assert restore(folder, config=CONFIG | {"steps": 900})[0] == 3


def test_damaged_checkpoints_only_are_an_error(folder):
    for step in "123":
        DAMAGE["data missing"](folder / step)
    data = make_data(5)
    message = r"only damaged ones \(3: .*; 2: .*; 1: .*\)\. Put a copy of one back"
    with pytest.raises(ValueError, match=message):
        restore(folder, data=data)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]
    assert data.get_state() == make_data(5).get_state()


@pytest.mark.parametrize(
    ("leaf", "here"),
    [
        (jnp.ones(32, jnp.bfloat16), r"bfloat16\[32\] here"),
        (jnp.ones(64), r"float32\[64\] here"),
        (jax.random.key(0), r"key<fry>\[\] here"),
        (None, "absent here"),
    ],
)
def test_another_configuration_is_told_from_damage(folder, leaf, here):
    state = copy.deepcopy(make_state(0))
    state["params"]["stem"]["bias"] = jax.device_put(leaf, state["step"].sharding)
    message = rf"another configuration: .*stem/bias is bfloat16\[64\] there and {here}"
    settings = "; of the settings, width is 64 there and 32 here. Give the settings"
    with pytest.raises(ValueError, match=message + settings):
        restore(folder, state, config=CONFIG | {"width": 32})
    with pytest.raises(ValueError, match=message + ". Give"):
        restore(folder, state)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]


def test_another_data_iterator_is_another_configuration(folder):
    class Other:
        def set_state(self, state):
            raise KeyError("exhausted")

    with pytest.raises(ValueError, match="data iterator does not fit.*exhausted"):
        restore(folder, data=Other())


def test_positions_that_differ_start_the_data_anew_with_one_line(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "read_position", lambda *_: None)
    data = make_data(5)
    message = "checkpoint 3 in .* 1 processes .*: the order of the data starts anew"
    with pytest.warns(CheckpointWarning, match=message):
        assert restore(folder, data=data)[0] == 3
    assert data.get_state() == make_data(5).get_state()


def test_damage_that_another_process_finds_is_damage_for_all(folder, monkeypatch):
    told = iter([[3, 3], [False, True], [False, False]])
    monkeypatch.setattr(processes, "of_all", lambda value: next(told))
    with pytest.warns(CheckpointWarning, match="another process cannot read it"):
        step, state = restore(folder)
    assert step == 2
    assert_same(state, make_state(2))


def test_a_folder_that_processes_do_not_share_is_an_error(folder, monkeypatch):
    monkeypatch.setattr(processes, "of_all", lambda value: [value, -1])
    message = (
        r"expected a folder that all processes share, got .*, in which their newest "
        r"steps are \[3, -1\]\. Give one"
    )
    with pytest.raises(ValueError, match=message):
        restore(folder)


def test_a_leaf_without_a_place_and_keeping_none_are_errors(tmp_path):
    with pytest.raises(ValueError, match="expected keep >= 1, got 0"):
        Checkpoints(tmp_path, keep=0, config={})
    checkpoints = Checkpoints(tmp_path, config=CONFIG)
    with pytest.raises(ValueError, match=r"sharding in step, got 3. Place it"):
        checkpoints.save(3, {"step": 3}, make_data())
    struct = {"a": jax.ShapeDtypeStruct((2,), jnp.float32)}
    with pytest.raises(ValueError, match=r"sharding in a, got ShapeDtypeStruct"):
        checkpoints.restore(struct, make_data())
    checkpoints.close()
