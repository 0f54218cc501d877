"""Reads tfrecord files and the examples in them, without TensorFlow.

A record is the length of its data (u64), a checksum of that (u32), the data, and a checksum of the data (u32), all
little-endian. The checksums are CRC-32C, rotated by 15 bits and shifted by a constant. The data is a
``tf.train.Example`` in protobuf's wire format: lists of bytes, f32 or i64 by key.

Only what is asked for is read: the steps of an episode can be counted without its images.
"""

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mmoe.data.load.reading import reading
from mmoe.errors import Refused
from mmoe.optional import needs
from mmoe.preparation.sources.files import open_regular
from mmoe.schema.bounds import check_bound

TORN, DAMAGED = "torn tfrecord file", "damaged record"
_HEAD, _FOOT = struct.Struct("<QI"), struct.Struct("<I")
_MASK, _BITS = 0xA282EAD8, 0xFFFFFFFF
_VARINT = 10  # bytes at most

Kind = Literal["bytes", "float", "int"]
_KINDS: dict[int, Kind] = {1: "bytes", 2: "float", 3: "int"}  # by the number of a Feature's field
ReadSpan = Callable[[int, int], bytes]  # the bytes from one position to another


def masked_crc(data: bytes) -> int:
    """Return the CRC-32C of `data`, masked as tfrecord files keep it."""
    with needs("checking tfrecord files"):
        import google_crc32c
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + _MASK) & _BITS


@dataclass(frozen=True)
class ListValues:
    """Says where one list of an example stands, and reads it when it is asked for."""

    kind: Kind
    read: ReadSpan
    start: int
    stop: int

    def __len__(self) -> int:
        """Count the values; of bytes and of packed f32 none is read for it."""
        if self.kind == "bytes":
            return sum(1 for _ in self._fields())
        if self.kind == "float":
            return sum(stop - start for start, stop in self._fields()) // 4
        return int((self._joined() < 0x80).sum())

    def byte_strings(self) -> list[bytes]:
        """Return the values of a list of bytes."""
        return [self.read(start, stop) for start, stop in self._fields()]

    def numbers(self) -> np.ndarray:
        """Return the values of a list of f32 or i64, [n]."""
        data = self._joined()
        return data.view("<f4") if self.kind == "float" else _varints(data)

    def _fields(self) -> Iterator[tuple[int, int]]:
        return ((start, stop) for number, start, stop in _fields(self.read, self.start, self.stop) if number == 1)

    def _joined(self) -> np.ndarray:
        """The bytes of all values: packed numbers and single ones look the same."""
        return np.frombuffer(b"".join(self.byte_strings()), np.uint8)


@dataclass(frozen=True)
class Record:
    """Says where the data of a record stands in its file: bytes [start, stop), record `number` of the file."""

    path: Path
    number: int
    start: int
    stop: int

    @property
    def where(self) -> str:
        """Name the record in messages."""
        return f"{self.path}, record {self.number}"

    def count(self, key: str) -> int | None:
        """Count the values of the list `key`, None where there is none; reads little, and checks no checksum."""
        with open_regular(self.path) as file:

            def read(start: int, stop: int) -> bytes:
                file.seek(start)
                return file.read(stop - start)

            with _parsing(self.where):
                values = _example(read, self.start, self.stop).get(key)
                return None if values is None else len(values)

    def example(self) -> dict[str, ListValues]:
        """Read the whole record and check it; return its lists by key. Raises `Refused`."""
        size = self.stop - self.start
        check_bound("file_bytes", size, self.where, "has too many bytes")
        with open_regular(self.path) as file:
            file.seek(self.start)
            data = file.read(size + _FOOT.size)
        if len(data) < size + _FOOT.size:
            raise Refused(TORN, f"{self.where} ends after {len(data)} of {size} bytes; restore the file")
        data, foot = data[:size], data[size:]
        if (masked_crc(data),) != _FOOT.unpack(foot):
            raise Refused(DAMAGED, f"{self.where}: its data has another checksum than it states; restore the file")
        with _parsing(self.where):
            return _example(lambda start, stop: data[start:stop], 0, size)


def records(path: Path) -> Iterator[Record]:
    """Find the records of a file by their lengths, whose checksums are checked; raise `Refused` where it is torn."""
    with open_regular(path) as file:
        size, at, number = os.fstat(file.fileno()).st_size, 0, 0
        while at < size:
            file.seek(at)
            head = file.read(_HEAD.size)
            if len(head) == _HEAD.size:
                length, crc = _HEAD.unpack(head)
                if masked_crc(head[:8]) != crc:
                    message = (
                        f"{path}: the length of record {number}, at byte {at}, has another checksum than it states; "
                        "the file is damaged there, or no tfrecord file: restore it"
                    )
                    raise Refused(DAMAGED, message)
            if len(head) < _HEAD.size or at + _HEAD.size + length + _FOOT.size > size:
                raise Refused(TORN, f"{path} ends within record {number}, which begins at byte {at}; restore it")
            start = at + _HEAD.size
            yield Record(path, number, start, start + length)
            at, number = start + length + _FOOT.size, number + 1


def _parsing(where: str) -> AbstractContextManager[None]:
    return reading("tf.train.Example", where, "restore the file", DAMAGED)


def _example(read: ReadSpan, start: int, stop: int) -> dict[str, ListValues]:
    """The lists of ``Example { Features features = 1 }`` with ``Features { map<string, Feature> feature = 1 }``."""
    lists = {}
    for features in _messages(read, start, stop, 1):
        for entry in _messages(read, *features, 1):
            key, feature = b"", None
            for number, first, last in _fields(read, *entry):
                if number == 1:
                    key = read(first, last)
                elif number == 2:
                    feature = first, last
            for number, first, last in _fields(read, *feature) if feature else ():
                if number in _KINDS:
                    lists[key.decode()] = ListValues(_KINDS[number], read, first, last)
    return lists


def _messages(read: ReadSpan, start: int, stop: int, wanted: int) -> Iterator[tuple[int, int]]:
    return ((first, last) for number, first, last in _fields(read, start, stop) if number == wanted)


def _fields(read: ReadSpan, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and stop of the content of each field of a message; raises ValueError where it has none."""
    at = start
    while at < stop:
        tag, at = _varint(read, at, stop)
        wire = tag & 7
        if wire == 0:
            end = _varint(read, at, stop)[1]
        elif wire == 2:
            length, at = _varint(read, at, stop)
            end = at + length
        elif wire in (1, 5):
            end = at + (8 if wire == 1 else 4)
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if end > stop:
            raise ValueError(f"a field at byte {at} reaches beyond its message")
        yield tag >> 3, at, end
        at = end


def _varint(read: ReadSpan, at: int, stop: int) -> tuple[int, int]:
    value = 0
    for place, byte in enumerate(read(at, min(at + _VARINT, stop))):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    raise ValueError(f"a number at byte {at} does not end")


def _varints(data: np.ndarray) -> np.ndarray:
    """i64 [n] of the varints that stand one after another in `data` u8."""
    last = np.flatnonzero(data < 0x80)
    lengths = np.diff(last, prepend=-1)
    if (last[-1:] + 1 != len(data)).any() or (len(data) and not len(last)) or (lengths > _VARINT).any():
        raise ValueError("a number in a list does not end")
    first = last - lengths + 1
    shift = 7 * (np.arange(len(data)) - np.repeat(first, lengths))
    parts = (data & 0x7F).astype(np.uint64) << shift.astype(np.uint64)
    return np.add.reduceat(parts, first).view(np.int64) if len(first) else np.zeros(0, np.int64)
