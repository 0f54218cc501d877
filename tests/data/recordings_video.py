"""Videos written packet by packet, so that every stream has the times that a test wants."""

import io
from fractions import Fraction

import av
import numpy as np
import soundfile

from tests.data.recordings import MILLISECOND


class Unseekable(io.BytesIO):
    """A pipe: a muxer cannot go back to write the duration."""

    def seekable(self) -> bool:
        return False


def ramp(start: int, count: int) -> np.ndarray:
    """Samples [count] i16 that tell their number modulo 30 000; never 0."""
    return ((np.arange(start, start + count) % 30_000) + 1).astype(np.int16)


def video_bytes(
    frames: list[np.ndarray] | np.ndarray,
    times_ms: list[int],
    audio: list[tuple[int, list[tuple[int, np.ndarray]]]] = (),
    *,
    container: str = "matroska",
    codec: str = "libx264",
    audio_codec: str = "pcm_s16le",
    pipe: bool = False,
    audio_first: bool = False,
    **options,
) -> bytes:
    """Video streams of `frames` ([N, H, W, 3], or a list of them) at `times_ms`, and audio clips of (rate, pieces).

    A piece is (start in ms, samples i16 [n]).
    """
    buffer = Unseekable() if pipe else io.BytesIO()
    videos = frames if isinstance(frames, list) else [frames]
    with av.open(buffer, "w", format=container) as file:

        def add_video(pixels):
            stream = file.add_stream(codec, rate=25, options={k: str(v) for k, v in options.items()})
            stream.height, stream.width = pixels.shape[1:3]
            stream.pix_fmt = "yuv420p"
            if codec == "libx264" and container != "avi":
                stream.codec_context.time_base = MILLISECOND
            return stream

        def add_audio(rate):
            return file.add_stream(audio_codec, rate=rate, layout="mono")

        if audio_first:
            heard = [add_audio(rate) for rate, _ in audio]
            seen = [add_video(pixels) for pixels in videos]
        else:
            seen = [add_video(pixels) for pixels in videos]
            heard = [add_audio(rate) for rate, _ in audio]
        packets = []
        for stream, pixels in zip(seen, videos):
            for number, (image, time) in enumerate(zip(pixels, times_ms)):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                own = stream.codec_context.time_base == MILLISECOND
                frame.pts, frame.time_base = (time, MILLISECOND) if own else (number, Fraction(1, 25))
                packets += stream.encode(frame)
            packets += stream.encode()
        for stream, (rate, pieces) in zip(heard, audio):
            for start, wave in pieces:
                for at in range(0, len(wave), 160):
                    part = wave[at : at + 160]
                    frame = av.AudioFrame.from_ndarray(part[None], format="s16", layout="mono")
                    frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
                    frame.pts = start * rate // 1000 + at
                    packets += stream.encode(frame)
            packets += stream.encode()
        for packet in sorted(packets, key=lambda p: float((p.dts if p.dts is not None else 0) * p.time_base)):
            file.mux(packet)
    return buffer.getvalue()


def clicks(seconds: float, rate: int) -> np.ndarray:
    """A tone with clicks [n] f32, for which Vorbis changes between its two sizes of blocks."""
    rng, wave = np.random.default_rng(0), 0.2 * np.sin(np.arange(int(seconds * rate)) * 2 * np.pi * 300 / rate)
    for at in rng.integers(0, len(wave) - 2000, int(3 * seconds)):
        wave[at : at + 2000] += rng.normal(0, 0.15, 2000) * np.exp(-np.arange(2000) / 300)
    return wave.astype(np.float32)


def webm_bytes(frames: np.ndarray, fps: int, wave: np.ndarray, rate: int, gap_ms: int = 0) -> bytes:
    """WebM of VP8, and of Vorbis as soundfile makes it; its second half begins `gap_ms` later than the first ends."""
    ogg, buffer = io.BytesIO(), io.BytesIO()
    soundfile.write(ogg, wave, rate, format="OGG", subtype="VORBIS")
    with av.open(io.BytesIO(ogg.getvalue())) as heard, av.open(buffer, "w", format="webm") as file:
        stream = file.add_stream("libvpx", rate=fps, options={"deadline": "realtime", "cpu-used": "8"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        sound, packets = file.add_stream_from_template(heard.streams.audio[0]), []
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            packets += stream.encode(frame)
        packets += stream.encode()
        for packet in heard.demux():
            if packet.dts is not None:
                if packet.pts * packet.time_base > len(wave) / rate / 2:
                    packet.pts = packet.dts = packet.pts + gap_ms * rate // 1000
                packet.stream = sound
                packets.append(packet)
        for packet in sorted(packets, key=lambda p: float(p.dts * p.time_base)):
            file.mux(packet)
    return buffer.getvalue()
