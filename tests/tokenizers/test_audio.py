"""The mel codec: lengths known beforehand, levels that help, audio one can recognize; the order of codes."""

import json
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from torchaudio.functional.functional import _get_sinc_resample_kernel

from mmoe.errors import DataError
from mmoe.tokenizers import audio
from mmoe.tokenizers.audio import (
    AudioConfig,
    MelCodec,
    MelConfig,
    code_order,
    deserialize,
    resample,
    resampled_length,
    serialize,
)
from mmoe.tokenizers.kmeans import kmeans, lloyd, nearest_centroid, sample_rows
from mmoe.tokenizers.rates import check_rates, kernel_size

SMALL = AudioConfig(codebooks=3, mel=MelConfig(codebook_size=16))
RATES = st.sampled_from([7350, 8000, 11025, 16000, 22050, 44100, 48000])


def chirps(count: int, seed: int = 0, rate: int = 8000) -> list[np.ndarray]:
    """Seeded glides of random pitch, loudness and length, with a little noise."""
    random = np.random.default_rng(seed)
    waves = []
    for _ in range(count):
        t = np.arange(int(random.uniform(0.3, 1.0) * rate)) / rate
        start, end = random.uniform(150, 3000, 2)
        phase = 2 * np.pi * (start * t + (end - start) * t**2 / (2 * t[-1]))
        wave = np.sin(phase) * random.uniform(0.05, 0.8) + random.normal(0, 0.002, len(t))
        waves.append(wave.astype(np.float32))
    return waves


CODEC = MelCodec.fit(chirps(30), SMALL, seed=0)


@given(st.integers(0, 6000), RATES)
@settings(max_examples=60)
def test_num_frames_is_what_encode_yields(samples, rate):
    wave = np.random.default_rng(samples).normal(0, 0.1, samples).astype(np.float32)
    codes = CODEC.encode(wave, rate)
    assert codes.shape == (CODEC.num_frames(samples, rate), CODEC.codebooks)
    assert codes.dtype == np.int64 and ((codes >= 0) & (codes < CODEC.codebook_size)).all()
    assert len(CODEC.decode(codes)) == len(codes) * 320


@given(st.lists(st.tuples(st.integers(0, 10**9), RATES), min_size=1))
def test_num_frames_of_arrays(lengths):
    samples, rates = np.array(lengths).T
    frames = CODEC.num_frames(samples, rates).tolist()
    assert frames == [CODEC.num_frames(*length) for length in lengths]
    # A frame is 40 ms: the exact quotient of integers, its samples rounded to the nearest and its frames up.
    assert frames == [math.ceil(math.floor(Fraction(s * 8000, r) + Fraction(1, 2)) / 320) for s, r in lengths]


def test_lengths_are_right_where_torchaudio_rounds_them():
    for samples, exact in ((44_100 * 600 + 1, 4_800_000), (44_100 * 600 + 3, 4_800_001)):  # about ten minutes
        assert resampled_length(samples, 44_100, 8000) == exact
        assert len(audio.resample(np.zeros(samples, np.float32), 44_100, 8000)) == exact


def test_every_level_lowers_the_error_on_new_audio():
    errors = CODEC.reconstruction_error(chirps(10, seed=1))
    assert list(errors) == [1, 2, 3]
    assert 1 > errors[1] > errors[2] > errors[3] > 0


def test_fitting_is_deterministic_and_seeded():
    again = MelCodec.fit(iter(chirps(30)), SMALL, seed=0)
    assert again.fingerprint == CODEC.fingerprint
    assert MelCodec.fit(chirps(30), SMALL, seed=1).fingerprint != CODEC.fingerprint


def test_saving_keeps_codes_and_fingerprint(tmp_path):
    path = tmp_path / "codec.safetensors"
    CODEC.save(path)
    wave = chirps(1, seed=2)[0]
    for copy in (MelCodec.load(path), pickle.loads(pickle.dumps(CODEC))):
        assert copy.fingerprint == CODEC.fingerprint and copy.config == CODEC.config
        assert (copy.encode(wave, 8000) == CODEC.encode(wave, 8000)).all()
        assert (copy.decode(copy.encode(wave, 8000)) == CODEC.decode(CODEC.encode(wave, 8000))).all()
    coarse = MelCodec.load(path, codebooks=2)
    assert (coarse.encode(wave, 8000) == CODEC.encode(wave, 8000)[:, :2]).all()
    assert coarse.fingerprint != CODEC.fingerprint


@pytest.mark.parametrize("pitch", [440.0, 1000.0, 2500.0])
def test_a_decoded_tone_has_its_pitch(pitch):
    wave = (0.3 * np.sin(2 * np.pi * pitch * np.arange(8000) / 8000)).astype(np.float32)
    codec = MelCodec.fit([wave, *chirps(30)], AudioConfig(codebooks=4), seed=0)
    decoded = codec.decode(codec.encode(wave, 8000))
    loudest = np.abs(np.fft.rfft(decoded)).argmax() * 8000 / len(decoded)
    assert abs(loudest / pitch - 1) < 0.1  # the mel bands here are 5 to 8 % wide
    assert 0.01 < np.sqrt((decoded**2).mean()) < 0.2


