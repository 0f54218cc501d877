"""Tables of somebody else's making: right where they are right, and never larger in memory than they may be."""

import io
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe.data.load.tables import load_array, load_npy, load_npz
from mmoe.errors import DataError, Refused
from mmoe.schema.bounds import Bounds, bounded_by
from tests.data.recordings import npy


def header(text, body=b""):
    text = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


def npz(packed=zipfile.ZIP_DEFLATED, **arrays):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packed) as archive:
        for name, table in arrays.items():
            archive.writestr(f"{name}.npy", table if isinstance(table, bytes) else npy(table))
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<i2", "|u1", "<U5", "|b1"])
@pytest.mark.parametrize("shape", [(), (0, 3), (4,), (3, 2), (2, 3, 2)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_tables_are_those_that_numpy_reads(dtype, shape, order):
    table = np.arange(max(1, int(np.prod(shape)))).astype(dtype)[: int(np.prod(shape))].reshape(shape)
    data = npy(np.asarray(table, order=order))
    theirs = np.load(io.BytesIO(data))
    ours = load_npy(data, "x")
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and (ours == theirs).all() and ours.flags.writeable


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "magic string"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }"), "too many bytes"),
        (
            header("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 4), }", bytes(60)),
            "64 bytes, 60 follow",
        ),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (-4, -4), }", bytes(64)), "shape"),
        (
            header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"cos\nsystem\n"),
            "neither numbers nor text",
        ),
        (header("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }", bytes(4)), "neither numbers"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), ", bytes(4)), "x.npy cannot be read"),
        (header("(" * 5000, bytes(4)), "x.npy cannot be read"),
        (b"\x93NUMPY\x09\x00" + bytes(100), r"version \(9, 0\)"),
    ],
)
def test_a_header_that_holds_nowhere_is_refused_before_anything_is_allocated(data, said):
    with pytest.raises(DataError, match=said):
        load_npy(data, "x.npy")


def test_packed_tables_are_read_by_name_and_bounded_by_what_they_unpack_to():
    bomb = npz(zeros=np.zeros(1 << 20), small=np.arange(3))
    assert len(bomb) < 20_000 and load_npz(bomb, "x", ("small",))["small"].tolist() == [0, 1, 2]
    with bounded_by(Bounds(array_bytes=1 << 20)):
        with pytest.raises(Refused, match=r"x\.npz unpacks to too many bytes: .*raise prepare.bounds.array_bytes"):
            load_npz(bomb, "x.npz")
        assert list(load_npz(bomb, "x.npz", ("small",))) == ["small"]
    with pytest.raises(DataError, match="has no action, only zeros, small"):
        load_npz(bomb, "x.npz", ("action",))
    with pytest.raises(DataError, match="packed by method 14"):
        load_npz(npz(zipfile.ZIP_LZMA, a=np.arange(3)), "x.npz")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_tables_raise_nothing_but_errors_for_the_user(data):
    whole = data.draw(st.sampled_from([npz(a=np.arange(40.0), b=np.ones((3, 7))), npy(np.ones((3, 7), np.float32))]))
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, max(len(damaged) - 1, 0)), st.integers(0, 255)))):
        if damaged:
            damaged[at] = byte
    for load in (load_npz, load_array):
        try:
            load(bytes(damaged), "x")
        except DataError as error:
            assert str(error).startswith("x")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_readings_that_float32_cannot_hold_are_named(value):
    table = np.zeros((4, 2))
    table[2, 1] = value
    with pytest.raises(DataError, match=r"x\.npy: row 2, column 1 is .* \(1 such values\)"):
        load_array(npy(table), "x.npy")
