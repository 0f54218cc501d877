"""Frames of videos: what is shown at a time is the frame of that time, under every backend that accepts the video."""

import io
import os
import socket
import struct
import subprocess
import sys
import threading

import av
import numpy as np
import pytest

from mmoe.data.load import decord_proof
from mmoe.data.load.containers import open_container
from mmoe.data.load.decord_proof import UNFIT_WIDTHS, why_not
from mmoe.data.load.frames import VideoFrames, stored_frames
from mmoe.data.load.media import reduced_size
from mmoe.data.load.video import is_video
from mmoe.errors import DataError, Refused
from mmoe.optional import status
from mmoe.schema.bounds import BEYOND, DEFAULT_BOUNDS, Bounds, bounded_by
from tests.data.recordings import MATRICES, images, turned, video
from tests.data.video_files import RATE, VIDEOS, number_of, numbered

OPTIONAL_PACKAGES = ("decord", "pyav")
needs_decord = pytest.mark.skipif(not status("decord").available, reason="decord is not installed")


def wrong(clip, data, backend):
    """(frame of the time, frame shown) where they differ: asked one by one in an order that seeks, and all at once."""
    found = VideoFrames(data, backend, clip.name)
    expected = clip.first + np.rint((found.times_ns - found.times_ns[0]) * RATE / 1e9).astype(int)
    orders = [*range(len(found) - 1, -1, -3), *np.random.default_rng(0).permutation(len(found)).tolist()]
    shown = [(index, number_of(found.frames(np.array([index]))[0])) for index in orders]
    again = VideoFrames(data, backend, clip.name)
    shown += enumerate(map(number_of, again.frames(np.arange(len(again)))))
    assert len(found) == len(numbered()) - clip.first
    return [(int(expected[index]), number) for index, number in shown if number != expected[index]]


def check_video(clip):
    data = clip.write()
    assert wrong(clip, data, "auto") == wrong(clip, data, "pyav") == []
    try:
        assert wrong(clip, data, "decord") == []
    except Refused as refusal:
        assert clip.name in str(refusal) and "set data.video_backend=auto" in str(refusal)
        return False
    return True


@needs_decord
def test_sixty_videos_have_no_wrong_image_under_any_backend_that_accepts_them():
    assert len({clip.name for clip in VIDEOS}) >= 60
    accepted = [clip.name for clip in VIDEOS if check_video(clip)]
    assert len(accepted) >= 10 and all("x264" in name or "mpeg4_plain" in name for name in accepted)


@needs_decord
def test_why_decord_must_not_read_a_video_is_said():
    names = ("x264_b_mp4.mp4", "x264_open_mkv.mkv", "x265_open_mp4.mp4", "mpeg4_b_avi.avi", "cut10_x264_b.mp4")
    reasons = {clip.name: why_not(clip.write(), clip.name) for clip in VIDEOS if clip.name in names}
    assert reasons["x264_b_mp4.mp4"] is None
    assert "GOPs are open" in reasons["x264_open_mkv.mkv"] and "hides 10 packets" in reasons["cut10_x264_b.mp4"]
    assert "codec hevc" in reasons["x265_open_mp4.mp4"] and "kind avi" in reasons["mpeg4_b_avi.avi"]


@needs_decord
def test_a_video_that_decord_dies_of_is_refused_to_it(monkeypatch):
    monkeypatch.setattr(decord_proof, "_apart", {})
    start = subprocess.Popen

    def dying(command, **options):
        return start([*command[:2], "import os, sys; sys.stdin.buffer.read(1); os.abort()"], **options)

    monkeypatch.setattr(decord_proof.subprocess, "Popen", dying)
    data = video(numbered(), bf=0)
    assert why_not(data, "v.mp4") == "it ends its process" and not decord_proof._apart
    monkeypatch.setattr(decord_proof.subprocess, "Popen", start)
    assert why_not(data, "v.mp4") is None  # another process is started for the next video


