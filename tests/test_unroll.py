"""Unroll: written out or in a loop, a sequence has one answer."""

import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spikejax import surrogate
from spikejax.layers import LIF
from spikejax.neurons import NeuronOptions, NeuronParams, Step, cascade, lif, parallel
from spikejax.unroll import unroll

# ``import spikejax.unroll as x`` would give the function: the package exports it.
MODULE = sys.modules["spikejax.unroll"]

pytestmark = pytest.mark.usefixtures("written_for_tpus")

# 1 to 4 steps are written out, more run in a loop.
LENGTHS = [1, 4, 5, 64, 123]


def adaptive(params, state, x):
    """A neuron whose spikes come back to inhibit it, and whose state is a dict."""
    current = x - state["trace"] / 8
    v, (z,) = lif(params, state["v"], current, NeuronOptions(decay_input=False))
    return {"v": v, "trace": 0.75 * state["trace"] + z}, z


step = jax.jit(adaptive)


@jax.jit
def step_backward(params, state, x, cotangent):
    return jax.vjp(adaptive, params, state, x)[1](cotangent)


def example(steps):
    params = NeuronParams(jnp.float32(0.4), (jnp.float32(0.9),))
    state = {"v": jnp.full((2, 3), 0.25), "trace": jnp.full((2, 3), 0.5)}
    xs, weights = jax.random.normal(jax.random.key(steps), (2, 2, steps, 3))
    return params, state, xs + 0.5, weights


def weighted_sum(params, state, xs, weights, unroll=unroll):
    last, spikes = unroll(adaptive, params, state, xs)
    loss = (weights * spikes).sum() + last["v"].sum() + 2 * last["trace"].sum()
    return loss, (last, spikes)


def by_loop(params, state, xs, weights):
    """Weighted_sum's gradients and outputs, one step after the other and back again."""
    xs, weights = np.asarray(xs), np.asarray(weights)
    states, spikes = [state], []
    for t in range(xs.shape[1]):
        state, z = step(params, states[-1], xs[:, t])
        states.append(state)
        spikes.append(z)
    cotangent = {"v": np.ones((2, 3), "f"), "trace": np.full((2, 3), 2, "f")}
    d_params, d_xs = jax.tree.map(np.zeros_like, params), []
    for t in reversed(range(xs.shape[1])):
        d_one, cotangent, d_x = step_backward(
            params, states[t], xs[:, t], (cotangent, weights[:, t])
        )
        d_params = jax.tree.map(np.add, d_params, d_one)
        d_xs.append(d_x)
    gradients = (d_params, cotangent, np.stack(d_xs[::-1], 1))
    return gradients, (states[-1], np.stack(spikes, 1))


def assert_close(one, other):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5), one, other)


@pytest.mark.parametrize("steps", LENGTHS)
def test_equals_a_python_loop_in_value_and_gradient(steps):
    inputs = example(steps)
    gradients = jax.jit(jax.grad(weighted_sum, (0, 1, 2), has_aux=True))(*inputs)
    loop = by_loop(*inputs)
    np.testing.assert_array_equal(gradients[1][1], loop[1][1])
    assert gradients[1][1].shape == (2, steps, 3)
    assert 0 < loop[1][1].mean() < 1 or steps == 1
    assert_close(gradients, loop)


@pytest.mark.parametrize("steps", [1, 12])
def test_both_paths_give_one_answer(steps, monkeypatch):
    inputs = example(steps)
    answers = []
    for unrolled in (99, 0):
        monkeypatch.setattr(MODULE, "UNROLLED", unrolled)
        # A new function each time, or jit would not look at the limit again.
        function = jax.grad(partial(weighted_sum), (0, 1, 2), has_aux=True)
        answers.append(jax.jit(function)(*inputs))
    assert_close(*answers)
    # The steps that a TPU writes out under the loop's own gradient.
    on_tpu = lambda written, loop, given: written(*given)  # noqa: E731
    monkeypatch.setattr(MODULE, "_by_platform", on_tpu)
    function = jax.jit(jax.grad(partial(weighted_sum), (0, 1, 2), has_aux=True))
    assert " while(" not in function.lower(*inputs).as_text("hlo")
    assert_close(function(*inputs), answers[0])


