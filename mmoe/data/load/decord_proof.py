"""Read videos by decord, and prove that it may: that it gives frame by frame what PyAV gives.

decord counts the packets of a video and seeks by that count: where the GOPs are open, an edit list trims the video, or
packets are never shown, it gives other frames than those asked for, and says nothing. A damaged table ends its
process. So it reads a video only after PyAV has read the whole of it without complaint, its structure is one that
decord's count holds for, and a process apart has given the same pixels: every frame in order, and those around every
key frame by seeking.
"""

import io
import os
import pickle
import select
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.reformatter import VideoReformatter

from mmoe.data.load.containers import list_packets, open_container, translated, unreadable_video
from mmoe.errors import MmoeError
from mmoe.hashing import blake2b
from mmoe.optional import require, status
from mmoe.schema.sample import ALIGNMENT_NS

CODECS = ("h264", "mpeg4")
CONTAINERS = ("mov", "matroska")

# Of these widths decord takes the padding of a row for further channels, and fails.
UNFIT_WIDTHS = frozenset((1, 2, 3, 4, 6, 8, 12, 16, 24, 48, 72))

_LONGEST_NS = 2**13 * 10**9  # decord gives float32 seconds, 1 ms apart beyond this
_BATCH = 8  # frames
_AHEAD = 8  # frames that are sought forward
_SECONDS, _SECONDS_A_FRAME = 60.0, 0.5  # that the process apart may take


class DecordReader:
    """Reads frames of the best video stream by decord; only for videos that are proven.

    `scaled` (height, width) is passed to decord where it can scale to it; else frames come at full size.
    """

    def __init__(self, data: bytes | Path, where: str, scaled: tuple[int, int] | None = None) -> None:
        decord = require("decord", "video_backend")  # only here: it exists for Linux on x86-64 alone
        self._where, self._raised = where, (RuntimeError, decord.DECORDError, IndexError, ValueError)
        decord.logging.set_level(decord.logging.QUIET)  # it prints what it then raises
        height, width = (-1, -1) if scaled is None or UNFIT_WIDTHS & set(scaled) else scaled
        file = io.BytesIO(data) if isinstance(data, bytes) else str(data.absolute())
        try:
            self._video = decord.VideoReader(file, width=width, height=height, num_threads=1)
            seconds = self._video.get_frame_timestamp(np.arange(len(self._video)))[:, 0].astype(np.float64)
        except self._raised as error:
            raise unreadable_video(where, error) from error
        self.times_ns = np.rint(seconds * 1e9).astype(np.int64)
        self.damaged: set[int] = set()  # it does not tell

    def frames(self, indices: np.ndarray) -> np.ndarray:
        """Decode the frames at `indices` [n]: uint8 [n, H, W, 3].

        Raises `Refused` where decord cannot.
        """
        try:
            return self._video.get_batch(indices).asnumpy()
        except self._raised as error:
            raise unreadable_video(self._where, error) from error


def why_not(data: bytes | Path, where: str) -> str | None:
    """Return why decord must not read a video; None where it is proven to give what PyAV gives.

    The video is decoded as a whole, several times; of a file this is done once a process. Raises `Refused` for a video
    that PyAV cannot read either.
    """
    found = status("decord")
    if not found.available:
        return found.reason
    if isinstance(data, bytes):
        return _examine(data, where)
    with translated(where):
        stat = data.stat()
    return _examine_file(data, where, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4096)
def _examine_file(file: Path, where: str, changed_ns: int, size: int) -> str | None:
    return _examine(file, where)


