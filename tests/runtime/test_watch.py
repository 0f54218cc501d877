"""A rank that hangs, is stuck, or has lost torchrun: who says so, and that nobody is left behind."""

import os
import signal
import time
from dataclasses import replace

from mmoe.runtime.watch_report import hang_report, verdict
from mmoe.runtime.watch_state import Collective, State
from tests.runtime.test_launch import Torchrun


def test_a_hang_is_reported_with_the_collective_and_the_ranks_that_are_missing(tmp_path):
    run = Torchrun(
        tmp_path,
        """
        import ctypes, subprocess
        group = dist.new_group([0, 1], group_desc="mesh_tp")
        (Path("pid") / str(subprocess.Popen(["sleep", "100"]).pid)).touch()  # a child of each rank
        with StepWatchdog(timeout, folder) as watch:
            for step in range(1, 6):
                watch.beat(step, "forward")
                strongest(0)
                if step == 3 and rank == 1:
                    watch.beat(step, "data")
                    time.sleep(100)
                if step == 3 and rank == 2:
                    time.sleep(0.5)  # a heartbeat of this step
                    ctypes.PyDLL(None).sleep(100)  # with Python's lock held: not even its watcher runs
                if rank < 2:
                    dist.barrier(group)
        """,
        ranks=3,
    )
    started = time.monotonic()
    assert run.wait() != 0
    assert time.monotonic() - started < 40
    text = (run.run / "hang-report.txt").read_text()
    assert "rank 2 gives no answer: its last heartbeat is " in text and "step 3, forward): killed, stopped" in text
    assert "rank 0 waits since " in text
    waits = "in gloo:barrier, number 3 of group mesh_tp (ranks 0-1), which rank 1 has not called (rank 1: step 3, data"
    assert waits in text
    assert "__main__:" in text.split("main thread of rank 1")[1]
    errors = run.errors()
    assert "mesh_tp" in errors[0]["message"] and errors[0]["step"] == 3
    assert "hang-report.txt" in run.output.split("Root Cause")[1]


def test_a_rank_that_does_not_end_after_the_failure_of_another_is_ended(tmp_path):
    run = Torchrun(
        tmp_path,
        """
        signal.signal(signal.SIGTERM, lambda *_: None)  # as the training loop, which wants to end its step first
        with StepWatchdog(timeout, folder) as watch:
            watch.beat(1, "forward")
            if rank == 1:
                raise ValueError("broken")
            time.sleep(100)
        """,
    )
    started = time.monotonic()
    assert run.wait() != 0
    assert time.monotonic() - started < 25  # torchrun alone would wait 30 s
    assert run.errors()[0]["error"] == "StoppedError"
    assert run.errors()[0]["after"] == "rank 1 failed: ValueError: broken"


def test_an_error_that_was_handled_ends_no_later_training_of_the_processes(tmp_path):
    """The store outlives a watch: what is in it of an earlier one is of the past."""
    run = Torchrun(
        tmp_path,
        """
        for round in range(2):
            with suppress(ValueError), StepWatchdog(2, folder) as watch:
                watch.beat(1, "forward")
                if round == 0:
                    raise ValueError("handled")
                for _ in range(8):  # longer than a failed rank is waited for
                    time.sleep(0.5)
                    watch.beat(1, "data")
        """,
    )
    assert run.wait() == 0
    assert not (tmp_path / "run" / "errors.jsonl").exists()


def test_a_failure_outside_a_watch_ends_those_that_are_inside(tmp_path):
    run = Torchrun(
        tmp_path,
        """
        signal.signal(signal.SIGTERM, lambda *_: None)
        if rank == 1:
            raise ValueError("broken")
        with StepWatchdog(timeout, folder) as watch:
            watch.beat(1, "forward")
            time.sleep(100)
        """,
    )
    assert run.wait() != 0
    assert run.errors()[0]["after"] == "rank 1 failed: ValueError: broken"


def test_no_process_outlives_torchrun(tmp_path):
    run = Torchrun(
        tmp_path,
        """
        with StepWatchdog(timeout, folder) as watch:
            Path(f"started-{rank}").touch()
            time.sleep(100)
        """,
    )
    run.wait_for("started-0"), run.wait_for("started-1")
    run.process.send_signal(signal.SIGKILL)
    run.process.wait()
    deadline = time.monotonic() + 20
    while run.alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not run.alive()
    assert all("is gone" in line["message"] for line in run.errors().values()) and len(run.errors()) == 2


def state(rank: int, *waits: Collective, called: dict[str, int], blocked: str = "") -> State:
    common = {"host": "a", "pid": os.getpid(), "step": 7, "phase": "backward", "phase_seconds": 9.0}
    at = {"blocked": blocked, "blocked_seconds": 9.0, "place": "mmoe.x:1 f", "stack": ("mmoe.x:1 f",)}
    return State(rank=rank, **common, waits=waits, called=called, **at)


TP = Collective(call="gloo:all_reduce", group="mesh_tp", name="1", ranks=(0, 1), number=4, seconds=8.0)
DP = Collective(call="gloo:all_gather", group="mesh_dp", name="2", ranks=(1, 2), number=6, seconds=8.5)


def test_the_cause_stands_before_what_follows_from_it():
    states = {
        0: state(0, TP, called={"1": 4}),
        1: state(1, DP, called={"1": 3, "2": 6}),
        2: state(2, called={"2": 5}),
    }
    cause, consequence = verdict(states, {})
    assert cause == (
        "rank 1 waits since 8.5 s in gloo:all_gather, number 6 of group mesh_dp (ranks 1-2), "
        "which rank 2 has not called (rank 2: step 7, backward since 9.0 s, at mmoe.x:1 f)"
    )
    assert (
        consequence.startswith("rank 0 waits since 8.0 s in gloo:all_reduce") and "rank 1 has not called" in consequence
    )


def test_different_calls_under_one_number_are_named():
    other = replace(TP, call="gloo:broadcast")
    (sentence,) = verdict({0: state(0, TP, called={"1": 4}), 1: state(1, other, called={"1": 4})}, {})
    assert sentence.endswith("(ranks 0-1): gloo:all_reduce on rank 0 and gloo:broadcast on rank 1")


def test_a_report_has_every_rank_and_equal_stacks_once():
    states = {rank: state(rank, called={}, blocked="distributed.recv(src=3)") for rank in range(3)}
    text = hang_report(states, {3: "it has never sent a heartbeat"}, by=0, timeout=5)
    assert "rank 3 gives no answer: it has never sent a heartbeat" in text
    assert "ranks 0-2 wait since 9.0 s in distributed.recv(src=3)" in text
    assert text.count("innermost call last") == 1 and "main thread of ranks 0-2" in text
    assert [line.split()[0] for line in text.splitlines() if line[:1].isdigit()] == ["0", "1", "2", "3"]


def test_a_state_survives_its_journey():
    sent = state(0, TP, called={"1": 4})
    assert State.from_json(sent.to_json()) == sent
