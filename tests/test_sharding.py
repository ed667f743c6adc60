"""Many devices do what one does, each a part of it, and pass on no activations."""

import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from spikejax import encode, sharding
from spikejax.checksum import by_path
from spikejax.layers import LIF, MultiThreshold
from spikejax.losses import rate_cross_entropy
from spikejax.models.resnet import ResNet, ms, plain
from spikejax.neurons import cascade
from spikejax.norm import td_batch_norm
from spikejax.step import (
    TrainConfig,
    initial_state,
    make_eval_step,
    make_optimizer,
    make_predict,
    make_train_step,
)
from spikejax.train import graphs, jit_train_step

pytestmark = pytest.mark.skipif(
    len(jax.devices()) != 8, reason="needs eight devices, virtual ones on a CPU"
)

ONE, EIGHT = sharding.data_mesh(jax.devices()[:1]), sharding.data_mesh()
GRID, FSDP = sharding.data_mesh(fsdp=4), sharding.data_mesh(fsdp=8)
SEVERAL = {"8x1": EIGHT, "2x4": GRID, "1x8": FSDP}
BATCH, STEPS, CLASSES = 16, 10, 10
P = PartitionSpec
CONFIG = TrainConfig(steps=STEPS, batch_size=BATCH, learning_rate=0.3, warmup=0.4)


def batch_of(seed, size=8):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(BATCH, size, size, 3)).astype(np.float32),
        "label": rng.integers(0, CLASSES, BATCH).astype(np.int32),
    }


def direct(time_steps):
    return lambda images, rng: encode.direct(images, time_steps)


def poisson(time_steps):
    return lambda images, rng: encode.poisson(images, time_steps, rng=rng)


def norm(features, *, rngs, alpha=1.0):
    """Without the zeros of membrane shortcuts, behind which gradients are small."""
    return td_batch_norm(features, rngs=rngs)


def resnet(**options):
    options = {"neuron": MultiThreshold, "residual": ms, "norm": norm} | options
    return ResNet((1,), (16,), CLASSES, stem_width=8, rngs=nnx.Rngs(0), **options)


