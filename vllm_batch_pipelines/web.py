"""Dagster's web server behind a guard: ``python -m vllm_batch_pipelines.web --port 3000 -w workspace.yaml``.

Dagster executes mutations for whoever asks, by GET too, with any Host and any Origin. On a loopback port that means
any page in the user's browser. The guard lets through what the UI itself and programs on this machine send, and
nothing that another site can make a browser send.
"""

import argparse
import logging
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import parse_qs

import uvicorn
from dagster import DagsterInstance
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import WorkspaceFileTarget
from dagster_webserver.app import create_app_from_workspace_process_context
from dagster_webserver.version import __version__ as dagster_webserver_version
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

_log = logging.getLogger("vllm_batch.web")

HOST = "127.0.0.1"
_STATEMENT_TIMEOUT_MS = 15_000  # these three as in dagster_webserver.cli
_POOL_RECYCLE_SECONDS = 3600
_POOL_MAX_OVERFLOW = 20
_GRACE_SECONDS = 3


class Refused(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Guard:
    """ASGI middleware that refuses what a page of another site could make a browser send.

    - ``Host`` must be a name of this server (421): one that another site points here (DNS rebinding) is not.
    - ``Origin``, on any method and on WebSocket upgrades, must be this server's where it is sent (403). Browsers send
      it with every POST and every WebSocket; command line clients send none.
    - ``Sec-Fetch-Site: cross-site`` or ``same-site`` (another port of localhost) only for following a link (403).
    - GraphQL by POST with a JSON body only (403, 415): a form cannot send that type, a link cannot send a body.
    """

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app = app
        names = [HOST, "localhost", "[::1]"]
        self._hosts = {f"{name}:{port}" for name in names} | (set(names) if port == 80 else set())
        self._origins = {f"http://{host}" for host in self._hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except Refused as refused:
            _log.warning("Refused %s %s: %s", scope.get("method", "WEBSOCKET"), scope["path"], refused)
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": str(refused)})
            else:
                await PlainTextResponse(f"{refused}\n", status_code=refused.status)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            raise Refused(421, "This server does not answer under that host name.")
        if any(origin.lower() not in self._origins for origin in headers.getlist("origin")):
            raise Refused(403, "Requests from pages of other sites are refused.")

        is_graphql = scope["path"].rstrip("/") == "/graphql"
        if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            follows_link = (
                scope.get("method") == "GET"
                and headers.get("sec-fetch-mode") == "navigate"
                and headers.get("sec-fetch-dest", "document") == "document"
            )
            if is_graphql or not follows_link:
                raise Refused(403, "Requests from pages of other sites are refused.")

        if is_graphql and scope["type"] == "http":
            if "query" in parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True):
                raise Refused(403, "GraphQL is answered by POST only.")
            content_type = headers.get("content-type", "").split(";")[0].strip().lower()
            if scope["method"] == "POST" and content_type != "application/json":
                raise Refused(415, "GraphQL is answered for application/json only.")


class _AnnouncingServer(uvicorn.Server):
    """A server that writes its URL to a file when it answers."""

    def __init__(self, config: uvicorn.Config, url: str, url_file: Path | None) -> None:
        super().__init__(config)
        self._url = url
        self._url_file = url_file

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        _log.info("Serving on %s", self._url)
        if self._url_file is not None:
            draft = self._url_file.with_name(self._url_file.name + ".new")
            draft.write_text(self._url + "\n", "utf-8")
            draft.rename(self._url_file)


def serve(port: int, workspace: Path, url_file: Path | None = None) -> None:
    """Serve the UI of the instance in ``DAGSTER_HOME`` on 127.0.0.1 until SIGINT or SIGTERM; port 0 takes a free one.

    Raises:
        OSError: the port is taken.
    """
    with socket.socket(socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        port = listener.getsockname()[1]
        with (
            DagsterInstance.get() as instance,
            WorkspaceProcessContext(
                instance,
                version=dagster_webserver_version,
                workspace_load_target=WorkspaceFileTarget(paths=[str(workspace)]),
            ) as context,
        ):
            instance.optimize_for_webserver(_STATEMENT_TIMEOUT_MS, _POOL_RECYCLE_SECONDS, _POOL_MAX_OVERFLOW)
            app = create_app_from_workspace_process_context(context, lifespan=_lifespan)
            config = uvicorn.Config(
                Guard(app, port),
                log_level="warning",
                timeout_graceful_shutdown=_GRACE_SECONDS,  # open pages hold their WebSockets
                server_header=False,
                proxy_headers=False,
            )
            _AnnouncingServer(config, f"http://{HOST}:{port}", url_file).run(sockets=[listener])


@asynccontextmanager
async def _lifespan(_: Starlette) -> AsyncIterator[None]:
    yield


def main() -> None:
    parser = argparse.ArgumentParser(description="Dagster's web UI on 127.0.0.1, with Host and Origin checked.")
    parser.add_argument("--port", type=int, default=3000, help="0 takes a free one")
    parser.add_argument("-w", "--workspace", type=Path, default=Path("workspace.yaml"))
    parser.add_argument("--url-file", type=Path, help="written when the server answers")
    options = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(asctime)s %(name)s %(levelname)s %(message)s")
    # uvicorn raises a signal again when it has shut down: as an exception, so that the code server is stopped too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        serve(options.port, options.workspace, options.url_file)


if __name__ == "__main__":
    main()
