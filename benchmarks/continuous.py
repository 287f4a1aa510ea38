"""Requests whose answers differ much in length: ours against vLLM's own ways, and against a barrier a chunk."""

import itertools
import json
import random
import statistics
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import Figure, Report, Side, Unfit, against, alternate, held, ratio, say, seconds_of
from benchmarks.engines import (
    MODEL_FOLDER,
    DemoServer,
    Turns,
    chat,
    demo_server,
    process_group,
    trouble,
    vllm_environment,
    write_jsonl,
)
from resources.engine.vllm_command import server_arguments

SAMPLE_SECONDS = 0.2
Sample = tuple[float, int, int, int]
"""Time; requests running, waiting, finished."""
OURS, WATCHED, GENERATE, RUN_BATCH = "ours", "ours, watched", "LLM.chat over all", "run-batch"


@dataclass(frozen=True)
class Size:
    requests: int = 192
    longest: int = 200
    seqs: int = 64
    chunk_rows: int = 16
    barriers: dict[int, int] = field(default_factory=lambda: {16: 2, 32: 3})
    """Requests a barrier, and in how many rounds."""
    rounds: int = 7
    watched_rounds: int = 3
    run_batch_rounds: int = 2


QUICK = Size(
    requests=24, longest=6, seqs=8, chunk_rows=4, barriers={4: 2}, rounds=3, watched_rounds=1, run_batch_rounds=1
)


def run(quick: bool, budget_seconds: float) -> Report:
    size = QUICK if quick else Size()
    rows = long_tailed(size)
    tokens = sum(row["body"]["max_tokens"] for row in rows)
    # The same for all. Without the prefix cache, for which the second pass would not be the work of the first.
    engine = {"max_num_seqs": size.seqs, "max_num_batched_tokens": 2048, "enable_prefix_caching": False}
    with demo_server(**engine) as server:
        say("  our server is up")
        file = write_jsonl(server.work / "requests.jsonl", rows)
        measured = Measured(server, file, rows, tokens, size)
        times = measured.all(budget_seconds)
    report = Report(
        "continuous",
        "Long-tailed requests: ours against vLLM's own ways and a barrier a chunk",
        f"{size.requests} chat requests, {tokens:,} tokens out (log-normal `max_tokens`, `ignore_eos`), at most "
        f"{size.seqs} at once on all sides, prefix cache off. Ours is check and answer with `chunk_rows` "
        f"{size.chunk_rows} against a running server, no `concurrency` set. Engines that wait are stopped (SIGSTOP). "
        "How full the server is comes from passes of their own, in which its metrics are read five times a second. "
        "Ratios are speeds: ours above the other's, above 1 where ours is faster.",
    )
    report.raw = {"tokens": tokens, "seconds": times, "whole_run_batch": measured.whole, "load": measured.loads}
    report.figures = _figures(times, measured, size, tokens)
    return report


def long_tailed(size: Size) -> list[dict[str, Any]]:
    chance = random.Random(6)
    lengths = [min(size.longest, max(1, round(chance.lognormvariate(2.7, 1)))) for _ in range(size.requests)]
    return [
        chat(f"r{number}", f"Tell me about the number {number}, please.", max_tokens=length)
        for number, length in enumerate(lengths)
    ]


