"""Start requests, and which dropped files are whole."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from resources.batch_store import queue
from resources.batch_store.inbox import Inbox
from resources.batch_store.store import BatchStore
from resources.errors import BatchNotFound
from tests.helpers import chats, drop


@pytest.fixture
def store(tmp_path: Path) -> BatchStore:
    return BatchStore(tmp_path / "data")


def registered(store: BatchStore, folder: Path, name: str = "in") -> str:
    (folder / f"{name}.jsonl").write_text(chats(1))
    return store.register(folder / f"{name}.jsonl").batch.key


# --- Start requests -------------------------------------------------------------------------------------------------


def test_request_is_left_found_and_withdrawn(store: BatchStore, tmp_path: Path) -> None:
    key = registered(store, tmp_path)
    left = queue.enqueue(store, key, "retry_failed", "inbox", ["truncated", "errors"])
    assert left.failed == ("errors", "truncated")
    assert queue.is_queued(store, key)
    assert list(queue.pending(BatchStore(tmp_path / "data"))) == [left]
    assert queue.withdraw(store, key)
    assert not queue.is_queued(store, key)
    assert not queue.withdraw(store, key)


def test_a_later_request_replaces_an_earlier_one_and_is_not_withdrawn_in_its_name(
    store: BatchStore, tmp_path: Path
) -> None:
    key = registered(store, tmp_path)
    earlier = queue.enqueue(store, key)
    later = queue.enqueue(store, key, "restart")
    assert list(queue.pending(store)) == [later]
    assert earlier.id != later.id
    assert not queue.withdraw(store, key, earlier.id)
    assert queue.withdraw(store, key, later.id)


def test_request_of_an_older_version_is_read(store: BatchStore, tmp_path: Path) -> None:
    key = registered(store, tmp_path)
    (store.queue_dir / f"{key}.json").write_text('{"id": "1", "mode": "retry_failed", "origin": "submit"}')
    assert list(queue.pending(store)) == [queue.StartRequest(key, "1", "retry_failed", "submit")]


def test_requests_come_oldest_first(store: BatchStore, tmp_path: Path) -> None:
    keys = [registered(store, tmp_path, name) for name in ("b", "a", "c")]
    for age, key in enumerate(keys):
        queue.enqueue(store, key)
        os.utime(store.queue_dir / f"{key}.json", (1_000 + age,) * 2)
    assert [request.key for request in queue.pending(store)] == keys


def test_unknown_batch_is_not_queued(store: BatchStore) -> None:
    for key in ("../../x", "in-00000000"):
        with pytest.raises(BatchNotFound):
            queue.enqueue(store, key)


def test_other_files_in_the_queue_are_left_alone(store: BatchStore, tmp_path: Path) -> None:
    key = registered(store, tmp_path)
    for name, content in {
        "in-00000000.json": "{",
        "x.json": "{}",
        f"{key}.json.bak": "{}",
        "a-00000001.json": "[]",
    }.items():
        (store.queue_dir / name).write_text(content)
    left = queue.enqueue(store, key)
    assert list(queue.pending(store)) == [left]
    assert len(list(store.queue_dir.iterdir())) == 5


# --- The inbox ------------------------------------------------------------------------------------------------------


@pytest.fixture
def inbox(tmp_path: Path) -> Inbox:
    return opened(tmp_path)


def opened(folder: Path) -> Inbox:
    return Inbox(folder / "inbox", folder / "index.json")


def names(inbox: Inbox) -> list[str]:
    return [dropped.path.name for dropped in inbox.settled()]


@contextmanager
def held_open_for_writing(path: Path, flags: str = "ab") -> Iterator[subprocess.Popen[bytes]]:
    """Another process has the file open; each line that it gets is appended."""
    script = (
        "import sys; f = open(sys.argv[1], sys.argv[2]); print('open', flush=True)\n"
        "for line in sys.stdin.buffer: f.write(line); f.flush(); print('written', flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path), flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"open\n"
        try:
            yield writer
        finally:
            writer.kill()


def test_files_that_settled_come_oldest_first(inbox: Inbox) -> None:
    for age, name in ((10, "new.jsonl"), (30, "old.jsonl.gz"), (20, "MID.JSONL.ZST")):
        drop(inbox.folder, name, "x", age)
    assert names(inbox) == ["old.jsonl.gz", "MID.JSONL.ZST", "new.jsonl"]


@pytest.mark.e2e
def test_growing_file_is_taken_when_its_writer_is_done_and_not_before(inbox: Inbox) -> None:
    path = drop(inbox.folder, "growing.jsonl", "", age_seconds=60)
    drop(inbox.folder, "whole.jsonl", "x")
    with held_open_for_writing(path) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write(chats(1).encode())
        writer.stdin.flush()
        assert writer.stdout.readline() == b"written\n"
        os.utime(path, (time.time() - 60,) * 2)  # old by its time, but open
        assert names(inbox) == ["whole.jsonl"]
    assert {dropped.path.name: dropped.size for dropped in inbox.settled()} == {
        "growing.jsonl": len(chats(1)),
        "whole.jsonl": 1,
    }


@pytest.mark.e2e
def test_file_that_was_just_written_is_waited_for(inbox: Inbox) -> None:
    drop(inbox.folder, "fresh.jsonl", "x", age_seconds=0)
    started = time.monotonic()
    assert names(inbox) == ["fresh.jsonl"]
    assert 1.0 < time.monotonic() - started < 5


def test_file_that_is_open_for_reading_is_taken(inbox: Inbox) -> None:
    path = drop(inbox.folder, "read.jsonl", "x")
    with path.open():
        assert names(inbox) == ["read.jsonl"]


def test_only_regular_files_with_an_input_suffix_are_seen(inbox: Inbox, tmp_path: Path) -> None:
    drop(tmp_path, "elsewhere.jsonl", "x")
    (inbox.folder / "link.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    (inbox.folder / "dangling.jsonl").symlink_to(tmp_path / "nowhere")
    (inbox.folder / "dir.jsonl").mkdir()
    drop(inbox.folder / "dir.jsonl", "inner.jsonl", "x")
    os.mkfifo(inbox.folder / "fifo.jsonl")
    for name in (".hidden.jsonl", "in.json", "in.yaml", "in.jsonl.part", "jsonl", "in.txt"):
        drop(inbox.folder, name, "x")
    drop(inbox.folder, "good.jsonl", "x")
    assert names(inbox) == ["good.jsonl"]


def test_file_is_taken_once_also_by_the_next_process(inbox: Inbox, tmp_path: Path) -> None:
    drop(inbox.folder, "in.jsonl", "x")
    for dropped in inbox.settled():
        inbox.take(dropped, key="in-00000000")
    inbox.save()
    assert names(inbox) == names(opened(tmp_path)) == []


def test_file_that_was_refused_is_not_offered_again_until_it_changes(inbox: Inbox, tmp_path: Path) -> None:
    drop(inbox.folder, "in.jsonl", "x")
    for dropped in inbox.settled():
        inbox.take(dropped, error="no")
    inbox.save()
    assert names(opened(tmp_path)) == []
    drop(inbox.folder, "in.jsonl", "other", age_seconds=50)
    assert names(opened(tmp_path)) == ["in.jsonl"]


def test_replaced_file_is_taken_again_even_with_the_same_size_and_time(inbox: Inbox) -> None:
    path = drop(inbox.folder, "in.jsonl", "x")
    for dropped in inbox.settled():
        inbox.take(dropped, key="in-00000000")
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    replacement = inbox.folder / ".new"
    replacement.write_text("y")
    os.utime(replacement, ns=times)
    replacement.rename(path)
    assert names(inbox) == ["in.jsonl"]


def test_taken_file_that_is_gone_is_forgotten(inbox: Inbox, tmp_path: Path) -> None:
    path = drop(inbox.folder, "in.jsonl", "x")
    for dropped in inbox.settled():
        inbox.take(dropped, key="in-00000000")
    inbox.save()
    path.unlink()
    inbox.save()
    assert (tmp_path / "index.json").read_text() == "{}"


def test_damaged_index_offers_the_files_again(inbox: Inbox, tmp_path: Path) -> None:
    drop(inbox.folder, "in.jsonl", "x")
    (tmp_path / "index.json").write_text("{")
    assert names(opened(tmp_path)) == ["in.jsonl"]


def test_three_hundred_files_at_once_are_each_taken_once(inbox: Inbox, store: BatchStore, tmp_path: Path) -> None:
    for number in range(300):
        drop(inbox.folder, f"f{number:03}.jsonl", f"{number}\n", age_seconds=600 - number)
    found = list(inbox.settled())
    assert [dropped.path.name for dropped in found] == [f"f{number:03}.jsonl" for number in range(300)]
    for dropped in found[:200]:
        inbox.take(dropped, key="x")
    inbox.save()
    assert names(opened(tmp_path)) == [f"f{number:03}.jsonl" for number in range(200, 300)]


def test_same_content_dropped_twice_is_one_batch(inbox: Inbox, store: BatchStore) -> None:
    drop(inbox.folder, "in.jsonl", chats(1))
    first = [store.register(dropped.path).batch.key for dropped in inbox.settled()]
    drop(inbox.folder, "in.jsonl", chats(1), age_seconds=30)
    assert [store.register(dropped.path).batch.key for dropped in inbox.settled()] == first
    assert store.keys() == first