@needs_decord
def test_decord_reads_a_stored_video_only_with_the_proof_of_its_preparation(monkeypatch):
    data = video(numbered(), bf=0)
    with pytest.raises(Refused, match="was not proven.*; set data.video_backend=auto"):
        stored_frames(data, "decord", "shard.tar: a.mp4", proven=False)
    monkeypatch.setattr("mmoe.data.load.frames.why_not", lambda *_: pytest.fail("proven again"))
    shown = stored_frames(data, "decord", "shard.tar: a.mp4", proven=True).frames(np.array([20, 3]))
    assert [number_of(image) for image in shown] == [20, 3]
    for backend in ("auto", "pyav"):
        assert len(stored_frames(data, backend, "a.mp4", proven=False)) == 30


@needs_decord
@pytest.mark.parametrize("turn", [0, 90])
def test_whatever_size_frames_are_scaled_to_decord_gives_them(turn):
    """decord fails on some widths; a video that is proven must not meet them."""
    data = turned(video(numbered(2), bf=0), turn)
    assert why_not(data, "v") is None
    size = VideoFrames(data, "pyav", "v").size
    sizes = {reduced_size(size, (high, wide)) for high in range(1, 40) for wide in range(1, 49)} - {None}
    assert {width for _, width in sizes} & UNFIT_WIDTHS
    for scaled in [*sorted(sizes), *((33, width) for width in range(1, 97))]:
        ours = stored_frames(data, "auto", "v", True, scaled).frames(np.array([1, 0]))
        theirs = stored_frames(data, "decord", "v", True, scaled).frames(np.array([1, 0]))
        assert ours.shape == (2, *scaled, 3) and theirs.shape[1:3] in (scaled, size)


@needs_decord
def test_a_width_that_decord_cannot_give_is_not_proven():
    for width in (16, 24, 48, 72, 64):
        data = video(np.zeros((3, 32, width, 3), np.uint8), bf=0)
        assert (why_not(data, "v") is None) == (width == 64)
        assert VideoFrames(data, "auto", "v").size == (32, width)


