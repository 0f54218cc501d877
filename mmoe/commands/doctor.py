"""Defines `mmoe doctor`, which says what this machine has, and what of it mmoe can use."""

import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mmoe.commands.arguments import AsJson
from mmoe.commands.console import Console, console, print_json

CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16")  # flags of x86 and Arm processors with bfloat16 arithmetic


def doctor(as_json: AsJson = False) -> None:
    """Show what this machine has: versions, cores, memory, GPU, and the packages that a config can ask for."""
    from mmoe.runtime.provenance import versions

    found = {"versions": versions(), "machine": machine(), "packages": packages()}
    if as_json:
        print_json(found)
    else:
        show_diagnosis(found, console)


def show_diagnosis(found: dict[str, Any], console: Console) -> None:
    """Print versions, the machine and the table of optional packages by the key that asks for each."""
    for title in ("versions", "machine"):
        table = Table(title, "")
        for name, value in found[title].items():
            table.add_row(name, value or "not known: it has no metadata")
        _print(table, console)
    table = Table("what asks for it", "package", "is it here")
    for each in found["packages"]:
        verdict = Text(each["version"] or "available", "green") if each["available"] else each["reason"]
        table.add_row(each["key"], each["name"], verdict)
    _print(table, console)


def _print(table: Table, console: Console) -> None:
    for column in table.columns:
        column.overflow = "fold"
    console.print(table)


def packages() -> list[dict[str, Any]]:
    """Say of every optional package that a config can ask for what for, by which key, and whether it is usable."""
    from mmoe.optional import OPTIONAL_PACKAGES, status

    return [
        {"key": package.key, "purpose": package.purpose} | asdict(status(name))
        for name, package in OPTIONAL_PACKAGES.items()
        if package.key
    ]


def machine() -> dict[str, str]:
    """Return platform, cores, memory and GPU of this machine; counts are those this process may use."""
    import torch

    from mmoe.optional import status
    from mmoe.runtime.memory import free_memory, in_gib, total_memory

    facts = {
        "platform": platform.platform(),
        "interpreter": sys.executable,
        "cores": f"{usable_cores()} usable of {os.cpu_count()}, torch uses {torch.get_num_threads()} threads",
        "memory": f"{in_gib(free_memory())} free of {in_gib(total_memory())}",
        "bfloat16 on the CPU": _cpu_bf16(),
    }
    if not torch.cuda.is_available():
        return facts | {"GPU": status("cuda").reason}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        bf16 = "bfloat16" if device.major >= 8 else "no bfloat16"
        compute = f"CUDA {torch.version.cuda}, compute {device.major}.{device.minor}, {bf16}"
        facts[f"GPU {index}"] = f"{device.name}, {in_gib(device.total_memory)}, {compute}"
    return facts


def usable_cores() -> int:
    """Count the cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_bf16() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    found = [flag for flag in CPU_BF16 if flag in flags]
    if found:
        return f"in hardware ({', '.join(found)}): precision.compute: bfloat16 can be faster"
    return "emulated: precision.compute: float32 is faster"
