"""Where things are kept that can be made again: frames, and compiled programs."""

import os
import platform
from pathlib import Path
from typing import Any

import jax

from spikejax.train import processes


def folder() -> Path:
    """spikejax in $XDG_CACHE_HOME (~/.cache); safe to delete."""
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "spikejax"


def keep_programs() -> None:
    """Keep what takes more than a second to compile, and say where.

    JAX_COMPILATION_CACHE_DIR is another folder for it, and
    JAX_ENABLE_COMPILATION_CACHE=false none.
    """
    config: Any = jax.config
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    # Programs for a CPU are no good on another one, and a home can be shared.
    kept = folder() / f"programs-{platform.node()}"
    config.update("jax_compilation_cache_dir", str(kept))
    if processes.is_primary():
        print(f"Compiled programs are kept in {kept} for the next run.")
