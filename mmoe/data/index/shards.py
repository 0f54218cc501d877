"""Write WebDataset tar shards with an index of byte ranges, and read them one member at a time.

A sample is a run of adjacent tar members ``<key>.<field>``. WebDataset cuts a name at the first dot of its last
path component and lower-cases the field, so names for which that would lose or merge something are refused.
"""

import re
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mmoe.data.index.shard_index import Member, ShardIndex, write_index
from mmoe.data.storage.store import DEFAULT_STORAGE, Storage
from mmoe.errors import DataError
from mmoe.schema.manifest import ShardEntry

READ_GAP = 128 << 10  # bytes: reading them costs a remote store less than another request
_BLOCK = tarfile.BLOCKSIZE
_PART = r"[^./\x00-\x1f\ud800-\udfff]+"  # no control characters, and none that UTF-8 cannot spell
_FOLDER = r"(?!\.{1,2}/)[^/\x00-\x1f\ud800-\udfff]+/"  # of a key, in which dots are what any character is
_KEY = re.compile(rf"(?!__)({_FOLDER})*{_PART}")
_FIELD = re.compile(rf"(?!__){_PART}(\.{_PART})*")


def check_key(key: str) -> None:
    """Refuse a sample key that WebDataset would cut, merge or skip. Raises DataError."""
    folder, slash, name = key.rpartition("/")
    if "." in name and name not in (".", ".."):
        raise DataError(
            f"sample key {key!r} has a dot in its last part: WebDataset cuts a key at the first one there, so it would "
            f"merge with others as {folder + slash + name.partition('.')[0]!r}; rename the recording without the dot"
        )
    if not _KEY.fullmatch(key):
        raise DataError(
            f"sample key {key!r} is not usable in a tar: it must be a relative path of non-empty parts that does "
            "not start with two underscores; rename the file or recording"
        )


def check_field(key: str, field: str) -> None:
    """Refuse a member name that WebDataset would change. Raises DataError."""
    if field != field.lower():
        raise DataError(
            f"member {field!r} of sample {key} is not lower-case: WebDataset lower-cases it, so it could not be "
            f"found again; name it {field.lower()!r}"
        )
    if not _FIELD.fullmatch(field):
        raise DataError(
            f"member {field!r} of sample {key} is not a usable name: WebDataset keeps names that start with two "
            "underscores for itself, and slashes or empty parts change the key; use letters, digits and single dots"
        )


class ShardWriter:
    """Writes the shards of one split, each a tar with its index beside it.

    They are ``shard-000000.tar`` and its index ``shard-000000.parquet``, and so on. A shard is closed when it holds
    `max_rows` samples or the next sample would take it over `max_bytes`; a larger sample stands alone. The same samples
    give the same bytes. Tar and index are written under temporary names and renamed together, so a shard that can be
    seen is whole. Leaving the context by an exception removes the shard in progress.
    """

    def __init__(self, folder: str | Path, max_bytes: int = 256 << 20, max_rows: int = 10_000) -> None:
        self.folder, self.max_bytes, self.max_rows = Path(folder), max_bytes, max_rows
        self.shards: list[ShardEntry] = []  # `path` relative to the parent of `folder`
        self._keys: set[str] = set()
        self._rows: list[dict] = []
        self._file: BinaryIO | None = None  # the shard in progress; None where it has no row yet
        self.folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self._close_shard()
        elif self._file is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def write(
        self,
        key: str,
        members: Mapping[str, bytes],
        *,
        recording: str,
        content_hash: int,
        text_ids: np.ndarray,
        segments: np.ndarray,
        decord: frozenset[str] = frozenset(),
    ) -> None:
        """Append one sample to the shard in progress.

        `text_ids` is [n] i32, `segments` [m] `SEGMENT_DTYPE`; `decord` names the videos that decord is proven to read
        as PyAV does. Raises DataError for a key or member name that WebDataset would change, and for a key seen before.
        """
        check_key(key)
        for field in members:
            check_field(key, field)
        if key in self._keys:
            raise DataError(f"sample key {key} occurs twice in {self.folder}; give every recording its own name")
        if not members:
            raise DataError(f"sample {key} has no member: a tar cannot hold it; leave it out or give it a payload")
        self._keys.add(key)
        coming = sum(_BLOCK + _padded(len(content)) for content in members.values())
        file = self._file
        if (
            file is not None
            and self._rows
            and (len(self._rows) >= self.max_rows or file.tell() + coming > self.max_bytes)
        ):
            self._close_shard()
            file = None
        if file is None:
            file = self._file = self._temporary.open("wb")
        row = {"key": key, "recording": recording, "content_hash": content_hash}
        row["members"] = [
            (field, *_append(file, f"{key}.{field}", content), zlib.crc32(content), field in decord)
            for field, content in members.items()
        ]
        self._rows.append(row | {"text_ids": text_ids, "segments": segments})

    @property
    def _path(self) -> Path:
        return self.folder / f"shard-{len(self.shards):06d}.tar"

    @property
    def _temporary(self) -> Path:
        return self._path.with_name(f".{self._path.name}")

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._file.write(bytes(2 * _BLOCK))
        self._file.write(bytes(-self._file.tell() % tarfile.RECORDSIZE))
        size = self._file.tell()
        self._file.close()
        # Not by `write_atomically`: the tar is streamed, and a preparation that the machine broke off is checked anew.
        digest = write_index(self._temporary, self._rows)
        self._temporary.with_suffix(".parquet").rename(self._path.with_suffix(".parquet"))
        self._temporary.rename(self._path)
        relative = f"{self.folder.name}/{self._path.name}"
        self.shards.append(ShardEntry(path=relative, rows=len(self._rows), bytes=size, digest=digest))
        self._rows, self._file = [], None


