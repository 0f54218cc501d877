"""Make one request to a remote store through fsspec, for bytes or facts of an object, and say what an error means.

File systems of fsspec may run an event loop in a thread, which does not survive a fork. So they belong to the
`Remote` of one process, and `Storage` makes a new one where the process is another. What the client libraries
would retry on their own is switched off where they allow it, as the retries are counted here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem, sync

from mmoe.addresses import check_address
from mmoe.errors import DataError, MissingFileError
from mmoe.optional import require

_BACKENDS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
_VERSION_KEYS = (
    "ETag",
    "etag",
    "generation",
    "LastModified",
    "Last-Modified",
    "mtime",
    "updated",
    "modified",
    "created",
)
_PASSING_STATUSES = (408, 425, 429)
# Of several libraries, of which the one at hand need not be known: by name anywhere among the bases. A refused
# connection and a name that is not found are botocore's own ConnectionError, elsewhere an OSError: both may pass.
_PASSING = {
    "OSError",
    "TimeoutError",
    "ConnectionError",
    "HTTPClientError",
    "IncompleteReadError",
    "ClientError",
    "HttpError",
}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "GoogleAuthError"}


class StorageError(DataError):
    """Says what on the way to the data does not work: no answer, no access, no room. No sample is to blame."""


@dataclass(frozen=True)
class ObjectInfo:
    """Says which version of an object a remote store holds, and how large it is.

    `version` changes when the object does, as far as the store tells; `size` in bytes, None where it does not.
    """

    size: int | None
    version: str


class Remote:
    """Holds the file systems of this process, one for each kind of address. An attempt ends after `timeout_s`."""

    def __init__(self, timeout_s: float, connections: int) -> None:
        self.timeout_s, self.connections = timeout_s, connections
        self._systems: dict[str, fsspec.AbstractFileSystem] = {}

    def read(self, url: str, start: int | None, stop: int | None) -> bytes:
        """Read the bytes `start`..`stop` of an object, fewer where it ends before; all of it with None."""
        system, path = self._at(url)
        if isinstance(system, AsyncFileSystem):
            return sync(system.loop, system._cat_file, path, start=start, end=stop, timeout=self.timeout_s)
        return system.cat_file(path, start=start, end=stop)

    def info(self, url: str) -> ObjectInfo:
        """Ask for size and version of an object; raises what its library does, as for a missing one."""
        system, path = self._at(url)
        if system.protocol[0] in ("http", "https"):  # its own `info` calls every fault a missing file
            found = sync(system.loop, _head, system, path, timeout=self.timeout_s)
        elif isinstance(system, AsyncFileSystem):
            found = sync(system.loop, system._info, path, timeout=self.timeout_s)
        else:
            found = system.info(path)
        if found.get("type") == "directory":
            raise FileNotFoundError(url)
        version = [str(found[key]) for key in _VERSION_KEYS if found.get(key) is not None]
        return ObjectInfo(found["size"], "/".join([str(found["size"]), *version]))

    def _at(self, url: str) -> tuple[fsspec.AbstractFileSystem, str]:
        check_address(url)
        scheme, _, rest = url.partition("://")
        root = scheme if scheme in _BACKENDS else f"{scheme}://{rest.partition('/')[0]}"
        if root not in self._systems:
            self._systems[root] = self._open(scheme, url)
        return self._systems[root], self._systems[root]._strip_protocol(url)

    def _open(self, scheme: str, url: str) -> fsspec.AbstractFileSystem:
        if "::" in url or scheme not in fsspec.available_protocols():
            raise StorageError(
                f"{url} is not an address that can be read: give a folder, or s3://, gs://, https:// or another "
                "protocol of fsspec, alone (a chain with :: and a shell command are never opened)"
            )
        if scheme in _BACKENDS:
            require(_BACKENDS[scheme], url)
        options = self._options(scheme)
        # Not fsspec's shared instance: another part of the process may use it with settings of its own.
        try:
            system, _ = fsspec.core.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False, **options)
        except ImportError as error:
            raise StorageError(f"{url} needs a package that is not installed: {error}") from error
        if scheme in ("s3", "s3a"):
            system.retries = 1
        return system

    def _options(self, scheme: str) -> dict[str, Any]:
        """Lay what the config says over what fsspec's own configuration says of this kind of address."""
        aliases = next((names for names in (("s3", "s3a"), ("http", "https")) if scheme in names), (scheme,))
        given = {key: value for name in aliases for key, value in fsspec.config.conf.get(name, {}).items()}
        if scheme in ("s3", "s3a"):
            limits = {
                "connect_timeout": self.timeout_s,
                "read_timeout": self.timeout_s,
                "max_pool_connections": self.connections,
                "retries": {"total_max_attempts": 1},
            }
            return {"config_kwargs": given.get("config_kwargs", {}) | limits}
        if scheme in ("http", "https"):
            timeout = require("aiohttp", f"{scheme}://").ClientTimeout(total=self.timeout_s)
            return {"client_kwargs": given.get("client_kwargs", {}) | {"timeout": timeout}}
        return {}


async def _head(system: Any, url: str) -> dict[str, Any]:
    session = await system.set_session()
    async with session.head(system.encode_url(url), allow_redirects=True, **system.kwargs) as answer:
        answer.raise_for_status()
        size = answer.headers.get("Content-Length")
        return {"size": None if size is None else int(size)} | {k: answer.headers.get(k) for k in _VERSION_KEYS}


def refusal(url: str, error: Exception, lost: str = "") -> DataError | None:
    """Return what to raise for an error that no retry can cure, None where one may; `lost` ends its first clause."""
    names = {base.__name__ for base in type(error).__mro__}
    status = status_of(error)
    said = f"{type(error).__name__}: {error}".strip(": ")
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return MissingFileError(
            f"{url} does not exist{lost}; correct the address, or copy the prepared source there again"
        )
    if isinstance(error, PermissionError) or status in (401, 403) or str(error).startswith("Forbidden"):
        return StorageError(
            f"{url} may not be read ({said}); give credentials that may read it, or correct the address (many stores "
            "answer so for what does not exist)"
        )
    if "CERTIFICATE_VERIFY_FAILED" in said:
        return StorageError(
            f"{url} cannot be read: its server's certificate is not trusted ({said}); name the authority's certificate "
            "in SSL_CERT_FILE (s3: in AWS_CA_BUNDLE), or correct the address"
        )
    if names & _NO_CREDENTIALS:
        return StorageError(
            f"{url} cannot be read without credentials ({said}); set those of the store in the environment, as "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or say in fsspec's configuration that it is public"
        )
    if status is not None and 400 <= status < 500 and status not in _PASSING_STATUSES:
        return StorageError(
            f"{url} cannot be read: the store refuses the request ({said}); correct the address or the settings"
        )
    if names & _PASSING or status is not None:
        return None
    return StorageError(f"{url} cannot be read ({said}); correct the address or the settings of its file system")


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status behind an error, however the library wraps it."""
    readers: tuple[Callable[[Any], Any], ...] = (
        lambda e: e.response["ResponseMetadata"]["HTTPStatusCode"],  # botocore
        lambda e: e.status,  # aiohttp
        lambda e: e.code if type(e).__name__ == "HttpError" else None,  # gcsfs
    )
    while error is not None:
        for read in readers:
            try:
                return int(read(error))
            except (AttributeError, KeyError, TypeError, ValueError):
                pass
        error = error.__cause__
    return None
