"""The HTTP engine against real servers on loopback and on a Unix socket."""

import asyncio
import contextlib
import gzip
import json
import shutil
import socket
import struct
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from aiohttp import web

from resources.engine.endpoint import Endpoint
from resources.engine.protocol import EngineRequest, EngineResponse, TransportFailure
from resources.errors import SettingsError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
KEY = "sk-very-secret"
CHAT = "/v1/chat/completions"


@pytest.fixture
def short_dir() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="vb"))
    yield folder
    shutil.rmtree(folder)


@contextlib.asynccontextmanager
async def serving(handler: Handler, socket_path: Path | None = None) -> AsyncIterator[str]:
    """A server whose every path is that handler; gives its root URL."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        if socket_path:
            await web.UnixSite(runner, str(socket_path)).start()
            yield ""
        else:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def ask(
    handler: Handler,
    *,
    url: str = CHAT,
    base: str = "/v1",
    body: bytes = b"{}",
    key: str | None = None,
    limit: int = 9999,
) -> EngineResponse:
    """One request to a server made of `handler`."""

    async def go() -> EngineResponse:
        async with (
            serving(handler) as root,
            Endpoint(root + base, api_key=key, concurrency=2, max_response_bytes=limit) as endpoint,
        ):
            return await endpoint.ask(EngineRequest(line=7, url=url, body=body, request_id="batch-7"))

    return asyncio.run(go())


def answer(body: str | bytes, status: int = 200, **headers: str) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        data = body.encode() if isinstance(body, str) else body
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(status=status, body=data, headers={"Content-Type": "application/json", **names})

    return handler


async def echo(request: web.Request) -> web.Response:
    seen = {
        "path": request.path_qs,
        "headers": {name.lower(): value for name, value in request.headers.items()},
        "body": (await request.read()).decode(),
    }
    return web.json_response(seen, headers={"X-Request-Id": "theirs"})


def test_body_goes_out_verbatim_and_headers_say_who_asks() -> None:
    body = b'{"model": "m",  "temperature": 1.0, "x": "\\u00e9"}'
    response = ask(echo, body=body, key=KEY)
    seen = json.loads(response.body)
    assert (response.status, response.request_id) == (200, "theirs")
    assert seen["body"].encode() == body
    assert seen["headers"]["content-type"] == "application/json"
    assert seen["headers"]["x-request-id"] == "batch-7"
    assert seen["headers"]["authorization"] == f"Bearer {KEY}"


def test_request_id_is_the_one_sent_where_the_server_gives_none() -> None:
    assert ask(answer("{}")).request_id == "batch-7"


@pytest.mark.parametrize(
    ("base", "url", "path"),
    [
        ("/v1", CHAT, "/v1/chat/completions"),
        ("/v1/", CHAT, "/v1/chat/completions"),
        ("", CHAT, "/v1/chat/completions"),
        ("/openai/v1", CHAT, "/openai/v1/chat/completions"),
        ("/v1beta/openai", CHAT, "/v1beta/openai/chat/completions"),
        ("/v1?api-version=3", CHAT, "/v1/chat/completions?api-version=3"),
        ("/v1", "/score", "/score"),
        ("/v1", "/rerank", "/rerank"),
        ("/v1", "/v2/rerank", "/v2/rerank"),
        ("/proxy/v1", "/v2/rerank", "/proxy/v2/rerank"),
    ],
)
def test_paths_hang_below_the_base_url(base: str, url: str, path: str) -> None:
    assert json.loads(ask(echo, base=base, url=url).body)["path"] == path


def test_unix_socket(short_dir: Path) -> None:
    async def go() -> EngineResponse:
        path = short_dir / "api.sock"
        async with serving(echo, path), Endpoint(socket_path=path) as endpoint:
            return await endpoint.ask(EngineRequest(1, "/score", b"{}", "r"))

    assert json.loads(asyncio.run(go()).body)["path"] == "/score"


def test_environment_proxies_are_not_used_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert ask(echo).status == 200


def test_many_at_once_share_kept_connections() -> None:
    async def go() -> tuple[int, int]:
        ports = set()
        waiting = asyncio.Event()

        async def handler(request: web.Request) -> web.Response:
            assert request.transport
            ports.add(request.transport.get_extra_info("peername")[1])
            if len(ports) == 5:
                waiting.set()
            await waiting.wait()
            return web.json_response({})

        async with serving(handler) as root, Endpoint(f"{root}/v1", concurrency=5) as endpoint:
            asked = [endpoint.ask(EngineRequest(n, CHAT, b"{}", str(n))) for n in range(50)]
            return len(await asyncio.gather(*asked)), len(ports)

    assert asyncio.run(go()) == (50, 5)


@pytest.mark.parametrize("status", [400, 404, 422, 500, 503])
def test_error_statuses_come_back_as_they_are(status: int) -> None:
    response = ask(answer('{"error":{"message":"no"}}', status))
    assert (response.status, response.body) == (status, b'{"error":{"message":"no"}}')


def test_error_page_that_is_not_json_is_wrapped() -> None:
    response = ask(answer("<html>Bad Gateway</html>", 502))
    assert json.loads(response.body) == {"error": {"message": "<html>Bad Gateway</html>", "type": "upstream_error"}}
    assert json.loads(ask(answer("", 503)).body)["error"]["message"].startswith("status 503")


def test_redirects_are_not_followed() -> None:
    async def handler(request: web.Request) -> web.Response:
        raise web.HTTPTemporaryRedirect("/elsewhere")

    assert ask(handler).status == 307


def test_indented_json_comes_back_on_one_line() -> None:
    assert ask(answer('{\n  "a": "b\\n"\n}\n')).body == b'{"a":"b\\n"}'


@pytest.mark.parametrize(("value", "seconds"), [("3", 3), ("0.5", 0.5), ("-1", 0)])
def test_retry_after_in_seconds(value: str, seconds: float) -> None:
    assert ask(answer("{}", 429, Retry_After=value)).retry_after == seconds


@pytest.mark.parametrize(("ahead", "least", "most"), [(600, 500, 600), (-600, 0, 0)])
def test_retry_after_as_a_date(ahead: float, least: float, most: float) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=ahead), usegmt=True)
    response = ask(answer("{}", 429, Retry_After=date))
    assert response.retry_after is not None
    assert least <= response.retry_after <= most


@pytest.mark.parametrize("value", ["soon", "nan", ""])
def test_retry_after_that_says_nothing_is_none(value: str) -> None:
    assert ask(answer("{}", 429, Retry_After=value)).retry_after is None


@pytest.mark.parametrize("body", ["", "ok", '{"a":', '{"a":1}}', "data: {}\n\n", b'{"a":"\xff"}'])
def test_success_that_is_not_json_is_a_transport_failure(body: str | bytes) -> None:
    with pytest.raises(TransportFailure, match="not JSON"):
        ask(answer(body))


def test_half_an_answer_is_a_transport_failure() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b'{"a":1}')
        assert request.transport
        request.transport.close()
        return response

    with pytest.raises(TransportFailure, match="ClientPayloadError"):
        ask(handler)


def test_reset_is_a_transport_failure() -> None:
    async def handler(request: web.Request) -> web.Response:
        assert request.transport
        raw = request.transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
        return web.Response()

    with pytest.raises(TransportFailure):
        ask(handler)


def test_refused_connection_is_a_transport_failure_without_the_key(short_dir: Path) -> None:
    async def go(endpoint: Endpoint) -> None:
        async with endpoint:
            await endpoint.ask(EngineRequest(1, CHAT, b"{}", "r"))

    for endpoint in (
        Endpoint("http://127.0.0.1:1/v1?token=hidden", api_key=KEY),
        Endpoint(socket_path=short_dir / "no.sock", api_key=KEY),
    ):
        with pytest.raises(TransportFailure) as failure:
            asyncio.run(go(endpoint))
        for text in (str(failure.value), repr(endpoint)):
            assert KEY not in text
            assert "hidden" not in text


@pytest.mark.parametrize("body", [json.dumps({"error": f"bad key {KEY}"}), f"<p>bad key {KEY}"])
def test_a_key_said_back_by_the_server_is_covered(body: str) -> None:
    response = ask(answer(body, 401), key=KEY)
    assert KEY.encode() not in response.body
    assert b"bad key ***" in response.body


def test_a_key_that_no_header_can_carry_is_refused_without_showing_it() -> None:
    with pytest.raises(SettingsError) as error:
        Endpoint("http://127.0.0.1:1/v1", api_key="sk\nbroken")
    assert "broken" not in str(error.value)


def test_credentials_in_the_base_url_are_refused_without_showing_them() -> None:
    with pytest.raises(SettingsError, match="api_key_env") as error:
        Endpoint("http://user:hidden@127.0.0.1:1/v1")
    assert "hidden" not in str(error.value)


@pytest.mark.parametrize("base_url", ["127.0.0.1:8000", "ftp://host/v1", "http://", "http://[::1/v1"])
def test_base_url_that_is_none_is_refused(base_url: str) -> None:
    with pytest.raises(SettingsError, match="base_url must look like"):
        Endpoint(base_url)


def test_an_answer_without_end_is_cut_off() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b" " * 65536)
        return response

    with pytest.raises(TransportFailure, match="longer than 9,999 bytes"):
        ask(handler)


def test_the_limit_counts_bytes_after_decompression() -> None:
    with pytest.raises(TransportFailure, match="longer than"):
        ask(answer(gzip.compress(b" " * 1_000_000), Content_Encoding="gzip"))


def test_cancelling_closes_the_connection() -> None:
    async def go() -> None:
        arrived, dropped = asyncio.Event(), asyncio.Event()

        async def handler(request: web.Request) -> web.Response:
            arrived.set()
            while request.transport and not request.transport.is_closing():
                await asyncio.sleep(0.01)
            dropped.set()
            return web.Response()

        async with serving(handler) as root, Endpoint(f"{root}/v1") as endpoint:
            asking = asyncio.create_task(endpoint.ask(EngineRequest(1, CHAT, b"{}", "r")))
            await arrived.wait()
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            await asyncio.wait_for(dropped.wait(), 5)

    asyncio.run(go())
