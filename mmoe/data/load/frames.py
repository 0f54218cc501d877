"""Give random access by number to the frames that a video stream shows, in the order it shows them."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from mmoe.data.load.containers import UNREADABLE, list_packets, open_container, translated
from mmoe.data.load.decord_proof import DecordReader, why_not
from mmoe.data.load.video import VideoBackend
from mmoe.errors import Refused

DAMAGED = "video: damaged frames, parts made up by the decoder"  # the flag that readers count them under
UNPROVEN = "video that decord is not proven to read"
_CHEAPER_THAN_SEEKING = 16  # frames ahead that are decoded on the way


class VideoFrames:
    """Gives random access to the frames of one video stream: number `stream` of a file, else FFmpeg's best.

    `data` is the file's bytes, or its path, where it need not fit into memory. `times_ns` i64 [N] is each frame's
    presentation time after the stream's start, strictly increasing; `size` is (height, width) upright. Both backends
    apply a rotation tag of quarter turns. `damaged` holds the numbers of those frames given so far whose decoder said
    that it made up parts of them, or that follow such a one up to the next key frame.

    decord reads the best stream only, and what is proven: `proven` says that this is known of the video; else the proof
    is made here (`decord_proof.why_not`). `key` is the config key that chose the backend, for messages.

    `scaled` (height, width) is what frames are scaled to as they are converted to RGB, or less far: for frames that are
    resized further down it saves most of the cost of decoding.
    """

    def __init__(
        self,
        data: bytes | Path,
        backend: VideoBackend,
        where: str,
        stream: int | None = None,
        scaled: tuple[int, int] | None = None,
        proven: bool = False,
        key: str = "data.video_backend",
    ) -> None:
        self.where = where
        if backend == "decord":
            if stream is not None:
                raise unproven(where, "it reads the best video stream only", key)
            if not proven and (reason := why_not(data, where)):
                raise unproven(where, reason, key)
            self._reader: DecordReader | _PyAVReader = DecordReader(data, where, scaled)
        else:
            self._reader = _PyAVReader(data, where, stream, scaled)
        self.times_ns = _checked_times(self._reader.times_ns, where)

    def __len__(self) -> int:
        return len(self.times_ns)

    @property
    def damaged(self) -> set[int]:
        """The indices of frames found damaged so far, of those that were asked for."""
        return self._reader.damaged

    @cached_property
    def size(self) -> tuple[int, int]:
        """The height and width of the frames in pixels; the first one is decoded for it."""
        return self.frames(np.array([0])).shape[1:3]

    def frames(self, indices: np.ndarray) -> np.ndarray:
        """Decode the frames at `indices` [n], in presentation order; any order, repeats allowed: uint8 [n, H, W, 3]."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise Refused(
                UNREADABLE,
                f"{self.where}: frames {indices.min()} to {indices.max()} are asked for, the video has {len(self)}; "
                "the index and the video do not belong together: prepare the source again",
            )
        return self._reader.frames(indices) if len(indices) else np.zeros((0, *self.size, 3), np.uint8)


def stored_frames(
    data: bytes, backend: VideoBackend, where: str, proven: bool, scaled: tuple[int, int] | None = None
) -> VideoFrames:
    """Open the frames of a video that is stored in a shard.

    `proven`: what its index says of decord. Raises `Refused` for a video that decord is to read and was not proven for
    at preparation.
    """
    if backend == "decord" and not proven:
        reason = "it was not proven, by preparing it with prepare.video_backend=decord, that decord shows its frames"
        raise unproven(where, reason, "data.video_backend")
    return VideoFrames(data, backend, where, scaled=scaled, proven=proven)


def unproven(where: str, reason: str, key: str) -> Refused:
    """Return the refusal of a video by decord; `key` is the config key that asks for it."""
    return Refused(UNPROVEN, f"{where} is not read by decord: {reason}; set {key}=auto, or encode it as H.264 mp4")


