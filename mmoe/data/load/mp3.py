"""Counts the frames of MP3s that do not say how many they have, so that they are read to their end.

Encoders write the count into a first frame of its own (named Xing, Info or VBRI). Without one, decoders guess a length
from the size of the file and its first bit rate: with a varying rate they stop early or expect too much.
"""

import re
import struct

_KBPS = {
    True: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),  # MPEG 1, layer III
    False: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),  # MPEG 2 and 2.5
}
_HZ = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8000)}
_SYNC = re.compile(rb"\xff[\xe2\xe3\xea\xeb\xf2\xf3\xfa\xfb]")  # which frames of layer III begin with
_NAMES = (b"Xing", b"Info", b"VBRI")
_BIT_RATE = 10  # of the frame that is made: large enough for what it holds, at any rate


def with_count(data: bytes, samples: int) -> bytes:
    """Return the MP3 with a first frame that counts the others.

    It is returned as it is where it has such a frame, or the decoder guesses its number of `samples` rightly.
    """
    at = _behind_tag(data)
    first = _frame_bytes(data[at : at + 4])
    if not first or any(name in data[at : at + first] for name in _NAMES):
        return data
    begin, count = at, 0
    while at < len(data):
        size = _frame_bytes(data[at : at + 4])
        count, at = (count + 1, at + size) if size else (count, _next_frame(data, at + 1))
    head = bytearray(data[begin : begin + 4])
    mono, is_mpeg_1 = head[3] >> 6 == 3, head[1] >> 3 & 3 == 3
    if count * (1152 if is_mpeg_1 else 576) == samples:
        return data
    head[1] |= 1  # without a checksum
    head[2] = _BIT_RATE << 4 | head[2] & 0x0C
    side = (17 if mono else 32) if is_mpeg_1 else (9 if mono else 17)  # bytes that stand before the count
    frame = bytes(head) + bytes(side) + b"Info" + struct.pack(">II", 1, count)
    return frame.ljust(_frame_bytes(bytes(head)), b"\0") + data[begin:]


def _behind_tag(data: bytes) -> int:
    """Where an ID3v2 tag ends, which may hold a cover."""
    if data[:3] != b"ID3" or len(data) < 10:
        return 0
    size = 0
    for byte in data[6:10]:
        size = size << 7 | byte & 0x7F
    return 10 + size + (10 if data[5] & 0x10 else 0)


def _next_frame(data: bytes, at: int) -> int:
    """Where the next two frames in a row begin, behind what is none; the end where there are no more."""
    for found in _SYNC.finditer(data, at):
        at = found.start()
        behind = at + _frame_bytes(data[at : at + 4])
        if behind > at and _frame_bytes(data[behind : behind + 4]):
            return at
    return len(data)


def _frame_bytes(head: bytes) -> int:
    """The size of the frame of layer III that begins with these four bytes; 0 where none does."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:
        return 0
    version, rate, speed = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or rate in (0, 15) or speed == 3:
        return 0
    return (144 if version == 3 else 72) * 1000 * _KBPS[version == 3][rate - 1] // _HZ[version][speed] + (
        head[2] >> 1 & 1
    )
