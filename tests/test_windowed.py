"""The windowed layer: windows, spikes, by hand, against numpy, and who sees whom."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_general
from flax import nnx

from spikejax import (
    ALIF,
    LIF,
    CubaLIF,
    MultiThreshold,
    RefractoryLIF,
    independent,
    surrogate,
)
from spikejax.nn.penalty import Penalised
from spikejax.nn.windowed import (
    Mixer,
    PersistentState,
    Stacked,
    bernoulli,
    conv_network,
    general_lif,
    lstm_network,
    mean,
    overlap,
    sine,
    split,
    stitch,
    straight_through,
    tile,
    whole,
)
from spikejax.train import sharding

KINDS = {"conv": conv_network, "lstm": lstm_network}


STEP = surrogate.rectangle()


def half(x, rng):
    """A binarisation without chance, with the gradient of clip(x, 0, 1)."""
    return STEP(x - 0.5)


def make(kind="conv", channels=3, *, neuron=general_lif, options=None, **more):
    rngs = nnx.Rngs(0)
    network = KINDS[kind](channels, neuron, rngs=rngs, **(options or {}))
    if kind == "lstm":  # or hardly a neuron would fire
        for direction in (network.layer.forwards, network.layer.backwards):
            for linear in (direction.inputs, direction.recurrent):
                linear.kernel[...] = linear.kernel[...] * 4
    return Mixer(channels, network, rngs=rngs, **{"binarise": half} | more)


def pure(layer):
    """(params, rest) as plain dicts, and the layer as a function of them."""
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def call(params, rest, *args):
        return nnx.merge(graphdef, params, rest)(*args)

    return nnx.to_pure_dict(params), nnx.to_pure_dict(rest), call


def maps(*shape):
    return jax.random.uniform(jax.random.key(1), shape)


def test_sine_and_mean_by_hand():
    assert float(sine(2.0, 0.0)) == pytest.approx(2)  # sin(pi/2)
    assert float(sine(1.0, 4 / 3)) == pytest.approx(2 * math.sin(math.pi / 8))
    assert float(sine(1e-3, 1e-3)) == pytest.approx(math.pi / 2 * 1e-3, rel=1e-5)
    assert float(sine(1.0, 2.0)) == pytest.approx(0, abs=1e-6)
    assert float(mean(1.0, 2.0)) == 1.5


def test_the_neuron_of_the_authors():
    neuron = general_lif()
    v, x = jnp.array([1.0, 1.0, 0.0]), jnp.array([0.05, 0.2, 2.0])
    np.testing.assert_allclose(neuron.charge(v, x), [0.45, 0.6, 2.0], rtol=1e-6)
    assert neuron.step(v, x)[1].tolist() == [0, 1, 1]
    slope = jax.grad(lambda x: neuron.step(jnp.zeros(4), x)[1].sum())
    assert slope(jnp.array([-0.1, 0.1, 0.9, 1.1])).tolist() == [0, 1, 1, 0]


# Windows

MAP = jax.random.normal(jax.random.key(0), (2, 1, 8, 12, 3))


def test_tiles_are_the_quarters_in_reading_order():
    parts = split(MAP, tile)
    assert parts.shape == (2, 1, 4, 4, 6, 3)
    corners = [MAP[:, :, y : y + 4, x : x + 6] for y in (0, 4) for x in (0, 6)]
    for g, corner in enumerate(corners):
        np.testing.assert_array_equal(parts[:, :, g], corner)


def test_overlapping_windows_share_half_the_side():
    parts = split(MAP, overlap)
    assert parts.shape == (2, 1, 4, 6, 9, 3)
    np.testing.assert_array_equal(parts[:, :, 3], MAP[:, :, 2:, 3:])
    np.testing.assert_array_equal(parts[:, :, 0, :, 3:], parts[:, :, 1, :, :6])


def test_the_whole_map_is_one_window():
    assert split(MAP, whole).shape == (2, 1, 1, 8, 12, 3)
    tall = split(MAP, lambda side: 8)  # all of one side, a part of the other
    assert tall.shape == (2, 1, 2, 8, 8, 3)


@pytest.mark.parametrize("window", [tile, overlap, whole])
def test_stitching_what_was_split_gives_it_back(window):
    np.testing.assert_array_equal(stitch(split(MAP, window), (8, 12), window), MAP)


def test_a_constant_map_stays_constant():
    for window in (tile, overlap, whole):
        parts = split(jnp.full((1, 1, 16, 16, 1), 0.7), window)
        np.testing.assert_array_equal(stitch(parts, (16, 16), window), np.float32(0.7))


def test_where_windows_overlap_stitching_is_their_mean():
    parts = jnp.arange(1.0, 5).reshape(1, 1, 4, 1, 1, 1) * jnp.ones((1, 1, 4, 3, 3, 1))
    rows = stitch(parts, (4, 4), overlap)[0, 0, :, :, 0]
    assert rows.tolist() == [
        [1.0, 1.5, 1.5, 2.0],
        [2.0, 2.5, 2.5, 3.0],
        [2.0, 2.5, 2.5, 3.0],
        [3.0, 3.5, 3.5, 4.0],
    ]


@pytest.mark.parametrize(
    ("window", "side", "length"),
    [
        (tile, 7, 3),
        (lambda _: 9, 8, 9),
        (lambda _: 3, 8, 3),
    ],
)
def test_windows_that_do_not_fit_are_refused(window, side, length):
    match = f"windows: expected windows from half the map to all of it, got {length} "
    with pytest.raises(ValueError, match=f"{match}for a map of side {side}. Take"):
        split(jnp.zeros((1, 1, side, side, 1)), window)


# Binarisation

KEY = jax.random.key(0)


def test_bernoulli_of_short_floats_fires_at_the_same_rate():
    dark = jnp.full((40_000,), 1 / 512, jnp.bfloat16)
    spikes = bernoulli(dark, KEY)
    assert spikes.dtype == jnp.bfloat16
    assert float(spikes.astype(jnp.float32).sum()) == pytest.approx(78, rel=0.35)


@pytest.mark.parametrize("binarise", [bernoulli, straight_through])
def test_bernoulli_fires_with_the_value_as_probability(binarise):
    x = jnp.broadcast_to(jnp.array([-1.0, 0.0, 0.3, 0.9, 1.0, 7.0]), (20_000, 6))
    z = binarise(x, KEY)
    assert set(np.unique(z)) == {0, 1}
    assert z[:, :2].max() == 0 and z[:, 4:].min() == 1
    np.testing.assert_allclose(z.mean(0)[2:4], [0.3, 0.9], atol=0.02)
    np.testing.assert_array_equal(z, bernoulli(x, KEY))
    assert not jnp.array_equal(z, binarise(x, jax.random.key(1)))


@pytest.mark.parametrize(
    ("binarise", "expected"),
    [
        (bernoulli, [0, 0, 0, 0]),
        (straight_through, [0, 2, 3, 0]),
    ],
)
def test_gradient_of_the_binarisation(binarise, expected):
    x = jnp.array([-0.5, 0.1, 0.9, 1.5])
    g = jax.grad(lambda x: (binarise(x, KEY) * jnp.arange(1.0, 5)).sum())(x)
    assert g.tolist() == expected


def test_the_same_draws_on_several_devices():
    mesh = sharding.data_mesh()
    x = jax.random.uniform(jax.random.key(1), (8, 1, 4, 4, 3))
    placed = sharding.shard_batch({"x": np.asarray(x)}, mesh)["x"]
    z = jax.jit(bernoulli)(placed, KEY)
    assert not z.sharding.is_fully_replicated or mesh.size == 1
    np.testing.assert_array_equal(z, bernoulli(x, KEY))


# By hand


def one_pixel(weights=(0.6, 0.45), neuron=general_lif, **options):
    """Windows of one pixel and one channel: m1 <- 0.4 m1 + 0.6 x, m2 <- ... + s1."""
    layer = make(channels=1, neuron=neuron, options={"projection": mean} | options)
    for conv, weight in zip(layer.network.layers, weights, strict=True):
        conv.kernel[...] = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(weight)
    layer.linear.kernel[...] = jnp.full((1, 1), 2.0)
    layer.linear.bias[...] = jnp.array([0.25])
    return layer


def test_one_block_by_hand():
    """x = 1, 0, 1, 1 in the windows; the projection is the mean.

    m1: 0.6, 0.24, 0.4*0.24 + 0.6 = 0.696, 0.4*0.696 + 0.6 = 0.8784;  s1 = 1, 0, 1, 1
    m2: 0.45;  0.4 (0.6 + 0.45)/2 = 0.21;  0.4 (0.24 + 0.21)/2 + 0.45 = 0.54
        0.4 (0.696 + 0.54)/2 + 0.45 = 0.6972;                          s2 = 0, 0, 1, 1
    """
    x = jnp.array([[1.0, 0.0], [1.0, 1.0]]).reshape(1, 1, 2, 2, 1)
    y, carried = one_pixel()(x)
    assert y[0, 0, :, :, 0].tolist() == [[0.25, 0.25], [2.25, 2.25]]
    assert carried is None


def test_a_spike_does_not_lower_the_carried_membrane():
    """m2 = 0.4 (m1 + 0.35)/2 + 0.35: 0.54 with m1 = 0.6; it would be 0.44 with 0.1."""
    x = jnp.array([[1.0, 1.0], [0.0, 0.0]]).reshape(1, 1, 2, 2, 1)
    assert one_pixel((0.6, 0.35))(x)[0][0, 0, 0, :, 0].tolist() == [0.25, 2.25]


def test_several_thresholds_fire_several_spikes():
    """m1 = 1.2 fires two spikes, m2 = 2 * 0.9 three."""
    several = partial(MultiThreshold, (0.5, 1.0, 1.5), tau=1 / 0.6, decay_input=False)
    x = jnp.array([[1.0, 0.0], [0.0, 0.0]]).reshape(1, 1, 2, 2, 1)
    y, _ = one_pixel((1.2, 0.9), several)(x)
    assert y[0, 0, 0, 0, 0] == 0.25 + 2 * 3


# Against numpy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("window", "projection", "region_threshold"),
    [(tile, sine, None), (overlap, mean, 0.5)],
)
def test_equal_to_plain_numpy(kind, window, projection, region_threshold):
    """With Bernoulli input, two blocks in a row, so that membranes are carried on."""
    layer = make(
        kind,
        binarise=bernoulli,
        window=window,
        region_threshold=region_threshold,
        options={"projection": projection},
    )
    params, rest, _ = pure(layer)

    @jax.jit
    def twice(xs):
        def noted(x, rng):
            drawn.append(jax.random.uniform(rng, x.shape, x.dtype))
            return bernoulli(x, rng)

        drawn = []
        same = nnx.merge(nnx.graphdef(layer), params, rest)
        same.binarise = noted
        ys, carried = same(xs)
        return ys, same(xs, carried)[0], carried, drawn

    xs = maps(2, 1, 8, 8, 3)
    ys, zs, carried, drawn = twice(xs)
    params = jax.tree.map(np.float64, params)
    read = partial(
        slow_general.mixer,
        p=params,
        size=window(8),
        project=getattr(slow_general, projection.__name__),
        region_threshold=region_threshold,
    )
    fired = 0
    for image in range(2):
        membranes = None
        for call, given in enumerate((ys, zs)):

            def binarise(parts, call=call, image=image):
                u = np.float64(drawn[call][image, 0])
                return [(p > u[g]).astype(float) for g, p in enumerate(parts)]

            x = np.float64(xs[image, 0])
            y, membranes = read(x, binarise=binarise, carried=membranes)
            np.testing.assert_allclose(given[image, 0], y, atol=2e-6)
            fired += np.abs(y - params["linear"]["bias"]).max() > 0
    assert fired == 4


# Who sees whom


def influence(layer, carried=None):
    """[i, j]: whether window i of the output has a gradient to window j of xs."""
    params, rest, call = pure(layer)

    @jax.jit
    def gradients(xs):
        def output(xs):
            ys = call(params, rest, xs, carried)[0]
            return (split(ys, tile) ** 2).sum((0, 1, 3, 4, 5))

        g = split(jax.jacrev(output)(xs), tile)
        return (g != 0).any((1, 2, 4, 5, 6))

    return gradients(maps(1, 1, 8, 8, 3)).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_windows_see_those_before_them_and_not_those_after(kind):
    carried = None if kind == "conv" else maps(1, 1, 8, 8, 6)
    assert influence(make(kind), carried) == np.tri(4, dtype=bool).tolist()


def test_without_membranes_only_the_second_lstm_window_sees_another():
    """F(0, b) = 0, so M[3] = 0 and M[4] = 0 of a first block let nothing in."""
    seen = np.eye(4, dtype=bool)
    seen[1, 0] = True
    assert influence(make("lstm")) == seen.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_relu_windows_do_not_see_each_other(kind):
    layer = make(kind, neuron=lambda: nnx.relu, binarise=None)
    assert influence(layer) == np.eye(4, dtype=bool).tolist()
    assert not layer.network.carries and layer(maps(1, 1, 4, 4, 3))[1] is None


@pytest.mark.parametrize("kind", KINDS)
def test_time_steps_do_not_see_each_other(kind):
    params, rest, call = pure(make(kind))
    call = jax.jit(call)
    xs = maps(2, 3, 4, 4, 3)
    ys, carried = call(params, rest, xs)
    y, one = call(params, rest, xs[:, 1:2])
    np.testing.assert_allclose(ys[:, 1:2], y, atol=1e-6)
    if carried is not None:
        np.testing.assert_allclose(carried[:, 1:2], one, atol=1e-6)


def test_the_whole_map_carries_its_membranes_as_they_are():
    """u' = 0.4 u + x: twice the same map adds two fifths."""
    params, rest, call = pure(make("lstm", window=whole))
    call = jax.jit(call)
    xs = maps(1, 1, 4, 6, 3)
    _, once = call(params, rest, xs, jnp.zeros((1, 1, 4, 6, 6)))
    _, twice = call(params, rest, xs, once)
    np.testing.assert_allclose(twice, 1.4 * once, rtol=1e-5)


