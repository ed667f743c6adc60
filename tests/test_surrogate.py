"""Surrogates: the Heaviside step forward, a known derivative backward."""

import copy
import inspect
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spikejax import LIF, surrogate


def _erf(x):
    return np.vectorize(math.erf)(x)


# name -> the smooth function S(x, a) whose derivative stands in for that of H
PRIMITIVES = {
    "atan": lambda x, a: np.arctan(np.pi / 2 * a * x) / np.pi,
    "sigmoid": lambda x, a: np.tanh(a * x / 2) / 2,
    "triangle": lambda x, a: (
        np.sign(x) * (1 - np.maximum(0, 1 - a * np.abs(x)) ** 2) / 2
    ),
    "rectangle": lambda x, a: np.clip(a * x, -0.5, 0.5),
    "fast_sigmoid": lambda x, a: x / (1 + a * np.abs(x)),
    "piecewise_exponential": lambda x, a: np.sign(x) * (1 - np.exp(-a * np.abs(x))) / 2,
    "erf": lambda x, a: _erf(a * x) / 2,
}

# name -> (x, S'(x) for alpha = 2), worked by hand
BY_HAND = {
    "atan": [(0.0, 1.0), (1 / math.pi, 0.5), (-1 / math.pi, 0.5)],
    "sigmoid": [(0.0, 0.5), (0.5, 2 * math.e / (1 + math.e) ** 2)],
    "triangle": [(0.0, 2.0), (0.25, 1.0), (-0.375, 0.5), (0.5, 0.0), (3.0, 0.0)],
    "rectangle": [(0.0, 2.0), (0.24, 2.0), (-0.24, 2.0), (0.25, 0.0), (-0.25, 0.0)],
    "fast_sigmoid": [(0.0, 1.0), (0.5, 0.25), (-1.5, 0.0625)],
    "piecewise_exponential": [(0.0, 1.0), (0.5, 1 / math.e), (-1.0, math.exp(-2))],
    "erf": [(0.0, 2 / math.sqrt(math.pi)), (0.5, 2 / math.sqrt(math.pi) / math.e)],
}

DEFAULTS = {"atan": 2, "sigmoid": 4, "triangle": 1, "rectangle": 1, "fast_sigmoid": 10}
DEFAULTS |= {"piecewise_exponential": 1, "erf": 2}

every_surrogate = pytest.mark.parametrize("name", PRIMITIVES)


def derivative(spike, x):
    return jax.grad(lambda x: spike(x).sum())(x)


def test_the_tables_here_hold_every_surrogate_there_is():
    public = {
        name
        for name, function in inspect.getmembers(surrogate, inspect.isfunction)
        if "alpha" in inspect.signature(function).parameters and name[0] != "_"
    }
    assert public == set(PRIMITIVES) == set(BY_HAND) == set(DEFAULTS)


@every_surrogate
def test_forward_is_the_heaviside_step_which_is_one_at_zero(name):
    spike = getattr(surrogate, name)()
    x = jnp.array([-jnp.inf, -1.0, -1e-30, -0.0, 0.0, 1e-30, 1.0, jnp.inf])
    assert spike(x).tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


@every_surrogate
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_type_and_shape_are_kept_forward_and_backward(name, dtype):
    spike = getattr(surrogate, name)()
    x = jnp.linspace(-1, 1, 6, dtype=dtype).reshape(2, 3)
    z, backward = jax.vjp(spike, x)
    (gradient,) = backward(jnp.ones_like(z))
    assert z.dtype == gradient.dtype == x.dtype
    assert z.shape == gradient.shape == x.shape


