"""Speech: log-mel against closed forms and SciPy, spikes by hand, TFDS's layout."""

import wave

import numpy as np
import pytest
from scipy import signal
from scipy.io import wavfile

from spikejax.data import speech
from spikejax.data.speech import (
    DELTA,
    FLOOR,
    RATE,
    delta,
    log_mel,
    mel_filters,
    read_wav,
    spoken_digit,
)
from spikejax.experiment.trained import Card

tfds = pytest.importorskip("tensorflow_datasets")


def tone(frequency, rate=RATE, seconds=0.5, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * frequency * np.arange(seconds * rate) / rate)


def test_mel_filters_are_triangles_whose_sum_is_one():
    filters = mel_filters(40)
    frequencies = np.arange(129) * RATE / 256
    # Centres at 1..40 of 41 equal parts of mel(4000) = 2146.06.
    mels = 2146.0645 * np.arange(42) / 41
    centres = 700 * (10 ** (mels / 2595) - 1)
    inside = (frequencies > centres[1]) & (frequencies < centres[-2])
    np.testing.assert_allclose(filters.sum(1)[inside], 1, rtol=1e-9)
    for band in range(40):
        left, middle, right = centres[band : band + 3]
        points = [0, left, middle, right, RATE]
        expected = np.interp(frequencies, points, [0, 0, 1, 0, 0])
        np.testing.assert_allclose(filters[:, band], expected, atol=1e-6)
    assert filters.any(0).all()


