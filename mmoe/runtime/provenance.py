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
from mmoe.errors import DataError
from mmoe.files import write_atomically, writes

PROVENANCE = "provenance.jsonl"
PACKAGES = ("mmoe", "torch", "numpy", "pydantic", "tokenizers", "pyarrow")  # that figures depend on

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
        before = path.read_bytes() if path.is_file() else b""
        write_atomically(path, before + json.dumps(line).encode() + b"\n")


def read_provenance(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of all sessions, in their order. Raises DataError for a line that is none."""
    path = folder / PROVENANCE
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines() if path.is_file() else (), start=1):
        try:
            line = json.loads(text)
            found = KEYS - line.keys()
        except (ValueError, AttributeError) as error:
            raise DataError(f"{path}: line {number} is no record of a session ({error}); remove that line") from error
        if found:
            raise DataError(f"{path}: line {number} has no {', '.join(sorted(found))}; remove that line")
        lines.append(line)
    return lines


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that figures depend on, by name."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}


def commit_of(folder: Path) -> dict[str, Any]:
    """Return the git `commit` that the files in `folder` are of, and whether they were changed since (`dirty`).

    Both are None where the files are of no repository, or git is not there.
    """
    tracked = _git(folder, "ls-files", "--", ".")  # a package that is installed somewhere in a repository is not of it
    commit = _git(folder, "rev-parse", "HEAD") if tracked else None
    if not commit:
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
