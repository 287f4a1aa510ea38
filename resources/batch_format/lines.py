"""Lines of an input file, plain or compressed, in constant memory."""

import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from resources.errors import BatchFailed, InputRefused

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
MAX_LINE_BYTES = 16 * 1024 * 1024
_BOM = b"\xef\xbb\xbf"
_BLOCK = 1024 * 1024
_MAX_ZSTD_WINDOW = 128 * 1024 * 1024
_ZSTD_PIECE = 512
"""What is unpacked in one go. Four bytes can stand for 128 KiB, so this is what bounds the memory."""


def input_suffix(path: Path) -> str | None:
    """The input suffix that a name carries (`.jsonl`, `.jsonl.gz`, `.jsonl.zst`); None where it is no input file."""
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(s)), None)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, never through a link, never waiting on a FIFO or device.

    Raises:
        InputRefused: the path is something else, or cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        what = "a symbolic link" if path.is_symlink() else (error.strerror or "unreadable").lower()
        raise InputRefused(f"{path}: {what}; only regular files are read.") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InputRefused(f"{path}: not a regular file.")
    return os.fdopen(handle, "rb", buffering=0)


def iter_lines(
    stream: BinaryIO, suffix: str, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, bytes | None]]:
    """The non-blank lines as (line number from 1, bytes without surrounding white space).

    None stands for a line over `max_line_bytes`, which is read past without being held. A byte order mark at the
    start and CRLF line ends are taken off. Blank lines count but are not given.

    Raises:
        BatchFailed: `unreadable_input`, the compression is damaged or ends early; names the last whole line.
    """
    reader = _decompressed(stream, suffix)
    limit = max_line_bytes + len(b"\r\n")
    number = 0
    try:
        while piece := reader.readline(limit):
            number += 1
            if number == 1 and piece.startswith(_BOM):
                piece = piece[len(_BOM) :]
                if not piece.endswith(b"\n"):
                    piece += reader.readline(len(_BOM))
            if len(piece) >= limit and not piece.endswith(b"\n"):
                rest = piece
                while not rest.endswith(b"\n") and (rest := reader.readline(_BLOCK)):
                    piece = b""
                if not piece:
                    yield number, None
                    continue
            line = piece.strip()
            if line:
                yield number, line if len(line) <= max_line_bytes else None
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise BatchFailed(
            "unreadable_input", f"The input cannot be read past line {number}: {error}. Is the file whole?"
        ) from None
    finally:
        if isinstance(reader, io.BufferedReader):
            reader.detach()  # or it closes the caller's stream when it goes


def _decompressed(stream: BinaryIO, suffix: str) -> io.BufferedIOBase:
    if suffix.endswith(".gz"):
        return gzip.GzipFile(fileobj=stream, mode="rb")  # a buffer around it would lose what comes before a damage
    if suffix.endswith(".zst"):
        return io.BufferedReader(_ZstdFrames(stream), _BLOCK)
    return io.BufferedReader(cast(io.RawIOBase, stream), _BLOCK)


class _ZstdFrames(io.RawIOBase):
    """All frames of a zstd file. Unlike zstandard's own reader it tells a frame that is cut short from an end."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._packed = memoryview(b"")
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: bytearray | memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            if not self._packed:
                self._packed = memoryview(self._stream.read(_BLOCK))
            if not self._packed:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the zstd frame ends early")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW).decompressobj()
            piece = self._packed[:_ZSTD_PIECE]
            self._ready = memoryview(self._frame.decompress(piece))
            taken = len(piece) - len(self._frame.unused_data if self._frame.eof else b"")
            self._packed = self._packed[taken:]
        count = min(len(self._ready), len(target))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
