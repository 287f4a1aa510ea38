"""The circuit breaker: tells one request's bad luck from an engine that is out of reach, and waits for the engine."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from resources.engine.protocol import EngineRequest, EngineResponse, TransportFailure
from resources.errors import EngineDown

Ask = Callable[[EngineRequest], Awaitable[EngineResponse]]

TRIPS_AFTER = 5
PROBE_SECONDS = 60.0


class EngineGone(Exception):
    """An engine that we own is not there any more, or does not answer any more; says why."""


class Breaker:
    """Closed, requests go through and a failure is the request's own. Open, nothing is sent but one probe at a time.

    It opens when no connection comes about, after TRIPS_AFTER failures in a row with no answer in between, and when a
    request has used up its attempts and a probe fails as well. So a line gets an error row only if the engine has
    answered something else since: an engine that is down never becomes a million error rows. A probe is the smallest
    request of the kind that failed; any answer to it but 429 and 5xx closes the breaker, and so does the answer to a
    request that was under way. After `outage_seconds` without one, the run fails with its rows uncommitted.
    """

    def __init__(self, ask: Ask, outage_seconds: float, died: Callable[[], str | None]) -> None:
        self._ask = ask
        self._limit = outage_seconds
        self._died = died
        self._closed = asyncio.Event()
        self._closed.set()
        self._opened = asyncio.Event()
        self._probing = asyncio.Lock()
        self._answered_at = 0.0
        self._failures = 0
        self._why = ""

    @property
    def is_closed(self) -> bool:
        return self._closed.is_set()

    async def passage(self) -> None:
        """Wait until the breaker is closed."""
        await self._closed.wait()

    def answered(self) -> None:
        """The engine answered a request."""
        self._answered_at, self._failures = time.monotonic(), 0
        if not self._closed.is_set():
            self._opened.clear()
            self._closed.set()

    def failed(self, request: EngineRequest, why: str, *, unreachable: bool = False) -> None:
        """A request failed in a way that may be the engine's.

        Raises:
            EngineGone: the engine is ours, and dead.
        """
        self._failures += 1
        self._sample, self._why = request, why
        self._see_whether_it_lives()
        if unreachable or self._failures >= TRIPS_AFTER:
            self._open()

    async def is_there(self, request: EngineRequest) -> bool:
        """Whether the engine answers others from now on, after this request has failed. Asks, where nothing tells.

        Opens the breaker where it does not."""
        failed_at = time.monotonic()
        async with self._probing:
            if self._answered_at > failed_at:
                return True
            self._sample = request
            if not await self._probe():
                self._open()
            return self.is_closed

    async def prove(self, request: EngineRequest) -> None:
        """See an answer to the smallest request of that kind, before anything is blamed for what the engine does."""
        self._sample = request
        async with self._probing:
            if not await self._probe():
                self._open()
        await self.passage()

    async def watch(self) -> None:
        """Probe while the breaker is open, at growing distances.

        Raises:
            EngineGone: the engine is ours, and dead.
            EngineDown: it was open for too long.
        """
        while True:
            await self._opened.wait()
            opened = time.monotonic()
            while not self.is_closed:
                async with self._probing:
                    if await self._probe():
                        break
                away = time.monotonic() - opened
                if away > self._limit:
                    raise EngineDown(f"The engine has been out of reach for {self._limit:g} s ({self._why}).")
                await asyncio.sleep(min(max(away / 2, 0.5), self._limit / 4, 16) * random.uniform(0.5, 1))

    def _open(self) -> None:
        self._closed.clear()
        self._opened.set()

    def _see_whether_it_lives(self) -> None:
        reason = self._died()
        if reason:
            raise EngineGone(reason)

    async def _probe(self) -> bool:
        self._see_whether_it_lives()
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                response = await self._ask(smallest_request(self._sample))
        except TimeoutError:
            self._why = "no answer in time"
        except TransportFailure as failure:
            self._why = str(failure)
        else:
            if response.status < 500 and response.status != 429:
                self.answered()
                return True
            self._why = f"status {response.status}"
        self._see_whether_it_lives()
        return False


_SMALLEST: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 1},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 16},
    "/v1/embeddings": {"input": "Hi"},
    "/v1/score": {"text_1": "Hi", "text_2": "Hi"},
    "/score": {"text_1": "Hi", "text_2": "Hi"},
}
_SMALLEST_OTHER = {"query": "Hi", "documents": ["Hi"]}


class _Named(msgspec.Struct):
    model: Any = None


_decode_named = msgspec.json.Decoder(_Named).decode


def smallest_request(like: EngineRequest) -> EngineRequest:
    """The least that can be asked at the same endpoint of the same model."""
    body = {"model": _decode_named(like.body).model, **_SMALLEST.get(like.url, _SMALLEST_OTHER)}
    return EngineRequest(0, like.url, msgspec.json.encode(body), f"{like.request_id}-probe")
