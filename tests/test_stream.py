"""Step by step: one run for all T, early exit, and errors by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax import energy
from spikejax.conversion import convert
from spikejax.conversion import steps as stream
from spikejax.conversion.steps import (
    agreement,
    confidence_front,
    early_exit,
    evaluate_steps,
)
from spikejax.memory import has_held
from spikejax.models.vgg import POOL, VGG
from spikejax.nn.quant import QuantReLU

XS = jax.random.normal(jax.random.key(1), (6, 1, 8, 8, 1))
STEPS = 8


@pytest.fixture(scope="module")
def ann():
    plan = (4, POOL, 4)
    model = VGG(plan, 3, neuron=QuantReLU, in_channels=1, rngs=nnx.Rngs(0))
    model.eval()
    return model


@pytest.fixture(scope="module")
def snn(ann):
    return convert(ann, XS).model


@pytest.fixture(scope="module")
def run(snn):
    return stream.stream(snn, XS, STEPS)


@pytest.mark.parametrize("steps", [1, 6])
def test_one_run_holds_the_answer_of_every_number_of_steps(snn, run, steps):
    xs = jnp.repeat(XS, steps, 1)
    graphdef, state = nnx.split(snn)
    logits = jax.jit(lambda s, xs: nnx.merge(graphdef, s)(xs))(state, xs)
    np.testing.assert_allclose(run.logits[steps - 1], logits.mean(1), atol=1e-5)
    spikes = energy.measure(snn, xs).spikes_per_image
    assert float(run.spikes[steps - 1].mean()) == pytest.approx(spikes)


def test_the_model_stays_as_it_is_and_starts_anew(snn, run):
    assert not has_held(snn)
    again = stream.stream(snn, XS, STEPS)
    np.testing.assert_array_equal(again.logits, run.logits)


def test_a_step_is_compiled_once_and_returns_membranes_alone(ann, monkeypatch):
    """Memory does not grow with T: the loop hands on membranes and sums."""
    snn = convert(ann, XS, 2).model
    before = stream._step._cache_size()
    stream.stream(snn, XS, STEPS)
    stream.stream(snn, XS + 1, STEPS)
    assert stream._step._cache_size() == before + 1
    seen = []
    real = stream._step

    def noted(*args):
        result = real(*args)
        seen.append(sum(a.size for a in jax.tree.leaves(result)))
        return result

    monkeypatch.setattr(stream, "_step", noted)
    stream.stream(snn, XS, 2)
    neurons = 8 * 8 * 4 + 4 * 4 * 4
    assert seen[-1] == len(XS) * (neurons + 3 + 1)  # membranes, logits, spikes


def test_evaluation_over_batches(snn, run):
    labels = np.array([0, 1, 2, 0, 1, 2])
    images = np.asarray(XS)[:, 0]
    batches = [
        {"image": images[:4], "label": labels[:4]},
        {"image": images[4:], "label": labels[4:]},
    ]
    result = evaluate_steps(snn, batches, lambda x, rng: x[:, None], STEPS, 0.34)
    expected = (np.asarray(run.logits).argmax(-1) == labels).mean(1)
    np.testing.assert_allclose(result.accuracy, expected)
    np.testing.assert_allclose(result.spikes, run.spikes.mean(1), rtol=1e-6)
    classes, stops = early_exit(run.logits, 0.34)
    assert result.exit_accuracy == pytest.approx((classes == labels).mean())
    assert result.exit_steps == pytest.approx(stops.mean())
    assert stops.min() < STEPS


def test_early_exit_stops_at_the_first_sure_step():
    logits = jnp.log(
        jnp.array(
            [
                [[0.6, 0.4], [0.9, 0.1], [0.5, 0.5]],
                [[0.2, 0.8], [0.4, 0.6], [0.6, 0.4]],
                [[0.1, 0.9], [0.1, 0.9], [0.4, 0.6]],
            ]
        )
    )  # [T, B, K]
    answer = early_exit(logits, 0.7)
    assert answer.steps.tolist() == [2, 1, 3]
    assert answer.classes.tolist() == [1, 0, 1]
    assert early_exit(logits, 0.0).steps.tolist() == [1, 1, 1]
    assert early_exit(logits, 1.0).steps.tolist() == [3, 3, 3]


def test_the_front_rises_in_accuracy_and_steps():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 500)
    drift = np.arange(1, 9)[:, None, None] * np.eye(4)[labels]
    logits = jnp.asarray(0.3 * drift + rng.normal(0, 0.5, (8, 500, 4)))
    front = confidence_front(logits, labels)
    _, accuracies, steps = np.array(front).T
    assert len(front) > 3 and (np.diff(accuracies) > 0).all()
    assert (np.diff(steps) > 0).all() and steps[0] == 1
    for confidence, accuracy, mean_steps in front:
        answer = early_exit(logits, confidence)
        assert accuracy == pytest.approx(float((answer.classes == labels).mean()))
        assert mean_steps == pytest.approx(float(answer.steps.mean()))


def test_first_layer_agrees_at_p_steps_and_errors_add_up(ann, snn):
    first, second = agreement(ann, snn, XS, 3)
    assert (first.path, second.path) == ("neurons/0", "neurons/1")
    assert first.error < 1e-6 and first.unevenness < 1e-6 and first.occasional < 1e-6
    assert first.quantisation > 0.01
    assert second.error > 0 and second.unevenness > 0
    long = agreement(ann, snn, XS, 100)
    assert long[0].quantisation < 0.01


def test_the_three_errors_of_known_values():
    """One neuron each: clipped, rounded down, uneven, spiking where the ANN is 0."""
    z = jnp.array([1.5, 0.6, 0.5, 0.0])
    rate = jnp.array([1.0, 0.5, 0.75, 0.25])
    activation = jnp.array([1.0, 0.5, 0.5, 0.0])
    parts = stream._errors(z, rate, activation, 1.0, 4, 0)
    expected = [0.5 / 4, 0.5 / 4, 0.1 / 4, 0.5 / 4, 0.25 / 2.5]
    np.testing.assert_allclose(parts, expected, rtol=1e-5)


def test_sums_over_time_have_the_digits_of_float32():
    """Every step answers the bias, which bfloat16 would sum up to something else."""
    options = {"rngs": nnx.Rngs(0), "dtype": jnp.bfloat16}
    last = nnx.Linear(2, 2, kernel_init=nnx.initializers.zeros, **options)
    last.bias[...] = jnp.array([2.2, 3.0])
    model = nnx.Sequential(nnx.Linear(2, 2, **options), QuantReLU(), last)
    ones = jnp.ones((1, 1, 2))
    logits = stream.stream(convert(model, ones).model, ones, 400).logits
    np.testing.assert_allclose(logits[-1, 0], [2.2, 3.0], rtol=0.01)


def test_bad_input(ann, snn):
    message = r"stream: expected convert\(...\).model, .* got "
    for model, xs, steps, got in (
        (snn, XS, 0, r"Replaced, shape \(6, 1, 8, 8, 1\) and 0"),
        (ann, XS, 4, "VGG"),
        (convert(ann, XS), XS, 4, "Converted"),
        (snn, jnp.repeat(XS, 2, 1), 4, r"Replaced, shape \(6, 2, 8, 8, 1\)"),
    ):
        with pytest.raises(ValueError, match=message + got):
            stream.stream(model, xs, steps)
    other = VGG((4,), 3, neuron=QuantReLU, in_channels=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="agreement: expected a network and its conv"):
        agreement(other, snn, XS, 1)


@pytest.mark.parametrize("confidence", [-0.1, 2.0, float("nan")])
def test_a_confidence_is_a_probability(confidence):
    with pytest.raises(ValueError, match="early_exit: expected a confidence of 0"):
        stream.early_exit(jnp.zeros((3, 2, 5)), confidence)
