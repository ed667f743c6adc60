"""Answers of a network to a recording while it runs, frame by frame, with latency."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spikejax.layers import Membrane, keep_membranes


class Answer(NamedTuple):
    """Logits [K] of one time step, and the seconds from its frame to them."""

    logits: np.ndarray
    seconds: float


def live(
    model: nnx.Module, frames: Iterable[np.ndarray], encode: Callable
) -> Iterator[Answer]:
    """Feed a network one frame after the other; its membranes go on between them.

    The network is compiled before the first frame counts. Together the answers are the
    logits of one long sequence.

    Args:
        model: takes xs [B, T, ...], returns logits [B, T, K]; stays as it is.
        frames: of one shape [H, W, C], each as it comes.
        encode: (frames [1, 1, H, W, C], rng) -> xs, as in training.
    """
    model = keep_membranes(nnx.clone(model))
    model.eval()
    graphdef, membranes, rest = nnx.split(model, Membrane, ...)

    @jax.jit
    def step(membranes, frame):
        model = nnx.merge(graphdef, membranes, rest)
        logits = model(encode(frame[None, None], jax.random.key(0)))
        return nnx.state(model, Membrane), logits[0, 0]

    ready = False
    for frame in frames:
        if np.ndim(frame) != 3:
            raise ValueError(
                f"live: expected frames [H, W, C], got {np.shape(frame)}. Of frames "
                "with time take one: frames.by_number(part, size, 1)[0]."
            )
        if not ready:  # from here on the membranes have their shape: it compiles once
            shapes, _ = jax.eval_shape(step, membranes, frame)
            membranes = jax.tree.map(
                lambda v, a: jnp.broadcast_to(v, a.shape), membranes, shapes
            )
            jax.block_until_ready(step(membranes, frame))
            ready = True
        began = time.perf_counter()
        membranes, logits = step(membranes, frame)
        logits = np.asarray(logits)
        yield Answer(logits, time.perf_counter() - began)
