"""Takes something away from an evaluation: a modality is blank, or another recording's stands in for it."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mmoe.data.index.shard_index import ShardIndex
from mmoe.data.load.decode import Index, RowPlace
from mmoe.data.plan.prepared import PreparedSources
from mmoe.errors import ConfigError, DataError
from mmoe.schema.modality import Modality

NOT_SHOWN = (Modality.STRUCTURE, Modality.TEXT, Modality.ACTION)  # others are inputs alone, which may be exchanged


@dataclass(frozen=True)
class _Row:
    shard: int
    row: int
    recording: str
    cameras: frozenset[int]  # of its segments of the modality


@dataclass(frozen=True)
class Ablation:
    """Says what the decoder shows instead: `blank` gives zeros (silence), `shuffle` another recording's payload.

    `donors` maps (source, shard, row) to the (shard, row) whose images or audio clips are used.
    """

    mode: Literal["blank", "shuffle"]
    modality: Modality
    donors: dict[RowPlace, tuple[int, int]]

    def __call__(self, row: RowPlace, index: Index, segments: np.ndarray, at: int) -> tuple[int, int, np.void] | None:
        """Find the (shard, row, segment) that stands in for `segments[at]` of `row`, or None for nothing (blank).

        It is of the donor's camera where it has that one, and by its place in line. Raises DataError for a donor that
        has nothing of the modality.
        """
        if self.mode == "blank":
            return None
        segment, source = segments[at], row[0]
        shard, number = self.donors[row]
        donor = index(source, shard)
        theirs = donor.row_segments(number)
        theirs = theirs[theirs["modality"] == segment["modality"]]
        if not len(theirs):
            own = index(source, row[1])
            raise DataError(
                f"{donor.tar}: {donor.keys[number]} has nothing of modality {Modality(segment['modality']).name} to "
                f"stand in for {own.tar}: {own.member(row[2], int(segment['member'])).name}; choose another donor"
            )
        camera = theirs[theirs["camera"] == segment["camera"]]
        theirs = camera if len(camera) else theirs
        same = (segments["modality"] == segment["modality"]) & (segments["camera"] == segment["camera"])
        return shard, number, theirs[int(same[:at].sum()) % len(theirs)]


@dataclass(frozen=True)
class Donors:
    """Holds an ablation, and which sources it is possible for.

    `ablation` is for the decoder; `left_out` are sources in which some row has no donor (with the reason), beside the
    number of rows of each other source that got one.
    """

    ablation: Ablation
    left_out: dict[str, str]
    rows: dict[str, int]

    def record(self) -> dict[str, Any]:
        """Return what evaluation.json says of the ablation."""
        return {
            "mode": self.ablation.mode,
            "modality": self.ablation.modality.name.lower(),
            "rows": self.rows,
            "left_out": self.left_out,
        }


def blank(modality: Modality) -> Donors:
    """Make the ablation that shows zeros (or silence) for every payload of `modality`."""
    _check("blank", modality)
    return Donors(Ablation("blank", modality, {}), {}, {})


def shuffle(sources: PreparedSources, split: str, modality: Modality, seed: int) -> Donors:
    """Make the ablation in which every row of `split` shows what another recording of its source and split has.

    `seed` chooses the donors (`derange`).
    """
    _check("shuffle", modality)
    donors: dict[RowPlace, tuple[int, int]] = {}
    left_out: dict[str, str] = {}
    counts: dict[str, int] = {}
    for number, files in enumerate(sources.files(split)):
        indices = [ShardIndex.read(tar, sources.storage) for tar in files.tars]
        rows = [row for shard, index in enumerate(indices) for row in _rows(index, shard, modality)]
        if not rows:
            continue
        chosen = derange(rows, np.random.default_rng((seed, number)))
        if chosen is None:
            recordings = len({row.recording for row in rows})
            reason = f"{len(rows)} rows of {recordings} recordings: some row has no donor in another recording"
            left_out[files.name] = reason
            continue
        counts[files.name] = len(rows)
        for row, donor in zip(rows, chosen):
            donors[number, row.shard, row.row] = (donor.shard, donor.row)
    return Donors(Ablation("shuffle", modality, donors), left_out, counts)


def derange(rows: list[_Row], rng: np.random.Generator) -> list[_Row] | None:
    """Choose for each row a donor of another recording that has (at least) its cameras; None where some row has none.

    Among rows with the same cameras the donors are a permutation, unless one recording holds more than half of
    them: then donors are drawn at random from all rows that may serve.
    """
    groups: dict[frozenset[int], list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        groups[row.cameras].append(number)
    donors = list(rows)  # each is replaced
    for cameras, members in groups.items():
        by_recording: dict[str, list[int]] = defaultdict(list)
        for number in rng.permutation(members).tolist():
            by_recording[rows[number].recording].append(number)
        largest = max(len(numbers) for numbers in by_recording.values())
        line = [number for numbers in by_recording.values() for number in numbers]
        if 2 * largest <= len(line):
            # Recordings stand in one piece, so a shift by the largest leads out of every one of them.
            for at, number in enumerate(line):
                donors[number] = rows[line[(at + largest) % len(line)]]
            continue
        for recording, numbers in by_recording.items():
            others = [row for row in rows if row.recording != recording and row.cameras >= cameras]
            if not others:
                return None
            for number in numbers:
                donors[number] = others[int(rng.integers(len(others)))]
    return donors


def _rows(index: ShardIndex, shard: int, modality: Modality) -> list[_Row]:
    """The rows of a shard that hold the modality."""
    rows = []
    for number, recording in enumerate(index.recordings):
        segments = index.row_segments(number)
        cameras = segments["camera"][segments["modality"] == modality]
        if len(cameras):
            rows.append(_Row(shard, number, recording, frozenset(cameras.tolist())))
    return rows


def _check(option: str, modality: Modality) -> None:
    if modality in NOT_SHOWN:
        names = ", ".join(kind.name.lower() for kind in Modality if kind not in NOT_SHOWN)
        raise ConfigError(f"--{option} {modality.name.lower()} is not possible; choose from {names}")