@pytest.mark.parametrize("window", [whole, tile])
@pytest.mark.parametrize("kind", KINDS)
def test_maps_need_not_be_square(kind, window):
    layer, xs = make(kind, window=window), maps(2, 1, 4, 6, 3)
    ys, carried = layer(xs)
    assert ys.shape == xs.shape
    assert layer.network.carries == (carried is not None) == (kind == "lstm")
    assert carried is None or carried.shape == (2, 1, 4, 6, 6)


def test_without_a_projection_membranes_last_through_time():
    """u1 = 0.4, u2 = 0.4 * 0.4 + 0.4 = 0.56 fires at the second step."""
    layer = one_pixel((0.4, 0.6), projection=None)
    x = jnp.ones((1, 2, 2, 2, 1))
    assert layer(x)[0][0, :, 0, 0, 0].tolist() == [0.25, 2.25]


def test_convolutions_are_made_by_the_factory():
    conv = partial(nnx.Conv, use_bias=False)
    layers = conv_network(3, conv=conv, rngs=nnx.Rngs(0)).layers
    assert [layer.bias for layer in layers] == [None, None]


def test_the_last_weights_are_uniform_as_xavier_has_them():
    kernel = abs(make(channels=64).linear.kernel[...])
    assert 0.99 < kernel.max() / math.sqrt(6 / (64 + 64)) < 1


