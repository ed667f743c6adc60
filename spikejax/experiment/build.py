"""Options of the networks and neurons that the scripts train, and how each is built.

Each family has its own options, so a flag that a network does not use does not exist
for it: see ``cli.parse``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax import losses, neurons, surrogate
from spikejax.layers import IF, LI, LIF, PLIF, Factory, MultiThreshold
from spikejax.models import MODELS, recurrent, resnet
from spikejax.nn import cpu, tpu, windowed
from spikejax.nn.cells import ALIF, ILIF
from spikejax.nn.delay import DelayedLinear
from spikejax.nn.norm import fast_td_batch_norm
from spikejax.train.recipe import Ranges, check_settings

WIDTH: Ranges = {"width": ("more than 0, at most 100", lambda w: 0 < w <= 100)}
# The cells are unrolled over their thresholds: more would compile for minutes.
THRESHOLDS = "1 to 64", lambda n: 1 <= n <= 64
READOUTS = {"mean": losses.mean_over_time, "max": losses.max_over_time}
ADAPTATION = {"tau_adaptation": 20.0, "strength": 1.0}  # of alif, our choice
TAU = 4.0  # of networks over sequences, in time steps, chosen on spoken digits
HIDDEN = 128  # neurons, or units of the GRU


@dataclass(frozen=True)
class ResNetOptions:
    """Residual networks (spikejax.models.resnet)."""

    model: Literal[
        "resnet18",
        "resnet19",
        "resnet20",
        "resnet18-imagenet",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
    ] = "resnet20"
    """Residual network; resnet18, 19 and 20 are those for CIFAR."""
    residual: Literal["plain", "sew", "ms"] = "ms"
    """Position of the neurons in a block: after, at both sides, or before the sum."""
    width: float = 1.0
    """Factor on the number of channels."""
    remat: Literal["none", "blocks"] = "none"
    """blocks recomputes each block for the gradient: less memory, a third more work."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters, statistics and membranes are float32."""
    pool: Literal["max", "avg"] = "max"
    """Pooling after the first convolution for ImageNet; avg can be written to NIR."""

    def __post_init__(self):
        check_settings(self, WIDTH)
        if self.pool != "max" and self.model in ("resnet18", "resnet19", "resnet20"):
            raise ValueError(
                "pool: expected a network for ImageNet, those for CIFAR do not pool, "
                f"got {self.pool!r} for {self.model}. Leave it out."
            )

    kernels = ("conv", "norm", "pool")  # that ``build`` takes; not a flag

    def build(self, **parts: Any) -> nnx.Module:
        """Return the network; see ``build_model``."""
        if self.pool == "avg":
            parts["pool"] = nnx.avg_pool
        residuals = {"plain": resnet.plain, "sew": resnet.sew, "ms": resnet.ms}
        return MODELS[self.model](
            residual=residuals[self.residual],
            width=self.width,
            remat=self.remat == "blocks",
            dtype=jnp.dtype(self.dtype),
            **parts,
        )


@dataclass(frozen=True)
class VGGOptions:
    """Networks of convolutions in a row (spikejax.models.vgg)."""

    model: Literal[
        "convnet",
        "vgg11",
        "vgg16",
        "whitened",
        "whitened-small",
        "vggsnn",
        "plifnet",
        "eventnet",
    ] = "convnet"
    """Convolutions in a row; whitened learns CIFAR in few passes, whitened-small in a
    quarter of the time; vggsnn, plifnet and eventnet are for event cameras."""
    pool: Literal["max", "avg"] = "max"
    """Pooling; the maximum of binary spikes is their OR."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters, statistics and membranes are float32."""

    kernels = ("conv", "norm", "pool")

    def build(self, **parts: Any) -> nnx.Module:
        """Return the network; see ``build_model``."""
        # Always named, as networks for event cameras have the mean for a default.
        kernel = parts.get("pool", nnx.max_pool)
        parts["pool"] = nnx.avg_pool if self.pool == "avg" else kernel
        return MODELS[self.model](dtype=jnp.dtype(self.dtype), **parts)


@dataclass(frozen=True)
class EfficientNetOptions:
    """EfficientNet-lite (spikejax.models.efficientnet)."""

    model: Literal[
        "efficientnet-lite0",
        "efficientnet-lite1",
        "efficientnet-lite2",
        "efficientnet-lite3",
        "efficientnet-lite4",
    ] = "efficientnet-lite0"
    """EfficientNet-lite, for photographs of 224 to 300 pixels."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters, statistics and membranes are float32."""

    kernels = ("conv", "norm")

    def build(self, **parts: Any) -> nnx.Module:
        """Return the network; see ``build_model``."""
        return MODELS[self.model](dtype=jnp.dtype(self.dtype), **parts)


