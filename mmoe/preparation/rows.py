"""Makes a row of the index from a sample: every payload is opened once here, so that training meets no surprise.

This runs in the worker processes of preparation; it depends on nothing but the sample and the text tokenizer.
"""

import errno
import re
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmoe.data.index.shards import ShardWriter, check_field, check_key
from mmoe.data.load.tables import load_array
from mmoe.data.load.video import VideoBackend, is_video
from mmoe.errors import DataError, MmoeError, counted_as
from mmoe.hashing import hash64
from mmoe.optional import needs
from mmoe.preparation.sources.base import Item, Refused
from mmoe.schema.channels import CANCELLED, find_silence, heard_channel
from mmoe.schema.manifest import VECTORS
from mmoe.schema.modality import CONTRASTED, Modality
from mmoe.schema.sample import NO_PAIR, SEGMENT_DTYPE, SEGMENT_FIELDS, Sample, Segment
from mmoe.tokenizers.rates import check_rates
from mmoe.tokenizers.text import TextTokenizer

if TYPE_CHECKING:
    from mmoe.data.load.frames import VideoFrames

_COPIED = [name for name in SEGMENT_FIELDS if name not in ("member", "text_hash")]
_FRAMES_AT_ONCE = 64  # of a video being checked: bounds the memory
_OF_THE_MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EROFS}


@dataclass(frozen=True)
class Row:
    """Holds a checked sample with its index fields.

    `text_ids` [n] i32 are the tokens of its texts, `segments` [m] its segments as SEGMENT_DTYPE. `text_bytes` is the
    UTF-8 length of its texts; `vectors` holds the tables [N, D] f32 (N readings of D dimensions) that the segments
    refer to, by modality, each once. `decord` names the videos that decord is proven to read.
    """

    sample: Sample
    content_hash: int
    text_ids: np.ndarray
    segments: np.ndarray
    text_bytes: int
    vectors: dict[Modality, list[np.ndarray]]
    decord: frozenset[str] = frozenset()

    def write(self, writer: ShardWriter) -> None:
        """Append the sample to a shard."""
        writer.write(
            self.sample.key,
            self.sample.members,
            recording=self.sample.recording,
            content_hash=self.content_hash,
            text_ids=self.text_ids,
            segments=self.segments,
            decord=self.decord,
        )


def make_row(
    item: Item,
    tokenizer: TextTokenizer,
    video_backend: VideoBackend,
    vector_names: dict[str, tuple[str, ...]],
    audio_rate: int | None = None,
    categories: Mapping[str, tuple[str, ...]] | None = None,
) -> Row | Refused:
    """Make the item's sample and check it; anything wrong with the data is returned, not raised.

    `audio_rate` is the rate that the codec which is to be fitted resamples audio clips to, in Hz; `categories` are as
    `Source` has them.
    """
    try:
        sample = make_sample(item)
        with _translated(item.key):
            _check_rates(sample, audio_rate)
            return build_row(_as_heard(sample), tokenizer, video_backend, vector_names, categories or {})
    except Refused as refusal:
        return refusal


def make_sample(item: Item) -> Sample:
    """Make the item's sample; raise `Refused` for whatever is wrong with the data."""
    with counted_as("unusable key"):
        check_key(item.key)
    with _translated(item.key), counted_as("unreadable recording"):
        sample = item.make()
    if (sample.key, sample.recording) != (item.key, item.recording):
        raise ValueError(f"reader made sample {sample.key} of {sample.recording} for item {item}")
    return sample


@contextmanager
def _translated(key: str) -> Iterator[None]:
    """The last line of defence: what no reader foresaw costs its item, not the hours of the preparation around it.

    Decoders' exceptions are translated where foreign bytes are decoded (`data.load.reading`), so that what comes up to
    here is a fault of ours. It is counted under a reason of its own, with its type and place for a report. What the
    machine lacks (disk, file handles) is no fault of the item, and ends the preparation.
    """
    try:
        yield
    except MmoeError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = re.sub(r" at 0x[0-9a-f]+", "", str(error))[:200]
        message = (
            f"{key}: the reader failed with {type(error).__name__} ({said}) in {Path(place.filename).name}, line "
            f"{place.lineno}; please report it, and leave the item out meanwhile"
        )
        raise Refused("reader failed", message) from error


