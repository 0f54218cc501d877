"""Turn a planned document part into a laid-out document: read the members, decode, tokenize, lay out."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from mmoe.addresses import local_path
from mmoe.data.index.shard_index import ShardIndex
from mmoe.data.index.shards import READ_GAP, ByteSpan, read_stored, spans
from mmoe.data.load.tables import load_array
from mmoe.data.load.video import VideoBackend, is_video
from mmoe.data.plan.planner import DocumentRef
from mmoe.data.storage.store import DEFAULT_STORAGE, Reading, Storage, StorageError
from mmoe.errors import DataError
from mmoe.modalities.document import Document, DocumentBuilder
from mmoe.optional import needs
from mmoe.schema.modality import Modality
from mmoe.schema.sample import GIVEN
from mmoe.tokenizers.bundle import Tokenizers
from mmoe.tokenizers.vocabulary import Structure

RowPlace = tuple[int, int, int]  # source, shard, row
Index = Callable[[int, int], ShardIndex]  # by source and shard


class StandIn(Protocol):
    """Says whose payloads are shown instead of a part's own, all those of one modality; it travels to the workers."""

    @property
    def modality(self) -> Modality:
        """The modality that is replaced."""

    def __call__(self, row: RowPlace, index: Index, segments: np.ndarray, at: int) -> tuple[int, int, np.void] | None:
        """Return shard, row and segment, of the same source, shown for `segments[at]`; None for zeros (silence)."""


@dataclass(frozen=True)
class SourceFiles:
    """Says where a source's shards lie, by shard number of the planned split."""

    name: str
    tars: tuple[str, ...]


_INDICES_A_SOURCE = 20  # in memory: those of the block of shards that documents are drawn from, and some of the next


class SampleLoader:
    """Decodes document parts; holds no state but caches, so any worker gives the same document."""

    def __init__(
        self,
        sources: list[SourceFiles],
        tokenizers: Tokenizers,
        video_backend: VideoBackend,
        stand_in: StandIn | None = None,
        skip: frozenset[Modality] = frozenset(),
        storage: Storage = DEFAULT_STORAGE,
    ) -> None:
        """Make a loader of the parts of `sources`, by their numbers.

        `skip`: modalities that are left out of the documents (an analysis that does not look at them).
        """
        self.sources, self.tokenizers, self.video_backend = sources, tokenizers, video_backend
        self.stand_in, self.skip, self.storage = stand_in, skip, storage
        self._index: Callable[[str], ShardIndex] = lru_cache(_INDICES_A_SOURCE * len(sources))(self._load)
        self._begun: dict[tuple, _Row] = {}

    def __call__(self, ref: DocumentRef, text_ids: np.ndarray | None = None) -> list[Document]:
        """Decode the documents of a part: one, or the part and the isolated texts of its pairs, in pair order.

        `text_ids` replaces the row's text (candidate ranking); it needs a row with one TEXT segment.
        """
        row = self._begun.pop(_key(ref), None) or _Row(self, ref).begin()
        return row.text_part() if row.text_only else row.document(text_ids)

    def __reduce__(self) -> tuple:
        settings = (self.sources, self.tokenizers, self.video_backend, self.stand_in, self.skip, self.storage)
        return SampleLoader, settings

    def prefetch(self, refs: Iterable[DocumentRef]) -> None:
        """Begin to read what these parts need of remote shards, all at once; decoding one then waits for its own.

        What cannot be read is said when the part is decoded. Raises StorageError for a store that does not answer.
        """
        self._begun.clear()
        remote = [ref for ref in refs if local_path(self.sources[ref.source].tars[ref.shard]) is None]
        shards = list({(int(ref.source), int(ref.shard)) for ref in remote})
        usable = dict(zip(shards, self.storage.map(self._is_usable, shards), strict=True)) if shards else {}
        for ref in remote:
            if usable[ref.source, ref.shard] and _key(ref) not in self._begun:
                self._begun[_key(ref)] = _Row(self, ref).begin()

    def index(self, source: int, shard: int) -> ShardIndex:
        """Return the index of a shard, from the cache where it was read before."""
        return self._index(self.sources[source].tars[shard])

    def _load(self, tar: str) -> ShardIndex:
        index = ShardIndex.read(tar, self.storage)
        index.check_tar(self.storage)
        return index

    def _is_usable(self, shard: tuple[int, int]) -> bool:
        try:
            self.index(*shard)
        except StorageError:
            raise
        except DataError:
            return False
        return True


def _key(ref: DocumentRef) -> tuple:
    return ref.source, ref.shard, ref.row, ref.first, ref.last, ref.isolated


