"""The engine host: a small process that owns one vLLM server, keeps it warm between runs, and outlives them all.

A run starts it with what to start on its standard input, and with two kinds of locked files that it inherits: the lock
of its folder and the locks of its devices. The rules, in order:

1. Three processes in a row, each the child of the one before: guardian, host, server. Guardian and host hold the
   locks; the server does not inherit them. A lock is free exactly when no process of the server is left.
2. The server is kept while a run holds a lease, and for `keep_alive` seconds after the last one; one that is still
   loading is kept only for those who wait for it. Then, or when it is asked to, the host ends every process of it,
   removes its folder, and exits.
3. A server that dies is not started again: the host says so in its events and in the log, and exits.
4. Where the spec allows it, an idle server makes room by sleeping: its weights go to the memory of the machine. The
   locks of the devices are let go when it has said that it sleeps, and taken again before it is woken; that of the
   folder is held all the while. It sleeps for `keep_alive` seconds, and for as long as a run waits for it. One that
   does not fall asleep, does not wake, or does not give the same greedy answer as before, is ended as if it had died.
5. The host killed: the kernel kills the server (parent-death signal), and its orphans become the guardian's children,
   which ends them. The guardian killed: the host is told by the kernel, and stops as if it were asked to.
   Both killed: the kernel frees the locks and kills the server; what the server had started is ended by the next run
   that looks, as the record in the events tells.

Standard library only, and few of its modules: this has to be up in milliseconds and small for hours.
"""

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Never, TypedDict

from resources.engine.host_calls import Server, agree
from resources.engine.host_folder import HostFolder, Rest
from resources.engine.notes import live_notes, mutex, read_notes
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


class Spec(TypedDict):
    """What the run asks for: the one line on standard input."""

    folder: str
    mutex: str
    queue: str
    command: list[str]
    env: dict[str, str]
    log: str
    grace: float  # seconds between SIGTERM and SIGKILL
    startup_timeout: float
    keep_alive: float
    names: list[str]  # under which the model, and each adapter, is asked
    sleep_timeout: float  # seconds that falling asleep, waking or a canary may take; 0 where it never sleeps


