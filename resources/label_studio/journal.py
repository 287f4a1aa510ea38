"""The journal of an import: which lines of a batch are tasks of a project. A file in the batch's folder, appended to.

A page is noted before it is sent (`sending`) and after the server said it is there (`sent`), each with a sync. So a run
that is killed leaves at most one page of which nothing is known, and its lines stand there. What the journal knows is
also how a task that a person has deleted is told from one that was never made.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from resources import durable


class Sent(NamedTuple):
    """A line that was made a task. `task` is None where the server gave no id."""

    line: int
    task: int | None
    answer: str


@dataclass
class Journal:
    """What is known, in memory and on disk. The caller holds the batch's lock."""

    path: Path
    project: dict[str, Any] | None = None
    sent: dict[int, Sent] = field(default_factory=dict)
    open_page: tuple[int, int] | None = None
    open_since: float = 0.0
    _stream: BinaryIO | None = None

    @staticmethod
    def read(path: Path) -> "Journal":
        """The journal as it stands; a last line that a power cut tore is not there."""
        journal = Journal(path)
        try:
            lines = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return journal
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            journal._take(entry)
        return journal

    def begin(self, project: dict[str, Any], sent: Sequence[Sent] = ()) -> None:
        """From here on it is about this project. Of what was imported into another one, only `sent` counts."""
        self._append({"project": project, "sent": [list(row) for row in sent]})

    def sending(self, first: int, last: int) -> None:
        self._append({"sending": [first, last], "at": time.time()})

    def has_sent(self, rows: Sequence[Sent]) -> None:
        self._append({"sent": [list(row) for row in rows]})

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _take(self, entry: dict[str, Any]) -> None:
        if "project" in entry:
            self.project, self.sent, self.open_page = entry["project"], {}, None
        if "sending" in entry:
            first, last = entry["sending"]
            self.open_page, self.open_since = (first, last), float(entry["at"])
        if "sent" in entry:
            self.open_page = None
            self.sent |= {line: Sent(line, task, answer) for line, task, answer in entry["sent"]}

    def _append(self, entry: dict[str, Any]) -> None:
        self._take(entry)
        if self._stream is None:
            self.path.parent.mkdir(mode=0o700, exist_ok=True)
            is_new = not self.path.exists()
            self._stream = self.path.open("ab")
            self._stream.write(b"" if is_new else b"\n")  # a torn line ends here
            if is_new:
                durable.sync_folder(self.path.parent)
                durable.sync_folder(self.path.parent.parent)
        self._stream.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())
