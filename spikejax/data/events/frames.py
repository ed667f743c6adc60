"""Frames of events [T, H, W, C], and their augmentation in batches.

Counts by number or by duration of events, voxel grids, time surfaces. The events are of
``spikejax.data.events.recordings.read``.
"""

from collections.abc import Callable, Iterator

import numpy as np

from spikejax.data.augment import Augment
from spikejax.data.events.recordings import Size

# (events, size, time_steps) -> [T, H, W, C]
ToFrames = Callable[[np.ndarray, Size, int], np.ndarray]


def by_number(events: np.ndarray, size: Size, time_steps: int) -> np.ndarray:
    """Counts in T frames of as many events each: event n of N is in frame n T // N.

    Args:
        events: array of recordings.EVENTS, which may be empty.
        size: (height, width) of the camera.
        time_steps: T >= 1.

    Returns:
        counts uint8 [T, H, W, 2], at most 255; the channels are OFF and ON.
    """
    _check("by_number", events, size, time_steps)
    order = np.arange(len(events)) * time_steps // max(1, len(events))
    return _counts(order, events, size, time_steps)


def by_duration(
    events: np.ndarray,
    size: Size,
    time_steps: int,
    *,
    span: tuple[int, int] | None = None,
) -> np.ndarray:
    """Counts in T frames of the same duration: t is in (t - start) T // (stop - start).

    Args:
        events, size, time_steps: as of by_number.
        span: (start, stop) in microseconds with start <= t < stop; None is from the
            first event to the last.

    Returns:
        counts uint8 [T, H, W, 2], as of by_number.
    """
    _check("by_duration", events, size, time_steps)
    order = _parts(events, time_steps, span)
    return _counts(order, events, size, time_steps)


def voxel_grid(events: np.ndarray, size: Size, time_steps: int) -> np.ndarray:
    """Polarities spread over the two nearest of T points in time.

    V_k = sum_i p_i max(0, 1 - |k - t*_i|),  t*_i = T (t_i - t_0) / (t_last - t_0)

    Args:
        events, size, time_steps: as of by_number.

    Returns:
        float32 [T, H, W, 1], with p = -1 or 1.

    Reference: Zhu et al. 2019, arXiv:1812.08156, with T - 1 in place of T; this is as
    in Tonic.
    """
    _check("voxel_grid", events, size, time_steps)
    grid = np.zeros((time_steps + 2) * size[0] * size[1])
    if len(events):
        since = (events["t"] - events["t"][0]).astype(np.float64)
        when = time_steps * since / max(1.0, since[-1])
        left = when.astype(np.int64)
        weight = when - left
        sign = np.where(events["p"], 1.0, -1.0)
        pixels = events["y"].astype(np.int64) * size[1] + events["x"]
        at = left * size[0] * size[1] + pixels
        grid += np.bincount(at, sign * (1 - weight), len(grid))
        grid += np.bincount(at + size[0] * size[1], sign * weight, len(grid))
    grid = grid.reshape(time_steps + 2, *size, 1)
    return grid[:time_steps].astype(np.float32)


def time_surface(events: np.ndarray, size: Size, time_steps: int) -> np.ndarray:
    """How long ago each pixel changed, at the end of each of T equal parts.

    S_k = exp(-(t_k - t_last) / tau),  0 where there was no event yet

    tau is the duration of one part: our choice.

    Args:
        events, size, time_steps: as of by_number.

    Returns:
        float32 [T, H, W, 2] in 0..1; the channels are OFF and ON.

    Reference: Lagorce et al. 2017, HOTS, doi:10.1109/TPAMI.2016.2574707, where a
    surface is of the neighbourhood of each event.
    """
    _check("time_surface", events, size, time_steps)
    surfaces = np.zeros((time_steps, *size, 2), np.float32)
    if not len(events):
        return surfaces
    order = _parts(events, time_steps, None)
    start, stop = int(events["t"][0]), int(events["t"][-1]) + 1
    part = (stop - start) / time_steps
    last = np.full((*size, 2), -np.inf)
    for k in range(time_steps):
        now = events[order == k]
        # Of several events at a place, numpy keeps the last.
        last[now["y"], now["x"], now["p"].astype(int)] = now["t"]
        surfaces[k] = np.exp((last - (start + (k + 1) * part)) / part)
    return surfaces


def windows(events: np.ndarray, duration: int) -> Iterator[np.ndarray]:
    """The events of one duration (in microseconds) after the other; some may be empty.

    The first begins with the first event, and a part at the end that is shorter is left
    out.
    """
    if duration < 1:
        raise ValueError(
            f"windows: expected a duration of at least 1 us, got {duration}. "
            "Take 25000."
        )
    t = events["t"]
    count = (int(t[-1]) + 1 - int(t[0])) // duration if len(t) else 0
    edges = np.searchsorted(t, t[0] + np.arange(count + 1) * duration) if count else []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        yield events[start:stop]


