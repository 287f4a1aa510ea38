"""Kill real batch runs at every moment there is, and count what is lost, repeated or wrong.

    python -m tests.e2e.torture [--kills 200] [--seed 1] [--lines 300]

Batches of two models, with lines that the engine refuses, are answered by the true command line from an engine in a
process of its own (`witness.py`), which writes down what it is asked. Each batch is run, then `retry_failed`, then
restarted; each of these runs is killed again and again, at a named moment of a commit (`victim.py`) or whenever it
pleases a seeded dice, and given again until it completes. Then every line is compared with the one right answer.

What a kill may cost. Of the requests that the killed run had sent, those have no committed row that were in flight, at
most CONCURRENCY, and those whose row was not committed yet: WAITING_CHUNKS chunks handed over and one that was
filling, of CHUNK_ROWS rows each. So at most BOUND requests are sent again because of one kill.
"""

import argparse
import json
import multiprocessing
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow.parquet as pq
import yaml

from resources.batch_store.batch import Batch
from resources.batch_store.outputs import verify_outputs
from resources.batch_store.store import BatchStore
from tests.e2e import victim
from tests.e2e.witness import answer_to, is_refused
from tests.helpers import ROOT, chat, python, read_jsonl, wait_until

CONCURRENCY = 4
CHUNK_ROWS = 16
WAITING_CHUNKS = 2
BOUND = CONCURRENCY + (WAITING_CHUNKS + 1) * CHUNK_ROWS
OPTIONS = {"chunk_rows": CHUNK_ROWS, "flush_seconds": 0.01}
LONGEST_RUN_SECONDS = 60
_ANSWERING_SECONDS = 0.8
_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload(["tests.e2e.victim", "tests.helpers"])

_FILE = ("opened", "written", "synced", "renamed", "durable")
WINDOWS = [
    "written input",
    *(f"{step} batch.json" for step in _FILE),
    "registered batch",
    "written requests",
    *(f"{step} requests/summary.json" for step in _FILE),
    "ready requests",
    "set aside requests",
    "published requests",
    "made results",
    "made model",
    "made generation",
    *(f"{step} manifest.json" for step in _FILE),
    *(f"{step} chunk" for step in _FILE),
    "merged chunk",
    "source removed chunk",
    *(f"{step} current.json" for step in _FILE),
    "made outputs",
    *(f"{step} part" for step in _FILE[:-1]),
    *(f"{step} outputs/summary.json" for step in _FILE),
    "ready revision",
    "published revision",
    "link made output",
    "link switched output",
    *(f"{step} work.json" for step in _FILE),
    *(f"{step} run.json" for step in ("opened", "written", "renamed")),
]
"""Every window of the path of a batch from the file to the outputs, in about the order in which they are passed."""

Row = tuple[str, int, int]
"""(generation, line, attempt)"""


@dataclass
class Figures:
    """What was found. `repeated` counts requests that were sent and had no committed row when their run was killed."""

    lines: int = 0
    batches: int = 0
    runs: int = 0
    kills: int = 0
    lost: int = 0
    twice: int = 0
    wrong: int = 0
    repeated: int = 0
    most_repeated: int = 0
    windows: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return (
            f"kills {self.kills} (at {len(self.windows)} named windows and {self.kills - self.windows.total()} random "
            f"moments), runs {self.runs}, batches {self.batches} of {self.lines} lines in all: rows lost {self.lost}, "
            f"rows twice {self.twice}, wrong answers {self.wrong}, requests repeated {self.repeated}, most by one kill "
            f"{self.most_repeated} (bound {BOUND})"
        )


