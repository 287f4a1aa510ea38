"""The folder of one engine host, `servers/<id>` in the runtime folder: all that a host and runs tell each other.

    lock            held by the host and its guardian (flock): the folder is alive exactly while it is
    spec.json       what the host is for; written before it is started
    events          JSON lines, appended by the host alone; who opened it can read them after the folder is gone
    leases/         a note (notes.py) for each run that uses the server
    count           how many leases there ever were
    stop            somebody asked the host to stop: once it has no lease, or `now`
    sleep           somebody asked the server to sleep; gone as soon as there is a lease again
    api.sock        the server's socket, beside others of vLLM's own

Leases are given, and a stop or sleep is asked for, under the mutex of the runtime folder alone. Standard library only.
"""

import contextlib
import json
import os
import time
from enum import StrEnum
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from resources.engine.notes import Note, OwnNote, is_locked, live_notes
from resources.engine.processes import Identity, Record


class Rest(StrEnum):
    """What a server that was up does when it does not answer. Only one that is asleep has given its devices back."""

    FALLING_ASLEEP = "falling asleep"
    ASLEEP = "asleep"
    WAKING = "waking"


class Told(NamedTuple):
    """What a host has said so far."""

    host: Identity | None = None
    record: Record | None = None
    started_at: float | None = None
    load_seconds: float | None = None
    end: str | None = None  # why the server is gone, in words
    crashed: bool = False  # it went by itself
    idle_at: float | None = None
    idle_until: float | None = None
    rest: Rest | None = None
    wake_seconds: float | None = None

    @property
    def ready(self) -> bool:
        return self.load_seconds is not None and self.end is None and self.rest is None


class Events:
    """The events of a host, read as they come. Open from the first look on, so that none is missed at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.told = Told()
        self._file: FileIO | None = None
        self._rest = b""

    def read(self) -> Told:
        with contextlib.suppress(OSError):
            if self._file is None:
                self._file = FileIO(self.path)
            while part := self._file.read(65536):
                self._rest += part
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # not one of ours, or cut short
                self._take(json.loads(line))
        return self.told

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _take(self, event: dict[str, Any]) -> None:
        told = self.told
        match event["event"]:
            case "host":
                told = told._replace(host=Identity(*event["identity"]))
            case "started":
                told = told._replace(record=Record(*event["record"]), started_at=event["at"])
            case "ready":
                told = told._replace(load_seconds=event["load_seconds"])
            case "idle":
                told = told._replace(idle_at=event["at"], idle_until=event["until"])
            case "leased":
                told = told._replace(idle_at=None, idle_until=None)
            case "rest":
                told = told._replace(rest=Rest(event["what"]))
            case "woken":
                told = told._replace(rest=None, wake_seconds=event["wake_seconds"])
            case "ended":
                told = told._replace(end=event["reason"], crashed=event["crashed"])
        self.told = told


class HostFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket_path = path / "api.sock"
        self.lock_path = path / "lock"
        self.leases_dir = path / "leases"
        self._stop = path / "stop"
        self._sleep = path / "sleep"
        self._count = path / "count"
        self.events = Events(path / "events")

    @property
    def id(self) -> str:
        return self.path.name

    # --- What it is ---------------------------------------------------------------------------------------------------

    def describe(self, **spec: Any) -> None:
        """Make the folder one of a host that is about to be started."""
        self.leases_dir.mkdir(mode=0o700)
        self.events.path.touch(mode=0o600)
        self.events.read()  # open: what a host says that ends at once, folder and all, is heard
        self._write("spec.json", json.dumps(spec))

    @property
    def spec(self) -> dict[str, Any]:
        """model, settings, devices, log, created_at; empty where they were never written."""
        try:
            spec = json.loads((self.path / "spec.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return spec if isinstance(spec, dict) else {}

    @property
    def is_alive(self) -> bool:
        return is_locked(self.lock_path)

    # --- Leases -------------------------------------------------------------------------------------------------------

    def lease(self, **content: Any) -> OwnNote:
        """A lease of this process; its name is its number. It wakes a server that sleeps. Under the mutex."""
        number = self.lease_count + 1
        self._write("count", str(number))
        note = OwnNote(self.leases_dir / f"{number:06}", since=time.time(), **content)
        self._sleep.unlink(missing_ok=True)
        return note

    @property
    def lease_count(self) -> int:
        """How many there ever were."""
        try:
            return int(self._count.read_text())
        except (OSError, ValueError):
            return 0

    def leases(self) -> list[Note]:
        """The leases that hold."""
        return live_notes(self.leases_dir)

    # --- Sleeping and stopping ----------------------------------------------------------------------------------------

    def ask_to_sleep(self) -> None:
        """For a host without a lease whose spec says `sleeps`. Under the mutex."""
        with contextlib.suppress(FileNotFoundError):
            self._write("sleep", "")

    @property
    def is_asked_to_sleep(self) -> bool:
        return self._sleep.exists()

    @property
    def is_asleep(self) -> bool:
        """Its devices are another's to take, until it has a lease. Under the mutex."""
        with contextlib.closing(self.events) as events:
            told = events.read()
        return told.rest is Rest.ASLEEP and told.end is None and self.is_asked_to_sleep and not self.is_stopping

    def ask_to_stop(self, *, now: bool = False) -> None:
        """No lease is given any more; the host stops when the last one ends, or at once. Under the mutex."""
        with contextlib.suppress(FileNotFoundError):
            self._write("stop", "now" if now else "")

    @property
    def is_stopping(self) -> bool:
        return self._stop.exists()

    @property
    def stops_now(self) -> bool:
        with contextlib.suppress(OSError):
            return self._stop.read_text() == "now"
        return False

    def _write(self, name: str, text: str) -> None:
        """Whole or not at all. Not synced to disk: after a power cut there is nothing to know."""
        new = self.path / f".{name}.{os.getpid()}"
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            out.write(text)
        new.replace(self.path / name)