@pytest.mark.parametrize("steps, written", [(5, True), (16, True), (17, False)])
def test_up_to_16_steps_are_written_out_on_a_tpu(steps, written):
    def program(platform):
        function = jax.jit(jax.grad(weighted_sum, has_aux=True))
        lowered = function.trace(*example(steps)).lower(lowering_platforms=(platform,))
        return lowered.as_text()

    assert "stablehlo.while" in program("cpu")
    assert ("stablehlo.while" in program("tpu")) != written


@pytest.mark.parametrize("steps, cut", [(4, 1), (7, 5), (67, 3), (70, 66)])
def test_a_sequence_cut_in_two_goes_on_from_the_state_handed_over(steps, cut):
    params, state, xs, _ = example(steps)
    run = jax.jit(partial(unroll, adaptive))
    last, spikes = run(params, state, xs)
    middle, early = run(params, state, xs[:, :cut])
    end, late = run(params, middle, xs[:, cut:])
    np.testing.assert_array_equal(spikes, jnp.concatenate([early, late], 1))
    assert_close(last, end)


@pytest.mark.parametrize("steps", [3, 20, 67])
def test_gradient_reaches_the_past_and_not_the_future(steps):
    params, state, xs, _ = example(steps)
    seen = 2 * steps // 3

    @jax.jit
    @jax.grad
    def gradient(xs):
        return unroll(adaptive, params, state, xs)[1][:, :seen].sum()

    dx = gradient(xs)
    assert jnp.all(dx[:, :seen] != 0) and jnp.all(dx[:, seen:] == 0)


@pytest.mark.parametrize("steps", [2, 6, 67])
def test_axes_after_time_and_types_are_kept(steps):
    def cell(params, v, x):
        return v + x.astype(jnp.float32), x * 2

    xs = jnp.arange(2 * steps * 12, dtype=jnp.bfloat16).reshape(2, steps, 3, 4, 1) % 8
    last, out = unroll(cell, None, jnp.zeros((2, 3, 4, 1)), xs)
    assert out.dtype == jnp.bfloat16 and last.dtype == jnp.float32
    np.testing.assert_array_equal(out, 2 * xs)
    np.testing.assert_array_equal(last, np.asarray(xs, "f").sum(1))


@pytest.mark.parametrize("steps, most", [(4, 4), (5, 1), (63, 1), (67, 1)])
def test_a_long_sequence_traces_its_cell_once(steps, most):
    traced = []

    def cell(params, v, x):
        traced.append(x.shape)
        v, (z,) = lif(params, v, x)
        return v, z

    jax.eval_shape(
        partial(unroll, cell, NeuronParams()), jnp.zeros(3), jnp.zeros((3, steps))
    )
    assert len(traced) <= most and set(traced) == {(3,)}


def temporary_bytes(repeat, cell, steps):
    """Scratch memory of the compiled gradient over so many steps."""

    def loss(params, xs):
        return sum(z.sum() for z in repeat(cell, params, jnp.zeros((8, 64)), xs)[1])

    params = NeuronParams(jnp.float32(0.5), (1.0, 0.5))
    inputs = params, jax.ShapeDtypeStruct((8, steps, 64), jnp.float32)
    return jax.jit(jax.grad(loss)).lower(*inputs).compile().memory_analysis()


def scan(cell, params, state, xs):
    """What unroll does for fewer steps, with every step's residuals kept."""
    xs = jnp.moveaxis(xs, 1, 0)
    return jax.lax.scan(lambda v, x: cell(params, v, x), state, xs)


def test_a_loop_needs_less_memory_than_a_plain_scan():
    plain = temporary_bytes(scan, cascade, 256).temp_size_in_bytes
    loop = temporary_bytes(unroll, cascade, 256).temp_size_in_bytes
    assert 0 < loop < plain / 2


def test_a_membrane_needs_no_memory_beside_the_arrays_that_go_in_and_out():
    step, params = Step(cascade, NeuronOptions()), NeuronParams(0.5, (1.0, 0.5))

    def gradient(xs, d_ys):
        start = jnp.zeros((8, 64))
        run = partial(unroll, step, (params, None), start)
        ys, pull = jax.vjp(lambda xs: run(xs)[1], xs)
        return ys, pull(d_ys)

    xs = jax.ShapeDtypeStruct((8, 256, 64), jnp.float32)
    memory = jax.jit(gradient).lower(xs, xs).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * xs.size * 4


