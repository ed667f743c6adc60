"""Frames of events [T, H, W, C], and their augmentation in batches.

Counts by number or by duration of events, voxel grids, time surfaces. The events are
those of ``spikejax.data.events.recordings.read``.
"""

from collections.abc import Callable

import numpy as np

from spikejax.data.augment import Augment, random_crop, random_flip
from spikejax.data.events.columns import Size

# (events, size, time_steps) -> [T, H, W, C]
ToFrames = Callable[[np.ndarray, Size, int], np.ndarray]
Span = tuple[int, int]  # (start, stop) in microseconds: start <= t < stop


def by_number(events: np.ndarray, size: Size, time_steps: int) -> np.ndarray:
    """Count events in T frames of equal numbers: event n of N is in frame n T // N.

    Args:
        events: array of columns.EVENTS, which can be empty.
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
    events: np.ndarray, size: Size, time_steps: int, *, span: Span | None = None
) -> np.ndarray:
    """Count events in T frames of equal duration.

    The event at t is in frame (t - start) T // (stop - start).

    Args:
        events, size, time_steps: as in `by_number`.
        span: (start, stop) in microseconds with start <= t < stop; None is from the
            first event to the last.

    Returns:
        counts as in `by_number`.

    Raises:
        ValueError: as in `by_number`, or events outside the span.
    """
    _check("by_duration", events, size, time_steps)
    start, stop = span or _span(events)
    frame = (events["t"] - start) * time_steps // (stop - start)
    return _counts(frame, events, size, time_steps)


def voxel_grid(events: np.ndarray, size: Size, time_steps: int) -> np.ndarray:
    """Spread each polarity over the two nearest of T points in time.

    V_k = sum_i p_i max(0, 1 - |k - t*_i|),  t*_i = T (t_i - t_0) / (t_last - t_0)

    Arguments and errors are those of `by_number`.

    Returns:
        float32 [T, H, W, 1], with p = -1 or 1.

    Reference: Zhu et al. 2019, arXiv:1812.08156, with T - 1 in place of T; T as in
    Tonic.
    """
    _check("voxel_grid", events, size, time_steps)
    start, stop = _span(events)
    when = time_steps * (events["t"] - start) / max(1, stop - 1 - start)
    left = when.astype(np.int64)
    sign = np.where(events["p"], 1.0, -1.0)
    area = size[0] * size[1]
    at = left * area + events["y"].astype(np.int64) * size[1] + events["x"]
    length = (time_steps + 2) * area  # the last event is at T, which is cut off
    # bincount adds up equal places, which an indexed += would count once.
    grid = np.bincount(at, sign * (1 - when + left), length)
    grid += np.bincount(at + area, sign * (when - left), length)
    return grid.reshape(-1, *size, 1)[:time_steps].astype(np.float32)


def time_surface(events: np.ndarray, size: Size, time_steps: int) -> np.ndarray:
    """Return how recently each pixel changed, at the end of each of T equal parts.

    S_k = exp(-(t_k - t_last) / tau),  0 where there was no event yet

    tau is the duration of one part: our choice.

    Arguments and errors are those of `by_number`.

    Returns:
        float32 [T, H, W, 2] in 0..1; the channels are OFF and ON.

    Reference: Lagorce et al. 2017, HOTS, doi:10.1109/TPAMI.2016.2574707, whose surface
    is of the neighbourhood of each event.
    """
    _check("time_surface", events, size, time_steps)
    start, stop = _span(events)
    part = (events["t"] - start) * time_steps // (stop - start)
    tau = (stop - start) / time_steps
    surfaces = np.empty((time_steps, *size, 2), np.float32)
    last = np.full((*size, 2), -np.inf)
    for k in range(time_steps):
        now = events[part == k]
        # Of several events at one place, numpy keeps the last.
        last[now["y"], now["x"], now["p"].astype(int)] = now["t"]
        surfaces[k] = np.exp((last - (start + (k + 1) * tau)) / tau)
    return surfaces


def windows(events: np.ndarray, duration: int) -> list[np.ndarray]:
    """Return the events of consecutive windows, some of which can be empty.

    The first window begins with the first event; a shorter rest at the end is dropped.

    Args:
        events: array of columns.EVENTS.
        duration: microseconds per window, >= 1.

    Raises:
        ValueError: duration is below 1, or more windows than events.
    """
    if duration < 1:
        raise ValueError(f"windows: expected at least 1 us, got {duration}.")
    start, stop = _span(events)
    # A single damaged time would make gigabytes of empty windows.
    if (count := (stop - start) // duration) > max(1, len(events)):
        raise ValueError(
            f"windows: expected no more windows than events, got {count} of {duration} "
            f"us for {len(events)} events from t={start} to t={stop - 1}. Check the "
            "times, which are in microseconds, or take a longer duration."
        )
    # Searched in sorted times: a comparison per window would read all events each time.
    edges = np.searchsorted(events["t"], np.arange(start, stop + 1, duration))
    return np.split(events, edges)[1:-1]


def resized(events: np.ndarray, size: Size, to: Size) -> np.ndarray:
    """Return the events that a coarser camera would see: x W' // W, and y likewise.

    Args:
        events: array of columns.EVENTS.
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
    x, y = (int(events[axis].max(initial=0)) for axis in "xy")
    below = min(events[axis].min(initial=0) for axis in "xy") < 0
    if time_steps < 1 or size is None or below or y >= size[0] or x >= size[1]:
        raise ValueError(
            f"{who}: expected time_steps >= 1 and events inside a camera of (height, "
            f"width), got {time_steps} and x up to {x}, y up to {y} for {size}. Give "
            "the camera's size; some files do not have it."
        )


def _span(events: np.ndarray) -> Span:
    """Return the span from the first event to the last; (0, 1) if there is none."""
    t = events["t"]
    return (int(t[0]), int(t[-1]) + 1) if len(t) else (0, 1)


def _counts(
    frame: np.ndarray, events: np.ndarray, size: Size, time_steps: int
) -> np.ndarray:
    counts = np.empty((time_steps, *size, 2), np.uint8)
    place = frame, events["y"], events["x"], events["p"].astype(np.int64)
    # A ValueError for events outside of their span.
    at = np.ravel_multi_index(place, counts.shape)
    # Frame by frame: bincount takes 8 times the memory of the result.
    edges = np.searchsorted(frame, range(time_steps + 1))
    parts = np.split(at, edges)[1:-1]
    for k, part in enumerate(parts):
        found = np.bincount(part - k * counts[k].size, minlength=counts[k].size)
        # A hot pixel stays at 255: a wrapped count would look like few events.
        counts[k] = np.minimum(found, 255).reshape(counts[k].shape)
    return counts


# The augmentations take frames [B, T, H, W, C] and do the same at every step.

flip = random_flip
"""Mirror each recording left to right with probability one half."""

roll = random_crop
"""Shift each recording by -pad to pad pixels along both axes; the border is black.

Reference: Deng et al. 2022, arXiv:2202.11946 (5 of 48 pixels), who shift in a circle.
"""


def drop(probability: float) -> Augment:
    """Lose each event with a probability drawn from 0..probability per recording.

    A count n becomes Binomial(n, 1 - p), as if the events had been lost before they
    were counted by duration.

    Args:
        probability: largest probability, 0 to 1.

    Raises:
        ValueError: the probability is out of its range.

    Reference: random drop of EventDrop, Gu et al. 2021, arXiv:2106.05836.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"drop: expected a probability, got {probability}.")

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

    Raises:
        ValueError: the rate is negative.
    """
    if not rate >= 0:
        raise ValueError(f"noise: expected a rate of 0 or more, got {rate}.")

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