class Folded(nnx.Module):
    """What not to do: it folds time and batch to [T * B, ...], time outside."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.stem = nnx.Linear(3, 8, rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.neurons = LIF()
        self.head = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, xs):
        xs = self.neurons(self.stem(xs))
        batch, steps, *shape = xs.shape
        xs = self.conv(xs.swapaxes(0, 1).reshape(steps * batch, *shape))
        xs = self.neurons(xs.reshape(steps, batch, *shape).swapaxes(0, 1))
        return self.head(xs.mean((2, 3)))


class Run(NamedTuple):
    """Compiled steps of a model on a mesh, and the state before them."""

    mesh: Any
    state: Any
    train_step: Any
    eval_step: Any


def compiled(model, encode, mesh, size=8, norm_groups=1):
    """The steps as in ``fit``, compiled, for images of size x size."""
    optimizer = make_optimizer(CONFIG, STEPS)
    state = sharding.place_state(initial_state(model, optimizer, CONFIG), mesh)
    batch = sharding.place_batch(batch_of(0, size), mesh)
    weight = sharding.place_batch({"weight": np.ones(BATCH, np.float32)}, mesh)
    training, evaluation = graphs(model)
    whole = sharding.whole(mesh)
    train_step = make_train_step(
        *(training, rate_cross_entropy, encode, optimizer),
        norm_groups=norm_groups,
        gather=whole,
    )
    predict = make_predict(evaluation, encode, whole)
    eval_step = jax.jit(
        make_eval_step(predict, rate_cross_entropy),
        out_shardings=sharding.replicated(mesh),
    )
    return Run(
        mesh,
        state,
        jit_train_step(train_step, state, mesh).lower(state, batch).compile(),
        eval_step.lower(state, batch | weight),
    )


def train(run, steps=STEPS):
    """(losses, first state, last state)"""
    state, losses = sharding.place_state(run.state, run.mesh), []
    for seed in range(steps):
        batch = sharding.place_batch(batch_of(seed), run.mesh)
        state, metrics = run.train_step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, run.state, state


SENT = (
    "all-gather",
    "all-to-all",
    "collective-permute",
    "all-reduce",
    "reduce-scatter",
)
INSTRUCTION = re.compile(rf"= (.*?) ({'|'.join(SENT)})(?:-start)?\(")


def sent(text):
    """(kind, elements) of every array that the devices of a program pass on."""
    found = []
    for shapes, kind in INSTRUCTION.findall(text):
        for shape in re.findall(r"\[([\d,]*)\]", re.sub(r"\{.*?\}", "", shapes)):
            found.append((kind, int(np.prod([int(n) for n in shape.split(",") if n]))))
    return found


def too_large(text, params):
    """What the devices pass on that is larger than the largest parameter."""
    largest = max(leaf.size for leaf in jax.tree.leaves(params))
    return [(kind, elements) for kind, elements in sent(text) if elements > largest]


@pytest.fixture(scope="module", params=[1, 4], ids=["T=1", "T=4"])
def runs(request):
    """The same small network, compiled on one device and on eight."""
    encode = direct(request.param)
    meshes = {"one": ONE} | SEVERAL
    if request.param > 1:
        del meshes["1x8"]
    return {name: compiled(resnet(), encode, mesh) for name, mesh in meshes.items()}


@pytest.fixture(scope="module")
def results(runs):
    """{mesh: (losses, first state, last state)} of ten steps."""
    return {name: train(run) for name, run in runs.items()}


# Placing


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
def test_place_batch_cuts_the_first_axis_over_all_devices(mesh):
    batch = batch_of(0)
    placed = sharding.place_batch(batch, mesh)
    assert set(placed) == set(batch)
    for name, array in placed.items():
        np.testing.assert_array_equal(array, batch[name])
        assert array.dtype == batch[name].dtype
        for k, shard in enumerate(array.addressable_shards):
            assert shard.device == jax.devices()[k]
            np.testing.assert_array_equal(shard.data, batch[name][2 * k : 2 * k + 2])


def test_place_batch_refuses_a_batch_that_the_devices_cannot_share():
    with pytest.raises(ValueError, match="divi"):
        sharding.place_batch({"label": np.zeros(12, np.int32)}, EIGHT)


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
    model = Folded()
    state = initial_state(model, make_optimizer(config, 3), config)
    placed = by_path(sharding.place_state(state, GRID))
    kernels = [path for path in placed if path.endswith("kernel")]
    assert len(kernels) == 3 * 4  # params, ema, two moments
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
    back = sharding.on_this_host(state)
    np.testing.assert_array_equal(back["kernel"], kernel)
    np.testing.assert_array_equal(back["bias"], jnp.ones(8))
    for leaf in back.values():
        assert leaf.sharding.device_set == {jax.devices()[0]}


def test_whole_gathers_for_the_time_of_use():
    params = {"kernel": jnp.arange(64.0).reshape(8, 8), "bias": jnp.ones(8)}
    placed = sharding.place_state(params, GRID)
    seen = []

    def objective(params):
        whole = sharding.whole(GRID)(params)
        jax.debug.inspect_array_sharding(whole["kernel"], callback=seen.append)
        return (jnp.sin(whole["kernel"]) @ whole["bias"]).sum()

    places = sharding.state_shardings(placed, GRID)
    gradient = jax.jit(jax.grad(objective), out_shardings=places)(placed)
    assert seen and all(place.is_fully_replicated for place in seen)
    np.testing.assert_allclose(gradient["kernel"], jnp.cos(params["kernel"]), rtol=1e-5)


@pytest.mark.parametrize("size", [8, 16, 128])
def test_batch_sizes_that_the_devices_share(size):
    sharding.check_batch_size(size, EIGHT)
    sharding.check_batch_size(size - 1, ONE)


@pytest.mark.parametrize(
    ("size", "instead"), [(0, 8), (-8, 8), (3, 8), (12, 16), (9, 8), (127, 128)]
)
def test_other_batch_sizes_are_an_error_that_names_a_good_one(size, instead):
    message = (
        rf"batch size: expected a multiple of the 8 device\(s\), got {size}\. "
        rf"Take {instead}\."
    )
    with pytest.raises(ValueError, match=message):
        sharding.check_batch_size(size, EIGHT)
    sharding.check_batch_size(instead, EIGHT)


def test_a_batch_of_none_is_an_error_on_one_device_too():
    with pytest.raises(ValueError, match=r"got 0\. Take 1\."):
        sharding.check_batch_size(0, ONE)


# Many devices equal one


def others(found):
    """(name, result) of all meshes but that of one device."""
    return [(name, value) for name, value in found.items() if name != "one"]


def test_every_mesh_gives_the_losses_of_one_device(results):
    one = results["one"][0]
    for name, (losses, _, _) in others(results):
        np.testing.assert_allclose(losses, one, atol=1e-5, err_msg=name)
    assert max(one) - min(one) > 1e-2


def test_every_mesh_gives_the_parameters_of_one_device(results):
    _, first, one = results["one"]
    first, one = by_path(first["params"]), by_path(one["params"])
    for name, (_, _, last) in others(results):
        last = by_path(last["params"])
        for path, leaf in one.items():
            np.testing.assert_allclose(
                last[path], leaf, atol=1e-5, err_msg=f"{name} {path}"
            )
            assert np.abs(leaf - first[path]).max() > 1e-4, path


def test_every_mesh_gives_the_statistics_of_one_device(results):
    one = by_path(results["one"][2]["rest"])
    for name, (_, _, last) in others(results):
        for path, leaf in by_path(last["rest"]).items():
            np.testing.assert_allclose(
                leaf, one[path], atol=1e-5, err_msg=f"{name} {path}"
            )


def test_the_state_stays_where_the_rule_puts_it(results, runs):
    for name, (_, _, last) in others(results):
        places = sharding.state_shardings(last, runs[name].mesh)
        for leaf, place in zip(
            jax.tree.leaves(last), jax.tree.leaves(places), strict=True
        ):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
            assert len(leaf.sharding.device_set) == 8


def test_poisson_spikes_do_not_depend_on_the_devices():
    images = np.random.default_rng(0).uniform(size=(BATCH, 4)).astype(np.float32)
    draw = jax.jit(partial(encode.poisson, time_steps=4, rng=jax.random.key(5)))
    one, eight = (
        draw(**sharding.place_batch({"images": images}, mesh)) for mesh in (ONE, EIGHT)
    )
    np.testing.assert_array_equal(eight, one)


# What the devices pass on


def test_sent_reads_the_text_of_a_program():
    text = """
    %all-gather.3 = f32[16,4,8]{2,1,0} all-gather(%p), replica_groups=[1,8]<=[8]
    %ag = (f32[2,8]{1,0}, f32[16,8]{1,0}) all-gather-start(f32[2,8]{1,0} %p)
    %done = f32[16,8]{1,0} all-gather-done(%ag)
    ROOT %t = (f32[3]{0:T(128)}, s32[]) all-to-all(f32[3]{0} %a, s32[] %b)
    %all-reduce = f32[9,2]{1,0} all-reduce(%all-gather.3), to_apply=%add
    %x = f32[64]{0} add(%all-gather.3, %all-gather.3)
    """
    assert sent(text) == [
        ("all-gather", 512),
        ("all-gather", 16),
        ("all-gather", 128),
        ("all-to-all", 3),
        ("all-to-all", 1),
        ("all-reduce", 18),
    ]


def test_the_train_step_passes_on_nothing_larger_than_a_parameter(runs):
    for name, run in others(runs):
        text = run.train_step.as_text()
        assert too_large(text, run.state["params"]) == [], name
        kinds = {kind for kind, _ in sent(text)}
        assert "all-reduce" in kinds  # of the gradients
        assert ("all-gather" in kinds) == (run.mesh.shape["fsdp"] > 1), name


def test_each_kernel_is_gathered_by_itself_and_once(runs):
    run = runs["2x4"]
    kernels = [
        leaf.size
        for leaf in jax.tree.leaves(run.state["params"])
        if not leaf.is_fully_replicated
    ]
    text = run.train_step.as_text()
    gathered = [size for kind, size in sent(text) if kind == "all-gather"]
    assert sorted(gathered) == sorted(kernels) and len(kernels) == 5


def test_no_device_stores_more_than_its_part(runs):
    """Arguments of the compiled step are the state and the batch, as they lie."""
    for name, run in runs.items():
        batch = sharding.place_batch(batch_of(0), run.mesh)
        leaves = jax.tree.leaves((run.state | {"key": jnp.zeros(2)}, batch))
        parts = [
            int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
            for leaf in leaves
        ]
        memory = run.train_step.memory_analysis()
        assert memory.argument_size_in_bytes <= 1.1 * sum(parts) + 64 * len(parts), name
        assert memory.alias_size_in_bytes > 0  # the new state takes the old one's place
    kernels = 3 * 3 * (3 * 8 + 8 * 16 + 16 * 16) + 8 * 16 + 16 * CLASSES
    less = [
        run.train_step.memory_analysis().argument_size_in_bytes
        for run in (runs["8x1"], runs["2x4"])
    ]
    assert less[0] - less[1] == pytest.approx(2 * 4 * kernels * 3 / 4, rel=0.02)


def test_one_device_passes_on_nothing(runs):
    assert sent(runs["one"].train_step.as_text()) == []


def test_the_evaluation_step_passes_on_three_sums(runs):
    found = sent(runs["8x1"].eval_step.compile().as_text())
    assert found and set(found) == {("all-reduce", 1)}


def test_a_scan_over_time_passes_on_nothing_larger_than_a_parameter():
    """Longer than what is unrolled; with Poisson spikes, max-pooling, plain sums."""
    neuron = partial(MultiThreshold, 2, cascade)
    model = resnet(neuron=neuron, residual=plain, imagenet_stem=True)
    run = compiled(model, poisson(6), EIGHT, size=16)
    assert "while(" in run.train_step.as_text()
    assert too_large(run.train_step.as_text(), run.state["params"]) == []


def test_folding_time_outside_of_the_batch_is_found_out():
    run = compiled(Folded(), direct(4), EIGHT)
    found = too_large(run.train_step.as_text(), run.state["params"])
    assert {kind for kind, _ in found} & set(SENT[:3])


def test_each_of_eight_devices_needs_a_part_of_the_memory(runs):
    one, eight = (
        runs[name].train_step.memory_analysis().temp_size_in_bytes
        for name in ("one", "8x1")
    )
    assert 0 < eight <= one / 4


# Batch statistics of parts of the batch


class Normed(nnx.Module):
    """Statistics, neurons and a head, so that a step compiles quickly."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm = td_batch_norm(3, rngs=rngs)
        self.neurons = LIF()
        self.head = nnx.Linear(3, CLASSES, rngs=rngs)

    def __call__(self, xs):
        return self.head(self.neurons(self.norm(xs)).mean((2, 3)))


