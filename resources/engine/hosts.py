"""All engine hosts of this machine's runtime folder: who gets a lease, who waits for what, what is stopped for whom.

    hosts.lock          the mutex: every decision is taken under it, in moments
    servers/<id>/       the folder of a host (host_folder.py)
    devices/<id>.lock   held by the host on that device
    queue/<n>           a note (notes.py) of each run that waits: for what, and for which devices

Runs decide, not a service: each looks a few times a second. First come, first served: who waits has set its mind on
devices, and nobody who came later gets a lease or starts a server on them. So a model that is warm cannot keep another
one out, and a run that came for the warm model before that is not sent away.
"""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from resources.engine import host
from resources.engine.host_folder import HostFolder, Told
from resources.engine.notes import Note, OwnNote, live_notes, mutex, read_notes, try_lock
from resources.engine.processes import end_server
from resources.errors import SettingsError

LOOK_SECONDS = 0.1
_ROOT = Path(__file__).resolve().parents[2]
_START = f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from resources.engine import host; host.main(sys.argv[3:])"


@dataclass(frozen=True)
class Wanted:
    """A server that a run asks for.

    `settings` names all that decides what it is: a host with others is another model to us. `devices` are those that
    may be taken, the best first, and `needed` how many. `not_host` is one that has proven to be no good. Who asks
    `alone` gets a server that nobody else uses, and `at_once` puts it before those who wait already.
    """

    model: str
    settings: str
    devices: Sequence[str]
    needed: int
    who: str
    keep_alive: float
    alone: bool = False
    at_once: bool = False
    not_host: str | None = None


@dataclass
class Held:
    """A lease. `started` where the server was started for it, and `replaced` are the models that made room."""

    folder: HostFolder
    note: OwnNote
    number: int
    alone_at_first: bool
    started: bool = False
    replaced: list[str] = field(default_factory=list)

    @property
    def was_alone(self) -> bool:
        """Nobody else has used the server since we do."""
        return self.alone_at_first and self.folder.lease_count in (self.number, 0)

    def release(self) -> None:
        """The host finds the note dead, and reads in it how long to keep the server."""
        self.note.withdraw(remove=False)
        self.folder.events.close()


