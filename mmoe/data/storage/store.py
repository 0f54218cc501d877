"""Read a prepared source's bytes, in this one place: manifests, shard indices and byte ranges of tars.

An address is a local path (or ``file://``), ``s3://``, ``gs://``, ``https://`` or whatever else fsspec knows. Local
files are read directly. A remote read may come from a bounded cache on the node's disk, is tried again where the
fault may pass, and ends in a sentence where it may not.
"""

import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import Field

from mmoe.addresses import local_path
from mmoe.config.base import Address, Config
from mmoe.config.nature import Nature
from mmoe.data.storage.cache import ByteCache
from mmoe.data.storage.remote import ObjectInfo, Remote, StorageError, refusal, status_of
from mmoe.errors import DataError, MmoeError
from mmoe.files import local_error, lost, read_file, truncated

T = TypeVar("T")
R = TypeVar("R")

_LONGEST_PAUSE_S = 30.0
_REQUEST_BYTES = 16 << 20  # a longer range is read as several requests at once
_KNOWN_OBJECTS = 4096  # whose size and version a process keeps in mind
_RANGE_NOT_SATISFIABLE = 416


class StorageConfig(Config):
    """Configures how remote shards are read; local files need none of it."""

    nature: ClassVar[Nature] = Nature.OPERATIONAL

    cache_folder: Address | None = None  # on a disk of the node, shared by its processes; null keeps nothing
    cache_bytes: int = Field(64 << 30, gt=0)  # what the cache may take; the longest unused goes first
    attempts: int = Field(8, gt=0)  # of one request, before the run stops
    timeout_s: float = Field(30.0, gt=0)  # of one attempt
    backoff_s: float = Field(0.5, ge=0)  # before the second attempt; doubles each time, up to 30 s, with jitter
    concurrency: int = Field(16, gt=0)  # requests that one process has in flight


