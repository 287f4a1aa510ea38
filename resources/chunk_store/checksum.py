"""One checksum over every byte of a chunk, kept in its own metadata.

Parquet's page checksums leave out the page headers and the footer, and there stand the bounds of the lines and the
names of the chunks that a merge replaced. This one leaves out nothing, and any Parquet reader still opens the file: it
is the value of a key in the footer, written as zeros, computed over the whole file, and put in place.
"""

import zlib

import pyarrow as pa

CHECKSUM_KEY = b"checksum"
_PREFIX = b"crc32 of this file with zeros here: "
_DIGITS = 8
BLANK = _PREFIX + b"0" * _DIGITS


def sealed(content: pa.Buffer) -> bytearray:
    """The file with its checksum; its metadata hold BLANK under CHECKSUM_KEY."""
    file = bytearray(content)
    place = file.rindex(BLANK) + len(_PREFIX)  # the last one: text in the rows stands before the footer
    file[place : place + _DIGITS] = b"%08x" % zlib.crc32(file)
    return file


def is_intact(file: bytes | bytearray) -> bool:
    """Whether a file is byte for byte as it was sealed."""
    place = file.rfind(_PREFIX)
    if place < 0:
        return False
    place += len(_PREFIX)
    view = memoryview(file)
    expected = zlib.crc32(view[place + _DIGITS :], zlib.crc32(b"0" * _DIGITS, zlib.crc32(view[:place])))
    return bytes(view[place : place + _DIGITS]) == b"%08x" % expected
