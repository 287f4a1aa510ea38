"""A model's files: there or not, how much memory they need, and how they are fetched."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from resources.engine.catalog import ModelEntry
from resources.engine.model_files import memory_needed, missing_files, model_folder
from tests.helpers import python

CONFIG = {
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 512,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}


def model(folder: Path, size: int = 1000, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(size)
    return folder


def test_memory_is_that_of_the_weights_and_of_one_long_request(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", 1_000_000)
    need = memory_needed(ModelEntry(name="m", source=str(folder)), folder)
    assert need.weights == 1_000_000
    assert need.cache == 2 * 10 * 2 * 64 * 2 * 4096  # K and V, layers, heads, their size, bytes, tokens


def test_memory_follows_what_the_entry_asks_for(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", 1_000_000)
    arguments = {"dtype": "float32", "max_model_len": 1024, "tensor-parallel-size": 2}
    need = memory_needed(ModelEntry(name="m", source=str(folder), engine_args=arguments), folder)
    assert (need.weights, need.cache) == (1_000_000, 2 * 10 * 2 * 64 * 4 * 1024 // 2)


def test_weights_that_are_quantized_keep_their_size(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", 1_000_000, quantization_config={"bits": 4})
    entry = ModelEntry(name="m", source=str(folder), engine_args={"dtype": "float32"})
    assert memory_needed(entry, folder).weights == 1_000_000


def test_parts_that_are_missing_are_named(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    assert missing_files(folder) == []
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert missing_files(folder) == ["model-2.safetensors"]
    assert model_folder(ModelEntry(name="m", source=str(tmp_path))) is None


# --- pull -----------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of a model hub as a download needs."""

    files: ClassVar = {"config.json": b"{}", "model.safetensors": b"weights"}
    commit = "a" * 40

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = self.path.split("?")[0].rpartition("/")[2]
        if self.path.startswith("/api/models/org/model/revision/v1"):
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": "org/model", "sha": self.commit, "siblings": siblings, "private": False, "tags": []}
            self.send(json.dumps({**info, "downloads": 0, "likes": 0}).encode(), "application/json")
        elif self.path.startswith(f"/api/models/org/model/tree/{self.commit}"):
            parts = [{"type": "file", "path": name, "size": len(body)} for name, body in self.files.items()]
            tree = [part | {"oid": hashlib.sha1(self.files[str(part["path"])]).hexdigest()} for part in parts]
            self.send(json.dumps(tree).encode(), "application/json")
        elif "/resolve/" in self.path and name in self.files:
            self.send(self.files[name], "application/octet-stream")
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def pull(folder: Path, endpoint: str, source: str) -> tuple[int, str]:
    (folder / "models.yaml").write_text(f"models: {{m: {{source: {source}, revision: v1}}}}")
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "VLLM_BATCH_DATA": str(folder / "data")}
    process = python("-m", "vllm_batch_pipelines.cli.main", "models", "pull", "m", env=environment, cwd=folder)
    _, said = process.communicate(timeout=100)
    return process.returncode, said


@pytest.mark.e2e
def test_pull_fetches_a_revision_and_says_where_it_is(tmp_path: Path) -> None:
    with hub() as endpoint:
        code, said = pull(tmp_path, endpoint, "org/model")
    assert code == 0, said
    folder = Path(said.splitlines()[-1].removeprefix("m: "))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == Hub.files
    assert folder.name == Hub.commit


@pytest.mark.e2e
def test_pull_of_what_the_hub_does_not_have_says_so(tmp_path: Path) -> None:
    with hub() as endpoint:
        code, said = pull(tmp_path, endpoint, "org/other")
    assert code == 2
    assert f"org/other at v1 cannot be fetched from {endpoint}" in " ".join(said.split())
    assert "Traceback" not in said