@pytest.fixture
def port():
    """A port that somebody listens on; `port.visits` counts who comes."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        class Port(int):
            visits = 0

        number = Port(server.getsockname()[1])

        def listen():
            while True:
                try:
                    server.accept()[0].close()
                except OSError:
                    return
                Port.visits += 1

        threading.Thread(target=listen, daemon=True).start()
        yield number
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("backend", ["auto", "decord"])
@pytest.mark.parametrize("inside", ["hls", "hls file", "concat", "concat net", "session", "dash"])
def test_a_text_named_mp4_opens_neither_the_network_nor_another_file(tmp_path, monkeypatch, port, inside, backend):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.ts").write_bytes(video(numbered(3), container="mpegts"))
    (tmp_path / "other.mp4").write_bytes(video(numbered(3)))
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9.0,\n{}\n#EXT-X-ENDLIST\n"
    text = {
        "hls": hls.format(f"http://127.0.0.1:{port}/a.ts"),
        "hls file": hls.format("other.ts"),
        "concat": "ffconcat version 1.0\nfile other.mp4\n",
        "concat net": f"ffconcat version 1.0\nfile http://127.0.0.1:{port}/a.ts\n",
        "session": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
        "dash": f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>http://127.0.0.1:{port}/'
        "</BaseURL></MPD>",
    }[inside]
    clip = tmp_path / "video.mp4"
    clip.write_text(text)
    for data in (clip, text.encode()):
        with pytest.raises(Refused, match="video.mp4 cannot be read as a video"):
            VideoFrames(data, backend, "video.mp4")
    assert port.visits == 0


def test_names_are_names_and_not_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tcp:1.mp4", os.fsdecode(b"\xff %20.mp4"), "concat:a|b.mp4"):
        clip = tmp_path.relative_to(tmp_path) / name
        clip.write_bytes(video(numbered(3)))
        assert len(VideoFrames(clip, "auto", "v")) == 3


def test_only_regular_files_are_videos(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    for name in ("pipe.mp4", "zero.mp4", "absent.mp4", "."):
        with pytest.raises(Refused, match="is no regular file|cannot be read as a video"):
            open_container(tmp_path / name, name)


def lasting(mkv: bytes, milliseconds: float) -> bytes:
    """The Matroska video with another length in its header."""
    at = mkv.index(b"\x44\x89\x88") + 3
    return mkv[:at] + struct.pack(">d", milliseconds) + mkv[at + 8 :]


def test_what_a_header_asks_for_is_bounded():
    data = video(numbered(5), container="matroska")
    with pytest.raises(Refused, match=r"v\.mkv states a length in seconds: .*video_seconds") as refusal:
        VideoFrames(lasting(data, 100 * 365.25 * 86400e3), "auto", "v.mkv")
    assert refusal.value.reason == BEYOND
    assert DEFAULT_BOUNDS.video_pixels < 8192 * 8192
    for bound in ("video_pixels", "video_frames"):
        with bounded_by(Bounds(**{bound: 4})), pytest.raises(Refused, match=f"raise prepare.bounds.{bound}"):
            VideoFrames(video(numbered(5)), "auto", "v.mp4")


def test_frames_that_grow_on_the_way_are_bounded():
    times = [range(0, 16_000, 40), range(16_000, 16_200, 40)]  # behind what FFmpeg probes
    small, large = (
        video(np.zeros((len(ms), side, side, 3), np.uint8), container="mpegts", bf=0, g=1, times_ms=list(ms))
        for side, ms in zip((32, 256), times)
    )
    with bounded_by(Bounds(video_pixels=64 * 64)):
        shown = VideoFrames(small, "auto", "v")
        assert shown.frames(np.arange(5)).shape == (5, 32, 32, 3)
        with pytest.raises(DataError, match="^v"):
            grown = VideoFrames(small + large, "auto", "v", scaled=(16, 16))
            grown.frames(np.arange(398, 402))
    grown = VideoFrames(small + large, "auto", "v", scaled=(16, 16))
    assert grown.frames(np.arange(398, 402)).shape == (4, 16, 16, 3)


def damaged(data: bytes, number: int) -> bytes:
    """The video with the middle of a packet overwritten."""
    with av.open(io.BytesIO(data)) as container:
        packet = list(container.demux(video=0))[number]
        middle, stop = packet.pos + packet.size // 2, packet.pos + packet.size * 3 // 4
    return data[:middle] + np.random.default_rng(5).bytes(stop - middle) + data[stop:]


def textured(count: int = 40) -> np.ndarray:
    """Images [count, 80, 96, 3] that take some bytes each."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(40, 200, (count, 10, 12, 1)).repeat(8, 1).repeat(8, 2)
    return (coarse + rng.integers(0, 30, (count, 80, 96, 3))).astype(np.uint8)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264", "mpeg2video"])
def test_damage_that_the_decoder_conceals_is_known_up_to_the_next_key_frame(codec):
    data = video(textured(), codec=codec, g=10, bf=0, sc_threshold=0)
    broken_data = damaged(data, 16)
    whole, broken = VideoFrames(data, "auto", "v"), VideoFrames(broken_data, "auto", "v")
    differ = np.flatnonzero((whole.frames(np.arange(40)) != broken.frames(np.arange(40))).any((1, 2, 3)))
    assert not whole.damaged and differ.tolist() == [16, 17, 18, 19]
    assert broken.damaged == set(differ.tolist())
    one = VideoFrames(broken_data, "auto", "v")
    one.frames(differ[-1:])  # its key frame is good: the damage lies between
    assert one.damaged == set(differ[-1:].tolist())
    if status("decord").available:
        assert why_not(broken_data, "v") is not None


def test_importing_does_not_need_decord():
    code = "import sys, mmoe.data.load.frames; sys.exit('decord' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("backend", OPTIONAL_PACKAGES)
