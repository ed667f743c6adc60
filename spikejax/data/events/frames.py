"""Frames of events [T, H, W, C], and their augmentation in batches.

Counts by number or by duration of events, voxel grids, time surfaces. The events are
those of ``spikejax.data.events.recordings.read``.
"""

from collections.abc import Callable, Iterator

import numpy as np

from spikejax.data.augment import Augment
from spikejax.data.events.recordings import Size

# (events, size, time_steps) -> [T, H, W, C]
ToFrames = Callable[[np.ndarray, Size, int], np.ndarray]


def by_number(events: np.ndarray, size: Size, time_steps: int) -> np.ndarray:
    """Count events in T frames of equal numbers: event n of N is in frame n T // N.

    Args:
        events: array of recordings.EVENTS, which can be empty.
        size: (height, width) of the camera.
        time_steps: T >= 1.

    Returns:
        counts uint8 [T, H, W, 2], at most 255; the channels are OFF and ON.

    Raises:
        ValueError: no time steps, no size, or events outside it.
    """
    _check("by_number", events, size, time_steps)
    frame = np.arange(len(events)) * time_steps // max(1, len(events))
    return _counts(frame, events, size, time_steps)


def by_duration(
    events: np.ndarray,
    size: Size,
    time_steps: int,
    *,
    span: tuple[int, int] | None = None,
) -> np.ndarray:
    """Count events in T frames of equal duration.

    The event at t is in frame (t - start) T // (stop - start).

    Args:
        events, size, time_steps: see by_number.
        span: (start, stop) in microseconds with start <= t < stop; None is from the
            first event to the last.

    Returns:
        counts uint8 [T, H, W, 2], see by_number.

    Raises:
        ValueError: as by_number, or events outside the span.
    """
    _check("by_duration", events, size, time_steps)
    return _counts(_parts(events, time_steps, span), events, size, time_steps)


def voxel_grid(events: np.ndarray, size: Size, time_steps: int) -> np.ndarray:
    """Spread each polarity over the two nearest of T points in time.

    V_k = sum_i p_i max(0, 1 - |k - t*_i|),  t*_i = T (t_i - t_0) / (t_last - t_0)

    Args:
        events, size, time_steps: see by_number.

    Returns:
        float32 [T, H, W, 1], with p = -1 or 1.

    Raises:
        ValueError: as by_number.

    Reference: Zhu et al. 2019, arXiv:1812.08156, with T - 1 in place of T; T as in
    Tonic.
    """
    _check("voxel_grid", events, size, time_steps)
    area = size[0] * size[1]
    grid = np.zeros((time_steps + 2) * area)  # the last event is at T, which is cut off
    if len(events):
        since = (events["t"] - events["t"][0]).astype(np.float64)
        when = time_steps * since / max(1.0, since[-1])
        left = when.astype(np.int64)
        sign = np.where(events["p"], 1.0, -1.0)
        at = left * area + events["y"].astype(np.int64) * size[1] + events["x"]
        # bincount adds up equal places, which an indexed += would count once.
        grid += np.bincount(at, sign * (1 - when + left), len(grid))
        grid += np.bincount(at + area, sign * (when - left), len(grid))
    grid = grid.reshape(time_steps + 2, *size, 1)
    return grid[:time_steps].astype(np.float32)


def time_surface(events: np.ndarray, size: Size, time_steps: int) -> np.ndarray:
    """Return how recently each pixel changed, at the end of each of T equal parts.

    S_k = exp(-(t_k - t_last) / tau),  0 where there was no event yet

    tau is the duration of one part: our choice.

    Args:
        events, size, time_steps: see by_number.

    Returns:
        float32 [T, H, W, 2] in 0..1; the channels are OFF and ON.

    Raises:
        ValueError: as by_number.

    Reference: Lagorce et al. 2017, HOTS, doi:10.1109/TPAMI.2016.2574707, whose surface
    is of the neighbourhood of each event.
    """
    _check("time_surface", events, size, time_steps)
    surfaces = np.zeros((time_steps, *size, 2), np.float32)
    if not len(events):
        return surfaces
    parts = _parts(events, time_steps, None)
    start, stop = int(events["t"][0]), int(events["t"][-1]) + 1
    tau = (stop - start) / time_steps
    last = np.full((*size, 2), -np.inf)
    for k in range(time_steps):
        now = events[parts == k]
        # Of several events at one place, numpy keeps the last.
        last[now["y"], now["x"], now["p"].astype(int)] = now["t"]
        surfaces[k] = np.exp((last - (start + (k + 1) * tau)) / tau)
    return surfaces


def windows(events: np.ndarray, duration: int) -> Iterator[np.ndarray]:
    """Yield the events of consecutive windows, some of which can be empty.

    The first window begins with the first event; a shorter rest at the end is dropped.

    Args:
        events: array of recordings.EVENTS.
        duration: microseconds per window, >= 1.
    """
    t = events["t"]
    count = (int(t[-1]) + 1 - int(t[0])) // duration if len(t) else 0
    # Searched in sorted times: a comparison per window would read all events each time.
    edges = np.searchsorted(t, t[:1] + np.arange(count + 1) * duration) if count else []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        yield events[start:stop]