@dataclass(frozen=True)
class HostStatus:
    """What a host is doing; for people and, by `as_dict`, for programs. Times are Unix times, durations seconds."""

    id: str
    model: str
    devices: list[str]
    state: str  # loading, ready, stopping
    pid: int | None
    since: float
    log: str
    load_seconds: float | None
    leases: list[dict[str, Any]]
    idle_for: float | None
    stops_in: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Hosts:
    """The hosts below a runtime folder, which is private and short enough for sockets.

    Raises:
        SettingsError: it belongs to somebody else.
    """

    def __init__(self, runtime_dir: Path) -> None:
        root = private(runtime_dir.absolute())
        self.servers_dir, self._devices_dir = private(root / "servers"), private(root / "devices")
        self._queue_dir = private(root / "queue")
        self._mutex = root / "hosts.lock"

    # --- For a run ----------------------------------------------------------------------------------------------------

    def lease(
        self,
        wanted: Wanted,
        launch: Callable[[HostFolder, list[str]], dict[str, Any]],
        pause: Callable[[str], None],
    ) -> Held:
        """A lease on a server as wanted, started where there is none; it may be loading still.

        `launch` gives the rest of `host.Spec` for a folder and the devices. `pause` is called while others are in the
        way, with words about who; what it raises ends the waiting.
        """
        ticket: OwnNote | None = None
        replaced: list[str] = []
        try:
            while True:
                with mutex(self._mutex):
                    decision = _Decision(self, wanted, ticket.path.name if ticket else None)
                    found = decision.take(launch)
                    if found:
                        found.replaced = replaced
                        return found
                    replaced += [model for model in decision.stopped if model not in replaced]
                    said = decision.ticket()
                    if ticket is None:
                        ticket = OwnNote(self._queue_dir / decision.number, **said, since=time.time())
                        since = time.time()
                    else:
                        ticket.write(**said, since=since)
                pause(decision.why)
                time.sleep(LOOK_SECONDS)
        finally:
            if ticket:
                ticket.withdraw()

    def reap(self) -> None:
        """End what hosts left behind that are dead, guardian and all."""
        with mutex(self._mutex):
            self.alive()

    # --- For people ---------------------------------------------------------------------------------------------------

    def status(self) -> list[HostStatus]:
        """The hosts that live, as they are now."""
        found = []
        for folder in self._folders():
            spec = folder.spec
            if folder.is_alive and spec:
                with contextlib.closing(folder.events) as events:
                    found.append(_status(folder, spec, events.read()))
        return sorted(found, key=lambda status: status.since)

    def waiting(self) -> list[dict[str, Any]]:
        """Who waits: model, who, pid, since, devices; the next one first."""
        return [_public(note) for note in live_notes(self._queue_dir)]

    def warm(self) -> set[str]:
        """The `settings` of the servers that are up or coming up."""
        return {
            folder.spec.get("settings", "") for folder in self._folders() if folder.is_alive and not folder.is_stopping
        }

    def stop(self, ids: Sequence[str], *, now: bool = False) -> None:
        """Ask hosts to stop: when the last run has let go, or `now`."""
        with mutex(self._mutex):
            for folder in self._folders():
                if folder.id in ids:
                    folder.ask_to_stop(now=now)

    def stop_idle(self) -> list[str]:
        """Ask the hosts to stop that no run uses; their models."""
        with mutex(self._mutex):
            idle = [folder for folder in self._folders() if folder.is_alive and not folder.leases()]
            for folder in idle:
                folder.ask_to_stop()
        return [folder.spec.get("model", folder.id) for folder in idle]

    # --- Under the mutex ----------------------------------------------------------------------------------------------

    def alive(self) -> list[HostFolder]:
        """The hosts that live. What dead ones left is ended and removed on the way."""
        found = []
        for folder in self._folders():
            if folder.is_alive:
                found.append(folder)
                continue
            with contextlib.closing(folder.events) as events:
                record = events.read().record
            if record:
                end_server(record)
            shutil.rmtree(folder.path, ignore_errors=True)
        return found

    def tickets(self) -> list[Note]:
        found = read_notes(self._queue_dir)
        for note in found:
            if not note.live:
                note.path.unlink(missing_ok=True)
        return [note for note in found if note.live]

    def start(
        self, wanted: Wanted, devices: list[str], launch: Callable[[HostFolder, list[str]], dict[str, Any]]
    ) -> Held | None:
        """Start a host on devices that are free, with a lease on it; None where somebody holds one of them."""
        locks: list[int] = []
        folder = HostFolder(self.servers_dir / secrets.token_hex(4))
        try:
            for device in sorted(devices):
                lock = try_lock(self._devices_dir / f"{device}.lock")
                if lock is None:
                    return None
                locks.append(lock)
            folder.path.mkdir(mode=0o700)
            own = try_lock(folder.lock_path)
            assert own is not None, "a folder that nobody knows of"
            locks.append(own)
            spec = launch(folder, devices)
            public = {"model": wanted.model, "settings": wanted.settings, "devices": devices, "log": spec["log"]}
            folder.describe(**public, created_at=time.time())
            held = lease(folder, wanted, alone=True, started=True)
            whole = host.Spec(folder=str(folder.path), mutex=str(self._mutex), **spec)  # type: ignore[typeddict-item]
            try:
                _launch(whole, locks, wanted.model)
            except BaseException:
                held.release()
                raise
        except BaseException:
            shutil.rmtree(folder.path, ignore_errors=True)
            raise
        finally:
            for lock in locks:
                os.close(lock)  # the host has them open; not unlocked, which would be for both
        return held

    def _folders(self) -> list[HostFolder]:
        return [HostFolder(path) for path in sorted(self.servers_dir.iterdir()) if path.is_dir()]


def lease(folder: HostFolder, wanted: Wanted, *, alone: bool, started: bool = False) -> Held:
    note, number = folder.lease(who=wanted.who, alone=wanted.alone, keep_alive=wanted.keep_alive)
    folder.events.read()  # opened now: they can be read after the folder is gone
    return Held(folder, note, number, alone, started)


