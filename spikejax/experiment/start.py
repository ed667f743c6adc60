"""Weights of another run, from which a training starts."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spikejax.experiment.trained import CARD, find, load
from spikejax.train.checkpoint import read_newest
from spikejax.train.checksum import by_path, differences, signatures

_TRAINED = nnx.Any(nnx.Param, nnx.BatchStat)


def start_from(model: nnx.Module, source: str, num_classes: int) -> list[str]:
    """Give a network the weights of another run, in place.

    Parameters and batch statistics are taken; thresholds and leaks that are not trained
    are those of the network, and the optimizer starts again. A head of another number
    of classes keeps its own weights.

    Args:
        model: network that gets them.
        source: folder of a finished run, or of one with a checkpoint, or a name of
            ``pretrained``. Weights are those of the last step, averaged if the run
            keeps an average (``ema``).
        num_classes: logits of ``model``.

    Returns:
        the paths of the leaves of the head that keep their own weights.

    Raises:
        ValueError: there is no such run, or a weight does not fit, which is named.
    """
    params, rest = _weights(source)
    state = nnx.state(model, _TRAINED)
    expected = _leaves(state)
    given = params | {path: rest[path] for path in expected if path in rest}

    def is_head(path: str) -> bool:  # its leaves end with an axis of the classes
        old, new = given[path].shape, expected[path].shape
        return old != new and (*old[:-1], num_classes) == new

    fresh = [path for path in expected if path in given and is_head(path)]
    kept = {path: leaf for path, leaf in expected.items() if path not in fresh}
    for path in fresh:
        del given[path]
    if different := differences(signatures(given), signatures(kept)):
        raise ValueError(
            f"from: expected weights that fit the network, got those of {source}: "
            f"{different}. Take the flags of its network, which its config.json has."
        )
    leaves, structure = jax.tree.flatten(state)
    pairs = zip(expected, leaves, strict=True)
    new = [jnp.asarray(given.get(path, leaf)) for path, leaf in pairs]
    nnx.update(model, jax.tree.unflatten(structure, new))
    return fresh


def _leaves(state: nnx.State) -> dict[str, Any]:
    return by_path(nnx.to_pure_dict(state))


def _weights(source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parameters of a run, and all else that its network holds, by path."""
    folder = find(source)
    if (folder / CARD).exists():
        params, rest = nnx.state(load(folder).model, nnx.Param, ...)
        return _leaves(params), _leaves(rest)
    saved = read_newest(folder / "checkpoints")  # where ``fit`` saves them
    if not saved:
        raise ValueError(
            f"from: expected the folder of a finished run, or of one with an intact "
            f"checkpoint, got {source}."
        )
    parts: dict[str, dict[str, Any]] = {"params": {}, "rest": {}}
    for path, leaf in saved.items():
        part, _, name = path.partition("/")
        parts.setdefault(part, {})[name] = leaf
    return parts.get("ema") or parts["params"], parts["rest"]