class Measured:
    """The sides, on engines that are up side by side."""

    def __init__(self, server: DemoServer, file: Path, rows: list[dict[str, Any]], tokens: int, size: Size) -> None:
        self._server, self._file, self._rows, self._tokens, self._size = server, file, rows, tokens, size
        self.whole: list[float] = []
        """run-batch with its start and end, seconds."""
        self.loads: list[dict[str, Any]] = []

    def all(self, budget_seconds: float) -> dict[str, list[float]]:
        server, size = self._server, self._size
        engine = dict(server.entry.engine_args)
        asked = json.dumps({"file": str(self._file), "engine": engine | {"model": str(MODEL_FOLDER)}})
        command = [sys.executable, "-m", "benchmarks.offline_llm", asked]
        with (
            (server.work / "llm.log").open("ab") as log,
            process_group(command, env=vllm_environment(server.entry), log=log, talks=True) as llm,
            Turns({OURS: server.group, GENERATE: llm.pid}) as turns,
        ):
            self._turns, self._llm = turns, llm
            turns.only(GENERATE)
            self._result()
            say("  LLM is up")
            sides: dict[str, Side] = {
                OURS: self._ours,
                GENERATE: partial(self._offline, 0),
                WATCHED: partial(self._ours, watched=True),
            }
            fewer = {WATCHED: size.watched_rounds}
            for barrier, rounds in size.barriers.items():
                sides[_barrier(barrier)] = partial(self._offline, barrier)
                fewer[_barrier(barrier)] = rounds
            sides[RUN_BATCH] = self._run_batch
            fewer[RUN_BATCH] = size.run_batch_rounds
            return alternate(sides, size.rounds, fewer=fewer, budget_seconds=budget_seconds)

    def _ours(self, _: int, *, watched: bool = False) -> float:
        self._turns.only(OURS)
        self._server.answer([chat("wake-up", "Wake up.", max_tokens=1)])
        with Watch(self._server, len(self._rows), self._size.seqs) if watched else nullcontext() as watch:
            answered = self._server.answer(self._rows, chunk_rows=self._size.chunk_rows)
        self._right(OURS, answered.report.completion_tokens)
        if watch:
            self.loads.append(watch.found())
        return answered.seconds

    def _offline(self, barrier: int, _: int = 0) -> float:
        self._turns.only(GENERATE)
        assert self._llm.stdin
        self._llm.stdin.write(f"{barrier}\n")
        self._llm.stdin.flush()
        result = self._result()
        self._right(f"LLM, {barrier}", int(result["tokens"]))
        return result["seconds"]

    def _result(self) -> dict[str, float]:
        assert self._llm.stdout
        log = self._server.work / "llm.log"
        for line in self._llm.stdout:
            if line.startswith("RESULT "):
                found: dict[str, float] = json.loads(line.removeprefix("RESULT "))
                return found
            with log.open("a") as file:
                file.write(line)
        raise Unfit(f"LLM is gone: {trouble(log)}")

    def _run_batch(self, number: int, again: bool = True) -> float:
        """vLLM's run-batch. Its seconds are from its progress bar's first line, where it has handed all requests to its
        engine, until its output is written."""
        self._turns.only(None)
        output = self._server.work / f"run-batch-{number}.jsonl"
        command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.run_batch", "-i", str(self._file)]
        command += ["-o", str(output), *_without_media(server_arguments(self._server.entry))]
        began = time.time()
        log_path = self._server.work / f"run-batch-{number}.log"
        with (
            log_path.open("wb") as log,
            process_group(command, env=vllm_environment(self._server.entry), log=log) as process,
        ):
            bar = None
            while process.poll() is None:
                if bar is None and b"Running batch:" in log_path.read_bytes():
                    bar = time.time()
                time.sleep(0.05)
            ended = time.time()
        if process.returncode and bar is None and again:  # nothing was measured yet
            say(f"  run-batch did not start, once more: {trouble(log_path)}")
            return self._run_batch(number, again=False)
        if process.returncode or bar is None:
            raise Unfit(f"run-batch failed: {trouble(log_path)}")
        answers = [json.loads(line) for line in output.read_text().splitlines()]
        self._right(RUN_BATCH, sum(row["response"]["body"]["usage"]["completion_tokens"] for row in answers))
        self.whole.append(ended - began)
        return output.stat().st_mtime - bar

    def _right(self, who: str, tokens: int) -> None:
        if tokens != self._tokens:
            raise Unfit(f"{who} made {tokens} tokens, {self._tokens} were asked for")


