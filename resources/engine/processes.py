"""Processes by what cannot be mistaken: number, start time, boot and pid namespace; and how a server's are ended.

Standard library only, and few of its modules: the engine host imports this without site-packages.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36
TRACKER_SECONDS = 3.0


class Process(NamedTuple):
    """A process as /proc/<pid>/stat tells of it. `start_time` is in clock ticks since boot (field 22)."""

    pid: int
    state: str
    parent: int
    group: int
    session: int
    start_time: int

    @property
    def dead(self) -> bool:
        """A zombie holds nothing but its number; where nobody reaps, it stays for ever."""
        return self.state in "ZX"


class Identity(NamedTuple):
    """A process that cannot be taken for a later one with its number."""

    world: str  # boot and pid namespace that the numbers below belong to
    pid: int
    start_time: int

    @property
    def known_dead(self) -> bool:
        """That process is gone. False also where it cannot be seen from here: another pid namespace."""
        if self.world != world():
            return self.world.split()[:1] != world().split()[:1]  # another boot is over
        found = look_up(self.pid)
        return found is None or found.dead or found.start_time != self.start_time


class Record(NamedTuple):
    """Who a server is, so well described that no other process can be taken for it."""

    world: str
    pid: int  # also its process group and session
    start_time: int
    log: str  # device and inode of its log file, which is the standard output of all its processes
    server_dir: str

    @property
    def identity(self) -> Identity:
        return Identity(self.world, self.pid, self.start_time)


def world() -> str:
    """The boot and the pid namespace of this process: a pid means nothing outside of them."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def look_up(pid: int) -> Process | None:
    """The process of that number, or None."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()  # the name before it may hold blanks and brackets
    return Process(pid, fields[0].decode(), int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))


def identify(pid: int) -> Identity:
    """The identity of a process that is there: one's own, or a child that was not waited for."""
    found = look_up(pid)
    assert found, "it has an entry in /proc"
    return Identity(world(), pid, found.start_time)


def processes() -> list[Process]:
    found = (look_up(int(name)) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208
    return [process for process in found if process]


def server_processes(record: Record) -> list[int]:
    """The living processes of that server: never one that only inherited its number.

    While the server itself is there (if only as a zombie), everything in its session is its own. When it is gone, its
    number may in time be another session's: then only processes that write to the server's log count.
    """
    if record.world != world():
        return []
    members = [p for p in processes() if record.pid in (p.session, p.group) and p.start_time >= record.start_time]
    leader = look_up(record.pid)
    if leader:
        return [p.pid for p in members if not p.dead] if leader.start_time == record.start_time else []
    return [p.pid for p in members if not p.dead and _writes_to(p.pid, record.log)]


def end_processes(list_them: Callable[[], list[int]], grace: float = 0, ask: int | None = None) -> list[int]:
    """SIGTERM, `grace` seconds, SIGKILL; return when none is left. The numbers of those that were there at first.

    While the process `ask` is one of them, SIGTERM goes to it alone: a server that is asked ends its children in order;
    where they end before it does, it logs a disaster.
    """
    first = list_them()
    deadline = time.monotonic() + grace
    asked: set[int] = set()
    while left := list_them():
        if grace:
            turn = {ask} if ask in left else set(left)
            _signal(turn - asked, signal.SIGTERM)
            asked |= turn
        # Python's resource tracker frees shared memory (hundreds of MB for vLLM) and ends when all others have.
        others = [pid for pid in left if not _is_resource_tracker(pid)]
        if time.monotonic() >= deadline + (0 if others else TRACKER_SECONDS):
            _signal(others or left, signal.SIGKILL)
        time.sleep(0.05)
    return first


def end_server(record: Record) -> list[int]:
    """Kill every process of that server; return when none is left, with their numbers."""
    killed = end_processes(lambda: server_processes(record))
    shutil.rmtree(record.server_dir, ignore_errors=True)
    return killed


def descendants(ancestor: int) -> Iterator[int]:
    """The living processes below this one, reaping on the way those that are dead and ours."""
    children: dict[int, list[Process]] = {}
    for process in processes():
        children.setdefault(process.parent, []).append(process)
    front = [ancestor]
    while front:
        for process in children.get(front.pop(), []):
            front.append(process.pid)
            if not process.dead:
                yield process.pid
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def file_id(stat: os.stat_result) -> str:
    return f"{stat.st_dev}:{stat.st_ino}"


def prctl(option: int, value: int) -> None:
    if _LIBC.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


_LIBC = ctypes.CDLL(None, use_errno=True)  # loaded here: nothing may be imported between fork and exec


def _signal(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _is_resource_tracker(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _writes_to(pid: int, file: str) -> bool:
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if file_id(Path(f"/proc/{pid}/fd/{descriptor}").stat()) == file:
                return True
    return False