class Torture:
    """A data root, an engine that remembers, and one batch at a time."""

    def __init__(self, folder: Path, seed: int, say: bool = False) -> None:
        self.folder = folder
        self.figures = Figures()
        self.passed: set[str] = set()
        self.dice = random.Random(seed)
        self._seed, self._say = seed, say
        self._lines: dict[str, tuple[str, str]] = {}
        self._run_seconds = 2.0

    def __enter__(self) -> Self:
        self._engine = python("-m", "tests.e2e.witness", self.folder, str(self._seed), cwd=ROOT)
        assert self._engine.stdout is not None
        self.url = f"http://127.0.0.1:{int(self._engine.stdout.readline())}"
        entry = {"engine": "openai", "base_url": f"{self.url}/v1", "concurrency": CONCURRENCY}
        models = {name: entry | {"source": name} for name in ("one", "two")}
        (self.folder / "models.yaml").write_text(yaml.safe_dump({"models": models}))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.kill()
        self._engine.communicate()

    # The batch that is worked on.

    def begin(self, lines: int) -> None:
        """Write the file of another batch."""
        name = f"batch{self.figures.batches}"
        self.file = self.folder / f"{name}.jsonl"
        self._lines = {}
        for number in range(1, lines + 1):
            refused = {7: " refuse for now", 11: " refuse"}.get(number % 20, "")
            model = "two" if number % 3 == 0 else "one"
            self._lines[f"r{number}"] = (model, f"{name} line {number}{refused}")
        self.file.write_text("".join(chat(i, text, model) for i, (model, text) in self._lines.items()))
        (self.folder / "healed").unlink(missing_ok=True)
        self.figures.batches += 1
        self.figures.lines += lines

    @property
    def batch(self) -> Batch:
        return next(b for b in BatchStore(self.folder / "data") if b.spec.source_name == self.file.name)

    def heal(self) -> None:
        """From now on the engine answers what it refused for the time being."""
        (self.folder / "healed").touch()

    # Runs.

    def start(self, mode: str = "resume", fate: str | None = None) -> subprocess.Popen[str]:
        """`vllm-batch run` on the file, as a person starts it, or with a fate."""
        program: list[str | Path] = ["-m", "vllm_batch_pipelines.cli.main"]
        if fate is not None:
            program = ["-m", "tests.e2e.victim", self.folder / "notes", fate]
        self.figures.runs += 1
        return python(*program, *self._arguments(mode), env=self._environment, cwd=self.folder)

    def _forked(self, mode: str, fate: str) -> tuple[int | None, str]:
        """The same in a process that is forked with all modules imported, which takes a third of the time. Its exit
        code and stderr."""
        errors = self.folder / "stderr"
        arguments = (self.folder / "notes", fate, errors, self._environment, self._arguments(mode))
        process = _FORKING.Process(target=victim.forked, args=arguments)
        self.figures.runs += 1
        process.start()
        process.join(LONGEST_RUN_SECONDS)
        if process.exitcode is None:
            process.kill()
        return process.exitcode, errors.read_text() if errors.exists() else ""

    def _arguments(self, mode: str) -> list[str]:
        options = [word for name, value in OPTIONS.items() for word in ("--option", f"{name}={value}")]
        return ["run", str(self.file), "--mode", mode, *options]

    @property
    def _environment(self) -> dict[str, str]:
        return {
            "VLLM_BATCH_DATA": str(self.folder / "data"),
            "VLLM_BATCH_MODELS_FILE": str(self.folder / "models.yaml"),
            "VLLM_BATCH_RUNTIME_DIR": str(self.folder / "run"),
        }

    def killed(self, mode: str = "resume", window: str | None = None, nth: int = 1) -> bool:
        """A run that is killed, at a window or at a random moment; False where it came to its end before.

        Raises:
            AssertionError: it lost a committed row, cost more requests than BOUND, or ended badly.
        """
        before, asked_before = self.committed(), self.asked()
        if window is None:
            status, errors = self._kill_at_random(mode, asked_before)
        else:
            status, errors = self._forked(mode, f"KILL {window} {nth}")
        wait_until(self._all_is_written_down)
        after, asked = self.committed(), self.asked() - asked_before
        if status != -signal.SIGKILL:
            assert status == 1, errors  # there are always lines that the engine refuses
            return False
        figures = self.figures
        figures.kills += 1
        if window:
            figures.windows[window] += 1
        lost = [row for row in before - after if not self._was_replaced(row[0])]
        cost = asked - len(after - before)
        figures.lost += len(lost)
        figures.repeated += cost
        figures.most_repeated = max(figures.most_repeated, cost)
        self._tell(f"{figures.kills:4d}  {mode:12s} {window or 'random':28s} {asked:4d} asked, {cost:3d} to repeat")
        assert not lost, f"{len(lost)} committed rows are gone after a kill at {window}"
        assert cost <= BOUND, f"a kill at {window} costs {cost} requests, more than {BOUND}"
        return True

    def _kill_at_random(self, mode: str, asked_before: int) -> tuple[int, str]:
        """At any moment; three times in four at one after the first request, since most of the time is for starting."""
        began = time.monotonic()
        run = self.start(mode)
        seconds = self.dice.uniform(0.2, 1) * self._run_seconds
        if self.dice.random() < 0.75:
            wait_until(lambda: self.asked() > asked_before or run.poll() is not None, LONGEST_RUN_SECONDS)
            seconds = self.dice.uniform(0, 1) * _ANSWERING_SECONDS
        try:
            run.communicate(timeout=seconds)
            self._run_seconds = time.monotonic() - began
        except subprocess.TimeoutExpired:
            run.kill()
        _, errors = run.communicate()
        return run.returncode, errors

    def complete(self, mode: str = "resume") -> None:
        """A run that nobody kills, and the comparison of everything with what is right."""
        status, errors = self._forked(mode, "NOTHING")
        assert status == 1, errors
        self.compare()

    def compare(self) -> None:
        """Every line once, in both forms of the outputs, with the one right answer."""
        batch, healed, figures = self.batch, (self.folder / "healed").exists(), self.figures
        output, errors = (read_jsonl(batch.output_dir / name) for name in ("output.jsonl", "errors.jsonl"))
        count = Counter(line["custom_id"] for line in (*output, *errors))
        figures.lost += sum(not count[i] for i in self._lines)
        figures.twice += sum(number - 1 for number in count.values() if number > 1)
        for line in output:
            model, text = self._lines[line["custom_id"]]
            found = line["response"]["body"]["choices"][0]["message"]["content"]
            figures.wrong += found != answer_to(model, text) or is_refused(text, healed)
        for line in errors:
            model, text = self._lines[line["custom_id"]]
            right = is_refused(text, healed) and line["response"]["body"]["error"]["message"] == f"refused: {text}"
            figures.wrong += not right
        problems = verify_outputs(batch)
        assert not problems, problems
        assert (figures.lost, figures.twice, figures.wrong) == (0, 0, 0), str(figures)
        if (self.folder / "notes").exists():
            self.passed |= set((self.folder / "notes").read_text().splitlines())

    # What is on the disk and in the engine's book.

    def committed(self) -> set[Row]:
        """Every row that stands in a chunk."""
        if not self.file.exists() or not (self.folder / "data" / "batches").exists():
            return set()
        rows: set[Row] = set()
        for path in (self.folder / "data" / "batches").glob(f"{self.file.stem}-*/results/*/*/chunk-*.parquet"):
            generation = str(path.parent.relative_to(path.parents[2]))
            table = pq.read_table(path, columns=["line", "attempt"]).to_pylist()
            rows |= {(generation, row["line"], row["attempt"]) for row in table}
        return rows

    def asked(self) -> int:
        log = self.folder / "asked.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def texts_asked(self) -> Counter[str]:
        return Counter(json.loads(line)["text"] for line in (self.folder / "asked.jsonl").read_text().splitlines())

    def _was_replaced(self, generation: str) -> bool:
        """Whether a restart has taken the place of a generation and was published."""
        model = generation.split("/")[0]
        current: dict[str, Any] = self.batch.current().get(model, {})
        return bool(current) and current["generation"] != generation

    def _all_is_written_down(self) -> bool:
        with urllib.request.urlopen(self.url, timeout=10) as answer:
            return bool(json.load(answer)["open"] == 0)

    def _tell(self, text: str) -> None:
        if self._say:
            print(text, flush=True)


