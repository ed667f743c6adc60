"""What a checkpoint of Orbax holds, read back in parts: leaves, notes, positions.

Each process reads what its devices need and waits for no other, so that one that finds
damage can say so. Orbax reads all leaves at once, and where one is damaged the others
write pages of errors.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tensorstore

from spikejax.train.checksum import Damaged, key_data, unseal


@dataclass(frozen=True)
class Text:
    """A text as Orbax takes it, which lets it write itself; a file a process."""

    text: str

    async def save(self, directory: Any) -> Any:
        """As Orbax calls it; what is returned is awaited in the background."""

        async def write() -> None:
            name = _file_name(jax.process_index(), jax.process_count())
            (await directory.await_creation() / name).write_text(self.text)

        return write()

    async def load(self, directory: Any) -> Any:
        """Not used: see ``read_position``."""
        raise NotImplementedError


def _file_name(index: int, count: int) -> str:
    return f"process_{index}-of-{count}.json"


def read_notes(folder: Path) -> dict[str, Any]:
    """What was noted beside a checkpoint; Damaged unless it is unharmed."""
    # Orbax would open the arrays too, and those may be damaged.
    with _reading():
        text = (folder / "_CHECKPOINT_METADATA").read_text()
        return unseal(json.loads(text)["custom_metadata"])


def read_position(folder: Path, processes: int) -> dict[str, Any] | None:
    """The position of this process's data iterator, or None where it is not known.

    Args:
        folder: of the checkpoint.
        processes: that saved it. Where there are others now, the position is known if
            it was the same in all.
    """
    index, count = jax.process_index(), jax.process_count()
    asked = [index] if count == processes else range(processes)
    with _reading():
        files = [folder / "data" / _file_name(i, processes) for i in asked]
        found = [unseal(json.loads(file.read_text())) for file in files]
    return found[0] if found.count(found[0]) == len(found) else None


def read_leaves(folder: Path, targets: dict[str, Any]) -> dict[str, jax.Array]:
    """The leaves by path, each cut as asked for and read once.

    Args:
        folder: of the checkpoint.
        targets: {path: array or struct with shape, dtype and sharding}.
    """
    folder = folder / "state"
    with _reading():
        for file in [folder / "_METADATA", *folder.glob("array_metadatas/*")]:
            json.loads(file.read_text())
        structs = {path: _struct(leaf) for path, leaf in targets.items()}
        stores = {path: tensorstore.open(_place(folder, path)) for path in structs}
        read = {path: _parts(path, stores[path], s) for path, s in structs.items()}
        return {path: _array(path, read[path], s) for path, s in structs.items()}


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
    """Of a typed random key that of its numbers."""
    data = jax.eval_shape(key_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def _place(folder: Path, path: str) -> dict[str, Any]:
    store = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{path}/"}
    return {"driver": "zarr3", "kvstore": store}


def _parts(path: str, store: Any, struct: Any) -> dict[str, Any]:
    """The parts on this process's devices, being read: {index as text: future}."""
    cut = struct.sharding.addressable_devices_indices_map(struct.shape).values()
    indices = {str(index): index for index in cut}  # devices may have the same part
    with _named(path):
        opened = store.result()
        if opened.shape != struct.shape or opened.dtype.numpy_dtype != struct.dtype:
            raise Damaged("shape and dtype are others")
        return {name: opened[index].read() for name, index in indices.items()}


def _array(path: str, parts: dict[str, Any], struct: Any) -> jax.Array:
    with _named(path):
        values = {index: part.result() for index, part in parts.items()}
    return jax.make_array_from_callback(
        struct.shape, struct.sharding, lambda index: values[str(index)]
    )


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Damaged, with the name of the leaf, where it cannot be read."""
    try:
        yield
    except Exception:
        raise Damaged(f"{path} cannot be read") from None


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Keeps the log of a damaged checkpoint off the terminal; raises Damaged."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        raise Damaged(cause(error)) from error
    finally:
        logger.setLevel(level)


def cause(error: BaseException) -> str:
    """The first line of the error at the bottom of a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).splitlines() or [""]
    name = "" if isinstance(error, Damaged) else f"{type(error).__name__}: "
    return f"{name}{lines[0][:160]}"
