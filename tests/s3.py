"""A real S3 server (moto's, in a process of its own), and a proxy before it that breaks off on command."""

import re
import select
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from pyarrow import fs

from resources.exports.targets import ObjectStoreTarget
from tests.helpers import wait_until

BUCKET = "results"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "a-key",
    "AWS_SECRET_ACCESS_KEY": "very-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_WRITE = re.compile(rb"(?:PUT|POST|DELETE) (/\S*) HTTP/1")
_PART = re.compile(r"partNumber=(\d+)")


@dataclass
class S3:
    """`url` goes by the proxy, which notes what was to be written, and cuts off uploads of the parts in `breaks`."""

    direct_url: str
    url: str
    breaks: set[int] = field(default_factory=set)
    writes: list[str] = field(default_factory=list)

    def target(self, prefix: str, **fields: Any) -> ObjectStoreTarget:
        found = {"url": f"s3://{BUCKET}/{prefix}", "endpoint_url": self.url, "timeout": 20.0, **fields}
        return ObjectStoreTarget(name="lake", **found)

    @property
    def parts_seen(self) -> list[int]:
        return [int(part) for path in self.writes for part in _PART.findall(path)]

    @property
    def names_written(self) -> set[str]:
        return {path.partition("?")[0].rpartition("/")[2] for path in self.writes}

    @property
    def store(self) -> fs.S3FileSystem:
        return fs.S3FileSystem(endpoint_override=self.direct_url.removeprefix("http://"), scheme="http")

    def objects(self, prefix: str) -> dict[str, int]:
        """What anybody sees below a prefix: name and size."""
        selector = fs.FileSelector(f"{BUCKET}/{prefix}", recursive=True, allow_not_found=True)
        found = [info for info in self.store.get_file_info(selector) if info.type == fs.FileType.File]
        return {info.path.removeprefix(f"{BUCKET}/{prefix}/"): info.size for info in found}

    def read(self, path: str) -> bytes:
        with self.store.open_input_stream(f"{BUCKET}/{path}") as stream:
            content: bytes = stream.read()
        return content


@contextmanager
def s3_server() -> Iterator[S3]:
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    url = f"http://127.0.0.1:{port}"
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server,
        socket.create_server(("127.0.0.1", 0)) as proxy,
    ):
        try:
            wait_until(lambda: _answers(url), 30)
            urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT"), timeout=10).close()
            made = S3(url, f"http://127.0.0.1:{proxy.getsockname()[1]}")
            threading.Thread(target=_proxy, args=(proxy, port, made), daemon=True).start()
            yield made
        finally:
            server.kill()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/moto-api/", timeout=5).close()
    except OSError:
        return False
    return True


def _proxy(listening: socket.socket, port: int, s3: S3) -> None:
    with suppress(OSError):
        while True:
            client, _ = listening.accept()
            threading.Thread(target=_forward, args=(client, port, s3), daemon=True).start()


def _forward(client: socket.socket, port: int, s3: S3) -> None:
    with suppress(OSError), client, socket.create_connection(("127.0.0.1", port)) as server:
        while True:
            for ready in select.select([client, server], [], [])[0]:
                data = ready.recv(65536)
                if not data:
                    return
                writes = [path.decode() for path in _WRITE.findall(data)] if ready is client else []
                s3.writes += writes
                if s3.breaks & {int(part) for path in writes for part in _PART.findall(path)}:
                    return
                (server if ready is client else client).sendall(data)