def fates(dice: random.Random) -> Iterator[tuple[str | None, int]]:
    """Named windows, all of them before any comes again, and a random moment after each second one."""
    while True:
        for number, window in enumerate(dice.sample(WINDOWS, len(WINDOWS))):
            yield window, dice.choice([1, 1, 2, 3])
            if number % 2:
                yield None, 1


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill real batch runs and count what is lost, repeated or wrong.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lines", type=int, default=300, help="lines of a batch")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="vb-", dir="/tmp") as folder,
        Torture(Path(folder), arguments.seed, say=True) as torture,
    ):
        figures, coming = torture.figures, fates(torture.dice)
        while figures.kills < arguments.kills:
            torture.begin(arguments.lines)
            for mode, kills in (("resume", 9), ("retry_failed", 4), ("restart", 6)):
                for _ in range(kills):
                    window, nth = next(coming)
                    if not torture.killed(mode, window, nth):
                        break  # the window was not on the way any more: it is complete
                    if figures.kills >= arguments.kills:
                        break
                torture.complete(mode)
                torture.heal()
        unknown, unmet = torture.passed - set(WINDOWS), set(WINDOWS) - torture.passed
        print(f"seed {arguments.seed}: {figures}")
        if unknown or unmet:
            sys.exit(f"windows without a name here: {sorted(unknown)}; never passed: {sorted(unmet)}")


if __name__ == "__main__":
    main()