@dataclass(frozen=True)
class GeneralOptions:
    """General SNNs (spikejax.models.general), which are always float32."""

    model: Literal["general-cnn", "general-lstm", "general-plain"] = "general-cnn"
    """General SNN; general-plain is the same network without windows."""
    width: float = 1.0
    """Factor on the number of channels."""
    binarise: Literal["bernoulli", "straight-through"] = "bernoulli"
    """Conversion of the input of a spiking layer to spikes."""

    def __post_init__(self):
        check_settings(self, WIDTH)

    kernels = ("conv", "linear")

    def build(self, **parts: Any) -> nnx.Module:
        """Return the network; see ``build_model``."""
        binarise = getattr(windowed, self.binarise.replace("-", "_"))
        return MODELS[self.model](width=self.width, binarise=binarise, **parts)


@dataclass(frozen=True)
class TransformerOptions:
    """Spiking transformers (spikejax.models.transformer)."""

    model: Literal[
        "transformer-small",
        "spikformer-4-256",
        "spikformer-2-384",
        "spikformer-4-384",
        "spikformer-8-384",
        "spikformer-8-512",
        "spikformer-8-768",
        "sdt-2-256",
        "sdt-2-512",
        "sdt-8-384",
        "sdt-6-512",
        "sdt-8-512",
        "sdt-10-512",
        "sdt-8-768",
        "qkformer-4-384",
        "qkformer-10-384",
        "qkformer-10-512",
        "qkformer-10-768",
        "e-spikeformer-3m",
        "e-spikeformer-5m",
        "e-spikeformer-10m",
        "e-spikeformer-19m",
    ] = "transformer-small"
    """Spiking transformer, named by depth and channels or by parameters;
    transformer-small, and those of 2 and 4 blocks, are for CIFAR."""
    remat: Literal["none", "blocks"] = "none"
    """blocks recomputes each block for the gradient: less memory, a third more work."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters, statistics and membranes are float32."""

    kernels = ("conv", "linear", "norm", "pool")

    def build(self, **parts: Any) -> nnx.Module:
        """Return the network; see ``build_model``."""
        remat, dtype = self.remat == "blocks", jnp.dtype(self.dtype)
        return MODELS[self.model](remat=remat, dtype=dtype, **parts)


@dataclass(frozen=True)
class SequenceOptions:
    """Spiking networks over sequences of vectors (spikejax.models.recurrent)."""

    model: Literal["dense"] = "dense"
    """Dense layers, and a readout of leaky integrators."""
    layers: int = 2
    """Hidden layers."""
    hidden: int = HIDDEN
    """Neurons of each of them."""
    recurrent: bool = False
    """Feed the spikes of a layer back to it, one time step later."""
    delays: int = 0
    """Largest delay of a synapse in time steps, which are learned; 0 for none."""
    tau: float = TAU
    """Time constant of neurons and readout in time steps, >= 1."""
    readout: Literal["mean", "max"] = "mean"
    """Logits: the mean or the maximum of the readout over time."""

    def __post_init__(self):
        ranges: Ranges = {
            "layers": ("1 to 100", lambda n: 1 <= n <= 100),
            "hidden": ("1 to 100000", lambda n: 1 <= n <= 100000),
            "delays": ("0 to 1000", lambda n: 0 <= n <= 1000),
            "tau": ("at least 1", lambda tau: tau >= 1),
        }
        check_settings(self, ranges)

    kernels = ("linear",)

    def build(
        self, *, linear: Callable[..., nnx.Module] = nnx.Linear, **parts: Any
    ) -> nnx.Module:
        """Return the network; see ``build_model``."""
        if self.delays:
            linear = partial(DelayedLinear, max_delay=self.delays)
        kind = recurrent.feedback if self.recurrent else recurrent.dense
        kind = partial(kind, linear=linear)
        return _over_vectors([self.hidden] * self.layers, kind, self.tau, **parts)


@dataclass(frozen=True)
class BaselineOptions:
    """Networks over sequences without spikes, for comparison."""

    model: Literal["gru", "linear"] = "gru"
    """One layer of gated recurrent units, or a linear classifier."""
    readout: Literal["mean", "max"] = "mean"
    """Logits: the mean or the maximum over time of the readout of dense."""

    kernels = ()

    def build(self, **parts: Any) -> nnx.Module:
        """Return the network; see ``build_model``."""
        widths = [HIDDEN] if self.model == "gru" else []
        return _over_vectors(widths, recurrent.gru, TAU, **parts)


