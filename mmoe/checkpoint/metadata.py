"""Reads torch's placement of tensors (`.metadata`) without running what is in it.

torch keeps it as a pickle, and a pickle may call anything. Here one may name the few classes that the placement is
made of, and none of them is made: the pickle fills inert records, and torch's own objects are built from them once
every field is of its type. A file of any other shape is refused.
"""

import io
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from mmoe.compat import storage_info
from mmoe.errors import CheckpointError

METADATA = "torch.distributed.checkpoint.metadata"
# No BytesStorageMetadata: torch reads what it places by an unrestricted pickle, and a checkpoint has tensors only.
ADMITTED = {
    (METADATA, "Metadata"),
    (METADATA, "TensorStorageMetadata"),
    (METADATA, "TensorProperties"),
    (METADATA, "ChunkStorageMetadata"),
    (METADATA, "MetadataIndex"),
    (METADATA, "StorageMeta"),
    (METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),  # where the checkpoint was written; not read
    ("pathlib._local", "PosixPath"),  # the same, of Python 3.13
}

# What a pickle of these takes. Others can make a file of a few bytes ask for any amount of memory.
OPCODES = (
    "PROTO FRAME STOP MARK GLOBAL STACK_GLOBAL NEWOBJ REDUCE BUILD MEMOIZE BINGET LONG_BINGET NONE NEWTRUE NEWFALSE "
    "BININT BININT1 BININT2 LONG1 SHORT_BINUNICODE BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND "
    "APPENDS EMPTY_DICT SETITEM SETITEMS"
)

T = TypeVar("T")


class CheckedReader(dcp.FileSystemReader):
    """Reads the checkpoint `folder` for torch, trusting none of its files and opening only those of its manifest.

    `files` are the manifest's, bytes by name. Tensors themselves torch reads with ``weights_only``. Raises
    CheckpointError for a placement that is not one.
    """

    def __init__(self, folder: Path, files: dict[str, int]) -> None:
        super().__init__(folder)
        self.folder, self.files = folder, files
        self._metadata: Metadata | None = None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return the placement of all ranks' tensors: this program writes one for all ranks, none for each."""
        if self._metadata is None:
            self._metadata = self._read()
        return self._metadata

    def _read(self) -> Metadata:
        path = self.folder / ".metadata"
        metadata = read_metadata(path, self.files)
        tensors = placed_tensors(metadata).values()
        stored = sum(tensor.size.numel() * tensor.properties.dtype.itemsize for tensor in tensors)
        if stored > sum(self.files.values()):
            raise _refused(path, f"its tensors would take {stored:,} bytes, more than its files have")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def read_metadata(path: Path, files: Collection[str]) -> Metadata:
    """Read the placement in the file `path`, of tensors that lie in `files` beside it.

    Raises CheckpointError where it is none, and OSError.
    """
    content = io.BytesIO(path.read_bytes())  # which reads no more than there is, whatever length it is asked for
    unpickler = _Unpickler(content, path)
    try:
        return _metadata(unpickler.load(), unpickler.kinds, files)
    except CheckpointError:
        raise
    except Exception as error:  # a pickle made to fail can fail in any way
        raise _refused(path, f"{type(error).__name__}: {error}") from error


class _Record:
    """One object of the pickle: what it was made from, and the fields that it was given."""

    args: tuple = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle._Unpickler):  # the one in Python, whose opcodes can be chosen
    dispatch: ClassVar[dict[int, Any]] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in OPCODES.split()
    }

    def __init__(self, file: io.BytesIO, path: Path) -> None:
        super().__init__(file)
        self.path = path
        # Classes of this file alone: a pickle can set attributes of a class, too.
        self.kinds = {name: type(name, (_Record,), {}) for _, name in ADMITTED}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ADMITTED:
            return self.kinds[name]
        if module == "torch" and isinstance(kind := getattr(torch, name, None), torch.dtype):
            return kind
        raise CheckpointError(
            f"{self.path} names {module}.{name}, which no checkpoint of mmoe holds and which may run code of its "
            "author; nothing of it was run: do not use this checkpoint, and get it anew from a source you trust"
        )


def _metadata(root: Any, kinds: dict[str, type], files: Collection[str]) -> Metadata:
    def fields(record: Any, kind: str) -> dict[str, Any]:
        return _is(_is(record, kinds[kind]).state, dict)

    def size(record: Any) -> torch.Size:
        (numbers,) = _is(_is(record, kinds["Size"]), _Record).args
        if any(_is(number, int) < 0 for number in numbers):
            raise ValueError(f"a size of {numbers}")
        return torch.Size(numbers)

    def tensor(record: Any) -> TensorStorageMetadata:
        found = fields(record, "TensorStorageMetadata")
        dtype = _is(_is(found["properties"], kinds["TensorProperties"]).state, tuple)[0]
        chunks = [fields(chunk, "ChunkStorageMetadata") for chunk in _is(found["chunks"], list)]
        return TensorStorageMetadata(
            properties=TensorProperties(dtype=_is(dtype, torch.dtype)),
            size=size(found["size"]),
            chunks=[ChunkStorageMetadata(size(chunk["offsets"]), size(chunk["sizes"])) for chunk in chunks],
        )

    def index(record: Any) -> MetadataIndex:
        found = fields(record, "MetadataIndex")
        offset, number = found.get("offset"), found.get("index")
        return MetadataIndex(
            _is(found["fqn"], str),
            None if offset is None else size(offset),
            None if number is None else _is(number, int),
        )

    def place(record: Any) -> Any:
        found = fields(record, "_StorageInfo")
        if found["relative_path"] not in files or found.get("transform_descriptors"):
            raise ValueError(f"a tensor in {found['relative_path']!r}, which is none of its files as mmoe writes them")
        offset, length = (_is(found[name], int) for name in ("offset", "length"))
        if offset < 0 or length < 0:
            raise ValueError(f"a tensor at byte {offset}")
        return storage_info(found["relative_path"], offset, length)

    found = fields(root, "Metadata")
    tensors = {_is(name, str): tensor(record) for name, record in _is(found["state_dict_metadata"], dict).items()}
    places = {index(key): place(record) for key, record in _is(found["storage_data"], dict).items()}
    return Metadata({**tensors}, planner_data={name: (name,) for name in tensors}, storage_data=places)


def placed_tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """Return the placement of every tensor by its name; `read_metadata` admits nothing else."""
    return {name: _is(tensor, TensorStorageMetadata) for name, tensor in metadata.state_dict_metadata.items()}


def _is(value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise TypeError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _refused(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is no placement of a checkpoint's tensors ({why}); get the checkpoint anew from where it was saved"
    )
