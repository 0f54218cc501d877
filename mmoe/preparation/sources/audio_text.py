"""Reads audio clips with their words, in the layouts that such sets come in.

============================== ==================================================================================
input                          what describes an audio clip
============================== ==================================================================================
folder, ``transcripts.jsonl``  rows ``{"audio": path, "text": words}``, optional `take`, `speaker`, `samples`,
                               `sample_rate`
folder, ``*.trans.txt``        lines ``<id> WORDS`` beside ``<id>.flac``, as in LibriSpeech: <speaker>/<chapter>/
folder, ``metadata.csv`` or    rows with ``file_name`` and ``transcription``, ``text`` or ``sentence``, as in Hugging
``.jsonl``, ``.txt`` files     Face's audiofolder; LJSpeech's; a text beside each file: see `folders`
folder or file, other tables   rows with ``audio`` (or ``file_name``), paths or the bytes, and a text: see `tables`
file ``.jsonl``                rows ``{"audio_filepath": path, "text": words, "duration": s}`` as in the manifests of
                               NeMo and k2, optional `offset` in seconds (the row is then a piece of the file),
                               `speaker`; paths are relative to the manifest
============================== ==================================================================================

A sample is one audio clip and its transcript, the two sides of a contrastive pair. What a split holds out as a whole is
the take where rows have one (all takes of one index, the last first), else the speaker, else the file (in a tree,
`tree_recording`). Where samples, sample rate or duration are stated, the file must agree: a WAV that was cut off
still opens. Audio clips without words, and other files of a folder, are refused, so that they are counted.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mmoe.config.base import Config
from mmoe.data.load.media import audio_info, stated_samples
from mmoe.errors import DataError, brief
from mmoe.preparation.sources import files, folders, jsonl
from mmoe.preparation.sources.base import Item, Refuse, Refused, Source
from mmoe.preparation.sources.columnar import Cell
from mmoe.preparation.sources.encode import audio_piece, range_around
from mmoe.preparation.sources.media_bytes import read_media
from mmoe.preparation.sources.ranges import plain_suffix
from mmoe.preparation.sources.tables import SUFFIXES, check_columns
from mmoe.schema.modality import Modality
from mmoe.schema.sample import Sample, Segment

_SUFFIXES = (".flac", ".wav", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au", ".caf", ".w64", ".rf64", ".m4a", ".sph")
_FORM = folders.RowForm(
    "transcripts.jsonl",
    "audio",
    ("text", "transcription", "sentence"),
    _SUFFIXES,
    ("columns.audio", "columns.text"),
    ("take", "speaker", "samples", "sample_rate"),
)


class AudioTextColumns(Config):
    """Says which columns of a row are the audio clip (a path, or its bytes) and its words."""

    audio: str | None = None  # null: audio, in a manifest audio_filepath, in a table of others file_name
    text: str | None = None  # null: text, transcription or sentence


class AudioTextConfig(Config):
    """Says how audio clips with their words are read."""

    columns: AudioTextColumns = AudioTextColumns()
    # What is held out as a whole of a tree <speaker>/<chapter>/; a speaker on both sides makes the task easier.
    tree_recording: Literal["speaker", "chapter"] = "speaker"
    duration_tolerance_s: float = Field(0.01, ge=0)  # manifests round: two decimals are off by up to this


@dataclass(frozen=True)
class _Stated:
    """What a description says of an audio clip, for the file to agree; None where it says nothing. Times in seconds."""

    samples: int | None = None
    sample_rate: int | None = None
    duration: float | None = None
    offset: float | None = None  # the audio is the piece of the file that begins here
    tolerance: float = 0.0


def items(path: Path, config: AudioTextConfig, quarantine: Refuse) -> Iterator[Item]:
    """List one item per described audio clip, for the file or folder at `path`."""
    form = _FORM.asked(config.columns.audio, None if config.columns.text is None else (config.columns.text,))
    if path.is_file():
        if plain_suffix(path) in SUFFIXES and plain_suffix(path) != ".jsonl":
            return _rows(path.parent, [], folders.describe_table(path, form, quarantine), form, quarantine)
        return _manifest(path, config, form, quarantine)
    found = files.listing(path, quarantine)
    transcripts = [file for file in found if file.name.lower().endswith(".trans.txt")]
    if transcripts and not (path / _FORM.own).is_file():
        return _tree(path, found, transcripts, config, quarantine)
    try:
        described = folders.find_description(path, found, form, quarantine)
    except DataError as error:
        more = "a tree with *.trans.txt, or a manifest (a .jsonl file with audio_filepath, text and duration), does too"
        raise DataError(f"{error}; {more}") from None
    return _rows(path, found, described, form, quarantine)


def _rows(
    root: Path, found: list[Path], described: folders.Described, form: folders.RowForm, quarantine: Refuse
) -> Iterator[Item]:
    keys = folders.DescribedKeys(root, described)
    for where, row_key, row in described.rows:
        try:
            take = _take(row, where)
            key, own = keys.described(where, row_key, row, _FORM.field)
        except Refused as refusal:
            quarantine(where, refusal)
            continue
        recording = f"take-{take}" if take is not None else _speaker(row) or own
        stated = _Stated(samples=row.get("samples"), sample_rate=row.get("sample_rate"))
        make = partial(_sample, key, recording, root, row[_FORM.field], row, form.texts, stated, where)
        yield Item(key, recording, make, rank=take or 0)
    _without_words((file for file in found if file not in keys.named), root, quarantine)


def _manifest(path: Path, config: AudioTextConfig, form: folders.RowForm, quarantine: Refuse) -> Iterator[Item]:
    stem, column = path.stem.replace(".", "_"), form.given or "audio_filepath"
    try:
        check_columns(path, (column,), form.options[0])
        check_columns(path, form.texts, form.options[1])
    except Refused as refusal:
        raise DataError(str(refusal)) from None
    for number, (where, row) in enumerate(jsonl.rows(path, quarantine)):
        key = f"{stem}-{number:06d}"
        try:
            name = jsonl.text_of(row, column, where)
            duration, offset = _seconds(row, "duration", where), _seconds(row, "offset", where)
        except Refused as refusal:
            quarantine(key, refusal)
            continue
        stated = _Stated(duration=duration, offset=offset, tolerance=config.duration_tolerance_s)
        recording = _speaker(row) or name  # pieces of one file belong together
        make = partial(_sample, key, recording, path.parent, name, row, form.texts, stated, where)
        yield Item(key, recording, make)


def _tree(
    path: Path, found: list[Path], transcripts: list[Path], config: AudioTextConfig, quarantine: Refuse
) -> Iterator[Item]:
    audio = {file.with_suffix(""): file for file in found if file.suffix.lower() == ".flac"}
    named, keys = set(transcripts), files.FileKeys()
    for transcript in transcripts:
        folder = transcript.parent
        recording = (folder.parent if config.tree_recording == "speaker" else folder).relative_to(path).as_posix()
        try:
            lines = files.read_bytes(transcript, str(path)).removeprefix(jsonl.BOM).splitlines()
            jsonl.check_utf16(b"".join(lines[:1]), transcript)
        except Refused as refusal:
            quarantine(transcript.relative_to(path).as_posix(), refusal)
            continue
        for number, line in enumerate(lines, start=1):
            where = f"{transcript}, line {number}"
            name, _, rest = line.strip().partition(b" ")
            if not name:
                continue
            try:
                place, words = folder / jsonl.decode_text(name, where, 0), jsonl.decode_text(rest, where, len(name) + 1)
            except Refused as refusal:
                quarantine(where, refusal)
                continue
            file = audio.get(place, place.with_name(f"{place.name}.flac"))
            named.add(file)
            key, _ = keys.key(file.relative_to(path).as_posix())
            said, below = {"text": words}, file.relative_to(path).as_posix()
            make = partial(_sample, key, recording, path, below, said, ("text",), _Stated(), where)
            yield Item(key, recording, make)
    _without_words((file for file in found if file not in named), path, quarantine)


def _without_words(unnamed: Iterable[Path], path: Path, quarantine: Refuse) -> None:
    """Write down the files that no line names: audio clips, and those of other kinds."""
    others = []
    for file in unnamed:
        if file.suffix.lower() in _SUFFIXES:
            message = f"{file} has no words: no line names it; add a line or remove it"
            quarantine(file.relative_to(path).as_posix(), Refused("audio without transcript", message))
        else:
            others.append(file)
    files.pass_over(others, path, "transcripts and the audio clips that they name", quarantine)


def _take(row: dict[str, Any], where: str) -> int | None:
    take = row.get("take")
    return None if take is None else jsonl.integer_of(row, "take", where)


def _speaker(row: dict[str, Any]) -> str | None:
    return None if row.get("speaker") is None else f"speaker-{row['speaker']}"


def _seconds(row: dict[str, Any], field: str, where: str) -> float | None:
    value = None if row.get(field) is None else jsonl.number_of(row, field, where, "a number of seconds")
    if value is not None and value < 0:
        raise Refused("malformed row", f"{where}: {field!r} is {value!r}, not a number of seconds; repair the line")
    return value


def _sample(
    key: str,
    recording: str,
    root: Path,
    value: str | Cell,
    row: dict[str, Any],
    texts: tuple[str, ...],
    stated: _Stated,
    where: str,
) -> Sample:
    words = jsonl.text_of(row, jsonl.chosen(row, texts), where)
    media = read_media(value, root, where)
    audio, file = media.content, media.name
    samples, rate = audio_info(audio, file)
    spare = stated_samples(audio, file) - samples  # of MP3: a row may have its number from the header too
    for field, found in (("samples", (samples, samples + spare)), ("sample_rate", (rate,))):
        if getattr(stated, field) not in (None, *found):
            raise _differs(f"{file} has {field} {found[0]}, {where} says {brief(getattr(stated, field))}")
    start, stop = _range(replace(stated, tolerance=stated.tolerance + spare / rate), samples, rate, file, where)
    member, begin = f"audio{media.suffix}", 0
    if stated.offset is not None:
        begin, end = range_around(start, stop, samples, rate)
        audio, suffix = audio_piece(audio, begin, end, file)
        member = f"audio{suffix}"
    return Sample(
        key,
        recording,
        {member: audio, "txt": jsonl.encode_text(words, where)},
        [
            Segment(Modality.AUDIO, member, start - begin, stop - begin, rate=rate, pair=0),
            Segment(Modality.TEXT, "txt", pair=0, text=words),
        ],
    )


def _range(stated: _Stated, samples: int, rate: int, file: str, where: str) -> tuple[int, int]:
    """The samples [start, stop) of the file that are meant; refused where the file does not hold them."""
    length, offset = samples / rate, stated.offset or 0.0
    if stated.duration is None:
        end = length
    else:
        end = offset + stated.duration
        if end > length + stated.tolerance:
            raise _differs(f"{file} lasts {length:.3f} s, {where} asks for {offset:.3f} s to {end:.3f} s")
        if stated.offset is None and end < length - stated.tolerance:
            raise _differs(f"{file} lasts {length:.3f} s, {where} says {stated.duration:.3f} s")
    start, stop = round(offset * rate), min(round(end * rate), samples)
    if stated.offset is None:
        stop = samples
    if start >= stop:
        raise _differs(f"{file} lasts {length:.3f} s, {where} asks for {offset:.3f} s to {end:.3f} s")
    return start, stop


def _differs(facts: str) -> Refused:
    message = f"{facts}; the file is truncated or another one: restore it or correct the row"
    return Refused("audio differs from its row", message)


SOURCE = Source(kind="audio_text", clock="none", skew_budget_ns=0, config=AudioTextConfig, items=items)