class _Row:
    """One document part being decoded."""

    def __init__(self, decoder: SampleLoader, ref: DocumentRef) -> None:
        self.decoder, self.ref, self.tokenizers = decoder, ref, decoder.tokenizers
        self.source = decoder.sources[ref.source].name
        self.index = decoder.index(ref.source, ref.shard)
        self.segments = self.index.row_segments(ref.row)
        self.text_only = bool((self.segments["modality"] == Modality.TEXT).all())
        self.text_start = self.tokenizers.vocabulary.ranges["text"].start
        self._videos: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # frame numbers, frames
        self._arrays: dict[str, np.ndarray] = {}
        self._members: dict[str, bytes] = {}
        self._coming: dict[str, tuple[ByteSpan, Reading]] = {}
        self._shown: dict[tuple[int, int], _Row] = {}  # instead of this one

    def begin(self) -> "_Row":
        """Begin to read the members that the part is made of: far away, few ranges of many members each."""
        tar, chosen = self.index.tar, self._chosen()
        wanted = np.ones(len(chosen), bool)
        for kind in Modality:
            if kind is Modality.TEXT or kind in self.decoder.skip or self._is_replaced(kind):
                wanted &= chosen["modality"] != kind
        members = [self.index.member(self.ref.row, int(n)) for n in np.unique(chosen["member"][wanted])]
        for span in spans(members, READ_GAP if local_path(tar) is None else 0):
            what = span.members[0].name + (f" to {span.members[-1].name}" if len(span.members) > 1 else "")
            reading = self.decoder.storage.begin(tar, span.start, span.stop, what)
            self._coming |= {member.name: (span, reading) for member in span.members}
        return self

    def _chosen(self) -> np.ndarray:
        """The part's segments."""
        numbers = self.segments["slice"]
        if not (numbers >= 0).any():
            return self.segments
        return self.segments[(numbers >= self.ref.first) & (numbers < self.ref.last)]

    def text_part(self) -> list[Document]:
        builder = DocumentBuilder.from_tokenizers(self.tokenizers)
        builder.structure(Structure.BOS)
        ids = self.text_start + self.index.row_text(self.ref.row)
        for segment in self.segments:
            start, stop = max(segment["start"], self.ref.first), min(segment["stop"], self.ref.last)
            if start < stop:
                builder.text(ids[start:stop], pair=-1, given=segment["rate"] == GIVEN)
        if self.ref.is_last:
            builder.structure(Structure.EOS, predicted=self.segments["rate"][-1] != GIVEN)
        return [builder.finish()]

    def document(self, text_ids: np.ndarray | None) -> list[Document]:
        chosen = self._chosen()
        has_slices = bool((self.segments["slice"] >= 0).any())
        builder, isolated = DocumentBuilder.from_tokenizers(self.tokenizers), []
        builder.structure(Structure.BOS)
        if has_slices:
            builder.structure(Structure.VIDEO_START)
        open_slice, ends_with_text = -1, False
        for at, segment in enumerate(chosen):
            number = int(segment["slice"])
            if has_slices and number != open_slice:
                if open_slice >= 0:
                    builder.close_slice(predicted=ends_with_text)
                builder.open_slice(number - self.ref.first, int(segment["timestamp_ns"]))
                open_slice, ends_with_text = number, False
            kind = Modality(segment["modality"])
            if kind in self.decoder.skip:
                continue
            pair = int(segment["pair"]) if self.ref.isolated else -1
            if kind is Modality.TEXT:
                ids = text_ids if text_ids is not None else self._text(segment)
                given = bool(segment["rate"] == GIVEN)
                if pair >= 0:
                    isolated.append(self._isolated(ids, pair, int(segment["text_hash"]), given))
                else:
                    builder.text(ids, pair=-1, given=given)
                    ends_with_text = len(ids) > 0 and not given
                continue
            ends_with_text = False
            payload = self._payload(segment, at, chosen, pair)
            kind.spec.layout(builder, kind.spec.encode(payload, self.tokenizers), payload)
        if has_slices:
            builder.close_slice(predicted=ends_with_text)
            builder.structure(Structure.VIDEO_END)
        builder.structure(Structure.EOS, predicted=ends_with_text and not has_slices)
        return [builder.finish(), *isolated]

    def _isolated(self, ids: np.ndarray, pair: int, text_hash: int, given: bool) -> Document:
        builder = DocumentBuilder.from_tokenizers(self.tokenizers)
        builder.structure(Structure.BOS)
        builder.text(ids, pair, text_hash, given)
        builder.structure(Structure.EOS, predicted=len(ids) > 0 and not given)
        return builder.finish()

    def _text(self, segment: np.void) -> np.ndarray:
        return self.text_start + self.index.row_text(self.ref.row)[segment["start"] : segment["stop"]]

    def _is_replaced(self, kind: int) -> bool:
        return self.decoder.stand_in is not None and self.decoder.stand_in.modality == kind

    def _payload(self, segment: np.void, at: int, chosen: np.ndarray, pair: int) -> "_Payload":
        """A segment with what is shown of it: its own content, unless others stand in."""
        if not self._is_replaced(segment["modality"]):
            return _Payload(self, segment, pair, self, segment)
        ref, stand_in = self.ref, self.decoder.stand_in
        assert stand_in is not None  # or nothing is replaced
        found = stand_in((ref.source, ref.shard, ref.row), self.decoder.index, chosen, at)
        if found is None:
            return _Payload(self, segment, pair, self, None)
        shard, row, theirs = found
        if (shard, row) not in self._shown:
            self._shown[shard, row] = _Row(self.decoder, DocumentRef(ref.source, shard, row, 0, 0, 0, False, True))
        return _Payload(self, segment, pair, self._shown[shard, row], theirs)

    def member_name(self, segment: np.void) -> str:
        return self.index.row_member(self.ref.row, int(segment["member"]))[0]

    def place(self, segment: np.void) -> str:
        return f"{self.index.tar}: {self.index.member(self.ref.row, int(segment['member'])).name}"

    def content(self, segment: np.void) -> bytes:
        number = int(segment["member"])
        name = self.index.member(self.ref.row, number).name
        if name not in self._members and name in self._coming:
            span, reading = self._coming[name]
            self._members[name] = span.cut(reading.result(), self.index.tar, name)
        elif name not in self._members:  # another's: which of its members stand in is known only now
            self._members[name] = read_stored(self.index, self.ref.row, number, self.decoder.storage).content
        return self._members[name]

    def frames(self, segment: np.void, least: tuple[int, int]) -> np.ndarray:
        """Frames of a video segment, no larger than they must be for `least`; those of all slices of the part in one
        pass."""
        name = self.member_name(segment)
        if name not in self._videos:
            with needs("decoding video"):
                from mmoe.data.load.frames import stored_frames
                from mmoe.data.load.media import reduced_size
            segments = self.segments[self.segments["member"] == segment["member"]]
            if self.ref.last > self.ref.first:
                segments = segments[(segments["slice"] >= self.ref.first) & (segments["slice"] < self.ref.last)]
            numbers = np.unique(np.concatenate([np.arange(s["start"], s["stop"]) for s in segments]))
            scaled = reduced_size((int(segment["height"]), int(segment["width"])), least)
            proven = self.index.row_decord(self.ref.row, int(segment["member"]))
            where, backend = self.place(segment), self.decoder.video_backend
            video = stored_frames(self.content(segment), backend, where, proven, scaled)
            self._videos[name] = numbers, video.frames(numbers)
        numbers, frames = self._videos[name]  # every number between start and stop is among them
        first = int(np.searchsorted(numbers, segment["start"]))
        return frames[first : first + int(segment["stop"] - segment["start"])]

    def array(self, segment: np.void) -> np.ndarray:
        name = self.member_name(segment)
        if name not in self._arrays:
            self._arrays[name] = load_array(self.content(segment), self.place(segment))
        return self._arrays[name]


