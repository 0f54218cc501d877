"""Writes the hang report: which rank waits in which collective since when, and which rank has not called it."""

from __future__ import annotations

import time
from collections.abc import Mapping

from mmoe.runtime.launch_errors import name_ranks
from mmoe.runtime.logging import restart_count
from mmoe.runtime.watch_state import Collective, State

Silence = str  # what is known of a rank that gave no answer: its last heartbeat, or none


def verdict(states: Mapping[int, State], silent: Mapping[int, Silence]) -> list[str]:
    """Sentences, the likely cause first: who gives no answer, who has not called what others wait in, the rest."""
    causes = [f"rank {rank} gives no answer: {silence}" for rank, silence in silent.items()]
    consequences: list[str] = []
    for wait, waiting in _waiting(states):
        calls = {call: [rank for rank in waiting if waiting[rank].call == call] for call in _calls(waiting)}
        where = f"number {wait.number} of group {wait.group} ({name_ranks(list(wait.ranks))})"
        if len(calls) > 1:
            who = " and ".join(f"{call} on {name_ranks(ranks)}" for call, ranks in calls.items())
            causes.append(f"the ranks call different collectives as {where}: {who}")
            continue
        absent = [rank for rank in wait.ranks if rank in states and states[rank].called.get(wait.name, 0) < wait.number]
        seconds = max(each.seconds for each in waiting.values())
        sentence = f"{_wait(list(waiting))} since {seconds:.1f} s in {wait.call}, {where}"
        if absent:
            has = "have" if len(absent) > 1 else "has"
            sentence += f", which {name_ranks(absent)} {has} not called (rank {absent[0]}: {_doing(states[absent[0]])})"
        idle = any(not states[rank].waits for rank in absent)  # an absent rank that waits elsewhere is no cause
        (causes if idle else consequences).append(sentence)
    blocked: dict[str, list[int]] = {}
    for rank, state in states.items():
        if state.blocked and not state.waits:
            blocked.setdefault(state.blocked, []).append(rank)
    for call, ranks in blocked.items():
        seconds = max(states[rank].blocked_seconds for rank in ranks)
        consequences.append(
            f"{name_ranks(ranks)} {'wait' if len(ranks) > 1 else 'waits'} since {seconds:.1f} s in {call}"
        )
    return causes + consequences


def hang_report(states: Mapping[int, State], silent: Mapping[int, Silence], *, by: int, timeout: float) -> str:
    """Write the hang report: the verdict, a line for every rank, and the main threads' stacks, equal ones once."""
    lines = [
        f"hang report of {time.strftime('%Y-%m-%d %H:%M:%S %z')}, noticed by rank {by}, restart {restart_count()}, "
        f"parallel.timeout_seconds {timeout:g}",
        "",
        *verdict(states, silent),
        "",
    ]
    rows: list[tuple[str, ...]] = [("rank", "host", "pid", "step", "phase", "since", "waits in", "main thread at")]
    rows += [_row(rank, states.get(rank)) for rank in sorted({*states, *silent})]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    stacks: dict[tuple[str, ...], list[int]] = {}
    for rank, state in states.items():
        stacks.setdefault(state.stack, []).append(rank)
    for stack, ranks in stacks.items():
        lines += ["", f"main thread of {name_ranks(ranks)}, the innermost call last:", *(f"  {call}" for call in stack)]
    return "\n".join(lines) + "\n"


def _waiting(states: Mapping[int, State]) -> list[tuple[Collective, dict[int, Collective]]]:
    """The oldest wait of every rank, by group and number: a later one waits for the oldest."""
    found: dict[tuple, dict[int, Collective]] = {}
    for rank, state in states.items():
        for wait in state.waits[:1]:
            found.setdefault((wait.name, wait.ranks, wait.number), {})[rank] = wait
    return [(next(iter(waiting.values())), waiting) for waiting in found.values()]


def _calls(waiting: Mapping[int, Collective]) -> list[str]:
    return list(dict.fromkeys(wait.call for wait in waiting.values()))


def _wait(ranks: list[int]) -> str:
    return f"{name_ranks(ranks)} {'wait' if len(ranks) > 1 else 'waits'}"


def _doing(state: State) -> str:
    step = "" if state.step is None else f"step {state.step}, "
    return f"{step}{state.phase} since {state.phase_seconds:.1f} s, at {state.place}"


def _row(rank: int, state: State | None) -> tuple[str, ...]:
    if state is None:
        return (str(rank), "-", "-", "-", "no answer", "-", "-", "-")
    wait = state.waits[0] if state.waits else None
    where = f"{wait.call} {wait.number} of {wait.group}, {wait.seconds:.1f} s" if wait else state.blocked or "nothing"
    step = "-" if state.step is None else str(state.step)
    since = f"{state.phase_seconds:.1f} s"
    return (str(rank), state.host, str(state.pid), step, state.phase or "-", since, where, state.place)
