"""One writer per generation, with real processes: one that is stopped for a while, and one whose disk refuses."""

import hashlib
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.torture import CHUNK_ROWS, Torture
from tests.helpers import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

LINES = 600


@pytest.fixture
def torture(tmp_path: Path) -> Iterator[Torture]:
    with Torture(tmp_path, seed=3) as made:
        made.begin(LINES)
        yield made


@contextmanager
def stopped_half_way(torture: Torture) -> Iterator[subprocess.Popen[str]]:
    """A run that has committed something and is stopped, as by Ctrl-Z or a suspended machine."""
    run = torture.start()
    try:
        wait_until(lambda: any(torture.folder.glob("data/batches/*/results/*/*/chunk-*")), 30)
        run.send_signal(signal.SIGSTOP)
        wait_until(lambda: Path(f"/proc/{run.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        assert not torture.batch.is_published(), "it was done before it could be stopped"
        yield run
    finally:
        run.kill()
        run.communicate()


def end_of(run: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code, and what it said on stderr as one line."""
    _, errors = run.communicate(timeout=60)
    return run.returncode, " ".join(errors.split())


def content_of(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_second_run_is_refused_by_name_while_the_first_is_stopped_which_then_completes(torture: Torture) -> None:
    with stopped_half_way(torture) as first:
        before = torture.asked()
        status, errors = end_of(torture.start())
        assert status == 2
        assert f"is being worked on by vllm-batch run (process {first.pid} on" in errors
        assert torture.asked() == before
        first.send_signal(signal.SIGCONT)
        assert end_of(first)[0] == 1
    torture.compare()
    assert set(torture.texts_asked().values()) == {1}


def test_stopped_run_whose_batch_was_removed_makes_nothing_anew(torture: Torture) -> None:
    with stopped_half_way(torture) as run:
        root = torture.batch.root
        shutil.rmtree(root)
        run.send_signal(signal.SIGCONT)
        status, errors = end_of(run)
    assert (status, root.exists()) == (2, False)
    assert "was removed or replaced while this process worked on it" in errors


@pytest.mark.parametrize("what", ["lock", "folder"])
def test_stopped_run_writes_nothing_into_what_another_one_completed_meanwhile(torture: Torture, what: str) -> None:
    with stopped_half_way(torture) as first:
        root = torture.batch.root
        (root / "lock").unlink() if what == "lock" else shutil.rmtree(root)
        torture.complete()
        before = content_of(root)
        first.send_signal(signal.SIGCONT)
        status, errors = end_of(first)
    assert status == 2
    assert "was removed or replaced while this process worked on it" in errors
    assert content_of(root) == before
    torture.compare()


def test_file_that_may_not_grow_stops_the_run_with_a_clear_error_and_the_next_goes_on(torture: Torture) -> None:
    with stopped_half_way(torture) as run:
        resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (1500, 1500))
        run.send_signal(signal.SIGCONT)
        status, errors = end_of(run)
    assert status == 2
    assert "chunk-" in errors
    assert "File too large. Raise the limit on the size of files" in errors
    assert "Traceback" not in errors
    torture.complete()


@pytest.mark.parametrize("fate", ["ENOSPC written chunk 3", "EROFS opened chunk 3"])
def test_disk_that_refuses_from_some_moment_on_stops_the_run_and_the_next_goes_on(torture: Torture, fate: str) -> None:
    status, errors = end_of(torture.start(fate=fate))
    assert status == 2
    assert "Traceback" not in errors
    assert "run the batch again: what is committed stays" in errors
    kept = torture.committed()
    assert 0 < len(kept) <= 2 * CHUNK_ROWS
    torture.complete()
    assert kept <= torture.committed()