def test_decoding_draws_nothing_from_the_global_generator():
    codes = CODEC.encode(chirps(1, seed=3)[0], 8000)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = CODEC.decode(codes)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert (CODEC.decode(codes) == first).all()


def test_codes_do_not_depend_on_loudness_unless_asked_to():
    wave = chirps(1, seed=4)[0]
    loud, quiet = CODEC.encode(wave, 8000), CODEC.encode(0.1 * wave, 8000)
    assert (loud == quiet).mean() > 0.99
    absolute = MelCodec.fit(chirps(30), AudioConfig(mel=MelConfig(codebook_size=16, normalize_level=False)), seed=0)
    assert (absolute.encode(wave, 8000) != absolute.encode(0.1 * wave, 8000)).mean() > 0.2
    assert len(np.unique(CODEC.encode(np.zeros(8000, np.float32), 8000)[2:-2], axis=0)) == 1


def test_the_spectrogram_is_torchaudios():
    wave = chirps(1, seed=5)[0][:3200] * 1.0
    config = MelConfig(normalize_level=False)
    theirs = torchaudio.transforms.MelSpectrogram(
        8000, n_fft=256, hop_length=80, n_mels=40, center=True, pad_mode="constant"
    )(torch.from_numpy(wave))
    ours = audio.log_mel(wave, 8000, config).reshape(-1, 40)
    expected = (theirs.T[:-1] / 256 + audio.POWER_FLOOR).log()
    assert torch.allclose(ours, expected, atol=1e-4)


@given(st.integers(0, 60), st.integers(1, 6), st.sampled_from(["flat", "delay"]))
def test_layouts_are_invertible_orders(frames, codebooks, layout):
    codes = np.random.default_rng(0).integers(0, 1000, (frames, codebooks))
    flat, codebook = serialize(codes, layout)
    assert flat.shape == codebook.shape == (frames * codebooks,)
    assert (deserialize(flat, frames, codebooks, layout) == codes).all()
    for q in range(codebooks):  # each level keeps its time order
        assert (flat[codebook == q] == codes[:, q]).all()


@given(st.integers(1, 20), st.integers(1, 5))
def test_delay_writes_fine_levels_later(frames, codebooks):
    frame, codebook = code_order(frames, codebooks, "delay")
    keys = list(zip(frame + codebook, codebook))
    assert keys == sorted(keys) and len(set(keys)) == frames * codebooks
    assert code_order(frames, codebooks, "flat")[0].tolist() == sorted(frame)


def test_kmeans_finds_separated_clusters():
    random = np.random.default_rng(0)
    centers = random.normal(0, 10, (8, 3))
    points = torch.from_numpy(centers[random.integers(0, 8, 800)] + random.normal(0, 0.1, (800, 3))).float()
    found = kmeans(points, 8, torch.Generator().manual_seed(0)).numpy()
    assert np.allclose(found[np.lexsort(found.T)], centers[np.lexsort(centers.T)], atol=0.05)


def test_lloyd_ends_where_each_centroid_is_the_mean_of_its_points():
    points = torch.randn(600, 4, generator=torch.Generator().manual_seed(0))
    centroids = lloyd(points, points[:20], iterations=1000)
    owner = (points[:, None] - centroids).square().sum(2).argmin(1)
    means = torch.stack([points[owner == k].mean(0) for k in range(20)])
    assert torch.allclose(means, centroids, atol=1e-5)


def test_kmeans_survives_fewer_points_than_clusters():
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).repeat(20, 1)
    centroids = kmeans(points, 5, torch.Generator().manual_seed(0))
    assert torch.isfinite(centroids).all()
    assert torch.cdist(points, centroids).min(1).values.max() == 0


def test_no_cluster_stays_empty():
    points = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) + 100
    centroids = lloyd(points, points[:1].repeat(40, 1), iterations=1000)  # the worst start there is
    assert len(nearest_centroid(points, centroids).unique()) == 40


