"""Child processes that die with their parent, and sessions that are ended to the last process."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class ProcessIdentity:
    """A process that cannot be taken for a later one with the same number."""

    pid: int
    started: str

    def is_alive(self) -> bool:
        return identify(self.pid) == self


def identify(pid: int) -> ProcessIdentity | None:
    """The identity of a running process; None for one that is gone or a zombie."""
    fields = _stat(pid)
    if fields is None:
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return ProcessIdentity(pid, f"{boot}:{fields[19]}")  # field 22 of proc(5) stat: start, in ticks after boot


def start_session(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> tuple[subprocess.Popen[bytes], ProcessIdentity]:
    """Start a command in a session of its own, output appended to ``log`` (0600).

    It gets SIGTERM when this thread's process dies, SIGKILL included; call it from the main thread.
    """
    parent = os.getpid()

    def die_with_parent() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    finally:
        os.close(output)
    return process, identify(process.pid) or ProcessIdentity(process.pid, "gone")


def session_members(leader: ProcessIdentity, environment_line: str) -> list[int]:
    """The living processes of the session that ``leader`` began, whether or not it still lives itself.

    A session's number is not given to a new process while it has members; ``environment_line`` (``NAME=value``), which
    every member has inherited, makes sure for the case that it was free in between.
    """
    now = identify(leader.pid)
    if now is not None and now != leader:
        return []
    numbers = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in numbers if _session(pid) == leader.pid and _has_variable(pid, environment_line)]


def end_all(members: Callable[[], list[int]], grace_seconds: Callable[[], float]) -> None:
    """SIGTERM, wait up to ``grace_seconds()``, which may shrink meanwhile, SIGKILL what is left, wait for that."""
    _signal_all(members(), signal.SIGTERM)
    start = time.monotonic()
    while members() and time.monotonic() < start + grace_seconds():
        time.sleep(0.05)
    deadline = time.monotonic() + 5
    while (left := members()) and time.monotonic() < deadline:
        _signal_all(left, signal.SIGKILL)
        time.sleep(0.05)


def _signal_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _stat(pid: int) -> list[str] | None:
    """The fields of proc(5) stat from the third (state) on; None where the process is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields


def _session(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[3]) if fields else None


def _has_variable(pid: int, line: str) -> bool:
    try:
        return line.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
