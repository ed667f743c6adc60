"""Networks by name, spiking or not by the factory ``neuron`` that they are given."""

from collections.abc import Callable
from functools import partial

from spikejax.models import efficientnet, general, resnet, vgg, whitened

MODELS: dict[str, Callable] = {
    "convnet": partial(vgg.VGG, (16, vgg.POOL, 32, 32)),
    "vgg11": vgg.vgg11,
    "vgg16": vgg.vgg16,
    "vggsnn": vgg.vggsnn,
    "plifnet": vgg.plif_net,
    "eventnet": partial(vgg.VGG, (16, vgg.POOL, 32, vgg.POOL, 64, vgg.POOL, 64)),
    "whitened": partial(whitened.WhitenedCNN, (64, 256, 256)),
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
}
