"""Real servers of the protocols of S3 (moto's) and Google Cloud Storage (gcp-storage-emulator), each in a process of
its own, and a proxy before them that breaks off on command.

The proxy is a process too: pyarrow keeps Python waiting while it asks Google's kind of store how large an object is.
"""

import re
import select
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pyarrow import fs

from resources.exports.targets import ObjectStoreTarget
from tests.helpers import ROOT, wait_until

BUCKET = "results"
PART_BYTES = 10 * 1024 * 1024
"""pyarrow's parts of a multipart upload; those of an upload to Google are numbered as if they were as long."""
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "a-key",
    "AWS_SECRET_ACCESS_KEY": "very-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_WRITE = re.compile(rb"(?:PUT|POST|DELETE) (/\S*) HTTP/1.*?\r\n\r\n", re.S)
_S3_PART = re.compile(rb"partNumber=(\d+)")
_GS_START = re.compile(rb"content-range: bytes (\d+)-", re.I)
_GS_NAME = re.compile(r"[?&]name=([^&]*)")


@dataclass(frozen=True)
class Write:
    """A request that was to write: its path, and which part of an upload it brought."""

    path: str
    part: int | None

    @classmethod
    def read(cls, line: str) -> "Write":
        path, _, part = line.partition(" ")
        return cls(path, int(part) if part else None)

    @property
    def name(self) -> str:
        """The last part of the object's name."""
        found = _GS_NAME.search(self.path)
        return unquote(found[1] if found else self.path.partition("?")[0]).rpartition("/")[2]


@dataclass(frozen=True)
class Store:
    """`url` goes by the proxy, which notes what was to be written and cuts off uploads of the parts that are told."""

    scheme: str
    direct_url: str
    url: str
    folder: Path

    def break_at(self, *parts: int) -> None:
        (self.folder / "breaks").write_text(" ".join(map(str, parts)))

    @property
    def writes(self) -> list[Write]:
        return [Write.read(line) for line in (self.folder / "writes").read_text().splitlines()]

    def forget_writes(self) -> None:
        (self.folder / "writes").write_text("")

    def target(self, prefix: str, **fields: Any) -> ObjectStoreTarget:
        found = {"url": f"{self.scheme}://{BUCKET}/{prefix}", "endpoint_url": self.url, "timeout": 20.0, **fields}
        return ObjectStoreTarget(name="lake", **found)

    @property
    def parts_seen(self) -> set[int]:
        return {write.part for write in self.writes if write.part is not None}

    @property
    def names_written(self) -> set[str]:
        return {write.name for write in self.writes}

    @property
    def client(self) -> fs.FileSystem:
        """Past the proxy."""
        where = {"endpoint_override": self.direct_url.removeprefix("http://"), "scheme": "http"}
        if self.scheme == "s3":
            return fs.S3FileSystem(allow_bucket_creation=True, **where)
        return fs.GcsFileSystem(anonymous=True, project_id="tests", **where)

    def objects(self, prefix: str) -> dict[str, int]:
        """What anybody sees below a prefix: name and size."""
        selector = fs.FileSelector(f"{BUCKET}/{prefix}", recursive=True, allow_not_found=True)
        found = [info for info in self.client.get_file_info(selector) if info.type == fs.FileType.File]
        return {info.path.removeprefix(f"{BUCKET}/{prefix}/"): info.size for info in found}

    def read(self, path: str) -> bytes:
        with self.client.open_input_stream(f"{BUCKET}/{path}") as stream:
            content: bytes = stream.read()
        return content


@contextmanager
def store_server(scheme: str) -> Iterator[Store]:
    """One for `s3` or `gs`, with a bucket."""
    port, proxy_port = _free_port(), _free_port()
    url, proxy_url = (f"http://127.0.0.1:{number}" for number in (port, proxy_port))
    if scheme == "s3":
        server = ["moto.server", "-H", "127.0.0.1", "-p", str(port)]
    else:
        server = ["gcp_storage_emulator", "start", "--host", "127.0.0.1", "--port", str(port), "--in-memory"]
    with tempfile.TemporaryDirectory(prefix="vb-") as made, ExitStack() as running:
        store = Store(scheme, url, proxy_url, Path(made))
        store.break_at()
        store.forget_writes()
        for command in (server, ["tests.object_stores", str(proxy_port), str(port), made]):
            running.enter_context(_running(command))
        wait_until(lambda: _listens(port) and _listens(proxy_port), 30)
        store.client.create_dir(BUCKET)
        yield store


@contextmanager
def _running(module: list[str]) -> Iterator[None]:
    with subprocess.Popen(
        [sys.executable, "-m", *module], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield
        finally:
            process.kill()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except OSError:
        return False
    return True


# --- The proxy's process ----------------------------------------------------------------------------------------------


def proxy(port: int, to: int, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", port)) as listening:
        while True:
            client, _ = listening.accept()
            threading.Thread(target=_forward, args=(client, to, folder), daemon=True).start()


def _forward(client: socket.socket, to: int, folder: Path) -> None:
    with suppress(OSError), client, socket.create_connection(("127.0.0.1", to)) as server:
        while True:
            for ready in select.select([client, server], [], [])[0]:
                data = ready.recv(65536)
                if not data:
                    return
                parts = [_note(found, folder) for found in _WRITE.finditer(data)] if ready is client else []
                if {part for part in parts if part} & {*(folder / "breaks").read_text().split()}:
                    return
                (server if ready is client else client).sendall(data)


def _note(head: re.Match[bytes], folder: Path) -> str:
    """The part that a request brings."""
    number, start = _S3_PART.search(head[1]), _GS_START.search(head[0])
    part = number[1].decode() if number else str(int(start[1]) // PART_BYTES + 1) if start else ""
    with (folder / "writes").open("a") as notes:
        notes.write(f"{head[1].decode()} {part}\n")
    return part


if __name__ == "__main__":
    proxy(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
