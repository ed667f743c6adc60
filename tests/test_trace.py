"""The tracer: ReLUs found by what they compute, all else reported with its place."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from spikejax.conversion import calibrate
from spikejax.conversion.relus import Relus
from spikejax.functions import Function, functional
from spikejax.trace import run, trace

ROWS = jax.random.normal(jax.random.key(0), (4, 1, 8))


def traced(f, x=ROWS):
    """The sites of f behind a weight."""
    return trace(lambda params, x: f(x * params["w"]), {"w": jnp.ones(())}, x, Relus())


@pytest.mark.parametrize(
    "f, cap",
    [
        (nnx.relu, np.inf),
        (jax.nn.relu, np.inf),
        (lambda x: jnp.maximum(x, 0), np.inf),
        (lambda x: jnp.maximum(0.0, x), np.inf),
        (lambda x: jax.lax.max(x, jnp.zeros_like(x)), np.inf),
        (jax.jit(lambda x: jnp.maximum(x, 0)), np.inf),
        (lambda x: jnp.clip(x, 0), np.inf),
        (jax.nn.relu6, 6),
        (lambda x: jnp.clip(x, 0, 2), 2),
        (lambda x: jnp.minimum(jnp.maximum(x, 0), 3), 3),
        (lambda x: jnp.maximum(jnp.minimum(x, 3), 0), None),
        (lambda x: jnp.clip(x, -1, 1), None),
        (lambda x: jnp.maximum(x, 1), None),
    ],
)
def test_a_relu_is_what_computes_one(f, cap):
    found = traced(f)
    if cap is None:
        assert not found.sites and found.others
        return
    (site,) = found.sites
    assert (site.name, site.cap, site.shape) == ("w", cap, ROWS.shape)
    assert site.where.startswith("test_trace.py") and not found.others


def test_a_call_that_prints_is_entered():
    @jax.jit
    def f(x):
        jax.debug.callback(lambda: None)
        return jnp.maximum(x, 0) + 1

    assert len(traced(f).sites) == 1


def test_the_maximum_of_a_variance_is_no_relu():
    assert not traced(lambda x: x - jnp.maximum(x.var(), 0)).sites


def test_a_function_computed_again_is_the_same_with_the_same_gradient():
    """Through jit, remat, a scan and functions with gradients of their own."""

    @jax.custom_vjp
    def double(x):
        return 2 * x

    double.defvjp(lambda x: (2 * x, None), lambda _, g: (3 * g,))

    def f(params, x):
        def body(x, w):
            return jax.checkpoint(lambda x: jax.jit(nnx.relu)(x @ w) + x)(x), x.sum()

        x, sums = jax.lax.scan(body, double(x), params["w"])
        return x.sum() + sums @ sums

    params = {"w": jax.random.normal(jax.random.key(1), (3, 8, 8)) / 3}
    found = trace(f, params, ROWS, Relus())
    assert [site.repeats for site in found.sites] == [(3,)]

    def again(params, x):
        handler = lambda n, site, values, given: (given * nnx.relu(values[0]), n)  # noqa: E731
        return run(found, params, x, handler, {0: jnp.ones(3)})[0]

    for g in (f, again):
        g.value = jax.jit(jax.value_and_grad(g, (0, 1)))(params, ROWS)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), f.value, again.value)


def test_what_a_handler_keeps_has_the_axis_of_the_scan():
    def f(params, x):
        return jax.lax.scan(lambda x, w: (nnx.relu(x * w), None), x, params)[0]

    found = trace(f, jnp.arange(1.0, 4.0), jnp.ones(2), Relus())
    handler = lambda n, site, values, given: (values[0] + given, values[0])  # noqa: E731
    given = {0: jnp.array([0.0, 10.0, 0.0])}
    y, kept = run(found, jnp.arange(1.0, 4.0), jnp.ones(2), handler, given)
    assert y.tolist() == [36, 36] and kept[0][:, 0].tolist() == [1, 2, 36]


def test_a_scan_that_is_walked_twice_keeps_the_sites_before_it():
    """What is known of its carry changes: at first it does not depend on the input."""

    def f(x):
        def step(carry, x):
            return nnx.relu(carry + x), None

        return jax.lax.scan(step, jnp.zeros(8), nnx.relu(x)[:, 0])[0]

    first, second = traced(f).sites
    assert (first.repeats, second.repeats) == ((), (4,))


def test_weights_that_a_function_closes_over_are_no_data():
    weights = jax.random.normal(jax.random.key(1), (8, 8))
    found = traced(lambda x: nnx.relu(x @ weights))
    assert len(found.sites) == 1 and not found.others


def test_a_module_as_a_function_returns_its_state():
    norm = nnx.BatchNorm(8, momentum=0.5, rngs=nnx.Rngs(0))
    f, params = functional(norm)
    ys, after = f(params, ROWS + 2)
    expected = 1 + ROWS.mean((0, 1)) / 2
    np.testing.assert_allclose(after["mean"], expected, atol=1e-5)
    assert (norm.mean[...] == 0).all()
    same = trace(f, params, ROWS, Relus()).same
    assert len(same) == 1 + len(params) and sum(same) == 2  # scale and bias


@pytest.mark.parametrize(
    "f, name",
    [
        (jnp.tanh, "tanh"),
        (nnx.gelu, "integer_pow"),
        (nnx.leaky_relu, "leaky_relu"),
        (nnx.silu, "silu"),
        (lambda x: x * x, "mul"),
        (nnx.softmax, "max"),
        (lambda x: jnp.maximum(x, 0.25 * x), "max"),
    ],
)
def test_what_is_neither_affine_nor_a_relu_is_an_error_with_its_place(f, name):
    model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), f, nnx.relu)
    with pytest.raises(ValueError, match=rf"calibrate: .* {name} at [a-z_]*.py:\d+"):
        calibrate(model, ROWS)


@pytest.mark.parametrize(
    ("f", "hint"),
    [
        (nnx.softmax, r"max at .* \(a softmax\? leave it out"),
        (nnx.gelu, r" \(an activation that has no spiking twin: train with ReLU\)"),
        (nnx.silu, r"silu at .* \(an activation that has no spiking twin"),
        (nnx.tanh, r"tanh at .* \(an activation that has no spiking twin"),
    ],
)
def test_what_to_do_about_it_is_said(f, hint):
    model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.relu, f)
    with pytest.raises(ValueError, match=hint):
        calibrate(model, ROWS)


def test_a_function_in_training_mode_is_named():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            norm = linen.BatchNorm(use_running_average=not train)
            return linen.relu(norm(linen.Dense(4)(x)))

    variables = Net().init(jax.random.key(0), ROWS[:, 0], False)
    training = partial(Net().apply, train=True, mutable=["batch_stats"])
    with pytest.raises(ValueError, match="return an array, got a tuple. In Linen"):
        calibrate(Function(training, variables), ROWS)

    def first(variables, x):
        return training(variables, x)[0]

    with pytest.raises(ValueError, match=r"\(statistics of the input: BatchNorm"):
        calibrate(Function(first, variables), ROWS)


def test_a_function_without_the_axis_of_time_is_given_what_it_was_given():
    function = Function(lambda w, x: x @ w, jnp.ones((8, 2)))
    with pytest.raises(TypeError) as info:
        function(ROWS[:, 0, :4])
    assert info.value.__notes__[-1].startswith(
        "Function: f was given (16,), of (4, 4) [B, T, ...]."
    )


def test_a_max_pool_of_stride_one_is_no_activation():
    pool = partial(nnx.max_pool, window_shape=(3, 3), padding="SAME")
    conv = nnx.Conv(1, 4, (3, 3), rngs=nnx.Rngs(0))
    ann, swaps = calibrate(
        nnx.Sequential(conv, nnx.relu, pool), ROWS.reshape(4, 1, 4, 2, 1)
    )
    assert len(swaps) == 1


def test_a_relu_in_a_loop_of_unknown_length_is_an_error():
    def f(params, x):
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: nnx.relu(x) / 2, x)

    with pytest.raises(ValueError, match=r"trace: expected relu at .*py.* of while"):
        calibrate(Function(f, jnp.ones(())), ROWS)
