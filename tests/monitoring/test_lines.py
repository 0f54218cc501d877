"""A file of lines is whole at every moment, whatever the disk does and whoever kills the process."""

import errno
import os
import resource
from pathlib import Path

import pytest

from mmoe.errors import OutputError
from mmoe.monitoring.lines import LineFile


@pytest.mark.parametrize("torn", ["", "x", "x" * 200_000])
@pytest.mark.parametrize("whole", ["", "a\nb\n", "y" * 100_000 + "\n"])
def test_what_a_kill_tore_is_cut_off(tmp_path: Path, whole: str, torn: str) -> None:
    path = tmp_path / "lines"
    path.write_text(whole + torn)
    file = LineFile(path, [])
    assert path.read_text() == whole
    file.write("c")
    file.close()
    assert path.read_text() == whole + "c\n"


def test_a_line_that_the_kernel_refuses_in_its_middle_comes_before_the_next(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "lines", [])
    file.write("a" * 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, limits[1]))
    try:
        for _ in range(2):
            with pytest.raises(OutputError, match="lines cannot be written .File too large.*kept in the checkpoint"):
                file.write("b" * 100)
            assert (tmp_path / "lines").read_text() == "a" * 100 + "\n"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    kept = list(file.pending)
    file.write("c")
    file.close()
    assert (tmp_path / "lines").read_text().split() == ["a" * 100, "b" * 100, "b" * 100, "c"]
    LineFile(tmp_path / "again", kept).close()
    assert (tmp_path / "again").read_text().split() == ["b" * 100, "b" * 100] and kept == []


def test_a_full_device_is_one_sentence_when_it_is_opened_with_lines_to_write() -> None:
    with pytest.raises(OutputError, match=f"/dev/full cannot be written .{os.strerror(errno.ENOSPC)}"):
        LineFile(Path("/dev/full"), ["a"])