class Host:
    """`devices` are the locked files of the devices."""

    def __init__(self, spec: Spec, devices: Sequence[int] = ()) -> None:
        self.spec = spec
        self._devices = devices
        self.folder = HostFolder(Path(spec["folder"]))
        self.stop_asked = False
        self._events = os.open(self.folder.events.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._server = Server(self.folder.socket_path, spec["sleep_timeout"], self._gives_up)
        self._log = -1
        self._keep = spec["keep_alive"]
        self._idle_until = 0.0
        self._was_leased = True
        self._rest: Rest | None = None
        self._canary: list[Any] | None = None  # what the server answered when it had loaded

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
            self._must_say(event, **facts)

    def _must_say(self, event: str, **facts: Any) -> None:
        os.write(self._events, json.dumps({"event": event, "at": time.time(), **facts}).encode() + b"\n")

    def _note(self, text: str) -> None:
        """A line of ours in the server's log."""
        with contextlib.suppress(OSError):
            os.write(self._log, f"engine host: {text}\n".encode())

    def _serve(self) -> None:
        log = self._log = _open_log(Path(self.spec["log"]))
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
                self._note(f"{reason}; the server is not started again by itself")
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
            if not ready and self._server.is_healthy():
                ready = True
                if self.spec["sleep_timeout"]:
                    self._canary = self._server.canary(self.spec["names"])
                self._idle_until = time.monotonic() + self.spec["keep_alive"]
                self._say("ready", load_seconds=time.monotonic() - started)
            if not ready and time.monotonic() - started > self.spec["startup_timeout"]:
                return f"not ready after {self.spec['startup_timeout']:g} s (startup_timeout)", True
            if not self._is_wanted(ready):
                return "stopped", False
            if ready and (trouble := self._sleep_or_wake()):
                return trouble, True
            select.select([], [], [], POLL_SECONDS)

    def _is_wanted(self, ready: bool) -> bool:
        """Whether there is a lease, or may be one soon. False is said once: no lease is given after it."""
        if self._is_leased():
            return True
        waits = ready and not self.folder.is_stopping and time.monotonic() < self._idle_until
        if waits or not self.folder.path.exists():
            return waits
        with mutex(Path(self.spec["mutex"])):
            if self._is_leased() or (self._rest and not self.folder.is_stopping and self._is_waited_for()):
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
            self._keep = note.content.get("keep_alive", self._keep)
            self._idle_until = max(self._idle_until, time.monotonic() + self._keep)
            note.path.unlink(missing_ok=True)
            self._was_leased = True
        if leased != self._was_leased:
            self._was_leased = leased
            if leased:
                self._say("leased")
            else:
                self._say_idle()
        return leased

    def _say_idle(self) -> None:
        self._say("idle", until=time.time() + self._idle_until - time.monotonic())

    def _is_waited_for(self) -> bool:
        settings = self.folder.spec.get("settings")
        return any(note.content.get("settings") == settings for note in live_notes(Path(self.spec["queue"])))

    # --- Sleeping -----------------------------------------------------------------------------------------------------

    def _sleep_or_wake(self) -> str | None:
        """One step towards what runs ask for; why the server is good for nothing any more, where it is."""
        asked = self.folder.is_asked_to_sleep
        if asked and self._rest is None:
            return self._fall_asleep()
        if asked and self._rest is Rest.WAKING:  # who wanted it is gone before the devices were there
            self._set_rest(Rest.ASLEEP)
        if not asked and self._rest:
            if self._rest is Rest.ASLEEP:
                self._set_rest(Rest.WAKING)  # said before the locks are taken: who finds it asleep, finds them free
            if self._lock_devices():
                return self._wake()
        return None

    def _fall_asleep(self) -> str | None:
        with mutex(Path(self.spec["mutex"])):
            if not self.folder.is_asked_to_sleep:  # a run came first
                return None
            if self._canary is None:
                self._note("it gives no answer that could be compared after a sleep, so it is stopped instead")
                self.folder.ask_to_stop()
                return None
            self._set_rest(Rest.FALLING_ASLEEP)  # from here on a lease has to wait until it is awake again
        if not self._server.sleep():
            return None if self._gives_up() else "it did not fall asleep"
        for lock in self._devices:
            fcntl.flock(lock, fcntl.LOCK_UN)  # the guardian's too: it is one lock, open in both
        self._idle_until = time.monotonic() + self._keep
        self._set_rest(Rest.ASLEEP)
        self._say_idle()
        return None

    def _wake(self) -> str | None:
        begun = time.monotonic()
        if not self._server.wake():
            return None if self._gives_up() else "it did not wake"
        assert self._canary
        if not agree(self._canary, self._server.canary(self.spec["names"])):
            return None if self._gives_up() else "its answer after a sleep is not the one before"
        self._rest = None
        self._must_say("woken", wake_seconds=time.monotonic() - begun)
        return None

    def _set_rest(self, rest: Rest) -> None:
        self._rest = rest
        self._must_say("rest", what=rest)  # runs go by it: a server of which it cannot be said is ended

    def _lock_devices(self) -> bool:
        try:
            for lock in self._devices:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            for lock in self._devices:
                fcntl.flock(lock, fcntl.LOCK_UN)
            return False
        return True

    def _gives_up(self) -> bool:
        """The server is to end, so nothing is waited for."""
        stops = self.folder.is_stopping and not self.folder.leases()
        return self.stop_asked or stops or self.folder.stops_now


def _open_log(file: Path) -> int:
    """A new log, readable by its owner alone; the one before is kept as `.1`."""
    with contextlib.suppress(FileNotFoundError):
        file.replace(file.with_name(f"{file.name}.1"))
    return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


# --- The guardian -----------------------------------------------------------------------------------------------------


def guard(spec: Spec, devices: Sequence[int]) -> Never:
    """Start the host and wait for its end; then end what is left, however the host ended."""
    guardian = os.getpid()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    host = os.fork()
    if host == 0:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == guardian:
            Host(spec, devices).run()
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
    """`locks` are numbers of inherited files, the folder's last. The process that the run waits for ends at once."""
    spec = _read_spec()
    if spec is None or os.fork():
        os._exit(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), 0)
    for lock in locks:
        os.set_inheritable(int(lock), False)
    guard(spec, [int(lock) for lock in locks[:-1]])