def _append(file: BinaryIO, name: str, content: bytes) -> tuple[int, int]:
    """Write one member with its header; returns the byte offset of its content, and its size."""
    header = tarfile.TarInfo(name)  # owner 0, time 0, mode 0644: nothing of the machine that wrote it
    header.size = len(content)
    file.write(header.tobuf(tarfile.GNU_FORMAT))
    offset = file.tell()
    file.write(content)
    file.write(bytes(_padded(len(content)) - len(content)))
    return offset, len(content)


def read_member(
    tar: str | Path,
    offset: int,
    size: int,
    name: str = "",
    storage: Storage = DEFAULT_STORAGE,
    crc32: int | None = None,
) -> bytes:
    """Read the content of one member, the `size` bytes at `offset` of a local or remote tar, as one range read.

    `name` is ``<key>.<field>``; without one any name will do. The tar header in front of the content is read along,
    to notice an index that belongs to another tar. Of a member that stands in an index, `read_stored` compares the
    checksum too. Raises DataError when the tar is missing, shorter than its index says, not the tar that was indexed,
    or where the content has not the checksum `crc32`.
    """
    content = storage.read_range(tar, offset - _BLOCK, offset + size, name or "member")
    return _content(content, _BLOCK, size, tar, offset, name, crc32)


@dataclass(frozen=True)
class StoredMember:
    """Holds the content of a member of a stored row.

    `name` is its field, `where` names tar, key and field in messages.
    """

    name: str
    content: bytes
    where: str


def read_stored(index: ShardIndex, row: int, member: int, storage: Storage = DEFAULT_STORAGE) -> StoredMember:
    """Read a member of a row as it was written. Raises DataError as `read_member`, and for another checksum."""
    name, offset, size, crc32 = index.member(row, member)
    content = read_member(index.tar, offset, size, name, storage, crc32)
    return StoredMember(index.row_member(row, member)[0], content, f"{index.tar}: {name}")


@dataclass(frozen=True)
class ByteSpan:
    """Marks the bytes of a tar that are read at once for several members.

    Bytes `start`..`stop` hold the members with their headers, and what else lies between.
    """

    start: int
    stop: int
    members: tuple[Member, ...]

    def cut(self, content: bytes, tar: str | Path, name: str) -> bytes:
        """Return the bytes of the member `name`, out of those of the span.

        Raises DataError for a tar that is not the one indexed, and for a member that is not as it was written.
        """
        name, offset, size, crc32 = next(member for member in self.members if member.name == name)
        return _content(content, offset - self.start, size, tar, offset, name, crc32)


def spans(members: Iterable[Member], gap: int = READ_GAP) -> list[ByteSpan]:
    """Return the ranges to read for members: one for those less than `gap` bytes apart."""
    found: list[list[Member]] = []
    end = None
    for member in sorted(members, key=lambda m: m.offset):
        if end is None or member.offset - _BLOCK - end >= gap:
            found.append([])
        found[-1].append(member)
        end = member.offset + member.size
    return [ByteSpan(run[0].offset - _BLOCK, run[-1].offset + run[-1].size, tuple(run)) for run in found]


def _content(span: bytes, at: int, size: int, tar: str | Path, offset: int, name: str, crc32: int | None) -> bytes:
    """The member whose content begins at `at` of the span, proven by its checksum, or without one by its header."""
    content = span[at : at + size]
    if crc32 is not None and zlib.crc32(content) == crc32:
        return content
    header = span[at - _BLOCK : at]
    if _stated_size(header) != size or (name and _stated_name(header) != name.encode()[: tarfile.LENGTH_NAME]):
        raise DataError(
            f"{tar} is not the tar its index describes: there is no {name or 'member'} of {size} bytes at byte "
            f"{offset}; one of the two is older: copy both again or prepare the source again"
        )
    if crc32 is not None:
        raise DataError(
            f"{tar}: {name} ({size} bytes at byte {offset}) is not what was written: its checksum differs; copy the "
            "tar again or prepare the source again"
        )
    return content


def _stated_size(header: bytes) -> int | None:
    try:
        return tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape").size
    except tarfile.HeaderError:
        return None


def _stated_name(header: bytes) -> bytes:
    """The first bytes of the name: a longer one stands whole in a block before."""
    return header[: tarfile.LENGTH_NAME].rstrip(b"\0")


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
