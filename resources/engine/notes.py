"""Notes that are true while their writer lives: small files, locked by who wrote them.

A lease on a server and a ticket in the queue are such notes. The kernel drops the lock (flock) when the writer dies,
SIGKILL included, and the writer's identity stands in the note, so that a fork of it that still holds the file does not
count. Standard library only.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from resources.engine.processes import Identity, identify


class Note(NamedTuple):
    """What somebody else reads. `content` has the writer's `identity` in it."""

    path: Path
    content: dict[str, Any]
    live: bool


class OwnNote:
    """A note of this process: true from its making until `withdraw`, or our death."""

    def __init__(self, path: Path, **content: Any) -> None:
        self.path = path
        new = path.with_name(f".{path.name}")
        self._file = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self.write(**content)
            new.rename(path)  # it has its name only when it is locked: nobody sees a note that seems dead
        except BaseException:
            os.close(self._file)
            raise

    def write(self, **content: Any) -> None:
        """Say something else."""
        text = json.dumps({"identity": identify(os.getpid()), **content}).encode()
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, text, 0)

    def withdraw(self, *, remove: bool = True) -> None:
        """It is not true any more. Left where it is, for others to read, unless `remove`."""
        if self._file < 0:
            return
        if remove:
            self.path.unlink(missing_ok=True)
        # Unlocked, not only closed: a child that is between fork and exec has the file open too.
        fcntl.flock(self._file, fcntl.LOCK_UN)
        os.close(self._file)
        self._file = -1


def read_notes(folder: Path) -> list[Note]:
    """All notes of a folder, live or dead, by name."""
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return []
    return [note for path in paths if (note := _read(path))]


def live_notes(folder: Path) -> list[Note]:
    return [note for note in read_notes(folder) if note.live]


def _read(path: Path) -> Note | None:
    try:
        live = is_locked(path)
        content = json.loads(path.read_bytes())
        owner = Identity(*content["identity"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):  # just being written: the lock alone says whether it is true
        return Note(path, {}, is_locked(path))
    return Note(path, content, live and not owner.known_dead)


# --- Locks ------------------------------------------------------------------------------------------------------------


def is_locked(path: Path) -> bool:
    """Somebody holds the lock of that file."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def try_lock(path: Path) -> int | None:
    """The open, locked file; None where another holds it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file


@contextmanager
def mutex(path: Path) -> Iterator[None]:
    """Alone for the few moments that a decision takes."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)
    finally:
        os.close(file)
