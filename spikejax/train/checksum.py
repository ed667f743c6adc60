"""Names and checksums: of the leaves of a tree, and of the files of a checkpoint."""

import hashlib
import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

SUMS = "SHA256SUMS"  # of sha256sum: in the folder above, `sha256sum -c */SHA256SUMS`


def write_atomically(path: Path, text: str) -> None:
    """Write a text file; a kill leaves the old file or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of every file below a folder to SHA256SUMS in it."""
    lines = "".join(f"{line}\n" for line in sorted(_lines(folder)))
    write_atomically(folder / SUMS, lines)


def find_corruption(folder: Path) -> str:
    """Return which file is not as `write_checksums` saw it, or "" if all are."""
    if not (folder / SUMS).exists():
        return f"{SUMS} is missing"
    # Not splitlines: it takes a newline with a flipped bit for another kind of newline.
    saved = set((folder / SUMS).read_text("utf-8", "replace").split("\n")) - {""}
    # A changed file has a line on either side, a lost or an added one on one side.
    wrong = sorted(saved ^ _lines(folder), key=lambda line: line[66:])
    return f"{wrong[0][66:]} is not as it was saved" if wrong else ""


def _lines(folder: Path) -> set[str]:
    """Return 64 hex digits, two spaces and the path, per file."""
    # The path names the folder: a copy of checkpoint 2 is no checkpoint 3.
    lines = set()
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in (SUMS, f"{SUMS}.tmp"):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.add(f"{digest}  {path.relative_to(folder.parent).as_posix()}")
    return lines


def parameters_sha256(params: Any) -> str:
    """Return the SHA-256, in hex, over path, dtype, shape and bytes of each leaf."""
    digest = hashlib.sha256()
    for path, leaf in sorted(by_path(params).items()):
        values = np.asarray(leaf)
        digest.update(f"{path} {values.dtype} {values.shape} ".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves in the tree's order, named such as "params/stem/kernel"."""
    name = partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def signatures(tree: Any) -> dict[str, str]:
    """Return the dtype and shape of each leaf by path, such as "float32[3, 3]"."""
    leaves = by_path(tree).items()
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def differences(saved: dict[str, Any], current: dict[str, Any]) -> str:
    """Return the first three entries that differ, in words, and how many more do."""
    pairs = {
        n: (saved.get(n, "absent"), current.get(n, "absent")) for n in saved | current
    }
    found = [
        f"{n} was {old} and is {new}" for n, (old, new) in pairs.items() if old != new
    ]
    more = [f"{len(found) - 3} more"] if len(found) > 3 else []
    return ", ".join(found[:3] + more)
