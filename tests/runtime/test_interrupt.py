"""A signal is answered while the main thread is in one long call, and only this process's own."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

import psutil
import pytest

from mmoe.runtime.interrupt import answered
from tests.conftest import REPOSITORY

LONG = 400_000  # rounds, a tenth of a second and more in one call


def test_a_signal_is_answered_before_the_main_thread_comes_to_its_handler(monkeypatch):
    heard: list[str] = []
    monkeypatch.setattr("mmoe.runtime.interrupt.logger.warning", heard.append)
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("handler"))
    try:
        with answered(lambda: "outer"), answered(lambda: "stopping", lambda number: False):
            timer = threading.Timer(0.02, lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)])
            timer.start()
            while timer.is_alive():  # the call that the signals come in ends later than they are answered
                hashlib.pbkdf2_hmac("sha256", b"", b"", LONG)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard[0] == "stopping" and set(heard[1:]) == {"handler"}


def test_what_a_forked_child_is_sent_is_none_of_its_parents(monkeypatch):
    heard: list[str] = []
    monkeypatch.setattr("mmoe.runtime.interrupt.logger.warning", heard.append)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with answered(lambda: "stopping"):
            child = os.fork()
            if not child:
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(0)
            os.waitpid(child, 0)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == []


TWICE = """
import hashlib, os, signal, subprocess, sys, threading, time
from mmoe.runtime import interrupt

def twice():
    for _ in range(2):
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

interrupt.KILL_SECONDS = 0.1
signal.signal(signal.SIGINT, lambda *_: print("handler"))
kills, rounds = int(sys.argv[1]), int(sys.argv[2])
with interrupt.answered(lambda: "stopping", lambda number: bool(kills)):
    print(subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid, flush=True)
    threading.Thread(target=twice).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)
"""


@pytest.mark.parametrize("kills, rounds, code", [(1, 100 * LONG, 130), (0, 10 * LONG, 0)])
def test_a_second_one_in_the_same_call_kills_and_the_children_too(kills, rounds, code):
    """The handler hears of one of the two, when the call is over."""
    command = [sys.executable, "-c", TWICE, str(kills), str(rounds)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    child, *heard = done.stdout.split()
    assert done.returncode == code, done.stderr
    assert heard == ([] if kills else ["handler"]) and "stopping" in done.stderr
    left = psutil.pid_exists(int(child)) and psutil.Process(int(child)).status() != psutil.STATUS_ZOMBIE
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(child)).kill()
    assert left == (not kills)
