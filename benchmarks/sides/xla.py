"""Code that the two libraries on JAX share: weights, and a step that is compiled."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.workloads import Prepared, weights

try:
    DEVICE = jax.devices()[0]
except (RuntimeError, AssertionError) as error:  # as ``turns.environment`` wants it
    message = "expected a GPU and JAX for it, found none: leave out --device gpu"
    raise RuntimeError(message) from error


def give_weights(layers: Sequence[Any]) -> None:
    """The weights of every library, in Flax's order of axes."""
    for index, layer in enumerate(layers):
        *window, inputs, outputs = layer.kernel.shape
        kernel = weights(index, (outputs, inputs, *window))
        layer.kernel = nnx.Param(jnp.moveaxis(kernel, (0, 1), (-1, -2)))


def prepared(
    step: Callable,
    state: Any,
    given: Any,
    parameters: Any,
    versions: dict[str, str],
    options: dict[str, Any] | None = None,
) -> Prepared:
    """The step compiled; the new state takes the place of the old one.

    Args:
        step: (state, given) -> (state, (loss, whatever else is to be made)).
        state: donated.
        given: the input and its labels.
        parameters: to be counted.
        versions: of the library.
        options: for the compiler.
    """
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    began = time.perf_counter()
    jitted = jax.jit(step, donate_argnums=0, compiler_options=options)
    compiled = jitted.lower(state, given).compile()
    seconds = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()
    held = memory.argument_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes

    def run():
        nonlocal state
        state, (loss, _) = jax.block_until_ready(compiled(state, given))
        return float(loss)

    def peak():
        return DEVICE.memory_stats()["peak_bytes_in_use"]

    return Prepared(
        run,
        count,
        held,
        versions,
        DEVICE.device_kind,
        compile_s=seconds,
        compiled_mib=(held + memory.temp_size_in_bytes + results) / 2**20,
        device_peak=None if DEVICE.platform == "cpu" else peak,
    )
