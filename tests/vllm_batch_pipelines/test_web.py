"""The real web server over a tiny workspace: what its own UI sends works, what another site can send does not."""

import http.client
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin, Subprotocol

from tests.helpers import wait_until

pytestmark = pytest.mark.e2e


_DEFINITIONS = """
import dagster as dg

@dg.op
def nothing(): ...

@dg.job
def tiny_job():
    nothing()

defs = dg.Definitions(jobs=[tiny_job])
"""
_LAUNCH = """mutation { launchPipelineExecution(executionParams: {runConfigData: {}, selector: {
    repositoryLocationName: "tiny", repositoryName: "__repository__", jobName: "tiny_job"}}) { __typename } }"""
_RUNS = "{ runsOrError { ... on Runs { results { runId } } } }"


@dataclass(frozen=True)
class Site:
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def send(
        self, method: str, path: str, body: str | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def graphql(self, query: str, **headers: str) -> tuple[int, str]:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.send(
            "POST", "/graphql", json.dumps({"query": query}), {"Content-Type": "application/json"} | headers
        )

    def runs(self) -> list[object]:
        found: list[object] = json.loads(self.graphql(_RUNS)[1])["data"]["runsOrError"]["results"]
        return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("web")
    (folder / "tiny.py").write_text(_DEFINITIONS)
    (folder / "workspace.yaml").write_text(
        f"load_from: [{{python_module: {{module_name: tiny, location_name: tiny, working_directory: {folder}}}}}]"
    )
    (folder / "dagster.yaml").write_text("telemetry: {enabled: false}")
    url_file = folder / "url"
    command = ["-m", "vllm_batch_pipelines.web", "--port", "0", "-w", str(folder / "workspace.yaml")]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            [sys.executable, *command, "--url-file", str(url_file)],
            env=os.environ | {"DAGSTER_HOME": str(folder), "DAGSTER_DISABLE_TELEMETRY": "1"},
            cwd=Path(__file__).parents[2],
            stdout=log,
            stderr=log,
        )
        try:
            wait_until(lambda: url_file.exists() or server.poll() is not None, 120)
            log.seek(0)
            assert url_file.exists(), log.read().decode()
            yield Site(urlsplit(url_file.read_text().strip()).port or 0)
        finally:
            server.terminate()
            assert server.wait(30) == 0


def test_the_ui_and_its_queries_work(site: Site) -> None:
    for host in ("127.0.0.1", "localhost", "[::1]"):
        at_home = f"{host}:{site.port}"
        status, page = site.send("GET", "/", headers={"Host": at_home, "Sec-Fetch-Site": "none"})
        assert (status, "<html" in page) == (200, True)
        status, answer = site.graphql(
            "{ version }", Host=at_home, Origin=f"http://{at_home}", Sec_Fetch_Site="same-origin"
        )
        assert (status, json.loads(answer)["data"]["version"][:2]) == (200, "1.")


def test_programs_without_origin_can_query(site: Site) -> None:
    assert site.graphql("{ version }")[0] == 200


def test_the_uis_websocket_works(site: Site) -> None:
    with connect(
        f"ws://127.0.0.1:{site.port}/graphql", origin=Origin(site.url), subprotocols=[Subprotocol("graphql-ws")]
    ) as socket:
        socket.send(json.dumps({"type": "connection_init"}))
        assert json.loads(socket.recv(timeout=10)) == {"type": "connection_ack"}


def test_a_link_from_another_site_opens_a_page_and_nothing_else(site: Site) -> None:
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert site.send("GET", "/runs", headers=link)[0] == 200
    assert site.send("GET", "/graphql", headers=link | {"Accept": "text/html"})[0] == 403
    assert site.send("GET", "/runs", headers=link | {"Sec-Fetch-Dest": "iframe"})[0] == 403
    assert site.send("POST", "/runs", headers=link)[0] == 403


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_a_mutation_in_a_url_is_refused(site: Site, method: str) -> None:
    path = f"/graphql?query={quote(_LAUNCH)}"
    assert site.send(method, path)[0] == 403
    assert site.send(method, path.replace("query", "%71uery", 1))[0] == 403
    assert site.runs() == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "https://127.0.0.1:{port}"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
    ids=str,
)
def test_a_mutation_from_another_site_is_refused(site: Site, headers: dict[str, str]) -> None:
    headers = {name: value.replace("{port}", str(site.port)) for name, value in headers.items()}
    assert site.graphql(_LAUNCH, **headers)[0] == 403
    assert site.runs() == []


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "application/graphql", "text/plain; application/json"],
)
def test_a_mutation_that_a_form_could_send_is_refused(site: Site, content_type: str) -> None:
    body = _LAUNCH if content_type == "application/graphql" else json.dumps({"query": _LAUNCH})
    assert site.send("POST", "/graphql", body, {"Content-Type": content_type})[0] == 415
    assert site.runs() == []


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", ""])
def test_another_host_name_is_refused(site: Site, host: str) -> None:
    host = host.replace("{port}", str(site.port))
    assert site.send("GET", "/server_info", headers={"Host": host})[0] == 421
    assert site.graphql(_LAUNCH, Host=host)[0] == 421
    assert site.runs() == []


@pytest.mark.parametrize(
    ("origin", "headers"),
    [
        ("http://evil.example", {}),
        ("null", {}),
        (None, {"Host": "evil.example"}),
        (None, {"Sec-Fetch-Site": "cross-site"}),
    ],
)
def test_a_websocket_of_another_site_is_refused(site: Site, origin: str | None, headers: dict[str, str]) -> None:
    with (
        pytest.raises(InvalidStatus) as refusal,
        connect(
            f"ws://127.0.0.1:{site.port}/graphql",
            origin=Origin(origin) if origin else None,
            subprotocols=[Subprotocol("graphql-ws")],
            additional_headers=headers,
        ),
    ):
        pass
    assert refusal.value.response.status_code in (400, 403)


def test_the_refused_mutation_is_one_that_works(site: Site) -> None:
    """Last of all: without this the tests above could refuse something that never did anything."""
    status, answer = site.graphql(_LAUNCH, Origin=site.url, Sec_Fetch_Site="same-origin")
    assert (status, "LaunchRunSuccess" in answer) == (200, True), answer
    assert len(site.runs()) == 1


def test_only_loopback_is_listened_on(site: Site) -> None:
    listeners = Path("/proc/net/tcp").read_text().splitlines()[1:]
    addresses = {line.split()[1] for line in listeners if line.split()[1].endswith(f":{site.port:04X}")}
    assert {address.split(":")[0] for address in addresses} == {"0100007F"}
