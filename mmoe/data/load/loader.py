"""Decode batches ahead in worker processes, and deliver them in the order of their plans whoever dies on the way.

torch's own loader ends with its first dead worker, at any line of the training process, and shares one queue whose
lock a killed worker may take with it. Here a worker has a connection of its own: when it dies, what it had not
delivered is decoded again by another, and the sample that it had in hand is handed to the dataset as known to be bad.
"""

import atexit
import logging
import os
import pickle
import queue
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing import connection
from typing import Any, Protocol

import torch
import torch.multiprocessing as mp  # teaches connections to hand over tensors in shared memory

from mmoe.data.load.workers import Activity, SamplePlace, WorkerError, WorkerWatchdog, become_worker

logger = logging.getLogger(__name__)

_TO_ALL = (signal.SIGINT, signal.SIGTERM)  # sent to all processes: the training one ends its step first
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGBUS)  # no memory, no room in /dev/shm: perhaps not the sample's doing
_MOST_UNEXPLAINED = 8  # deaths of a run's workers that name no sample
_BEGUN = -1  # a worker's first answer, in the place of a plan's number
_LOOK_S = 5.0  # between two looks whether the other side lives
# A process has this long from its start to its first line. A fork takes locks along as they are at that moment: one
# that a thread of the training process holds is never released in the child (Python's own, before 3.12, among them).
_BEGIN_S = 60.0
_MOST_STARTS = 3  # of one worker that may hang
# Workers hold the dataset as it is when they are forked; from Python 3.14 on another way would be the default.
_CONTEXT = mp.get_context("fork")


class Batches(Protocol):
    """Makes the batch of a plan; a sample that stands in `known_bad` is left undecoded, for the reason given."""

    known_bad: dict[SamplePlace, str]

    def __getitem__(self, plan: Any) -> Any: ...


