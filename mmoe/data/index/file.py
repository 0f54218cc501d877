"""Write and read the Parquet file of a shard index: each byte's checksum is compared before Parquet reads it.

It is a plain Parquet file to everybody else. In front of its footer stands a block that Parquet readers pass over::

    CRC-32 of every column chunk, by row group and column    u32 each, little-endian
    CRC-32 of the footer                                     u32
    number of column chunks                                  u32
    "mmx1"

So a part of the columns can be read from far away and is still proven: Parquet's own page checksums cover neither the
pages' headers nor the footer, and a damaged one of those asks for gigabytes or ends the process.
"""

import io
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mmoe.data.storage.store import Storage
from mmoe.errors import DataError, MmoeError
from mmoe.schema.bounds import bounds

ONE_REQUEST = 1 << 20  # bytes of an index below which picking columns would cost more than it saves
_MAGIC = b"mmx1"
_ENDING = struct.Struct("<I4s")  # of the block of checksums
_FOOTER = struct.Struct("<I4s")  # of the file: length of the footer, and Parquet's mark
_PARQUET = b"PAR1"
_TAIL = 64 << 10  # bytes from the end that hold the footer and the checksums of all but odd indices


def write_table(table: pa.Table, path: str | Path) -> None:
    """Write an index with the checksums of its parts."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    whole = sink.getvalue()
    footer_start = len(whole) - _FOOTER.size - _FOOTER.unpack_from(whole, len(whole) - _FOOTER.size)[0]
    metadata = pq.read_metadata(pa.BufferReader(whole))
    checksums = [zlib.crc32(whole[a:b]) for a, b in _chunks(metadata)]
    checksums.append(zlib.crc32(whole[footer_start : -_FOOTER.size]))
    block = struct.pack(f"<{len(checksums)}I", *checksums) + _ENDING.pack(len(checksums) - 1, _MAGIC)
    Path(path).write_bytes(whole[:footer_start] + block + whole[footer_start:])


def read_table(path: str, schema: pa.Schema, storage: Storage, columns: list[str] | None = None) -> pa.Table:
    """Read an index, or some leaf `columns` of it: of a large one only their bytes.

    Raises DataError, which names the file, for one that is damaged, has another schema or holds nulls; StorageError
    when the store gives no answer.
    """
    try:
        table = _read(path, schema, storage, columns)
        table.validate(full=True)
        if nulls := [name for name in table.column_names if _has_nulls(table[name].combine_chunks())]:
            raise ValueError(f"{nulls[0]} has nulls")
        return table
    except MmoeError:
        raise
    except Exception as error:  # of damaged or crafted bytes, pyarrow raises whatever its parts raise
        said = str(error) if isinstance(error, (pa.ArrowInvalid, ValueError)) else f"{type(error).__name__}: {error}"
        raise unreadable_index(path, said) from error


def unreadable_index(path: str, said: object) -> DataError:
    """Say that a file is no shard index, or a damaged one."""
    return DataError(f"{path} cannot be read as a shard index ({said}); copy it again or prepare the source again")


class _Ranges(io.RawIOBase):
    """The parts of a file that are in memory, as pyarrow reads a file."""

    def __init__(self, size: int) -> None:
        self._size, self._at = size, 0
        self._pieces: list[tuple[int, bytes]] = []

    def add(self, start: int, content: bytes) -> None:
        self._pieces.append((start, content))

    def part(self, start: int, stop: int) -> bytes | None:
        for first, content in self._pieces:
            if first <= start and stop <= first + len(content):
                return content[start - first : stop - first]
        return None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        stop = self._size if size < 0 else min(self._at + size, self._size)
        content = self.part(self._at, stop) if stop > self._at else b""
        if content is None:
            raise ValueError(f"bytes {self._at} to {stop} belong to no column that was asked for")
        self._at += len(content)
        return content


def _read(path: str, schema: pa.Schema, storage: Storage, columns: list[str] | None) -> pa.Table:
    what = f"the index of the shard {os.fspath(path).rpartition('/')[2]}"
    size = storage.size(path)
    if size is None or columns is None or size <= ONE_REQUEST:
        whole = storage.read(path, what)
        size, file = len(whole), _Ranges(len(whole))
        file.add(0, whole)
    else:
        file = _Ranges(size)
        file.add(size - min(size, _TAIL), storage.read_range(path, size - min(size, _TAIL), size, what))
    metadata, checksums = _metadata(path, size, file, storage, what)
    if not metadata.schema.to_arrow_schema().equals(schema):
        raise ValueError("its columns are others")
    wanted = [
        (start, stop, checksum)
        for number, ((start, stop), checksum) in enumerate(zip(_chunks(metadata), checksums, strict=True))
        if columns is None or metadata.schema.column(number % metadata.num_columns).path in columns
    ]
    if any(not 0 <= start <= stop <= size for start, stop, _ in wanted):
        raise ValueError("a column lies outside the file")
    _fetch(path, [(start, stop) for start, stop, _ in wanted], file, storage, what)
    for start, stop, checksum in wanted:
        content = file.part(start, stop)
        if content is None or zlib.crc32(content) != checksum:
            raise ValueError(f"bytes {start} to {stop} are not those that were written: their checksum differs")
    unpacked = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    if unpacked > bounds().file_bytes:
        raise ValueError(f"it unpacks to {unpacked} bytes, more than data.bounds.file_bytes {bounds().file_bytes}")
    # Threads of pyarrow's would take Python's locks to read the file and to let go of it, at any later time: also while
    # this process forks its decoding workers, which then hang. Several indices are read at once anyway.
    with pq.ParquetFile(pa.PythonFile(file, mode="r"), metadata=metadata, pre_buffer=False) as parquet:
        return parquet.read(columns, use_threads=False)


def _metadata(
    path: str, size: int, file: _Ranges, storage: Storage, what: str
) -> tuple[pq.FileMetaData, tuple[int, ...]]:
    """The footer, proven, and the checksum of every column chunk."""

    def part(start: int, stop: int) -> bytes:
        if not 0 <= start <= stop:
            raise ValueError("its last bytes are not those of an index")
        if (content := file.part(start, stop)) is None:
            content = storage.read_range(path, start, stop, what)
        return content

    length, mark = _FOOTER.unpack(part(size - _FOOTER.size, size))
    footer_start = size - _FOOTER.size - length
    number, magic = _ENDING.unpack(part(footer_start - _ENDING.size, footer_start))
    if mark != _PARQUET or magic != _MAGIC:
        raise ValueError("its last bytes are not those of an index")
    block = part(footer_start - _ENDING.size - 4 * (number + 1), footer_start - _ENDING.size)
    *checksums, expected = struct.unpack(f"<{number + 1}I", block)
    footer = part(footer_start, size)
    if zlib.crc32(footer[: -_FOOTER.size]) != expected:
        raise ValueError("its footer is not the one that was written: its checksum differs")
    return pq.read_metadata(pa.BufferReader(_PARQUET + footer)), tuple(checksums)


def _chunks(metadata: pq.FileMetaData) -> Iterable[tuple[int, int]]:
    """First byte and end of every column chunk, by row group and column."""
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(number)
            start = chunk.data_page_offset
            if chunk.has_dictionary_page:
                start = min(start, chunk.dictionary_page_offset)
            yield start, start + chunk.total_compressed_size


def _fetch(path: str, ranges: list[tuple[int, int]], file: _Ranges, storage: Storage, what: str) -> None:
    """Bring the ranges that are not here yet: those that touch in one request, all requests at once."""
    runs: list[list[int]] = []
    for start, stop in sorted(r for r in ranges if file.part(*r) is None):
        if runs and start <= runs[-1][1]:
            runs[-1][1] = max(stop, runs[-1][1])
        else:
            runs.append([start, stop])
    coming = [(start, storage.begin(path, start, stop, what)) for start, stop in runs]
    for start, reading in coming:
        file.add(start, reading.result())


def _has_nulls(array: pa.Array) -> bool:
    if array.null_count:
        return True
    if pa.types.is_list(array.type):
        return _has_nulls(array.flatten())
    if pa.types.is_struct(array.type):
        return any(_has_nulls(array.field(number)) for number in range(array.type.num_fields))
    return False
