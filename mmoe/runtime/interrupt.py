"""Answers Ctrl-C and SIGTERM at once, and says by which code a process ends that one of them has ended."""

import logging
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mmoe.runtime.processes import end_process

logger = logging.getLogger(__name__)

BY_SIGNAL = 128  # a process that a signal has ended, saved or not, ends with this and the signal's number, as in shells
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
KILL_SECONDS = 2.0  # that the main thread has to end by the second signal


class Interrupted(SystemExit):
    """Ends a command that a signal has interrupted, saved and said: nothing is to be printed of it."""

    def __init__(self, number: int) -> None:
        super().__init__(BY_SIGNAL + number)


_sockets: set[int] = set()  # of this process, that signals are written to


@contextmanager
def answered(sentence: Callable[[], str], kills: Callable[[int], bool] = lambda number: True) -> Iterator[None]:
    """Log `sentence` as a warning at the first Ctrl-C or SIGTERM that Python handles; the rest is left to its handler.

    A second signal of the same number, where it `kills`, ends the process if the main thread has not left the context
    `KILL_SECONDS` later: of two signals in one long call its handler hears once.

    A handler runs between two steps of the main thread, which may be in one long call: a backward pass, an exchange.
    The number of a signal is written to a socket at once, and a thread of its own, which waits for it, says the
    sentence. Enter it in the main thread; where contexts lie in one another, the inner one answers.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    _sockets.add(sender.fileno())
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_answer, args=(receiver, sentence, kills), name="interrupt", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        _sockets.discard(sender.fileno())
        sender.shutdown(socket.SHUT_RDWR)  # `close` alone would leave it open in forked children
        sender.close()
        thread.join()
        receiver.close()


def _answer(receiver: socket.socket, sentence: Callable[[], str], kills: Callable[[int], bool]) -> None:
    heard = Counter[int]()
    ends: list[threading.Timer] = []
    while number := receiver.recv(1):
        if number[0] not in INTERRUPTS:
            continue
        heard.update(number)
        if heard.total() == 1:
            logger.warning(sentence())
        elif heard[number[0]] > 1 and not ends and kills(number[0]):
            ends.append(threading.Timer(KILL_SECONDS, end_process, [BY_SIGNAL + number[0]]))
            ends[0].daemon = True
            ends[0].start()
    for timer in ends:
        timer.cancel()


def _leave_parent_alone() -> None:
    """A forked child has handlers and socket of its parent, who is not to answer the child's signals."""
    before = signal.set_wakeup_fd(-1)
    if before not in _sockets:
        signal.set_wakeup_fd(before)


os.register_at_fork(after_in_child=_leave_parent_alone)