class RemoteTraceback(Exception):  # noqa: N818  # as multiprocessing calls its own, which says it better
    """Says where a worker met the error that this is the cause of."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def batches(
    dataset: Batches,
    plans: Iterable[Any],
    *,
    workers: int,
    prefetch: int,
    activity: Activity,
    watchdog_seconds: float,
    condemn: Callable[[SamplePlace, str], None],
) -> Iterator[Any]:
    """Yield ``dataset[plan]`` of every plan, in order, decoded ahead by `workers` processes (0: in this one).

    `condemn` is told of a sample whose decoding ended a worker, and how; it puts it into ``dataset.known_bad``, or
    raises. Raises WorkerError, naming what the workers were doing, where a death cannot be laid to a sample.
    """
    watchdog = WorkerWatchdog(watchdog_seconds, activity)
    try:
        if not workers:
            for plan in plans:
                with watchdog.waiting():
                    batch = dataset[plan]
                yield batch
            return
        pool = _Pool(dataset, workers, activity, condemn)
        try:
            yield from _in_order(pool, plans, workers * prefetch, watchdog)
        finally:
            pool.close()
    finally:
        watchdog.close()


def _in_order(pool: "_Pool", plans: Iterable[Any], ahead: int, watchdog: WorkerWatchdog) -> Iterator[Any]:
    coming, given, taken, more = iter(plans), 0, 0, True
    while True:
        while more and given - taken < ahead:
            try:
                plan = next(coming)
            except StopIteration:
                more = False
                break
            pool.give(given, plan)
            given += 1
        if taken == given:
            return
        with watchdog.waiting():
            batch = pool.take(taken)
        taken += 1
        yield batch


class _Worker:
    """One decoding process, its end of the connection, and the plans by number that it has not answered.

    It is sent them once it has begun: to one that hangs in its start, the sending itself might never end.
    """

    def __init__(self, number: int, dataset: Batches) -> None:
        self.number = number
        self.connection, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(
            target=_work, args=(dataset, number, theirs, os.getpid()), name=f"decoder {number}", daemon=True
        )
        # A signal that comes before the worker ignores it waits until then.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _TO_ALL)
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.started, self.begun = time.monotonic(), False
        theirs.close()
        self.plans: dict[int, Any] = {}

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class _Pool:
    def __init__(
        self, dataset: Batches, workers: int, activity: Activity, condemn: Callable[[SamplePlace, str], None]
    ) -> None:
        self.dataset, self.activity, self.condemn = dataset, activity, condemn
        self._done: dict[int, Any] = {}
        self._suspected: set[SamplePlace] = set()  # in hand when a worker was ended from outside, once
        self._unexplained: Counter[int] = Counter()  # deaths that name no sample, by number of the plan
        self._never_began: Counter[int] = Counter()  # starts that hung, by number of the worker
        self._workers: list[_Worker] = []
        self._process = os.getpid()
        atexit.register(self.close)  # before multiprocessing waits for what it only asks to end
        for number in range(workers):
            activity.clear(number)
            self._workers.append(_Worker(number, dataset))

    def close(self) -> None:
        atexit.unregister(self.close)
        for worker in self._workers if os.getpid() == self._process else ():  # not in a forked child
            worker.end()
        self._workers = []

    def give(self, number: int, plan: Any) -> None:
        """Hand plan `number` to the worker with the fewest."""
        worker = min(self._workers, key=lambda w: len(w.plans))
        worker.plans[number] = plan
        if worker.begun:
            self._send(worker, number, plan)

    def take(self, number: int) -> Any:
        """The answer to plan `number`; raises what its decoding raised."""
        while number not in self._done:
            waited = [end for worker in self._workers for end in (worker.connection, worker.process.sentinel)]
            ready = connection.wait(waited, _LOOK_S)
            for worker in list(self._workers):
                if worker.connection in ready:
                    self._receive(worker)
                elif worker.process.sentinel in ready:
                    self._bury(worker)
                elif not worker.begun and time.monotonic() - worker.started > _BEGIN_S:
                    self._begin_again(worker)
        answer = self._done.pop(number)
        if isinstance(answer, _Failure):
            answer.throw()
        return answer

    def _send(self, worker: _Worker, number: int, plan: Any) -> None:
        with suppress(OSError):  # it is dead, which `take` finds: what it was given goes to the next
            worker.connection.send((number, plan, self.dataset.known_bad))

    def _receive(self, worker: _Worker) -> None:
        """The answers that have come from a worker; buries it if it is dead."""
        try:
            self._drain(worker)
        except Exception:
            # The end of the connection, or a tensor that only a living process hands over.
            worker.process.join(timeout=_LOOK_S)
            if worker.process.exitcode is None:
                raise
            self._bury(worker)

    def _drain(self, worker: _Worker) -> None:
        while worker.connection.poll():
            number, answer = worker.connection.recv()
            if number == _BEGUN:
                worker.begun = True
                for waiting, plan in worker.plans.items():
                    self._send(worker, waiting, plan)
            else:
                self._done[number] = answer
                del worker.plans[number]

    def _bury(self, worker: _Worker) -> None:
        """Find out what a dead worker died of, and give what it left undone to another in its place."""
        worker.process.join()
        with suppress(Exception):  # what did not come whole is decoded again
            self._drain(worker)
        code = worker.process.exitcode
        assert code is not None  # it has ended
        how, place = _ending(code), self.activity.place(worker.number)
        doing = self.activity.text(worker.number) or "nothing yet"
        lines = self.activity.lines()
        worker.connection.close()
        logger.warning(f"decoding worker {worker.number} ended by itself ({how}): {doing}")
        if place is not None and (-code not in _FROM_OUTSIDE or place in self._suspected):
            self.condemn(place, how)
        elif worker.plans or place is not None:
            if place is not None:
                self._suspected.add(place)
            else:
                self._unexplained[min(worker.plans)] += 1
            deaths = len(self._suspected) + self._unexplained.total()
            if max(self._unexplained.values(), default=0) > 1 or deaths > _MOST_UNEXPLAINED:
                raise WorkerError(
                    f"a decoding process ended by itself ({how}), the {deaths}. time that no sample can be named for; "
                    "it was killed (often for memory: lower data.workers or data.prefetch, or give /dev/shm more room) "
                    f"or crashed in a decoder. {'; '.join(lines)}"
                )
        self._replace(worker)

    def _begin_again(self, worker: _Worker) -> None:
        """Start another process for one that hangs in its start."""
        self._never_began[worker.number] += 1
        if (starts := self._never_began[worker.number]) > _MOST_STARTS:
            raise WorkerError(
                f"decoding worker {worker.number} did not begin within {_BEGIN_S:g} s of any of {starts} starts; set "
                "data.workers=0 to decode in the training process, or find what keeps it from starting"
            )
        logger.warning(f"decoding worker {worker.number} did not begin within {_BEGIN_S:g} s: another is started")
        worker.end()
        self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        """Start another process, which is given what an ended one left undone."""
        self.activity.clear(worker.number)
        another = _Worker(worker.number, self.dataset)
        another.plans = worker.plans
        self._workers[worker.number] = another


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
    return f"killed by signal {-code}, {name}"


class _Failure:
    """An exception on its way to the training process."""

    def __init__(self, error: Exception) -> None:
        self.said = traceback.format_exc()
        try:
            self.error = pickle.loads(pickle.dumps(error))
        except Exception:  # some libraries' errors cannot be made again from what they hold
            self.error = RuntimeError(f"{type(error).__name__}: {error}")

    def throw(self) -> None:
        raise self.error from RemoteTraceback(self.said)


def _work(dataset: Batches, number: int, line: connection.Connection, parent: int) -> None:
    """A worker's life: plans come and answers go in threads of their own, so that neither side waits for the other."""
    for ignored in _TO_ALL:
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TO_ALL)
    torch.set_num_threads(1)
    become_worker(number)
    line.send((_BEGUN, None))
    inbox: queue.SimpleQueue = queue.SimpleQueue()
    outbox: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_read_plans, args=(line, inbox, parent), daemon=True).start()
    threading.Thread(target=_send_answers, args=(line, outbox), daemon=True).start()
    while True:
        task, plan, dataset.known_bad = inbox.get()
        try:
            answer = dataset[plan]
        except Exception as error:
            answer = _Failure(error)
        outbox.put((task, answer))


def _read_plans(line: connection.Connection, inbox: queue.SimpleQueue, parent: int) -> None:
    while os.getppid() == parent:
        try:
            if line.poll(_LOOK_S):
                inbox.put(line.recv())
        except (EOFError, OSError):
            break
    os._exit(0)  # the training process is gone


def _send_answers(line: connection.Connection, outbox: queue.SimpleQueue) -> None:
    while True:
        task, answer = outbox.get()
        try:
            line.send((task, answer))
        except OSError:
            os._exit(0)
        except Exception as error:
            line.send((task, _Failure(error)))
