"""What preparation counts: the content of each split, what was refused and why, and the summary of both."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.table import Table

from mmoe.data.index import ShardEntry, SplitEntry
from mmoe.data.rows import Row
from mmoe.data.sample import Modality
from mmoe.data.sources.base import Refused


@dataclass
class Tally:
    """What one split holds; `vectors` are the tables [N, D] its samples refer to, `hashes` their contents."""

    shards: list[ShardEntry] = field(default_factory=list)
    samples: int = 0
    recordings: set[str] = field(default_factory=set)
    segments: Counter[str] = field(default_factory=Counter)
    hashes: set[int] = field(default_factory=set)
    vectors: dict[Modality, list[np.ndarray]] = field(default_factory=dict)
    text_tokens: int = 0
    text_bytes: int = 0
    pictures: int = 0
    seconds: float = 0.0
    bytes: int = 0

    def add(self, row: Row) -> None:
        kind, span = row.segments["modality"], row.segments["stop"] - row.segments["start"]
        sound = kind == Modality.AUDIO
        self.samples += 1
        self.recordings.add(row.sample.recording)
        self.segments.update(Modality(k).name for k in kind.tolist())
        self.hashes.add(row.content_hash)
        for modality, tables in row.vectors.items():
            self.vectors.setdefault(modality, []).extend(tables)
        self.text_tokens += len(row.text_ids)
        self.text_bytes += row.text_bytes
        self.pictures += int(span[kind == Modality.VISION].sum())
        self.seconds += float((span[sound] / row.segments["rate"][sound]).sum())
        self.bytes += sum(map(len, row.sample.members.values()))

    def entry(self) -> SplitEntry:
        return SplitEntry(
            samples=self.samples,
            recordings=len(self.recordings),
            shards=tuple(self.shards),
            segments=dict(sorted(self.segments.items())),
        )


class QuarantineLog:
    """Writes what is refused, one JSON object a line with key, reason and message; counts it by reason."""

    def __init__(self, path: Path):
        self.counts: Counter[str] = Counter()
        self.first = ""  # message
        self._path = path
        path.touch()

    def __call__(self, key: str, refusal: Refused) -> None:
        self.counts[refusal.reason] += 1
        self.first = self.first or str(refusal)
        line = json.dumps({"key": key, "reason": refusal.reason, "message": str(refusal)}, ensure_ascii=False)
        with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")


def summary(kind: str, tallies: dict[str, Tally], refused: Counter[str]) -> Table:
    """One column a split, one line a measure that is not zero everywhere; then what was refused."""
    measures = {
        "samples": [f"{t.samples:,}" for t in tallies.values()],
        "recordings": [f"{len(t.recordings):,}" for t in tallies.values()],
        "text tokens": [f"{t.text_tokens:,}" for t in tallies.values()],
        "text bytes": [f"{t.text_bytes:,}" for t in tallies.values()],
        "pictures": [f"{t.pictures:,}" for t in tallies.values()],
        "seconds of sound": [f"{t.seconds:,.1f}" for t in tallies.values()],
        "bytes": [f"{t.bytes:,}" for t in tallies.values()],
    }
    for modality in Modality:
        measures[f"{modality.name} segments"] = [f"{t.segments[modality.name]:,}" for t in tallies.values()]
    table = Table(title=f"prepared {kind}", title_justify="left")
    table.add_column("")
    for name in tallies:
        table.add_column(name, justify="right")
    for measure, values in measures.items():
        if any(value.strip("0.,") for value in values):
            table.add_row(measure, *values)
    if refused:
        table.add_section()
        for reason, count in sorted(refused.items()):
            table.add_row(f"refused: {reason}", f"{count:,}")
    return table