def _examine(data: bytes | Path, where: str) -> str | None:
    with open_container(data, where) as container:
        if reason := _unfit_kind(container):
            return reason
        (stream,) = container.streams.video
        digests, converter = {}, VideoReformatter()

        def digest(packet: Packet) -> None:
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise _UnfitError(f"the frame at {frame.time} s is damaged")
                pixels = converter.reformat(frame, format="rgb24").to_ndarray()
                digests[frame.pts] = _digest(np.rot90(pixels, frame.rotation // 90))

        try:
            packets = list_packets(container, stream, where, digest)
        except _UnfitError as unfit:
            return str(unfit)
        if packets.hidden:
            return f"an edit list or the codec hides {packets.hidden} packets, which it would count as frames"
        if not packets.closed:
            return "its GOPs are open: after a seek it shows other frames"
        order = np.argsort(packets.pts, kind="stable")
        pts = packets.pts[order]
        if list(digests) != pts.tolist():
            return "what is decoded are not the frames of its packets"
        ticks = (pts - (stream.start_time or 0)).astype(np.float64)
        base = stream.time_base
        assert base is not None  # its packets have times
        times_ns = ticks * (base.numerator * 1e9 / base.denominator)
        if np.abs(times_ns).max() > _LONGEST_NS:
            return "it is too long for its times, which are float32"
    return _compare(data, times_ns, list(digests.values()), np.flatnonzero(packets.is_key[order]))


class _UnfitError(MmoeError):
    """A video that decord must not read, found in decoding it: no fault of the bytes, which `reading` lets pass."""


def _unfit_kind(container: InputContainer) -> str | None:
    name, streams = container.format.name, container.streams.video
    if len(streams) != 1:
        return f"there are {len(streams)} video streams, and it may take another one"
    if not set(name.split(",")) & set(CONTAINERS):
        return f"a container of the kind {name} does not tell it the times of frames"
    context = streams[0].codec_context
    codec = context.name if context else "unknown"
    if codec not in CODECS:
        return f"the codec {codec} is not among those it seeks well in ({', '.join(CODECS)})"
    return None


def _digest(pixels: np.ndarray) -> bytes:
    return blake2b([np.ascontiguousarray(pixels).data], 8)


def _compare(data: bytes | Path, times_ns: np.ndarray, digests: list[bytes], keys: np.ndarray) -> str | None:
    """Say what decord gives otherwise, in order and where it is made to seek; `keys` are the key frames' numbers."""
    everything = np.arange(len(times_ns))
    around = np.unique((keys[:, None] + np.arange(-1, 2)).clip(0, len(times_ns) - 1))
    ahead = everything[1 : 2 * _AHEAD : 2]  # as a batch that leaves frames out
    requests = [[everything[at : at + _BATCH] for at in range(0, len(everything), _BATCH)]]
    requests += [[*around[::-1, None], ahead] if len(ahead) else [*around[::-1, None]]]
    limit = _SECONDS + _SECONDS_A_FRAME * (len(everything) + len(around))
    answer = _ask((data if isinstance(data, bytes) else data.absolute(), requests), limit)
    if isinstance(answer, str):
        return answer
    theirs_ns, found = answer
    if len(theirs_ns) != len(times_ns):
        return f"it counts {len(theirs_ns)} frames, of {len(times_ns)}"
    late_ns = np.abs(theirs_ns - times_ns).max()
    if late_ns > ALIGNMENT_NS:
        return f"its times are up to {late_ns / 1e6:.3f} ms off"
    for batches, theirs in zip(requests, found, strict=True):
        order = np.concatenate(batches).tolist()
        wrong = [index for index, digest in zip(order, theirs, strict=True) if digest != digests[index]]
        if wrong:
            return f"it shows {len(wrong)} of {len(order)} frames otherwise, the first is frame {wrong[0]}"
    return None


_apart: dict[int, subprocess.Popen] = {}  # by process: a fork must not talk to its parent's


def _ask(request: tuple[bytes | Path, list[list[np.ndarray]]], limit: float) -> Any:
    """The answer of the process apart, or in words why there is none."""
    process = _apart.get(os.getpid())
    if process is None or process.poll() is not None:
        code = "from mmoe.data.load.decord_proof import serve; serve()"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = _apart[os.getpid()] = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
    requests, answers = process.stdin, process.stdout
    assert requests is not None  # pipes, as asked for
    assert answers is not None
    try:
        pickle.dump(request, requests)
        requests.flush()
        if select.select([answers], [], [], limit)[0]:
            return pickle.load(answers)
        said = f"it takes longer than {limit:.0f} s"
    except (EOFError, OSError, pickle.UnpicklingError):
        said = "it ends its process"
    process.kill()
    process.wait()
    del _apart[os.getpid()]
    return said


def serve() -> None:
    """Be the process apart: read requests from standard input, decode by decord, and write digests, until its end."""
    answers = os.fdopen(os.dup(1), "wb")
    answer: tuple[np.ndarray, list[list[bytes]]] | str
    os.dup2(2, 1)  # what a library prints is no answer
    while True:
        try:
            data, requests = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = _decode(data, requests)
        except Exception:  # whatever decord makes of it, in words that change from call to call
            answer = "it cannot read it"
        pickle.dump(answer, answers)
        answers.flush()


def _decode(data: bytes | Path, requests: list[list[np.ndarray]]) -> tuple[np.ndarray, list[list[bytes]]]:
    """The times that decord gives the frames, and the digests of the frames of each request, by a reader of its own."""
    found = []
    for batches in requests:
        reader = DecordReader(data, "the video")
        if len(reader.times_ns) <= max(map(np.max, batches)):
            break
        found.append([_digest(frame) for batch in batches for frame in reader.frames(batch)])
    return reader.times_ns, found