SURROGATES = [
    *(surrogate.atan(), surrogate.sigmoid(), surrogate.triangle(), surrogate.erf()),
    *(surrogate.rectangle(), surrogate.fast_sigmoid()),
    *(surrogate.piecewise_exponential(), surrogate.Surrogate(jnp.cos)),
]


def by_hand(params, options, v, xs, d_last, d_ys):
    """Outputs, last membrane and gradients of parallel thresholds, in closed form."""
    leak, theta, rest = params.leak, params.thresholds, options.v_reset or 0.0
    hard = options.v_reset is not None
    a = np.diff(theta, axis=0, prepend=0)
    vs, us, zs, ys = [v], [], [], []
    for x in np.moveaxis(xs, 1, 0):
        above = vs[-1] - rest
        charged = (x - above) * leak if options.decay_input else x - above * leak
        us.append(vs[-1] + charged)
        zs.append((us[-1] >= theta[:, None]).astype(float))
        ys.append((a[:, None] / a[0] * zs[-1]).sum(0))
        soft = us[-1] - (a[:, None] * zs[-1]).sum(0)
        vs.append(np.where(zs[-1][0], rest, us[-1]) if hard else soft)
    d_v, d_xs, d_leak, d_theta = d_last, [], 0, np.zeros_like(theta)
    for t in reversed(range(xs.shape[1])):
        u, z, d_y = us[t], zs[t], d_ys[:, t]
        d_z = a[:, None] / a[0] * d_y
        d_a = (z * d_y / a[0]).sum(1)
        d_a[0] = -(a[1:, None] * z[1:] * d_y).sum((0, 1)) / a[0] ** 2
        if not options.detach_reset and hard:
            d_z[0] += (rest - u) * d_v
        elif not options.detach_reset:
            d_z -= a[:, None] * d_v
            d_a -= (z * d_v).sum(1)
        width = (options.surrogate.alpha,) if options.surrogate.alpha else ()
        slope = d_z * np.asarray(
            options.surrogate.derivative(jnp.asarray(u - theta[:, None]), *width)
        )
        d_u = slope.sum(0) + d_v * (1 - z[0] if hard else 1)
        d_theta += d_a - np.append(d_a[1:], 0 * d_a[:1], 0) - slope.sum(1)
        above = vs[t] - rest
        d_leak = d_leak + (
            d_u * ((xs[:, t] if options.decay_input else 0) - above)
        ).sum(0)
        d_xs.append(d_u * (leak if options.decay_input else 1))
        d_v = d_u * (1 - leak)
    gradients = NeuronParams(d_leak, d_theta), d_v, np.stack(d_xs[::-1], 1)
    return (vs[-1], np.stack(ys, 1)), gradients


@pytest.mark.parametrize("case", range(8))
def test_gradients_of_membranes_equal_the_closed_form(case):
    """In float64, for each surrogate and each choice of the options."""
    hard, detach, decay = case & 1, case & 2, case & 4
    chosen = (0.1 if hard else None), bool(decay), bool(detach), SURROGATES[case]
    options, rng = NeuronOptions(*chosen), np.random.default_rng(case)
    theta = np.cumsum(rng.uniform(0.3, 0.6, (3, 4)), 0)
    params = NeuronParams(rng.uniform(0.1, 0.9, 4), theta)
    xs, d_ys = rng.normal(1, 2, (2, 2, 9, 4))
    v, d_last = rng.normal(0, 1, (2, 2, 4))
    jax.config.update("jax_enable_x64", True)
    try:

        @jax.jit
        def pull(params, v, xs, cotangents):
            step = Step(parallel, options)
            outs, pull = jax.vjp(
                lambda params, *given: unroll(step, (params, None), *given),
                *(params, v, xs),
            )
            return outs, pull(cotangents)

        outs, gradients = pull(params, v, xs, (d_last, d_ys))
        expected = by_hand(params, options, v, xs, d_last, d_ys)
    finally:
        jax.config.update("jax_enable_x64", False)
    assert 0.2 < (expected[0][1] > 0).mean() < 0.9
    np.testing.assert_array_equal(outs[1], expected[0][1])
    close = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
    jax.tree.map(close, (outs, gradients), expected)


