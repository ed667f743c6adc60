"""Streams: frame by frame is the whole sequence."""

import jax
import numpy as np
import pytest
from flax import nnx

from spikejax.layers import LIF, MultiThreshold, neuron_layers
from spikejax.live import live
from spikejax.models import vgg


def encode(raw, rng):
    return raw.astype(np.float32)


@pytest.fixture(scope="module", params=[LIF, lambda: MultiThreshold(2)])
def model(request):
    plan = (4, vgg.POOL, 4)
    model = vgg.VGG(plan, 3, neuron=request.param, in_channels=2, rngs=nnx.Rngs(0))
    model.eval()
    return model


FRAMES = np.random.default_rng(0).integers(0, 5, (6, 8, 8, 2)).astype(np.uint8)


def test_frame_by_frame_is_the_whole_sequence(model):
    answers = list(live(model, FRAMES, encode))
    whole = model(encode(FRAMES[None], None))[0]
    assert not np.allclose(whole[0], whole[5], atol=1e-2)
    np.testing.assert_allclose([a.logits for a in answers], whole, atol=1e-5)
    assert all(a.seconds > 0 for a in answers)


def test_the_model_stays_and_each_stream_starts_from_rest(model):
    first = [a.logits for a in live(model, FRAMES, encode)]
    again = [a.logits for a in live(model, FRAMES, encode)]
    assert np.array_equal(first, again)
    assert all(layer.membrane is None for layer in neuron_layers(model).values())


def test_it_compiles_once_and_takes_frames_as_they_come(model):
    seen, traces = [], []

    def camera():
        for frame in FRAMES:
            seen.append(frame)
            yield frame

    def counted(raw, rng):
        traces.append(raw.shape)
        return encode(raw, rng)

    stream = live(model, camera(), counted)
    assert not seen
    next(stream)
    assert len(seen) == 1
    before = len(traces)
    jax.block_until_ready([a.logits for a in stream])
    assert len(traces) == before and len(seen) == 6


def test_no_frames_no_answers(model):
    assert list(live(model, [], encode)) == []


def test_a_frame_with_time_is_an_error(model):
    message = (
        r"live: expected frames \[H, W, C\], got \(6, 8, 8, 2\). Of frames with time"
    )
    with pytest.raises(ValueError, match=message):
        next(live(model, [FRAMES], encode))
