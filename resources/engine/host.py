"""The engine host: a small process that owns one vLLM server, keeps it warm between runs, and outlives them all.

A run starts it with what to start on its standard input, and with two kinds of locked files that it inherits: the lock
of its folder and the locks of its devices. The rules, in order:

1. Three processes in a row, each the child of the one before: guardian, host, server. Guardian and host hold the
   locks; the server does not inherit them. A lock is free exactly when no process of the server is left.
2. The server is kept while a run holds a lease, and for `keep_alive` seconds after the last one; one that is still
   loading is kept only for those who wait for it. Then, or when it is asked to, the host ends every process of it,
   removes its folder, and exits.
3. A server that dies is not started again: the host says so in its events and in the log, and exits.
4. The host killed: the kernel kills the server (parent-death signal), and its orphans become the guardian's children,
   which ends them. The guardian killed: the host is told by the kernel, and stops as if it were asked to.
   Both killed: the kernel frees the locks and kills the server; what the server had started is ended by the next run
   that looks, as the record in the events tells.

Standard library only, and few of its modules: this has to be up in milliseconds and small for hours.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Never, TypedDict

from resources.engine.host_folder import HostFolder
from resources.engine.notes import mutex, read_notes
from resources.engine.processes import (
    PR_SET_CHILD_SUBREAPER,
    PR_SET_PDEATHSIG,
    Record,
    descendants,
    end_processes,
    file_id,
    identify,
    prctl,
)

POLL_SECONDS = 0.2
HEALTH_SECONDS = 1.0


class Spec(TypedDict):
    """What the run asks for: the one line on standard input."""

    folder: str
    mutex: str
    command: list[str]
    env: dict[str, str]
    log: str
    grace: float  # seconds between SIGTERM and SIGKILL
    startup_timeout: float
    keep_alive: float


class Host:
    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.folder = HostFolder(Path(spec["folder"]))
        self.stop_asked = False
        self._events = os.open(self.folder.events.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._idle_until = 0.0
        self._was_leased = True

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # A handler, not SIG_IGN: the server would inherit that.
            signal.signal(number, self._on_signal)
        prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of the server become our children: none gets out of sight
        self._say("host", identity=identify(os.getpid()))
        try:
            self._serve()
        except Exception as error:  # nobody reads our standard error
            self._say("ended", reason=f"{type(error).__name__}: {error}", crashed=True)
        finally:
            shutil.rmtree(self.folder.path, ignore_errors=True)

    def _on_signal(self, number: int, frame: object) -> None:
        self.stop_asked = True

    def _say(self, event: str, **facts: Any) -> None:
        with contextlib.suppress(OSError):  # a full disk does not end a server
            os.write(self._events, json.dumps({"event": event, "at": time.time(), **facts}).encode() + b"\n")

    def _serve(self) -> None:
        log = _open_log(Path(self.spec["log"]))
        host = os.getpid()

        def die_with_host() -> None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != host:
                os._exit(1)  # it died before the line above

        # preexec_fn is safe here: this process has one thread.
        server = subprocess.Popen(
            self.spec["command"], env=self.spec["env"], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True, preexec_fn=die_with_host,
        )  # fmt: skip
        try:
            who = identify(server.pid)
            self._say("started", record=Record(*who, file_id(os.fstat(log)), str(self.folder.path)))
            reason, crashed = self._watch(server)
            if crashed:
                os.write(log, f"engine host: {reason}; the server is not started again by itself\n".encode())
            self._say("ended", reason=reason, crashed=crashed)
        finally:
            # Everything below us is the server's, whatever group or session it moved to.
            end_processes(lambda: list(descendants(host)), self.spec["grace"], ask=server.pid)

    def _watch(self, server: subprocess.Popen[bytes]) -> tuple[str, bool]:
        """Wait for the end of the server's life: why, and whether it went by itself."""
        started = time.monotonic()
        ready = False
        while True:
            code = server.poll()
            if code is not None:
                return (f"exit code {code}" if code >= 0 else f"killed by signal {-code}"), True
            if self.stop_asked or self.folder.stops_now:
                return "stopped", False
            if not ready and _is_healthy(str(self.folder.socket_path)):
                ready = True
                self._idle_until = time.monotonic() + self.spec["keep_alive"]
                self._say("ready", load_seconds=time.monotonic() - started)
            if not ready and time.monotonic() - started > self.spec["startup_timeout"]:
                return f"not ready after {self.spec['startup_timeout']:g} s (startup_timeout)", True
            if not self._is_wanted(ready):
                return "stopped", False
            select.select([], [], [], POLL_SECONDS)

    def _is_wanted(self, ready: bool) -> bool:
        """Whether there is a lease, or may be one soon. False is said once: no lease is given after it."""
        if self._is_leased():
            return True
        waits = ready and not self.folder.is_stopping and time.monotonic() < self._idle_until
        if waits or not self.folder.path.exists():
            return waits
        with mutex(Path(self.spec["mutex"])):
            if self._is_leased():
                return True
            self.folder.ask_to_stop()
            return False

    def _is_leased(self) -> bool:
        """Also clears away leases that ended, and learns from each for how long to wait for the next."""
        leased = False
        for note in read_notes(self.folder.leases_dir):
            if note.live:
                leased = True
                continue
            keep = note.content.get("keep_alive", self.spec["keep_alive"])
            self._idle_until = max(self._idle_until, time.monotonic() + keep)
            note.path.unlink(missing_ok=True)
            self._was_leased = True
        if leased != self._was_leased:
            self._was_leased = leased
            if leased:
                self._say("leased")
            else:
                self._say("idle", until=time.time() + self._idle_until - time.monotonic())
        return leased


def _is_healthy(path: str) -> bool:
    """GET /health, by hand: http.client would double the time this process takes to start."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
        connection.settimeout(HEALTH_SECONDS)
        try:
            connection.connect(path)
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return connection.recv(64).split(b" ")[1:2] == [b"200"]
        except OSError:
            return False


def _open_log(file: Path) -> int:
    """A new log, readable by its owner alone; the one before is kept as `.1`."""
    with contextlib.suppress(FileNotFoundError):
        file.replace(file.with_name(f"{file.name}.1"))
    return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


# --- The guardian -----------------------------------------------------------------------------------------------------


def guard(spec: Spec) -> Never:
    """Start the host and wait for its end; then end what is left, however the host ended."""
    guardian = os.getpid()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    host = os.fork()
    if host == 0:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == guardian:
            Host(spec).run()
        os._exit(0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.waitpid(host, 0)
    end_processes(lambda: list(descendants(guardian)))
    shutil.rmtree(spec["folder"], ignore_errors=True)
    os._exit(0)


def _read_spec() -> Spec | None:
    line = b""
    while not line.endswith(b"\n"):
        if not (part := os.read(0, 65536)):
            return None  # the run died, or thought better of it
        line += part
    spec: Spec = json.loads(line)
    return spec


def main(locks: list[str]) -> None:
    """`locks` are the numbers of inherited files. The process that the run waits for ends at once."""
    spec = _read_spec()
    if spec is None or os.fork():
        os._exit(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), 0)
    for lock in locks:
        os.set_inheritable(int(lock), False)
    guard(spec)
