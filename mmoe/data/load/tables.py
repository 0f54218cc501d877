"""Load arrays from ``.npy`` and ``.npz`` bytes, whose headers are checked before anything is allocated for them."""

import io
import math
import zipfile

import numpy as np

from mmoe.data.load.reading import reading
from mmoe.errors import DataError
from mmoe.schema.bounds import check_bound

_KINDS = "biufU"  # of numpy: numbers and text. Objects run code when they are read, and records are no table
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # as numpy writes them
_SUFFIX = ".npy"


def load_npy(data: bytes, where: str) -> np.ndarray:
    """Load an array of numbers or text from ``.npy`` bytes.

    Raises DataError for what is no whole ``.npy``, `Refused` beyond the bounds.
    """
    with reading("table", where, "write it with numpy.save, without objects"):
        stream = io.BytesIO(data)
        version = np.lib.format.read_magic(stream)
        if version not in _HEADERS:
            raise ValueError(f"version {version} of the format is not read")
        shape, columns_first, dtype = _HEADERS[version](stream)
        if dtype.names or dtype.kind not in _KINDS:
            raise ValueError(f"it holds {dtype}, neither numbers nor text")
        count = math.prod(shape)
        if any(side < 0 for side in shape) or len(shape) > 32:
            raise ValueError(f"a shape of {shape}")
        size = count * dtype.itemsize
        check_bound("array_bytes", size, where, "is a table of too many bytes")
        if stream.tell() + size > len(data):
            raise ValueError(f"its header states {size} bytes, {len(data) - stream.tell()} follow")
        table = np.frombuffer(data, dtype, count, stream.tell()) if size else np.zeros(count, dtype)
        return table.reshape(shape, order="F" if columns_first else "C").copy()


def load_array(data: bytes, where: str) -> np.ndarray:
    """Load a table of readings, float or integer [rows, dimensions], from ``.npy`` bytes.

    Refuses NaN and infinity, and what float32 cannot hold.
    """
    table = load_npy(data, where)
    if table.ndim != 2 or table.dtype.kind not in "fiu":
        raise DataError(
            f"{where} holds {table.dtype} of shape {list(table.shape)}; a table of readings is numeric with two axes, "
            "rows and dimensions"
        )
    wrong, fault = ~np.isfinite(table), ""
    if table.dtype.kind == "f" and table.dtype.itemsize > 4 and not wrong.any():
        wrong, fault = np.abs(table) > np.finfo(np.float32).max, ", beyond what float32 holds"
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise DataError(
            f"{where}: row {row}, column {column} is {table[row, column]} ({int(wrong.sum())} such values){fault}; "
            "drop or repair these readings before preparing"
        )
    return table


def load_npz(data: bytes, where: str, names: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
    """Load the arrays of an ``.npz`` by name, of `names` alone where given.

    Raises errors as `load_npy`, and for a missing name.
    """
    with (
        reading("set of tables", where, "write it with numpy.savez, without objects"),
        zipfile.ZipFile(io.BytesIO(data)) as archive,
    ):
        infos = {info.filename.removesuffix(_SUFFIX): info for info in archive.infolist()}
        if missing := [name for name in names or () if name not in infos]:
            raise ValueError(f"it has no {', '.join(missing)}, only {', '.join(infos) or 'nothing'}")
        chosen = {name: infos[name] for name in names or infos}
        check_bound("array_bytes", sum(i.file_size for i in chosen.values()), where, "unpacks to too many bytes")
        arrays = {}
        for name, info in chosen.items():
            if info.compress_type not in _PACKED:
                raise ValueError(f"{name} is packed by method {info.compress_type}, which numpy does not write")
            # No more than what is stated comes out, whatever the packed bytes hold; then the checksum is compared.
            arrays[name] = load_npy(archive.read(info), f"{where}: {name}")
        return arrays
