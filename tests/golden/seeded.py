"""Weights of a residual network from a seed, the same here and in the tests."""

import math

import numpy as np


def weights(names, shapes, seed):
    """{name: array} for the names and shapes of a state dict of torch.

    Scaled so that about a fifth of the neurons of a SEW network fire.
    """
    made = {}
    for k, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        rng = np.random.default_rng([seed, k])
        if len(shape) > 1:  # convolutions and the linear layer
            made[name] = rng.normal(0, math.prod(shape[1:]) ** -0.5, shape)
        elif name.endswith("running_var"):
            made[name] = rng.uniform(0.5, 1.5, shape)
        elif name.endswith("weight"):
            made[name] = rng.uniform(1.0, 2.0, shape)
        else:  # biases and running means
            made[name] = rng.normal(0.3 if name.endswith("bias") else 0, 0.2, shape)
    return {name: array.astype(np.float32) for name, array in made.items()}


def images(seed):
    """Input [B, T, C, H, W], the same image at every step."""
    image = np.random.default_rng([seed, 10**6]).normal(0, 1, (1, 1, 3, 32, 32))
    return np.repeat(image, 4, 1).astype(np.float32)
