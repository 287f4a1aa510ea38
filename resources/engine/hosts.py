"""All engine hosts of this machine's runtime folder: what they are doing, and how they are started and stopped.

    hosts.lock          the mutex: every decision is taken under it, in moments
    servers/<id>/       the folder of a host (host_folder.py)
    devices/<id>.lock   held by the host on that device, but not while its server sleeps
    queue/<n>           a note (notes.py) of each run that waits: for what, and for which devices

`turns.py` tells who gets a lease when.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resources.engine import host
from resources.engine.host_folder import HostFolder, Told
from resources.engine.notes import Note, OwnNote, live_notes, mutex, read_notes, try_lock
from resources.engine.processes import end_server
from resources.filesystem import private_folder

Launch = Callable[[HostFolder, list[str]], dict[str, Any]]
"""The rest of `host.Spec` for a folder and the devices of a host."""

_ROOT = Path(__file__).resolve().parents[2]
_START = f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from resources.engine import host; host.main(sys.argv[3:])"


@dataclass(frozen=True)
class HostStatus:
    """What a host is doing; for people and, by `as_dict`, for programs. Times are Unix times, durations seconds."""

    id: str
    model: str
    devices: list[str]
    state: str  # loading, ready, falling asleep, asleep, waking, stopping
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
        root = private_folder(runtime_dir.absolute())
        self.servers_dir, self._devices_dir = private_folder(root / "servers"), private_folder(root / "devices")
        self.queue_dir = private_folder(root / "queue")
        self.mutex_path = root / "hosts.lock"

    def reap(self) -> None:
        """End what hosts left behind that are dead, guardian and all."""
        with mutex(self.mutex_path):
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
        return [_public(note) for note in live_notes(self.queue_dir)]

    def states(self) -> dict[str, str]:
        """By their `settings` the servers that are up or coming up (`warm`), and those that are `asleep`."""
        living = [folder for folder in self._folders() if folder.is_alive and not folder.is_stopping]
        found = sorted(((folder.is_asleep, folder.spec.get("settings", "")) for folder in living), reverse=True)
        return {settings: "asleep" if asleep else "warm" for asleep, settings in found}  # of two the warm one

    def stop(self, ids: Sequence[str], *, now: bool = False) -> None:
        """Ask hosts to stop: when the last run has let go, or `now`."""
        with mutex(self.mutex_path):
            for folder in self._folders():
                if folder.id in ids:
                    folder.ask_to_stop(now=now)

    def stop_idle(self) -> list[str]:
        """Ask the hosts to stop that no run uses; their models."""
        with mutex(self.mutex_path):
            idle = [folder for folder in self._folders() if folder.is_alive and not folder.leases()]
            for folder in idle:
                folder.ask_to_stop()
        return [folder.spec.get("model", folder.id) for folder in idle]

    def stop_asleep(self, devices: Sequence[str]) -> list[str]:
        """Ask the hosts to stop whose server sleeps and was on one of these devices; their models."""
        with mutex(self.mutex_path):
            asleep = [f for f in self._folders() if f.is_asleep and set(f.spec.get("devices", ())) & set(devices)]
            for folder in asleep:
                folder.ask_to_stop()
        return [folder.spec.get("model", folder.id) for folder in asleep]

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
        found = read_notes(self.queue_dir)
        for note in found:
            if not note.live:
                note.path.unlink(missing_ok=True)
        return [note for note in found if note.live]

    def start(
        self,
        model: str,
        settings: str,
        devices: list[str],
        launch: Launch,
        lease: Callable[[HostFolder], OwnNote],
    ) -> tuple[HostFolder, OwnNote] | None:
        """Start a host on devices that are free, with a lease on it; None where somebody holds one of them."""
        locks = self._lock(devices)
        if locks is None:
            return None
        folder = HostFolder(self.servers_dir / secrets.token_hex(4))
        try:
            folder.path.mkdir(mode=0o700)
            own = try_lock(folder.lock_path)
            assert own is not None, "a folder that nobody knows of"
            locks.append(own)
            spec = launch(folder, devices)
            public = {"model": model, "settings": settings, "devices": devices, "log": spec["log"]}
            folder.describe(**public, sleeps=spec["sleep_timeout"] > 0, created_at=time.time())
            note = lease(folder)  # before the host looks for one
            paths = {"folder": str(folder.path), "mutex": str(self.mutex_path), "queue": str(self.queue_dir)}
            whole = host.Spec(**paths, **spec)  # type: ignore[typeddict-item]
            try:
                _launch(whole, locks, model)
            except BaseException:
                note.withdraw()
                raise
        except BaseException:
            shutil.rmtree(folder.path, ignore_errors=True)
            raise
        finally:
            for lock in locks:
                os.close(lock)  # the host has them open; not unlocked, which would be for both
        return folder, note

    def are_free(self, devices: list[str]) -> bool:
        """Nobody holds one of them."""
        locks = self._lock(devices)
        for lock in locks or ():
            os.close(lock)
        return locks is not None

    def _lock(self, devices: list[str]) -> list[int] | None:
        """Their open, locked files, all or none."""
        locks: list[int] = []
        for device in sorted(devices):
            lock = try_lock(self._devices_dir / f"{device}.lock")
            if lock is None:
                for other in locks:
                    os.close(other)
                return None
            locks.append(lock)
        return locks

    def _folders(self) -> list[HostFolder]:
        return [HostFolder(path) for path in sorted(self.servers_dir.iterdir()) if path.is_dir()]


def _public(note: Note) -> dict[str, Any]:
    shown = {name: value for name, value in note.content.items() if name not in ("identity", "settings")}
    return {**shown, "pid": note.content.get("identity", (None, None))[1]}


def _status(folder: HostFolder, spec: dict[str, Any], told: Told) -> HostStatus:
    leases = [_public(note) for note in folder.leases()]
    idle = told.load_seconds is not None and not told.end and not leases and told.idle_at is not None
    now = time.time()
    return HostStatus(
        id=folder.id,
        model=spec["model"],
        devices=spec["devices"],
        state="stopping" if folder.is_stopping or told.end else told.rest or ("ready" if told.ready else "loading"),
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
