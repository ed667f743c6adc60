"""What the compiler is told of a training step, so that it takes less memory."""

from functools import cache
from typing import Any

import jax

CPU_OPTIONS = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_disable_hlo_passes": "cse_barrier_expander",
}


@cache
def compiler_options(platform: str) -> dict[str, Any]:
    """For ``jax.jit(step, compiler_options=...)`` of a training step on a platform.

    On "cpu": the order of operations that takes the least memory, instead of the one
    that keeps most cores busy, and barriers that stay, without which ``jax.checkpoint``
    is undone. Two fifths of the memory, and no more time (docs/results.md).
    """
    if platform != "cpu":
        return {}
    return {name: o for name, o in CPU_OPTIONS.items() if _accepted({name: o})}


def _accepted(options):
    """Whether this XLA has such options: their names are not promised to stay."""
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except jax.errors.JaxRuntimeError:
        return False
    return True
