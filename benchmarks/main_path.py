"""The main path without a model: a large file through the three assets of a real Dagster run on PostgreSQL.

    python -m benchmarks.main_path [--lines 1000000] [--runs 1] [--out FILE]

The null engine answers at once, so what is measured is ours: reading, checking, dispatch, commits, outputs. Each run is
a process of its own (peak memory is the kernel's figure for it) on a fresh data root.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import LINE_BYTES, Figure, Report, against, machine, say, write_null_input

ASSETS = ("batch_requests", "batch_results", "batch_output")


def main(
    lines: Annotated[int, typer.Option(help="Lines of the file, 600 bytes each.")] = 1_000_000,
    runs: Annotated[int, typer.Option(help="Runs; medians are shown.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Where to write the figures as JSON.")] = None,
) -> None:
    """Measure the main path with the null engine."""
    figures = measure_runs(lines, runs)
    report = {"machine": machine(), "date": datetime.now(UTC).date().isoformat(), "lines": lines, "runs": figures}
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")
    show(report)


def run(quick: bool, budget_seconds: float) -> Report:
    """One run, as a part of `python -m benchmarks`."""
    lines = 10_000 if quick else 1_000_000
    (found,) = measure_runs(lines, 1)
    report = Report(
        "main_path",
        "The whole path in Dagster, with the null engine",
        f"{lines:,} lines of {LINE_BYTES} bytes through the three assets of a Dagster run on PostgreSQL; one run.",
        raw=found,
    )
    for name in ("register", *ASSETS):
        report.figures.append(Figure(name, f"{found[name]:.1f} s, {lines / found[name]:,.0f} lines/s"))
    report.figures.append(against(found["run"], f"{found['run']:.1f} s", "whole run, seconds", at_most=60))
    report.figures.append(against(found["peak_rss_mb"], f"{found['peak_rss_mb']:.0f}", "peak memory, MB", at_most=400))
    return report


def measure_runs(lines: int, runs: int) -> list[dict[str, float]]:
    figures = []
    with tempfile.TemporaryDirectory(prefix="vllm-batch-bench-", dir="/tmp") as folder:
        work = Path(folder)
        file = work / "bench.jsonl"
        say(f"  writing {lines} lines of {LINE_BYTES} bytes")
        write_null_input(file, lines)
        for run in range(runs):
            shutil.rmtree(work / "data", ignore_errors=True)
            say(f"  run {run + 1} of {runs}")
            figures.append(measure(work, file))
    return figures


def measure(work: Path, file: Path) -> dict[str, float]:
    """One Dagster run in a process of its own."""
    models = work / "models.yaml"
    models.write_text('models: {dry-run: {engine: "null"}}\n')
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_BATCH_")} | {
        "VLLM_BATCH_DATA": str(work / "data"),
        "VLLM_BATCH_RUNTIME_DIR": str(work / "run"),
        "VLLM_BATCH_MODELS_FILE": str(models),
    }
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.main_path", "--child", str(file)]
    with (work / "log").open("w") as log:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=log, check=False)
    if done.returncode:
        raise SystemExit(f"The run failed:\n{(work / 'log').read_text()[-4000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def child(file: Path) -> None:
    """Register the file, run process_batch on a real instance, print the figures as one line of JSON."""
    from assets.partitions import BATCH_FILES
    from resources.batch_store.store import BatchStore
    from resources.postgres import EmbeddedPostgres
    from resources.settings import settings
    from vllm_batch_pipelines.definitions import defs
    from vllm_batch_pipelines.stack import instance_env

    config = settings()
    config.data_root.mkdir(parents=True)
    config.dagster_home_dir.mkdir()
    figures: dict[str, float] = {}
    with EmbeddedPostgres(config.data_root, config.runtime_root), instance_env(config) as instance:
        started = time.monotonic()
        batch = BatchStore(config.data_root).register(file).batch
        figures["register"] = time.monotonic() - started
        instance.add_dynamic_partitions(str(BATCH_FILES.name), [batch.key])
        started = time.monotonic()
        result = defs.resolve_job_def("process_batch").execute_in_process(instance=instance, partition_key=batch.key)
        figures["run"] = time.monotonic() - started
        for step in instance.get_run_step_stats(result.run_id):
            figures[step.step_key] = (step.end_time or 0) - (step.start_time or 0)
        summary = batch.output_summary() or {}
        assert summary["succeeded"] == summary["lines"], summary
        figures["lines"] = summary["lines"]
    figures["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(figures))


def show(report: dict[str, Any]) -> None:
    lines = report["lines"]
    print(f"{lines} lines of {LINE_BYTES} bytes, null engine, {report['machine']}, {report['date']}\n")
    print("| step | seconds | lines/s |")
    print("|---|---|---|")
    for name in ("register", *ASSETS, "run"):
        seconds = statistics.median(run[name] for run in report["runs"])
        print(f"| {'whole run' if name == 'run' else name} | {seconds:.1f} | {lines / seconds:,.0f} |")
    print(f"\npeak memory {statistics.median(run['peak_rss_mb'] for run in report['runs']):.0f} MB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]))
    else:
        app = typer.Typer(pretty_exceptions_enable=False)
        app.command()(main)
        app()