@every_surrogate
def test_gradient_equals_the_values_worked_by_hand(name):
    x, expected = np.array(BY_HAND[name]).T
    gradient = derivative(getattr(surrogate, name)(2.0), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


@every_surrogate
@pytest.mark.parametrize("alpha", [0.7, 3.0])
def test_gradient_equals_the_finite_difference_of_the_smooth_function(name, alpha):
    # No point is nearer than the step h to a kink at 0, 1 / (2 alpha) or 1 / alpha.
    x, h = np.linspace(-2.011, 2.017, 60), 1e-6
    smooth = PRIMITIVES[name]
    difference = (smooth(x + h, alpha) - smooth(x - h, alpha)) / (2 * h)
    gradient = derivative(getattr(surrogate, name)(alpha), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(gradient, difference, rtol=1e-4, atol=1e-5)


@every_surrogate
@pytest.mark.parametrize("alpha", [1.0, 5.0])
def test_the_derivative_has_integral_one(name, alpha):
    # Over x = tan(p), so that the whole line is in it.
    p = np.linspace(-np.pi / 2, np.pi / 2, 20_001)[1:-1]
    height = derivative(
        getattr(surrogate, name)(alpha), jnp.asarray(np.tan(p), jnp.float32)
    )
    integral = np.sum(np.asarray(height, np.float64) / np.cos(p) ** 2) * (p[1] - p[0])
    expected = 2 / alpha if name == "fast_sigmoid" else 1.0
    assert integral == pytest.approx(expected, rel=2e-3)


@every_surrogate
def test_gradient_is_finite_far_from_the_threshold(name):
    spike = getattr(surrogate, name)()
    gradient = derivative(spike, jnp.array([-jnp.inf, -1e30, -1e4, 1e4, 1e30, jnp.inf]))
    assert jnp.all(gradient >= 0) and jnp.all(gradient < 1e-3)


@every_surrogate
def test_the_same_alpha_gives_the_same_function(name):
    build = getattr(surrogate, name)
    assert build(3.0) == build(alpha=3.0) == build(3)
    assert hash(build(3.0)) == hash(build(3))
    assert build() == build(DEFAULTS[name])
    assert build(3.0) != build(3.5)
    assert pickle.loads(pickle.dumps(build(3.0))) == copy.deepcopy(build(3)) == build(3)


def test_jit_compiles_once_for_surrogates_built_twice():
    traced = []

    def step(x, spike):
        traced.append(spike)
        return spike(x)

    jitted = jax.jit(step, static_argnames="spike")
    jitted(jnp.ones(3), spike=surrogate.atan(2.0))
    jitted(jnp.ones(3), spike=surrogate.atan(alpha=2.0))
    assert len(traced) == 1
    jitted(jnp.ones(3), spike=surrogate.sigmoid(2.0))
    assert len(traced) == 2


def test_gradient_obeys_the_chain_rule_under_jit_and_vmap():
    spike = surrogate.triangle(1.0)

    def loss(w, x):
        return 3 * spike(w * x)

    x = jnp.array([0.5, -0.25, 2.0])
    gradient = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(1.0, x)
    np.testing.assert_allclose(gradient, 3 * x * jnp.array([0.5, 0.75, 0.0]))


def test_surrogate_takes_a_derivative_of_your_own():
    spike = surrogate.Surrogate(lambda x: jnp.where(x < 0, 2, jnp.float32(5)))
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.array([-1.0, 0.0, 1.0], dtype)
        assert spike(x).tolist() == [0, 1, 1]
        gradient = derivative(spike, x)
        assert gradient.dtype == dtype and gradient.tolist() == [2, 5, 5]


@pytest.mark.parametrize("alpha", [0, -1.0, math.nan])
@every_surrogate
def test_alpha_must_be_positive(name, alpha):
    with pytest.raises(
        ValueError, match=f"finite alpha > 0, got .* and {float(alpha)}"
    ):
        getattr(surrogate, name)(alpha)


@pytest.mark.parametrize(
    "wrong",
    [lambda x: jnp.exp(-(x**2)), surrogate.atan, "atan"],
    ids=["a derivative", "not built", "a name"],
)
def test_what_does_not_fire_like_a_neuron_is_an_error(wrong):
    message = "LIF: expected a surrogate such as surrogate.ATAN or surrogate.Surrogate"
    with pytest.raises(ValueError, match=message):
        LIF(surrogate=wrong)


@every_surrogate
def test_gradients_of_gradients_are_those_of_the_derivative(name):
    """Reverse over reverse: d/dx of w H(x)^2 is 2 w H H', and again by the chain."""
    spike = getattr(surrogate, name)()
    x = jnp.array([0.05, 0.1, -0.07])  # no kinks here

    def height(x):
        return jax.grad(lambda x: spike(x).sum())(x)

    def slope(x):
        return jax.grad(lambda x: height(x).sum())(x)

    h = 1e-3
    expected = (height(x + h) - height(x - h)) / (2 * h)
    np.testing.assert_allclose(slope(x), expected, rtol=2e-2, atol=1e-3)
