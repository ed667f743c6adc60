"""Reading a checkpoint in parts; damage and whole runs are in test_checkpoint.py."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from spikejax.train import sharding, store
from spikejax.train.checkpoint import Checkpoints
from spikejax.train.checksum import Damaged, seal
from spikejax.train.store import read_leaves, read_notes, read_position


class Nowhere:
    def get_state(self):
        return {"next_index": 0}


@pytest.fixture(scope="module")
def state():
    leaves = {"kernel": jnp.arange(256.0).reshape(8, 32), "key": jax.random.key(3)}
    leaves |= {"bias": jnp.ones(32, jnp.bfloat16)}
    return sharding.place_state(leaves, sharding.data_mesh())


@pytest.fixture(scope="module")
def folder(state, tmp_path_factory):
    """A checkpoint of whole leaves, as eight devices have them."""
    checkpoints = Checkpoints(tmp_path_factory.mktemp("store"), config={"width": 32})
    checkpoints.save(1, state, Nowhere())
    checkpoints.close()
    return checkpoints.directory / "1"


def positions(folder, states):
    """Files as processes with these iterators have saved them."""
    (folder / "data").mkdir()
    for index, position in enumerate(states):
        name = f"process_{index}-of-{len(states)}.json"
        (folder / "data" / name).write_text(json.dumps(seal(position)))


def test_notes_are_as_they_were_written(folder):
    notes = read_notes(folder)
    assert notes["config"] == {"width": 32} and notes["processes"] == 1
    assert notes["leaves"]["kernel"] == "float32[8, 32]"


@pytest.mark.parametrize("fsdp", [1, 4, 8])
def test_leaves_come_back_cut_for_any_mesh(folder, state, fsdp):
    mesh = sharding.data_mesh(fsdp=fsdp)
    places = sharding.state_shardings(state, mesh)
    targets = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=place
        ),
        state,
        places,
    )
    found = read_leaves(folder, targets)
    np.testing.assert_array_equal(found["kernel"], state["kernel"])
    np.testing.assert_array_equal(found["bias"], state["bias"])
    np.testing.assert_array_equal(found["key"], jax.random.key_data(state["key"]))
    for name in ("kernel", "bias"):
        assert found[name].sharding == places[name]
        assert found[name].dtype == state[name].dtype


def test_a_part_is_read_once_however_many_devices_have_it(folder, state, monkeypatch):
    read = []

    class Store:
        def __init__(self, spec):
            self.opened = original(spec).result()
            self.shape, self.dtype = self.opened.shape, self.opened.dtype

        def result(self):
            return self

        def __getitem__(self, index):
            read.append(str(index))
            return self.opened[index]

    original = tensorstore.open
    monkeypatch.setattr(tensorstore, "open", Store)
    read_leaves(folder, {"kernel": state["kernel"]})
    assert len(read) == 1  # of eight copies
    read.clear()
    cut = sharding.place_state({"kernel": state["kernel"]}, sharding.data_mesh(fsdp=4))
    read_leaves(folder, cut)
    assert len(read) == len(set(read)) == 4


def test_another_shape_or_type_on_the_disk_is_damage(folder, state):
    place = sharding.replicated(sharding.data_mesh())
    for shape, dtype in (((32, 8), jnp.float32), ((8, 32), jnp.bfloat16)):
        struct = jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        with pytest.raises(Damaged, match="^kernel cannot be read$"):
            read_leaves(folder, {"kernel": struct})


@pytest.mark.parametrize("count", [1, 2])
def test_a_process_finds_its_own_position(tmp_path, monkeypatch, count):
    positions(tmp_path, [{"next_index": 10 + index} for index in range(count)])
    monkeypatch.setattr(jax, "process_count", lambda: count)
    for index in range(count):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        assert read_position(tmp_path, count) == {"next_index": 10 + index}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_position_of_others_is_known_if_they_agree(tmp_path, count):
    """This is one process; ``count`` have saved."""
    positions(tmp_path, [{"next_index": 7}] * count)
    assert read_position(tmp_path, count) == {"next_index": 7}


def test_positions_that_differ_are_of_no_use_to_another_number(tmp_path):
    positions(tmp_path, [{"next_index": 7}, {"next_index": 8}])
    assert read_position(tmp_path, 2) is None


def test_a_position_that_is_missing_is_damage(tmp_path):
    positions(tmp_path, [{"next_index": 7}] * 2)
    (tmp_path / "data" / "process_1-of-2.json").unlink()
    with pytest.raises(Damaged, match="FileNotFoundError"):
        read_position(tmp_path, 2)


def test_the_cause_is_at_the_bottom_of_the_chain():
    try:
        try:
            raise OSError("disk\nof many lines")
        except OSError as error:
            raise ValueError("above") from error
    except ValueError as error:
        assert store.cause(error) == "OSError: disk"
