"""Files that are whole or not there: written aside, made durable, and renamed into place."""

import os
from pathlib import Path
from uuid import uuid4


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Write a file so that a crash leaves the old content or the new one, never a part of it.

    A string is written as UTF-8. Raises OSError, and then the file is as it was.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with aside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
