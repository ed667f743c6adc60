"""The few names that differ between the supported versions of Flax."""

from collections.abc import Iterator
from typing import Any

from flax import nnx

# Flax 0.12 refuses plain lists of modules, Flax 0.11 has no other.
List: Any = getattr(nnx, "List", list)


def iter_modules(model: nnx.Module) -> Iterator[tuple[tuple, nnx.Module]]:
    """Yield (path, module) for the modules in a model, the model with path () last.

    Flax 0.11 has this as a method only, Flax 0.12 deprecates that method.
    """
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            yield path, node
