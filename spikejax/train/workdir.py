"""The folder of a run: its files, its lock, and the check that it is this run's."""

import contextlib
import fcntl
import json
import math
import os
import platform
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spikejax.train import processes
from spikejax.train.checksum import differences, write_atomically

# Seconds for which gcsfuse and NFS may still take a file for missing.
PATIENCE = 60


def write(path: Path, content: Any) -> None:
    """Write JSON atomically; of several processes only the primary one writes."""
    if processes.is_primary():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(_finite(content), indent=2))


def _finite(content: Any) -> Any:
    """Return None for each number that JSON does not have: NaN and infinity."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    is_bad = isinstance(content, float) and not math.isfinite(content)
    return None if is_bad else content


def check_path(folder: Path) -> None:
    """Raise a ValueError for a folder whose checkpoints could not be read back."""
    # Orbax takes the first three for a pattern, TensorStore the others for a URL.
    if found := re.search(r"[*?[#%\\]", str(folder)):
        raise ValueError(
            f"workdir: expected a path without {found[0]}, which Orbax cannot read "
            f"back, got {folder}. Take another --workdir."
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder, which is created if missing, until the end of the context.

    The kernel drops the lock when the process dies.

    Raises:
        ValueError: another process is using the folder.
    """
    with contextlib.ExitStack() as held:
        owner = _lock(folder, held) if processes.is_primary() else ""
        if owner := processes.all_gather(owner)[0]:
            raise ValueError(
                f"workdir: expected a folder that no other run is using, got {folder}, "
                f"which {owner} uses. Wait for it, or take another --workdir."
            )
        yield


def _lock(folder: Path, held: contextlib.ExitStack) -> str:
    """Return who else has the lock, or ""; `held` keeps it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = held.enter_context((folder / "lock").open("a+", encoding="utf-8"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.read() or "another process"
    except OSError:  # the disk has no locks, as some of clusters
        return ""
    file.truncate(0)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {platform.node()}, since {now},")
    file.flush()
    return ""


def check(
    folder: Path,
    settings: dict[str, Any],
    defaults: dict[str, Any],
    name: str = "config.json",
) -> None:
    """Check that a folder is new, or holds the run with these settings.

    Args:
        folder: of the run.
        settings: what tells this run from another, as JSON has it.
        defaults: of all settings of the script. Settings missing from the file were
            added later; the run is taken to have used their defaults.
        name: of the file with its settings.

    Raises:
        ValueError: the folder holds another run, or a corrupted file.
    """
    path = folder / name
    if not path.exists():
        return
    try:
        saved = defaults | json.loads(path.read_text())
        for name in saved.keys() - settings.keys():
            del saved[name]  # it was removed from the script since
        different = differences(saved, settings)
    except (ValueError, TypeError):
        different = f"{name} is corrupted"
    if different:
        raise ValueError(
            f"workdir: expected a new folder or one of this run, got {folder}, which "
            f"holds another: {different}. Take another --workdir, or delete it."
        )


def claim(folder: Path, settings: dict[str, Any], defaults: dict[str, Any]) -> Path:
    """Write the settings that `check` compares, and return the folder.

    Raises:
        ValueError: as `check` and `locked`, or not all processes see the folder.
    """
    path = folder / "config.json"
    with locked(folder):
        check(folder, settings, defaults)  # another run may have claimed it since
        write(path, settings)
    check_shared(path)
    return folder


def check_shared(path: Path) -> None:
    """Check that all processes see a file that the primary one has written.

    Raises:
        ValueError: one does not, even after a minute.
    """
    processes.all_gather(0)  # all wait for the primary one
    waited = 0
    # All look again together: nobody waits long enough in a collective to give up.
    while not all(seen := processes.all_gather(path.exists())):
        if waited == PATIENCE:
            raise ValueError(
                "workdir: expected a folder that all processes share, got "
                f"{path.parent}, where process {seen.index(False)} does not see what "
                "process 0 wrote. Take one on a disk that all of them see."
            )
        time.sleep(1)
        waited += 1
