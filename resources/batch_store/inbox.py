"""The drop folder: which files are whole, and which have been registered.

A file is taken when it has an input suffix, is a regular file of its own (no link), nobody has it open for writing, and
it has not changed for a moment. Files are read and left where they are.
"""

import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resources import durable
from resources.batch_format.lines import input_suffix, open_regular
from resources.batch_format.options import sidecar_path
from resources.errors import InputRefused

SETTLE_SECONDS = 2.0
_LONGEST_WAIT_SECONDS = 2.5


@dataclass(frozen=True)
class DroppedFile:
    path: Path
    size: int
    mark: str
    """Size, time of change and inode, and the time of its sidecar: another mark is another file."""


class Inbox:
    """One drop folder, and the index of what was taken from it."""

    def __init__(self, folder: Path, index_file: Path) -> None:
        self.folder = folder
        self._index_file = index_file
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._index: dict[str, dict[str, Any]] = self._read_index()

    def settled(self) -> Iterator[DroppedFile]:
        """Files that are whole and not taken yet, oldest first. Waits a moment for those that were just dropped."""
        deadline = time.monotonic() + _LONGEST_WAIT_SECONDS
        while True:
            new = [
                dropped
                for dropped in self._look()
                if self._index.get(dropped.path.name, {}).get("mark") != dropped.mark
            ]
            ready = [dropped for dropped in new if _is_whole(dropped)]
            if len(ready) == len(new) or time.monotonic() >= deadline:
                yield from ready
                return
            time.sleep(0.25)

    def take(self, dropped: DroppedFile, **outcome: str) -> None:
        """Note that a file was dealt with: `key` where it was registered, `error` where it was refused."""
        self._index[dropped.path.name] = {"mark": dropped.mark, **outcome}

    def save(self) -> None:
        """Write the index, without the files that are gone."""
        names = {entry.name for entry in os.scandir(self.folder)}
        kept = {name: entry for name, entry in self._index.items() if name in names}
        if kept != self._read_index():
            durable.write_file(self._index_file, json.dumps(kept).encode())

    def _look(self) -> list[DroppedFile]:
        found = []
        for entry in os.scandir(self.folder):
            if entry.name.startswith(".") or input_suffix(Path(entry.name)) is None:
                continue
            try:
                if not entry.is_file(follow_symlinks=False):
                    continue
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            mark = f"{status.st_size}:{status.st_mtime_ns}:{status.st_ino}{_sidecar_mark(Path(entry.path))}"
            found.append((status.st_mtime_ns, DroppedFile(Path(entry.path), status.st_size, mark)))
        return [dropped for _, dropped in sorted(found, key=lambda pair: (pair[0], pair[1].path.name))]

    def _read_index(self) -> dict[str, dict[str, Any]]:
        try:
            content = json.loads(self._index_file.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


def _is_whole(dropped: DroppedFile) -> bool:
    changed = int(dropped.mark.split(":")[1]) / 1e9
    return abs(time.time() - changed) >= SETTLE_SECONDS and not _is_being_written(dropped.path)


def _is_being_written(path: Path) -> bool:
    """Whether some process has the file open for writing: only where none has does the kernel grant a read lease
    (F_SETLEASE in fcntl(2)).

    File systems without leases, and files of other users, give no answer; there the settling time alone counts.
    """
    try:
        with open_regular(path) as stream:
            fcntl.fcntl(stream, fcntl.F_SETSIG, signal.SIGURG)  # ignored by default, unlike SIGIO
            try:
                fcntl.fcntl(stream, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            except BlockingIOError:
                return True
            except OSError:
                return False
            fcntl.fcntl(stream, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            return False
    except InputRefused:
        return False  # registering it says why


def _sidecar_mark(path: Path) -> str:
    """Part of a file's mark, so that a file that was refused for its sidecar is taken again when that is mended."""
    try:
        status = sidecar_path(path).lstat()
    except OSError:
        return ""
    return f":{status.st_mtime_ns}"
