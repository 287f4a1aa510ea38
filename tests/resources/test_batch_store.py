"""The store: keys from content, hostile names, the lock, and what is kept when things change."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from resources import durable, pipeline
from resources.batch_store.batch import Batch
from resources.batch_store.spec import is_key
from resources.batch_store.store import BatchStore
from resources.engine.factory import EngineStarter
from resources.errors import BatchFailed, BatchLocked, BatchNotFound, InputRefused, OptionsError
from tests.helpers import ROOT, catalog_of, chat, chats, held_by_another_process, python, wait_until


@pytest.fixture
def store(tmp_path: Path) -> BatchStore:
    return BatchStore(tmp_path / "data")


def written(folder: Path, name: str = "in.jsonl", text: str | None = None) -> Path:
    path = folder / name
    path.write_text(chats(2) if text is None else text)
    return path


def process(batch: Batch) -> None:
    """All three steps, with the null engine."""
    catalog = catalog_of()
    with batch.lock("test"):
        pipeline.check(batch, catalog)
        pipeline.answer(batch, catalog, EngineStarter(batch.root, batch.root))
        pipeline.publish(batch)


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# --- Keys -----------------------------------------------------------------------------------------------------------


def test_same_file_twice_is_the_same_batch(store: BatchStore, tmp_path: Path) -> None:
    first = store.register(written(tmp_path))
    second = store.register(written(tmp_path))
    assert (first.created, second.created) == (True, False)
    assert first.batch == second.batch
    assert store.keys() == [first.batch.key]


def test_content_and_answer_changing_options_make_the_key(store: BatchStore, tmp_path: Path) -> None:
    path = written(tmp_path)
    key = store.register(path).batch.key
    assert store.register(written(tmp_path, "other.jsonl")).batch.spec.identity == store.get(key).spec.identity
    assert store.register(path, {"chunk_rows": 5, "metadata": {"a": "b"}}).batch.key == key
    assert store.register(path, {"model": "m"}).batch.key != key
    assert store.register(path, {"defaults": {"temperature": 0}}).batch.key != key
    assert store.register(path, engine="null").batch.key != key
    assert store.register(path, limit=1).batch.key != key
    assert store.register(written(tmp_path, text=chats(3))).batch.key != key


def test_limit_takes_the_first_lines_under_their_own_numbers(store: BatchStore, tmp_path: Path) -> None:
    path = written(tmp_path, text=chat("a") + "\n\n" + chat("b") + chat("c"))
    batch = store.register(path, limit=2).batch
    assert batch.input_path.read_text() == chat("a") + "\n\n" + chat("b")
    with batch.lock("test"):
        assert pipeline.check(batch, catalog_of()).last_line == 4


@pytest.mark.parametrize(
    "stem",
    [
        "Täglicher Bericht",
        "-rf --all",
        "..",
        "a\nb",
        "a\tb; rm -rf $HOME",
        "日本語",
        "_",
        "%2e%2e",
        "x" * 249,
        "é" * 124,
    ],
)
def test_hostile_file_names_make_safe_keys(store: BatchStore, tmp_path: Path, stem: str) -> None:
    path = written(tmp_path, f"{stem}.jsonl")
    batch = store.register(path).batch
    assert is_key(batch.key)
    assert batch.root.parent == store.root
    assert batch.spec.source_name == path.name
    assert store.get(batch.key) == batch


def test_file_name_that_is_not_utf8_is_registered(store: BatchStore, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl"))
    path.write_text(chats(1))
    batch = store.register(path).batch
    assert is_key(batch.key)
    assert batch.spec.source_name == "caf�.jsonl"


@pytest.mark.parametrize(
    "key",
    ["../x", "../../etc/passwd", "a/b-00000000", "a\0b-00000000", "x" * 5000, "", ".", "..", "A-00000000", "a-0000000g",
     "a-00000000\n", "in-12345678", "-a-00000000", "a-00000000/", "*", "é-00000000"],
)  # fmt: skip
def test_hostile_keys_are_not_found_and_touch_nothing(store: BatchStore, tmp_path: Path, key: str) -> None:
    outside = tmp_path / "data" / "x"
    outside.mkdir()
    (outside / "batch.json").write_text("{}")
    before = files_below(tmp_path)
    with pytest.raises(BatchNotFound):
        store.get(key)
    with pytest.raises(BatchNotFound):
        store.remove(key)
    assert files_below(tmp_path) == before


def test_key_that_other_content_has_is_refused(store: BatchStore, tmp_path: Path) -> None:
    batch = store.register(written(tmp_path)).batch
    forged = batch.spec.model_copy(update={"identity": batch.spec.identity[:8] + "0" * 56})
    (batch.root / "batch.json").write_text(forged.model_dump_json())
    with pytest.raises(InputRefused, match="taken by other content"):
        store.register(written(tmp_path))
    assert store.get(batch.key).spec == forged


def test_what_is_no_input_file_is_refused_and_leaves_nothing(store: BatchStore, tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(written(tmp_path))
    (tmp_path / "dir.jsonl").mkdir()
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "in.txt").write_text("x")
    for name in ("link.jsonl", "dir.jsonl", "fifo.jsonl", "in.txt", "gone.jsonl"):
        with pytest.raises(InputRefused, match=name.partition(".")[0]):
            store.register(tmp_path / name)
    with pytest.raises(OptionsError):
        store.register(tmp_path / "in.jsonl", {"no_such_option": 1})
    assert list(store.root.iterdir()) == []


def test_file_that_changes_while_it_is_read_is_refused(store: BatchStore, tmp_path: Path) -> None:
    path = written(tmp_path, text="x" * 50_000_000)
    done, touched = threading.Event(), threading.Event()

    def keep_changing() -> None:
        while not done.is_set():
            os.utime(path)
            touched.set()

    thread = threading.Thread(target=keep_changing)
    thread.start()
    try:
        touched.wait(10)
        with pytest.raises(InputRefused, match="changed while it was read"):
            store.register(path)
    finally:
        done.set()
        thread.join()
    assert list(store.root.iterdir()) == []


def test_several_processes_register_the_same_file_at_once(store: BatchStore, tmp_path: Path) -> None:
    written(tmp_path)
    script = (
        "import sys; from pathlib import Path; from resources.batch_store.store import BatchStore\n"
        "store = BatchStore(Path(sys.argv[1]) / 'data'); print('ready', flush=True)\n"
        "while not (Path(sys.argv[1]) / 'go').exists(): pass\n"
        "print(store.register(Path(sys.argv[1]) / 'in.jsonl').created)"
    )
    processes = [python("-c", script, tmp_path) for _ in range(3)]
    for one in processes:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    outcomes = [one.communicate(timeout=30) for one in processes]
    assert sorted(out for out, _ in outcomes) == ["False\n", "False\n", "True\n"], outcomes
    assert len(store.keys()) == len(list(store.root.iterdir())) == 1


# --- Registered again -----------------------------------------------------------------------------------------------


def test_operational_options_are_taken_over(store: BatchStore, tmp_path: Path) -> None:
    key = store.register(written(tmp_path), {"chunk_rows": 5}).batch.key
    again = store.register(written(tmp_path), {"chunk_rows": 7, "priority": 1})
    assert not again.created
    assert store.get(key).spec.options.chunk_rows == again.batch.spec.options.chunk_rows == 7
    assert store.get(key).spec.registered_at == again.batch.spec.registered_at


def test_options_of_a_batch_that_is_worked_on_stay_and_it_says_so(store: BatchStore, tmp_path: Path) -> None:
    batch = store.register(written(tmp_path), {"chunk_rows": 5}).batch
    with held_by_another_process(batch, "a run"):
        again = store.register(written(tmp_path), {"chunk_rows": 7})
    assert again.note is not None
    assert "a run" in again.note
    assert store.get(batch.key).spec.options.chunk_rows == 5


def test_final_failure_is_cleared_when_the_options_change(store: BatchStore, tmp_path: Path) -> None:
    path = written(tmp_path, text=chat("a") + "not json\n")
    batch = store.register(path, {"on_invalid": "reject"}).batch
    with pytest.raises(BatchFailed), batch.lock("test"):
        pipeline.check(batch, catalog_of())
    assert (store.get(batch.key).final_failure() or {})["code"] == "invalid_requests"
    store.register(path, {"on_invalid": "reject"})
    assert store.get(batch.key).final_failure()
    store.register(path, {"on_invalid": "quarantine"})
    assert store.get(batch.key).final_failure() is None


def test_sidecar_is_part_of_the_batch_and_options_given_stand_over_it(store: BatchStore, tmp_path: Path) -> None:
    (tmp_path / "in.yaml").write_text("model: m\nchunk_rows: 5\n")
    batch = store.register(written(tmp_path), {"chunk_rows": 6}).batch
    assert (batch.spec.options.model, batch.spec.options.chunk_rows) == ("m", 6)


def test_snapshot_is_the_batchs_own(store: BatchStore, tmp_path: Path) -> None:
    path = written(tmp_path)
    batch = store.register(path).batch
    path.write_text("changed")
    assert batch.input_path.read_text() == chats(2)
    assert batch.input_path.stat().st_mode & 0o077 == 0


def test_registering_a_pruned_batch_brings_its_snapshot_back_when_asked_to(store: BatchStore, tmp_path: Path) -> None:
    batch = store.register(written(tmp_path)).batch
    process(batch)
    batch.input_path.unlink()
    assert batch.is_pruned()
    assert not store.register(written(tmp_path)).created
    assert batch.is_pruned()
    assert not store.register(written(tmp_path), restore=True).created
    assert batch.input_path.read_text() == chats(2)


# --- The lock -------------------------------------------------------------------------------------------------------


def test_second_process_is_refused_with_the_first_ones_name(store: BatchStore, tmp_path: Path) -> None:
    batch = store.register(written(tmp_path)).batch
    assert batch.locked_by() is None
    with held_by_another_process(batch, "the first run") as holder:
        with pytest.raises(BatchLocked, match=f"the first run .process {holder.pid} "), batch.lock("the second"):
            pass
        assert (batch.locked_by() or {})["owner"] == "the first run"
        with pytest.raises(BatchLocked):
            store.remove(batch.key)
    assert store.get(batch.key)


def test_lock_is_free_when_its_process_is_killed(store: BatchStore, tmp_path: Path) -> None:
    batch = store.register(written(tmp_path)).batch
    with held_by_another_process(batch) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert batch.locked_by() is None
        with batch.lock("the next"):
            assert (batch.locked_by() or {})["owner"] == "the next"


def test_child_process_does_not_keep_the_lock_of_its_parent(store: BatchStore, tmp_path: Path) -> None:
    batch = store.register(written(tmp_path)).batch
    with batch.lock("parent"):
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, close_fds=False
        )
    try:
        assert batch.locked_by() is None
        with batch.lock("next"):
            assert child.poll() is None
    finally:
        child.communicate()


def test_lock_is_dropped_after_an_error(store: BatchStore, tmp_path: Path) -> None:
    batch = store.register(written(tmp_path)).batch
    with pytest.raises(RuntimeError), batch.lock("first"):
        raise RuntimeError
    assert batch.locked_by() is None


def test_leftovers_of_a_killed_run_are_removed_by_the_next_and_nothing_else(store: BatchStore, tmp_path: Path) -> None:
    batch = store.register(written(tmp_path)).batch
    before = files_below(batch.root)
    outside = written(tmp_path, "precious.jsonl")
    (batch.root / f"{durable.TEMPORARY}1-requests").mkdir()
    (batch.root / f"{durable.TEMPORARY}1-requests" / "part-00000.parquet").write_bytes(b"half")
    (batch.root / f"{durable.TEMPORARY}2-run.json").write_bytes(b"{")
    (batch.root / f"{durable.TEMPORARY}3-link").symlink_to(outside)
    with batch.lock("next"):
        pass
    assert files_below(batch.root) == before | {"lock"}
    assert outside.exists()


def test_remove_takes_everything_and_only_that_batch(store: BatchStore, tmp_path: Path) -> None:
    batch = store.register(written(tmp_path)).batch
    other = store.register(written(tmp_path, "other.jsonl")).batch
    process(batch)
    store.remove(batch.key)
    assert [path.name for path in store.root.iterdir()] == [other.key]
    with pytest.raises(BatchNotFound):
        store.get(batch.key)
    with pytest.raises(BatchNotFound), batch.lock("late"):
        pass


def test_abandoned_registrations_are_removed_after_a_day(store: BatchStore, tmp_path: Path) -> None:
    old, new = (store.root / f"{durable.TEMPORARY}{name}" for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir()
    os.utime(old, (time.time() - 90_000,) * 2)
    store.register(written(tmp_path))
    assert (old.exists(), new.exists()) == (False, True)


def test_registration_that_is_killed_leaves_no_batch(store: BatchStore, tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    with path.open("wb") as stream:
        stream.truncate(2_000_000_000)  # takes seconds to read
    script = "import sys; from pathlib import Path; from resources.batch_store.store import BatchStore\n" + (
        f"BatchStore(Path({str(tmp_path / 'data')!r})).register(Path({str(path)!r}))"
    )
    process_ = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    wait_until(lambda: any(copy.stat().st_size for copy in store.root.glob("*/input.jsonl")), 20)
    process_.kill()
    process_.wait()
    assert store.keys() == []
    assert list(store) == []