def resized(events: np.ndarray, size: Size, to: Size) -> np.ndarray:
    """Return the events that a coarser camera would see: x W' // W, and y likewise.

    Args:
        events: array of recordings.EVENTS.
        size: (height, width) of the camera.
        to: (height, width) of the coarser one.

    Raises:
        ValueError: the new size is not within the camera's.
    """
    # A finer one would leave rows and columns of pixels without any event.
    if not (0 < to[0] <= size[0] and 0 < to[1] <= size[1]):
        raise ValueError(
            f"resized: expected a size within the camera's {size}, got {to}. "
            "Take a smaller one."
        )
    out = events.copy()
    out["y"] = events["y"].astype(np.int64) * to[0] // size[0]
    out["x"] = events["x"].astype(np.int64) * to[1] // size[1]
    return out


def _check(who: str, events: np.ndarray, size: Size | None, time_steps: int) -> None:
    x, y = int(events["x"].max(initial=0)), int(events["y"].max(initial=0))
    below = len(events) and min(events["x"].min(), events["y"].min()) < 0
    if time_steps < 1 or size is None or below or y >= size[0] or x >= size[1]:
        raise ValueError(
            f"{who}: expected time_steps >= 1 and events inside a camera of (height, "
            f"width), got {time_steps} and x up to {x}, y up to {y} for {size}. Give "
            "the camera's size; some files do not have it."
        )


def _parts(
    events: np.ndarray, time_steps: int, span: tuple[int, int] | None
) -> np.ndarray:
    """Return the index of the equal part of the span that each event is in."""
    if not len(events):
        return np.empty(0, np.int64)
    start, stop = span or (int(events["t"][0]), int(events["t"][-1]) + 1)
    return (events["t"] - start) * time_steps // (stop - start)


def _counts(
    frame: np.ndarray, events: np.ndarray, size: Size, time_steps: int
) -> np.ndarray:
    shape = (time_steps, *size, 2)
    place = frame, events["y"], events["x"], events["p"].astype(np.int64)
    # A ValueError for events outside of their span.
    at = np.ravel_multi_index(place, shape)
    counts = np.bincount(at, minlength=int(np.prod(shape)))
    # A hot pixel stays at 255: a wrapped count would look like few events.
    return np.minimum(counts, 255).astype(np.uint8).reshape(shape)


def flip() -> Augment:
    """Mirror each recording left to right with probability one half.

    This and the other augmentations here take frames [B, T, H, W, C] and do the same at
    every step.
    """

    def augment(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        flipped = rng.random(len(frames)) < 0.5
        out = frames.copy()
        out[flipped] = frames[flipped, ..., ::-1, :]
        return out

    return augment


def roll(pixels: int) -> Augment:
    """Shift each recording by -pixels to pixels along both axes; the border is black.

    Args:
        pixels: largest shift, 0 to the side of the frames - 1.

    Reference: Deng et al. 2022, arXiv:2202.11946 (5 of 48 pixels), who shift in a
    circle.
    """

    def augment(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        count, _, height, width, _ = frames.shape
        shifts = rng.integers(-pixels, pixels + 1, (count, 2))
        out = np.zeros_like(frames)
        for i, (y, x) in enumerate(shifts.tolist()):
            shifted = frames[i, :, max(0, -y) : height - y, max(0, -x) : width - x]
            out[i, :, max(0, y) : height + y, max(0, x) : width + x] = shifted
        return out

    return augment


def drop(probability: float) -> Augment:
    """Lose each event with a probability drawn from 0..probability per recording.

    A count n becomes Binomial(n, 1 - p), as if the events had been lost before they
    were counted by duration.

    Args:
        probability: largest probability, 0 to 1.

    Reference: random drop of EventDrop, Gu et al. 2021, arXiv:2106.05836.
    """

    def augment(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        _check_counts("drop", frames)
        keep = 1 - rng.uniform(0, probability, len(frames))
        out = frames.copy()
        at = np.nonzero(frames)  # few pixels have events, and each draw costs
        out[at] = rng.binomial(frames[at], keep[at[0]])
        return out

    return augment


def noise(rate: float) -> Augment:
    """Add events everywhere: Poisson(rate) for each pixel, frame and polarity.

    Args:
        rate: mean number of events, >= 0.
    """

    def augment(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        _check_counts("noise", frames)
        flat = frames.reshape(-1).astype(np.int64)
        # A Poisson total at uniform places has the same distribution, and is faster.
        places = rng.integers(0, flat.size, rng.poisson(rate * flat.size))
        flat += np.bincount(places, minlength=flat.size)
        return np.minimum(flat, 255).astype(np.uint8).reshape(frames.shape)

    return augment


def _check_counts(who: str, frames: np.ndarray) -> None:
    if frames.dtype != np.uint8:
        raise ValueError(
            f"{who}: expected counts of events, uint8, got {frames.dtype}. Leave it "
            "out for voxel grids and time surfaces."
        )
