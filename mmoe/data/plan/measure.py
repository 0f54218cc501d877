"""What a document will cost, from its index row alone: positions, patches, labels, pairs, action elements.

These closed forms and the layout in `document.py` state the same thing twice, on purpose: planning needs the
counts of millions of rows without building one. A property test holds them equal.
"""

from dataclasses import dataclass, fields

import numpy as np

from mmoe.data.index.shard_index import SegmentTable
from mmoe.schema.manifest import SplitEntry
from mmoe.schema.sample import KINDS, Modality
from mmoe.tokenizers.bundle import Tokenizers


@dataclass(frozen=True)
class Measures:
    """Counts by row, [n] i64; `labels` is [n, modalities], by the modality of the target."""

    length: np.ndarray  # positions of the document packed in one piece
    isolated: np.ndarray  # positions when every pair's text is a document of its own
    patches: np.ndarray
    labels: np.ndarray
    isolated_labels: np.ndarray
    pairs: np.ndarray
    action_elements: np.ndarray  # steps inside the recording x dimensions
    isolated_cost: np.ndarray  # sum of squared document lengths (attention work) when pairs' texts stand alone
    slices: np.ndarray
    text_only: np.ndarray  # bool: nothing but text, so it may be cut at any token

    def take(self, rows: np.ndarray) -> "Measures":
        """Give the measures of these rows, by their numbers or a mask."""
        return Measures(*(getattr(self, f.name)[rows] for f in fields(self)))

    @staticmethod
    def concatenate(parts: list["Measures"]) -> "Measures":
        """Join the measures of parts, one or more, in their order."""
        return Measures(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Measures)))


def segment_tokens(segments: np.ndarray, tokenizers: Tokenizers, source: str) -> np.ndarray:
    """Positions each segment's payload takes, without the structure tokens around it: [n] i64."""
    kind = segments["modality"]
    span = (segments["stop"] - segments["start"]).astype(np.int64)
    tokens = np.where(kind == Modality.TEXT, span, 0)
    vision = kind == Modality.VISION
    if vision.any():
        frames = span[vision] // tokenizers.config.vision.tubelet
        tokens[vision] = frames * tokenizers.vision.num_tokens(segments["height"][vision], segments["width"][vision])
    audio = kind == Modality.AUDIO
    if audio.any():
        codec = tokenizers.audio
        assert codec is not None  # `Tokenizers` refuses sound without a codec
        tokens[audio] = codec.num_frames(span[audio], segments["rate"][audio]) * codec.codebooks
    tokens[(kind == Modality.INERTIAL) | (kind == Modality.STATE)] = 1
    action = kind == Modality.ACTION
    if action.any():
        tokens[action] = tokenizers.actions[source].tokens
    return tokens


