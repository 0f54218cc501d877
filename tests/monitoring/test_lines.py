"""A file of lines is whole at every moment, whatever the disk does and whoever kills the process."""

import errno
import os
import resource
from pathlib import Path

import pytest

from mmoe.errors import OutputError
from mmoe.monitoring.lines import LineFile

KEPT = "they are kept"


@pytest.mark.parametrize("torn", ["", "x", "x" * 200_000])
@pytest.mark.parametrize("whole", ["", "a\nb\n", "y" * 100_000 + "\n"])
def test_what_a_kill_tore_is_cut_off(tmp_path: Path, whole: str, torn: str) -> None:
    path = tmp_path / "lines"
    path.write_text(whole + torn)
    file = LineFile(path, KEPT)
    assert path.read_text() == whole
    file.write("c")
    file.close()
    assert path.read_text() == whole + "c\n"


@pytest.mark.parametrize(
    "lines", [[], ["a"], ["a", "b" * 70_000, "", "c" * 65_536, "d"], [str(n) for n in range(40_000)]]
)
def test_lines_are_read_backwards_and_forwards_with_their_places(tmp_path: Path, lines: list[str]) -> None:
    path = tmp_path / "lines"
    path.write_text("".join(f"{line}\n" for line in lines))
    file = LineFile(path, KEPT)
    found = list(file.backwards())
    assert [line for _, line in found] == lines[::-1]
    content = path.read_bytes()
    assert all(content[place : place + len(line)].decode() == line for place, line in found)
    assert [line for _, line in file.forwards(0)] == lines and file.last == (lines or [None])[-1]
    for place, line in found[-3:]:
        assert next(file.forwards(place)) == (place + len(line) + 1, line)


def test_a_line_that_the_kernel_refuses_in_its_middle_comes_before_the_next(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "lines", KEPT)
    file.write("a" * 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, limits[1]))
    try:
        for _ in range(2):
            with pytest.raises(OutputError, match="lines cannot be written .File too large.*they are kept"):
                file.write("b" * 100)
            assert (tmp_path / "lines").read_text() == "a" * 100 + "\n"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.pending == ["b" * 100] * 2
    file.write("c")
    file.close()
    assert (tmp_path / "lines").read_text().split() == ["a" * 100, "b" * 100, "b" * 100, "c"]


def test_a_full_device_is_one_sentence() -> None:
    with pytest.raises(OutputError, match=f"/dev/full cannot be written .{os.strerror(errno.ENOSPC)}"):
        LineFile(Path("/dev/full"), KEPT).write("a")
