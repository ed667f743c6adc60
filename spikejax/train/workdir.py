"""The folder of a run: its files, and the check that it belongs to the same run."""

import json
from pathlib import Path
from typing import Any

from spikejax.train import processes
from spikejax.train.checksum import first_difference, write_atomically


def write(path: Path, content: Any) -> None:
    """Write JSON atomically; of several processes only the primary one writes."""
    if processes.is_primary():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(content, indent=2))


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
        saved = defaults | json.loads(path.read_text())
        for name in saved.keys() - settings.keys():
            del saved[name]  # it was removed from the script since
        different = first_difference(saved, settings)
    except (ValueError, TypeError):
        different = "config.json is corrupted"
    if different:
        raise ValueError(
            f"workdir: expected a new folder or one of this run, got {folder}, which "
            f"holds another: {different}. Take another --workdir, or delete it."
        )


def claim(folder: Path, settings: dict[str, Any]) -> Path:
    """Write the settings that `check` compares, and return the folder.

    Raises:
        ValueError: not all processes see the folder.
    """
    path = folder / "config.json"
    write(path, settings)
    processes.all_gather(0)  # all wait for the primary one
    seen = processes.all_gather(path.exists())
    if not all(seen):
        raise ValueError(
            f"workdir: expected a folder that all processes share, got {folder}, "
            f"where process {seen.index(False)} does not see what process 0 wrote. "
            "Take one on a disk that all of them see."
        )
    return folder
