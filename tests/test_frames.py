"""Frames of events against traces by hand and Tonic, and what augmentation does."""

import numpy as np
import pytest

from spikejax.data.augment import compose
from spikejax.data.events import frames
from spikejax.data.events.columns import EVENTS

KINDS = [frames.by_number, frames.by_duration, frames.voxel_grid, frames.time_surface]
# x, y, t, p
HAND = np.array(
    [(0, 0, 100, 1), (1, 0, 101, 0), (1, 0, 109, 0), (2, 1, 119, 1)], EVENTS
)


def made_up(count=600, size=(5, 7), last=5999, dtype=EVENTS):
    """Events from t = 0 to t = last."""
    rng = np.random.default_rng(2)
    events = np.zeros(count, dtype)
    events["y"] = rng.integers(0, size[0], count)
    events["x"] = rng.integers(0, size[1], count)
    events["t"] = np.sort(rng.integers(0, last, count))
    events["t"][[0, -1]] = 0, last
    events["p"] = rng.integers(0, 2, count)
    return events


def places(counts):
    """{(step, y, x, polarity): count} where there is one."""
    at = np.argwhere(counts)
    return {tuple(place): counts[tuple(place)] for place in at.tolist()}


# By hand


def test_by_number_by_hand():
    counts = frames.by_number(HAND, (2, 3), 2)
    assert counts.shape == (2, 2, 3, 2) and counts.dtype == np.uint8
    assert places(counts) == {
        (0, 0, 0, 1): 1,
        (0, 0, 1, 0): 1,
        (1, 0, 1, 0): 1,
        (1, 1, 2, 1): 1,
    }


def test_by_duration_by_hand():
    expected = {(0, 0, 0, 1): 1, (0, 0, 1, 0): 2, (1, 1, 2, 1): 1}
    assert places(frames.by_duration(HAND, (2, 3), 2)) == expected
    # From 90 on, 109 is in the second part of 15 us.
    counts = frames.by_duration(HAND, (2, 3), 2, span=(90, 120))
    expected = {(0, 0, 0, 1): 1, (0, 0, 1, 0): 1, (1, 0, 1, 0): 1, (1, 1, 2, 1): 1}
    assert places(counts) == expected


def test_voxel_grid_by_hand():
    grid = frames.voxel_grid(HAND, (2, 3), 2)[..., 0]
    share = 2 / 19  # of each microsecond, in parts
    expected = np.zeros((2, 2, 3))
    expected[0, 0, 0] = 1
    expected[0, 0, 1] = -(1 - share) - (1 - 9 * share)
    expected[1, 0, 1] = -share - 9 * share
    assert np.allclose(grid, expected)  # the last event is at point 2, which is outside


def test_time_surface_by_hand():
    surface = frames.time_surface(HAND, (2, 3), 2)
    expected = np.zeros((2, 2, 3, 2))
    for k, now in enumerate((110, 120)):
        expected[k, 0, 0, 1] = np.exp((100 - now) / 10)
        expected[k, 0, 1, 0] = np.exp((109 - now) / 10)
    expected[1, 1, 2, 1] = np.exp((119 - 120) / 10)
    assert np.allclose(surface, expected)


@pytest.mark.parametrize("kind", [frames.by_number, frames.by_duration])
def test_every_event_is_counted_once(kind):
    events = made_up(601)
    counts = kind(events, (5, 7), 4)
    assert counts.sum() == 601
    assert np.array_equal(
        counts.sum(0), frames.by_number(events, (5, 7), 1)[0].astype(int)
    )


def test_a_hot_pixel_does_not_run_over():
    events = np.zeros(700, EVENTS)
    assert frames.by_number(events, (1, 1), 1).tolist() == [[[[255, 0]]]]


@pytest.mark.parametrize("kind", KINDS)
def test_no_events_and_one_event_have_frames(kind):
    assert not kind(np.zeros(0, EVENTS), (2, 3), 4).any()
    one = kind(HAND[:1], (2, 3), 4)
    assert one.shape[:3] == (4, 2, 3) and np.isfinite(one).all() and one.any()


# Tonic says the same


def test_counts_are_tonics():
    tonic = pytest.importorskip("tonic.transforms")
    events = made_up()
    for option, kind in (
        ({"event_count": 150}, frames.by_number),
        ({"time_window": 1500}, frames.by_duration),
    ):
        to_frame = tonic.ToFrame(
            sensor_size=(7, 5, 2), include_incomplete=True, **option
        )
        expected = to_frame(events).transpose(0, 2, 3, 1)
        assert np.array_equal(kind(events, (5, 7), 4), expected[:4])
        assert not expected[4:].any()


def test_voxel_grid_is_tonics():
    function = pytest.importorskip("tonic.functional")
    # Of booleans, Tonic 1.7 makes no -1.
    whole = np.dtype([("x", int), ("y", int), ("t", int), ("p", int)])
    expected = function.to_voxel_grid_numpy(made_up(dtype=whole), (7, 5, 2), 4)
    grid = frames.voxel_grid(made_up(), (5, 7), 4)
    assert np.allclose(grid, expected.transpose(0, 2, 3, 1), atol=1e-5)


def test_time_surface_is_tonics():
    function = pytest.importorskip("tonic.functional")
    events = made_up(last=5999)
    expected = function.to_timesurface_numpy(
        events, (7, 5, 2), dt=1500, tau=1500, include_incomplete=True
    )[:4]
    surface = frames.time_surface(events, (5, 7), 4)
    assert np.allclose(surface, expected.transpose(0, 2, 3, 1), atol=1e-6)


# Cutting