@pytest.mark.parametrize(
    "step, params",
    [
        (Step(lif, NeuronOptions(v_reset=0.0)), NeuronParams(0.4, (0.9,))),
        (Step(cascade, NeuronOptions(), "", True), NeuronParams(0.4, (1.0, 0.5))),
        (
            Step(parallel, NeuronOptions(decay_input=False)),
            NeuronParams(0.3, (0.5, 1.0, -0.5), (0.5, 0.5, -0.5)),
        ),
    ],
)
def test_membranes_have_one_answer_in_both_loops(step, params, monkeypatch):
    params, xs = (params, jnp.float32(1.5)), 2 * example(9)[2]
    start = jnp.full((2, 3), 0.25)

    @partial(jax.jit, static_argnums=0)
    def both(cell, params, start, xs):
        def loss(*given):
            last, ys = unroll(cell, *given)
            weights = jnp.cos(jnp.arange(ys.size)).reshape(ys.shape)
            return (weights * ys).sum() + jnp.sin(last).sum(), ys

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(params, start, xs)

    (_, ys), gradients = both(step, params, start, xs)
    (_, expected), other = both(lambda *given: step(*given), params, start, xs)
    np.testing.assert_array_equal(ys, expected)
    assert jnp.abs(ys).mean() > 0
    assert_close(gradients, other)
    if step.cell is lif:  # and as a TPU runs them
        on_tpu = lambda written, loop, given: written(*given)  # noqa: E731
        monkeypatch.setattr(MODULE, "_by_platform", on_tpu)
        again = both(step._replace(name="tpu"), params, start, xs)
        assert_close(again[1], gradients)


def test_gradients_of_gradients_go_through_the_loop_of_a_membrane():
    step, xs = Step(lif, NeuronOptions()), 2 * example(7)[2]

    def norm(cell, leak):
        def loss(xs):
            params = NeuronParams(leak, (0.8,)), None
            return unroll(cell, params, jnp.zeros((2, 3)), xs)[1].sum()

        return (jax.grad(loss)(xs) ** 2).sum()

    second = jax.jit(jax.grad(norm, 1), static_argnums=0)
    ours, other = (second(f, 0.4) for f in (step, lambda *given: step(*given)))
    assert other != 0
    np.testing.assert_allclose(ours, other, rtol=1e-4)


@pytest.mark.parametrize("steps", [2, 6])
def test_several_sequences_in_and_out(steps):
    def cell(params, state, x):
        return state + x["a"], {"sum": state + x["b"], "b": x["b"]}

    a = jnp.arange(2.0 * steps).reshape(2, steps)
    last, ys = unroll(cell, None, jnp.zeros(2), {"a": a, "b": -a})
    np.testing.assert_array_equal(last, a.sum(1))
    np.testing.assert_array_equal(ys["b"], -a)
    np.testing.assert_array_equal(ys["sum"], jnp.cumsum(a, 1) - 2 * a)


def test_eager_calls_of_a_layer_compile_once():
    layer, xs = LIF(), jnp.ones((2, 7, 3))
    layer(xs)
    compiled = MODULE.unroll_compiled._cache_size()
    for _ in range(3):
        layer(xs)
    LIF()(xs)  # an equal layer
    assert MODULE.unroll_compiled._cache_size() == compiled


@pytest.mark.parametrize("shape", [(3,), (2, 0, 3)])
def test_a_sequence_has_a_time_axis_with_steps(shape):
    message = f"unroll: expected xs [B, T, ...] with T >= 1, got shape {shape}. For one"
    with pytest.raises(ValueError, match=re.escape(message)):
        unroll(lif, NeuronParams(), jnp.zeros(3), jnp.zeros(shape))


@pytest.mark.parametrize("steps", [3, 6])
def test_masks_and_counts_beside_the_currents_have_no_gradient(steps):
    def step(state, x):
        value, mask, count = x
        state = 0.5 * state + jnp.where(mask, value, 0) * count
        return state, state

    key = jax.random.key(0)
    values = jax.random.normal(key, (2, steps, 3))
    more = jax.random.bernoulli(key, 0.5, values.shape), jnp.full(values.shape, 2)

    def total(values):
        return unroll(
            lambda _, state, x: step(state, x), (), jnp.zeros((2, 3)), (values, *more)
        )[1].sum()

    weights = 2 - 0.5 ** jnp.arange(steps - 1.0, -1, -1)  # of what is seen for k steps
    expected = 2 * more[0] * weights[:, None]
    np.testing.assert_allclose(jax.grad(total)(values), expected, rtol=1e-6)
