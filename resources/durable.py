"""Writes that are there whole or not at all, after a power cut too: temporary name, fsync, rename, sync the folder."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from resources import failpoints
from resources.errors import StorageError

TEMPORARY = ".tmp-"

_REMEDIES = {
    errno.ENOSPC: "Free some space on that disk",
    errno.EDQUOT: "Free some space within your quota",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "Make that file system writable, or set VLLM_BATCH_DATA to another one",
    errno.EACCES: "Give this user access to it",
    errno.EPERM: "Give this user access to it",
    errno.EIO: "Check that disk",
}


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses within the context into a StorageError that says where, why and what to do.

    `folder` is named where the system does not say which file it was.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        raise StorageError(
            f"{error.filename or folder}: {error.strerror}. {_REMEDIES[error.errno]}, then run the batch again: what "
            "is committed stays, and it goes on from there."
        ) from error


def temporary_beside(path: Path) -> Path:
    """A name in the same folder that no reader takes for a finished file."""
    return path.with_name(f"{TEMPORARY}{secrets.token_hex(6)}-{path.name[:40]}")


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A stream whose content takes the file's name in one step when the context ends well, and never otherwise.

    `durable` syncs the file, so that the name never stands for less than its content. The folder's sync, which makes
    the name itself durable, is the caller's.
    """
    temporary = temporary_beside(path.absolute())
    try:
        with temporary.open("wb") as stream:
            failpoints.reached("opened", path)
            yield stream
            stream.flush()
            failpoints.reached("written", path)
            if durable:
                os.fsync(stream.fileno())
                failpoints.reached("synced", path)
        temporary.replace(path)
        failpoints.reached("renamed", path)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # writing and syncing name no file, opening the temporary one
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes | bytearray, *, durable: bool = True) -> None:
    """Replace a file's content in one step. `durable=False` leaves out all syncs, for what is only shown to people."""
    with replacing(path, durable=durable) as stream:
        stream.write(content)
    if durable:
        sync_folder(path.parent)
        failpoints.reached("durable", path)


def sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder where there is none, and its name durable. Those above it are never made."""
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)
    failpoints.reached("made", path)


def publish_folder(temporary: Path, target: Path) -> None:
    """Give a finished folder its name; files in it must have been synced. A folder that has the name is set aside."""
    for folder in [temporary, *(p for p in temporary.rglob("*") if p.is_dir())]:
        sync_folder(folder)
    failpoints.reached("ready", target)
    if target.exists():
        aside = temporary_beside(target)
        target.rename(aside)
        failpoints.reached("set aside", target)
        temporary.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        temporary.rename(target)
    failpoints.reached("published", target)
    sync_folder(target.parent)


def point_link(link: Path, target_name: str) -> None:
    """Make `link` a relative symbolic link to a sibling, in one step."""
    temporary = temporary_beside(link)
    temporary.symlink_to(target_name)
    failpoints.reached("link made", link)
    temporary.replace(link)
    failpoints.reached("link switched", link)
    sync_folder(link.parent)


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed process left in a folder that the caller has locked."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