class _PyAVReader:
    """Frames are known by the times of their packets, and found by seeking to a key frame and decoding from there."""

    def __init__(self, data: bytes | Path, where: str, stream: int | None, scaled: tuple[int, int] | None) -> None:
        self._data, self._where, self._number, self._scaled = data, where, stream, scaled
        self._open()
        self._start = self._stream.start_time or 0
        packets = list_packets(self._container, self._stream, where)
        # AVI has no presentation times: what FFmpeg gives its frames is out of order where there are B-frames. The
        # decoder's order is right, so its frames are counted from the first on, and take the times in that order.
        self._counted = self._container.format.name == "avi"
        self._pts, self._keys = np.sort(packets.pts), np.sort(packets.pts[packets.is_key])
        self._index = {pts: index for index, pts in enumerate(self._pts.tolist())}
        self._decoding: Iterator[av.VideoFrame] = iter(())
        self._at = -1  # index of the last frame that `_decoding` gave
        self._converter = VideoReformatter()  # kept: it sets up its tables once an image size
        self._in_damage = False
        self.damaged: set[int] = set()

    def _open(self) -> None:
        self._container = open_container(self._data, self._where)
        with translated(self._where):
            streams = self._container.streams
            stream = streams.best("video") if self._number is None else streams[self._number]
        if not isinstance(stream, VideoStream) or stream.codec_context is None:
            message = f"{self._where} has no video stream that can be decoded; give a video file or leave it out"
            raise Refused("no video stream", message)
        self._stream = stream

    @property
    def times_ns(self) -> np.ndarray:
        base = self._stream.time_base
        ticks = [int(t) for t in self._pts - self._start]  # Python integers: a tick times 1e9 can leave 64 bits
        with translated(self._where):
            assert base is not None, "its stream has no unit of time"
            return np.array([round(t * 10**9 * base.numerator / base.denominator) for t in ticks], dtype=np.int64)

    def frames(self, indices: np.ndarray) -> np.ndarray:
        wanted = set(indices.tolist())
        found: dict[int, np.ndarray] = {}
        with translated(self._where):
            if not self._goes_on(min(wanted)):
                self._seek(None if self._counted else int(self._pts[min(wanted)]))
            self._decode(wanted, found)
            if len(found) < len(wanted) and not self._counted:  # an index may lead behind the frame that was sought
                self._seek(self._key_before(min(wanted - set(found))))
                self._decode(wanted, found)
            if len(found) < len(wanted):
                self._seek(None)
                self._decode(wanted, found)
            if len(found) < len(wanted):
                missing = wanted - set(found)
                raise Refused(
                    UNREADABLE,
                    f"{self._where}: {len(missing)} of {len(wanted)} frames cannot be decoded, the first is "
                    f"frame {min(missing)}; encode the video again as H.264 mp4, or leave it out",
                )
            return np.stack([found[index] for index in indices.tolist()])

    def _goes_on(self, first: int) -> bool:
        """Whether what is being decoded reaches frame `first`, and sooner than a seek would."""
        return first > self._at >= 0 and (self._counted or first - self._at <= _CHEAPER_THAN_SEEKING)

    def _key_before(self, index: int) -> int | None:
        """The time of the key frame before the one that a seek to frame `index` leads to."""
        at = int(np.searchsorted(self._keys, self._pts[index], side="right")) - 2
        return int(self._keys[at]) if at >= 0 else None

    def _seek(self, pts: int | None) -> None:
        """Decode from the key frame at or before `pts` on; None: from the start."""
        if pts is None:  # opened anew: not every container can be sought back to its first packet
            self._container.close()
            self._open()
        else:
            self._container.seek(pts, stream=self._stream)
        self._decoding, self._at = self._decoded(from_start=pts is None), -1
        self._in_damage = False

    def _decoded(self, from_start: bool) -> Iterator[av.VideoFrame]:
        """Frames from here on. After a seek, without those that are shown before its key frame: what they need of the
        GOP before is not there, and not every decoder leaves them out."""
        first = None if not from_start else -(2**63)
        for packet in self._container.demux(self._stream):
            if first is None and packet.is_keyframe and packet.pts is not None:
                first = packet.pts
            if first is None:
                continue
            for frame in packet.decode():
                self._in_damage = frame.is_corrupt or packet.is_corrupt or (self._in_damage and not frame.key_frame)
                if from_start or (frame.pts is not None and frame.pts >= first):
                    yield frame

    def _convert(self, frame: av.VideoFrame) -> av.VideoFrame:
        if self._scaled is None:
            return self._converter.reformat(frame, format="rgb24")
        height, width = self._scaled if frame.rotation % 180 == 0 else self._scaled[::-1]
        # Means over areas: free of aliases, and half of what bicubic filters cost.
        return self._converter.reformat(frame, width, height, "rgb24", interpolation="AREA")

    def _decode(self, wanted: set[int], found: dict[int, np.ndarray]) -> None:
        last = max(wanted)
        for frame in self._decoding:
            index = self._at + 1 if self._counted else self._index.get(frame.pts, len(self._pts))
            if index >= len(self._pts):
                continue  # an image that the container has no time for is not one of its frames
            self._at = index
            if index > last:
                return  # frames come in the order they are shown: what is missing lies behind
            if self._at in wanted and self._at not in found:
                found[self._at] = np.rot90(self._convert(frame).to_ndarray(), frame.rotation // 90)
                if self._in_damage:
                    self.damaged.add(self._at)
            if len(found) == len(wanted):
                return
        self._at = -1


def _checked_times(times_ns: np.ndarray, where: str) -> np.ndarray:
    if not len(times_ns):
        raise Refused(UNREADABLE, f"{where} holds no video frame; record it again or leave it out")
    wrong = np.flatnonzero(times_ns[1:] <= times_ns[:-1])
    if len(wrong):
        at = int(wrong[0]) + 1
        raise Refused(
            UNREADABLE,
            f"{where} has times that do not increase (frame {at} at {times_ns[at]} ns after {times_ns[at - 1]} ns); "
            "encode the video again as H.264 mp4, or leave it out",
        )
    return times_ns
