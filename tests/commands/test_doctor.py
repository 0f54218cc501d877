import io
import os
from importlib import metadata

import psutil
import torch

from mmoe.commands.console import Console
from mmoe.commands.doctor import machine, print_diagnosis, usable_cores
from mmoe.optional import OPTIONAL_PACKAGES, status
from mmoe.runtime.memory import total_memory


def test_the_report_has_every_backend_and_its_whole_reason() -> None:
    console = Console(width=300, record=True, file=io.StringIO())
    print_diagnosis(console)
    text = console.export_text()
    assert metadata.version("torch") in text and metadata.version("torchaudio") in text
    for name in OPTIONAL_PACKAGES:
        line = next(line for line in text.splitlines() if line.startswith(f"│ {name} "))
        found = status(name)
        assert (found.reason or "│ available") in line and found.version in line


def test_the_machine_is_this_one() -> None:
    facts = machine()
    assert 1 <= usable_cores() <= os.cpu_count()
    assert 0 < total_memory() <= psutil.virtual_memory().total
    assert ("GPU 0" in facts) == torch.cuda.is_available()
    assert f"{usable_cores()} usable" in facts["cores"] and "GiB" in facts["memory"]
