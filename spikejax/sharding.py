"""Where arrays live: a mesh of devices, and the placing of arrays on it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh of the devices (all by default) with one axis, 'data'."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device: parameters, optimiser, metrics."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The first axis, the batch, cut over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Host batch [B, ...] of this process to arrays that are cut over the mesh."""
    return {
        name: jax.make_array_from_process_local_data(over_batch(mesh), values)
        for name, values in batch.items()
    }


def place_state(state: Any, mesh: Mesh) -> Any:
    """A copy of every leaf on every device; safe to donate."""
    # may_alias=False is ignored for replicas: one of them would be the given array
    return jax.device_put(jax.tree.map(jnp.copy, state), replicated(mesh))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """ValueError unless the devices share the batch evenly."""
    if batch_size < 1 or batch_size % mesh.size:
        raise ValueError(
            f"batch size: expected a multiple of the {mesh.size} device(s), got "
            f"{batch_size}. Take {max(1, round(batch_size / mesh.size)) * mesh.size}."
        )
