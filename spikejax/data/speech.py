"""Speech as sequences: log-mel frames [T, F], and spikes where they change."""

import struct
import warnings
from pathlib import Path

import numpy as np

from spikejax.data.sequences import SequenceSet, pad
from spikejax.data.split import Folder
from spikejax.data.tfds import audio_examples

RATE = 8000  # samples per second
WINDOW = 256  # samples of a Fourier transform, 32 ms
FLOOR = 1e-6  # of a power, where full scale is 1: the noise of 16 bits is below
TESTED, VALIDATED = range(5), range(5, 10)  # indices of recordings
DELTA = 0.5  # threshold of spikes where frames change, in deviations of a band


def read_wav(path: str | Path) -> tuple[np.ndarray, int]:
    """Return the samples of a recording, float64 [N] in -1..1, and their rate.

    Args:
        path: WAV file of whole numbers or floats; of several channels it is the mean.

    Raises:
        ValueError: there is no such file, or it has no sound that can be read.
    """
    from scipy.io import wavfile

    try:
        with warnings.catch_warnings():
            # Parts that are no sound, such as a title.
            warnings.simplefilter("ignore", wavfile.WavFileWarning)
            rate, samples = wavfile.read(path)
        if not len(samples):
            raise ValueError("no samples")
    # The last two are SciPy's for a file without sound and with a damaged header.
    except (
        *(OSError, ValueError, EOFError, struct.error),
        *(UnboundLocalError, ZeroDivisionError),
    ) as error:
        got = str(error) if Path(path).is_file() else "no such file"
        raise ValueError(
            f"recordings: expected a WAV file, got {path}: {got}."
        ) from error
    if samples.dtype.kind != "f":
        half = 2 ** (8 * samples.itemsize - 1)
        zero = half if samples.dtype.kind == "u" else 0  # of 8 bits
        samples = (samples - float(zero)) / half
    return samples.reshape(len(samples), -1).mean(1, dtype=np.float64), rate


def mel_filters(bands: int) -> np.ndarray:
    """Return triangles [WINDOW / 2 + 1, bands] that are equal on the mel scale.

    mel(f) = 2595 log10(1 + f / 700), from 0 to RATE / 2; each is 1 at its centre, and 0
    at those of its neighbours.
    """
    most = 2595 * np.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, most, bands + 2) / 2595) - 1)
    frequencies = np.fft.rfftfreq(WINDOW, 1 / RATE)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling))


def log_mel(
    audio: np.ndarray, rate: int, *, step_ms: float = 16.0, bands: int = 40
) -> np.ndarray:
    """Return the logarithm of the power in mel bands, frame by frame.

    log(mel |FFT(hann x)|^2 + 1e-6), windows of 32 ms

    Args:
        audio: samples [N], in -1..1.
        rate: samples per second; others than 8000 are resampled.
        step_ms: milliseconds from frame to frame.
        bands: number F of bands.

    Returns:
        float32 [T, F], T = 1 + floor((N - window) / step), at least 1.

    Raises:
        ValueError: audio is not of one channel of floats.
    """
    if audio.ndim != 1 or audio.dtype.kind != "f":
        raise ValueError(
            f"log_mel: expected samples [N] of floats in -1..1, got {audio.dtype} "
            f"{audio.shape}. Divide 16 bits by 32768, and take one channel."
        )
    if rate != RATE:
        from scipy.signal import resample_poly

        factor = np.gcd(RATE, rate)
        audio = resample_poly(audio, RATE // factor, rate // factor)
    step = round(step_ms * RATE / 1000)
    audio = np.pad(audio, (0, max(0, WINDOW - len(audio))))
    frames = np.lib.stride_tricks.sliding_window_view(audio, WINDOW)[::step]
    hann = np.hanning(WINDOW + 1)[:-1]
    power = np.abs(np.fft.rfft(frames * hann) / hann.sum()) ** 2
    return np.log(power @ mel_filters(bands) + FLOOR).astype(np.float32)


def delta(frames: np.ndarray, threshold: float) -> np.ndarray:
    """Return spikes where values have changed by a threshold since the last spike.

    n_t = trunc((x_t - r_t) / threshold),  r_{t+1} = r_t + threshold n_t,  r_0 = 0

    Args:
        frames: [T, F].
        threshold: > 0.

    Returns:
        counts uint8 [T, 2 F]: n where it is positive, then -n where it is negative.

    Raises:
        ValueError: frames have another shape, or the threshold is not positive.
    """
    if frames.ndim != 2 or not len(frames) or not threshold > 0:
        raise ValueError(
            "delta: expected frames [T, F] and a positive threshold, got "
            f"{frames.shape} and {threshold}."
        )
    reference, counts = np.zeros_like(frames[0]), []
    for x in frames:
        n = np.trunc((x - reference) / threshold)
        reference = reference + threshold * n
        counts.append(np.concatenate([np.maximum(n, 0), np.maximum(-n, 0)]))
    return np.minimum(counts, 255).astype(np.uint8)


def spoken_digit(
    data_dir: Folder,
    time_steps: int,
    *,
    step_ms: float = 16.0,
    threshold: float | None = None,
    hold_out: str | None = None,
    validation: bool = False,
) -> SequenceSet:
    """Return TFDS's spoken_digit, ten digits by six speakers, as normalised log-mel.

    Recordings 0 to 4 of each digit and speaker are the test split, as is usual, or all
    recordings of one speaker. Mean and deviation of each band are those of the frames
    of the train split.

    Args:
        data_dir: TFDS's folder; None is TFDS's default.
        time_steps: T; what is later is cut off.
        step_ms: milliseconds from frame to frame.
        threshold: of ``delta``, in deviations; None for the frames themselves.
        hold_out: speaker to test on.
        validation: test on a part of the train split: recordings 5 to 9, or another
            speaker, the one before by name.

    Returns:
        The set, float32 [T, 40], or uint8 [T, 80] with a threshold.

    Raises:
        ValueError: the set is not prepared or damaged, or there is no such speaker.
    """
    examples = audio_examples("spoken_digit", data_dir)
    labels = np.array([example.label for example in examples], np.int32)
    parts = [example.filename.removesuffix(".wav").split("_") for example in examples]
    index, speaker = (np.array([p[k] for p in parts]) for k in (2, 1))
    index, speakers = index.astype(int), sorted(set(speaker))
    if hold_out is not None and hold_out not in speakers:
        raise ValueError(
            f"hold_out: expected one of {', '.join(speakers)}, got {hold_out}."
        )
    others = speakers[speakers.index(hold_out) - 1] if hold_out else ""
    tests = speaker == hold_out if hold_out else np.isin(index, TESTED)
    validates = speaker == others if hold_out else np.isin(index, VALIDATED)
    split = f"speaker {hold_out}" if hold_out else "recordings 0 to 4"
    trains = ~tests
    if validation:
        tests, trains = validates, trains & ~validates
        split = f"speaker {others}" if hold_out else "recordings 5 to 9"
    frames = [log_mel(e.audio / 32768, RATE, step_ms=step_ms) for e in examples]
    known = np.concatenate([frames[i] for i in np.flatnonzero(trains)])
    mean, std = known.mean(0), known.std(0)
    frames = [(x - mean) / std for x in frames]
    if threshold is not None:
        frames = [delta(x, threshold) for x in frames]
    train, test = (
        pad([frames[i] for i in rows], labels[rows], time_steps)
        for rows in map(np.flatnonzero, (trains, tests))
    )
    known = {"mean": tuple(mean.tolist()), "std": tuple(std.tolist())}
    return SequenceSet(train, test, tuple("0123456789"), split, **known)
