"""Networks by name, spiking or not by the factory ``neuron`` that they are given."""

from collections.abc import Callable
from functools import partial

from spikejax.models import efficientnet, general, resnet, spikformer, vgg, whitened
from spikejax.models.spikformer import e_spikeformer, qkformer, sdt
from spikejax.models.transformer import Design, Transformer

# Depths and channels of the spiking transformers, by which the authors name them: with
# num_classes and rngs alone they are the papers'. The first of a family are for CIFAR.
_spikformer = partial(spikformer.spikformer, halve=(0, 1, 2, 3), bias=False)
_DESIGNS: dict[str, Design] = {
    "spikformer-4-256": spikformer.spikformer(256, 4, heads=8),
    "spikformer-2-384": spikformer.spikformer(384, 2, heads=12),
    "spikformer-4-384": spikformer.spikformer(384, 4, heads=12),
    "spikformer-8-384": _spikformer(384, 8, heads=6),
    "spikformer-8-512": _spikformer(512, 8, heads=8),
    "spikformer-8-768": _spikformer(768, 8, heads=12),
    "sdt-2-256": sdt(256, 2, halve=(2, 3)),
    "sdt-2-512": sdt(512, 2, halve=(2, 3)),
    "sdt-8-384": sdt(384, 8),
    "sdt-6-512": sdt(512, 6),
    "sdt-8-512": sdt(512, 8),
    "sdt-10-512": sdt(512, 10),
    "sdt-8-768": sdt(768, 8),
    "qkformer-4-384": qkformer(384, (1, 1, 2), heads=8),
    "qkformer-10-384": qkformer(384, (1, 2, 7), heads=6, imagenet=True),
    "qkformer-10-512": qkformer(512, (1, 2, 7), heads=8, imagenet=True),
    "qkformer-10-768": qkformer(768, (1, 2, 7), heads=12, imagenet=True),
    "e-spikeformer-3m": e_spikeformer((24, 48, 96, 128)),
    "e-spikeformer-5m": e_spikeformer((32, 64, 128, 192)),
    "e-spikeformer-10m": e_spikeformer((48, 96, 192, 240)),
    "e-spikeformer-19m": e_spikeformer((64, 128, 256, 360)),
    "transformer-small": spikformer.small(),
}

MODELS: dict[str, Callable] = {
    "convnet": partial(vgg.VGG, (16, vgg.POOL, 32, 32)),
    "vgg11": vgg.vgg11,
    "vgg16": vgg.vgg16,
    "vggsnn": vgg.vggsnn,
    "plifnet": vgg.plif_net,
    "eventnet": partial(vgg.VGG, (16, vgg.POOL, 32, vgg.POOL, 64, vgg.POOL, 64)),
    "whitened": partial(whitened.WhitenedCNN, (64, 256, 256)),
    "whitened-small": partial(whitened.WhitenedCNN, (32, 128, 128)),
    "resnet18": resnet.cifar_resnet18,
    "resnet19": resnet.resnet19,
    "resnet20": resnet.resnet20,
    "resnet18-imagenet": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
    "resnet101": resnet.resnet101,
    "resnet152": resnet.resnet152,
    **{f"efficientnet-lite{k}": make for k, make in enumerate(efficientnet.LITE)},
    "general-cnn": general.cnn,
    "general-lstm": general.lstm,
    "general-plain": general.plain,
    **{name: partial(Transformer, design) for name, design in _DESIGNS.items()},
}
"""Networks by name, called with num_classes and rngs, most of them with neuron too."""
