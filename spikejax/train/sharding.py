"""Sharding: a mesh of devices, and the placement of arrays on it.

The batch is sharded over all devices. Groups of ``fsdp`` devices share one copy of the
parameters and of the optimizer state, each with its part of every kernel.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from spikejax.train.checksum import by_path


def data_mesh(devices: Sequence[Any] | None = None, fsdp: int = 1) -> Mesh:
    """Return a mesh of the devices with the axes 'data' and 'fsdp'.

    Args:
        devices: of all processes, all there are by default.
        fsdp: devices that share one copy of the parameters; 1 gives each its own.

    Raises:
        ValueError: `fsdp` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if fsdp < 1 or count % fsdp:
        divisors = [str(n) for n in range(1, count + 1) if count % n == 0]
        raise ValueError(
            f"fsdp: expected a divisor of the {count} device(s), got {fsdp}. "
            f"Take {' or '.join(divisors)}."
        )
    # The default axis type differs between versions of JAX: Auto, then Explicit.
    axes, kinds = ("data", "fsdp"), (AxisType.Auto,) * 2
    return jax.make_mesh((count // fsdp, fsdp), axes, axis_types=kinds, devices=devices)


def spec(path: str, shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Return along which axis a leaf is sharded over 'fsdp'.

    For a kernel: the longest axis divisible by `fsdp`; ties go to the last axis (a
    convolution's output channels). Every other leaf is small and is replicated, as is a
    kernel without such an axis.

    Args:
        path: such as "params/stem_conv/kernel". Optimizer and EMA leaves end with the
            same names and are sharded like their kernel.
        shape: of the leaf.
        fsdp: devices that share one copy.
    """
    sizes = [(size, axis) for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or not path.endswith("kernel") or not sizes:
        return PartitionSpec()
    return PartitionSpec(*[None] * max(sizes)[1], "fsdp")


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Return the sharding of every leaf of a state, or of its shapes."""
    fsdp, leaves = mesh.shape["fsdp"], by_path(state).items()
    specs = [spec(path, leaf.shape, fsdp) for path, leaf in leaves]
    places = [NamedSharding(mesh, each) for each in specs]
    return jax.tree.unflatten(jax.tree.structure(state), places)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding with a copy per device: metrics, and parameters in use."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of the first axis, the batch, over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Return this process's part [B, ...] of a batch as arrays sharded on the mesh."""
    place = partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
    return {name: place(values) for name, values in batch.items()}


def place_state(state: Any, mesh: Mesh) -> Any:
    """Return a copy of a state, sharded by `spec`; safe to donate.

    The state is the same in every process, which keeps its own part.
    """

    def place(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        # jax.device_put takes no random keys for devices of other processes.
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = place(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)

    placed = jax.tree.map(place, state, state_shardings(state, mesh))
    # On a CPU several devices, and the given state, may still share their memory, and
    # donation would take one buffer twice.
    return _copied(placed)


@jax.jit
def _copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def replicate(mesh: Mesh) -> Callable[[Any], Any]:
    """Return a function that gathers parameters for their use, for ``jax.jit``."""
    # This constraint is needed: without it, or with gradients constrained too, XLA
    # all-gathers activations instead, 47 times the bytes of the parameters for a small
    # ResNet at T = 4 on a mesh of 2x4. At T = 1 it does not.
    return partial(jax.lax.with_sharding_constraint, shardings=replicated(mesh))


def to_local_device(tree: Any) -> Any:
    """Return a replicated copy of every leaf on one device; all processes must call."""

    def fetch(leaf: Any) -> jax.Array:
        if not leaf.is_fully_replicated:
            everywhere = replicated(leaf.sharding.mesh)
            leaf = jax.jit(jnp.copy, out_shardings=everywhere)(leaf)
        # One leaf at a time: several programs whose devices wait for one another can
        # deadlock on a CPU.
        return leaf.addressable_data(0).block_until_ready()

    return jax.tree.map(fetch, tree)


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raise a ValueError unless the devices can share a batch evenly."""
    if batch_size < 1 or batch_size % mesh.size:
        raise ValueError(
            f"batch size: expected a multiple of the {mesh.size} device(s), got "
            f"{batch_size}. Take {max(1, round(batch_size / mesh.size)) * mesh.size}."
        )