def build_row(
    sample: Sample,
    tokenizer: TextTokenizer,
    video_backend: VideoBackend,
    vector_names: dict[str, tuple[str, ...]],
    categories: Mapping[str, tuple[str, ...]],
) -> Row:
    """Check every payload of the sample and tokenize its texts; raise `Refused` for what is wrong."""
    with counted_as("malformed sample"):
        _check_structure(sample)
    vectors: dict[Modality, list[np.ndarray]] = {}
    proven, flags = set(), Counter(sample.flags)
    for (modality, member), segments in _by_payload(sample).items():
        with counted_as(modality.spec.refused_as):
            where = f"{sample.key}.{member}"
            table = _check_payload(segments, sample.members[member], where, flags, member in sample.cancelled)
            if modality is Modality.VISION and is_video(member):
                if _is_proven(sample.members[member], where, video_backend):
                    proven.add(member)
            elif table is not None:
                _check_dimensions(table, vector_names.get(modality.name, ()), where)
                if modality is Modality.ACTION:
                    _check_categories(table, vector_names[modality.name], categories, where)
                vectors.setdefault(modality, []).append(table.astype(np.float32))

    text_ids = tokenizer.encode_batch([s.text for s in sample.segments if s.modality is Modality.TEXT])
    names = list(sample.members)
    records = np.zeros(len(sample.segments), SEGMENT_DTYPE)
    ranges = iter(np.cumsum([0, *map(len, text_ids)]).tolist())
    start = next(ranges)
    for row, segment in zip(records, sample.segments):
        for name in _COPIED:
            row[name] = getattr(segment, name)
        row["member"] = names.index(segment.member)
        if segment.modality is Modality.TEXT:
            row["start"], row["stop"] = start, (start := next(ranges))
            row["text_hash"] = hash64(segment.text.encode())
    return Row(
        sample=replace(sample, flags=flags),
        content_hash=_content_hash(sample),
        text_ids=np.concatenate([np.zeros(0, np.int32), *text_ids]).astype(np.int32),
        segments=records,
        text_bytes=sum(len(s.text.encode()) for s in sample.segments),
        vectors=vectors,
        decord=frozenset(proven),
    )


def _check_rates(sample: Sample, target: int | None) -> None:
    for segment in sample.segments:
        if target is not None and segment.modality is Modality.AUDIO:
            with counted_as(Modality.AUDIO.spec.refused_as):
                check_rates(segment.rate, target, f"{sample.key}.{segment.member}")


def _as_heard(sample: Sample) -> Sample:
    """The sample with audio of the chosen channel alone, lossless; as it is where no channel is chosen."""
    names = {s.member for s in sample.segments if s.modality is Modality.AUDIO} & sample.members.keys()
    if heard_channel() == "mix" or not names:
        return sample
    with needs("decoding audio"):
        from mmoe.data.load.media import audio_info, open_audio
        from mmoe.preparation.sources.encode import audio_piece
    members, new, renamed = dict(sample.members), {}, {}
    for name in names:
        where = f"{sample.key}.{name}"
        with counted_as(Modality.AUDIO.spec.refused_as):
            with open_audio(members[name], where) as audio:
                channels = audio.channels
            if channels > 1:
                new[name], suffix = audio_piece(members[name], 0, audio_info(members[name], where)[0], where)
                renamed[name] = name.rpartition(".")[0] + suffix
    for name in new:
        del members[name]
    renamed |= {name: f"{name}.{other.rpartition('.')[2]}" for name, other in renamed.items() if other in members}
    return replace(
        sample,
        members={renamed.get(name, name): new.get(name, data) for name, data in sample.members.items()},
        segments=[replace(segment, member=renamed.get(segment.member, segment.member)) for segment in sample.segments],
    )


def _by_payload(sample: Sample) -> dict[tuple[Modality, str], list[Segment]]:
    """Segments that have a payload of their own, by modality and member, so that each is opened once."""
    payloads: dict[tuple[Modality, str], list[Segment]] = {}
    for segment in sample.segments:
        if segment.modality is not Modality.TEXT:
            payloads.setdefault((segment.modality, segment.member), []).append(segment)
    return payloads


def _check_dimensions(table: np.ndarray, names: tuple[str, ...], where: str) -> None:
    if table.shape[1] != len(names):
        raise DataError(
            f"{where} has {table.shape[1]} dimensions, the source names {len(names)} ({', '.join(names)}); "
            "correct the log or the reader"
        )


def _check_categories(
    table: np.ndarray, names: tuple[str, ...], categories: Mapping[str, tuple[str, ...]], where: str
) -> None:
    for name, values in categories.items():
        column = table[:, names.index(name)]
        wrong = ~np.isin(column, np.arange(len(values)))
        if wrong.any():
            found = f"{where}: {name} is {column[wrong][0]:g} in row {int(wrong.argmax())}"
            raise DataError(
                f"{found}, but its categories have the numbers 0 to {len(values) - 1} ({', '.join(values)}); correct "
                "the log or the option categories"
            )


