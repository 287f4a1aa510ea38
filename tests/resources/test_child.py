"""Work in a process of its own: its result, its failure, and its end when it is silent or we are gone."""

import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from resources.child import call_in_child
from resources.errors import ChildFailed
from tests.helpers import python, wait_until

pytestmark = pytest.mark.e2e

FUNCTIONS = "tests.resources.child_functions"


def call(name: str, seconds: float = 30, heard: list[Any] | None = None, **arguments: Any) -> Any:
    hear = (lambda _: None) if heard is None else heard.append
    return call_in_child(f"{FUNCTIONS}:{name}", arguments, silent_seconds=seconds, hear=hear)


def test_result_and_words_come_back() -> None:
    heard: list[Any] = []
    assert call("double", heard=heard, number=21) == 42
    assert heard == ["begun"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("refuse", r"^no: postgresql://\*\*\*@host/db is closed$"),
        ("stumble", "^ValueError: boom$"),
        ("crash", r"ended without a result \(signal SIGSEGV\)"),
        ("leave", "SystemExit: 3"),
        ("no_such_function", "AttributeError"),
    ],
)
def test_whatever_goes_wrong_there_is_one_error_here(name: str, message: str) -> None:
    with pytest.raises(ChildFailed, match=message):
        call(name)


def _gone(pids: list[int]) -> bool:
    alive = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def test_one_that_says_nothing_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    with pytest.raises(ChildFailed, match="nothing was heard of it for 3 s"):
        call("hang", seconds=3, note=str(note))
    pids = [int(pid) for pid in note.read_text().split()]
    wait_until(lambda: _gone(pids))


def test_one_that_speaks_now_and_then_may_take_its_time() -> None:
    assert call("murmur", seconds=2.5) == "done"


def test_nothing_goes_on_when_the_caller_is_killed(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    code = f"from tests.resources.test_child import call; call('hang', seconds=600, note={str(note)!r})"
    with python("-c", code) as caller:
        pids = [int(pid) for pid in wait_until(lambda: note.exists() and note.read_text(), 30).split()]
        caller.send_signal(signal.SIGKILL)
        wait_until(lambda: _gone(pids))