@dataclass
class StorageStats:
    """Counts what a process has read from remote stores since it was asked last."""

    requests: int = 0  # attempts, failed ones too
    bytes: int = 0  # received
    retries: int = 0
    waited_s: float = 0.0  # between attempts
    cache_hits: int = 0
    cache_misses: int = 0
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, **counts: float) -> None:
        """Add to the counts of these names; threads may do so at once."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def take(self) -> dict[str, float]:
        """Return the counts so far; they begin again at zero."""
        names = [f.name for f in fields(self) if f.name != "_lock"]
        with self._lock:
            counts = {name: getattr(self, name) for name in names}
            for name in names:
                setattr(self, name, type(counts[name])())
        return counts


class Reading:
    """Stands for a range that is on its way; `result` waits for it and raises what went wrong."""

    def __init__(self, pieces: list[Future] | Callable[[], bytes]) -> None:
        self._pieces = pieces

    def result(self) -> bytes:
        """Wait for the bytes and return them."""
        if callable(self._pieces):
            return self._pieces()
        found = [piece.result() for piece in self._pieces]
        return found[0] if len(found) == 1 else b"".join(found)


class _Process:
    """Holds what must not be shared with a forked child: event loops, threads, locks."""

    def __init__(self, config: StorageConfig) -> None:
        self.remote = Remote(config.timeout_s, config.concurrency)
        self.pool = ThreadPoolExecutor(config.concurrency, thread_name_prefix="storage")
        self.cache = ByteCache(config.cache_folder, config.cache_bytes) if config.cache_folder else None
        self.known: OrderedDict[str, ObjectInfo] = OrderedDict()
        self.lock = threading.Lock()
        self.stats = StorageStats()
        self.random = random.Random()  # of the jitter: never one that the data's order depends on


class Storage:
    """Reads bytes by address. It may be pickled and survives a fork: every process opens its own connections."""

    def __init__(self, config: StorageConfig | None = None) -> None:
        self.config = config or StorageConfig()
        self._processes: dict[int, _Process] = {}  # the parent's stay: closing its connections here would disturb it

    def __reduce__(self) -> tuple:
        return Storage, (self.config,)

    @property
    def stats(self) -> StorageStats:
        """The counts of what this process has read: a worker's reads are counted in the worker."""
        return self._process().stats

    def read(self, url: str | Path, what: str = "") -> bytes:
        """Read all bytes of a file; `what` they are serves the messages.

        Raises DataError when it does not exist or may not be read, StorageError when the store gives no answer.
        """
        if local_path(url) is not None:
            return read_file(url, what)
        info = self._info(str(url), what)
        if info.size is None:
            return self._tried(str(url), what, lambda: self._process().remote.read(str(url), None, None))
        return self.read_range(url, 0, info.size, what)

    def read_range(self, url: str | Path, start: int, stop: int, what: str = "") -> bytes:
        """Read the bytes `start`..`stop` of a file; `what` they are serves the messages.

        Raises DataError when the file does not exist, may not be read or ends before; StorageError when the store
        gives no answer.
        """
        if local_path(url) is not None:
            return read_file(url, what, start, stop)
        if stop - start <= _REQUEST_BYTES:
            return self._range(str(url), start, stop, what)
        return self.begin(url, start, stop, what).result()

    def begin(self, url: str | Path, start: int, stop: int, what: str = "") -> Reading:
        """Begin to read a range without waiting, as `read_range`; a local file is read when its result is asked."""
        if local_path(url) is not None:
            return Reading(lambda: read_file(url, what, start, stop))
        cuts = [*range(start, stop, _REQUEST_BYTES), stop] if stop > start else [start, stop]
        pool = self._process().pool
        return Reading([pool.submit(self._range, str(url), a, b, what) for a, b in pairwise(cuts)])

    def size(self, url: str | Path) -> int | None:
        """Return the bytes of a file as it is now; None where a remote store does not say."""
        if (path := local_path(url)) is not None:
            try:
                return Path(path).stat().st_size
            except OSError as error:
                raise local_error(str(url), error, "") from error
        return self._info(str(url)).size

    def exists(self, url: str | Path) -> bool:
        """Return True if there is such a file.

        Raises StorageError where a remote store does not say.
        """
        if (path := local_path(url)) is not None:
            return os.path.exists(path)  # noqa: PTH110  # false, not an error, where it may not be looked at
        try:
            self._info(str(url))
        except StorageError:
            raise
        except DataError:
            return False
        return True

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Call `function` on every item in order, several at once: for reading many files far away."""
        items = list(items)
        with ThreadPoolExecutor(max(1, min(self.config.concurrency, len(items)))) as pool:
            return list(pool.map(function, items))

    def _process(self) -> _Process:
        pid = os.getpid()
        if (found := self._processes.get(pid)) is not None:
            return found
        return self._processes.setdefault(pid, _Process(self.config))  # of threads that come at once, the first wins

    def _info(self, url: str, what: str = "") -> ObjectInfo:
        """Asks the store; what it says is kept in mind as the version that cached ranges must have."""
        process = self._process()
        info = self._tried(url, what, lambda: process.remote.info(url))
        with process.lock:
            process.known[url] = info
            if len(process.known) > _KNOWN_OBJECTS:
                process.known.popitem(last=False)
        return info

    def _range(self, url: str, start: int, stop: int, what: str) -> bytes:
        process = self._process()
        if process.cache is None:
            return self._fetch(url, start, stop, what)
        with process.lock:
            info = process.known.get(url)
        key = f"{url}\n{(info or self._info(url, what)).version}\n{start}\n{stop}"
        if (content := process.cache.get(key)) is not None:
            process.stats.add(cache_hits=1)
            return content
        content = self._fetch(url, start, stop, what)
        process.stats.add(cache_misses=1)
        try:
            process.cache.put(key, content)
        except OSError as error:
            raise StorageError(
                f"data.storage.cache_folder {self.config.cache_folder} cannot be written ({error}); make room, lower "
                "data.storage.cache_bytes, or name another folder"
            ) from error
        return content

    def _fetch(self, url: str, start: int, stop: int, what: str) -> bytes:
        process = self._process()

        def attempt() -> bytes:
            try:
                content = process.remote.read(url, start, stop) if stop > start else b""
            except Exception as error:
                if status_of(error) != _RANGE_NOT_SATISFIABLE:
                    raise
                content = b""
            process.stats.add(bytes=len(content))
            if len(content) > stop - start:
                raise StorageError(
                    f"{url}: asked for {stop - start} bytes, the server sends {len(content)}: it does not support "
                    "range requests; serve the shards from one that does"
                )
            if len(content) < stop - start:
                size = process.remote.info(url).size  # an object that ends there, or an answer that was cut?
                if size is not None and size < stop:
                    raise truncated(url, stop, what)
                raise ConnectionError(f"only {len(content)} of {stop - start} bytes came")
            return content

        return self._tried(url, f"{what or 'what is asked for'} (bytes {start} to {stop})", attempt)

    def _tried(self, url: str, what: str, call: Callable[[], R]) -> R:
        """`call`, again after a pause while its fault may pass."""
        process, config, began = self._process(), self.config, time.monotonic()
        for attempt in range(1, config.attempts + 1):
            process.stats.add(requests=1)
            try:
                return call()
            except MmoeError:
                raise
            except Exception as error:
                if (refused := refusal(url, error, lost(what))) is not None:
                    raise refused from error
                failed = error
            if attempt < config.attempts:
                pause = min(_LONGEST_PAUSE_S, config.backoff_s * 2 ** (attempt - 1)) * process.random.uniform(0.5, 1)
                process.stats.add(retries=1, waited_s=pause)
                time.sleep(pause)
        said = f"{type(failed).__name__}: {failed}".strip(": ")
        raise StorageError(
            f"{url} could not be read in {config.attempts} attempts over {time.monotonic() - began:.1f} s"
            f"{lost(what)}; the last one ended with {said}; check the network and the request "
            "limits of the store, or raise data.storage.attempts or data.storage.timeout_s"
        ) from failed


DEFAULT_STORAGE = Storage()
