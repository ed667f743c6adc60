import hashlib
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from spikejax.train import checksum
from spikejax.train.checksum import (
    Damaged,
    by_path,
    checksums,
    difference,
    key_data,
    key_like,
    parameters_sha256,
    seal,
    unseal,
)


def by_hand(words):
    factors = 2 * np.arange(words.size, dtype=np.uint64) + 1
    return int((words.ravel().astype(np.uint64) * factors).sum() % 2**32)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4, 5)])
def test_the_checksum_is_the_sum_of_words_times_odd_numbers(shape):
    leaf = jax.random.normal(jax.random.key(0), shape)
    words = np.asarray(leaf).view(np.uint32)
    assert checksums({"a": {"b": leaf}}) == {"a/b": by_hand(words)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint32", "bool"])
def test_every_changed_element_changes_the_checksum(dtype):
    leaf = np.arange(24).reshape(4, 6).astype(dtype)
    sums = {checksums([jnp.asarray(leaf)])["0"]}
    for place in np.ndindex(leaf.shape):
        changed = leaf.copy()
        changed[place] = not leaf[place] if dtype == "bool" else leaf[place] + 100
        sums.add(checksums([jnp.asarray(changed)])["0"])
    assert len(sums) == 1 + leaf.size


def test_swapped_elements_and_signs_of_zero_change_the_checksum():
    leaves = [jnp.array([1.0, 2.0]), jnp.array([2.0, 1.0])]
    leaves += [jnp.array([0.0, 2.0]), jnp.array([-0.0, 2.0])]
    assert len(set(checksums(leaves).values())) == 4


@pytest.mark.parametrize("spec", [(), ("data",), (None, "data"), (None, None, "data")])
def test_the_checksum_is_the_same_for_every_sharding(spec):
    leaf = jax.random.normal(jax.random.key(1), (8, 16, 24))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))
    assert checksums([sharded]) == checksums([leaf])


def test_the_checksum_moves_no_shard():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec(None, "data"))
    leaf = jax.ShapeDtypeStruct((8, 16, 24), jnp.float32, sharding=place)
    compiled = checksum._checksum.lower(leaf).compile().as_text()
    assert "all-gather" not in compiled and "all-reduce" in compiled


def test_typed_keys_become_numbers_and_keys_again():
    for name in ("threefry2x32", "rbg"):
        keys = jax.random.split(jax.random.key(5, impl=name), 3)
        again = key_like(jax.ShapeDtypeStruct(keys.shape, keys.dtype), key_data(keys))
        assert again.dtype == keys.dtype
        assert jax.random.uniform(again[1]) == jax.random.uniform(keys[1])


def test_parameters_sha256_is_known_and_needs_no_order():
    kernel = jnp.arange(6.0).reshape(2, 3)
    params = {"stem": {"kernel": kernel, "bias": jnp.zeros(3)}}
    turned = {"stem": {"bias": jnp.zeros(3), "kernel": kernel}}
    found = parameters_sha256(params)
    assert found == parameters_sha256(turned)
    by_hand = b"stem/bias float32 (3,) " + bytes(12)
    by_hand += b"stem/kernel float32 (2, 3) " + struct.pack("<6f", *range(6))
    assert found == hashlib.sha256(by_hand).hexdigest()


@pytest.mark.parametrize(
    "other",
    [
        {"a": jnp.zeros(4, jnp.int32)},
        {"a": jnp.zeros((2, 2))},
        {"b": jnp.zeros(4)},
        {"a": jnp.zeros(4).at[3].set(1e-45)},
    ],
)
def test_parameters_sha256_sees_name_dtype_shape_and_value(other):
    assert parameters_sha256(other) != parameters_sha256({"a": jnp.zeros(4)})


def test_by_path_names_leaves_in_the_order_of_the_tree():
    tree = {"b": (1, [2]), "a": {"x": 3, "none": None}}
    assert by_path(tree) == {"a/x": 3, "b/0": 1, "b/1/0": 2}
    assert list(by_path(tree).values()) == jax.tree.leaves(tree)


def test_difference_names_the_first_and_counts_the_rest():
    there, here = {"a": 1, "b": None, "c": 3}, {"a": 1, "c": 4}
    assert difference(there, here) == "b is None there and absent here (and 1 more)"


def test_a_seal_breaks_with_any_change():
    sealed = seal({"next_index": 7})
    assert unseal(sealed) == {"next_index": 7}
    sealed["content"]["next_index"] = 6
    with pytest.raises(Damaged, match="wrong checksum"):
        unseal(sealed)
    with pytest.raises(Damaged, match="checksum is missing"):
        unseal({"content": 1})