class _Decision:
    """One look at everything, by one run, under the mutex: a lease, or whom it waits for and on which devices."""

    def __init__(self, hosts: Hosts, wanted: Wanted, ticket: str | None) -> None:
        self._hosts, self._wanted = hosts, wanted
        self.running = hosts.alive()
        self._specs = {folder.id: folder.spec for folder in self.running}
        tickets = hosts.tickets()
        last = max((int(note.path.name[2:]) for note in tickets), default=0)
        self.number = ticket or f"{0 if wanted.at_once else 1}-{last + 1:06}"
        self._before = [note for note in tickets if note.path.name < self.number]
        self._taken = {device for note in self._before for device in note.content.get("devices", ())}
        mine = next((note.content for note in tickets if note.path.name == ticket), {})
        self._place: list[str] = mine.get("devices", [])
        self.stopped: list[str] = []
        self.why = ""

    def ticket(self) -> dict[str, Any]:
        wanted = self._wanted
        said = {"model": wanted.model, "settings": wanted.settings, "who": wanted.who, "alone": wanted.alone}
        return {**said, "devices": self._place, "why": self.why}

    def take(self, launch: Callable[[HostFolder, list[str]], dict[str, Any]]) -> Held | None:
        same = next((folder for folder in self.running if self._is_as_wanted(folder)), None)
        if same:
            return self._join(same)
        ahead = next((n for n in self._before if n.content.get("settings") == self._wanted.settings), None)
        if ahead:  # it will start the server that is ours, too
            self._place = ahead.content["devices"]
            return self._wait(f"{_name(ahead)}, which came first and waits for the same model")
        self._place = self._best_devices()
        in_line = next((n for n in self._before if set(n.content.get("devices", ())) & set(self._place)), None)
        if in_line:
            return self._wait(f"its turn after {_name(in_line)}, which waits for model {in_line.content.get('model')}")
        in_the_way = [folder for folder in self.running if set(self._devices(folder)) & set(self._place)]
        for folder in in_the_way:
            if not folder.is_stopping and not folder.leases():
                folder.ask_to_stop()
                self.stopped.append(self._specs[folder.id].get("model", "?"))
        if in_the_way:
            return self._wait(" and ".join(map(self._holder, in_the_way)))
        held = self._hosts.start(self._wanted, self._place, launch)
        return held or self._wait(f"device {', '.join(self._place)}, which another process holds")

    def _join(self, folder: HostFolder) -> Held | None:
        self._place = self._devices(folder)
        leases = folder.leases()
        if self._taken & set(self._place):
            return self._wait(f"its turn after {_name(self._before[0])}")
        if leases and (self._wanted.alone or any(note.content.get("alone") for note in leases)):
            return self._wait(self._holder(folder) + ", alone with it" * (not self._wanted.alone))
        return lease(folder, self._wanted, alone=not leases)

    def _wait(self, for_what: str) -> Held | None:
        self.why = for_what
        return None

    def _is_as_wanted(self, folder: HostFolder) -> bool:
        return (
            self._specs[folder.id].get("settings") == self._wanted.settings
            and folder.id != self._wanted.not_host
            and not folder.is_stopping
            and set(self._devices(folder)) <= set(self._wanted.devices)
            and not _is_over(folder)
        )

    def _best_devices(self) -> list[str]:
        """Free ones, then those that are about to be, then idle ones (idle for the longest first), then any."""

        def rank(device: str) -> tuple[object, ...]:
            folder = next((f for f in self.running if device in self._devices(f)), None)
            if folder is None:
                state = (0, 0.0)
            elif folder.leases():
                state = (3, 0.0)
            elif folder.is_stopping:
                state = (1, 0.0)
            else:
                with contextlib.closing(folder.events) as events:
                    state = (2, events.read().idle_at or time.time())  # none: since just now
            return device in self._taken, *state, device not in self._place

        return sorted(self._wanted.devices, key=rank)[: self._wanted.needed]

    def _devices(self, folder: HostFolder) -> list[str]:
        return list(self._specs[folder.id].get("devices", ()))

    def _holder(self, folder: HostFolder) -> str:
        spec = self._specs[folder.id]
        who = ", ".join(_name(note) for note in folder.leases())
        doing = f"in use by {who}" if who else "which is stopping"
        return f"device {', '.join(spec.get('devices', ()))}: model {spec.get('model')}, {doing}"


def _is_over(folder: HostFolder) -> bool:
    with contextlib.closing(folder.events) as events:
        told = events.read()
    return told.end is not None or (told.host is not None and told.host.known_dead)


def _name(note: Note) -> str:
    who, identity = note.content.get("who", "a run"), note.content.get("identity", (None, None))
    return f"{who} (process {identity[1]})"


def _public(note: Note) -> dict[str, Any]:
    shown = {name: value for name, value in note.content.items() if name not in ("identity", "settings")}
    return {**shown, "pid": note.content.get("identity", (None, None))[1]}


def _status(folder: HostFolder, spec: dict[str, Any], told: Told) -> HostStatus:
    leases = [_public(note) for note in folder.leases()]
    idle = told.ready and not leases and told.idle_at is not None
    now = time.time()
    return HostStatus(
        id=folder.id,
        model=spec["model"],
        devices=spec["devices"],
        state="stopping" if folder.is_stopping or told.end else "ready" if told.ready else "loading",
        pid=told.host.pid if told.host else None,
        since=spec["created_at"],
        log=spec["log"],
        load_seconds=told.load_seconds,
        leases=leases,
        idle_for=now - told.idle_at if idle and told.idle_at else None,
        stops_in=max(0.0, told.idle_until - now) if idle and told.idle_until else None,
    )


def _launch(spec: host.Spec, locks: list[int], model: str) -> None:
    """Start the host; it is nobody's child when this returns."""
    # -I -S, and no environment: what the host has in memory for hours is no secret of ours.
    command = [sys.executable, "-I", "-S", "-c", _START, spec["folder"], model, *map(str, locks)]
    process = subprocess.Popen(
        command,
        env={},
        cwd="/",
        pass_fds=locks,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with process:
        assert process.stdin
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(spec).encode() + b"\n")
            process.stdin.close()


def private(folder: Path) -> Path:
    """Make the folder, or see to it that it is ours alone."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if folder.is_symlink() or found.st_uid != os.getuid():
        raise SettingsError(f"{folder} belongs to somebody else; set VLLM_BATCH_RUNTIME_DIR to a folder of your own.")
    if found.st_mode & 0o077:
        folder.chmod(0o700)
    return folder