def measure(segments: np.ndarray, row: np.ndarray, rows: int, tokenizers: Tokenizers, source: str) -> Measures:
    """Measures of `rows` documents whose segments are `segments` [n], segment i belonging to document `row[i]`."""
    kind = segments["modality"]
    tokens = segment_tokens(segments, tokenizers, source)
    in_slice = segments["slice"] >= 0
    text, vision = kind == Modality.TEXT, kind == Modality.VISION
    audio, action = kind == Modality.AUDIO, kind == Modality.ACTION

    before = np.arange(len(segments)) - 1
    same_row = (before >= 0) & (row[before] == row)
    same_slice = same_row & (segments["slice"][before] == segments["slice"])
    opens_slice = in_slice & ~same_slice

    around = np.zeros(len(segments), np.int64)
    around[vision & in_slice & (segments["camera"] >= 0)] = 1  # cam_*
    around[vision & ~in_slice] = 2  # image_start, image_end
    around[audio] = 2  # audio_start, audio_end
    around[action] = 1  # action_end
    around[opens_slice] += 3  # slice_start, timestamp, slice_end

    def total(values: np.ndarray) -> np.ndarray:
        if not values.any():
            return np.zeros(rows, np.int64)
        return np.bincount(row, weights=values, minlength=rows).astype(np.int64)

    slices = total(opens_slice)
    length = total(tokens + around) + 2 + 2 * (slices > 0)  # bos, eos; video_start, video_end
    pair_text = text & (segments["pair"] >= 0) & (tokens > 0)
    pairs = total(pair_text)
    isolated_tokens = np.where(pair_text, tokens, 0)
    rest = length - total(isolated_tokens)

    # A text that follows a picture of its slice with no structure token between them: its first token is the
    # target of a VISION position, which carries no label.
    unlabelled = text & in_slice & same_slice & vision[before] & (tokens > 0)
    labels = np.zeros((rows, KINDS), np.int64)
    labels[:, Modality.TEXT] = total(np.where(text, tokens, 0) - unlabelled)
    labels[:, Modality.AUDIO] = total(np.where(audio, tokens, 0))
    # A text predicts the structure token behind it where it ends its slice or document: not before an action.
    ends = np.ones(len(segments), bool)
    ends[:-1] = ~same_slice[1:]
    labels[:, Modality.STRUCTURE] = total((text & ends & (tokens > 0)) | (audio & (tokens > 0)))
    isolated_labels = labels.copy()
    isolated_labels[:, Modality.TEXT] += total(unlabelled & pair_text)
    isolated_labels[:, Modality.STRUCTURE] += total(pair_text & ~ends)

    elements = np.zeros(len(segments), np.int64)
    if action.any():
        steps = np.clip(segments["stop"] - segments["start"], 0, tokenizers.config.action.chunk)
        elements = np.where(action, steps * tokenizers.actions[source].dims, 0)
    if tokenizers.discrete_actions:
        labels[:, Modality.ACTION] = isolated_labels[:, Modality.ACTION] = total(elements)
        elements = np.zeros_like(elements)
    return Measures(
        length=length,
        isolated=length + 2 * pairs,
        patches=total(np.where(vision, tokens, 0)),
        labels=labels,
        isolated_labels=isolated_labels,
        pairs=pairs,
        action_elements=total(elements),
        isolated_cost=rest**2 + total(np.where(pair_text, (isolated_tokens + 2) ** 2, 0)),
        slices=slices,
        text_only=total(~text) == 0,
    )


def measure_index(table: SegmentTable, tokenizers: Tokenizers, source: str) -> Measures:
    """Measures of every row of a shard."""
    row = np.repeat(np.arange(len(table)), np.diff(table.segment_offsets))
    return measure(table.segments, row, len(table), tokenizers, source)


def measure_slices(
    table: SegmentTable, rows: np.ndarray, tokenizers: Tokenizers, source: str
) -> tuple[Measures, np.ndarray]:
    """Measures of every time slice of the rows [n] (increasing), each as a document of its own; and slices by row.

    Four positions of each (bos, video_start, video_end, eos) belong to the clip and not to the slice.
    """
    chosen = np.zeros(len(table), bool)
    chosen[rows] = True
    row = np.repeat(np.arange(len(table)), np.diff(table.segment_offsets))
    inside = chosen[row] & (table.segments["slice"] >= 0)
    segments, row = table.segments[inside], row[inside]
    opens = np.ones(len(segments), bool)
    opens[1:] = (segments["slice"][1:] != segments["slice"][:-1]) | (row[1:] != row[:-1])
    each = measure(segments, np.cumsum(opens) - 1, int(opens.sum()), tokenizers, source)
    return each, np.bincount(row[opens], minlength=len(table))[rows]


def epoch_positions(split: SplitEntry, tokenizers: Tokenizers, source: str) -> int:
    """Positions of every document of a split in one piece, from the manifest's groups of segments alone.

    Exact but for lengths that differ inside a group: the last code frame of a sound, and rounded picture sizes.
    """
    # bos, eos; video_start, video_end; slice_start, timestamp, slice_end
    total = 2 * split.samples + 2 * split.clips + 3 * split.slices
    for group in split.groups:
        if group.modality == "TEXT":
            total += group.span
        elif group.modality == "VISION":
            tokens = int(tokenizers.vision.num_tokens(np.array(group.height), np.array(group.width)))
            total += group.span // tokenizers.config.vision.tubelet * tokens
            total += group.count * (int(group.camera) if group.sliced else 2)
        elif group.modality == "AUDIO":
            codec = tokenizers.audio
            assert codec is not None  # `Tokenizers` refuses sound without a codec
            frames = codec.num_frames(round(group.span / group.count), group.rate)
            total += group.count * (int(frames) * codec.codebooks + 2)
        elif group.modality == "ACTION":
            total += group.count * (tokenizers.actions[source].tokens + 1)
        else:
            total += group.count
    return total
