"""Losses against closed forms and against optax."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spikejax import losses

LOGITS = jax.random.normal(jax.random.key(0), (4, 3, 5))
LABELS = jnp.array([0, 4, 2, 2])
ALL = [losses.rate_cross_entropy, losses.max_cross_entropy]
ALL += [losses.tet, losses.rate_mse]
LENGTHS = jnp.array([3, 1, 2, 3])


def test_rate_cross_entropy_of_equal_logits_is_log_of_the_classes():
    loss = losses.rate_cross_entropy(jnp.full((2, 3, 5), 7.0), LABELS[:2])
    np.testing.assert_allclose(loss, [math.log(5)] * 2, rtol=1e-6)


def test_rate_cross_entropy_by_hand():
    logits = jnp.array([[[2.0, 0.0], [0.0, 0.0]]])  # mean (1, 0)
    for label, expected in ((0, math.log1p(math.exp(-1))), (1, math.log1p(math.e))):
        loss = losses.rate_cross_entropy(logits, jnp.array([label]))
        np.testing.assert_allclose(loss, [expected], rtol=1e-6)


def test_rate_cross_entropy_is_that_of_the_mean_and_not_the_mean():
    expected = optax.softmax_cross_entropy_with_integer_labels(LOGITS.mean(1), LABELS)
    loss = losses.rate_cross_entropy(LOGITS, LABELS)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    tet = losses.tet(LOGITS, LABELS, weight=0.0)
    assert jnp.all(tet > loss)  # Jensen


def test_gradient_of_rate_cross_entropy_is_softmax_minus_target():
    gradient = jax.grad(lambda x: losses.rate_cross_entropy(x, LABELS).sum())(LOGITS)
    expected = jax.nn.softmax(LOGITS.mean(1)) - jax.nn.one_hot(LABELS, 5)
    for t in range(3):  # each step has a third of the mean
        np.testing.assert_allclose(gradient[:, t], expected / 3, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_label_smoothing_spreads_a_part_over_all_classes(smoothing):
    targets = (1 - smoothing) * jax.nn.one_hot(LABELS, 5) + smoothing / 5
    rate = losses.rate_cross_entropy(LOGITS, LABELS, label_smoothing=smoothing)
    expected = optax.softmax_cross_entropy(LOGITS.mean(1), targets)
    np.testing.assert_allclose(rate, expected, rtol=1e-6)
    tet = losses.tet(LOGITS, LABELS, label_smoothing=smoothing, weight=0.0)
    steps = [optax.softmax_cross_entropy(LOGITS[:, t], targets) for t in range(3)]
    np.testing.assert_allclose(tet, sum(steps) / 3, rtol=1e-6)


def test_tet_draws_logits_to_the_target():
    for options, target in (({"target": 2.0}, 2.0), ({}, 1.0)):
        loss = losses.tet(LOGITS, LABELS, weight=1.0, **options)
        expected = np.mean((np.asarray(LOGITS) - target) ** 2, (1, 2))
        np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_tet_weighs_its_parts():
    parts = [losses.tet(LOGITS, LABELS, weight=w) for w in (0.0, 1.0, 0.25)]
    np.testing.assert_allclose(0.75 * parts[0] + 0.25 * parts[1], parts[2], rtol=1e-6)
    default = losses.tet(LOGITS, LABELS)
    np.testing.assert_allclose(default, 0.999 * parts[0] + 0.001 * parts[1], rtol=1e-6)


def test_tet_of_one_step_is_the_rate_loss():
    once = LOGITS[:, :1]
    tet = losses.tet(once, LABELS, weight=0.0)
    np.testing.assert_allclose(tet, losses.rate_cross_entropy(once, LABELS), rtol=1e-6)


def test_rate_mse_by_hand():
    logits = jnp.array([[[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]])  # rates 1, 1/2, 0
    for label, expected in ((0, 0.25 / 3), (1, 1.25 / 3), (2, 2.25 / 3)):
        loss = losses.rate_mse(logits, jnp.array([label]))
        np.testing.assert_allclose(loss, [expected], rtol=1e-6)


@pytest.mark.parametrize("loss", ALL)
def test_losses_are_float32_one_an_example_and_the_same_in_jit(loss):
    short = LOGITS.astype(jnp.bfloat16)
    value = loss(short, LABELS)
    assert value.shape == (4,) and value.dtype == jnp.float32
    np.testing.assert_array_equal(value, loss(short.astype(jnp.float32), LABELS))
    np.testing.assert_allclose(
        jax.jit(loss)(LOGITS, LABELS), loss(LOGITS, LABELS), rtol=1e-6
    )


@pytest.mark.parametrize("loss", ALL)
def test_losses_fall_where_the_right_logit_rises_to_one(loss):
    logits = jnp.zeros((1, 2, 5))
    values = [
        float(loss(logits.at[:, :, 3].set(v), jnp.array([3]))[0]) for v in (0, 0.5, 1)
    ]
    assert values[0] > values[1] > values[2]


@pytest.mark.parametrize("loss", ALL)
def test_logits_without_time_are_an_error(loss):
    message = (
        rf"{loss.__name__}: expected logits \[B, T, K\] and labels \[B\] or \[B, K\], "
        r"got \(4, 5\) and \(4,\), int32\. .*logits\[:, None\]"
    )
    with pytest.raises(ValueError, match=message):
        loss(LOGITS[:, 0], LABELS)


@pytest.mark.parametrize("loss", ALL)
def test_labels_of_another_batch_are_an_error(loss):
    with pytest.raises(ValueError, match=r"got \(4, 3, 5\) and \(3,\)"):
        loss(LOGITS, LABELS[:3])


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize(
    "labels", [LABELS * 1.0, jnp.ones((4, 6)), jnp.ones((4, 5), int), jnp.ones((3, 5))]
)
def test_labels_that_are_neither_numbers_nor_probabilities(loss, labels):
    message = r"got \(4, 3, 5\) and \(.*\), .*\. Labels are class numbers \[B\]"
    with pytest.raises(ValueError, match=message):
        loss(LOGITS, labels)


@pytest.mark.parametrize("loss", ALL)
def test_probabilities_of_one_class_are_its_number(loss):
    hard = loss(LOGITS, LABELS)
    np.testing.assert_allclose(loss(LOGITS, jax.nn.one_hot(LABELS, 5)), hard, rtol=1e-6)


def test_the_cross_entropy_of_mixed_labels_is_the_mix_of_both():
    """It is linear in the labels; the squared error is not."""
    first, second = (jax.nn.one_hot(x, 5) for x in (LABELS, (LABELS + 1) % 5))
    for loss in (losses.rate_cross_entropy, losses.tet):
        options = {"label_smoothing": 0.1}
        parts = [loss(LOGITS, x, **options) for x in (first, second)]
        mixed = loss(LOGITS, 0.3 * first + 0.7 * second, **options)
        np.testing.assert_allclose(mixed, 0.3 * parts[0] + 0.7 * parts[1], rtol=1e-5)
    logits = jnp.array([[[0.5, 0.0], [0.5, 0.0]]])  # rates 1/2 and 0
    value = losses.rate_mse(logits, jnp.array([[0.25, 0.75]]))
    np.testing.assert_allclose(value, [(0.25**2 + 0.75**2) / 2], rtol=1e-6)


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("label", [-1, 5])
def test_the_loss_of_a_label_that_is_no_class_is_nan(loss, label):
    lost = loss(LOGITS, LABELS.at[1].set(label))
    assert jnp.isnan(lost).tolist() == [False, True, False, False]


def test_max_cross_entropy_by_hand():
    logits = jnp.array([[[2.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])  # maxima 2 and 1
    for label, expected in ((0, math.log1p(math.exp(-1))), (1, math.log1p(math.e))):
        loss = losses.max_cross_entropy(
            logits, jnp.array([label]), lengths=jnp.array([2])
        )
        np.testing.assert_allclose(loss, [expected], rtol=1e-6)


@pytest.mark.parametrize("loss", ALL)
def test_padding_counts_in_no_loss_and_gradient(loss):
    valid = (jnp.arange(3) < LENGTHS[:, None])[..., None]
    padded = jnp.where(valid, LOGITS, 1e4)
    value = loss(padded, LABELS, lengths=LENGTHS)
    gradient = jax.grad(lambda x: loss(x, LABELS, lengths=LENGTHS).sum())(padded)
    for k, n in enumerate(LENGTHS):
        alone = slice(k, k + 1), slice(0, n)
        cost = loss(LOGITS[alone], LABELS[k : k + 1])
        np.testing.assert_allclose(value[k], cost[0], rtol=1e-6)
        part = jax.grad(lambda x, k=k: loss(x, LABELS[k : k + 1]).sum())(LOGITS[alone])
        np.testing.assert_allclose(gradient[alone], part, rtol=1e-5, atol=1e-7)
        assert not gradient[k, n:].any()


@pytest.mark.parametrize("loss", ALL)
def test_the_loss_of_a_sequence_without_steps_is_no_number(loss):
    lost = loss(LOGITS, LABELS, lengths=LENGTHS.at[1].set(0))
    assert jnp.isfinite(lost).tolist() == [True, False, True, True]


def test_readouts_are_means_and_maxima_of_the_steps_that_count():
    logits = jnp.array([[[1.0, 4.0], [3.0, 2.0], [8.0, 9.0]]] * 2)
    lengths = jnp.array([2, 3])
    mean = losses.mean_over_time(logits, lengths)
    assert mean.tolist() == [[2, 3], [4, 5]]
    assert losses.max_over_time(logits, lengths).tolist() == [[3, 4], [8, 9]]
    assert losses.mean_over_time(logits).tolist() == [[4, 5]] * 2
    assert losses.max_over_time(logits).tolist() == [[8, 9]] * 2


@pytest.mark.parametrize("call", [losses.mean_over_time, losses.max_over_time])
def test_lengths_are_as_many_whole_numbers(call):
    logits = jax.random.normal(jax.random.key(0), (2, 4, 3))
    np.testing.assert_array_equal(call(logits, [1, 4]), call(logits, jnp.array([1, 4])))
    for lengths in ([1, 4, 2], [1], [1.0, 4.0], 3):
        with pytest.raises(
            ValueError, match=f"{call.__name__}: expected lengths of 2 "
        ):
            call(logits, lengths)


@pytest.mark.parametrize("weight", [-0.1, 5.0, math.nan])
def test_the_weight_of_tet_is_a_part(weight):
    with pytest.raises(ValueError, match="tet: expected a weight of 0 to 1, got"):
        losses.tet(jnp.zeros((2, 4, 3)), jnp.array([0, 1]), weight=weight)