@pytest.mark.parametrize(
    ("kind", "neuron"),
    [
        ("conv", partial(MultiThreshold, 3, v_threshold=0.25, learn_tau=True)),
        ("conv", partial(MultiThreshold, 2, independent, v_threshold=0.25)),
        ("conv", partial(LIF, v_reset=0.0, v_threshold=0.25, learn_thresholds=True)),
        ("lstm", partial(MultiThreshold, 2, independent, v_threshold=0.25)),
    ],
)
def test_any_neuron_learns_inside(kind, neuron):
    layer = make(kind, neuron=neuron, window=overlap, binarise=straight_through)
    params, rest, call = pure(layer)
    xs = maps(2, 2, 4, 4, 3)

    @jax.jit
    def loss(params):
        ys, carried = call(params, rest, xs)
        return (call(params, rest, xs + ys, carried)[0] ** 2).sum()

    gradients = jax.tree.leaves(jax.grad(loss)(params))
    assert all(jnp.isfinite(g).all() and (g != 0).any() for g in gradients)


# Keys


def test_each_call_draws_and_each_layer_has_its_own_stream():
    rngs = nnx.Rngs(0)
    layers = [Mixer(3, conv_network(3, rngs=rngs), rngs=rngs) for _ in range(2)]
    keys = [layer.rngs() for layer in (*layers, *layers)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 4


def test_the_same_state_gives_the_same_spikes_also_in_evaluation():
    layer = make(binarise=bernoulli)
    layer.eval()
    graphdef = nnx.graphdef(layer)
    params, rest, call = pure(layer)
    xs = maps(1, 1, 8, 8, 3)
    ys = call(params, rest, xs)[0]
    assert jnp.array_equal(ys, call(params, rest, xs)[0])
    layer(xs)
    assert not jnp.array_equal(ys, layer(xs)[0])
    assert nnx.graphdef(layer) == graphdef  # so a jitted step compiles once


# Bad input


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda: make()(maps(1, 4, 4, 3)),
            r"Mixer: expected maps \[B, T, H, W, C\], got shape \(1, 4, 4, 3\)\. For",
        ),
        (
            lambda: make()(maps(1, 1, 5, 5, 3)),
            "windows: expected windows from half the map to all of it, got 2 for a map "
            "of side 5. Take images whose sides stay even in every stage",
        ),
        (
            lambda: make(window=lambda side: 8)(maps(1, 1, 4, 4, 3)),
            "got 8 for a map of side 4",
        ),
        (
            lambda: Stacked([nnx.relu] * 2, [nnx.relu], 3)(maps(1, 1, 4, 2, 2, 3)),
            r"zip\(\) argument 2 is shorter",
        ),
    ],
)
def test_bad_input(run, message):
    with pytest.raises(ValueError, match=message):
        run()