@dataclass(frozen=True)
class _Payload:
    """A `mmoe.schema.modality.Payload`: the segment `shown` of the row `owner`, in place of a row's own."""

    row: _Row
    segment: np.void
    pair: int
    owner: _Row
    shown: np.void | None

    @property
    def source(self) -> str:
        return self.row.source

    @property
    def where(self) -> str:
        return self.owner.place(self._held)

    @property
    def _held(self) -> np.void:
        return self.segment if self.shown is None else self.shown

    def camera(self) -> int:
        numbers, camera = self.row.tokenizers.cameras[self.source], int(self.segment["camera"])
        if camera >= len(numbers) - 1:
            raise DataError(
                f"{self.row.place(self.segment)} is of camera {camera}, but the rig of {self.source} has "
                f"{len(numbers) - 1} cameras; prepare the source again"
            )
        return int(numbers[camera])

    def content(self) -> bytes:
        return self.owner.content(self._held)

    def images(self, least: tuple[int, int]) -> np.ndarray:
        if is_video(self.owner.member_name(self._held)):
            return self.owner.frames(self._held, least)
        with needs("decoding images"):
            from mmoe.data.load.media import load_image
        return load_image(self.content(), self.where, least)[None]

    def wave(self, rate: int) -> np.ndarray:
        with needs("decoding audio"):
            from mmoe.data.load.media import load_resampled
        return load_resampled(self.content(), int(self._held["start"]), int(self._held["stop"]), rate, self.where)

    def table(self) -> np.ndarray:
        return self.owner.array(self._held)
