"""Allows one training at a time in a run's folder, by `RUN/lock`, held by the first process.

The kernel holds the lock (`flock`) as long as the process lives, so that nothing is left behind by one that was
killed. Some file systems that machines share do not carry it from one to the other: there the holder's heartbeat, the
file's time, tells a living one from what a dead one has left.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mmoe.errors import ConfigError
from mmoe.files import writes
from mmoe.runtime.launch import rank_zero_first

logger = logging.getLogger(__name__)

LOCK = "lock"
BEAT_SECONDS = 5.0
SILENT_SECONDS = 30.0  # without a heartbeat, until the holder on another machine counts as dead
CHILD_SECONDS = 10.0  # that what a killed process has started may need to notice it


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of the run's `folder`, which is made where it is missing.

    All ranks enter, and the first one holds it. Raises ConfigError naming host and process where another training holds
    it, OutputError where it cannot be written.
    """
    lock = _Lock(folder / LOCK)
    made = not folder.exists()
    try:
        rank_zero_first(lock.acquire)
        yield
    finally:
        if lock.release() and made:
            with suppress(OSError):  # it is not empty: the run has begun
                folder.rmdir()


class _Lock:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._ended = threading.Event()

    def acquire(self) -> None:
        with writes(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with writes(self.path):
            descriptor = self._open()
        try:
            holder = _read(descriptor)
            if holder and holder.get("boot") != _boot() and self._beats(holder):
                raise self._held(holder)
            with writes(self.path):
                self._write(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        os.register_at_fork(after_in_child=self._forget)  # a decoding process must not hold what its parent held
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def release(self) -> bool:
        """Release the lock, and return whether it was held here."""
        if self._descriptor is None:
            return False
        self._ended.set()
        self.path.unlink(
            missing_ok=True
        )  # while it is held: who waits for it finds that it is gone, and makes a new one
        self._forget()
        return True

    def _open(self) -> int:
        """The file, locked where its file system can."""
        deadline = time.monotonic() + CHILD_SECONDS
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _read(descriptor)
                os.close(descriptor)
                if _lives(holder) or time.monotonic() > deadline:
                    raise self._held(holder) from None
                time.sleep(0.1)
                continue
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    os.close(descriptor)
                    raise
            with suppress(FileNotFoundError):
                if os.path.sameopenfile(descriptor, again := os.open(self.path, os.O_RDONLY)):
                    os.close(again)
                    return descriptor
                os.close(again)
            os.close(descriptor)  # its holder has just ended and taken the name away

    def _beats(self, holder: dict[str, Any]) -> bool:
        """Whether the holder, on a machine that no lock reaches from here, gives a sign of life while this waits."""
        logger.info(
            f"{self.path} is of process {holder.get('pid')} on {holder.get('host')}: waiting {SILENT_SECONDS:.0f} s to "
            "see whether it still trains"
        )
        before, deadline = _time(self.path), time.monotonic() + SILENT_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1.0, SILENT_SECONDS / 10))
            if _time(self.path) != before:
                return True
        return False

    def _held(self, holder: dict[str, Any]) -> ConfigError:
        return ConfigError(
            f"{self.path.parent} is being trained by process {holder.get('pid', '(unknown)')} on "
            f"{holder.get('host', '(unknown)')} since {holder.get('since', '(unknown)')}; wait for it, stop it, or set "
            f"another training.run (if that machine is gone, delete {self.path})"
        )

    def _write(self, descriptor: int) -> None:
        since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "boot": _boot()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(OSError):  # a sign of life that fails once comes again
                os.utime(self.path)

    def _forget(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _read(descriptor: int) -> dict[str, Any]:
    """What the holder wrote; empty where it has not (yet)."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except (ValueError, OSError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _lives(holder: dict[str, Any]) -> bool:
    """Whether the process that wrote `holder` is there; one of another machine counts as there."""
    pid = holder.get("pid")
    if holder.get("boot") != _boot() or not isinstance(pid, int) or pid <= 0:
        return bool(holder)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _time(path: Path) -> int:
    """When the file was last written, asked of its server: opening it sees past what this machine remembers."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns
    return 0


def _boot() -> str:
    """This machine since it was started: equal for all processes that a lock of its kernel reaches."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return socket.gethostname()
