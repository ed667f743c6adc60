"""What the compiler is told of a training step: less memory, all cores of a CPU."""

from functools import cache
from typing import Any

import jax

NO_CONVOLUTIONS = "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"
CPU_OPTIONS = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_disable_hlo_passes": "cse_barrier_expander",
    "xla_cpu_experimental_ynn_fusion_type": NO_CONVOLUTIONS,
}


@cache
def compiler_options(platform: str) -> dict[str, Any]:
    """For ``jax.jit(step, compiler_options=...)`` of a training step on a platform.

    On "cpu": the order of operations that takes the least memory, instead of the one
    that keeps most cores busy; barriers that stay, without which ``jax.checkpoint`` is
    undone; convolutions by Eigen, as YNNPACK's keep to one core where there are few
    channels. Two fifths of the memory, and two thirds of the time (docs/results.md).
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
