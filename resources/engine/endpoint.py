"""The HTTP engine: any OpenAI-compatible server, by URL or on a Unix socket."""

import ipaddress
import re
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
import msgspec
from yarl import URL

from resources.engine.protocol import EngineRequest, EngineResponse, Load, TransportFailure
from resources.errors import SettingsError
from resources.retry_after import retry_after_seconds

MAX_RESPONSE_BYTES = 256 * 1024 * 1024
CONNECT_SECONDS = 30.0
KEEP_ALIVE_SECONDS = 4.0  # vLLM closes idle connections after 5 s: let go first, not into a request on its way

_GAUGES = ("num_requests_running", "num_requests_waiting", "prompt_tokens_total", "generation_tokens_total")
# A sample of vLLM's /metrics; one a data-parallel engine. (Format: Prometheus' text exposition, version 0.0.4.)
_SAMPLE = re.compile(rf"^vllm:({'|'.join(_GAUGES)})(?:\{{.*\}})? ([0-9.e+]+)", re.M)


class Endpoint:
    """Asks one server. Use as `async with`, inside the loop that asks.

    There is no limit of time on an answer: the caller sets one by cancelling, which closes the connection.

    Args:
        base_url: as the OpenAI clients take it, up to and including ``/v1``.
        socket_path: a Unix socket instead, with the server's root behind it.
        api_key: sent as a bearer token; never shown in a message.
        concurrency: connections at most; 0 for no limit.
        max_response_bytes: a longer answer (after decompression) is a TransportFailure.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        socket_path: Path | None = None,
        api_key: str | None = None,
        concurrency: int = 0,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
    ) -> None:
        if (base_url is None) == (socket_path is None):
            raise ValueError("Endpoint takes a base_url or a socket_path, one of the two")
        self._base = _base(base_url) if base_url else URL("http://localhost/v1")
        self._socket_path = socket_path
        self._api_key = _checked_key(api_key)
        self._concurrency = concurrency
        self._max_response_bytes = max_response_bytes
        self._urls: dict[str, URL] = {}
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"Endpoint({self._socket_path or self._base.with_query(None)})"

    async def __aenter__(self) -> Self:
        connector: aiohttp.BaseConnector
        if self._socket_path:
            connector = aiohttp.UnixConnector(
                str(self._socket_path), limit=self._concurrency, keepalive_timeout=KEEP_ALIVE_SECONDS
            )
        else:
            connector = aiohttp.TCPConnector(limit=self._concurrency, keepalive_timeout=KEEP_ALIVE_SECONDS)
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            # Looked up here: aiohttp's own `trust_env` would also send passwords out of ~/.netrc.
            proxy=None if self._socket_path else _proxy(self._base),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session:
            await self._session.close()
            self._session = None

    async def ask(self, request: EngineRequest) -> EngineResponse:
        """Post the body as it is.

        The body of the answer is one line of JSON whatever the status: text that is not JSON, as proxies send with an
        error status, is wrapped as an OpenAI error of type ``upstream_error``. Redirects are answers.

        Raises:
            TransportFailure: no whole JSON answer came.
        """
        if self._session is None:
            raise RuntimeError("Endpoint.ask outside of `async with`")
        try:
            async with self._session.post(
                self._url(request.url),
                data=request.body,
                headers={"X-Request-Id": request.request_id},
                allow_redirects=False,
            ) as response:
                raw = await self._read(response)
        except (aiohttp.ClientError, OSError) as error:
            message = self._safe(f"{type(error).__name__}: {error}"[:300])
            raise TransportFailure(message, unreachable=isinstance(error, aiohttp.ClientConnectorError)) from None
        body = _one_line(raw)
        if response.status >= 300:
            body = self._safe(body.decode()).encode() if body else self._wrapped(raw, response)
        elif body is None:
            raise TransportFailure(f"status {response.status}, but the answer is not JSON ({response.content_type})")
        return EngineResponse(
            status=response.status,
            body=body,
            request_id=response.headers.get("X-Request-Id") or request.request_id,
            retry_after=retry_after_seconds(response.headers.get("Retry-After")),
        )

    async def load(self) -> Load | None:
        """What a vLLM server says of its load; None where the server is another one, or does not say.

        Raises:
            TransportFailure: no whole answer came.
        """
        if self._session is None:
            raise RuntimeError("Endpoint.load outside of `async with`")
        try:
            async with self._session.get(self._url("/metrics"), allow_redirects=False) as response:
                text = (await self._read(response)).decode("utf-8", "replace") if response.status == 200 else ""
        except (aiohttp.ClientError, OSError) as error:
            raise TransportFailure(self._safe(f"{type(error).__name__}: {error}"[:300])) from None
        found = dict.fromkeys(_GAUGES, -1)
        for name, value in _SAMPLE.findall(text):
            found[name] = max(found[name], 0) + int(float(value))
        return Load(*found.values()) if min(found.values()) >= 0 else None

    def _url(self, path: str) -> URL:
        """Where a request goes. OpenAI paths hang below base_url, which may end otherwise than in /v1 (gateways do);
        `/score`, `/rerank`, `/v2/rerank` hang below the server's root."""
        if path not in self._urls:
            base = self._base.path.rstrip("/")
            if path.startswith("/v1/") and base:
                full = base + path.removeprefix("/v1")
            else:
                full = base.removesuffix("/v1") + path
            self._urls[path] = self._base.with_path(full, keep_query=True)
        return self._urls[path]

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        parts, size = [], 0
        async for part in response.content.iter_any():
            parts.append(part)
            size += len(part)
            if size > self._max_response_bytes:
                response.close()  # do not read the rest
                raise TransportFailure(f"the answer is longer than {self._max_response_bytes:,} bytes; not read")
        return b"".join(parts)

    def _wrapped(self, raw: bytes, response: aiohttp.ClientResponse) -> bytes:
        text = raw[:2000].decode("utf-8", "replace").strip()
        message = self._safe(text) or f"status {response.status} {response.reason or ''}".strip()
        return msgspec.json.encode({"error": {"message": message, "type": "upstream_error"}})

    def _safe(self, text: str) -> str:
        """Without the key, which some servers say back to the sender."""
        return text.replace(self._api_key, "***") if self._api_key else text


def _base(base_url: str) -> URL:
    try:
        url = URL(base_url)
    except ValueError:
        url = URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise SettingsError("base_url must look like http://127.0.0.1:8000/v1")
    if url.user or url.password:
        raise SettingsError("base_url must not hold a user or a password; name the key's variable in api_key_env")
    return url


def _checked_key(key: str | None) -> str | None:
    key = key.strip() if key else None
    if key and not (key.isascii() and key.isprintable()):
        raise SettingsError("the API key holds characters that no HTTP header can carry")
    return key or None


def _proxy(url: URL) -> str | None:
    host = url.host or ""
    if _is_loopback(host) or urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies().get(url.scheme)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _one_line(raw: bytes) -> bytes | None:
    """The JSON document on one line; None where it is not JSON. (Hosted services send theirs indented.)"""
    try:
        raw.decode()  # msgspec does not look into strings that it skips
        msgspec.json.decode(raw, type=msgspec.Raw)
        return msgspec.json.format(raw, indent=-1) if b"\n" in raw or b"\r" in raw else raw
    except (UnicodeDecodeError, msgspec.DecodeError):
        return None
