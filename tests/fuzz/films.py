"""Films in every container that is opened, with sound and without, as readers and as the loader read them."""

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from mmoe.data.load.frames import VideoFrames
from mmoe.errors import MmoeError
from mmoe.preparation.sources.film import open_film, packet_times, sound_between
from tests.data.recordings import pictures, video
from tests.data.recordings_video import film, ramp
from tests.fuzz.mutate import damage

PLAYLISTS = (
    b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n",
    b"ffconcat version 1.0\nfile '/etc/hostname'\n",
    b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
)


def build(_: Path) -> Callable[[random.Random], bytes]:
    frames, times = pictures(12), [40 * number for number in range(12)]
    sound = [(8000, [(0, ramp(0, 3800))])]
    seeds = [
        video(frames, gop_size=4),
        video(frames, codec="mpeg4"),
        video(frames, container="matroska", codec="libx265", **{"x265-params": "log-level=none"}),
        film(frames, times, sound),
        film(frames, times, sound, container="mp4", sound_codec="aac"),
        film(frames, times, sound, container="avi", codec="mpeg4"),
        film(frames, times, sound, container="mpegts", sound_codec="aac"),
        video(frames, container="webm", codec="libvpx-vp9"),
    ]
    choices = [*seeds, *seeds, *PLAYLISTS]
    return lambda rng: damage(rng.choice(choices), choices, rng)


def run(data: bytes, folder: Path) -> None:
    file = folder / "film.mp4"
    file.write_bytes(data)

    def stored() -> None:
        film_read = VideoFrames(data, "auto", "a film in memory", scaled=(20, 30))
        film_read.frames(np.unique(np.linspace(0, len(film_read) - 1, 3).astype(int)))

    def raw() -> None:
        found = open_film(file, "best", "best")
        packet_times(found)
        VideoFrames(file, "auto", str(file), None if found.best else found.video).frames(np.array([0]))

    def heard() -> None:
        found = open_film(file, "best", "best")
        if found.sound is not None:
            sound_between(found, 0, 10**9)

    for read in (stored, raw, heard, lambda: VideoFrames(file, "decord", str(file)).frames(np.array([0]))):
        with suppress(MmoeError):  # each refuses for itself
            read()
