"""Lists what the files of a folder hold, for readers that make a document of every row of a table.

Every file is one recording; where a document lies in it is its extent there, so that the split may cut the file. A
document of a recording of its own is not cut.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from mmoe.errors import DataError
from mmoe.preparation.sources.base import Item, Refuse, Refused
from mmoe.preparation.sources.files import check_name, listing, pass_over
from mmoe.preparation.sources.tables import NO_COLUMN, find_tables, is_columnar, table_stem


class ListedDocument(NamedTuple):
    """Is a document of a file: its extent there, the call that makes its sample of key and recording, and the latter.

    The `recording` is None where it is the file's.
    """

    start: int
    stop: int
    make: partial
    recording: str | None = None


ListedDocuments = Iterator[ListedDocument]


def document_items(
    path: Path,
    wanted: str,
    rows: Callable[[Path, str], ListedDocuments],
    quarantine: Refuse,
    others: Callable[[Path], ListedDocuments | None] = lambda file: None,
    shown: tuple[str, ...] = (),
) -> Iterator[Item]:
    """List the documents of the file at `path`, or of every file under the folder that has any.

    `rows` lists those of a table, given also the stem of its keys, `others` those of any other file, None where it is
    not read; `wanted` says what is. Files with a suffix in `shown` are there for rows to name, and are not passed over:
    which of them a row names is known when its sample is made. Raises DataError where no table has the columns that
    are asked for, and nothing else is there.
    """
    found = [path] if path.is_file() else listing(path, quarantine)
    root = path.parent if path.is_file() else path
    tables = find_tables(found, root, quarantine)
    lacking: list[tuple[str, Refused]] = []
    unread, any_read = [], False
    for file in found:
        recording, stem = file.relative_to(root).as_posix(), table_stem(file, root)
        documents = rows(file, stem) if file in tables.tables else others(file)
        if documents is None:
            unread += [] if file in tables.described else [file]
            continue
        number, unit = -1, "rows" if is_columnar(file) else "bytes"
        try:
            check_name(recording, str(root))
            for number, (start, stop, make, own) in enumerate(documents):
                any_read = True
                key = f"{stem}-{number:06d}"
                if own is None:
                    yield Item(key, recording, partial(make, key, recording), start=start, stop=stop, unit=unit)
                else:
                    yield Item(key, own, partial(make, key, own), unit="samples")
        except Refused as refusal:
            if refusal.reason == NO_COLUMN:
                lacking.append((stem, refusal))
            else:
                quarantine(stem, refusal)
        except (DataError, OSError, pa.ArrowException) as error:
            message = (
                f"{file} cannot be read after document {number} ({error}); it is truncated or not what its name says: "
                "restore it or remove it"
            )
            quarantine(stem, Refused("unreadable file", message))
    pass_over((file for file in unread if file.suffix.lower() not in shown), root, wanted, quarantine)
    if lacking and not any_read:
        raise DataError(str(lacking[0][1]))
    for stem, why in lacking:
        quarantine(stem, why)
