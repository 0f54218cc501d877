"""Addresses of files and folders, as a config or a command line gives them: never with a secret in them.

A config is copied into the run's folder and into checkpoints, and addresses stand in messages and logs: whoever reads
those would have the password too.
"""

import os
import re
from pathlib import Path

from mmoe.errors import DataError

_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):/+(?P<rest>[^\s'\"<>]*)")
_AUTHORITY = re.compile(r"[/?#]")
_NAMED_USERS = ("sftp", "ssh", "hdfs", "webhdfs", "ftp")  # for which a name alone is no secret
_SECRET = re.compile(r"sig$|signature|token|secret|passw|pwd|credential|accesskey|api.?key|auth", re.IGNORECASE)
_HIDDEN = "***"


def check_address(address: str) -> None:
    """Raises DataError, without printing it, for an address that holds a password, a token or a signature."""
    hidden = without_secrets(address)
    if hidden != address:
        raise DataError(
            f"{hidden} holds a secret (hidden here), and addresses are written into configs, checkpoints and logs; "
            "give the address alone, and the secret by the environment (as AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY) or in fsspec's configuration"
        )


def without_secrets(text: str) -> str:
    """Return the text with asterisks for what is secret in the addresses that occur in it."""
    return _ADDRESS.sub(_hide, text)


def _hide(found: re.Match) -> str:
    rest = found["rest"]
    if found["scheme"].lower() == "file":
        return found[0]
    authority = _AUTHORITY.split(rest)[0]
    if "@" not in authority and re.search(r":(?!\d*$)", authority) and "@" in rest:
        authority = rest[: rest.rindex("@") + 1]  # a password with a slash
    user, at, _ = authority.rpartition("@")
    if at and user != _HIDDEN and (":" in user or found["scheme"].lower() not in _NAMED_USERS):
        rest = _HIDDEN + rest[len(user) :]
    place, mark, query = rest.partition("?")
    if mark:
        rest = place + mark + re.sub(r"[^&;#]+", _hide_parameter, query)
    return found[0][: found.start("rest") - found.start()] + rest


def _hide_parameter(found: re.Match) -> str:
    name, equals, value = found[0].partition("=")
    return f"{name}={_HIDDEN}" if equals and value and _SECRET.search(name) else found[0]


def local_path(url: str | Path) -> str | None:
    """Return the path of a local address, None for a remote one. Raises DataError for a shell command."""
    text = os.fspath(url)
    if "://" not in text:
        if text.startswith("pipe:"):
            raise DataError(f"{text} is a shell command, and none is ever run; give a folder or a URL")
        return text
    return text.removeprefix("file://") if text.startswith("file://") else None


def is_missing(address: str) -> bool:
    """Return whether a local address names nothing. What is far away is never made: reading it says what it lacks."""
    path = local_path(address)
    return path is not None and not Path(path).exists()


def join_address(folder: str | Path, name: str) -> str:
    """Return the address of `name` in a local or remote folder."""
    return f"{os.fspath(folder).rstrip('/')}/{name}" if name else os.fspath(folder)


def with_suffix(url: str | Path, suffix: str) -> str:
    """Return the address of the file of the same stem with another suffix."""
    folder, slash, name = os.fspath(url).rpartition("/")
    return f"{folder}{slash}{name.rpartition('.')[0] or name}{suffix}"
