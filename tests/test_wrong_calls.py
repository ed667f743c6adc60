"""Wrong calls of the public functions: one line with who, expected, got, and a hint."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from spikejax import (
    LIF,
    PLIF,
    MultiThreshold,
    calibrate,
    convert,
    encode,
    energy,
    fold_norms,
    keep_membranes,
    losses,
    neurons,
    plot,
    stepper,
    surrogate,
    unroll,
)
from spikejax.conversion import percentile
from spikejax.conversion.steps import agreement, stream
from spikejax.data import images
from spikejax.data.events import Framing, frames, recordings
from spikejax.experiment import (
    Experiment,
    MultiThresholdOptions,
    ReLUOptions,
    ResNetOptions,
    SingleOptions,
)
from spikejax.layers import LI, Neuron
from spikejax.models import MODELS, resnet
from spikejax.models.recurrent import RecurrentSNN
from spikejax.models.vgg import POOL, VGG
from spikejax.neurons import NeuronParams
from spikejax.nir import from_nir, to_nir
from spikejax.nn import windowed
from spikejax.nn.quant import QuantReLU, ScaledIF
from spikejax.nn.recurrent import Recurrent
from spikejax.train import TrainConfig, fit

R, KEY = nnx.Rngs, jax.random.key(0)
XS, IM = jnp.ones((2, 1, 3)), jnp.ones((2, 8, 8, 1))
LOG, LAB = jnp.zeros((2, 3, 5)), jnp.array([0, 1])
DIGITS = images.load("digits")


def network(activation):
    ends = nnx.Linear(3, 4, rngs=R(0)), nnx.Linear(4, 2, rngs=R(0))
    return nnx.Sequential(ends[0], activation, ends[1])


relu_net, gelu_net = network(nnx.relu), network(nnx.gelu)
quant_net, lif_net = network(QuantReLU(2)), network(LIF())
vgg = partial(VGG, (4, POOL, 4), 3, in_channels=1)
rn = partial(resnet.ResNet, (1,), (4,), 3, in_channels=1)
norm_first = nnx.Sequential(nnx.BatchNorm(3, rngs=R(0)), nnx.Linear(3, 2, rngs=R(0)))


def model(name, neuron=LIF, **options):
    options |= {"num_classes": 3, "neuron": neuron, "in_channels": 1}
    return MODELS[name](rngs=R(0), **options)


def shapes(name, **options):
    """The network without its weights, which such an error comes before."""
    return nnx.eval_shape(lambda: model(name, **options))


def fit_lists(data, evaluation=(1,)):
    settings = {"encode": lambda x, rng: x, "steps_per_epoch": 1, "workdir": "unused"}
    config = TrainConfig(batch_size=8)
    return fit(config, lif_net, losses.tet, data, evaluation, **settings)


# Start of the message -> calls that raise it.
CALLS = {
    "LIF: expected tau >= 1, and > 1 and finite where it is learned": [
        lambda: LIF(0.0),
        lambda: LIF(0.5),
        lambda: LIF(math.nan),
        lambda: LIF(math.inf),
        lambda: LIF("2"),
    ],
    "LIF: expected at least one threshold, positive thresholds": [
        lambda: LIF(2.0, 0.0),
        lambda: LIF(v_threshold=-1.0),
        lambda: LIF(v_threshold=math.nan),
        lambda: LIF(v_threshold="1"),
    ],
    "LIF: expected at least one threshold, finite thresholds": [
        lambda: LIF(v_threshold=math.inf),
    ],
    "LIF: expected v_reset below every threshold 1.0": [
        lambda: LIF(v_reset=1.5),
        lambda: LIF(v_reset=math.nan),
        lambda: LIF(v_reset="soft"),
    ],
    "LIF: expected a surrogate such as surrogate.ATAN or": [
        lambda: LIF(surrogate="atan"),
        lambda: LIF(surrogate=surrogate.atan),
        lambda: LIF(surrogate=nnx.relu),
    ],
    "PLIF: expected tau >= 1, and > 1 and finite where it is learned": [
        lambda: PLIF(1.0),
        lambda: PLIF(math.inf),
    ],
    "LI: expected tau >= 1, and > 1 and finite where it is learned": [
        lambda: LI(0.0),
    ],
    "num_thresholds: expected a whole number >= 1": [
        lambda: MultiThreshold(0),
        lambda: MultiThreshold(-1),
        lambda: neurons.equal_thresholds(0),
        lambda: neurons.dyadic_thresholds(0),
        lambda: neurons.repeated_thresholds(-2),
        lambda: convert(quant_net, XS, 0),
        lambda: convert(quant_net, XS, 2.5),
        lambda: ScaledIF(1.0, 0),
    ],
    "MultiThreshold: expected the number of thresholds or a sequence of them,": [
        lambda: MultiThreshold("4"),
        lambda: MultiThreshold(2.5),
        lambda: MultiThreshold(4, LIF()),
        lambda: MultiThreshold(4, LIF),
        lambda: MultiThreshold(4, "cascade"),
        lambda: MultiThreshold(None),
    ],
    "MultiThreshold: expected at least one threshold, positive thresholds": [
        lambda: MultiThreshold(()),
        lambda: MultiThreshold((-1.0, 1.0)),
        lambda: MultiThreshold(4, v_threshold=0.0),
        lambda: MultiThreshold((1.0, -1.0), neurons.cascade),
        lambda: MultiThreshold((1.0, math.nan)),
    ],
    "MultiThreshold: expected at least one threshold, positive thresholds, got arr": [
        lambda: MultiThreshold(jnp.zeros((2, 1, 3))),
    ],
    "MultiThreshold: expected at least one threshold, rising thresholds": [
        lambda: MultiThreshold((2.0, 1.0)),
        lambda: MultiThreshold((1.0, 1.0)),
    ],
    "MultiThreshold: expected one threshold for the cell lif": [
        lambda: MultiThreshold(4, neurons.lif),
    ],
    "MultiThreshold: expected v_threshold with a number of thresholds": [
        lambda: MultiThreshold((1.0, 2.0), v_threshold=0.5),
    ],
    "MultiThreshold: expected tau >= 1, and > 1 and finite where it is learned": [
        lambda: MultiThreshold(4, tau=0.1),
    ],
    "MultiThreshold: expected v_reset below every threshold 1.0": [
        lambda: MultiThreshold(4, v_reset=2.0),
    ],
    "Neuron: expected an amount for each of 2 thresholds": [
        lambda: Neuron(neurons.parallel, NeuronParams(0.5, (1.0, 2.0), (1.0,))),
    ],
    "Neuron: expected one threshold for the cell lif": [
        lambda: Neuron(neurons.lif, NeuronParams(0.5, (1.0, 2.0))),
    ],
    "LIF: expected a floating point sequence [B, T, ...] with T >= 1": [
        lambda: LIF()(jnp.ones((2, 4, 3), jnp.uint8)),
        lambda: LIF()(jnp.ones((2, 4, 3), bool)),
        lambda: LIF()(jnp.ones(3)),
        lambda: LIF()(jnp.ones((2, 0, 3))),
        lambda: LIF()("xs"),
        lambda: LIF()([[1.0, 2.0]]),
        lambda: LIF()(None),
        lambda: LIF()(jnp.ones((2, 4, 3), complex)),
        lambda: LIF()(jnp.ones((2, 5, 3), int)),
        lambda: stepper(lif_net, jnp.ones(3)),
    ],
    "unroll: expected xs [B, T, ...] with T >= 1": [
        lambda: unroll(neurons.lif, None, jnp.zeros(2), jnp.ones((2, 0))),
        lambda: unroll(neurons.lif, None, jnp.zeros(2), jnp.ones(2)),
    ],
    "Recurrent: expected a layer of neurons such as LIF() and at least one": [
        lambda: Recurrent(LIF, 3, rngs=R(0)),
        lambda: Recurrent(LIF(), 0, rngs=R(0)),
        lambda: Recurrent(nnx.relu, 3, rngs=R(0)),
    ],
    "surrogate: expected a function for the derivative and a finite alpha > 0": [
        lambda: surrogate.atan(math.inf),
        lambda: surrogate.Surrogate(None),
        lambda: LIF(surrogate=surrogate.Surrogate(3))(XS),
    ],
    "keep_membranes: expected a model with spiking neurons": [
        lambda: keep_membranes(relu_net, XS),
        lambda: stepper(relu_net, XS),
    ],
    "membranes: expected input for membranes (2, 4)": [
        lambda: keep_membranes(lif_net and nnx.clone(lif_net), XS)(jnp.ones((3, 1, 3))),
        lambda: (lambda s: s[1](s[0], jnp.ones((3, 1, 3))))(stepper(lif_net, XS)),
    ],
    "stepper: expected an nnx.Module": [
        lambda: stepper(LIF, XS),
    ],
    "keep_membranes: expected an nnx.Module": [
        lambda: keep_membranes("net", XS),
    ],
    "encode: expected a batch [B, ...] and a whole number of time_steps >= 1": [
        lambda: encode.direct(IM, 0),
        lambda: encode.direct(jnp.ones(3), 2),
        lambda: encode.direct(IM, -1),
        lambda: encode.direct(IM, 1.5),
        lambda: encode.latency(IM, 0),
        lambda: encode.direct(IM, "4"),
    ],
    "poisson: expected intensities in [0, 1]": [
        lambda: encode.poisson(jnp.ones((2, 3), jnp.uint8), 2, rng=KEY),
    ],
    "latency: expected intensities in [0, 1]": [
        lambda: encode.latency(jnp.ones((2, 3), jnp.uint8), 2),
    ],
    "rate_cross_entropy: expected logits [B, T, K] and labels [B]": [
        lambda: losses.rate_cross_entropy(jnp.zeros((2, 5)), LAB),
        lambda: losses.rate_cross_entropy(LOG, jnp.zeros((2, 4))),
        lambda: losses.rate_cross_entropy(LOG, jnp.zeros(3, int)),
        lambda: losses.rate_cross_entropy(LOG, jnp.zeros(2)),
    ],
    "tet: expected logits [B, T, K] and labels [B]": [
        lambda: losses.tet(jnp.zeros((2, 5)), LAB),
    ],
    "rate_mse: expected logits [B, T, K] and labels [B]": [
        lambda: losses.rate_mse(jnp.zeros((2, 3, 4, 5)), LAB),
    ],
    "rate_cross_entropy: expected 0 <= label_smoothing < 1": [
        lambda: losses.rate_cross_entropy(LOG, LAB, label_smoothing=1.5),
        lambda: losses.rate_cross_entropy(LOG, LAB, label_smoothing=-0.1),
    ],
    "measure: expected input [B, T, ...], B and T >= 1": [
        lambda: energy.measure(lif_net, jnp.ones(3)),
        lambda: energy.measure(lif_net, jnp.ones((0, 1, 3))),
    ],
    "measure: expected an nnx.Module": [
        lambda: energy.measure(lambda x: x, XS),
        lambda: energy.measure("net", XS),
        lambda: energy.measure(LIF, XS),
    ],
    "calibrate: expected a network [B, T, ...] to [B, T, K] of affine": [
        lambda: calibrate(gelu_net, XS),
        lambda: calibrate(lif_net, XS),
    ],
    "calibrate: expected a rule such as maximum and a factory such as": [
        lambda: calibrate(relu_net, XS, rule="max"),
        lambda: calibrate(relu_net, XS, neuron=QuantReLU(2)),
    ],
    "calibrate: expected an nnx.Module": [
        lambda: calibrate(lambda x: x, XS),
    ],
    "convert: expected a network [B, T, ...] to [B, T, K] of affine": [
        lambda: convert(relu_net, XS),
        lambda: convert(nnx.Linear(3, 2, rngs=R(0)), XS),
    ],
    "convert: expected an nnx.Module": [
        lambda: convert(calibrate(relu_net, XS), XS),
    ],
    "percentile: expected 1 < q <= 100, in percent": [
        lambda: percentile(0.999),
        lambda: percentile(101),
    ],
    "stream: expected convert(...).model, input [B, 1, ...] that is shown at": [
        lambda: stream(relu_net, XS, 4),
        lambda: stream(convert(quant_net, XS).model, XS, 0),
        lambda: stream(convert(quant_net, XS).model, jnp.ones((2, 2, 3)), 4),
        lambda: stream(convert(quant_net, XS), XS, 4),
        lambda: stream(calibrate(relu_net, XS).model, XS, 4),
    ],
    "agreement: expected a network [B, T, ...] to [B, T, K] of affine": [
        lambda: agreement(relu_net, convert(quant_net, XS).model, XS, 2),
    ],
    "fold_norms: expected one convolution or linear layer right before each": [
        lambda: fold_norms(
            nnx.Sequential(nnx.BatchNorm(3, rngs=R(0)), nnx.Linear(3, 2, rngs=R(0))), XS
        ),
    ],
    "conversion: expected a positive threshold at 'layers/0'": [
        lambda: calibrate(relu_net, jnp.zeros((2, 1, 3))),
        lambda: calibrate(relu_net, XS * jnp.nan),
    ],
    "QuantReLU: expected 1 to 8 bits": [
        lambda: QuantReLU(0),
        lambda: QuantReLU(9),
        lambda: QuantReLU(1.5),
        lambda: QuantReLU("2"),
    ],
    "QuantReLU: expected noise of 0 or more": [
        lambda: QuantReLU(2, noise=-1.0),
    ],
    "QuantReLU: expected rngs=nnx.Rngs(noise=seed) with noise 1.0": [
        lambda: QuantReLU(2, noise=1.0),
        lambda: QuantReLU(2, noise=1.0, rngs=0),
    ],
    "QuantReLU: expected a positive scale": [
        lambda: QuantReLU(2, scale=0.0),
    ],
    "ScaledIF: expected at least one threshold, positive thresholds": [
        lambda: ScaledIF(0.0),
        lambda: ScaledIF(math.nan),
    ],
    "QuantReLU: expected a rounding such as half_even": [
        lambda: QuantReLU(2, rounding="even")(XS),
    ],
    "VGG: expected neuron=LIF, partial(LIF, 3.0), lambda: nnx.relu, or another": [
        lambda: vgg(neuron=LIF(), rngs=R(0)),
        lambda: vgg(neuron=nnx.relu, rngs=R(0)),
    ],
    "ResNet: expected neuron=LIF, partial(LIF, 3.0), lambda: nnx.relu, or": [
        lambda: rn(neuron=LIF(), rngs=R(0)),
        lambda: rn(neuron=nnx.relu, rngs=R(0)),
        lambda: rn(neuron="lif", rngs=R(0)),
    ],
    "ResNet: expected residual=resnet.plain, sew or ms, width > 0, and a width": [
        lambda: rn(neuron=LIF, residual="ms", rngs=R(0)),
        lambda: rn(neuron=LIF, width=-1, rngs=R(0)),
        lambda: resnet.ResNet((1, 2), (4,), 3, neuron=LIF, rngs=R(0)),
    ],
    "General: expected neuron=LIF, partial(LIF, 3.0), lambda: nnx.relu, or": [
        lambda: model("general-cnn", neuron=LIF()),
    ],
    "VGG: expected a plan with a convolution, and at least one class": [
        lambda: VGG((4,), 0, neuron=LIF, rngs=R(0)),
        lambda: VGG((), 3, neuron=LIF, rngs=R(0)),
    ],
    "VGG: expected images [B, T, H, W, 1] of sides of at least 2": [
        lambda: vgg(neuron=LIF, rngs=R(0))(jnp.ones((2, 1, 8, 8, 3))),
        lambda: vgg(neuron=LIF, rngs=R(0))(jnp.ones((2, 8, 8, 1))),
    ],
    "VGG: expected images in floating point, got uint8": [
        lambda: vgg(neuron=LIF, rngs=R(0))(jnp.ones((2, 1, 8, 8, 1), jnp.uint8)),
    ],
    "ResNet: expected images [B, T, H, W, 1] of sides of at least 1": [
        lambda: rn(neuron=LIF, rngs=R(0))(jnp.ones((2, 8, 8, 1))),
    ],
    "VGG: expected images [B, T, H, W, 1] of sides of at least 32": [
        lambda: shapes("vgg11")(jnp.ones((2, 1, 8, 8, 1))),
    ],
    "General: expected images [B, T, H, W, C] with sides that are multiples of": [
        lambda: shapes("general-cnn", depths=(1,) * 4)(jnp.ones((2, 1, 7, 7, 1))),
    ],
    "General: expected images [B, T, H, W, 1] of sides of at least 1": [
        lambda: shapes("general-cnn", depths=(1,) * 4)(jnp.ones((2, 32, 32, 1))),
        lambda: shapes("general-cnn", depths=(1,) * 4)(jnp.ones((2, 1, 32, 32, 3))),
    ],
    "RecurrentSNN: expected a sequence [B, T, 8]": [
        lambda: RecurrentSNN(8, (4,), 3, neuron=LIF, rngs=R(0))(jnp.ones((2, 8))),
        lambda: RecurrentSNN(8, (4,), 3, neuron=LIF, rngs=R(0))(jnp.ones((2, 8, 8, 8))),
    ],
    "windows: expected windows from half the map to all of it": [
        lambda: windowed.split(jnp.ones((2, 5, 5, 1)), windowed.tile),
    ],
    "optimizer: expected one of sgd, adamw, lamb": [
        lambda: TrainConfig(optimizer="adam"),
    ],
    "learning_rate: expected more than 0": [lambda: TrainConfig(learning_rate=0)],
    "epochs: expected a finite number": [lambda: TrainConfig(epochs=math.inf)],
    "seed: expected 0 to 2**32 - 1": [lambda: TrainConfig(seed=-1)],
    "learning_rate: expected a finite number": [
        lambda: TrainConfig(learning_rate=math.nan),
    ],
    "batch_size: expected at least 1": [
        lambda: TrainConfig(batch_size=0),
    ],
    "epochs: expected more than 0": [
        lambda: TrainConfig(epochs=-1),
    ],
    "ema: expected 0 (off) <= ema < 1": [
        lambda: TrainConfig(ema=1.0),
    ],
    "norm_groups: expected a divisor of the batch size": [
        lambda: TrainConfig(norm_groups=3),
        lambda: TrainConfig(batch_size=12.5),
    ],
    "warmup: expected a part of the training, 0 <= warmup < 1": [
        lambda: TrainConfig(warmup=1.0),
    ],
    "steps: expected 1 to": [
        lambda: TrainConfig(steps=0),
    ],
    "clip: expected 0 (off) or more": [
        lambda: TrainConfig(clip=-1.0),
    ],
    "time_steps: expected 1 for --neuron relu: it has no state": [
        lambda: Experiment("r", activation=ReLUOptions(), time_steps=4),
    ],
    "neuron: expected one of lif, plif, if, alif, got": [
        lambda: Experiment("r", activation=SingleOptions("lfi")),
    ],
    "num_thresholds: expected 1 to 64": [
        lambda: MultiThresholdOptions(num_thresholds=0),
        lambda: MultiThresholdOptions(num_thresholds=3000),
    ],
    "model: expected one of resnet18, resnet19, resnet20, resnet18-imagenet,": [
        lambda: Experiment("r", network=ResNetOptions("resnet21")),
    ],
    "time_steps: expected 1 to 10000": [
        lambda: Experiment("r", time_steps=0),
    ],
    "label_smoothing: expected 0 <= p < 1": [
        lambda: Experiment("r", label_smoothing=1.0),
    ],
    "width: expected more than 0": [
        lambda: ResNetOptions(width=0.0),
    ],
    "loss: expected one of rate, tet": [
        lambda: Experiment("r", loss="mse"),
    ],
    "data: expected digits, fake, tiny_imagenet, folder or a TFDS set": [
        lambda: images.load("cifar11"),
        lambda: images.load(""),
    ],
    "folder: expected images (.jpeg, .jpg, .png) of the classes of train in": [
        lambda: images.load("folder"),
    ],
    "train_batches: expected batch_size >= 1, shard (process, processes) with": [
        lambda: images.train_batches(DIGITS.train, 0, seed=0),
        lambda: images.train_batches(DIGITS.train, 10**6, seed=0),
        lambda: images.train_batches(DIGITS.train, 4, seed=0, shard=(2, 2)),
    ],
    "eval_batches: expected batch_size >= 1, shard (process, processes) with 0": [
        lambda: images.eval_batches(DIGITS.test, 0),
    ],
    "frames: expected one of number, duration, voxel, surface and 1 to 100000": [
        lambda: Framing(time_steps=4, kind="time"),
        lambda: Framing(time_steps=0),
    ],
    "expected events inside a camera 2048x2048, got event 0 with x=-1": [
        lambda: recordings.from_columns([-1], [1], [0], [1]),
    ],
    "expected events with polarities -1, 0 or 1, got event 0": [
        lambda: recordings.from_columns([1], [1], [0], [2]),
    ],
    "expected events over less than 12 days, got event 1": [
        lambda: recordings.from_columns([1, 1], [1, 1], [0, 2**41], [1, 1]),
    ],
    "expected events in the order of time, got event 1": [
        lambda: recordings.from_columns([1, 1], [1, 1], [1, 0], [1, 1]),
    ],
    "expected as many x as y, t and p, got 2, 1, 1, 1": [
        lambda: recordings.from_columns([1, 1], [1], [1], [1]),
    ],
    "windows: expected at least 1 us, got 0": [
        lambda: frames.windows(recordings.from_columns([1], [1], [1], [1]).events, 0),
    ],
    "fit: expected evaluation batches that can be read again and again, got none": [
        lambda: fit_lists(images.train_batches(DIGITS.train, 8, seed=0), []),
    ],
    "fit: expected evaluation batches that can be read again and again, got an iter": [
        lambda: fit_lists(images.train_batches(DIGITS.train, 8, seed=0), iter([1])),
    ],
    "fit: expected an iterator of Grain, as iter(dataset) gives": [
        lambda: fit_lists([1]),
        lambda: fit_lists(iter([])),
    ],
    "to_nir: expected what NIR can say": [
        lambda: to_nir(relu_net, XS, dt=1.0),
    ],
    "to_nir: expected dt > 0 in seconds, an input [B, T, H, W, C] or [B, T,": [
        lambda: to_nir(lif_net, XS, dt=0.0),
        lambda: to_nir(lif_net, XS, dt=1.0, soft_reset="node"),
    ],
    "from_nir: expected dt > 0 in seconds, and a dialect such as": [
        lambda: from_nir("unread.nir", dt=-1.0),
    ],
    "raster: expected the spikes of one example, [T, ...]": [
        lambda: plot.raster(jnp.ones(3)),
        lambda: plot.raster(jnp.ones((0, 3))),
    ],
    "membrane: expected the current of one neuron, [T]": [
        lambda: plot.membrane(LIF(), jnp.ones((3, 2))),
    ],
    "rates: expected a report with spiking neurons": [
        lambda: plot.rates(energy.measure(relu_net, XS)),
    ],
}
CASES = [(start, call) for start, calls in CALLS.items() for call in calls]


@pytest.mark.parametrize(
    ("start", "call"), CASES, ids=[f"{k}-{start}" for k, (start, _) in enumerate(CASES)]
)
def test_a_wrong_call_is_one_line(start, call):
    with pytest.raises(ValueError) as raised:
        call()
    message = str(raised.value)
    assert message.startswith(start) and ", got" in message
    assert "\n" not in message and " at 0x" not in message
