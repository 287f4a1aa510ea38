"""One writer per batch: a lock that the kernel drops when its process dies."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from resources.durable import storage_errors
from resources.errors import BatchLocked, BatchNotFound

_TRIES = 10
_TRY_SECONDS = 0.03
_held: dict[Path, int] = {}
"""The locks that this process holds, by path, with their descriptors."""


@contextmanager
def writer_lock(path: Path, owner: str) -> Iterator[None]:
    """Hold the lock, with the owner's name in the file for whoever meets it.

    The descriptor closes on exec, so no child process keeps a dead run's lock.

    Raises:
        BatchLocked: names the owner.
        BatchNotFound: the folder is gone, or went while we waited.
    """
    handle = _open(path)
    try:
        if not _acquire(handle):
            raise BatchLocked(f"{path.parent.name} is being worked on by {_describe(_read_owner(path))}.")
        if not _same_file(handle, path):
            raise BatchNotFound(f"{path.parent.name} was removed just now.")
        content = {"owner": owner, "pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
        with storage_errors(path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(content).encode(), 0)
        _held[path] = handle
        try:
            yield
        finally:
            del _held[path]
            fcntl.flock(handle, fcntl.LOCK_UN)  # now, and not when a child that is between fork and exec lets it go
    finally:
        os.close(handle)


def ensure_held(path: Path) -> None:
    """See that this process still holds the lock, and that it is the one that others meet: a process that was stopped
    for a while may find its batch removed, or worked on by somebody else, behind its back.

    Raises:
        BatchLocked: it does not, or it is not. Nothing more must be written.
    """
    handle = _held.get(path)
    if handle is None:
        raise BatchLocked(f"{path.parent.name}: this process does not hold its lock, so it writes nothing.")
    if not _same_file(handle, path):
        raise BatchLocked(
            f"{path.parent.name}: its folder or its lock was removed or replaced while this process worked on it, so "
            "it writes nothing more. Register the file again, or run the batch again if it is still there."
        )


def lock_owner(path: Path) -> dict[str, Any] | None:
    """Who holds the lock (`owner`, `pid`, `host`, `since`); None where nobody does."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_owner(path)
    finally:
        os.close(handle)
    return None


def _acquire(handle: int) -> bool:
    """Try for a moment: whoever asks for the owner holds a shared lock meanwhile."""
    for _ in range(_TRIES):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_TRY_SECONDS)
        else:
            return True
    return False


def _open(path: Path) -> int:
    try:
        with storage_errors(path):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        raise BatchNotFound(f"{path.parent.name}: its folder is gone.") from None


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _read_owner(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        owner = {}
    return owner if isinstance(owner, dict) else {}


def _describe(owner: dict[str, Any]) -> str:
    if "pid" not in owner:
        return "another process"
    return f"{owner.get('owner')} (process {owner['pid']} on {owner.get('host')}, since {owner.get('since')})"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
