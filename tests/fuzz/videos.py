"""Videos in every container that is opened, with audio and without, as readers and as the loader read them."""

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from mmoe.data.load.frames import VideoFrames
from mmoe.errors import MmoeError
from mmoe.preparation.sources.video_file import audio_between, open_video_file, packet_times
from tests.data.recordings import images, video
from tests.data.recordings_video import ramp, video_bytes
from tests.fuzz.mutate import damage

PLAYLISTS = (
    b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n",
    b"ffconcat version 1.0\nfile '/etc/hostname'\n",
    b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
)


def build(_: Path) -> Callable[[random.Random], bytes]:
    frames, times = images(12), [40 * number for number in range(12)]
    audio = [(8000, [(0, ramp(0, 3800))])]
    seeds = [
        video(frames, gop_size=4),
        video(frames, codec="mpeg4"),
        video(frames, container="matroska", codec="libx265", **{"x265-params": "log-level=none"}),
        video_bytes(frames, times, audio),
        video_bytes(frames, times, audio, container="mp4", audio_codec="aac"),
        video_bytes(frames, times, audio, container="avi", codec="mpeg4"),
        video_bytes(frames, times, audio, container="mpegts", audio_codec="aac"),
        video(frames, container="webm", codec="libvpx-vp9"),
    ]
    choices = [*seeds, *seeds, *PLAYLISTS]
    return lambda rng: damage(rng.choice(choices), choices, rng)


def run(data: bytes, folder: Path) -> None:
    file = folder / "video.mp4"
    file.write_bytes(data)

    def stored() -> None:
        video_read = VideoFrames(data, "auto", "a video in memory", scaled=(20, 30))
        video_read.frames(np.unique(np.linspace(0, len(video_read) - 1, 3).astype(int)))

    def raw() -> None:
        found = open_video_file(file, "best", "best")
        packet_times(found)
        VideoFrames(file, "auto", str(file), None if found.best else found.video).frames(np.array([0]))

    def heard() -> None:
        found = open_video_file(file, "best", "best")
        if found.audio is not None:
            audio_between(found, 0, 10**9)

    for read in (stored, raw, heard, lambda: VideoFrames(file, "decord", str(file)).frames(np.array([0]))):
        with suppress(MmoeError):  # each refuses for itself
            read()
