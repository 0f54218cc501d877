"""What is read from /proc, beside what psutil says of the same."""

import os
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from mmoe.runtime.memory import free_memory, total_memory
from mmoe.runtime.peak_memory import process_tree_pss
from mmoe.runtime.processes import descendants

CHILD = "x = bytearray(64 << 20); print(1, flush=True); input()"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"


@pytest.fixture
def family() -> Iterator[subprocess.Popen]:
    """A process with a child of its own, which holds 64 MiB."""
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.communicate(b"\n")


def test_descendants_are_the_children_and_theirs_parents_first(family: subprocess.Popen) -> None:
    found = descendants()
    (child,) = psutil.Process(family.pid).children()
    assert found.index(family.pid) < found.index(child.pid)
    assert not {os.getpid(), os.getppid()} & set(found)


def test_the_memory_of_the_tree_is_what_psutil_adds_up(family: subprocess.Popen) -> None:
    own = psutil.Process()
    expected = sum(each.memory_full_info().pss for each in [own, *own.children(recursive=True)])
    assert process_tree_pss() == pytest.approx(expected, rel=0.05) and expected > 64 << 20


def test_the_memory_of_the_machine_is_what_psutil_says() -> None:
    assert total_memory() <= psutil.virtual_memory().total
    assert 0 < free_memory() <= total_memory()
    assert free_memory() == pytest.approx(min(psutil.virtual_memory().available, total_memory()), rel=0.2)
