import hashlib
import struct
import subprocess

import jax
import jax.numpy as jnp
import pytest

from spikejax.train.checksum import (
    SUMS,
    by_path,
    differences,
    find_corruption,
    parameters_sha256,
    write_checksums,
)


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


def test_differences_names_three():
    saved, current = {"a": 1, "b": None, "c": 3}, {"a": 1, "c": 4}
    both = "b was None and is absent, c was 3 and is 4"
    assert differences(saved, current) == both
    new = dict.fromkeys("defgh", 0)
    names = "d was absent and is 0, e was absent and is 0, f was absent and is 0"
    assert differences(saved, saved | new) == f"{names}, 2 more"
    assert differences(saved, saved | {"d": 0}) == "d was absent and is 0"
    assert differences(saved, dict(saved)) == ""


def test_checksums_are_those_of_sha256sum(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "leaves").write_bytes(b"abc")
    (tmp_path / "notes").write_bytes(b"")
    write_checksums(tmp_path)
    assert (tmp_path / SUMS).read_text().splitlines() == [
        f"{hashlib.sha256(b'abc').hexdigest()}  {tmp_path.name}/d/leaves",
        f"{hashlib.sha256(b'').hexdigest()}  {tmp_path.name}/notes",
    ]
    assert find_corruption(tmp_path) == ""
    assert (
        subprocess.run(
            ["sha256sum", "-c", f"{tmp_path.name}/{SUMS}"],
            cwd=tmp_path.parent,
            capture_output=True,
        ).returncode
        == 0
    )


def test_checksums_are_of_their_folder(tmp_path):
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "leaves").write_bytes(b"abc")
    write_checksums(tmp_path / "2")
    (tmp_path / "2").rename(tmp_path / "3")
    assert find_corruption(tmp_path / "3") == "2/leaves is not as it was saved"
