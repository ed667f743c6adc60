"""Where arrays live: a mesh of devices, and the placing of arrays on it.

The batch is cut over all devices. Groups of ``fsdp`` devices share one copy of the
parameters and of the optimiser, each keeping its part of every kernel.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from spikejax.train.checksum import key_data, key_like


def data_mesh(devices: Sequence[Any] | None = None, fsdp: int = 1) -> Mesh:
    """Mesh with the axes 'data' and 'fsdp' of the devices, all by default.

    Args:
        devices: of all processes, in the order that suits their network best.
        fsdp: devices that share one copy of the parameters; 1 gives each its own.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if fsdp < 1 or count % fsdp:
        fit = [str(n) for n in range(1, count + 1) if count % n == 0]
        raise ValueError(
            f"fsdp: expected a divisor of the {count} device(s), got {fsdp}. "
            f"Take {' or '.join(fit)}."
        )
    axes, kinds = ("data", "fsdp"), (AxisType.Auto,) * 2
    return jax.make_mesh((count // fsdp, fsdp), axes, axis_types=kinds, devices=devices)


def spec(path: str, shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """The rule: which axis of a leaf is cut over 'fsdp'.

    Of a kernel the longest that fsdp divides, the last one of equals, so that of a
    convolution [h, w, in, out] the outputs. Every other leaf is small: it stays whole,
    as does a kernel without such an axis.

    Args:
        path: such as "params/stem_conv/kernel"; the optimiser's leaves and the moving
            average end alike and so lie as their kernel does.
    """
    axes = [axis for axis, length in enumerate(shape) if length % fsdp == 0]
    if fsdp == 1 or not path.endswith("kernel") or not axes:
        return PartitionSpec()
    axis = max(axes, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*[None] * axis, "fsdp")


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """The placing of every leaf of a state, or of its shapes, by the rule."""

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec(name, leaf.shape, mesh.shape["fsdp"]))

    return jax.tree_util.tree_map_with_path(place, state)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device: metrics, and parameters while they are used."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The first axis, the batch, cut over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Host batch [B, ...] of this process to arrays that are cut over the mesh."""
    return {
        name: jax.make_array_from_process_local_data(over_batch(mesh), values)
        for name, values in batch.items()
    }


def place_state(state: Any, mesh: Mesh) -> Any:
    """A copy of every leaf where the rule puts it; safe to donate.

    Every process gives the same whole state and keeps its part.
    """

    def place(leaf, sharding):
        host = np.asarray(key_data(leaf))
        data = jax.make_array_from_callback(host.shape, sharding, host.__getitem__)
        return key_like(leaf, data)

    placed = jax.tree.map(place, state, state_shardings(state, mesh))
    # On a CPU several devices, and the given state, may still share their memory.
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(placed)


def whole(mesh: Mesh) -> Callable[[Any], Any]:
    """A function that gathers parameters for their use, inside of ``jax.jit``.

    Left to itself, or told to cut the gradients at once, XLA gathers the activations of
    all devices instead, where there are several time steps.
    """

    def gather(leaf):
        return jax.lax.with_sharding_constraint(leaf, replicated(mesh))

    return lambda params: jax.tree.map(gather, params)


def on_this_host(tree: Any) -> Any:
    """A whole copy of every leaf on one device of this process.

    Every process must call it. Leaves are gathered one after the other.
    """

    def fetch(leaf):
        if not leaf.is_fully_replicated:
            everywhere = replicated(leaf.sharding.mesh)
            leaf = jax.jit(jnp.copy, out_shardings=everywhere)(leaf)
        return leaf.addressable_data(0).block_until_ready()

    return jax.tree.map(fetch, tree)


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """ValueError unless the devices share the batch evenly."""
    if batch_size < 1 or batch_size % mesh.size:
        raise ValueError(
            f"batch size: expected a multiple of the {mesh.size} device(s), got "
            f"{batch_size}. Take {max(1, round(batch_size / mesh.size)) * mesh.size}."
        )
