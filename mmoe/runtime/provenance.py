"""Records where a run's numbers come from in RUN/provenance.jsonl: a line for each session that trains."""

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmoe import __version__
from mmoe.addresses import without_secrets
from mmoe.files import writes
from mmoe.runtime.logging import append

PROVENANCE = "provenance.jsonl"
PACKAGES = ("torch", "numpy", "pydantic", "tokenizers", "pyarrow")  # that figures depend on, beside mmoe

KEYS = {"time", "session", "step", "command", "code", "versions", "host", "machines", "ranks", "device", "data"}
_GIT_SECONDS = 10.0


def record_provenance(folder: Path, session: int, step: int, data: dict[str, Any]) -> None:
    """Add the line of a `session` that goes on after `step` steps on the `data`, a digest of each part of it.

    It says by what command, on which machine and with which code and packages; of the environment it holds nothing.
    Raises OutputError.
    """
    path = folder / PROVENANCE
    line: dict[str, Any] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "session": session,
        "step": step,
        "command": without_secrets(shlex.join(sys.argv)),
        "code": {"version": __version__, **commit_of(Path(__file__).parent)},
        "versions": versions() | ({"CUDA": torch.version.cuda} if torch.cuda.is_available() else {}),
        "host": socket.gethostname(),
        "machines": int(os.environ.get("GROUP_WORLD_SIZE", 1)),
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "data": data,
    }
    with writes(path):
        append(path, json.dumps(line) + "\n")


def read_provenance(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the lines of all sessions, in their order; gives them, and a sentence on each line that is left out."""
    path = folder / PROVENANCE
    lines, left_out = list[dict[str, Any]](), list[str]()
    for number, text in enumerate(path.read_bytes().splitlines() if path.is_file() else (), start=1):
        try:
            line = json.loads(text)
            missing = KEYS - line.keys()
        except (ValueError, AttributeError) as error:
            left_out.append(f"{path}: line {number} is no record of a session ({error}); remove that line")
            continue
        if missing:
            left_out.append(f"{path}: line {number} has no {', '.join(sorted(missing))}; remove that line")
        else:
            lines.append(line)
    return lines, left_out


def versions() -> dict[str, str | None]:
    """Return the versions of Python, mmoe and the packages that figures depend on, by name.

    That of a package without metadata is None.
    """
    found = {name: _version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "mmoe": __version__} | found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit_of(folder: Path) -> dict[str, Any]:
    """Return the git `commit` that the files in `folder` are of, and whether they were changed since (`dirty`).

    Both are None where the files are of no repository, or git is not there; `dirty` also where git does not say it.
    """
    tracked = _git(folder, "ls-files", "--", ".")  # a package that is installed somewhere in a repository is not of it
    commit = _git(folder, "rev-parse", "HEAD") if tracked else None
    if not commit:
        return {"commit": None, "dirty": None}
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
