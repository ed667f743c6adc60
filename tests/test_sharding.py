"""The rule of where arrays lie, and the placing of batches and states by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from spikejax.layers import LIF
from spikejax.models.resnet import ResNet
from spikejax.train import TrainConfig, make_optimizer, sharding
from spikejax.train.checksum import by_path
from spikejax.train.step import initial_state

pytestmark = pytest.mark.skipif(
    len(jax.devices()) != 8, reason="needs eight devices, virtual ones on a CPU"
)

ONE, EIGHT = sharding.data_mesh(jax.devices()[:1]), sharding.data_mesh()
GRID, FSDP = sharding.data_mesh(fsdp=4), sharding.data_mesh(fsdp=8)
SEVERAL = {"8x1": EIGHT, "2x4": GRID, "1x8": FSDP}
P = PartitionSpec


def test_a_mesh_holds_all_devices_on_two_axes():
    for mesh, shape in ((EIGHT, (8, 1)), (GRID, (2, 4)), (FSDP, (1, 8)), (ONE, (1, 1))):
        assert mesh.axis_names == ("data", "fsdp")
        assert mesh.axis_types == (AxisType.Auto,) * 2
        assert mesh.devices.shape == shape
        assert mesh.devices.ravel().tolist() == jax.devices()[: mesh.size]


@pytest.mark.parametrize("fsdp", [0, -1, 3, 16])
def test_a_mesh_that_does_not_match_the_devices_is_an_error(fsdp):
    message = (
        rf"^fsdp: expected a divisor of the 8 device\(s\), got {fsdp}\. "
        r"Take 1 or 2 or 4 or 8\.$"
    )
    with pytest.raises(ValueError, match=message):
        sharding.data_mesh(fsdp=fsdp)


@pytest.mark.parametrize("mesh", SEVERAL.values(), ids=SEVERAL)
def test_shard_batch_cuts_the_first_axis_over_all_devices(mesh):
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(16, 8, 8, 3)).astype(np.float32),
        "label": rng.integers(0, 10, 16).astype(np.int32),
    }
    placed = sharding.shard_batch(batch, mesh)
    assert set(placed) == set(batch)
    for name, array in placed.items():
        np.testing.assert_array_equal(array, batch[name])
        assert array.dtype == batch[name].dtype
        for k, shard in enumerate(array.addressable_shards):
            assert shard.device == jax.devices()[k]
            np.testing.assert_array_equal(shard.data, batch[name][2 * k : 2 * k + 2])


@pytest.mark.parametrize("mesh", [ONE, EIGHT], ids=["one", "eight"])
def test_place_state_gives_every_device_a_copy_of_its_own(mesh):
    weights = jnp.arange(6.0)
    state = {"params": weights, "ema": weights, "key": jax.random.key(1)}
    placed = sharding.place_state(state, mesh)
    assert placed["params"].is_fully_replicated
    assert len(placed["params"].addressable_shards) == mesh.size
    shards = [
        shard.data.unsafe_buffer_pointer()
        for array in (placed["params"], placed["ema"], weights)
        for shard in array.addressable_shards
    ]
    assert len(set(shards)) == 2 * mesh.size + 1  # else donation takes one twice
    after = jax.jit(lambda s: jax.tree.map(jnp.copy, s), donate_argnums=0)(placed)
    assert placed["params"].is_deleted() and not weights.is_deleted()
    np.testing.assert_array_equal(after["ema"], weights)
    np.testing.assert_array_equal(weights, np.arange(6.0))


@pytest.mark.parametrize(
    ("path", "shape", "fsdp", "expected"),
    [
        ("params/stem_conv/kernel", (7, 7, 3, 64), 4, P(None, None, None, "fsdp")),
        ("opt/1/0/trace/blocks/0/kernel", (3, 3, 64, 64), 4, P(*[None] * 3, "fsdp")),
        ("params/head/kernel", (512, 1000), 8, P(None, "fsdp")),
        ("ema/head/kernel", (512, 1000), 16, P("fsdp")),  # 1000 is no multiple
        ("params/head/kernel", (30, 10), 4, P()),
        ("params/head/kernel", (512, 1000), 1, P()),
        ("params/head/bias", (1000,), 4, P()),
        ("rest/norm/mean", (64,), 4, P()),
        ("step", (), 4, P()),
    ],
)
def test_the_rule_cuts_kernels_alone(path, shape, fsdp, expected):
    assert sharding.spec(path, shape, fsdp) == expected


def test_place_state_cuts_kernels_and_what_the_optimiser_keeps_of_them():
    config = TrainConfig(steps=3, optimizer="adamw", ema=0.9)
    model = ResNet((1,), (16,), 8, neuron=LIF, stem_width=8, rngs=nnx.Rngs(0))
    state = initial_state(model, make_optimizer(config, 3), config)
    placed = by_path(sharding.place_state(state, GRID))
    kernels = [path for path in placed if path.endswith("kernel")]
    assert len(kernels) == 5 * 4  # params, ema, two moments
    cut = {path for path, leaf in placed.items() if not leaf.is_fully_replicated}
    assert cut == set(kernels)
    for path, leaf in by_path(state).items():
        if path == "key":
            continue
        np.testing.assert_array_equal(placed[path], leaf)
        whole = leaf.size // (4 if path in cut else 1)
        assert {s.data.size for s in placed[path].addressable_shards} == {whole}


def test_a_state_comes_back_whole_to_one_device():
    kernel = jnp.arange(64.0).reshape(8, 8)
    state = sharding.place_state({"kernel": kernel, "bias": jnp.ones(8)}, GRID)
    assert not state["kernel"].is_fully_replicated
    back = sharding.to_local_device(state)
    np.testing.assert_array_equal(back["kernel"], kernel)
    np.testing.assert_array_equal(back["bias"], jnp.ones(8))
    for leaf in back.values():
        assert leaf.sharding.device_set == {jax.devices()[0]}


def test_whole_gathers_for_the_time_of_use():
    params = {"kernel": jnp.arange(64.0).reshape(8, 8), "bias": jnp.ones(8)}
    placed = sharding.place_state(params, GRID)
    seen = []

    def objective(params):
        whole = sharding.replicate(GRID)(params)
        jax.debug.inspect_array_sharding(whole["kernel"], callback=seen.append)
        return (jnp.sin(whole["kernel"]) @ whole["bias"]).sum()

    places = sharding.state_shardings(placed, GRID)
    gradient = jax.jit(jax.grad(objective), out_shardings=places)(placed)
    assert seen and all(place.is_fully_replicated for place in seen)
    np.testing.assert_allclose(gradient["kernel"], jnp.cos(params["kernel"]), rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "instead"),
    [(0, 8), (-8, 8), (3, 8), (12, 16), (9, 8), (127, 128), (8, 8), (16, 16)],
)
def test_a_batch_that_the_devices_cannot_share_is_an_error(size, instead):
    message = (
        rf"batch size: expected a multiple of the 8 device\(s\), got {size}\. "
        rf"Take {instead}\."
    )
    if size != instead:
        with pytest.raises(ValueError, match=message):
            sharding.check_batch_size(size, EIGHT)
    sharding.check_batch_size(instead, EIGHT)
    sharding.check_batch_size(instead - 1, ONE)
    with pytest.raises(ValueError, match=r"got 0\. Take 1\."):
        sharding.check_batch_size(0, ONE)
