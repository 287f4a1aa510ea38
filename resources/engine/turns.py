"""Who gets a lease on which server, and who waits for what.

Runs decide, not a service: each looks a few times a second, under the mutex. First come, first served: who waits has
set its mind on devices, and nobody who came later gets a lease or starts a server on them. So a model that is warm
cannot keep another one out, and a run that came for the warm model before that is not sent away.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from resources.engine.host_folder import HostFolder
from resources.engine.hosts import Hosts, Launch
from resources.engine.notes import Note, OwnNote, mutex

LOOK_SECONDS = 0.1


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
    alone_at_first: bool
    started: bool = False
    replaced: list[str] = field(default_factory=list)

    @property
    def was_alone(self) -> bool:
        """Nobody else has used the server since we do."""
        return self.alone_at_first and self.folder.lease_count in (int(self.note.path.name), 0)

    def release(self) -> None:
        """The host finds the note dead, and reads in it how long to keep the server."""
        self.note.withdraw(remove=False)
        self.folder.events.close()


def lease(hosts: Hosts, wanted: Wanted, launch: Launch, pause: Callable[[str], None]) -> Held:
    """A lease on a server as wanted, started where there is none; it may be loading still.

    `pause` is called while others are in the way, with words about who; what it raises ends the waiting.
    """
    ticket: OwnNote | None = None
    replaced: list[str] = []
    since = time.time()
    try:
        while True:
            with mutex(hosts.mutex_path):
                decision = _Decision(hosts, wanted, ticket.path.name if ticket else None)
                found = decision.take(launch)
                if found:
                    found.replaced = replaced
                    return found
                replaced += [model for model in decision.stopped if model not in replaced]
                if ticket is None:
                    ticket = OwnNote(hosts.queue_dir / decision.number, **decision.ticket(), since=since)
                else:
                    ticket.write(**decision.ticket(), since=since)
            pause(decision.why)
            time.sleep(LOOK_SECONDS)
    finally:
        if ticket:
            ticket.withdraw()


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

    def take(self, launch: Launch) -> Held | None:
        found = sorted(filter(self._is_as_wanted, self.running), key=lambda folder: folder.is_asleep)
        same = found[0] if found else None
        if same and not same.is_asleep:
            return self._join(same)
        ahead = next((n for n in self._before if n.content.get("settings") == self._wanted.settings), None)
        if ahead:  # it will start the server that is ours, too
            self._place = ahead.content["devices"]
            return self._wait(f"{_name(ahead)}, which came first and waits for the same model")
        self._place = self._best_devices()
        if same and (self._holders(self._place) or not self._holders(self._devices(same))):
            self._place = self._devices(same)  # it wakes where it was
        else:
            same = None
        in_line = next((n for n in self._before if set(n.content.get("devices", ())) & set(self._place)), None)
        if in_line:
            return self._wait(f"its turn after {_name(in_line)}, which waits for model {in_line.content.get('model')}")
        wanted = self._wanted
        for folder in self.running:  # it was changed since, or is wanted elsewhere
            if folder is not same and folder.is_asleep and self._specs[folder.id].get("model") == wanted.model:
                folder.ask_to_stop()
        in_the_way = self._holders(self._place)
        for folder in in_the_way:
            if not (folder.is_stopping or folder.is_asked_to_sleep or folder.leases()):
                self._make_room(folder)
        if in_the_way:
            return self._wait(" and ".join(map(self._holder, in_the_way)))
        if same:  # its host takes the devices: from the lease on it is in everybody's way
            held = _held(same, self._note(same), alone=True) if self._hosts.are_free(self._place) else None
        else:
            started = self._hosts.start(wanted.model, wanted.settings, self._place, launch, self._note)
            held = _held(*started, alone=True, started=True) if started else None
        return held or self._wait(f"device {', '.join(self._place)}, which another process holds")

    def _join(self, folder: HostFolder) -> Held | None:
        self._place = self._devices(folder)
        leases = folder.leases()
        if self._taken & set(self._place):
            return self._wait(f"its turn after {_name(self._before[0])}")
        if leases and (self._wanted.alone or any(note.content.get("alone") for note in leases)):
            return self._wait(self._holder(folder) + ", alone with it" * (not self._wanted.alone))
        return _held(folder, self._note(folder), alone=not leases)

    def _make_room(self, folder: HostFolder) -> None:
        """It sleeps where it can, but for one of this very model: that was changed since, and is of no use any more."""
        spec = self._specs[folder.id]
        if spec.get("sleeps") and spec["model"] != self._wanted.model:
            folder.ask_to_sleep()
        else:
            folder.ask_to_stop()
        self.stopped.append(spec.get("model", "?"))

    def _note(self, folder: HostFolder) -> OwnNote:
        wanted = self._wanted
        return folder.lease(who=wanted.who, alone=wanted.alone, keep_alive=wanted.keep_alive)

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
            folder = next(iter(self._holders([device])), None)
            if folder is None:
                state = (0, 0.0)
            elif folder.leases():
                state = (3, 0.0)
            elif folder.is_stopping or folder.is_asked_to_sleep:
                state = (1, 0.0)
            else:
                with contextlib.closing(folder.events) as events:
                    state = (2, events.read().idle_at or time.time())  # none: since just now
            return device in self._taken, *state, device not in self._place

        return sorted(self._wanted.devices, key=rank)[: self._wanted.needed]

    def _holders(self, devices: Sequence[str]) -> list[HostFolder]:
        """The hosts on these devices. One that sleeps is on none; one that is stopping is until it is gone."""
        return [f for f in self.running if set(self._devices(f)) & set(devices) and not f.is_asleep]

    def _devices(self, folder: HostFolder) -> list[str]:
        return list(self._specs[folder.id].get("devices", ()))

    def _holder(self, folder: HostFolder) -> str:
        spec = self._specs[folder.id]
        who = ", ".join(_name(note) for note in folder.leases())
        doing = f"in use by {who}" if who else "which makes room"
        return f"device {', '.join(spec.get('devices', ()))}: model {spec.get('model')}, {doing}"


def _held(folder: HostFolder, note: OwnNote, *, alone: bool, started: bool = False) -> Held:
    folder.events.read()  # opened now: they can be read after the folder is gone
    return Held(folder, note, alone, started)


def _is_over(folder: HostFolder) -> bool:
    with contextlib.closing(folder.events) as events:
        told = events.read()
    return told.end is not None or (told.host is not None and told.host.known_dead)


def _name(note: Note) -> str:
    who, identity = note.content.get("who", "a run"), note.content.get("identity", (None, None))
    return f"{who} (process {identity[1]})"
