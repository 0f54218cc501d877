"""A signal is answered while the main thread is in one long call, and only this process's own."""

import hashlib
import os
import signal
import threading

from mmoe.runtime.interrupt import answered

LONG = 400_000  # rounds, a tenth of a second and more in one call


def test_a_signal_is_answered_before_the_main_thread_comes_to_its_handler(monkeypatch):
    heard: list[str] = []
    monkeypatch.setattr("mmoe.runtime.interrupt.logger.warning", heard.append)
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("handler"))
    try:
        with answered(lambda: "outer"), answered(lambda: "stopping"):
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