def test_the_sample_of_rows_is_uniform_and_bounded():
    def sample(seed):
        batches = (np.arange(i, i + 10, dtype=np.float32)[:, None] for i in range(0, 10_000, 10))
        return sample_rows(batches, 500, seed)[:, 0]

    rows = sample(0)
    assert len(rows) == 500 and (np.diff(rows) > 0).all()
    for place in (rows // 1000, rows % 10):  # among batches, and inside a batch: 50 +- 4 deviations in a tenth
        assert np.abs(np.bincount(place.astype(int), minlength=10) - 50).max() < 27
    assert (sample(0) == rows).all() and len(np.intersect1d(sample(1), rows)) < 60
    assert len(sample_rows([np.zeros((3, 1))], 500, seed=0)) == 3


@pytest.mark.parametrize(
    "settings, remedy",
    [({"hop": 200}, "set hop <= 128"), ({"mels": 120}, "fewer mels or a longer window"), ({"mels": 0}, "greater")],
)
@pytest.mark.filterwarnings("ignore:At least one mel filterbank")
def test_impossible_settings_name_the_remedy(settings, remedy):
    with pytest.raises(ValueError, match=remedy):
        MelConfig(**settings)


def test_bad_waves_are_refused():
    with pytest.raises(DataError, match="NaN or infinite"):
        CODEC.encode(np.array([0.0, np.nan], np.float32), 8000)
    with pytest.raises(DataError, match="not mono"):
        CODEC.encode(np.zeros((100, 2), np.float32), 8000)
    with pytest.raises(DataError, match=r"2 frames for a codebook of 64.*codebook_size"):
        MelCodec.fit([np.zeros(640, np.float32)], AudioConfig(), seed=0)
    with pytest.raises(DataError, match="0 frames"):
        MelCodec.fit([], AudioConfig(), seed=0)


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "codec.safetensors"
    with pytest.raises(DataError, match=r"codec.safetensors does not exist.*tokenizers.audio.path"):
        MelCodec.load(path)
    CODEC.save(path)
    with pytest.raises(DataError, match=r"has 3 levels.*asks for 4.*tokenizers.audio.codebooks <= 3"):
        MelCodec.load(path, codebooks=4)
    arrays, content = load_file(path), path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(DataError, match="cannot be read as an audio codec"):
        MelCodec.load(path)
    older = CODEC.config.model_dump_json().replace("normalize_level", "normalise_level")
    save_file(arrays, path, metadata={"format": "mmoe mel codec 1", "config": older})
    assert MelCodec.load(path).fingerprint == CODEC.fingerprint
    save_file(arrays, path)
    with pytest.raises(DataError, match="fit the audio codec again"):
        MelCodec.load(path)
    save_file(arrays, path, metadata={"format": audio.FORMAT, "config": json.dumps({"hops": 3})})
    with pytest.raises(DataError, match="unknown settings"):
        MelCodec.load(path)


@pytest.mark.real_data
def test_spoken_digits_survive_the_codes(shared_data):
    """Naive Bayes on which first-level codes occur in each third of an utterance, held-out takes."""
    folder = shared_data / "audio_text" / "fsdd"
    rows = [json.loads(line) for line in (folder / "transcripts.jsonl").read_text().splitlines()]
    waves = [soundfile.read(folder / row["audio"], dtype="float32")[0] for row in rows]
    digit, held_out = np.array([row["digit"] for row in rows]), np.array([row["take"] == 9 for row in rows])
    codec = MelCodec.fit([wave for wave, test in zip(waves, held_out) if not test], AudioConfig(), seed=0)

    counts = np.zeros((len(waves), 3, codec.codebook_size))
    for count, wave in zip(counts, waves):
        codes = codec.encode(wave, 8000)[:, 0]
        np.add.at(count, (np.arange(len(codes)) * 3 // len(codes), codes), 1)
    likelihood = np.stack([counts[(digit == d) & ~held_out].sum(0) + 0.3 for d in range(10)])
    likelihood = np.log(likelihood / likelihood.sum(-1, keepdims=True))
    guess = np.einsum("nsk, dsk -> nd", counts[held_out], likelihood).argmax(1)
    assert (guess == digit[held_out]).mean() > 0.7  # chance is 0.1

    errors = codec.reconstruction_error([wave for wave, test in zip(waves, held_out) if test])
    assert errors[2] < errors[1] < 0.3


@pytest.mark.parametrize("target", [8000, 16_000, 24_000, 44_100])
def test_rates_that_recordings_have_are_resampled_and_primes_are_refused_before_their_filter_is_made(target):
    for rate in (
        8000,
        11_025,
        16_000,
        22_050,
        24_000,
        32_000,
        44_100,
        48_000,
        88_200,
        96_000,
        192_000,
        768_000,
    ):
        check_rates(rate, target, "x")
    with pytest.raises(DataError, match=r"sample rate of 96001 Hz, .*convert it to a common rate"):
        resample(np.zeros(1000, np.float32), 96_001, target)


@pytest.mark.parametrize("rate, target", [(44_100, 8000), (22_050, 16_000), (8000, 11_025), (44_056, 8000)])
def test_the_size_of_a_filter_is_that_of_torchaudio(rate, target):
    divisor = math.gcd(rate, target)
    kernel, _ = _get_sinc_resample_kernel(rate, target, divisor)
    assert kernel.numel() == kernel_size(rate, target)


@pytest.mark.parametrize(("rate", "window", "mels"), [(8000, 256, 40), (16_000, 400, 80), (24_001, 511, 13)])
def test_mel_filters_are_those_of_torchaudio_bit_for_bit(rate: int, window: int, mels: int) -> None:
    found = audio.mel_filters(audio.MelConfig(sample_rate=rate, window=window, mels=mels, hop=window // 4))
    theirs = torchaudio.functional.melscale_fbanks(window // 2 + 1, 0.0, rate / 2, mels, rate) / window
    assert torch.equal(found, theirs)