def test_log_mel_of_a_tone_is_in_closed_form():
    """At 1000 Hz, bin 32: amplitude / 2 there, and half of it in both neighbours."""
    power = np.zeros(129)
    power[31:34] = (0.5 / 4) ** 2, (0.5 / 2) ** 2, (0.5 / 4) ** 2
    found = log_mel(tone(1000), RATE)
    expected = np.log(power @ mel_filters(40) + FLOOR)
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-4)
    assert found.dtype == np.float32 and found.shape == (1 + (4000 - 256) // 128, 40)


@pytest.mark.parametrize("step_ms", [16, 10])
def test_log_mel_is_that_of_scipys_spectrum(step_ms):
    audio, step = np.random.default_rng(0).uniform(-1, 1, 2000), step_ms * 8
    options = {"boundary": None, "padded": False, "noverlap": 256 - step}
    spectrum = signal.stft(audio, RATE, "hann", 256, **options)[2]
    expected = np.log(np.abs(spectrum.T) ** 2 @ mel_filters(20) + FLOOR)
    found = log_mel(audio, RATE, step_ms=step_ms, bands=20)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_other_rates_are_resampled():
    for rate in (4000, 16000, 11025, 44100):
        found = log_mel(tone(440, rate), rate)
        expected = log_mel(tone(440), RATE)
        loud = expected[5] > np.log(1e-4)
        assert loud.any() and found.shape == expected.shape
        np.testing.assert_allclose(found[5:-5, loud], expected[5:-5, loud], atol=0.1)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_files_of_whole_numbers(width, tmp_path):
    """One half of full scale is 2^(bits - 2); 8 bits count from 128."""
    half = 2 ** (8 * width - 2)
    values = [0, half, -half, -2 * half, 2 * half - 1]
    offset = 128 if width == 1 else 0
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(width)
        file.setframerate(16000)
        for value in values:
            number = (value + offset).to_bytes(width, "little", signed=width > 1)
            file.writeframes(number)
    audio, rate = read_wav(tmp_path / "a.wav")
    most = (2 * half - 1) / (2 * half)
    np.testing.assert_allclose(audio, [0, 0.5, -0.5, -1, most], rtol=1e-9)
    assert rate == 16000 and audio.dtype == np.float64


def test_wav_files_of_floats_and_channels(tmp_path):
    both = np.float32([[0.5, 0.25], [-1, 0]])
    wavfile.write(tmp_path / "a.wav", 8000, both)
    np.testing.assert_array_equal(read_wav(tmp_path / "a.wav")[0], [0.375, -0.5])
    # A title behind the sound.
    content = (tmp_path / "a.wav").read_bytes() + b"note\x04\0\0\0abcd"
    (tmp_path / "b.wav").write_bytes(content)
    np.testing.assert_array_equal(read_wav(tmp_path / "b.wav")[0], [0.375, -0.5])


def test_files_that_are_no_recordings(tmp_path):
    wavfile.write(tmp_path / "none.wav", 8000, np.zeros(0, np.int16))
    wavfile.write(tmp_path / "cut.wav", 8000, np.ones(9, np.int16))
    whole = (tmp_path / "cut.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[:30])
    (tmp_path / "text.wav").write_text("seven")
    (tmp_path / "mute.wav").write_bytes(whole[:36] + b"note" + whole[40:])
    (tmp_path / "zero.wav").write_bytes(whole[:32] + bytes(2) + whole[34:])
    for name, got in (
        ("mute", ""),
        ("zero", ""),
        ("none", "no samples"),
        ("cut", ""),
        ("text", "File format"),
        ("away", "no such file"),
    ):
        message = f"recordings: expected a WAV file, got .*{name}.wav: {got}"
        with pytest.raises(ValueError, match=message):
            read_wav(tmp_path / f"{name}.wav")


def test_short_and_silent_audio_has_one_frame():
    found = log_mel(np.zeros(10), RATE)
    np.testing.assert_allclose(found, np.full((1, 40), np.log(FLOOR)), rtol=1e-6)


@pytest.mark.parametrize("audio", [np.zeros((9, 2)), np.zeros(9, np.int16)])
def test_audio_of_other_types(audio):
    with pytest.raises(ValueError, match=r"log_mel: expected samples \[N\] of floats"):
        log_mel(audio, RATE)


def test_delta_by_hand():
    """Steps of 0.5: 0.6 from 0 is one, 1.9 from 0.5 two, -0.2 from 1.5 three down."""
    frames = np.array([[0.6], [0.9], [1.9], [-0.2], [-0.4]])
    found = delta(frames, 0.5)
    assert found.dtype == np.uint8
    assert found.tolist() == [[1, 0], [0, 0], [2, 0], [0, 3], [0, 0]]


def test_spikes_of_delta_add_up_to_the_values():
    frames = np.random.default_rng(0).normal(size=(30, 4)).cumsum(0)
    up, down = np.split(delta(frames, 0.3).astype(int), 2, 1)
    assert np.abs(0.3 * (up - down).cumsum(0) - frames).max() < 0.3


NAMES = [
    f"{digit}_{speaker}_{index}.wav"
    for digit in (0, 7)
    for speaker in ("ann", "bob", "cy")
    for index in (0, 4, 5, 9, 10, 11)
]


def samples(name):
    rng = np.random.default_rng(NAMES.index(name))
    return rng.integers(-3000, 3000, int(rng.integers(200, 2000)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Recordings as TFDS writes them, for which its feature Audio needs TensorFlow."""

    class SpokenDigit(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.9")

        def _info(self):
            features = {
                "audio": tfds.features.Tensor(shape=(None,), dtype=np.int64),
                "audio/filename": tfds.features.Text(),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(
                builder=self, features=features, description="-"
            )

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for name in NAMES:
                values = samples(name), name, int(name[0])
                keys = "audio", "audio/filename", "label"
                yield name, dict(zip(keys, values, strict=True))

    path = tmp_path_factory.mktemp("tfds")
    with tfds.core.registered.skip_registration():
        SpokenDigit(data_dir=path, file_format="array_record").download_and_prepare()
    return path


def same(a, b):
    return a.shape == b.shape and np.allclose(a, b, atol=1e-4)


def frames_of(split):
    return [x[:n] for x, n in zip(split.values, split.lengths, strict=True)]


@pytest.mark.parametrize(
    ("options", "trained", "tested", "split"),
    [
        ({}, {5, 9, 10, 11}, {0, 4}, "recordings 0 to 4"),
        ({"validation": True}, {10, 11}, {5, 9}, "recordings 5 to 9"),
        ({"hold_out": "bob"}, {"ann", "cy"}, {"bob"}, "speaker bob"),
        ({"hold_out": "bob", "validation": True}, {"cy"}, {"ann"}, "speaker ann"),
    ],
)
def test_splits_by_recording_and_by_speaker(folder, options, trained, tested, split):
    found = speech.spoken_digit(folder, 20, **options)

    def chosen(of):
        parts = {name: name[:-4].split("_") for name in NAMES}
        return [n for n, p in parts.items() if {p[1], int(p[2])} & of]

    raw = [log_mel(samples(n) / 32768, RATE) for n in chosen(trained)]
    mean, std = np.concatenate(raw).mean(0), np.concatenate(raw).std(0)
    for part, of in ((found.train, trained), (found.test, tested)):
        expected = {n: (log_mel(samples(n) / 32768, RATE) - mean) / std for n in NAMES}
        names = []
        for row, label in zip(frames_of(part), part.labels, strict=True):
            (name,) = (n for n, x in expected.items() if same(x, row))
            names.append(name)
            assert int(name[0]) == label
        assert sorted(names) == sorted(chosen(of))
    assert found.split == split and found.shape == (40,) and found.num_classes == 10
    values = np.concatenate(frames_of(found.train))  # none is longer than 20 frames
    np.testing.assert_allclose(values.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(values.std(0), 1, rtol=1e-4)


def test_spikes_are_those_of_the_normalised_frames(folder):
    frames = speech.spoken_digit(folder, 20)
    spikes = speech.spoken_digit(folder, 20, threshold=0.5)
    pairs = zip(frames_of(frames.test), frames_of(spikes.test), strict=True)
    for row, found in pairs:
        np.testing.assert_array_equal(found, delta(row, 0.5))
    assert spikes.shape == (80,) and spikes.test.values.dtype == np.uint8


@pytest.mark.parametrize("threshold", [None, DELTA])
def test_a_card_codes_raw_frames_as_the_set_is_coded(folder, threshold):
    data = spoken_digit(folder, 20, threshold=threshold)
    flags = {"coding": "delta" if threshold else "current"}
    card = Card(flags, data.class_names, data.shape, data.mean, data.std, {})
    tested = [n for n in NAMES if n.endswith(("_0.wav", "_4.wav"))]
    raw = [log_mel(samples(n) / 32768, RATE) for n in tested]
    coded = [np.asarray(card.encode(frames[None]))[0] for frames in raw]
    for row in frames_of(data.test):
        assert sum(same(row, found) for found in coded) == 1
    with pytest.raises(ValueError, match=r"expected sequences \[B, T, 40\] as in tra"):
        card.encode(np.zeros((1, 20, 80)))


def test_a_speaker_that_is_not_there(folder):
    with pytest.raises(ValueError, match="expected one of ann, bob, cy, got eve"):
        speech.spoken_digit(folder, 20, hold_out="eve")


def test_a_set_that_is_not_prepared_or_damaged(folder, tmp_path):
    with pytest.raises(ValueError, match=r"experiments\.prepare spoken_digit"):
        speech.spoken_digit(tmp_path, 20)
    place = "spoken_digit/1.0.9"
    source, damaged = folder / place, tmp_path / place
    damaged.mkdir(parents=True)
    (damaged / "dataset_info.json").write_bytes(
        (source / "dataset_info.json").read_bytes()
    )
    message = "spoken_digit: expected recordings of 16 bits in array_record files"
    with pytest.raises(ValueError, match=message):  # no files of examples
        speech.spoken_digit(tmp_path, 20)
    (records,) = source.glob("*array_record*")
    content = records.read_bytes()
    (damaged / records.name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=message):
        speech.spoken_digit(tmp_path, 20)


@pytest.mark.parametrize(
    ("shape", "threshold"),
    [((4, 3), 0.0), ((4, 3), -0.5), ((1, 4, 3), 1.0), ((0, 3), 1.0)],
)
def test_changes_need_frames_and_a_threshold(shape, threshold):
    with pytest.raises(ValueError, match=r"delta: expected frames \[T, F\] and a posi"):
        speech.delta(np.zeros(shape, np.float32), threshold)
