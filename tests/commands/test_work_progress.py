"""Off a terminal a long work says at regular intervals how far it is, how fast, and how long it takes yet."""

import io
import time

import pytest

from mmoe.commands import work_progress as module
from mmoe.commands.console import Console


@pytest.fixture
def clock(monkeypatch):
    """Seconds of the lines' clock, which stands still until a test moves it."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module, "LINE_SECONDS", 0.001)
    return now


def console() -> Console:
    return Console(file=io.StringIO(), width=40)


def lines(voice: Console) -> list[str]:
    return voice.file.getvalue().splitlines()


def until(voice: Console, line: str) -> None:
    deadline = time.perf_counter() + 10
    while line not in lines(voice):
        assert time.perf_counter() < deadline, lines(voice)
        time.sleep(0.001)


def test_a_preparation_says_what_is_done_how_fast_and_how_long_it_takes_yet(clock):
    voice = console()
    with module.work_progress(voice, "preparing", 1000, 5000) as advance:
        clock[0] += 10
        until(voice, "preparing: 1,000 of 5,000 items  0.00 items/s  0:00:10 so far")  # though nothing has ended yet
        clock[0] += 10
        advance(600)
        advance(400)  # 1000 in 20 s, so the other 3000 in 60
        until(voice, "preparing: 2,000 of 5,000 items  50 items/s  0:00:20 so far  0:01:00 left")
        clock[0] += 20
        advance(3000)
    assert lines(voice)[-1] == "preparing: 5,000 of 5,000 items  100 items/s  0:00:40 so far"
    with module.work_progress(voice, "reading", 0, None) as advance:
        clock[0] += 4
        advance(10)
    assert lines(voice)[-1] == "reading: 10 items  2.50 items/s  0:00:04 so far"


def test_an_evaluation_says_the_same_of_each_measure_and_a_terminal_gets_no_lines(clock):
    voice = console()
    with module.evaluation_progress(voice, drawn=False) as draw:
        draw("tokens", 1, 4)
        clock[0] += 6
        draw("tokens", 3, 4)
        until(voice, "tokens: 3 of 4 batches  0.50 batches/s  0:00:06 so far  0:00:02 left")
        draw("tokens", 4, 4)
        draw("retrieval, clip", 2, 2)
    finished = [line for line in lines(voice) if ": 4 of 4 " in line or ": 2 of 2 " in line]
    assert [line.split(":")[0] for line in finished][-1] == "retrieval, clip"
    assert any(line.startswith("tokens: 4 of 4 batches") for line in finished)
    terminal = Console(file=io.StringIO(), force_terminal=True, width=60)
    with module.work_progress(terminal, "preparing", 0, 10) as advance:
        time.sleep(0.01)
        advance(10)
    assert "items/s" not in terminal.file.getvalue()
