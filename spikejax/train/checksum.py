"""Names and checksums: of the leaves of a tree, and of the files of a checkpoint."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SUMS = "SHA256SUMS"  # the format of sha256sum: `sha256sum -c SHA256SUMS` reads it too


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of every file below a folder to SHA256SUMS in it, atomically.

    Args:
        folder: whose files nobody changes any more.
    """
    lines = "".join(f"{line}\n" for line in sorted(_lines(folder)))
    temporary = folder / f"{SUMS}.tmp"
    temporary.write_text(lines, "utf-8")
    os.replace(temporary, folder / SUMS)


def find_corruption(folder: Path) -> str:
    """Return which file is not as `write_checksums` saw it, or "" if all are.

    Args:
        folder: on which `write_checksums` was called.
    """
    if not (folder / SUMS).exists():
        return f"{SUMS} is missing"
    saved = set((folder / SUMS).read_text("utf-8", "replace").splitlines())
    # A changed file has a line on either side, a lost or an added one on one side.
    wrong = sorted(saved ^ _lines(folder), key=lambda line: line[66:])
    return f"{wrong[0][66:]} is not as it was saved" if wrong else ""


def _lines(folder: Path) -> set[str]:
    """Return 64 hex digits, two spaces and the relative path, per file."""
    lines = set()
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in (SUMS, f"{SUMS}.tmp"):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.add(f"{digest}  {path.relative_to(folder).as_posix()}")
    return lines


def parameters_sha256(params: Any) -> str:
    """Return the SHA-256, in hex, over path, dtype, shape and bytes of each leaf.

    Args:
        params: tree of arrays; the order of its leaves does not matter.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(by_path(params).items()):
        values = np.asarray(key_data(leaf))
        digest.update(f"{path} {values.dtype} {values.shape} ".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves in the tree's order, named such as "params/stem/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = jax.tree_util.keystr
    return {name(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def signatures(tree: Any) -> dict[str, str]:
    """Return the dtype and shape of each leaf by path, such as "float32[3, 3]"."""
    leaves = by_path(tree).items()
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def first_difference(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Return the first entry that differs, in words, or "" if none does.

    Args:
        saved, current: JSON values by name.
    """
    saved, current = (json.loads(json.dumps(dict(e))) for e in (saved, current))
    names = [k for k in saved | current if _shown(saved, k) != _shown(current, k)]
    if not names:
        return ""
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    old, new = (_shown(entries, names[0]) for entries in (saved, current))
    return f"{names[0]} was {old} and is {new}{more}"


def _shown(entries: Mapping[str, Any], name: str) -> str:
    return repr(entries[name]) if name in entries else "absent"


def key_data(leaf: Any) -> Any:
    """Return a typed random key as numbers; anything else is not modified."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def key_like(leaf: Any, data: jax.Array) -> jax.Array:
    """Return the data as a typed random key if `leaf` is one.

    Args:
        leaf: array or `jax.ShapeDtypeStruct`.
        data: of `key_data`, or the leaf itself.
    """
    if not _is_key(leaf):
        return data
    kinds: list[Any] = []  # key_impl takes no ShapeDtypeStruct, but a traced key
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), leaf)
    return jax.random.wrap_key_data(data, impl=kinds[0])


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