def _over_vectors(
    widths: Sequence[int],
    kind: Callable,
    tau: float,
    *,
    num_classes: int,
    in_channels: int,
    neuron: Factory,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Return hidden layers of a kind, and leaky integrators."""
    parts = {"neuron": neuron, "kind": kind, "readout": LI(tau), "rngs": rngs}
    return recurrent.RecurrentSNN(in_channels, widths, num_classes, **parts)


@dataclass(frozen=True)
class SingleOptions:
    """Neurons with one threshold."""

    neuron: Literal["lif", "plif", "if", "alif"] = "lif"
    """Activation: lif with fixed tau, plif learns one tau per layer; if has no leak;
    alif has a threshold that adapts."""
    surrogate: Literal["atan", "rectangle"] = "atan"
    """Derivative of a spike; rectangle is as wide as the threshold is high."""

    num_thresholds = 1  # not a flag


@dataclass(frozen=True)
class ReLUOptions:
    """ReLU in the place of neurons: the twin of a spiking network."""

    neuron: Literal["relu"] = "relu"
    """Activation: relu does not spike."""

    num_thresholds = 1  # not a flag


@dataclass(frozen=True)
class MultiThresholdOptions:
    """Neurons with several thresholds and a fixed tau."""

    neuron: Literal["mt-parallel", "mt-cascade", "i-lif"] = "mt-parallel"
    """Activation: several thresholds and, as in lif, a fixed tau; i-lif fires half a
    threshold earlier than mt-parallel."""
    num_thresholds: int = 4
    """Number of thresholds; up to as many spikes per time step."""
    surrogate: Literal["atan", "rectangle"] = "atan"
    """Derivative of a spike; rectangles as wide as the spacing of the thresholds make
    that of all spikes the one of a clipped ReLU."""

    def __post_init__(self):
        check_settings(self, {"num_thresholds": THRESHOLDS})


ImageOptions = (
    ResNetOptions
    | VGGOptions
    | EfficientNetOptions
    | TransformerOptions
    | GeneralOptions
)
NetworkOptions = ImageOptions | SequenceOptions | BaselineOptions
ActivationOptions = MultiThresholdOptions | SingleOptions | ReLUOptions


def neuron_factory(activation: ActivationOptions, network: NetworkOptions) -> Factory:
    """Return the factory of the activation, as models take it.

    Neurons have soft reset, which passes no gradient to the next step
    (``detach_reset``), and do not scale their input by the leak. All but plif, which
    learns it, keep tau at 2, or at that of the flags of a sequence network. In a
    General SNN, tau, the threshold and the surrogate are its authors'.
    """
    if isinstance(activation, ReLUOptions):
        return lambda: nnx.relu
    count = activation.num_thresholds
    # Normalised inputs have a standard deviation of 1. One threshold there is tdBN's
    # choice; of several, 0.5, 1, 1.5 ... cover it. The latter was chosen on the digits.
    spacing = 0.5 if count > 1 else 1.0
    kinds = {"atan": surrogate.ATAN, "rectangle": surrogate.rectangle(1 / spacing)}
    options = {"v_threshold": spacing, "surrogate": kinds[activation.surrogate]}
    options["detach_reset"] = True  # our choice
    # From rest, the first step has u = x: in one time step tau has no effect.
    tau: dict[str, Any] = {"decay_input": False}
    if isinstance(network, GeneralOptions):
        options |= windowed.FIRING
        tau["tau"] = windowed.TAU
    if isinstance(network, SequenceOptions):
        tau["tau"] = network.tau
    several = partial(MultiThreshold, count, **options, **tau)
    return {
        "lif": partial(LIF, **options, **tau),
        "plif": partial(PLIF, **options, **tau),
        "if": partial(IF, **options),
        "alif": partial(ALIF, **options, **tau, **ADAPTATION),
        "mt-parallel": several,
        "mt-cascade": partial(several, neurons.cascade),
        "i-lif": partial(ILIF, count, **options, tau=tau.get("tau", 2.0)),
    }[activation.neuron]


def build_model(
    network: NetworkOptions,
    activation: ActivationOptions,
    *,
    num_classes: int,
    in_channels: int,
    seed: int,
    platform: str | None = None,
    size: tuple[int, ...] = (),
) -> nnx.Module:
    """Return the network of the options, with initial weights from the seed.

    Args:
        network, activation: the options.
        num_classes: logits.
        in_channels: channels of the input.
        seed: of the weights.
        platform: backend for which it is built, by default the one in use. On a CPU,
            networks take the kernels of ``nn.cpu``, on a TPU those of ``nn.tpu``.
        size: height and width of the images, which the network is checked to take; ()
            of sequences.

    Raises:
        ValueError: the network does not take such inputs.
    """
    parts: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels}
    platform = platform or jax.default_backend()
    # Not elsewhere: nn/cpu.py says how much faster they are, without forward mode.
    fast: dict[str, Any] = {}
    if platform == "cpu":
        fast = {"conv": cpu.Conv, "linear": cpu.Linear, "pool": cpu.max_pool}
        fast["norm"] = fast_td_batch_norm
    elif platform == "tpu":
        fast = {"conv": tpu.Conv, "norm": fast_td_batch_norm}
    parts |= {name: fast[name] for name in network.kernels if name in fast}
    parts["neuron"] = neuron_factory(activation, network)

    def make() -> nnx.Module:
        return network.build(**parts, rngs=nnx.Rngs(seed))

    # These take any size, and the largest of them take seconds to trace.
    any_size = ResNetOptions | EfficientNetOptions | TransformerOptions
    if size and not isinstance(network, any_size):
        xs = jax.ShapeDtypeStruct((1, 1, *size, in_channels), jnp.float32)
        jax.eval_shape(lambda xs: make()(xs), xs)
    # Compiled as a whole: layer by layer, each initialiser would be dispatched alone.
    graphdef, _ = nnx.split(nnx.eval_shape(make))
    weights = jax.jit(lambda: nnx.to_pure_dict(nnx.state(make())))()
    return nnx.merge(graphdef, weights)
