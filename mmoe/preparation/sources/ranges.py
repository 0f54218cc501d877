"""Reads byte ranges of files, compressed or not.

A compressed file cannot be entered in its middle, so each process keeps the last one open and reads on from where it
stands: as preparation makes samples in the order of the list, every process decompresses a file once, in constant
memory.
"""

import io
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from mmoe.errors import DataError
from mmoe.preparation.sources.files import open_regular

STREAM_BLOCK = 1 << 20  # bytes of a file that are in memory at once
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}


def plain_suffix(file: Path) -> str:
    """Return the suffix of what a file holds once it is decompressed, in lower case: ``.jsonl`` of ``a.JSONL.gz``."""
    plain = file.with_suffix("") if file.suffix.lower() in _COMPRESSION else file
    return plain.suffix.lower()


def open_stream(file: Path) -> io.BufferedReader:
    """Open the decompressed file at its beginning."""
    compression, stream = _COMPRESSION.get(file.suffix.lower()), open_regular(file)
    if compression is None:
        return stream
    return io.BufferedReader(pa.input_stream(stream, compression=compression), STREAM_BLOCK)


def read_range(file: Path, start: int, stop: int) -> bytes:
    """Read bytes [start, stop) of the decompressed file; raise DataError where that is not possible."""
    try:
        if file.suffix.lower() in _COMPRESSION:
            return forward(file).read(start, stop)
        with open_regular(file) as stream:
            stream.seek(start)
            return stream.read(stop - start)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error}); restore it and prepare again") from error


class Forward:
    """Reads byte ranges of a compressed file; cheap as long as they are asked for in order."""

    def __init__(self, file: Path) -> None:
        self._file, self._stream, self._at = file, open_stream(file), 0

    def read(self, start: int, stop: int) -> bytes:
        """Read bytes [start, stop); raise OSError where the file ends before them."""
        if start < self._at:
            self._stream.close()
            self._stream, self._at = open_stream(self._file), 0
        while self._at < start:
            passed = len(self._stream.read(min(start - self._at, STREAM_BLOCK)))
            if not passed:
                raise OSError(f"it ends at byte {self._at}")
            self._at += passed
        data = self._stream.read(stop - start)
        self._at += len(data)
        return data


forward = lru_cache(maxsize=1)(Forward)
