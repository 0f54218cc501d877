"""Sounds with their words: a folder with ``transcripts.jsonl``, rows ``{"audio": path, "text": words, ...}``.

A sample is one sound and its transcript, the two sides of a contrastive pair. What a split holds out as a whole
is the take where rows have one (all takes of one index, the last first), else the speaker, else the file. Where a
row states `samples` or `sample_rate`, the file must agree: a WAV that was cut off still opens.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mmoe.config.base import Config
from mmoe.data.media import audio_info
from mmoe.data.sample import Modality, Sample, Segment
from mmoe.data.sources import jsonl
from mmoe.data.sources.base import Item, Quarantine, Refused, Source


class AudioTextConfig(Config):
    """Nothing to choose: the rows say it all."""


def items(path: Path, config: AudioTextConfig, quarantine: Quarantine) -> Iterator[Item]:
    """One item per row."""
    for where, row in jsonl.rows(path / "transcripts.jsonl", quarantine):
        try:
            key, take = jsonl.key_of(row, "audio", where), _take(row, where)
        except Refused as refusal:
            quarantine(where, refusal)
            continue
        if take is not None:
            recording = f"take-{take}"
        else:
            recording = f"speaker-{row['speaker']}" if row.get("speaker") is not None else key
        yield Item(key, recording, partial(_sample, path, where, row, key, recording), rank=take or 0)


def _take(row: dict[str, Any], where: str) -> int | None:
    take = row.get("take")
    if take is not None and not isinstance(take, int):
        raise Refused("malformed row", f"{where}: 'take' is {take!r}, not an integer; number the takes")
    return take


def _sample(path: Path, where: str, row: dict[str, Any], key: str, recording: str) -> Sample:
    words, sound = jsonl.text_of(row, "text", where), jsonl.read_file(path, row, "audio", where)
    file = path / row["audio"]
    samples, rate = audio_info(sound, str(file))
    for field, found in (("samples", samples), ("sample_rate", rate)):
        if row.get(field, found) != found:
            message = (
                f"{file} has {field} {found}, {where} says {row[field]}; the file is truncated or another one: "
                "restore it or correct the row"
            )
            raise Refused("sound differs from its row", message)
    member = f"audio{file.suffix.lower()}"
    return Sample(
        key,
        recording,
        {member: sound, "txt": jsonl.encode_text(words, where)},
        [
            Segment(Modality.AUDIO, member, stop=samples, rate=rate, pair=0),
            Segment(Modality.TEXT, "txt", pair=0, text=words),
        ],
    )


SOURCE = Source(kind="audio_text", clock="none", skew_budget_ns=0, config=AudioTextConfig, items=items)