def test_video_times_and_frames_are_those_written(backend):
    frames = images(30)
    times = [int(40 * i + (i % 3) * 13) for i in range(30)]
    data = video(frames, times_ms=times, crf=1)
    shown = VideoFrames(data, backend, "v.mp4")
    assert len(shown) == 30 and shown.size == (48, 64)
    assert shown.times_ns.dtype == np.int64
    assert np.abs(shown.times_ns - np.array(times) * 1_000_000).max() < 1000  # 1 us
    everything = shown.frames(np.arange(30))
    assert everything.dtype == np.uint8 and np.abs(everything.astype(int) - frames).mean() < 12  # 4:2:0 color

    chosen = np.array([17, 3, 3, 29, 0, 18])
    assert (shown.frames(chosen) == everything[chosen]).all()
    one_by_one = VideoFrames(data, backend, "v.mp4")
    for index in (*range(0, 30, 4), 2, 29):
        assert (one_by_one.frames(np.array([index])) == everything[[index]]).all()
    assert shown.frames(np.zeros(0, int)).shape == (0, 48, 64, 3)


@pytest.mark.parametrize("degrees", MATRICES)
def test_both_backends_agree_on_rotated_video(degrees):
    data = turned(video(images(12, 64, 96)), degrees)  # decord fails on turned ones of other widths
    ours, theirs = VideoFrames(data, "pyav", "v"), VideoFrames(data, "decord", "v")
    assert ours.size == theirs.size == ((64, 96) if degrees % 180 == 0 else (96, 64))
    assert (ours.frames(np.arange(12)) == theirs.frames(np.arange(12))).all()
    assert np.abs(ours.times_ns - theirs.times_ns).max() < 1000
    upright = VideoFrames(turned(data, 0), "decord", "v").frames(np.arange(12))
    assert (np.rot90(upright, -degrees // 90, axes=(1, 2)) == ours.frames(np.arange(12))).all()


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_avi_with_b_frames_is_refused_by_decord_and_read_by_pyav(codec):
    data = video(images(30), container="avi", codec=codec, bf=2)
    with pytest.raises(DataError, match=r"v\.avi is not read by decord: .* avi .*; set data.video_backend=auto"):
        VideoFrames(data, "decord", "v.avi")
    shown = VideoFrames(data, "pyav", "v.avi")
    assert (np.diff(shown.times_ns) == 40_000_000).all() and len(shown) == 30
    everything = shown.frames(np.arange(30))
    assert np.abs(everything.astype(int) - images(30)).mean() < 25
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


@pytest.mark.parametrize("backend", OPTIONAL_PACKAGES)
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_a_broken_video_is_named(backend, keep):
    data = video(images(20))
    with pytest.raises(DataError, match=r"^drive\.front\.mp4 cannot be read as a video \(.{1,170}\); "):
        VideoFrames(data[: int(len(data) * keep)], backend, "drive.front.mp4")


@pytest.mark.parametrize("backend", OPTIONAL_PACKAGES)
def test_a_video_that_breaks_in_the_middle_is_an_error_when_read(backend):
    data = video(images(40), g=10)
    start = data.index(b"mdat") + 4
    middle = start + (data.index(b"moov") - start) // 4
    broken = data[:middle] + bytes(data.index(b"moov") - 8 - middle) + data[data.index(b"moov") - 8 :]
    with pytest.raises(DataError, match=r"^v\b.*; encode the video again"):
        VideoFrames(broken, backend, "v").frames(np.arange(40))


@pytest.mark.parametrize("backend", OPTIONAL_PACKAGES)
def test_frames_outside_the_video_are_an_error(backend):
    with pytest.raises(DataError, match="frames 0 to 5 are asked for, the video has 5"):
        VideoFrames(video(images(5)), backend, "v").frames(np.arange(6))


def test_what_counts_as_video():
    assert is_video("front.mp4") and is_video("A.MKV") and not is_video("front-3.jpg") and not is_video("mp4")


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["rabbit320", "udacity_solidWhiteRight"])
def test_backends_agree_on_real_videos(shared_data, name):
    data = (shared_data / "video" / f"{name}.mp4").read_bytes()
    ours, theirs = VideoFrames(data, "pyav", name), VideoFrames(data, "decord", name)
    assert len(ours) == len(theirs) == {"rabbit320": 234, "udacity_solidWhiteRight": 221}[name]
    assert np.abs(ours.times_ns - theirs.times_ns).max() < 1000
    chosen = np.array([60, 3, 61, 200, 0])
    assert (ours.frames(chosen) == theirs.frames(chosen)).all()
