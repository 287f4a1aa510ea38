"""Tests with a real Label Studio: a project of a test's own, reviewers, and a proxy that breaks on command."""

import http.client
import json
import threading
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from pydantic import SecretStr

from resources import failpoints
from resources.label_studio.annotations import AnnotationRow
from resources.label_studio.answers import to_regions
from resources.label_studio.client import LabelStudioClient
from resources.label_studio.connection import Connection
from resources.label_studio.importing import ImportReport, import_batch
from resources.label_studio.local_server import Server
from resources.label_studio.reviews import Reviews, ReviewState, SyncReport, has_news, sync_reviews
from resources.label_studio.schema import CurationSchema, load_schema
from tests.helpers import Asked, Reply, chat, ok

Json = dict[str, Any]


@dataclass
class Reviewing:
    """A project of a test's own on the real server, with what the test imports into it and reads from it."""

    server: Server
    root: Path
    schema: CurationSchema = field(default_factory=lambda: load_schema("generic"))
    token: str = ""
    url: str = ""
    pauses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.title = f"test {uuid.uuid4().hex[:12]}"
        self.reviews = Reviews(self.root / "curation", "t")
        self._batches = 0

    @property
    def connection(self) -> Connection:
        key = SecretStr(self.token or self.server.account.token)
        return Connection("t", self.url or self.server.url, self.title, self.schema, key, 60)

    @property
    def client(self) -> LabelStudioClient:
        """Waits between tries are noted, and not waited."""
        return LabelStudioClient(self.connection, pause=self.pauses.append)

    def batch(self, count: int = 3, reply: Reply = ok, texts: Iterable[str] = ()) -> Asked:
        """A published batch of chats; each is another batch."""
        self._batches += 1
        asked = [*texts] or [f"question {number} of batch {self._batches}" for number in range(1, count + 1)]
        lines = [chat(f"r{number}", text) for number, text in enumerate(asked, 1)]
        made = Asked(self.root / f"b{self._batches}", "".join(lines))
        made.run(reply)
        return made

    def load(self, asked: Asked, **options: Any) -> ImportReport:
        with asked.batch.lock("a test"), self.client as client:
            return import_batch(
                asked.batch,
                client,
                self.connection,
                self.reviews.folder,
                pause=options.pop("pause", self.pauses.append),
                **options,
            )

    def sync(self, *, full: bool = False, **options: Any) -> SyncReport:
        with self.client as client:
            return sync_reviews(client, self.connection, self.reviews, full=full, **options)

    def news(self) -> datetime | None:
        with self.client as client:
            return has_news(client, self.connection, self.reviews)

    # What is on the server, asked without our client.

    def has_project(self) -> bool:
        return bool(self._projects())

    def _projects(self) -> list[Json]:
        found = self.server.ask("GET", f"/api/projects/?page_size=1000&title={self.title.replace(' ', '%20')}")
        return found["results"]  # type: ignore[no-any-return]

    @property
    def project(self) -> Json:
        (project,) = self._projects()
        return self.server.ask("GET", f"/api/projects/{project['id']}/")  # type: ignore[no-any-return]

    def tasks(self) -> list[Json]:
        """All tasks of the project with all that hangs on them, by line and id."""
        path = f"/api/tasks?project={self.project['id']}&fields=all&page_size=100000"
        tasks = self.server.ask("GET", path)["tasks"]
        return sorted(tasks, key=lambda task: (task["data"].get("line", 0), task["id"]))

    def lines(self) -> list[int]:
        return [task["data"]["line"] for task in self.tasks()]

    # What people do.

    def annotate(self, task: int, **fields: Any) -> int:
        """An annotation with these answers to the schema's questions; those with an underscore are its own fields."""
        own = {name.removeprefix("_"): fields.pop(name) for name in [*fields] if name.startswith("_")}
        body = {"result": to_regions(self.schema, fields), **own}
        return int(self.server.ask("POST", f"/api/tasks/{task}/annotations/", body)["id"])

    def change(self, annotation: int, **fields: Any) -> None:
        own = {name.removeprefix("_"): fields.pop(name) for name in [*fields] if name.startswith("_")}
        body = own | ({"result": to_regions(self.schema, fields)} if fields else {})
        self.server.ask("PATCH", f"/api/annotations/{annotation}/", body)

    def delete(self, kind: str, number: int) -> None:
        self.server.ask("DELETE", f"/api/{kind}/{number}/")


