"""The folder of a run: its files, and the check that it belongs to the same run."""

import json
import os
from pathlib import Path
from typing import Any

from spikejax.train import processes
from spikejax.train.checksum import first_difference


def write(path: Path, content: Any) -> None:
    """Write JSON atomically: a kill leaves the old file or the new one.

    Args:
        path: of the file; of several processes only the primary one writes.
        content: anything that JSON can hold.
    """
    if processes.is_primary():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(json.dumps(content, indent=2))
        os.replace(temporary, path)


def check(folder: Path, settings: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Check that a folder is new, or holds the run with these settings.

    Args:
        folder: of the run.
        settings: what tells this run from another, as JSON has it.
        defaults: of all settings of the script. Settings missing from config.json were
            added later; the run is taken to have used their defaults.

    Raises:
        ValueError: the folder holds another run, or a corrupted config.json.
    """
    path = folder / "config.json"
    if not path.exists():
        return
    try:
        saved = {
            name: value
            for name, value in (defaults | json.loads(path.read_text())).items()
            if name in settings  # others were removed from the script since
        }
        different = first_difference(saved, settings)
    except (ValueError, TypeError):
        different = "config.json is corrupted"
    if different:
        raise ValueError(
            f"workdir: expected a new folder or one of this run, got {folder}, which "
            f"holds another: {different}. Take another --workdir, or delete it."
        )


def claim(folder: Path, settings: dict[str, Any]) -> Path:
    """Write config.json, and return the folder.

    Args:
        folder: of the run.
        settings: those that `check` compares.

    Raises:
        ValueError: not all processes see the folder.
    """
    path = folder / "config.json"
    write(path, settings)
    processes.all_gather(0)  # all wait for the primary
    seen = processes.all_gather(path.exists())
    if not all(seen):
        raise ValueError(
            f"workdir: expected a folder that all processes share, got {folder}, "
            f"where process {seen.index(False)} does not see what process 0 wrote. "
            "Take one on a disk that all of them see."
        )
    return folder
