"""`vllm-batch` that meets a fate at a named moment of a commit.

    python -m tests.e2e.victim NOTES "KILL renamed chunk 2" run FILE ...

The fate is KILL (the process kills itself there) or the name of an errno (the disk refuses from there on); then a
window, which is a step and the kind of file it was done to; then the how manieth time it is passed. Every window that
is passed is a line of the file NOTES.
"""

import errno
import os
import signal
import sys
from collections import Counter
from pathlib import Path

from resources import failpoints
from vllm_batch_pipelines.cli.main import app


def kind(path: Path) -> str:
    """What a path in the folder of a batch is, in a word."""
    parents = [parent.name for parent in path.parents]
    name = path.name
    if name == "summary.json":
        return "requests/summary.json" if parents[0].endswith("requests") else "outputs/summary.json"
    if parents[0] in ("outputs", "results") and path.suffix != ".json":
        return "revision" if parents[0] == "outputs" else "part" if path.suffix else "model"
    if parents[1] == "results" and not path.suffix and name != "damaged":
        return "generation"
    if parents[0] == "batches":
        return "batch"
    return name.split("-")[0].split(".jsonl")[0]


def meet(notes: Path, fate: str) -> None:
    """Arm the failpoints of this process."""
    counts: Counter[str] = Counter()
    log = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    what, _, window = fate.partition(" ")
    refusing = False

    def reached(step: str, path: Path) -> None:
        nonlocal refusing
        here = f"{step} {kind(path)}"
        counts[here] += 1
        os.write(log, f"{here}\n".encode())
        if f"{here} {counts[here]}" == window:
            if what == "KILL":
                os.kill(os.getpid(), signal.SIGKILL)
            refusing = True
        if refusing:
            number = getattr(errno, what)
            raise OSError(number, os.strerror(number))

    failpoints.arm(reached)


def forked(notes: Path, fate: str, errors: Path, environment: dict[str, str], arguments: list[str]) -> None:
    """The command in a process that has imported everything already. Its stderr goes to a file."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
    os.chdir(notes.parent)  # no `.env` of a developer
    for name in [name for name in os.environ if name.startswith("VLLM_BATCH_")]:
        del os.environ[name]
    os.environ.update(environment, NO_COLOR="1", COLUMNS="200")
    meet(notes, fate)
    app(arguments)


if __name__ == "__main__":
    meet(Path(sys.argv[1]), sys.argv[2])
    app(sys.argv[3:])
