"""A small process that owns one engine server for a run, so that the server never outlives its run.

The run starts this file as a script, in a session of its own, and holds the only write end of its standard input.
Events go back as JSON lines on standard output: waiting, reaped, started, exited, failed. The rules, in order:

1. It takes the lock of every device (flock, in sorted order), waiting for whoever holds it. The kernel drops a lock
   when its holder dies, and the server does not inherit it: a lock is free exactly when its supervisor is gone.
2. Having the lock, it ends what a dead predecessor left behind, as told by the state file beside the lock. That makes
   it safe that locks are freed before servers are: nobody starts a server on a device before this is done.
3. It starts the server in a session of its own and writes down who it is.
4. When the run asks (end of file on standard input) or dies, or the server dies, it ends every process of the server,
   waits until none is left, removes the state, and exits.
5. If it is killed itself, the kernel kills the server (parent-death signal), the run kills what the server started, and
   if the run is gone too, the next start does by rule 2.

Standard library only, and few of its modules: this has to be up in milliseconds and small for hours.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36
POLL_SECONDS = 0.2
TRACKER_SECONDS = 3.0


class Spec(TypedDict):
    """What the run asks for: the one line on standard input."""

    owner_pid: int
    model: str
    devices: list[str]
    devices_dir: str
    command: list[str]
    env: dict[str, str]
    server_dir: str  # the server's sockets; removed at the end
    log: str
    grace: float  # seconds between SIGTERM and SIGKILL


class Record(NamedTuple):
    """Who the server is, so well described that no other process can be taken for it."""

    world: str  # boot and pid namespace that the numbers below belong to
    pid: int  # also its process group and session
    start_time: int  # in clock ticks since boot; /proc/<pid>/stat, field 22
    log: str  # device and inode of its log file, which is the standard output of all its processes
    server_dir: str


class Process(NamedTuple):
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


class OwnerGone(Exception):
    """The run asked us to stop, or died."""


# --- Processes ------------------------------------------------------------------------------------------------------


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
            if _file_id(Path(f"/proc/{pid}/fd/{descriptor}").stat()) == file:
                return True
    return False


def _file_id(stat: os.stat_result) -> str:
    return f"{stat.st_dev}:{stat.st_ino}"


def _descendants(ancestor: int) -> Iterator[int]:
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


# --- State files ----------------------------------------------------------------------------------------------------


def state_file(devices_dir: Path, device: str) -> Path:
    return devices_dir / f"{device}.json"


def read_state(file: Path) -> dict[str, Any]:
    """What stands beside a lock: owner_pid, supervisor_pid, model, server (a Record or None). Empty where none is."""
    try:
        state = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def read_record(state: dict[str, Any]) -> Record | None:
    try:
        return Record(**state["server"])
    except (KeyError, TypeError):
        return None


def _write_state(file: Path, state: dict[str, Any]) -> None:
    """Whole or not at all. Not synced to disk: after a power cut there is nothing to reap."""
    new = file.with_suffix(".new")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        json.dump(state, out)
    new.replace(file)


# --- The supervisor -------------------------------------------------------------------------------------------------


class Supervisor:
    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.states = {d: state_file(Path(spec["devices_dir"]), d) for d in sorted(spec["devices"])}
        self.stop_asked = False
        self._locks: list[int] = []  # open for as long as this process lives

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # A handler, not SIG_IGN: the server would inherit that.
            signal.signal(number, self._on_signal)
        _prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of the server become our children: none gets out of sight
        try:
            for device, file in self.states.items():
                self._lock(device, file)
            for file in self.states.values():
                self._reap(file)
            self._serve()
        except OwnerGone:
            pass
        finally:
            shutil.rmtree(self.spec["server_dir"], ignore_errors=True)

    def _on_signal(self, number: int, frame: object) -> None:
        self.stop_asked = True

    def _pause(self) -> None:
        """Wait a moment.

        Raises:
            OwnerGone: end of file on standard input; or the run is not our parent any more, which is seen even when
                a process that it forked holds the pipe open.
        """
        readable, _, _ = select.select([0], [], [], POLL_SECONDS)
        if self.stop_asked or (readable and not os.read(0, 4096)) or os.getppid() != self.spec["owner_pid"]:
            raise OwnerGone

    def _lock(self, device: str, file: Path) -> None:
        lock = os.open(file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        told = None
        while not _try_lock(lock):
            holder = read_state(file)
            if (who := (holder.get("owner_pid"), holder.get("model"))) != told:
                report(event="waiting", device=device, pid=who[0], model=who[1])
                told = who
            self._pause()
        self._locks.append(lock)

    def _reap(self, file: Path) -> None:
        stale = read_state(file)
        record = read_record(stale)
        # Say who holds the device now, but keep the record until what it names is gone: we may be killed here too.
        self._write(file, record)
        if record:
            report(event="reaped", pids=end_server(record), model=stale.get("model"))
            self._write(file, None)

    def _write(self, file: Path, record: Record | None) -> None:
        state = {"owner_pid": self.spec["owner_pid"], "supervisor_pid": os.getpid(), "model": self.spec["model"]}
        _write_state(file, {**state, "server": record._asdict() if record else None})

    def _serve(self) -> None:
        log = _open_log(Path(self.spec["log"]))
        supervisor = os.getpid()

        def die_with_supervisor() -> None:
            _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != supervisor:
                os._exit(1)  # it died before the line above

        # preexec_fn is safe here: this process has one thread.
        server = subprocess.Popen(
            self.spec["command"], env=self.spec["env"], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True, preexec_fn=die_with_supervisor,
        )  # fmt: skip
        try:
            seen = look_up(server.pid)
            assert seen, "a child that was not waited for has an entry in /proc"
            record = Record(world(), server.pid, seen.start_time, _file_id(os.fstat(log)), self.spec["server_dir"])
            for file in self.states.values():
                self._write(file, record)
            report(event="started", **record._asdict())
            while server.poll() is None:
                self._pause()
            report(event="exited", code=server.returncode)
        finally:
            # Everything below us is the server's, whatever group or session it moved to.
            end_processes(lambda: list(_descendants(supervisor)), self.spec["grace"], ask=server.pid)
            for file in self.states.values():
                file.unlink(missing_ok=True)


def report(**event: Any) -> None:
    with contextlib.suppress(OSError):  # the run may be gone
        os.write(1, json.dumps(event).encode() + b"\n")


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _prctl(option: int, value: int) -> None:
    if _LIBC.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


_LIBC = ctypes.CDLL(None, use_errno=True)  # loaded here: nothing may be imported between fork and exec


def _open_log(file: Path) -> int:
    """A new log, readable by its owner alone; the one before is kept as `.1`."""
    with contextlib.suppress(FileNotFoundError):
        file.replace(file.with_name(f"{file.name}.1"))
    return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _read_spec() -> Spec | None:
    line = b""
    while not line.endswith(b"\n"):
        if not (part := os.read(0, 65536)):
            return None  # the run died, or thought better of it
        line += part
    spec: Spec = json.loads(line)
    return spec


def main() -> int:
    try:
        if spec := _read_spec():
            Supervisor(spec).run()
    except Exception as error:  # the run is told: nobody reads our standard error
        report(event="failed", message=f"{type(error).__name__}: {error}", trace=traceback.format_exc())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
