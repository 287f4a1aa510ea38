"""The one method that every engine has."""

from typing import Protocol

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
