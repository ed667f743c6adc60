"""One name, one behaviour, in every supported version of Flax."""

import jax.numpy as jnp
from flax import nnx

from spikejax._compat import List, iter_modules


class Stack(nnx.Module):
    def __init__(self, rngs):
        self.blocks = List([nnx.Linear(2, 2, rngs=rngs) for _ in range(3)])
        self.head = nnx.Linear(2, 1, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_a_list_holds_modules_whose_parameters_are_found():
    model = Stack(nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert set(params["blocks"]) == {0, 1, 2}
    assert model(jnp.ones((4, 2))).shape == (4, 1)


def test_iter_modules_finds_every_module_by_its_path():
    model = Stack(nnx.Rngs(0))
    found = dict(iter_modules(model))
    assert found[("blocks", 2)] is model.blocks[2]
    assert found[("head",)] is model.head
    assert found[()] is model
