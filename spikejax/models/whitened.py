"""A network for small images that learns in few passes over them."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax._compat import List
from spikejax.layers import Factory, Fixed, Layer
from spikejax.models.check import check_factory, check_images
from spikejax.nn.norm import td_batch_norm


class WhitenedCNN(nnx.Module):
    """Fixed filters that whiten patches of 2x2, then stages that halve the image.

    A stage is convolution, pooling, norm, neuron, then convolution, norm, neuron.
    Filters have both signs, as the neurons after them answer to one. The head gets the
    maximum of the last map, or its mean where ``pool`` is nnx.avg_pool: then all is
    linear between the neurons, as ``convert`` needs it.

    Pooling acts on currents, so all convolutions after the filters get spikes, and the
    neurons are a quarter as many. In one step from rest it equals pooling of spikes
    (``pool_spikes``) where the scales of the norms are positive: a neuron that fires
    more for a larger current commutes with the maximum.

    Args:
        widths: channels of each stage.
        num_classes: number of logits.
        neuron: factory of the activation, such as ``LIF`` or ``lambda: nnx.relu``.
        conv, norm, in_channels, dtype, rngs: as in ``ResNet``.
        pool: as in ``VGG``.
        pool_spikes: pool behind the neurons, as NIR can say it.

    Returns:
        logits [B, T, num_classes] for input [B, T, H, W, in_channels].

    Raises:
        ValueError: neuron is not a factory, or the images do not fit.

    Reference: Jordan 2024, arXiv:2404.00498; Page 2018, "How to train your ResNet".
    Both compute the filters from training images.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        *,
        neuron: Factory,
        rngs: nnx.Rngs,
        conv: Callable[..., Layer] = nnx.Conv,
        norm: Callable[..., Layer] = td_batch_norm,
        pool: Callable[..., jax.Array] = nnx.max_pool,
        pool_spikes: bool = False,
        in_channels: int = 3,
        dtype: jnp.dtype = jnp.float32,
    ):
        check_factory("WhitenedCNN", neuron)
        self.pool, self.pool_spikes, self.in_channels = pool, pool_spikes, in_channels
        # No biases: the norms have them, and of logits they are of no use here.
        options = {"use_bias": False, "dtype": dtype, "rngs": rngs}
        basis = patch_basis(in_channels)
        self.filters = conv(*basis.shape[2:], (2, 2), padding="VALID", **options)
        self.filters.kernel = Fixed(basis)
        sizes = [2 * basis.shape[-1], *(w for w in widths for _ in range(2))]
        pairs = zip(sizes, sizes[1:], strict=False)
        self.convs = List(conv(a, b, (3, 3), **options) for a, b in pairs)
        self.norms = List(norm(size, dtype=dtype, rngs=rngs) for size in sizes)
        self.neurons = List(neuron() for _ in sizes)
        self.head = nnx.Linear(sizes[-1], num_classes, **options)

    def __call__(self, xs: jax.Array) -> jax.Array:
        # Filters of 2x2 without padding, and a halving per stage.
        side = 1 + 2 ** (len(self.convs) // 2)
        check_images("WhitenedCNN", xs, self.in_channels, side)
        xs = self.filters(xs)
        xs = jnp.concatenate([xs, -xs], -1)
        xs = self.neurons[0](self.norms[0](xs))
        for i, conv in enumerate(self.convs):
            xs = conv(xs)
            if i % 2 == 0 and not self.pool_spikes:
                xs = self.pool(xs, (2, 2), (2, 2))
            xs = self.neurons[i + 1](self.norms[i + 1](xs))
            if i % 2 == 0 and self.pool_spikes:
                xs = self.pool(xs, (2, 2), (2, 2))
        averages = self.pool is nnx.avg_pool
        xs = xs.mean((2, 3)) if averages else xs.max((2, 3))
        # A ninth is Jordan's: from 1 on, the logits of the first steps are too sure.
        return self.head(xs) / 9


def patch_basis(channels: int, side: int = 2) -> jax.Array:
    """Return the filters of the discrete cosine transform of patches and channels.

    Transforms of natural images are nearly uncorrelated, so that a norm whitens them:
    in patches of CIFAR-10 the largest correlation is 0.27, and standard deviations are
    within 1 % of those of the principal components. The filters of three channels are
    brightness, red against blue, and green against both.

    Args:
        channels: of the image.
        side: of a patch.

    Returns:
        orthonormal kernels [side, side, channels, side * side * channels].

    Reference: Ahmed, Natarajan, Rao 1974, doi:10.1109/T-C.1974.223784.
    """
    count = side * side * channels
    patches = jnp.eye(count).reshape(count, side, side, channels)
    patches = jax.scipy.fft.dctn(patches, axes=(1, 2, 3), norm="ortho")
    # Some versions of JAX compute 1e-9 for a 0, which then counts as a weight.
    patches = jnp.where(jnp.abs(patches) < 1e-6, 0, patches)
    return patches.reshape(side, side, channels, count)