def test_windows_are_of_one_duration():
    parts = list(frames.windows(HAND, 5))
    assert [part["t"].tolist() for part in parts] == [[100, 101], [109], [], [119]]
    assert [len(part) for part in frames.windows(HAND, 12)] == [3]
    assert list(frames.windows(HAND[:0], 5)) == []


def test_one_damaged_time_does_not_make_gigabytes_of_windows():
    events = made_up(100)
    events["t"][-1] = 2**38
    with pytest.raises(ValueError, match="got 2748779 of 100000 us for 100 events"):
        frames.windows(events, 100_000)


def test_a_coarser_camera_sees_the_same_events():
    events = made_up(size=(6, 8))
    coarse = frames.resized(events, (6, 8), (3, 4))
    fine = frames.by_number(events, (6, 8), 1).astype(int)
    pooled = fine.reshape(1, 3, 2, 4, 2, 2).sum((2, 4))
    assert np.array_equal(frames.by_number(coarse, (3, 4), 1), pooled)


# Augmentation


def batch(shape=(40, 3, 6, 8, 2)):
    return np.random.default_rng(0).integers(0, 4, shape).astype(np.uint8)


def run(augment, images=None, seed=0):
    images = batch() if images is None else images
    before = images.copy()
    out = augment(images, np.random.default_rng(seed))
    assert np.array_equal(images, before), "changed its argument"
    assert out.dtype == images.dtype and out.shape == images.shape
    return out


AUGMENTS = [frames.flip(), frames.roll(2), frames.drop(0.5), frames.noise(0.05)]


@pytest.mark.parametrize("augment", AUGMENTS)
def test_the_generator_decides(augment):
    assert np.array_equal(run(augment), run(augment))
    assert not np.array_equal(run(augment), run(augment, seed=1))


def test_flip_mirrors_whole_recordings():
    images, out = batch(), run(frames.flip())
    mirrored = [
        np.array_equal(o, i[:, :, ::-1]) for i, o in zip(images, out, strict=True)
    ]
    same = [np.array_equal(o, i) for i, o in zip(images, out, strict=True)]
    assert np.array_equal(np.add(mirrored, same), np.ones(40))
    assert 10 < sum(mirrored) < 30


def test_roll_shifts_and_what_leaves_is_lost():
    image = np.zeros((200, 2, 6, 8, 2), np.uint8)
    image[:, :, 1, 4, 1] = 7
    out = run(frames.roll(2), image)
    seen = set()
    for each in out:
        at = np.argwhere(each[0])
        assert np.array_equal(each[0], each[1])
        seen.add((int(at[0][0]) - 1, int(at[0][1]) - 4) if len(at) else "lost")
    shifts = {(y, x) for y in (-1, 0, 1, 2) for x in range(-2, 3)}
    assert seen == shifts | {"lost"}


def test_drop_thins_each_recording_by_its_own_part():
    images = np.full((30, 1, 50, 50, 2), 10, np.uint8)
    out = run(frames.drop(0.6), images)
    kept = out.mean((1, 2, 3, 4)) / 10
    assert kept.min() > 0.38 and kept.max() < 1 and np.ptp(kept) > 0.4
    k = kept.argmin()  # Binomial(10, kept)
    assert np.isclose(out[k].var(), 10 * kept[k] * (1 - kept[k]), rtol=0.1)
    assert not run(frames.drop(0.5), np.zeros_like(images)).any()


def test_noise_adds_poisson_counts():
    images = np.zeros((2, 1, 200, 200, 2), np.uint8)
    out = run(frames.noise(0.2), images)
    assert np.isclose(out.mean(), 0.2, rtol=0.05)
    assert np.isclose(out.var(), 0.2, rtol=0.05)
    assert (
        run(frames.noise(3.0), np.full((1, 1, 9, 9, 2), 255, np.uint8)) == 255
    ).all()


def test_augmentations_compose_with_those_of_images():
    out = run(compose(*AUGMENTS))
    assert not np.array_equal(out, batch())


# What is refused


@pytest.mark.parametrize("kind", KINDS)
def test_events_outside_and_no_steps_are_refused(kind):
    left = HAND.copy()
    left["x"][1] = -1
    for events, size, steps, text in (
        (HAND, (2, 2), 4, r"got 4 and x up to 2, y up to 1 for \(2, 2\)\. "),
        (left, (2, 3), 4, "events inside a camera"),
        (made_up(), None, 2, "for None. Give the camera's size"),
        (HAND, (2, 3), 0, "expected time_steps >= 1 .* got 0 and"),
    ):
        with pytest.raises(ValueError, match=rf"^{kind.__name__}: .*{text}"):
            kind(events, size, steps)


def test_arguments_out_of_range_are_refused():
    for make in (
        lambda: frames.resized(HAND, (2, 3), (3, 3)),
        lambda: frames.by_duration(HAND, (2, 3), 2, span=(100, 119)),
        lambda: run(frames.roll(-1)),
        lambda: run(frames.drop(2)),
        lambda: run(frames.noise(-1)),
    ):
        with pytest.raises(ValueError):
            make()


@pytest.mark.parametrize("augment", [frames.drop(0.1), frames.noise(0.1)])
def test_only_counts_can_be_thinned(augment):
    with pytest.raises(ValueError, match="uint8, got float32. Leave it out"):
        augment(batch().astype(np.float32), np.random.default_rng(0))


def test_augmentations_out_of_their_range():
    for value in (2.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="drop: expected a probability, got"):
            frames.drop(value)
    for value in (-1.0, float("nan")):
        with pytest.raises(
            ValueError, match="noise: expected a rate of 0 or more, got"
        ):
            frames.noise(value)
