"""General SNN: its parameters, its equations in numpy, its windows and its errors."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_general
from flax import nnx

from spikejax import LIF, MultiThreshold, losses
from spikejax.memory import stepper
from spikejax.models import MODELS, general
from spikejax.nn.windowed import mean, overlap, sine, straight_through, tile, whole
from spikejax.train import TrainConfig
from spikejax.train.checksum import by_path
from spikejax.train.recipe import make_optimizer
from spikejax.train.step import initial_state, make_train_step

SMALL = {"depths": (2, 1), "width": 1 / 12}  # channels 4 and 8, for 8x8 images


def half(x, rng):
    """A binarisation without chance."""
    return (x >= 0.5).astype(x.dtype)


def small(make=general.cnn, classes=10, **options):
    """A small network, whose head is not zero."""
    model = make(classes, rngs=nnx.Rngs(0), **SMALL | options)
    kernel = model.head.kernel
    kernel[...] = jax.random.normal(jax.random.key(1), kernel.shape)
    return model


def parts(model):
    """(params, rest) as plain dicts, and the model as a jitted function of them."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def call(params, rest, xs):
        return nnx.merge(graphdef, params, rest)(xs)

    return nnx.to_pure_dict(params), nnx.to_pure_dict(rest), call


def images(*shape):
    return jax.random.normal(jax.random.key(2), shape)


