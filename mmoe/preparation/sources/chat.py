"""Reads dialogues: tables (see `tables`) with a column ``messages`` of ``{role, content}``, or ``conversations`` of
``{from, value}``, as OpenAI's and ShareGPT's sets have them. A row is a document; what the assistant says is learned.

    <|system|>
    Be brief.<|end|>
    <|user|>
    Hello!<|end|>
    <|assistant|>
    Hi.<|end|>

A turn is its role, a line break, its content and ``<|end|>``; turns are lines. Given (`GIVEN`), so read and not
predicted, is everything but the assistant's contents, each with the ``<|end|>`` behind it. These markers are plain
text, ids of any tokenizer, so that a prompt can be written by hand. A message that spells one is refused.

A content is a text, or a list of parts ``{type: text, text}`` and ``{type: image}``. An image is what its part holds
in ``image``, or else the next of the row's `images`, one or a list; where a row has those, ``<image>`` in a text
stands for one too. In the document an image stands where it stood in its message.

Dialogues that begin with the same image (its path, or its bytes where it has none) are one recording, so that they are
on one side of the split, and in a file with images a dialogue without one is a recording of its own. A file without
images is one recording.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmoe.config.base import Config
from mmoe.data.load.media import IMAGE_SUFFIXES
from mmoe.errors import DataError, brief
from mmoe.hashing import blake2b
from mmoe.optional import needs
from mmoe.preparation.sources import jsonl
from mmoe.preparation.sources.base import Item, Refuse, Refused, Source
from mmoe.preparation.sources.documents import ListedDocument, ListedDocuments, document_items
from mmoe.preparation.sources.media_bytes import MediaBytes, read_media
from mmoe.preparation.sources.tables import SUFFIXES, TableRow, check_columns, list_rows
from mmoe.schema.modality import Modality
from mmoe.schema.sample import GIVEN, Sample, Segment

_MESSAGES = ("messages", "conversations")
_IMAGES = ("images", "image")
_LEARNED = "assistant"
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": _LEARNED,
    "gpt": _LEARNED,
    "tool": "tool",
    "function": "tool",
}
_END = "<|end|>"
_MARKER = re.compile(rf"<\|(?:{'|'.join(sorted(set(_ROLES.values())))}|end)\|>")
_IMAGE = "<image>"  # in a text, of sets whose texts and images stand in two columns


class ChatColumns(Config):
    """Says which columns of a row are its messages and its images."""

    messages: str | None = None  # null: messages or conversations
    images: str | None = None  # null: images or image


class ChatConfig(Config):
    """Says how dialogues are found."""

    columns: ChatColumns = ChatColumns()


def items(path: Path, config: ChatConfig, quarantine: Refuse) -> Iterator[Item]:
    """List one document per row of the table at `path`, or of every one under the folder."""
    messages = _MESSAGES if config.columns.messages is None else (config.columns.messages,)
    images = _IMAGES if config.columns.images is None else (config.columns.images,)

    root = path.parent if path.is_file() else path

    def rows(file: Path, stem: str) -> ListedDocuments:
        check_columns(file, messages, "columns.messages")
        if config.columns.images is not None:
            check_columns(file, images, "columns.images")
        shown = _shown(file, root, messages, images)
        for number, row in enumerate(list_rows(file, stem, quarantine)):
            recording = shown.get(number, f"{stem}-{number:06d}") if shown else None
            yield ListedDocument(row.start, row.stop, partial(_sample, row, messages, images), recording)

    return document_items(path, ", ".join(SUFFIXES), rows, quarantine, shown=IMAGE_SUFFIXES)


def _shown(file: Path, root: Path, messages: tuple[str, ...], images: tuple[str, ...]) -> dict[int, str]:
    """The first image of each row of a table that shows one, by its number; what cannot be read is said later."""
    shown: dict[int, str] = {}
    with suppress(DataError, OSError, pa.ArrowException):
        for number, row in enumerate(list_rows(file, "", lambda key, refusal: None)):
            with suppress(DataError):
                if name := _first_image(row.load((*messages, *images)), messages, images, row.folder.relative_to(root)):
                    shown[number] = name
    return shown


def _first_image(content: dict[str, Any], messages: tuple[str, ...], images: tuple[str, ...], folder: Path) -> str:
    """What tells the first image of a row from others, "" where it shows none; paths are relative to the `folder`."""
    value = content.get(jsonl.chosen(content, images))
    found = list(value) if isinstance(value, list) else [value]
    turns = content.get(jsonl.chosen(content, messages))
    for turn in turns if isinstance(turns, list) else []:
        parts = turn.get("content") if isinstance(turn, dict) else None
        found += [part.get("image") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    for image in found:
        path, data = (image.get("path"), image.get("bytes")) if isinstance(image, dict) else (image, image)
        if isinstance(path, str) and path:
            return (folder / path).as_posix().encode("utf-8", "replace").decode()
        if isinstance(data, bytes):
            return f"image-{blake2b([data], 8).hex()}"
    return ""


def _sample(row: TableRow, messages: tuple[str, ...], images: tuple[str, ...], key: str, recording: str) -> Sample:
    content, where = row.load((*messages, *images)), row.where
    turns = _turns(content, jsonl.chosen(content, messages), where)
    if all(turn.role != _LEARNED for turn in turns):
        message = f"{where}: no message is the assistant's, so there is nothing to learn; remove the row"
        raise Refused("nothing to learn", message)
    shown = _Images(content.get(jsonl.chosen(content, images)), row.folder, where)
    document = _Document()
    for number, turn in enumerate(turns):
        document.give(("\n" if number else "") + f"<|{turn.role}|>\n")
        parts = _parts(turn.content, shown.some, where)
        if turn.role == _LEARNED:
            document.learn(_said(parts, where) + _END)
            continue
        for part in parts:
            if isinstance(part, str):
                document.give(part)
            else:
                document.show(shown.next(part))
        document.give(_END)
    shown.check_all_shown()
    return document.sample(key, recording, where)


@dataclass(frozen=True)
class _Turn:
    role: str
    content: Any


def _turns(row: dict[str, Any], column: str, where: str) -> list[_Turn]:
    """The messages of a row."""
    messages = row[column] if column in row else jsonl.text_of(row, column, where)  # which says what there is instead
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        message = f"{where}: {column!r} is {brief(messages)}, not a list of messages; repair or remove the row"
        raise Refused("malformed row", message)
    turns = []
    for each in messages:
        role, content = (each.get(name) for name in (("role", "content") if "role" in each else ("from", "value")))
        if each.get("tool_calls") or each.get("function_call"):
            message = f"{where}: a message calls tools, which is no text to learn; remove the row"
            raise Refused("tool call", message)
        if not isinstance(role, str) or role not in _ROLES:
            known = ", ".join(_ROLES)
            message = f"{where}: the role {brief(role)} is not known; rename it to one of {known}, or remove the row"
            raise Refused("unknown role", message)
        turns.append(_Turn(_ROLES[role], content))
    return turns


def _parts(content: Any, split: bool, where: str) -> list[str | dict[str, Any]]:
    """The texts of a message, and between them its images; `split` where ``<image>`` in a text is one."""
    parts: list[str | dict[str, Any]] = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) and kind == "text" else part
        if isinstance(text, str):
            if found := _MARKER.search(text):
                message = f"{where}: a message spells the marker {found[0]}, which ends or begins one; remove the row"
                raise Refused("marker in a message", message)
            pieces = text.split(_IMAGE) if split else [text]
            parts += [each for piece in pieces for each in ({"type": "image"}, piece)][1:]
        elif kind == "image":
            parts.append(part)
        else:
            message = f"{where}: a message holds {brief(part)}, neither a text nor an image; repair or remove the row"
            raise Refused("malformed row", message)
    return parts


def _said(parts: list[str | dict[str, Any]], where: str) -> str:
    """What the assistant says."""
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) < len(parts):
        message = f"{where}: a message of the assistant holds an image, which is not predicted; remove the row"
        raise Refused("image of the assistant", message)
    if not (text := "".join(texts)).strip():
        raise Refused("empty text", f"{where}: a message of the assistant is blank; give it a text or remove the row")
    return text


class _Images:
    """The images of a row, in the order in which its messages show them."""

    def __init__(self, value: Any, folder: Path, where: str) -> None:
        self._left = [] if value is None else list(value) if isinstance(value, list) else [value]
        self.some = bool(self._left)
        self._folder, self._where = folder, where

    def next(self, part: dict[str, Any]) -> MediaBytes:
        """Read the image of a part, or else the next of the row."""
        own = part.get("image")
        if own is None and not self._left:
            raise self._differ("fewer images than its messages show")
        return read_media(own if own is not None else self._left.pop(0), self._folder, self._where)

    def check_all_shown(self) -> None:
        if self._left:
            raise self._differ("more images than its messages show")

    def _differ(self, said: str) -> Refused:
        return Refused("images differ from messages", f"{self._where} has {said}; repair or remove the row")


class _Document:
    """The texts and images of a sample as it grows; what is given gathers until something else follows."""

    def __init__(self) -> None:
        self._images: dict[str, bytes] = {}
        self._segments: list[Segment] = []
        self._given = ""

    def give(self, text: str) -> None:
        self._given += text

    def learn(self, text: str) -> None:
        self._flush()
        self._segments.append(Segment(Modality.TEXT, "txt", text=text))

    def show(self, image: MediaBytes) -> None:
        with needs("decoding images"):
            from mmoe.data.load.media import image_size
        self._flush()
        height, width = image_size(image.content, image.name)
        member = f"image{len(self._images)}{image.suffix}"
        self._images[member] = image.content
        self._segments.append(Segment(Modality.VISION, member, height=height, width=width))

    def sample(self, key: str, recording: str, where: str) -> Sample:
        self._flush()
        text = jsonl.encode_text("".join(segment.text for segment in self._segments), where)
        return Sample(key, recording, {"txt": text, **self._images}, self._segments)

    def _flush(self) -> None:
        if self._given:
            self._segments.append(Segment(Modality.TEXT, "txt", rate=GIVEN, text=self._given))
        self._given = ""


SOURCE = Source(kind="chat", clock="none", skew_budget_ns=0, config=ChatConfig, items=items)