def star(line: int = 1, **fields: Any) -> AnnotationRow:
    """A gold star as it stands on disk; its question, answer and ids are those of its line."""
    now = datetime(2026, 11, 1, tzinfo=UTC)
    row = AnnotationRow(
        line, line, "1", now, now, False, True, True, False, 4.0, f"a{line}", f"a{line}", "{}", "{}", "b", line,
        f"r{line}", "m", "m/f", "generic", f"q{line}", "", "[]",
    )  # fmt: skip
    return row._replace(**fields)


def read_stars(reviews: Reviews, *stars: AnnotationRow) -> Reviews:
    """The reviews, after a sync that found these annotations and no others."""
    with reviews.lock():
        reviews.commit([*stars], ReviewState(cursor=datetime.now(UTC)))
    return reviews


# --- A proxy that breaks on command -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What the proxy does instead of its work. With `status`, it answers that itself. `forward` has the server do the
    work first; then the reply is `body`, or is lost where there is none."""

    status: int | None = None
    forward: bool = False
    body: Json | None = None
    retry_after: int | None = None


Rule = Callable[[str, str], Fault | None]


class Proxy:
    """In front of the real server. `rule` gets method and path of each request, and says what goes wrong with it."""

    def __init__(self, server: Server, rule: Rule = lambda method, path: None) -> None:
        self.rule = rule
        self.seen: list[tuple[str, str]] = []
        self.replies: list[Json] = []
        target = urlsplit(server.url)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _handle(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                path = self.path.split("?")[0]
                proxy.seen.append((self.command, path))
                fault = proxy.rule(self.command, path)
                if fault is not None and not fault.forward:
                    self._fail(fault)
                    return
                upstream = http.client.HTTPConnection(target.hostname or "", target.port, timeout=120)
                kept = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
                upstream.request(self.command, self.path, body, kept)
                reply = upstream.getresponse()
                content = reply.read()
                upstream.close()
                if fault is not None:
                    proxy.replies.append(json.loads(content or b"{}"))
                    self._fail(fault)
                    return
                self._answer(reply.status, content, reply.headers.get("Content-Type") or "application/json")

            do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = _handle

            def _fail(self, fault: Fault) -> None:
                if fault.status is None and fault.body is None:
                    self.close_connection = True
                    self.connection.close()
                    return
                content = json.dumps(fault.body or {"detail": "on command"}).encode()
                self._answer(fault.status or 201, content, "application/json", fault.retry_after)

            def _answer(self, status: int, content: bytes, kind: str, retry_after: int | None = None) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                if retry_after is not None:
                    self.send_header("Retry-After", str(retry_after))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # type: ignore[method-assign]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def count(self, method: str, ending: str) -> int:
        return sum(m == method and path.rstrip("/").endswith(ending) for m, path in self.seen)

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()


def nth(number: int, ending: str, fault: Fault, method: str = "POST") -> Rule:
    """A rule that breaks the request of that number (1 is the first) whose path ends so, and no other."""
    seen = 0

    def rule(asked: str, path: str) -> Fault | None:
        nonlocal seen
        if asked == method and path.rstrip("/").endswith(ending):
            seen += 1
            return fault if seen == number else None
        return None

    return rule


def is_cut_off(work: Callable[[], object], step: int) -> bool:
    """Break work off, as a death would, at its so many-th step on disk; whether it came that far."""
    left = step

    def reached(_step: str, _path: Path) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt

    failpoints.arm(reached)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        failpoints.arm(None)
    return False