@pytest.fixture(scope="module")
def grouped():
    """{mesh: Run} with a group of the batch for each device."""
    return {
        name: compiled(Normed(), direct(2), mesh, norm_groups=8)
        for name, mesh in {"one": ONE, "8x1": EIGHT}.items()
    }


def test_groups_are_normalised_apart(grouped):
    model, batch, statistics = Normed(), batch_of(0), []
    losses = []
    for k in range(0, BATCH, 2):
        part = Normed()
        part.train()
        xs = direct(2)(jnp.asarray(batch["image"][k : k + 2]), None)
        losses.append(rate_cross_entropy(part(xs), batch["label"][k : k + 2]))
        statistics.append(np.asarray(part.norm.var[...]))
    expected = np.concatenate(losses).mean()
    model.train()
    apart = rate_cross_entropy(
        model(direct(2)(jnp.asarray(batch["image"]), None)), batch["label"]
    )
    assert abs(expected - apart.mean()) > 1e-4  # than by the whole batch
    for run in grouped.values():
        losses, _, last = train(run, 1)
        assert losses[0] == pytest.approx(float(expected), abs=1e-6)
        np.testing.assert_allclose(
            last["rest"]["norm"]["var"], np.mean(statistics, 0), rtol=1e-5
        )


def test_groups_do_not_depend_on_the_devices(grouped):
    (one, _, state), (eight, _, other) = (train(run) for run in grouped.values())
    np.testing.assert_allclose(eight, one, atol=1e-5)
    for path, leaf in by_path(state["params"]).items():
        np.testing.assert_allclose(by_path(other["params"])[path], leaf, atol=1e-5)


def test_groups_need_no_word_between_devices_in_the_forward_pass(grouped):
    whole = compiled(Normed(), direct(2), EIGHT)
    apart, together = (
        len(INSTRUCTION.findall(run.train_step.as_text()))
        for run in (grouped["8x1"], whole)
    )
    assert apart == 1 < together  # all sums are sent at the end
