"""Writes that are there whole or not at all, after a power cut too: temporary name, fsync, rename, sync the folder."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp-"


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
            yield stream
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Replace a file's content in one step. `durable=False` leaves out all syncs, for what is only shown to people."""
    with replacing(path, durable=durable) as stream:
        stream.write(content)
    if durable:
        sync_folder(path.parent)


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


def publish_folder(temporary: Path, target: Path) -> None:
    """Give a finished folder its name; files in it must have been synced. A folder that has the name is set aside."""
    for folder in [temporary, *(p for p in temporary.rglob("*") if p.is_dir())]:
        sync_folder(folder)
    if target.exists():
        aside = temporary_beside(target)
        target.rename(aside)
        temporary.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        temporary.rename(target)
    sync_folder(target.parent)


def point_link(link: Path, target_name: str) -> None:
    """Make `link` a relative symbolic link to a sibling, in one step."""
    temporary = temporary_beside(link)
    temporary.symlink_to(target_name)
    temporary.replace(link)
    sync_folder(link.parent)


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed process left in a folder that the caller has locked."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
