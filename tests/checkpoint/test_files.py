import errno
import os
import zlib
from pathlib import Path

import pytest

from mmoe.checkpoint.files import CheckedFileSystem, check
from mmoe.errors import CheckpointError

CONTENT = os.urandom(3000)


def write(folder: Path) -> tuple[Path, int, int]:
    files, path = CheckedFileSystem(), folder / "a.bin"
    with files.create_stream(path, "wb") as stream:
        for start in range(0, len(CONTENT), 700):
            assert stream.tell() == start
            stream.write(CONTENT[start : start + 700])
    return path, *files.written[path]


def test_written_files_pass_their_check(tmp_path: Path) -> None:
    path, size, crc = write(tmp_path)
    assert path.read_bytes() == CONTENT and (size, crc) == (3000, zlib.crc32(CONTENT))
    check(path, size, crc)


@pytest.mark.parametrize(("fault", "sentence"), [("gone", "missing"), ("short", "truncated"), ("flipped", "corrupt")])
def test_a_broken_file_is_named(tmp_path: Path, fault: str, sentence: str) -> None:
    path, size, crc = write(tmp_path)
    if fault == "gone":
        path.unlink()
    else:
        flipped = CONTENT[:1500] + bytes([CONTENT[1500] ^ 1]) + CONTENT[1501:]
        path.write_bytes(CONTENT[:-1] if fault == "short" else flipped)
    with pytest.raises(CheckpointError, match=f"a.bin is {sentence}"):
        check(path, size, crc)


def test_the_error_of_the_disk_comes_when_the_file_is_closed(tmp_path: Path) -> None:
    """/dev/full refuses every write; the writer sees none of it, and a later error of its own does not hide it."""
    for own_error in (False, True):
        with pytest.raises(OSError) as error:
            with CheckedFileSystem().create_stream(Path("/dev/full"), "wb") as stream:
                assert stream.write(CONTENT) == len(CONTENT)
                if own_error:
                    raise RuntimeError("unexpected pos 704 vs 598")
        assert error.value.errno == errno.ENOSPC


def test_a_failed_sync_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        CheckedFileSystem().write(tmp_path / "a", b"x")
