"""One event to one target: attempts until it is taken, refused or used up.

2xx is success. 408, 425, 429, 5xx and connection faults are tried again, with exponential backoff, jitter and
`Retry-After`; every other status is final. Redirects are not followed, and no proxy or netrc of the environment is
used: a connection goes to the address that was checked.
"""

import asyncio
import random
import ssl
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from resources.retry_after import retry_after_seconds
from resources.webhooks.address import AddressRefused, GuardedResolver, is_public
from resources.webhooks.signing import legacy_headers, signed_headers
from resources.webhooks.target import WebhookTarget, is_literal

AT_ONCE = 8
"""Attempts under way at one target."""
LONGEST_WAIT_SECONDS = 600.0
"""A receiver that asks for more is not waited for: the event becomes a dead letter, to be sent again later."""
_BACKOFF_SECONDS = 60.0
_KEEP_ALIVE_SECONDS = 4.0  # many servers let go after 5 s: let go first, not into a request on its way
_ANSWER_BYTES = 2048
_SHOWN_CHARACTERS = 200
_TRIED_AGAIN = (408, 425, 429)


@dataclass(frozen=True)
class Attempt:
    """`error` is None where it was taken; `status` is None where there was no answer."""

    at: str
    status: int | None
    seconds: float
    error: str | None = None


@dataclass
class Outcome:
    delivered: bool = False
    attempts: list[Attempt] = field(default_factory=list)
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Answer:
    attempt: Attempt
    is_final: bool
    retry_after: float | None = None


class Sender:
    """Use as `async with`; sends to many targets at once, and to each at most AT_ONCE events.

    `pause`, `resolver`, `allowed` and `tls` are seams for tests.
    """

    def __init__(
        self,
        *,
        pause: Callable[[float], Awaitable[Any]] = asyncio.sleep,
        resolver: Callable[[], AbstractResolver] = aiohttp.ThreadedResolver,
        allowed: Callable[[str], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._pause = pause
        self._resolver = resolver
        self._allowed = allowed
        self._tls = tls
        self._open = AsyncExitStack()
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        self._places: dict[str, asyncio.Semaphore] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._open.aclose()

    async def send(self, target: WebhookTarget, event_id: str, body: bytes, most: int | None = None) -> Outcome:
        """Send until it is over, at most `most` times (the target's `max_attempts`). Never raises for what a receiver
        or the network does."""
        outcome = Outcome()
        most = most or target.max_attempts
        place = self._places.setdefault(target.name, asyncio.Semaphore(AT_ONCE))
        while True:
            async with place:
                answer = await self._attempt(target, event_id, body)
            outcome.attempts.append(answer.attempt)
            outcome.error = answer.attempt.error
            if answer.attempt.error is None:
                outcome.delivered = True
                return outcome
            if answer.is_final or len(outcome.attempts) >= most:
                return outcome
            wait = _wait_seconds(len(outcome.attempts), answer.retry_after)
            if wait > LONGEST_WAIT_SECONDS:
                outcome.error = f"{outcome.error}; asks to be left alone for {wait:.0f} s"
                return outcome
            await self._pause(wait)

    async def _attempt(self, target: WebhookTarget, event_id: str, body: bytes) -> _Answer:
        """One POST, with the signature of this moment."""
        at, started = datetime.now(UTC), time.monotonic()
        status: int | None = None
        retry_after: float | None = None
        is_final = False
        try:
            url = URL(target.url.get_secret_value())
            self._refuse_literal(target, url)
            session = await self._session(target)
            headers = _headers(target, event_id, at, body)
            async with session.post(url, data=body, headers=headers, allow_redirects=False) as response:
                status = response.status
                error = await _read_error(response)
                retry_after = retry_after_seconds(response.headers.get("Retry-After"))
            is_final = not (status in _TRIED_AGAIN or status >= 500)
        except TimeoutError:
            error = f"no answer within {target.timeout:g} s"
        except (aiohttp.ClientError, OSError, ValueError) as fault:
            is_final = _is_refused(fault) or isinstance(fault, aiohttp.InvalidURL)
            error = _in_words(fault)
        if error is not None:
            error = target.redact(error)[:_SHOWN_CHARACTERS]
        attempt = Attempt(at.isoformat(timespec="milliseconds"), status, round(time.monotonic() - started, 3), error)
        return _Answer(attempt, is_final, retry_after)

    def _refuse_literal(self, target: WebhookTarget, url: URL) -> None:
        if not target.allow_insecure and is_literal(url.host or "") and not self._allowed(url.host or ""):
            raise AddressRefused("the target's address is not public")

    async def _session(self, target: WebhookTarget) -> aiohttp.ClientSession:
        """The connections to one target; each name is resolved when a connection is made, and for that one only."""
        if target.name not in self._sessions:
            resolver = self._resolver()
            if not target.allow_insecure:
                resolver = GuardedResolver(resolver, self._allowed)
            connector = aiohttp.TCPConnector(
                resolver=resolver,
                use_dns_cache=False,
                limit=AT_ONCE,
                keepalive_timeout=_KEEP_ALIVE_SECONDS,
                ssl=True if self._tls is None else self._tls,
            )
            self._sessions[target.name] = await self._open.enter_async_context(
                aiohttp.ClientSession(
                    connector=connector,
                    timeout=aiohttp.ClientTimeout(total=target.timeout),
                    cookie_jar=aiohttp.DummyCookieJar(),
                    auto_decompress=False,
                )
            )
        return self._sessions[target.name]


def _headers(target: WebhookTarget, event_id: str, at: datetime, body: bytes) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "User-Agent": "vllm-batch-pipelines"}
    headers |= signed_headers(target.keys(), event_id, at, body)
    if target.legacy_signature:
        headers |= legacy_headers(target.secret[0].get_secret_value(), at, body)
    return headers


async def _read_error(response: aiohttp.ClientResponse) -> str | None:
    """What was wrong, with the beginning of what the receiver said; None where it took the event."""
    if 200 <= response.status < 300:
        return None
    kind = "redirects are not followed" if 300 <= response.status < 400 else await _beginning(response)
    return f"HTTP {response.status}: {kind}" if kind else f"HTTP {response.status}"


async def _beginning(response: aiohttp.ClientResponse) -> str:
    """The first words of a body, however long it is and in however many pieces it comes, without signs that steer a
    terminal. A word that is cut is left out: it might be a part of a secret, which nobody would know again."""
    said = b""
    while len(said) < _ANSWER_BYTES and (piece := await response.content.read(_ANSWER_BYTES - len(said))):
        said += piece
    words = "".join(sign if sign.isprintable() else " " for sign in said.decode("utf-8", "replace")).split()
    return " ".join(words[:-1] if len(said) == _ANSWER_BYTES else words)


def _wait_seconds(attempt: int, retry_after: float | None) -> float:
    """1, 2, 4 ... seconds, at most a minute, half of it or half more by chance; never less than was asked for."""
    backoff: float = min(2.0 ** (attempt - 1), _BACKOFF_SECONDS) * random.uniform(0.5, 1.5)
    return backoff if retry_after is None else max(backoff, retry_after + random.uniform(0, 1))


def _is_refused(fault: BaseException | None) -> bool:
    """Whether the guard is what stands behind a fault of the connection."""
    while fault is not None:
        if isinstance(fault, AddressRefused):
            return True
        fault = fault.__cause__ or getattr(fault, "os_error", None)
    return False


def _in_words(fault: BaseException) -> str:
    if _is_refused(fault):
        return "refused: the target leads to an address that is not public (`allow_insecure` would take it)"
    return f"{type(fault).__name__}: {fault}"