class Watch:
    """Samples how full the server is, five times a second."""

    def __init__(self, server: DemoServer, requests: int, seqs: int) -> None:
        self._server, self._requests, self._seqs = server, requests, seqs
        self._before = server.finished_requests()
        self._samples: list[Sample] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            found = self._server.metrics()
            finished = int(found.get("request_success_total", 0)) - self._before
            running, waiting = int(found["num_requests_running"]), int(found["num_requests_waiting"])
            self._samples.append((time.monotonic(), running, waiting, finished))
            if self._end.wait(SAMPLE_SECONDS):
                return

    def found(self) -> dict[str, Any]:
        began = self._samples[0][0]
        samples = [(round(moment - began, 2), *counts) for moment, *counts in self._samples]
        shares = occupancy(self._samples, self._requests, self._seqs)
        return shares | {"samples_seconds_running_waiting_finished": samples}


def occupancy(samples: list[Sample], requests: int, seqs: int) -> dict[str, float]:
    """Time-weighted shares of what the server can hold, min(seqs, requests left), from its first request on.

    vLLM sets its numbers at the end of a step, when what the step finished is gone and nothing has taken its place. So
    the time until a change belongs to the step that ended there, and in it were those that run now and those that it
    finished: `step`. Where several steps fall between two samples that is too much by what all but the last finished;
    `gauge`, the running ones as vLLM says it, is too little. `_sending` ends when all requests are at the server,
    `_starting` when all have begun; from there on it runs all that are left.
    """
    seen = [sample for sample in samples if any(sample[1:])]
    shares: dict[str, float] = {}
    for until, begun_only in (("sending", False), ("starting", True)):
        step, gauge, seconds = 0.0, 0.0, 0.0
        since: float | None = None
        for now, after in itertools.pairwise(seen):
            if now[1] + now[3] + (0 if begun_only else now[2]) >= requests:
                break
            since = now[0] if since is None else since
            room = min(seqs, requests - now[3])
            gauge += (after[0] - now[0]) * now[1] / room
            if now[1:] != after[1:]:
                step += (after[0] - since) * min(room, after[1] + after[3] - now[3]) / room
                seconds += after[0] - since
                since = None
        weights = max(seconds, 1e-9)
        shares |= {f"step_{until}": step / weights, f"gauge_{until}": gauge / weights, f"seconds_{until}": seconds}
    return shares


def _without_media(arguments: list[str]) -> list[str]:
    """Without the arguments that are for a server alone."""
    return [a for a in arguments if a not in ("--enable-request-id-headers", "--disable-uvicorn-access-log")]


def _barrier(size: int) -> str:
    return f"LLM.chat, a barrier per {size}"


def _figures(times: dict[str, list[float]], measured: Measured, size: Size, tokens: int) -> list[Figure]:
    ours = times[OURS]
    figures = [seconds_of(name, seconds) for name, seconds in times.items()]
    figures.append(seconds_of("run-batch with its start", measured.whole))
    figures.append(Figure("ours, tokens/s", f"{tokens / statistics.median(ours):.0f}"))
    ratios = {name: ratio(seconds, ours) for name, seconds in times.items() if name not in (OURS, WATCHED)}
    others = [GENERATE, RUN_BATCH]
    for name in others:
        figures.append(Figure(f"speed, ours / {name}", str(ratios[name])))
    best = min(others, key=lambda name: ratios[name].median)
    figures.append(held(ratios[best], f"speed, ours / best other ({best})", at_least=0.93))
    for barrier in size.barriers:
        figures.append(held(ratios[_barrier(barrier)], f"speed, ours / {_barrier(barrier)}", at_least=1.3))
    keys = [key for key in measured.loads[0] if not key.startswith("samples")]
    shares = {key: statistics.median(load[key] for load in measured.loads) for key in keys}
    what = f"requests in a step / what the server can hold (min({size.seqs}, left)), until the last began"
    figures.append(against(shares["step_starting"], f"{shares['step_starting']:.3f}", what, at_least=0.97))
    text = f"{shares['step_sending']:.3f} (over {shares['seconds_sending']:.1f} s)"
    figures.append(Figure("the same, until the last was sent", text))
    what = "the same, by vLLM's gauge at the end of a step, when what finished is gone, until the last began"
    figures.append(Figure(what, f"{shares['gauge_starting']:.3f}"))
    return figures
