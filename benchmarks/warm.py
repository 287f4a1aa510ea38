"""What a warm server saves: the time from a run's start to its first answer, and loads over many small files.

Small files through `vllm-batch run`, a process each, and through the inbox of `vllm-batch up`. Nothing is left running
at the end.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset
import yaml

from benchmarks.common import ROOT, Figure, Report, Unfit, against, alternate, say, seconds_of
from benchmarks.engines import MODEL, chat, demo_entry, write_jsonl
from resources.batch_store.status import status_of
from resources.batch_store.store import BatchStore
from resources.engine.catalog import ModelEntry
from resources.engine.hosts import Hosts
from resources.settings import Settings
from vllm_batch_pipelines.stack import stack_state

OTHER = "minilm"
OTHER_FOLDER = ROOT / "models" / "all-minilm-l6-v2"
COMMAND = [sys.executable, "-m", "vllm_batch_pipelines.cli.main"]
LOOK_SECONDS = 0.5
"""How often hosts are counted; a load takes ten times as long."""


@dataclass(frozen=True)
class Size:
    files: int = 20
    lines: int = 5
    limit_seconds: float = 900


QUICK = Size(files=4, lines=2)


def run(quick: bool, budget_seconds: float) -> Report:
    size = QUICK if quick else Size()
    if not (OTHER_FOLDER / "config.json").is_file():
        raise Unfit(f"No embedding model at {OTHER_FOLDER}: run `make test-models`.")
    report = Report(
        "warm",
        "Warm servers: first answers, and loads over many small files",
        f"Files of {size.lines} lines. First: `vllm-batch run`, a process a file, from its start to its first answer; "
        "the null engine's run is what a run costs without a model. Then: files dropped all at once into the inbox of "
        "`vllm-batch up`, for one model, and for two models by turns that share the one device.",
    )
    with tempfile.TemporaryDirectory(prefix="vbw-", dir="/tmp") as folder:
        place = Place(Path(folder), size)
        try:
            _alone(place, report)
            with place.stack():
                _dropped(place, report)
        finally:
            place.stop_hosts()
    return report


def _alone(place: "Place", report: Report) -> None:
    files = place.size.files
    cold = place.run("cold")
    say(f"  cold: first answer after {cold:.1f} s")
    times = alternate(
        {
            "null engine": lambda number: place.run(f"null-{number}", "--engine", "null"),
            "warm": lambda number: place.run(f"warm-{number}"),
        },
        files,
    )
    loads = place.loads()
    more = statistics.median(times["warm"]) - statistics.median(times["null engine"])
    report.raw["first_answer_seconds"] = times | {"cold": [cold]}
    report.figures.append(Figure("first answer, cold, seconds", f"{cold:.1f}"))
    report.figures += [seconds_of(f"first answer, {name}", seconds) for name, seconds in times.items()]
    report.figures.append(against(more, f"{more:.2f}", "warm above null engine, seconds", at_most=3))
    report.figures.append(against(loads, f"{loads}", f"loads over {files + 1} runs one after the other", at_most=1))


def _dropped(place: "Place", report: Report) -> None:
    files = place.size.files
    for what, models, fewest in (
        (f"{files} files for one model", [MODEL], 1),
        (f"{files} files for two models by turns, one of them warm", [MODEL, OTHER], 1),
    ):
        before, began = place.loads(), time.monotonic()
        place.drop([models[number % len(models)] for number in range(files)])
        loads, seconds = place.loads() - before, time.monotonic() - began
        say(f"  {what}: {loads} loads, {seconds:.0f} s")
        report.raw[what] = {"loads": loads, "seconds": seconds}
        report.figures.append(against(loads, f"{loads} ({seconds:.0f} s in all)", f"loads, {what}", at_most=fewest))


class Place:
    """A data root and a runtime folder of their own, with two models in the catalog."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.folder, self.size = folder, size
        self._seen: set[str] = set()
        self._dropped = 0
        other = ModelEntry(
            name=OTHER, source=str(OTHER_FOLDER), engine_args={"dtype": "float32", "enforce_eager": True}
        )
        entries = {
            entry.name: {"source": entry.source, "engine_args": entry.engine_args} for entry in (demo_entry(), other)
        }
        self._settings = Settings(data=folder / "data", runtime_dir=folder / "run", models_file=folder / "models.yaml")
        (folder / "models.yaml").write_text(yaml.safe_dump({"models": entries}))
        self._environment = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_BATCH_")} | {
            "VLLM_BATCH_DATA": str(folder / "data"),
            "VLLM_BATCH_RUNTIME_DIR": str(folder / "run"),
            "VLLM_BATCH_MODELS_FILE": str(folder / "models.yaml"),
        }

    def run(self, name: str, *arguments: str) -> float:
        """One file through `vllm-batch run`: seconds from its start to its first answer."""
        file = write_jsonl(self.folder / f"{name}.jsonl", self._rows(name, MODEL))
        command = [*COMMAND, "run", str(file), "--json", *arguments]
        began = time.time()
        done = subprocess.run(command, env=self._environment, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unfit(f"the run failed:\n{done.stderr[-4000:]}")
        table = pyarrow.dataset.dataset(json.loads(done.stdout)["results"]).to_table(columns=["finished_at"])
        self.loads()
        return float(min(row["finished_at"].timestamp() for row in table.to_pylist()) - began)

    @contextmanager
    def stack(self) -> Iterator[None]:
        """`vllm-batch up`, and its end."""
        with (self.folder / "up.log").open("wb") as log:
            process = subprocess.Popen(
                [*COMMAND, "up", "--port", "0"], env=self._environment, cwd=ROOT, stdout=log, stderr=log
            )
        try:
            while not (state := stack_state(self._settings)) or not state["url"]:
                if process.poll() is not None:
                    raise Unfit(f"the stack did not start:\n{(self.folder / 'up.log').read_text()}")
                time.sleep(LOOK_SECONDS)
            yield
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()

    def drop(self, models: list[str]) -> None:
        """Drop a file for each of these models, and wait until all are answered."""
        inbox = self.folder / "data" / "inbox"
        inbox.mkdir(parents=True, exist_ok=True)
        store = BatchStore(self.folder / "data")
        before = set(store.keys())
        for model in models:
            self._dropped += 1
            name = f"dropped-{self._dropped:02}"
            write_jsonl(self.folder / "next", self._rows(name, model)).rename(inbox / f"{name}.jsonl")
        limit = time.monotonic() + self.size.limit_seconds
        while len(new := set(store.keys()) - before) < len(models) or any(
            status_of(store, store.get(key)).state != "completed" for key in new
        ):
            if time.monotonic() > limit:
                raise Unfit(f"not done after {self.size.limit_seconds:.0f} s:\n{(self.folder / 'up.log').read_text()}")
            self.loads()
            time.sleep(LOOK_SECONDS)

    def loads(self) -> int:
        """Servers seen so far."""
        self._seen |= {host.id for host in Hosts(self.folder / "run").status()}
        return len(self._seen)

    def stop_hosts(self) -> None:
        hosts = Hosts(self.folder / "run")
        while hosts.status():
            hosts.stop_idle()
            time.sleep(LOOK_SECONDS)

    def _rows(self, name: str, model: str) -> list[dict[str, Any]]:
        texts = [f"{name}: what is {number} plus one?" for number in range(self.size.lines)]
        if model == MODEL:
            return [chat(f"r{number}", text, max_tokens=8) for number, text in enumerate(texts)]
        return [
            {
                "custom_id": f"r{number}",
                "method": "POST",
                "url": "/v1/embeddings",
                "body": {"model": model, "input": text},
            }
            for number, text in enumerate(texts)
        ]
