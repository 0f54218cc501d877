"""Payload loaders against what was written, against each other, and on bytes that are broken."""

import io
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmoe.data.frames import VideoFrames, is_video
from mmoe.data.media import audio_info, image_size, load_array, load_audio, load_image
from mmoe.errors import DataError
from tests.data.recordings import MATRICES, npy, pictures, png, turned, video, wav

BACKENDS = ("decord", "pyav")


def test_importing_does_not_need_decord():
    code = "import sys, mmoe.data.media; sys.exit('decord' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_grey_colour_and_palette_pictures_become_rgb():
    colour = pictures(1)[0]
    grey = colour[:, :, 0]
    assert (load_image(png(colour), "x") == colour).all()
    assert (load_image(png(grey), "x") == grey[:, :, None]).all()
    assert (load_image(png(grey > 100), "x") == np.where(grey > 100, 255, 0)[:, :, None]).all()
    few = (colour // 128) * 255
    assert (load_image(png(few, "P"), "x") == few).all()


def test_transparency_is_laid_over_white():
    rgba = np.dstack([pictures(1)[0], np.zeros((48, 64), np.uint8)])
    rgba[:24, :, 3] = 255
    rgba[24:, 32:, 3] = 51
    shown = load_image(png(rgba), "x")
    assert (shown[:24] == rgba[:24, :, :3]).all() and (shown[24:, :32] == 255).all()
    mixed = rgba[24:, 32:, :3] * 0.2 + 255 * 0.8
    assert np.abs(shown[24:, 32:] - mixed).max() <= 1
    palette = png(np.array([[0, 200]], np.uint8), "P", transparency=0)
    assert load_image(palette, "x").tolist() == [[[255] * 3, [200] * 3]]
    grey_alpha = png(np.array([[[10, 0], [10, 255]]], np.uint8))
    assert load_image(grey_alpha, "x").tolist() == [[[255] * 3, [10] * 3]]


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 257, 128 * 257, 65535, 100]], np.uint16)
    assert load_image(png(values), "x")[0, :, 0].tolist() == [0, 1, 128, 255, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = pictures(1)[0][:20]
    # EXIF 2.32, table of tag 0x0112: how row 0 and column 0 of the stored picture lie in the upright one.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = png(np.ascontiguousarray(stored), exif=exif)
    assert (load_image(data, "x") == upright).all()
    assert image_size(data, "x") == upright.shape[:2] == (20, 64)


@pytest.mark.parametrize("data", [b"", b"no picture", png(pictures(1)[0])[:-200]])
def test_a_broken_picture_is_named(data):
    with pytest.raises(DataError, match=r"pic\.png cannot be read as a picture \(.+\); replace"):
        load_image(data, "pic.png")


def test_pictures_of_unknown_range_are_refused():
    buffer = io.BytesIO()
    Image.fromarray(np.ones((4, 4), np.float32)).save(buffer, "TIFF")
    with pytest.raises(DataError, match="floating-point pixels"):
        load_image(buffer.getvalue(), "x")


@pytest.mark.parametrize("backend", BACKENDS)
def test_video_times_and_frames_are_those_written(backend):
    frames = pictures(30)
    times = [int(40 * i + (i % 3) * 13) for i in range(30)]
    data = video(frames, times_ms=times, crf=1)
    shown = VideoFrames(data, backend, "v.mp4")
    assert len(shown) == 30 and shown.size == (48, 64)
    assert shown.times_ns.dtype == np.int64
    assert np.abs(shown.times_ns - np.array(times) * 1_000_000).max() < 1000  # 1 us
    everything = shown.frames(np.arange(30))
    assert everything.dtype == np.uint8 and np.abs(everything.astype(int) - frames).mean() < 12  # 4:2:0 colour

    chosen = np.array([17, 3, 3, 29, 0, 18])
    assert (shown.frames(chosen) == everything[chosen]).all()
    one_by_one = VideoFrames(data, backend, "v.mp4")
    for index in (*range(0, 30, 4), 2, 29):
        assert (one_by_one.frames(np.array([index])) == everything[[index]]).all()
    assert shown.frames(np.zeros(0, int)).shape == (0, 48, 64, 3)


@pytest.mark.parametrize("degrees", MATRICES)
def test_both_backends_agree_on_rotated_video(degrees):
    data = turned(video(pictures(12, 64, 96)), degrees)  # decord fails on turned ones of other widths
    ours, theirs = VideoFrames(data, "pyav", "v"), VideoFrames(data, "decord", "v")
    assert ours.size == theirs.size == ((64, 96) if degrees % 180 == 0 else (96, 64))
    assert (ours.frames(np.arange(12)) == theirs.frames(np.arange(12))).all()
    assert np.abs(ours.times_ns - theirs.times_ns).max() < 1000
    upright = VideoFrames(turned(data, 0), "decord", "v").frames(np.arange(12))
    assert (np.rot90(upright, -degrees // 90, axes=(1, 2)) == ours.frames(np.arange(12))).all()


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_avi_with_b_frames_is_refused_by_decord_and_read_by_pyav(codec):
    data = video(pictures(30), container="avi", codec=codec, bf=2)
    with pytest.raises(DataError, match=r"v\.avi is not read by decord: .* avi .*; set data.video_backend=auto"):
        VideoFrames(data, "decord", "v.avi")
    shown = VideoFrames(data, "pyav", "v.avi")
    assert (np.diff(shown.times_ns) == 40_000_000).all() and len(shown) == 30
    everything = shown.frames(np.arange(30))
    assert np.abs(everything.astype(int) - pictures(30)).mean() < 25
    for index in (20, 5, 29, 11):
        assert (shown.frames(np.array([index])) == everything[[index]]).all()


@pytest.mark.parametrize("options", [{"bf": 2}, {"bf": 2, "g": 6}, {"bf": 3, "b-adapt": 0}])
def test_frames_of_an_avi_are_in_the_order_they_are_shown(options):
    """Its packets have no presentation times; FFmpeg's guess swaps frames around every B-frame."""
    shade = np.arange(20, 20 + 6 * 30, 6)
    frames = np.broadcast_to(shade[:, None, None, None], (30, 48, 64, 3)).astype(np.uint8)
    shown = VideoFrames(video(frames, container="avi", crf=1, **options), "pyav", "v.avi")
    for chosen in (np.arange(30), np.array([3, 4, 21, 7, 8, 9, 0])):
        assert np.rint((shown.frames(chosen).mean((1, 2, 3)) - 20) / 6).tolist() == chosen.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_a_broken_video_is_named(backend, keep):
    data = video(pictures(20))
    with pytest.raises(DataError, match=r"^drive\.front\.mp4 cannot be read as a video \(.{1,170}\); "):
        VideoFrames(data[: int(len(data) * keep)], backend, "drive.front.mp4")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_video_that_breaks_in_the_middle_is_an_error_when_read(backend):
    data = video(pictures(40), g=10)
    start = data.index(b"mdat") + 4
    middle = start + (data.index(b"moov") - start) // 4
    broken = data[:middle] + bytes(data.index(b"moov") - 8 - middle) + data[data.index(b"moov") - 8 :]
    with pytest.raises(DataError, match=r"^v\b.*; encode the video again"):
        VideoFrames(broken, backend, "v").frames(np.arange(40))


@pytest.mark.parametrize("backend", BACKENDS)
def test_frames_outside_the_video_are_an_error(backend):
    with pytest.raises(DataError, match="frames 0 to 5 are asked for, the video has 5"):
        VideoFrames(video(pictures(5)), backend, "v").frames(np.arange(6))


def test_what_counts_as_video():
    assert is_video("front.mp4") and is_video("A.MKV") and not is_video("front-3.jpg") and not is_video("mp4")


def test_sound_is_averaged_over_channels_and_cut_exactly():
    stereo = np.stack([np.arange(500) * 20, 3000 - np.arange(500) * 8], axis=1)
    data = wav(stereo, rate=11_025)
    assert audio_info(data, "x") == (500, 11_025)
    whole, rate = load_audio(data, 0, 500, "x")
    assert whole.dtype == np.float32 and rate == 11_025
    np.testing.assert_allclose(whole, stereo.mean(1) / 32768, atol=1e-7)
    piece, _ = load_audio(data, 123, 321, "x")
    assert (piece == whole[123:321]).all()


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_flac_is_read_as_it_was_written(subtype):
    wave = np.sin(np.arange(4000) / 20) * 0.5
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, 8000, format="FLAC", subtype=subtype)
    np.testing.assert_allclose(load_audio(buffer.getvalue(), 100, 4000, "x")[0], wave[100:], atol=2**-15)
    half = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    with pytest.raises(DataError, match="^a.flac"):
        load_audio(half, 0, 4000, "a.flac")


def test_broken_short_and_infinite_sounds_are_named():
    with pytest.raises(DataError, match=r"a\.wav cannot be read as a sound"):
        audio_info(b"RIFFxxxx", "a.wav")
    with pytest.raises(DataError, match=r"a\.wav: samples 0 to 200 are asked for, the sound ends after 100"):
        load_audio(wav(np.zeros(100)), 0, 200, "a.wav")
    buffer = io.BytesIO()
    wave = np.zeros(50, np.float32)
    wave[17] = np.nan
    soundfile.write(buffer, wave, 8000, format="WAV", subtype="FLOAT")
    with pytest.raises(DataError, match="sample 17 is not finite"):
        load_audio(buffer.getvalue(), 10, 50, "a.wav")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_in_a_log_is_named_by_row_and_column(bad):
    table = np.zeros((20, 3), np.float32)
    table[7, 2] = table[9, 0] = bad
    with pytest.raises(
        DataError, match=rf"drive\.imu\.npy: row 7, column 2 is {bad} \(2 such values\); drop or repair"
    ):
        load_array(npy(table), "drive.imu.npy")


def test_tables_are_numeric_with_two_axes():
    table = np.arange(6, dtype=np.float64).reshape(3, 2)
    assert (load_array(npy(table), "x") == table).all()
    for wrong in (np.zeros(4), np.array([["a"]]), np.zeros((2, 2), bool)):
        with pytest.raises(DataError, match="rows and dimensions"):
            load_array(npy(wrong), "x")
    for broken in (b"", npy(table)[:-3], npy(np.array([[{}]], object))):
        with pytest.raises(DataError, match="cannot be read as a table"):
            load_array(broken, "x")


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["rabbit320", "udacity_solidWhiteRight"])
def test_backends_agree_on_real_videos(shared_data, name):
    data = (shared_data / "video" / f"{name}.mp4").read_bytes()
    ours, theirs = VideoFrames(data, "pyav", name), VideoFrames(data, "decord", name)
    assert len(ours) == len(theirs) == {"rabbit320": 234, "udacity_solidWhiteRight": 221}[name]
    assert np.abs(ours.times_ns - theirs.times_ns).max() < 1000
    chosen = np.array([60, 3, 61, 200, 0])
    assert (ours.frames(chosen) == theirs.frames(chosen)).all()
