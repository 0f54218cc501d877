"""Collects what a process can say of itself while its main thread waits: its step, its collectives, its stack.

torch's flight recorder keeps the last 2000 collectives of a process with group, number in that group and whether they
have ended. It misses gloo's send and receive and waits on the store; those show as a function of torch.distributed at
the top of the main thread's stack.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field
from types import FrameType

import torch.distributed as dist

from mmoe.compat import flight_records, process_groups


@dataclass(frozen=True)
class Collective:
    """Names a collective that has begun here and not ended; `number` counts those of its group from 1."""

    call: str  # e.g. gloo:all_reduce
    group: str  # e.g. default_pg or mesh_tp
    name: str  # torch's own name of the group, unique
    ranks: tuple[int, ...]
    number: int
    seconds: float  # since it was called


@dataclass(frozen=True)
class State:
    """Says what rank `rank` does: published as JSON, read by whoever assembles the hang report."""

    rank: int
    host: str
    pid: int
    step: int | None
    phase: str
    phase_seconds: float  # since the last beat
    waits: tuple[Collective, ...]  # the oldest first
    called: dict[str, int]  # by the group's name: the number of the last collective called
    blocked: str  # the function of torch.distributed that the main thread is in, "" for none
    blocked_seconds: float
    place: str  # the innermost line of the main thread outside torch
    stack: tuple[str, ...] = field(repr=False)  # of the main thread, the outermost first

    def to_json(self) -> str:
        """Write the state as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> State:
        """Read what `to_json` wrote."""
        tree = json.loads(text)
        waits = tuple(Collective(**{**wait, "ranks": tuple(wait["ranks"])}) for wait in tree["waits"])
        return cls(**{**tree, "waits": waits, "stack": tuple(tree["stack"])})


def pending_collectives() -> tuple[tuple[Collective, ...], dict[str, int]]:
    """Return what has not ended, the oldest first, and the number of the last one called by the group's name."""
    members = {group.group_name: tuple(dist.get_process_group_ranks(group)) for group in process_groups()}
    waits: list[Collective] = []
    called: dict[str, int] = {}
    now = time.time_ns()
    for entry in (entry for dump in flight_records() for entry in json.loads(dump).get("entries", [])):
        name, description = entry["process_group"]
        number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
        if not entry["is_p2p"]:
            called[name] = max(number, called.get(name, 0))
        if not entry["retired"] and entry["state"] != "completed":
            seconds = (now - entry["time_created_ns"]) / 1e9
            call = entry["profiling_name"]
            waits.append(Collective(call, description or name, name, members.get(name, ()), number, seconds))
    return tuple(sorted(waits, key=lambda wait: -wait.seconds)), called


class MainThread:
    """Looks at the main thread's stack from another thread, and since when its innermost call has been the same."""

    def __init__(self) -> None:
        self._where: tuple[int, int] | None = None
        self._since = time.monotonic()

    def look(self) -> FrameType:
        """Look at the innermost Python frame, regularly: `seconds` counts from the first look at the same call."""
        thread = threading.main_thread().ident
        assert thread is not None  # it has been started
        frame = sys._current_frames()[thread]
        where = (id(frame), frame.f_lasti)
        if where != self._where:
            self._where, self._since = where, time.monotonic()
        return frame

    @property
    def seconds(self) -> float:
        """Give the seconds since the innermost call was first seen."""
        return time.monotonic() - self._since


def blocking_call(frame: FrameType) -> str:
    """Name the function of torch.distributed that `frame` is in, with its peers where it has some; "" elsewhere."""
    module = _module(frame)
    if not module.startswith("torch.distributed"):
        return ""
    peers = {name: frame.f_locals.get(name) for name in ("src", "dst", "group_src", "group_dst")}
    given = ", ".join(f"{name}={value}" for name, value in peers.items() if isinstance(value, int))
    return f"{module.removeprefix('torch.')}.{frame.f_code.co_name}({given})"


def place(frame: FrameType) -> str:
    """Name the innermost line outside torch, as ``mmoe.losses.total:120 compute``."""
    for inner, line in traceback.walk_stack(frame):
        if not _module(inner).startswith("torch"):
            return _name(inner, line)
    return _name(frame, frame.f_lineno)


def stack(frame: FrameType) -> tuple[str, ...]:
    """Return one text for each call, the outermost first."""
    return tuple(reversed([_name(inner, line) for inner, line in traceback.walk_stack(frame)]))


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "?"))


def _name(frame: FrameType, line: int | None) -> str:
    return f"{_module(frame)}:{line} {frame.f_code.co_name}"
