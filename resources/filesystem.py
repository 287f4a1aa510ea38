"""What a folder must be like: on a file system whose rename, fsync and flock hold, or for its owner's eyes alone."""

import os
import re
from pathlib import Path

from resources.errors import SettingsError

_MOUNTS = Path("/proc/self/mounts")
_REMOTE = re.compile(r"nfs\d*|cifs|smb.*|fuse.*")


def refuse_remote_filesystem(path: Path) -> None:
    """Refuse a folder, there already or still to be made, on a file system that does not keep rename, fsync and flock.

    Raises:
        SettingsError: it stands on NFS, SMB or FUSE; names the path, the type and the remedy.
    """
    kind = filesystem_type(path)
    if kind is not None and _REMOTE.fullmatch(kind):
        raise SettingsError(
            f"{path} is on a {kind} file system, where commits are not safe (rename, fsync and locks of a local disk "
            "are needed). Set VLLM_BATCH_DATA to a folder on a local disk; results can be exported to remote storage."
        )


def filesystem_type(path: Path, mounts: Path | None = None) -> str | None:
    """The type of the file system that holds ``path``, as in proc(5) mounts; None where that cannot be read."""
    place = path.resolve()
    found: tuple[int, str] | None = None
    try:
        lines = (mounts or _MOUNTS).read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        mount_point = Path(_unescaped(fields[1]))
        depth = len(mount_point.parts)
        # The last of several mounts on one point is the one that is seen.
        if place.is_relative_to(mount_point) and (found is None or depth >= found[0]):
            found = (depth, fields[2])
    return found[1] if found else None


def private_folder(folder: Path) -> Path:
    """The folder, made where it is not there, that nobody but us can enter. One with things in it is not taken from
    those who could enter it so far: it may be everybody's, such as /tmp.

    Raises:
        SettingsError: it belongs to somebody else, or others can enter it and it is not empty.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if folder.is_symlink() or found.st_uid != os.getuid():
        raise SettingsError(f"{folder} belongs to somebody else; set VLLM_BATCH_RUNTIME_DIR to a folder of your own.")
    if found.st_mode & 0o077:
        if any(folder.iterdir()):
            raise SettingsError(
                f"{folder} can be entered by others. If it is for this project alone: chmod 700 {folder}. Otherwise "
                "set VLLM_BATCH_RUNTIME_DIR to a folder of your own."
            )
        folder.chmod(0o700)
    return folder


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), field)
