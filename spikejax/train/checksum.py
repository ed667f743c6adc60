"""What a tree of arrays is known by: its leaves' names, kinds and checksums."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Damaged(ValueError):
    """Something that cannot be read, or reads otherwise than it was written."""


def checksums(state: Any) -> dict[str, int]:
    """One number a leaf that any single change of the leaf changes.

    checksum = sum_i w_i * (2i + 1) mod 2^32, over the leaf's 32-bit words w_i

    It is computed where the leaf lives, sharded or not, and is the same for every
    sharding. The factors are odd, hence invertible mod 2^32: one changed word is
    always found.

    Args:
        state: tree of arrays, typed random keys among them.

    Returns:
        {path: checksum}, with paths such as "params/stem/kernel".
    """
    leaves = {path: key_data(leaf) for path, leaf in by_path(state).items()}
    sums = {}
    for path, leaf in leaves.items():
        sums[path] = _checksum(leaf)
        if not leaf.is_fully_replicated:
            # Programs whose devices wait for one another can lock up, several at once.
            sums[path].block_until_ready()
    return {path: int(value) for path, value in jax.device_get(sums).items()}


def parameters_sha256(params: Any) -> str:
    """SHA-256, in hex, over path, dtype, shape and bytes of the leaves by path."""
    digest = hashlib.sha256()
    for path, leaf in sorted(by_path(params).items()):
        values = np.asarray(key_data(leaf))
        digest.update(f"{path} {values.dtype} {values.shape} ".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves in the tree's order, named such as "params/stem/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = jax.tree_util.keystr
    return {name(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def is_key(leaf: Any) -> bool:
    """Whether leaf holds typed random keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def key_data(leaf: Any) -> Any:
    """A typed random key as numbers, anything else as it is."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def key_like(leaf: Any, data: jax.Array) -> jax.Array:
    """The data as a typed random key if leaf is one."""
    if not is_key(leaf):
        return data
    kinds: list[Any] = []  # key_impl takes no ShapeDtypeStruct, but a traced key
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), leaf)
    return jax.random.wrap_key_data(data, impl=kinds[0])


def signature(leaf: Any) -> str:
    """dtype and shape in a word, such as "float32[3, 3]"."""
    return f"{leaf.dtype}{list(leaf.shape)}"


def difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The first name at which two dicts differ, and how many more there are."""
    pairs = {n: (there.get(n, "absent"), here.get(n, "absent")) for n in there | here}
    names = [name for name, (one, other) in pairs.items() if one != other]
    one, other = pairs[names[0]]
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{names[0]} is {one} there and {other} here{more}"


def seal(content: Any) -> dict[str, Any]:
    """The content, as JSON has it, beside its SHA-256."""
    return {"content": content, "sha256": _sha256(content)}


def unseal(sealed: Any) -> dict[str, Any]:
    """The sealed content; raises if a byte of it has changed."""
    if not isinstance(sealed, dict) or not {"content", "sha256"} <= set(sealed):
        raise Damaged("a checksum is missing")
    if _sha256(sealed["content"]) != sealed["sha256"]:
        raise Damaged("the notes have a wrong checksum")
    return sealed["content"]


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    words = _words(leaf)
    index = jnp.uint32(0)
    stride = 1
    for axis in reversed(range(words.ndim)):  # no reshape: it would move shards
        place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index += place * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)


def _words(leaf: jax.Array) -> jax.Array:
    """The bits of leaf as uint32, a word for each element (two for 64 bits)."""
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    bits = 8 * min(leaf.dtype.itemsize, 4)
    return jax.lax.bitcast_convert_type(leaf, f"uint{bits}").astype(jnp.uint32)