@pytest.mark.parametrize(
    ("make", "num_classes", "expected"),
    [
        (general.cnn, 100, 13_920_052),
        (general.lstm, 100, 14_960_116),
    ],
)
def test_parameters_for_cifar100_are_those_of_the_paper(make, num_classes, expected):
    model = nnx.eval_shape(lambda: make(num_classes, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == expected


@pytest.mark.parametrize(("make", "side"), [(general.cnn, 32), (general.lstm, 64)])
def test_logits_for_both_sizes(make, side):
    xs = jnp.zeros((2, 3, side, side, 3))
    logits = jax.eval_shape(lambda: make(7, width=0.25, rngs=nnx.Rngs(0))(xs))
    assert logits.shape == (2, 3, 7)


def test_blocks_take_both_windows_in_turn():
    model = nnx.eval_shape(lambda: general.cnn(100, rngs=nnx.Rngs(0)))
    mixers = [[block.mixer for block in blocks] for blocks in model.stages]
    windows = [[mixer.window for mixer in stage] for stage in mixers]
    assert windows == [[tile, overlap] * n for n in (1, 1, 3)] + [[tile, tile]]
    regions = [[mixer.region_threshold for mixer in stage] for stage in mixers]
    assert regions == [[None, 0.2] * n for n in (1, 1, 3)] + [[None, None]]
    assert mixers[0][0].network.projection is mean


def test_the_variant_follows_the_number_of_classes():
    def make(kind, classes):
        made = partial(MODELS[kind], classes, depths=(2, 1), width=1 / 12)
        return nnx.eval_shape(lambda: made(rngs=nnx.Rngs(0)))

    inner = make("general-cnn", 10).stages[0][1].mixer
    assert inner.network.projection is sine and inner.region_threshold is None
    inner = make("general-cnn", 100).stages[0][1].mixer
    assert inner.network.projection is mean and inner.region_threshold == 0.2
    assert make("general-lstm", 10).stages[0][1].mixer.window is overlap
    assert make("general-lstm", 11).stages[0][1].mixer.window is whole


@pytest.mark.parametrize(
    ("make", "classes", "project", "region"),
    [
        (general.cnn, 11, slow_general.mean, 0.2),
        (general.lstm, 10, slow_general.sine, None),
    ],
    ids=["cnn", "lstm"],
)
def test_equal_to_plain_numpy(make, classes, project, region):
    lively = partial(LIF, tau=1 / 0.6, v_threshold=0.5, decay_input=False)
    params, rest, call = parts(small(make, classes, binarise=half, neuron=lively))
    xs = images(2, 1, 8, 8, 3)
    logits = call(params, rest, xs)

    def binarise(windows):
        return [(x >= 0.5).astype(float) for x in windows]

    for b in range(2):
        expected = slow_general.network(
            np.float64(xs[b, 0]),
            jax.tree.map(np.float64, params),
            binarise,
            project,
            region,
        )
        np.testing.assert_allclose(logits[b, 0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [general.cnn, general.lstm])
def test_all_parameters_learn_and_the_step_compiles_once(make):
    several = partial(MultiThreshold, 2, v_threshold=0.1, learn_tau=True)
    model = small(make, binarise=straight_through, neuron=several, depths=(1, 1))
    model.train()
    config = TrainConfig(steps=3)
    optimizer = make_optimizer(config, 3)
    state = initial_state(model, optimizer, config)
    step = jax.jit(
        make_train_step(
            nnx.graphdef(model),
            losses.rate_cross_entropy,
            lambda images, rng: images[:, None],
            optimizer,
        )
    )
    batch = {"image": images(8, 8, 8, 3), "label": jnp.arange(8)}
    rest = [state["rest"]]
    for _ in range(2):
        state, metrics = step(state, batch)
        rest.append(state["rest"])
    assert step._cache_size() == 1
    norms = by_path(metrics["gradient_norms"])
    assert all(jnp.isfinite(norm) for norm in norms.values())
    # A window of the last stage is one pixel, a sequence without a second step.
    idle = {path for path in norms if re.match("stages/1/.*/recurrent/kernel", path)}
    assert {path for path, norm in norms.items() if norm == 0} == idle
    assert len(idle) == (2 if make is general.lstm else 0)
    counts = [jax.tree.leaves(r)[0].tolist() for r in rest]
    assert len(set(map(str, counts))) == 3  # each step draws anew


def test_time_steps_see_each_other_in_the_plain_network_only():
    xs = images(1, 3, 8, 8, 3)
    for make, apart in ((general.cnn, True), (general.plain, False)):
        params, rest, call = parts(small(make, binarise=half))
        whole_sequence, last = call(params, rest, xs), call(params, rest, xs[:, 2:])
        same = np.allclose(whole_sequence[:, 2:], last, atol=1e-4)
        assert same == apart


def test_with_relu_nothing_is_random_and_nothing_is_carried():
    model = small(general.lstm, neuron=lambda: nnx.relu)
    mixer = model.stages[0][1].mixer
    assert mixer.binarise is None and not mixer.network.carries
    assert len(model.carried_merges) == 0
    params, rest, call = parts(model)
    xs = images(2, 1, 8, 8, 3)
    logits = call(params, rest, xs)
    model.stages[0][0].mixer.rngs()
    np.testing.assert_array_equal(call(params, parts(model)[1], xs), logits)


def test_images_of_another_size_are_refused():
    model = nnx.eval_shape(lambda: general.cnn(10, rngs=nnx.Rngs(0)))
    match = (
        r"General: expected images .* multiples of 32, got shape \(1, 1, 48, 64, 3\)"
    )
    with pytest.raises(ValueError, match=match):
        model(jnp.zeros((1, 1, 48, 64, 3)))


@pytest.mark.parametrize("width", [0.0, -1.0, float("nan")])
def test_no_channels_are_refused(width):
    with pytest.raises(ValueError, match="General: expected a width that leaves chann"):
        general.cnn(10, width=width, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("make", [general.lstm, general.plain])
def test_time_steps_one_by_one_are_the_sequence(make):
    """Membranes of windows start anew in each step; those of ``plain`` last."""
    model = small(make, binarise=half, neuron=partial(LIF, v_threshold=0.2))
    xs = jax.random.uniform(jax.random.key(2), (2, 3, 8, 8, 3))
    whole, (state, step), parts = model(xs), stepper(model, xs), []
    assert bool(jax.tree.leaves(state)) == (make is general.plain)
    for t in range(3):
        state, ys = step(state, xs[:, t : t + 1])
        parts.append(ys)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-4, atol=1e-5)