def _check_payload(
    segments: list[Segment], data: bytes, where: str, flags: Counter[str], cancelled: bool
) -> np.ndarray | None:
    """Open the payload `data` of one modality and decode all that its segments refer to; returns a table [N, D].

    Counts into `flags` what is as it should not be and is kept; audio that is `cancelled` no longer shows that it was.
    """
    first = segments[0]
    if first.modality is Modality.VISION:
        if is_video(first.member):
            with needs("decoding video"):
                from mmoe.data.load.frames import VideoFrames
            _check_video(segments, VideoFrames(data, "pyav", where), where)
        else:
            with needs("decoding images"):
                from mmoe.data.load.media import load_image
            _check_images(segments, 1, load_image(data, where)[None], where)
    elif first.modality is Modality.AUDIO:
        with needs("decoding audio"):
            from mmoe.data.load.media import audio_info, audio_levels
        samples, rate = audio_info(data, where)
        for segment in segments:
            if rate != segment.rate:
                raise DataError(f"{where} has {rate} Hz, its segment says {segment.rate} Hz; correct the reader")
            _check_range(segment, samples, where)
            levels = audio_levels(data, segment.start, segment.stop, where)
            silence = CANCELLED if cancelled else find_silence(*levels)
            if silence is not None:
                flags[silence] += 1
    elif first.modality.name in VECTORS:
        table = load_array(data, where)
        for segment in segments:
            _check_range(segment, len(table), where)
        return table
    else:
        first.modality.spec.check(segments, data, where)
    return None


def _check_video(segments: list[Segment], video: "VideoFrames", where: str) -> None:
    wanted = np.unique(np.concatenate([np.arange(s.start, s.stop) for s in segments]))
    for at in range(0, len(wanted), _FRAMES_AT_ONCE):
        indices = wanted[at : at + _FRAMES_AT_ONCE]
        _check_images(segments, len(video), video.frames(indices), where)
        if video.damaged:  # a reader that takes images out counts them; here every epoch would show them anew
            raise DataError(
                f"{where} is damaged: the decoder makes up parts of {len(video.damaged)} frames, the first is "
                f"{min(video.damaged)}; restore it or leave it out"
            )


def _is_proven(data: bytes, where: str, video_backend: VideoBackend) -> bool:
    """Prove that decord reads the video, where it is to. Raises `Refused` where it does not.

    Only then: the proof decodes every video several times, and without it training takes PyAV, which is as fast.
    """
    if video_backend != "decord":
        return False
    with needs("decoding video"):
        from mmoe.data.load.decord_proof import why_not
        from mmoe.data.load.frames import unproven
    if reason := why_not(data, where):
        raise unproven(where, reason, "prepare.video_backend")
    return True


def _check_images(segments: list[Segment], length: int, images: np.ndarray, where: str) -> None:
    """`images` [n, H, W, 3] must have the size that every segment states, and its range lie in `length`."""
    height, width = images.shape[1:3]
    for segment in segments:
        _check_range(segment, length, where)
        if (segment.height, segment.width) != (height, width):
            raise DataError(
                f"{where} has {height} x {width} pixels, its segment says {segment.height} x {segment.width}; "
                "correct the reader"
            )


def _check_structure(sample: Sample) -> None:
    for field in sample.members:
        check_field(sample.key, field)
    if not sample.segments:
        raise DataError(f"sample {sample.key} has no segment, so there is nothing to learn from it; leave it out")
    others = set()  # slices that already hold something else than VISION
    for segment in sample.segments:
        if segment.member not in sample.members:
            raise DataError(f"sample {sample.key}: a segment names {segment.member!r}, which is not a member of it")
        if segment.modality is Modality.VISION and segment.slice >= 0 and segment.slice in others:
            raise DataError(f"sample {sample.key}: in slice {segment.slice} VISION follows another modality")
        if segment.pair != NO_PAIR and segment.modality not in CONTRASTED:
            raise DataError(
                f"sample {sample.key}: a {segment.modality.name} segment is a side of a pair, which images, audio and "
                "texts can be; leave its pair out"
            )
        if segment.modality is not Modality.VISION:
            others.add(segment.slice)
        if segment.modality is Modality.TEXT and not segment.text.strip():
            raise DataError(f"sample {sample.key}: a text is blank; give it words or leave the segment out")


def _check_range(segment: Segment, length: int, where: str) -> None:
    if not 0 <= segment.start < segment.stop <= length:
        raise DataError(
            f"{where} holds {length} entries, its segment asks for {segment.start} to {segment.stop}; the recording "
            "is empty, truncated or not the one the log belongs to: restore it or leave it out"
        )


def _content_hash(sample: Sample) -> int:
    """Of what was sensed, whatever is said of it: an image with another caption is the same image."""
    sensed = {s.member for s in sample.segments if s.modality is not Modality.TEXT}
    if not sensed:
        return hash64(*(s.text.encode() for s in sample.segments))
    return hash64(*(sample.members[name] for name in sorted(sensed)))
