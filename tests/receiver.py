"""A real HTTP receiver of webhooks that misbehaves on command."""

import json
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True)
class Received:
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def content(self) -> dict[str, Any]:
        return dict(json.loads(self.body))


@dataclass(frozen=True)
class Say:
    """What a receiver does: answers with a status, hangs up without a word (None), or first waits for its gate."""

    status: int | None = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    waits: bool = False


@dataclass
class Receiver:
    """Says what `script` holds, in turn, and `otherwise` after that. `received` is what came, in order."""

    script: list[Say | int] = field(default_factory=list)
    otherwise: Say = field(default_factory=Say)
    host: str = "127.0.0.1"
    tls: ssl.SSLContext | None = None
    on_request: Callable[[Received], None] = lambda _: None
    received: list[Received] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        receiver, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received = Received(self.path, {k.lower(): v for k, v in self.headers.items()}, body)
                with lock:
                    receiver.received.append(received)
                    say = receiver.script.pop(0) if receiver.script else receiver.otherwise
                say = Say(say) if isinstance(say, int) else say
                receiver.on_request(received)
                if say.waits:
                    receiver.gate.wait(60)
                if say.status is None:
                    self.close_connection = True
                    return
                try:
                    self.send_response(say.status)
                    for name, value in say.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(say.body)))
                    self.end_headers()
                    self.wfile.write(say.body)
                except OSError:
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 64

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass

        self._http = Server((self.host, 0), Handler)
        self._http.daemon_threads = True
        if self.tls is not None:
            self._http.socket = self.tls.wrap_socket(self._http.socket, server_side=True)

    @property
    def port(self) -> int:
        return int(self._http.server_address[1])

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/hook"

    @property
    def ids(self) -> list[str]:
        return [received.id for received in self.received]

    @property
    def types(self) -> list[str]:
        return [received.content["type"] for received in self.received]

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.gate.set()
        self._http.shutdown()
        self._http.server_close()


SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def closed_port() -> int:
    """A port at which nobody listens."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        return int(server.server_address[1])
