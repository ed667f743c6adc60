"""The options of the compiler: less memory, the same numbers, known to this XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax import encode
from spikejax.layers import LIF
from spikejax.losses import rate_cross_entropy
from spikejax.models.resnet import ResNet
from spikejax.nn.compiler import CPU_OPTIONS, _accepted, compiler_options
from spikejax.train import TrainConfig, make_optimizer
from spikejax.train.step import initial_state, make_train_step


def compiled_step(options):
    """A step of a small residual network, as it is compiled with the options."""
    model = ResNet((2, 2), (4, 8), 3, neuron=LIF, rngs=nnx.Rngs(0))
    config = TrainConfig(steps=10)
    optimizer = make_optimizer(config, 10)
    state = initial_state(model, optimizer, config)
    step = make_train_step(
        nnx.graphdef(model),
        rate_cross_entropy,
        lambda images, rng: encode.direct(images, 4),
        optimizer,
    )
    images = jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
    batch = {"image": images, "label": jnp.arange(16) % 3}
    jitted = jax.jit(step, compiler_options=options)
    return jitted.lower(state, batch).compile(), state, batch


def test_options_of_the_compiler_spare_memory_and_change_nothing():
    options = compiler_options("cpu")
    accepted = [name for name, o in CPU_OPTIONS.items() if _accepted({name: o})]
    assert list(options) == accepted
    if len(accepted) < len(CPU_OPTIONS):
        pytest.skip(f"this XLA has {accepted} of {list(CPU_OPTIONS)} only")
    plain, state, batch = compiled_step({})
    spared, _, _ = compiled_step(options)

    def memory(compiled):
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(spared) < 0.7 * memory(plain)
    one, other = plain(state, batch), spared(state, batch)
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_other_platforms_and_other_compilers_have_no_options():
    assert compiler_options("tpu") == {}
    assert not _accepted({"xla_cpu_nobody_has_this": True})
    assert _accepted({"xla_disable_hlo_passes": "nobody_has_this"})