@pytest.mark.parametrize("neuron", [ALIF, CubaLIF, partial(RefractoryLIF, 1)])
def test_neurons_with_two_states_do_not_pass_them_on_between_windows(neuron):
    network = Stacked([lambda xs: xs], [neuron()], 1, projection=mean)
    with pytest.raises(ValueError, match="whose state is one membrane, .* got [ACR]"):
        network(jnp.ones((1, 1, 2, 1, 1, 1)))


def test_layers_that_hide_their_neurons_are_refused():
    neuron = Penalised(LIF(), lambda ys: ys.mean())
    for make in (
        lambda: Stacked([], [neuron], 1),
        lambda: PersistentState([], neuron, 1),
    ):
        with pytest.raises(ValueError, match="expected neurons, .* got Penalised"):
            make()


def test_a_region_threshold_keeps_the_counts_of_several_thresholds():
    """Behind the network a map of 0, 0.1, 1, 4: above 0.2 a count stays a count."""
    counts = jnp.array([0.0, 0.1, 1.0, 4.0]).reshape(1, 1, 2, 2, 1)
    network = conv_network(1, rngs=nnx.Rngs(0))
    options = {"window": whole, "binarise": None, "region_threshold": 0.2}
    mixer = Mixer(1, network, **options, rngs=nnx.Rngs(0))
    mixer.network = lambda xs, carried: (xs, carried)
    mixer.linear = lambda ys: ys
    np.testing.assert_array_equal(mixer(counts)[0], counts)
    halves = jnp.where(counts == 1, 0.5, counts)  # seen by one of two windows
    np.testing.assert_array_equal(mixer(halves)[0], counts)