def resized(events: np.ndarray, size: Size, to: Size) -> np.ndarray:
    """The events as a coarser camera would see them: x W' // W, and so y."""
    if not (0 < to[0] <= size[0] and 0 < to[1] <= size[1]):
        raise ValueError(
            f"resized: expected a size up to that of the camera, {size}, got {to}. "
            "Take a smaller one."
        )
    out = events.copy()
    out["y"] = events["y"].astype(np.int64) * to[0] // size[0]
    out["x"] = events["x"].astype(np.int64) * to[1] // size[1]
    return out


def _check(who: str, events: np.ndarray, size: Size, time_steps: int) -> None:
    if time_steps < 1:
        raise ValueError(f"{who}: expected time_steps >= 1, got {time_steps}.")
    if size is None:
        raise ValueError(
            f"{who}: expected the camera's (height, width), got None, as the file does "
            "not say. Give that of its data sheet."
        )
    y, x = events["y"], events["x"]
    if len(events) and not (
        min(y.min(), x.min()) >= 0 and y.max() < size[0] and x.max() < size[1]
    ):
        raise ValueError(
            f"{who}: expected events of a camera of (height, width) {size}, got x up "
            f"to {x.max()} and y up to {y.max()}. Give the camera's size."
        )


def _parts(events, time_steps, span):
    """The number of the equal part of the span in which each event is."""
    if not len(events):
        return np.empty(0, np.int64)
    first, last = int(events["t"][0]), int(events["t"][-1])
    start, stop = span or (first, last + 1)
    if not start <= first <= last < stop:
        raise ValueError(
            f"by_duration: expected events in the span {start} <= t < {stop} us, got "
            f"{first} to {last}. Cut them first."
        )
    return (events["t"] - start) * time_steps // (stop - start)


def _counts(order, events, size, time_steps) -> np.ndarray:
    shape = (time_steps, *size, 2)
    place = order, events["y"], events["x"], events["p"].astype(np.int64)
    at = np.ravel_multi_index(place, shape)
    counts = np.bincount(at, minlength=int(np.prod(shape)))
    return np.minimum(counts, 255).astype(np.uint8).reshape(shape)


def flip() -> Augment:
    """Mirrors each recording left to right with probability one half.

    It and the others here take frames [B, T, H, W, C] and do the same at every step.
    """

    def augment(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        flipped = rng.random(len(frames)) < 0.5
        out = frames.copy()
        out[flipped] = frames[flipped, ..., ::-1, :]
        return out

    return augment


def roll(pixels: int) -> Augment:
    """Shifts each recording by -pixels to pixels along both axes; what leaves is lost.

    Reference: Deng et al. 2022, arXiv:2202.11946 (5 of 48 pixels; there what leaves
    comes back on the other side).
    """
    if pixels < 0:
        raise ValueError(f"roll: expected pixels >= 0, got {pixels}. Take 5.")

    def augment(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        count, _, height, width, _ = frames.shape
        if pixels >= min(height, width):
            raise ValueError(
                f"roll: expected pixels below the side of the frames {height}x{width}, "
                f"got {pixels}. Take 5."
            )
        shifts = rng.integers(-pixels, pixels + 1, (count, 2))
        out = np.zeros_like(frames)
        for i, (y, x) in enumerate(shifts.tolist()):
            shifted = frames[i, :, max(0, -y) : height - y, max(0, -x) : width - x]
            out[i, :, max(0, y) : height + y, max(0, x) : width + x] = shifted
        return out

    return augment


def drop(probability: float) -> Augment:
    """Loses each event with a probability drawn from 0..probability for its recording.

    A count n becomes Binomial(n, 1 - p): as if the events had been lost before they
    were counted by duration.

    Reference: random drop of EventDrop, Gu et al. 2021, arXiv:2106.05836.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"drop: expected 0 <= probability <= 1, got {probability}.")

    def augment(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        _check_counts("drop", frames)
        keep = 1 - rng.uniform(0, probability, len(frames))
        out = frames.copy()
        at = np.nonzero(frames)  # few pixels see events
        out[at] = rng.binomial(frames[at], keep[at[0]])
        return out

    return augment


def noise(rate: float) -> Augment:
    """Adds events without an edge: Poisson(rate) for each pixel, frame and polarity."""
    if not rate >= 0:
        raise ValueError(f"noise: expected a rate >= 0, got {rate}. Take 0.01.")

    def augment(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        _check_counts("noise", frames)
        flat = frames.reshape(-1).astype(np.int64)
        # So many events at places of their own: the same, and quicker.
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
