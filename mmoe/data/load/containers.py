"""Open the containers of videos, in this one place: bound them, and translate what FFmpeg raises.

A file is whatever its bytes say, not its name: a playlist named .mp4 makes FFmpeg read other files or the network, a
session description opens ports. So only the formats of `FORMATS` are opened, by no protocol but that of local files.
"""

import io
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from mmoe.data.load.reading import reading, unreadable
from mmoe.errors import DataError, Refused
from mmoe.schema.bounds import bounds, check_bound

FORMATS = ("mov", "matroska", "avi", "mpegts", "mpeg", "hevc")  # FFmpeg's names; none of them refers to other files
UNREADABLE = "unreadable image or video"
_CHECKED_EVERY = 1000  # packets

_OPTIONS = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}
_LEAVE_OUT = "encode the video again as H.264 mp4, or leave it out"


def translated(where: str, remedy: str = _LEAVE_OUT) -> AbstractContextManager[None]:
    """Turn what FFmpeg and PyAV raise within the context into `Refused`."""
    return reading("video", where, remedy, UNREADABLE)


def unreadable_video(where: str, error: Exception) -> DataError:
    """Say that a library cannot read a video, with what it raised."""
    return unreadable("video", where, error, _LEAVE_OUT, UNREADABLE)


def open_container(data: bytes | Path, where: str) -> InputContainer:
    """Open a video, whose bytes or path `data` is; decoding takes one thread. Close it, or use it in a `with`.

    Raises `Refused` for what is no regular file or no video, and where its header goes beyond the bounds.
    """
    with translated(where, "give an mp4, mov, mkv, webm, avi or MPEG video, or leave it out"):
        if isinstance(data, Path) and not stat.S_ISREG(data.stat().st_mode):
            raise Refused(UNREADABLE, f"{where} is no regular file; give a video file or leave it out")
        # The prefix keeps a name like "tcp:a.mp4" a name.
        file = io.BytesIO(data) if isinstance(data, bytes) else f"file:{data}"
        container = av.open(file, "r", container_options=_OPTIONS)
    try:
        _check_header(container, where)
    except BaseException:
        container.close()
        raise
    return container


def _check_header(container: InputContainer, where: str) -> None:
    with translated(where):
        lengths = [s.duration * s.time_base for s in container.streams if s.duration and s.time_base]
        seconds = max([(container.duration or 0) / av.time_base, *map(float, lengths)])
        check_bound("video_seconds", seconds, where, "states a length in seconds")
        for stream in container.streams.video:
            context = stream.codec_context
            if context is None:  # of no known codec: whoever chooses the stream refuses it
                continue
            check_bound("video_pixels", context.width * context.height, where, "has frames of so many pixels")
            check_bound("video_frames", stream.frames, where, "states a number of frames")
            # Frames may grow on the way. A thread a video: processes decode side by side.
            context.options = {"max_pixels": str(bounds().video_pixels)}
            context.thread_count = 1


@dataclass(frozen=True)
class Packets:
    """Holds the shown packets of a video stream in the order of decoding: `pts` i64 [N], `is_key` bool [N].

    `hidden`: how many others there are, which an edit list or the codec says are never shown, or that have no time.
    """

    pts: np.ndarray
    is_key: np.ndarray
    hidden: int

    @property
    def closed(self) -> bool:
        """True if no frame needs one before its GOP: nothing that is decoded after a key frame is shown before it."""
        latest_first = np.minimum.accumulate(self.pts[::-1])[::-1]  # the earliest that is yet to come
        return bool(len(self.pts)) and bool(self.is_key[0]) and bool((latest_first == self.pts)[self.is_key].all())


def list_packets(
    container: InputContainer, stream: VideoStream, where: str, visit: Callable[[Packet], None] | None = None
) -> Packets:
    """List a stream's packets without decoding them, unless `visit`, which is called with each, does so.

    Raises `Refused` for more than the bounds allow.
    """
    pts, is_key, hidden = [], [], 0
    with translated(where):
        for packet in container.demux(stream):
            if packet.pts is not None and not packet.is_discard:
                pts.append(packet.pts)
                is_key.append(packet.is_keyframe)
                if len(pts) % _CHECKED_EVERY == 0:
                    check_bound("video_frames", len(pts), where, "lists frames")
            elif packet.size:  # the last one of all is empty
                hidden += 1
            if visit is not None:
                visit(packet)
        if pts:
            assert stream.time_base is not None, "its stream has no unit of time"
            seconds = float((max(pts) - min(pts)) * stream.time_base)
            check_bound("video_seconds", seconds, where, "has frames so many seconds apart")
    return Packets(np.array(pts, dtype=np.int64), np.array(is_key, dtype=bool), hidden)
