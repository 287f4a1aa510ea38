"""Exports to an object store: a revision is complete where its manifest is, and nothing is ever there in part."""

import hashlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resources.answering import Mode
from resources.child import call_in_child
from resources.errors import ChildFailed, ExportFailed
from resources.exports.export import export_latest, export_published
from resources.exports.published import Published
from resources.exports.targets import ObjectStoreTarget
from tests.helpers import Asked, chats, ok, python, wait_until
from tests.object_stores import BUCKET, CREDENTIALS, PART_BYTES, Store, store_server

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module", params=["s3", "gs"])
def server(request: pytest.FixtureRequest) -> Iterator[Store]:
    """The same promises from both kinds."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in CREDENTIALS.items():
            environment.setenv(name, value)
        with store_server(request.param) as made:
            yield made


@pytest.fixture
def store(server: Store) -> Store:
    server.break_at()
    server.forget_writes()
    return server


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """Three small lines."""
    made = Asked(tmp_path_factory.mktemp("small"), chats(3))
    made.run()
    return made


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """So much output that it goes up in three parts."""
    made = Asked(tmp_path_factory.mktemp("large"), chats(25))
    made.run(lambda request: ok(request, "x" * 1_000_000))
    assert (made.batch.output_dir / "output.jsonl").stat().st_size > 2 * PART_BYTES
    return made


def quiet(_message: Any) -> None:
    pass


def test_files_and_rows_lie_under_key_and_revision_with_their_hashes(store: Store, asked: Asked) -> None:
    written = export_latest(store.target("first"), asked.batch, quiet)
    published = Published.of(asked.batch)
    folder = f"first/{asked.batch.key}/{published.revision}"
    assert written.where == f"{store.scheme}://{BUCKET}/{folder}/"
    assert (written.rows, written.there, written.changed) == (3, 3, True)

    manifest = json.loads(store.read(f"{folder}/manifest.json"))
    assert (manifest["batch"], manifest["revision"], manifest["rows"]) == (asked.batch.key, published.revision, 3)
    names = [entry["name"] for entry in manifest["files"]]
    assert names == ["output.jsonl", "errors.jsonl", "results/part-00000.parquet"]
    for entry in manifest["files"]:
        content = store.read(f"{folder}/{entry['name']}")
        assert content == (asked.batch.output_dir / entry["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["size"], entry["sha256"])
    rows = pq.read_table(pa.BufferReader(store.read(f"{folder}/results/part-00000.parquet")))
    assert rows["custom_id"].to_pylist() == ["r1", "r2", "r3"]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("parquet", {"results/part-00000.parquet", "manifest.json"}),
        ("jsonl", {"output.jsonl", "errors.jsonl", "manifest.json"}),
    ],
)
def test_only_the_format_that_was_asked_for_is_sent(store: Store, asked: Asked, kind: str, names: set[str]) -> None:
    assert export_latest(store.target(kind, format=kind), asked.batch, quiet).there == 3
    assert set(store.objects(f"{kind}/{asked.batch.key}/{Published.of(asked.batch).revision}")) == names


def test_a_repeated_export_changes_nothing(store: Store, asked: Asked) -> None:
    export_latest(store.target("again"), asked.batch, quiet)
    assert store.names_written == {"output.jsonl", "errors.jsonl", "part-00000.parquet", "manifest.json"}
    store.forget_writes()
    written = export_latest(store.target("again"), asked.batch, quiet)
    assert (written.there, written.changed) == (3, False)
    assert store.writes == []


def test_an_object_that_somebody_removed_is_sent_again(store: Store, asked: Asked) -> None:
    target = store.target("removed")
    export_latest(target, asked.batch, quiet)
    folder = f"{asked.batch.key}/{Published.of(asked.batch).revision}"
    store.client.delete_file(f"results/removed/{folder}/results/part-00000.parquet")
    store.forget_writes()
    assert export_latest(target, asked.batch, quiet).changed
    assert store.names_written == {"part-00000.parquet", "manifest.json"}


def test_an_upload_that_breaks_in_the_middle_leaves_no_object_and_the_next_run_makes_it_whole(
    store: Store, large: Asked
) -> None:
    store.break_at(2)
    target = store.target("broken", timeout=4.0)
    with pytest.raises(ExportFailed, match=rf"^{store.scheme}://{BUCKET}/broken/") as caught:
        export_latest(target, large.batch, quiet)
    assert "very-secret" not in str(caught.value)
    assert {1, 2} <= store.parts_seen
    assert store.objects("broken") == {}

    store.break_at()
    assert export_latest(target, large.batch, quiet).there == 25
    folder = f"{large.batch.key}/{Published.of(large.batch).revision}"
    size = (large.batch.output_dir / "output.jsonl").stat().st_size
    assert store.objects("broken")[f"{folder}/output.jsonl"] == size


def test_files_that_went_up_before_it_broke_are_not_sent_again(store: Store, large: Asked) -> None:
    published = Published.of(large.batch)
    parquet = store.target("half", timeout=4.0, format="parquet")
    export_published(parquet, published, quiet)
    store.break_at(2)
    both = store.target("half", timeout=4.0)
    with pytest.raises(ExportFailed):
        export_published(both, published, quiet)
    told = json.loads(store.read(f"half/{large.batch.key}/{published.revision}/manifest.json"))
    assert all(entry["name"].endswith(".parquet") for entry in told["files"]), "the lines are not complete"
    store.break_at()
    store.forget_writes()
    assert export_published(both, published, quiet).there == 25
    assert store.names_written == {"output.jsonl", "errors.jsonl", "manifest.json"}


_EXPORT = """
import sys
from pathlib import Path
from resources.batch_store.store import BatchStore
from resources.exports.export import export_latest
from resources.exports.targets import ObjectStoreTarget
target = ObjectStoreTarget.model_validate_json(sys.argv[1])
export_latest(target, BatchStore(Path(sys.argv[2])).get(sys.argv[3]), lambda *_, **__: None)
"""


def test_an_export_that_is_killed_half_way_leaves_no_object_in_part(store: Store, large: Asked) -> None:
    store.break_at(3)  # it tries that part again and again
    target = store.target("killed", timeout=60.0)
    root = large.folder / "data"
    process = python("-c", _EXPORT, target.model_dump_json(), root, large.batch.key, env=CREDENTIALS)
    with process:
        wait_until(lambda: 3 in store.parts_seen, 30)
        process.send_signal(signal.SIGKILL)
    assert store.objects("killed") == {}
    store.break_at()
    assert export_latest(target, large.batch, quiet).there == 25


def test_a_store_that_never_answers_is_given_up(store: Store, asked: Asked, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        targets = tmp_path / "targets.yaml"
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        targets.write_text(
            f"exports: {{lake: {{url: '{store.scheme}://results/deaf', endpoint_url: '{address}', timeout: 30}}}}"
        )
        arguments = {
            "data_root": str(asked.folder / "data"),
            "targets_file": str(targets),
            "key": asked.batch.key,
            "target": "lake",
        }
        with pytest.raises(ChildFailed, match=r"nothing was heard of it for 3 s"):
            call_in_child("resources.exports.export:export_batch", arguments, silent_seconds=3)
    assert os.environ["AWS_ACCESS_KEY_ID"] == "a-key"


def test_a_bucket_that_is_not_there_is_named(store: Store, asked: Asked) -> None:
    target = store.target("x", url=f"{store.scheme}://nobodys-bucket/x")
    with pytest.raises(ExportFailed, match=rf"^{store.scheme}://nobodys-bucket/x/.*: .*NO(_SUCH_BUCKET|T_FOUND)"):
        export_latest(target, asked.batch, quiet)


def test_a_revision_that_is_replaced_meanwhile_gives_way_to_the_newer_one(store: Store, tmp_path: Path) -> None:
    asked = Asked(tmp_path / "replaced", chats(3))
    asked.run()
    old = Published.of(asked.batch)
    told: list[Any] = []

    def replace(message: Any) -> None:
        told.append(message)
        if len(told) == 1:  # the files are hashed: a restart is done in the middle of it
            asked.run(mode=Mode.RESTART)

    written = export_latest(store.target("replaced"), asked.batch, replace)
    new = Published.of(asked.batch)
    assert new.number > old.number
    assert written.where.endswith(f"/{new.revision}/")
    assert {name.split("/")[1] for name in store.objects("replaced")} == {new.revision}


def test_google_without_credentials_is_told_in_words(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "nobody.json"))
    target = ObjectStoreTarget(name="lake", url="gs://results/x")
    with pytest.raises(ExportFailed, match=r"^gs://results/x/.*: .*Cannot open credentials file"):
        export_latest(target, asked.batch, quiet)
