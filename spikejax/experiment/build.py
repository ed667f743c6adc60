"""From the flags of an experiment to its network."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax import neurons
from spikejax.layers import IF, LIF, PLIF, MultiThreshold
from spikejax.models import MODELS, resnet
from spikejax.nn import cpu
from spikejax.nn import windowed as mixer
from spikejax.nn.norm import td_batch_norm

NeuronName = Literal["lif", "plif", "if", "mt-parallel", "mt-cascade", "relu"]


def spacing(experiment: Any) -> float:
    """Threshold, or distance of thresholds, in standard deviations of the input.

    Our choice: one threshold at 1; N > 1 thresholds at 1/2 each.
    """
    several = experiment.neuron.startswith("mt-") and experiment.num_thresholds > 1
    return 0.5 if several else 1.0


def neuron_factory(experiment: Any) -> Callable[[], Callable]:
    """The activation that the flags name, as models take it.

    Spiking neurons: soft reset, threshold 1, input not scaled by the leak, ATan. Those
    of the general networks: threshold, leak and surrogate of their authors.
    """
    authors = experiment.model.startswith("general")
    firing: dict[str, Any] = {"detach_reset": True} | (mixer.FIRING if authors else {})
    options = firing | {"decay_input": False} | ({"tau": mixer.TAU} if authors else {})
    several = partial(MultiThreshold, experiment.num_thresholds, **options)
    return {
        "lif": partial(LIF, **options),
        "plif": partial(PLIF, **options),
        "if": partial(IF, **firing),
        "mt-parallel": partial(several, neurons.parallel, learn_tau=True),
        "mt-cascade": partial(several, neurons.cascade, learn_tau=True),
        "relu": lambda: nnx.relu,
    }[experiment.neuron]


def build_model(
    experiment: Any, image_set: Any, platform: str | None = None
) -> nnx.Module:
    """The network that the flags name, with initial weights from the seed.

    Args:
        experiment: an ``Experiment``; its model, neuron, dtype and so on.
        image_set: with num_classes and shape.
        platform: whose kernels the network takes; the default backend's by default.
    """
    if experiment.model not in MODELS:
        raise ValueError(
            f"model: expected one of {', '.join(MODELS)}, got {experiment.model!r}."
        )
    network, dtype = MODELS[experiment.model], jnp.dtype(experiment.dtype)
    fast = (platform or jax.default_backend()) == "cpu"
    norm = cpu.td_batch_norm if fast else td_batch_norm
    norm = partial(norm, v_threshold=1 / spacing(experiment), dtype=dtype)
    max_pool = cpu.max_pool if fast else nnx.max_pool
    if experiment.model.startswith("resnet"):
        residuals = {"plain": resnet.plain, "sew": resnet.sew, "ms": resnet.ms}
        options = {"norm": norm, "residual": residuals[experiment.residual]}
        options |= {"dtype": dtype, "remat": experiment.remat == "blocks"}
        options |= {"pool": max_pool, "width": experiment.width}
    elif experiment.model.startswith("general"):
        binarise = getattr(mixer, experiment.binarise.replace("-", "_"))
        options = {"width": experiment.width, "binarise": binarise}
    else:
        pools = {"max": max_pool, "avg": nnx.avg_pool}
        options = {"norm": norm, "pool": pools[experiment.pool], "dtype": dtype}

    def make():
        return network(
            num_classes=image_set.num_classes,
            neuron=neuron_factory(experiment),
            in_channels=image_set.shape[-1],
            rngs=nnx.Rngs(experiment.train.seed),
            conv=cpu.Conv if fast else nnx.Conv,
            **options,
        )

    graphdef, _ = nnx.split(nnx.eval_shape(make))
    weights = jax.jit(lambda: nnx.to_pure_dict(nnx.state(make())))()
    return nnx.merge(graphdef, weights)
