"""Named moments of a commit, at which a test ends the process, fills the disk or takes a note.

Nothing arms them but a test's own program that calls `arm`: no setting, no environment variable, no file. Otherwise
they cost one comparison.
"""

from collections.abc import Callable
from pathlib import Path

Callback = Callable[[str, Path], None]
"""Gets the step that was just done and the path that it was done to. It may raise, or not return."""

_callback: Callback | None = None


def arm(callback: Callback | None) -> None:
    """Have the callback called at every step, in the thread that takes it; None for never again."""
    global _callback
    _callback = callback


def reached(step: str, path: Path) -> None:
    if _callback is not None:
        _callback(step, path)
