"""The one method that every engine has, and what comes with an engine that is up."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import msgspec


class EngineRequest(msgspec.Struct, frozen=True, gc=False):
    """One request as the engine gets it: endpoint path, JSON body as bytes, and an id for its log."""

    line: int
    url: str
    body: bytes
    request_id: str


class EngineResponse(msgspec.Struct, frozen=True, gc=False):
    """What came back: HTTP status, JSON body as bytes, seconds to wait where the engine asked for it."""

    status: int
    body: bytes
    request_id: str
    retry_after: float | None = None


class TransportFailure(Exception):
    """No whole response came back: refused, reset, cut short, or not JSON. Worth another try.

    `unreachable` where not even a connection came about: that says nothing about the request.
    """

    def __init__(self, message: str, *, unreachable: bool = False) -> None:
        super().__init__(message)
        self.unreachable = unreachable


class Engine(Protocol):
    """Answers one request.

    Promise: any status the engine gives comes back as an EngineResponse; TransportFailure where none came.
    A call that is cancelled leaves nothing running on our side.
    """

    async def ask(self, request: EngineRequest) -> EngineResponse: ...


class Load(msgspec.Struct, frozen=True):
    """What an engine says of itself: requests running and waiting now, tokens since its process started."""

    running: int
    waiting: int
    prompt_tokens: int
    completion_tokens: int


@runtime_checkable
class Metered(Protocol):
    """An engine that can tell its load. None where it does not."""

    async def load(self) -> Load | None: ...


@dataclass(frozen=True)
class RunningEngine:
    """An engine that is up. `connect` opens it inside an event loop.

    For an engine that we own: `died` tells why it is gone, None while it lives; `restart` gets another one that nobody
    else uses, which takes minutes; it gets a callback for words about how far it is, and raises EngineStartFailed or
    BatchStopped. `shared` tells whether others use it too, or have. `warm` is one that was up when we came, `woken`
    one that slept then (and took `load_seconds` to wake), and `replaced` are the models that made room for it.
    """

    connect: Callable[[], AbstractAsyncContextManager[Engine]]
    load_seconds: float = 0.0
    died: Callable[[], str | None] = lambda: None
    restart: Callable[[Callable[[str], None]], None] | None = None
    shared: Callable[[], bool] = lambda: False
    warm: bool = False
    woken: bool = False
    replaced: tuple[str, ...] = ()
    in_process: bool = False
    most_running: int | None = None
    """How many requests it runs at once, where that is known."""
