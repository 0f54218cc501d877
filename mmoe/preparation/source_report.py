"""Counts what a preparation makes: the content of each split, what was refused or removed and why, and a summary."""

import json
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from mmoe.data.index.extent import Extent
from mmoe.hashing import hash64
from mmoe.preparation.rows import Row
from mmoe.preparation.statistics import VectorSummary
from mmoe.schema.manifest import ShardEntry, SplitEntry
from mmoe.schema.modality import Modality
from mmoe.schema.vectors import VectorStats


@dataclass
class SplitReport:
    """Holds the counts of a split, or of a part of one.

    Parts are stored, and merged in the order of their samples.
    """

    samples: int = 0
    recordings: set[str] = field(default_factory=set)
    extent: Extent = field(default_factory=Extent)
    vectors: dict[Modality, VectorSummary] = field(default_factory=dict)  # of the tables its samples refer to
    text_tokens: int = 0
    text_bytes: int = 0
    images: int = 0
    seconds: float = 0.0
    bytes: int = 0
    flags: Counter[str] = field(default_factory=Counter)

    def add(self, row: Row) -> None:
        """Count a sample."""
        kind, span = row.segments["modality"], row.segments["stop"] - row.segments["start"]
        audio = kind == Modality.AUDIO
        self.samples += 1
        self.recordings.add(row.sample.recording)
        self.extent.add(row.segments)
        for modality, tables in row.vectors.items():
            for number, table in enumerate(tables):
                seed = hash64(row.sample.key.encode(), modality.name.encode(), b"%d" % number)
                self.vectors.setdefault(modality, VectorSummary(table.shape[1])).add(table, seed)
        self.text_tokens += len(row.text_ids)
        self.text_bytes += row.text_bytes
        self.images += int(span[kind == Modality.VISION].sum())
        self.seconds += float((span[audio] / row.segments["rate"][audio]).sum())
        self.bytes += sum(map(len, row.sample.members.values()))
        self.flags += row.sample.flags

    def merge(self, other: "SplitReport") -> None:
        """Add what the next part of the split holds."""
        for name in _PLAIN:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.recordings |= other.recordings
        self.extent.merge(other.extent)
        self.flags += other.flags
        for modality, summary in other.vectors.items():
            self.vectors.setdefault(modality, VectorSummary(len(summary.mean))).merge(summary)

    def as_dict(self) -> dict[str, Any]:
        """Return all but `vectors`, as JSON holds it."""
        extent = self.extent
        return {name: getattr(self, name) for name in _PLAIN} | {
            "recordings": sorted(self.recordings),
            "extent": {
                "groups": [[*map(int, g), n, extent.spans[g]] for g, n in sorted(extent.counts.items())],
                "clips": extent.clips,
                "slices": extent.slices,
            },
            "flags": dict(sorted(self.flags.items())),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of `vectors` under names ``<modality>.<array>``."""
        return {
            f"{modality.name}.{name}": array
            for modality, summary in self.vectors.items()
            for name, array in summary.arrays().items()
        }

    @classmethod
    def load(cls, stored: dict[str, Any], arrays: dict[str, np.ndarray]) -> "SplitReport":
        """Make a report again from what `as_dict` and `arrays` gave; other arrays are left alone."""
        report = cls(**{name: stored[name] for name in _PLAIN})
        report.recordings, report.flags = set(stored["recordings"]), Counter(stored["flags"])
        report.extent.clips, report.extent.slices = stored["extent"]["clips"], stored["extent"]["slices"]
        for kind, sliced, camera, height, width, rate, count, span in stored["extent"]["groups"]:
            group = (kind, bool(sliced), bool(camera), height, width, rate)
            report.extent.counts[group], report.extent.spans[group] = count, span
        for modality in Modality:
            prefix = f"{modality.name}."
            own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
            if own:
                report.vectors[modality] = VectorSummary.from_arrays(own)
        return report

    def entry(self, shards: list[ShardEntry]) -> SplitEntry:
        """Return the manifest's entry for a split that is stored in these shards."""
        return SplitEntry(
            samples=self.samples,
            recordings=len(self.recordings),
            shards=tuple(shards),
            clips=self.extent.clips,
            slices=self.extent.slices,
            groups=self.extent.groups(),
            flagged=dict(sorted(self.flags.items())),
        )


_PLAIN = [f.name for f in fields(SplitReport) if f.type in (int, float)]  # numbers that add up


class ItemLog:
    """Writes the items that are not in the prepared source, as a JSON object a line with key, reason and message."""

    def __init__(self, path: Path) -> None:
        self.counts: Counter[str] = Counter()  # by reason
        self.examples: dict[str, str] = {}  # the first message of each reason
        self._file = path.open("w", encoding="utf-8", errors="backslashreplace")

    def write(self, key: str, reason: str, message: str, **more: str) -> None:
        """Write down an item and count it under its reason; `more` are further fields of its line."""
        self.counts[reason] += 1
        self.examples.setdefault(reason, message)
        line = {"key": key, "reason": reason, "message": message, **more}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def __enter__(self) -> "ItemLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@dataclass(frozen=True)
class Summary:
    """Says what a preparation has made: by section, lines of a name and a cell for each split; and notes."""

    kind: str
    splits: tuple[str, ...]
    sections: list[dict[str, list[str]]]
    notes: list[str] = field(default_factory=list)


def summary(
    kind: str,
    reports: dict[str, SplitReport],
    refused: Counter[str],
    removed: Counter[str],
    vectors: dict[str, VectorStats],
) -> Summary:
    """Summarize a preparation, with one column a split and one line a measure that is not zero everywhere.

    After the content comes what is flagged, clipped to the fences of its dimension (rows, of all rows), refused and
    removed."""
    measures = {
        "samples": [f"{t.samples:,}" for t in reports.values()],
        "recordings": [f"{len(t.recordings):,}" for t in reports.values()],
        "text tokens": [f"{t.text_tokens:,}" for t in reports.values()],
        "text bytes": [f"{t.text_bytes:,}" for t in reports.values()],
        "images": [f"{t.images:,}" for t in reports.values()],
        "seconds of audio": [f"{t.seconds:,.1f}" for t in reports.values()],
        "bytes": [f"{t.bytes:,}" for t in reports.values()],
    }
    for modality in Modality:
        measures[f"{modality.name} segments"] = [f"{t.extent.segments(modality):,}" for t in reports.values()]
    flags = sorted(set().union(*(t.flags for t in reports.values())))
    sections = [
        {measure: values for measure, values in measures.items() if any(value.strip("0.,") for value in values)},
        {f"flagged: {flag}": [f"{t.flags[flag]:,}" for t in reports.values()] for flag in flags},
        {f"clipped: {name}": cells for name, cells in _clipped(reports, vectors).items()},
        {f"refused: {reason}": [f"{count:,}"] for reason, count in sorted(refused.items())},
        {f"removed: {reason}": [f"{count:,}"] for reason, count in sorted(removed.items())},
    ]
    return Summary(kind, tuple(reports), [section for section in sections if section])


def _clipped(reports: dict[str, SplitReport], vectors: dict[str, VectorStats]) -> dict[str, list[str]]:
    """By dimension that has any, a cell for each split: rows outside its fences of all rows."""
    lines: dict[str, list[str]] = {}
    for modality, stats in vectors.items():
        for number, name in enumerate(stats.names):
            if not any(counts[number] for counts in stats.clipped.values()):
                continue
            cells = []
            for split, report in reports.items():
                summary = report.vectors.get(Modality.named(modality))
                rows, counts = summary.count if summary else 0, stats.clipped.get(split)
                about = "about " if summary and summary.estimated else ""
                cells.append(f"{about}{counts[number] if counts else 0:,} of {rows:,}")
            lines[f"{modality} {name}"] = cells
    return lines
