"""The folder of a run: what it holds, and whether it is this run's."""

import json
import os
from pathlib import Path
from typing import Any

from spikejax.train import processes


def write(path: Path, content: Any) -> None:
    """The file is whole or as it was, even when the process is killed.

    Of several processes the first one writes.
    """
    if processes.is_first():
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.tmp")
        beside.write_text(json.dumps(content, indent=2))
        os.replace(beside, path)


def check(workdir: Path, settings: dict[str, Any], defaults: dict[str, Any]) -> None:
    """ValueError where the folder holds another run.

    What the folder does not name is newer than its run, which had the default.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        there = defaults | json.loads(path.read_text())
    except (ValueError, TypeError):
        raise ValueError(
            f"workdir: expected the settings of a run in {path}, got a damaged file. "
            "Take another --workdir."
        ) from None
    differ = [k for k in settings if settings[k] != there.get(k)]
    if differ:
        name = differ[0]
        raise ValueError(
            f"workdir: expected a new folder or one of this run, got {workdir}, which "
            f"holds another: {name} is {there.get(name)!r} there and "
            f"{settings[name]!r} here. Take another --workdir, or delete it."
        )


def claim(workdir: Path, settings: dict[str, Any]) -> Path:
    """Writes config.json; the folder, or ValueError unless all processes see it."""
    path = workdir / "config.json"
    write(path, settings)
    processes.of_all(0)  # all wait for the first
    seen = processes.of_all(path.exists())
    if not all(seen):
        raise ValueError(
            f"workdir: expected a folder that all processes share, got {workdir}, "
            f"where process {seen.index(0)} does not see what process 0 wrote. Give "
            "one on a disk that all of them see."
        )
    return workdir
